"""A Hub on this machine, for tests: the real clients speak to it over HTTP through HF_ENDPOINT.

Files go up inline unless the server was told to take large ones by git-LFS, which clients only speak under
HF_HUB_DISABLE_XET=1. A `fault` function makes it answer like a Hub on a bad day.
"""

import os
import re
import threading
import time
import urllib.parse
from http.server import ThreadingHTTPServer
from pathlib import Path

from .reading import Reading
from .repositories import Repositories
from .store import Store
from .writing import Writing

IMPATIENT = str(Path(__file__).parent / "impatient")


class Handler(Repositories, Reading, Writing):
    def do(self):
        url = urllib.parse.urlsplit(self.path)
        path, self.query = url.path, urllib.parse.parse_qs(url.query)
        data = self.body()
        self.cut = False
        fault = self.server.fault(self.command, path) if self.server.fault else None
        if fault == "down":
            self.close_connection = True  # no answer at all
            return
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
    ("PUT", r"/_lfs/(?P<oid>[0-9a-f]{64})/(?P<number>[0-9]+)", Handler.lfs_put_part),
    ("POST", r"/_lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_complete),
    ("GET HEAD", rf"/(?P<prefix>datasets|spaces)/{RID}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", Handler.resolve_file),
    ("GET HEAD", rf"/{RID}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", Handler.resolve_file),
]


class Hub(ThreadingHTTPServer):
    """The server, running in a thread of its own while open.

    Args:
        root: folder for the blobs.
        lfs: whether binary files go up by git-LFS.
        gated: keys (`dataset/org/name`) that only a token opens.
        fault: from (method, path) to None, an HTTP status, seconds (a float) to wait, `"cut"` or `"down"`.
    """

    daemon_threads = True
    user, token, reader = "tester", "hf_test", "hf_reader"  # the second token may only read
    part_size = 4 * 2**20  # bytes; larger LFS files go up in parts of this size

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
        """Environment variables that point the Hub's clients here, their caches in a folder of the test's.

        The processes that get them wait a tenth of a second at most before they try again.
        """
        settings = {"HF_ENDPOINT": self.base, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        settings |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        settings["PYTHONPATH"] = os.pathsep.join(filter(None, [IMPATIENT, os.environ.get("PYTHONPATH")]))
        return settings | ({"HF_TOKEN": self.token if token is True else token} if token else {})
