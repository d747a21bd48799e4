"""Writing to the local Hub: commits, branches, and large files by git-LFS."""

import base64
import json
import math
import re

from .answering import TYPES, Answering
from .store import entry

BINARY = re.compile(r"\.(safetensors|bin|pt|parquet|tar|arrow|gz|zip|jpg|png)$")


class Writing(Answering):
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
                place = f"{self.server.base}/_lfs/{o['oid']}"
                o["actions"] = {"upload": {"href": place, "header": self.parts(place, o["size"])}}
        self.send(200, {"transfer": "basic", "objects": objects})

    def parts(self, place, size):
        """Where each part of a file too large for one request goes, as the Hub says it; empty for a smaller one."""
        if size <= self.server.part_size:
            return {}
        count = math.ceil(size / self.server.part_size)
        return {"chunk_size": str(self.server.part_size)} | {str(i): f"{place}/{i}" for i in range(1, count + 1)}

    def lfs_put(self, data, oid):
        if self.server.store.put(data) != oid:
            return self.error(400, None, "sha256 mismatch")
        self.send(200, {})

    def lfs_put_part(self, data, oid, number):
        self.send(200, {}, {"ETag": self.server.store.put(data)})

    def lfs_complete(self, data, oid):
        parts = sorted(json.loads(data)["parts"], key=lambda part: part["partNumber"])
        self.lfs_put(b"".join(self.server.store.blob(part["etag"]).read_bytes() for part in parts), oid)
