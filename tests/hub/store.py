"""Storage of the local Hub: every blob once by its sha256; a commit is a tree of entries; a branch names a commit."""

import hashlib
import threading
import time
from pathlib import Path


def git_oid(data):
    """Return git's name of a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def now():
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())


class Store:
    """Repositories in memory, blobs in a folder."""

    def __init__(self, root):
        self.root, self.lock, self.repos = Path(root), threading.RLock(), {}
        (self.root / "blobs").mkdir(parents=True, exist_ok=True)

    def blob(self, sha):
        return self.root / "blobs" / sha

    def put(self, data):
        """Keep a blob; its sha256."""
        sha = hashlib.sha256(data).hexdigest()
        self.blob(sha).write_bytes(data)
        return sha

    def create(self, key, private=False):
        repo = {"private": private, "commits": {}, "branches": {}, "log": []}
        self.repos[key] = repo
        self.commit(repo, "main", {}, "initial commit")
        return repo

    def commit(self, repo, branch, tree, title):
        sha = hashlib.sha1(f"{time.time_ns()}{title}{len(repo['log'])}".encode()).hexdigest()
        repo["commits"][sha] = tree
        repo["branches"][branch] = sha
        repo["log"].append({"id": sha, "title": title, "date": now(), "branch": branch})
        return sha

    def revision(self, repo, name):
        """The commit of a branch or of itself; None if there is none."""
        return repo["branches"].get(name) or (name if name in repo["commits"] else None)

    def add(self, key, files, lfs=False):
        """A repository with these files (path → bytes), as if they had been pushed."""
        repo = self.repos.get(key) or self.create(key)
        tree = dict(repo["commits"][repo["branches"]["main"]])
        tree |= {path: entry(self.put(data), data, lfs) for path, data in files.items()}
        return self.commit(repo, "main", tree, "files")

    def files(self, key, revision="main"):
        """Path → bytes of what a repository holds."""
        repo = self.repos[key]
        tree = repo["commits"][self.revision(repo, revision)]
        return {path: self.blob(e["sha256"]).read_bytes() for path, e in tree.items()}


def entry(sha, data, lfs):
    content = data
    if lfs:
        content = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize {len(data)}\n".encode()
    return {"sha256": sha, "oid": git_oid(content), "size": len(data), "lfs": lfs}
