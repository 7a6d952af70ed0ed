"""A model hub on this machine: as much of the hub's interface as pushing and loading need.

Repositories live in memory, every commit replaces ``main``. Run a process against it with
``HF_ENDPOINT`` set to ``Hub.address``, and the real ``huggingface_hub`` talks to it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub:
    """The server; use as a context manager.

    Attributes:
        repos: for each repository id its files, name to content.
        pushes: how many commits each repository got.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.pushes: dict[str, int] = {}
        hub = self

        class Handler(_Handler):
            state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit_id(self, repo: str) -> str:
        """Forty hexadecimal digits that follow from the content."""
        content = json.dumps(
            sorted((n, hashlib.sha1(c).hexdigest()) for n, c in self.repos[repo].items())
        )
        return hashlib.sha1(content.encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            known = repo in self.state.repos
            self.state.repos.setdefault(repo, {})
            url = f"{self.state.address}/{repo}"
            self._json({"url": url, "name": repo, "id": repo}, 409 if known else 200)
            return
        if parts == ["api", "validate-yaml"]:
            self._json({"errors": [], "warnings": []})
            return
        repo, action = "/".join(parts[2:4]), parts[4]
        if action == "preupload":
            files = json.loads(body)["files"]
            told = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
            self._json({"files": told})
        else:  # a commit, one change a line
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.state.repos[repo][entry["value"]["path"]] = content
            self.state.pushes[repo] = self.state.pushes.get(repo, 0) + 1
            commit = self.state.commit_id(repo)
            url = f"{self.state.address}/{repo}/commit/{commit}"
            self._json({"commitUrl": url, "commitOid": commit})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[0] == "api" and parts[1] == "models":
            self._describe("/".join(parts[2:4]), parts[4:])
        elif "resolve" in parts:
            self._file("/".join(parts[:2]), "/".join(parts[4:]))
        else:
            self._json({"name": "someone", "type": "user", "orgs": []})

    def _describe(self, repo: str, rest: list[str]) -> None:
        files = self.state.repos.get(repo)
        if files is None:
            self._missing("RepoNotFound")
        elif rest[:1] == ["tree"]:
            folder = "".join(f"{part}/" for part in rest[2:])
            files = {name: c for name, c in files.items() if name.startswith(folder)}
            if not files:
                self._missing("EntryNotFound")
                return
            self._json(
                [
                    {"type": "file", "path": name, "oid": "0", "size": len(content)}
                    for name, content in sorted(files.items())
                ]
            )
        else:
            commit = self.state.commit_id(repo)
            names = [{"rfilename": name} for name in sorted(files)]
            self._json({"id": repo, "modelId": repo, "sha": commit, "siblings": names})

    def _file(self, repo: str, name: str) -> None:
        files = self.state.repos.get(repo)
        if files is None:
            self._missing("RepoNotFound")
            return
        if name not in files:
            self._missing("EntryNotFound")
            return
        content = files[name]
        mark = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{mark}"', "X-Repo-Commit": self.state.commit_id(repo)}
        self._send(200, content, "application/octet-stream", headers)

    def _missing(self, code: str) -> None:
        self._send(404, b"", "text/plain", {"X-Error-Code": code, "X-Error-Message": code})

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), "application/json", {})

    def _send(self, status: int, content: bytes, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": len(content),
            **headers,
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
