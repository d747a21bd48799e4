"""Reading from the local Hub: trees, branches, commits, files."""

import hashlib
import json
import re
import urllib.parse

from .answering import TYPES, Answering


def directory(path):
    return {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}


class Reading(Answering):
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
