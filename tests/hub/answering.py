"""Common parts of every answer of the local Hub: request bodies, headers, who is asking, and for which repository."""

import json
from http.server import BaseHTTPRequestHandler

TYPES = {"models": "model", "datasets": "dataset", "spaces": "space"}


class Answering(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "local-hub"
    cut = False  # half of the answer, then nothing

    def log_message(self, fmt, *args):
        self.server.requests.append((self.command, self.path))

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
        """Tell whether the token may write, and answer if not."""
        if not self.authed():
            self.error(401, "RepoNotFound", "Invalid username or password.")
        elif self.headers.get("Authorization", "") == f"Bearer {self.server.reader}":
            self.error(403, None, "Forbidden: you must use a write token to upload to a repository.")
        else:
            return True
        return False

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
