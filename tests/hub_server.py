"""A Hub of one's own: the endpoints that `huggingface_hub` uses to create, fill and read repositories, in memory."""

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit


TOKEN = "hf_secret"


class Hub(ThreadingHTTPServer):
    """Repositories, and what happened to them.

    Attributes:
        files (`dict[str, dict[str, bytes]]`): Of each repository, by path.
        commits (`list[tuple[str, str, list[str]]]`): Repository, message and paths of each, in order.
        refuses (`set[int]`): The commits, by their number, that the server answers with an error.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.commits, self.blobs = {}, [], {}
        self.refuses, self.attempts, self.private = set(), 0, {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self) -> dict[str, str]:
        """For a process that is to take it for the Hub."""
        return {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *arguments):
        pass

    def answer(self, content=None, status: int = 200, body: bytes | None = None, **headers) -> None:
        body = json.dumps(content).encode() if body is None else body
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def is_allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    # ---- Reading

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            return self.answer(
                {"name": "me", "type": "user", "orgs": [], "auth": {}}, 200 if self.is_allowed() else 401
            )
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self.send_file(*found.groups())
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+(/.*)?", path):
            files = self.server.files.get(found[1], {})
            listed = [{"type": "file", "path": p, "size": len(b), "oid": "0" * 40} for p, b in files.items()]
            return self.answer(listed)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.+)?", path):
            files = self.server.files.get(found[1])
            if files is not None:
                siblings = [{"rfilename": name} for name in files]
                return self.answer({"id": found[1], "sha": "a" * 40, "siblings": siblings, "tags": []})
        self.answer({"error": "not found"}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET

    def send_file(self, repo: str, path: str) -> None:
        body = self.server.files.get(repo, {}).get(path)
        if body is None:
            return self.answer({"error": "not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit="a" * 40)
        etag = f'"{hashlib.sha256(body).hexdigest()}"'
        self.answer(body=body, ETag=etag, X_Repo_Commit="a" * 40)

    # ---- Writing

    def do_POST(self):
        path, body = unquote(urlsplit(self.path).path), self.read()
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if not self.is_allowed():
            return self.answer({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if found := re.fullmatch(r"/api/models/(.+)/preupload/[^/]+", path):
            return self.preupload(json.loads(body)["files"])
        if found := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            return self.batch(json.loads(body)["objects"])
        if found := re.fullmatch(r"/api/models/(.+)/commit/[^/]+", path):
            return self.commit(found[1], [json.loads(line) for line in body.splitlines()])
        self.answer({"error": "not found"}, 404)

    def do_PUT(self):
        self.server.blobs[self.path.rpartition("/")[2]] = self.read()
        self.answer({})

    def create(self, asked: dict) -> None:
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        self.server.private[repo] = asked.get("private") or asked.get("visibility") == "private"
        exists = repo in self.server.files
        self.server.files.setdefault(repo, {})
        self.answer({"url": f"{self.server.url}/{repo}", "name": repo, "id": repo}, 409 if exists else 200)

    def preupload(self, files: list[dict]) -> None:
        def mode(path: str) -> str:
            return "lfs" if path.endswith((".safetensors", ".bin", ".pt")) else "regular"

        def mode_of(path: str) -> dict:
            return {"path": path, "uploadMode": mode(path), "shouldIgnore": False, "oid": None}

        self.answer({"files": [mode_of(file["path"]) for file in files]})

    def batch(self, objects: list[dict]) -> None:
        answered = [{"oid": o["oid"], "size": o["size"]} for o in objects]
        for asked in answered:
            if asked["oid"] not in self.server.blobs:
                asked["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{asked['oid']}"}}
        self.answer({"transfer": "basic", "objects": answered})

    def commit(self, repo: str, lines: list[dict]) -> None:
        number, self.server.attempts = self.server.attempts, self.server.attempts + 1
        if number in self.server.refuses:
            return self.answer({"error": "the disk is full"}, 507)
        summary, paths, files = "", [], self.server.files[repo]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                summary = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                paths.append(value["path"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
                paths.append(value["path"])
        self.server.commits.append((repo, summary, paths))
        url = f"{self.server.url}/{repo}/commit/{'a' * 40}"
        self.answer({"success": True, "commitOid": "a" * 40, "commitUrl": url, "hookOutput": ""})


@contextmanager
def hub_server():
    server = Hub()
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
