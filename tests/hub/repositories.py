"""Accounts and repositories of the local Hub."""

import json
import re

import yaml

from .answering import TYPES, Answering
from .store import now

FRONT_MATTER = re.compile(r"^---\r?\n(.*?)\r?\n---", re.DOTALL)


class Repositories(Answering):
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
        private = p.get("visibility") == "private" or bool(p.get("private"))  # as earlier clients ask for it
        self.server.store.create(key, private)
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
