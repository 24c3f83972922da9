"""A stand-in for the Hugging Face Hub: repositories in memory, as its client talks to it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_" + "a" * 34


class FakeHub:
    """`repositories` maps a name to its files; `asked` lists the requests."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.refused: dict[str, int] = {}  # repositories whose making is refused, with the status
        self.asked: list[str] = []
        self.url = ""

    def commit(self, name: str) -> str:
        content = b"".join(k.encode() + v for k, v in sorted(self.repositories[name].items()))
        return hashlib.sha1(content).hexdigest()

    def answer(
        self, method: str, path: str, body: bytes, token: str
    ) -> tuple[int, Any, dict[str, str]]:
        """The status, content (bytes or JSON) and headers of an answer."""
        parts = path.partition("?")[0].strip("/").split("/")
        if path.startswith("/api/") and method == "POST" and token != TOKEN:
            return 401, {"error": "no token"}, {}
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            if name in self.refused:
                return self.refused[name], {"error": "not yours"}, {}
            self.repositories.setdefault(name, {})
            self.private.setdefault(name, asked.get("visibility") == "private")
            return 200, {"url": f"{self.url}/{name}"}, {}
        if parts == ["api", "validate-yaml"]:  # of the card
            return 200, {"errors": [], "warnings": []}, {}
        name = "/".join(parts[2:4]) if parts[0] == "api" else "/".join(parts[:2])
        if name not in self.repositories:
            return 404, {"error": "Not found"}, {"X-Error-Code": "RepoNotFound"}
        files = self.repositories[name]
        if parts[0] == "api" and parts[4:5] == ["preupload"]:
            listed = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for file in json.loads(body)["files"]
            ]
            return 200, {"files": listed}, {}
        if parts[0] == "api" and parts[4:5] == ["commit"]:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            oid = self.commit(name)
            return 200, {"commitUrl": f"{self.url}/{name}/commit/{oid}", "commitOid": oid}, {}
        if parts[0] == "api":
            siblings = [{"rfilename": file, "size": len(data)} for file, data in files.items()]
            return 200, {"id": name, "sha": self.commit(name), "siblings": siblings}, {}
        content = files.get("/".join(parts[4:]))
        if content is None:
            return 404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"}
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        return 200, content, {"ETag": tag, "X-Repo-Commit": self.commit(name)}

    @contextmanager
    def served(self) -> Iterator[FakeHub]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
                hub.asked.append(f"{self.command} {self.path}")
                status, content, headers = hub.answer(self.command, self.path, body, token)
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_POST = do_HEAD = do

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{server.server_port}"
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
