"""A Hub on this machine, for tests: the real clients speak to it over HTTP through HF_ENDPOINT.

Files go up inline unless the server was told to take large ones by git-LFS, which clients only speak under
HF_HUB_DISABLE_XET=1. A `fault` function makes it answer like a Hub on a bad day.
"""

import base64
import hashlib
import json
import re
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import yaml

from .store import Store, entry, now

BINARY = re.compile(r"\.(safetensors|bin|pt|parquet|tar|arrow|gz|zip|jpg|png)$")
TYPES = {"models": "model", "datasets": "dataset", "spaces": "space"}
FRONT_MATTER = re.compile(r"^---\r?\n(.*?)\r?\n---", re.DOTALL)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "local-hub"

    def log_message(self, fmt, *args):
        self.server.requests.append((self.command, self.path))

    # -- plumbing -----------------------------------------------------------------------------------
    def body(self):
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            out = b""
            while n := int(self.rfile.readline().strip() or b"0", 16):
                out += self.rfile.read(n)
                self.rfile.readline()
            self.rfile.readline()
            return out
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def send(self, code, obj=None, headers=None, raw=None):
        data = raw if raw is not None else (b"" if obj is None else json.dumps(obj).encode())
        self.send_response(code)
        if raw is None:
            self.send_header("Content-Type", "application/json")
        for k, v in (headers or {}).items():
            self.send_header(k, str(v))
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if self.cut else data)
        if self.cut:
            self.close_connection = True

    def error(self, code, err=None, msg=""):
        headers = {"X-Error-Code": err, "X-Error-Message": msg or err} if err else None
        self.send(code, {"error": msg or err or str(code)}, headers)

    def authed(self):
        known = {f"Bearer {token}" for token in (self.server.token, self.server.reader)}
        return self.headers.get("Authorization", "") in known if self.server.token else True

    def may_write(self):
        """Whether the token may write; answers if not."""
        if not self.authed():
            self.error(401, "RepoNotFound", "Invalid username or password.")
        elif self.headers.get("Authorization", "") == f"Bearer {self.server.reader}":
            self.error(403, None, "Forbidden: you must use a write token to upload to a repository.")
        else:
            return True
        return False

    def do(self):
        url = urllib.parse.urlsplit(self.path)
        path, self.query = url.path, urllib.parse.parse_qs(url.query)
        data = self.body()
        self.cut = False
        fault = self.server.fault(self.command, path) if self.server.fault else None
        if fault == "cut":
            self.cut = True  # half of the answer, then nothing
        elif isinstance(fault, float):
            time.sleep(fault)
        elif fault:
            return self.error(fault, None, f"fault {fault}")
        for method, pattern, fn in ROUTES:
            m = re.fullmatch(pattern, path)
            if m and self.command in method:
                groups = {k: urllib.parse.unquote(v) for k, v in m.groupdict().items() if v is not None}
                with self.server.store.lock:
                    return fn(self, data, **groups)
        self.error(404, "EntryNotFound" if "/resolve/" in path else None)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do

    def repo(self, kind, rid, rev=None, content=False):
        """(repo, sha) or None after having answered with the Hub's error codes."""
        key = f"{kind}/{rid}"
        repo = self.server.store.repos.get(key)
        if repo is None or (repo["private"] and not self.authed()):
            self.error(404 if self.authed() else 401, "RepoNotFound", "Repository not found")
        elif content and key in self.server.gated and not self.authed():
            self.error(401, "GatedRepo", f"Access to {kind} {rid} is restricted.")
        elif rev is not None and self.server.store.revision(repo, rev) is None:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        else:
            return repo, (self.server.store.revision(repo, rev) if rev else repo["branches"]["main"])

    # -- accounts and repositories --------------------------------------------------------------------
    def whoami(self, data):
        if not self.authed():
            return self.error(401, None, "Invalid username or password.")
        self.send(
            200,
            {
                "type": "user",
                "id": "u",
                "name": self.server.user,
                "fullname": self.server.user,
                "orgs": [],
                "auth": {"type": "access_token", "accessToken": {"displayName": "t", "role": "write"}},
            },
        )

    def create_repo(self, data):
        if not self.may_write():
            return None
        p = json.loads(data)
        rid = f"{p.get('organization') or self.server.user}/{p['name']}"
        kind = p.get("type") or "model"
        key = f"{kind}/{rid}"
        url = f"{self.server.base}/{'' if kind == 'model' else kind + 's/'}{rid}"
        if key in self.server.store.repos:
            return self.send(409, {"error": "You already created this repo", "url": url})
        self.server.store.create(key, p.get("visibility") == "private")
        self.send(200, {"url": url, "name": rid, "id": rid})

    def auth_check(self, data, kinds, rid, write=None):
        if self.repo(TYPES[kinds], rid) and (write is None or self.may_write()):
            self.send(200, {})

    def delete_repo(self, data):
        p = json.loads(data)
        rid = f"{p.get('organization') or self.server.user}/{p['name']}"
        if self.server.store.repos.pop(f"{p.get('type') or 'model'}/{rid}", None) is None:
            return self.error(404, "RepoNotFound")
        self.send(200, {})

    def validate_yaml(self, data):
        match = FRONT_MATTER.match(json.loads(data)["content"])
        try:
            meta = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError as error:
            return self.send(400, {"errors": [{"message": str(error)}], "warnings": []})
        warnings = [] if meta else [{"message": "empty or missing yaml metadata in repo card"}]
        self.send(200, {"errors": [], "warnings": warnings})

    def card(self, tree):
        if "README.md" not in tree:
            return None
        match = FRONT_MATTER.match(self.server.store.blob(tree["README.md"]["sha256"]).read_text())
        return yaml.safe_load(match[1]) if match else None

    def info(self, data, kinds, rid, rev="main"):
        if found := self.repo(TYPES[kinds], rid, rev):
            repo, sha = found
            tree, card = repo["commits"][sha], self.card(repo["commits"][sha]) or {}
            answer = {"_id": "0", "id": rid, "modelId": rid, "author": rid.split("/")[0], "sha": sha}
            answer |= {"private": repo["private"], "disabled": False, "downloads": 0, "likes": 0}
            answer |= {"gated": "auto" if f"{TYPES[kinds]}/{rid}" in self.server.gated else False}
            answer |= {"lastModified": now(), "createdAt": now(), "cardData": card, "tags": card.get("tags") or []}
            answer |= {name: card.get(name) for name in ("pipeline_tag", "library_name")}
            self.send(200, answer | {"siblings": [{"rfilename": path} for path in sorted(tree)]})

    # -- reading ----------------------------------------------------------------------------------------
    @staticmethod
    def entry(path, e):
        out = {"type": "file", "oid": e["oid"], "size": e["size"], "path": path}
        if e["lfs"]:
            out["lfs"] = {"oid": e["sha256"], "size": e["size"], "pointerSize": 130}
        return out

    def tree(self, data, kinds, rid, rev, sub=""):
        if found := self.repo(TYPES[kinds], rid, rev):
            repo, sha = found
            files, sub, out, dirs = repo["commits"][sha], sub.strip("/"), [], {}
            recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
            for path in sorted(files):
                if sub and not path.startswith(sub + "/"):
                    continue
                rest = path[len(sub) + 1 :] if sub else path
                parts = rest.split("/")
                for i in range(1, len(parts) if recursive else min(2, len(parts))):
                    d = "/".join(([sub] if sub else []) + parts[:i])
                    dirs.setdefault(d, directory(d))
                if recursive or len(parts) == 1:
                    out.append(self.entry(path, files[path]))
            if sub and not out and not dirs:
                return self.error(404, "EntryNotFound", f"{sub} does not exist on {rev}")
            self.send(200, list(dirs.values()) + out)

    def paths_info(self, data, kinds, rid, rev):
        if found := self.repo(TYPES[kinds], rid, rev):
            repo, sha = found
            files, out = repo["commits"][sha], []
            is_json = "json" in self.headers.get("Content-Type", "")
            form = json.loads(data) if is_json else urllib.parse.parse_qs(data.decode())
            for p in form.get("paths", []):
                if p in files:
                    out.append(self.entry(p, files[p]))
                elif any(f.startswith(p.rstrip("/") + "/") for f in files):
                    out.append(directory(p))
            self.send(200, out)

    def refs(self, data, kinds, rid):
        if found := self.repo(TYPES[kinds], rid):
            branches = found[0]["branches"].items()
            refs = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in branches]
            self.send(200, {"branches": refs, "tags": [], "converts": []})

    def commits(self, data, kinds, rid, rev):
        if found := self.repo(TYPES[kinds], rid, rev):
            own = {"message": "", "authors": [{"user": self.server.user}]}
            log = reversed(found[0]["log"])
            self.send(200, [own | {name: c[name] for name in ("id", "title", "date")} for c in log])

    def resolve_file(self, data, rid, rev, path, prefix="models"):
        if not (found := self.repo(TYPES[prefix], rid, rev, content=True)):
            return
        repo, sha = found
        e = repo["commits"][sha].get(path)
        if e is None:
            return self.send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        blob = self.server.store.blob(e["sha256"])
        head = {
            "ETag": f'"{e["sha256"] if e["lfs"] else e["oid"]}"',
            "X-Repo-Commit": sha,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if e["lfs"]:
            head |= {"X-Linked-Etag": f'"{e["sha256"]}"', "X-Linked-Size": e["size"]}
        start, end, code = 0, e["size"] - 1, 200
        if m := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            code = 206
            if m[1]:
                start, end = int(m[1]), min(int(m[2]), end) if m[2] else end
            else:
                start = max(0, e["size"] - int(m[2]))
            if start >= e["size"]:
                return self.send(416, None, {"Content-Range": f"bytes */{e['size']}"})
            head["Content-Range"] = f"bytes {start}-{end}/{e['size']}"
        if self.command == "HEAD":
            return self.send(code, None, head | {"Content-Length": end - start + 1}, raw=b"")
        with open(blob, "rb") as f:
            f.seek(start)
            self.send(code, None, head, raw=f.read(end - start + 1))

    # -- writing ----------------------------------------------------------------------------------------
    def preupload(self, data, kinds, rid, rev):
        if not self.may_write():
            return
        if found := self.repo(TYPES[kinds], rid, rev):
            tree = found[0]["commits"][found[1]]
            files = json.loads(data)["files"]
            answer = [
                {
                    "path": f["path"],
                    "shouldIgnore": False,
                    "oid": tree.get(f["path"], {}).get("oid"),
                    "uploadMode": "lfs" if self.server.lfs and BINARY.search(f["path"]) else "regular",
                }
                for f in files
            ]
            self.send(200, {"files": answer})

    def commit(self, data, kinds, rid, rev):
        store = self.server.store
        if not self.may_write():
            return
        if not (found := self.repo(TYPES[kinds], rid, rev)):
            return
        repo, sha = found
        tree, title = dict(repo["commits"][sha]), ""
        for line in data.splitlines():
            op = json.loads(line)
            key, v = op["key"], op["value"]
            if key == "header":
                title = v["summary"]
                if v.get("parentCommit") and v["parentCommit"] != sha:
                    return self.error(412, None, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                raw = base64.b64decode(v["content"])
                tree[v["path"]] = entry(store.put(raw), raw, lfs=False)
            elif key == "lfsFile":
                if not store.blob(v["oid"]).exists():
                    return self.error(400, None, f"LFS object {v['oid']} was never uploaded")
                tree[v["path"]] = entry(v["oid"], store.blob(v["oid"]).read_bytes(), lfs=True)
            elif key == "deletedFile":
                tree.pop(v["path"], None)
            elif key == "deletedFolder":
                tree = {p: e for p, e in tree.items() if not p.startswith(v["path"].rstrip("/") + "/")}
        branch = rev if rev in repo["branches"] else "main"
        new = store.commit(repo, branch, tree, title)
        prefix = "" if kinds == "models" else kinds + "/"
        url = f"{self.server.base}/{prefix}{rid}/commit/{new}"
        self.send(200, {"success": True, "commitOid": new, "commitUrl": url, "hookOutput": ""})

    def branch(self, data, kinds, rid, name):
        if self.may_write() and (found := self.repo(TYPES[kinds], rid)):
            if name in found[0]["branches"]:
                return self.error(409, None, f"Reference already exists: {name}")
            found[0]["branches"][name] = found[1]
            self.send(200, {})

    def lfs_batch(self, data, rid, prefix="models"):
        if not self.may_write():
            return
        objects = [{"oid": o["oid"], "size": o["size"]} for o in json.loads(data)["objects"]]
        for o in objects:
            if not self.server.store.blob(o["oid"]).exists():
                o["actions"] = {"upload": {"href": f"{self.server.base}/_lfs/{o['oid']}", "header": {}}}
        self.send(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, data, oid):
        if self.server.store.put(data) != oid:
            return self.error(400, None, "sha256 mismatch")
        self.send(200, {})


RID, KINDS = r"(?P<rid>[^/]+/[^/]+)", r"(?P<kinds>models|datasets|spaces)"
ROUTES = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create_repo),
    ("DELETE", r"/api/repos/delete", Handler.delete_repo),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("GET", rf"/api/{KINDS}/{RID}", Handler.info),
    ("GET", rf"/api/{KINDS}/{RID}/revision/(?P<rev>[^/]+)", Handler.info),
    ("GET", rf"/api/{KINDS}/{RID}/tree/(?P<rev>[^/]+)(?P<sub>/.*)?", Handler.tree),
    ("GET", rf"/api/{KINDS}/{RID}/auth-check(?P<write>/write)?", Handler.auth_check),
    ("POST", rf"/api/{KINDS}/{RID}/paths-info/(?P<rev>[^/]+)", Handler.paths_info),
    ("GET", rf"/api/{KINDS}/{RID}/refs", Handler.refs),
    ("GET", rf"/api/{KINDS}/{RID}/commits/(?P<rev>[^/]+)", Handler.commits),
    ("POST", rf"/api/{KINDS}/{RID}/preupload/(?P<rev>[^/]+)", Handler.preupload),
    ("POST", rf"/api/{KINDS}/{RID}/commit/(?P<rev>[^/]+)", Handler.commit),
    ("POST", rf"/api/{KINDS}/{RID}/branch/(?P<name>[^/]+)", Handler.branch),
    ("POST", rf"/(?:(?P<prefix>datasets|spaces)/)?{RID}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/_lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_put),
    ("GET HEAD", rf"/(?P<prefix>datasets|spaces)/{RID}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", Handler.resolve_file),
    ("GET HEAD", rf"/{RID}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", Handler.resolve_file),
]


def directory(path):
    return {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}


class Hub(ThreadingHTTPServer):
    """The server, running in a thread of its own while open.

    Args:
        root: folder for the blobs.
        lfs: whether binary files go up by git-LFS.
        gated: keys (``dataset/org/name``) that only a token opens.
        fault: from (method, path) to None, an HTTP status, seconds (a float) to wait, or ``"cut"``.
    """

    daemon_threads = True
    user, token, reader = "tester", "hf_test", "hf_reader"  # the second token may only read

    def __init__(self, root, lfs=False, gated=(), fault=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.store, self.lfs, self.gated, self.fault = Store(root), lfs, set(gated), fault
        self.requests = []
        self.base = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def environment(self, home, token=True):
        """Environment variables that point the Hub's clients here, their caches in a folder of the test's."""
        settings = {"HF_ENDPOINT": self.base, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return settings | ({"HF_TOKEN": self.token if token is True else token} if token else {})
