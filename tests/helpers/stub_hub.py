"""A small Hugging Face hub on loopback: what huggingface_hub asks for when it downloads files, and a log of it.

It behaves like the real one where that matters: weight files redirect to another origin (the CDN) with the sha256 as
linked etag, absent files name the commit, and refusals carry X-Error-Code. It can cut connections and hang.
"""

import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest


@dataclass
class Request:
    method: str
    path: str  # unquoted, without query
    range: str | None
    token: str | None
    sent: int = 0  # bytes of the body that went out


@dataclass
class Repo:
    files: dict[str, bytes]
    commit: str = "a" * 40
    refs: dict[str, str] = field(default_factory=dict)  # branch or tag -> commit; `main` is there by itself
    gated: bool = False
    private: bool = False


def turn_to(stub: "StubHub", monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """huggingface_hub asks this hub, with its cache in the folder and nobody logged in."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", stub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", stub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no_token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


class StubHub:
    """`with StubHub({"org/name": Repo({...})}) as hub:` then huggingface_hub with HF_ENDPOINT=hub.url."""

    def __init__(self, repos: dict[str, Repo]) -> None:
        self.repos = repos
        self.requests: list[Request] = []
        self.tokens = {"hf_good"}  # may read gated and private repositories
        self.cut: int | None = None  # a weight file's answer ends after so many bytes, as if the line broke
        self.hang = False  # ... or falls silent there, until `released`
        self.released = threading.Event()
        self.delay = 0.0  # seconds before a weight file's bytes
        self.status: int | None = None  # answer every weight download with this
        self.ranges = True  # whether the CDN knows Range
        self.damage = False  # whether the CDN sends wrong bytes
        self.portal = False  # answer with a sign-in page, as a hotel's network does
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "StubHub":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def names(self, method: str | None = None) -> set[str]:
        """The repository files that were asked for."""
        paths = [r.path for r in self.requests if method in (None, r.method)]
        return {m[1] for path in paths if (m := re.search(r"/(?:resolve|cdn/[^/]+)/[^/]+/(.*)", path))}

    def downloads(self, name: str) -> list[Request]:
        """The requests for a weight file's bytes."""
        return [r for r in self.requests if r.path.startswith("/cdn/") and r.path.endswith("/" + name)]


JSON = {"Content-Type": "application/json"}
WEIGHTS = (".safetensors", ".pth", ".gguf")  # what lies in large-file storage


def entry(name: str, body: bytes) -> dict[str, object]:
    file: dict[str, object] = {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
    if name.endswith(WEIGHTS):
        file["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 130}
    return file


class _Handler(BaseHTTPRequestHandler):
    hub: StubHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        path = urlsplit(self.path).path
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ") or None
        self.request_log = Request(self.command, unquote(path), self.headers["Range"], token)
        self.hub.requests.append(self.request_log)
        if self.hub.portal:
            self.reply(200, b"<html>sign in</html>")
        elif path.startswith("/cdn/"):
            self.cdn(*path.removeprefix("/cdn/").split("/", 2))
        elif m := re.fullmatch(r"/api/models/(.+)/tree/([^/]+)", path):
            if found := self.find(m[1], unquote(m[2])):
                self.reply(200, json.dumps([entry(n, b) for n, b in found[0].files.items()]).encode(), JSON)
        elif m := re.fullmatch(r"/api/models/(.+)/revision/([^/]+)", path):
            if found := self.find(m[1], unquote(m[2])):
                siblings = [{"rfilename": n} for n in found[0].files]
                self.reply(200, json.dumps({"id": m[1], "sha": found[1], "siblings": siblings}).encode(), JSON)
        elif m := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            if found := self.find(m[1], unquote(m[2])):
                self.resolve(m[1], *found, unquote(m[3]))
        else:
            self.reply(404)

    def find(self, name: str, revision: str) -> tuple[Repo, str] | None:
        """The repository and the commit, or a refusal."""
        repo, token = self.hub.repos.get(name), self.request_log.token
        if token is not None and token not in self.hub.tokens:
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if repo is None or (repo.private and token is None):
            return self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        if repo.gated and (token is None or token == "hf_other"):
            return self.refuse(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted.")
        commits = {"main": repo.commit, repo.commit: repo.commit, **repo.refs, **{c: c for c in repo.refs.values()}}
        if revision not in commits:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, commits[revision]

    def resolve(self, name: str, repo: Repo, commit: str, file: str) -> None:
        body = repo.files.get(file)
        headers = {"X-Repo-Commit": commit}
        if body is None:
            self.reply(404, b"", {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
        elif file.endswith(WEIGHTS):
            linked = {"X-Linked-ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Linked-Size": str(len(body))}
            where = f"http://localhost:{self.hub.port}/cdn/{name.replace('/', '--')}/{commit}/{file}"  # another origin
            self.reply(302, b"", {**headers, **linked, "Location": where})
        else:
            self.reply(200, body, {**headers, "ETag": f'"{hashlib.sha1(body).hexdigest()}"'})

    def cdn(self, name: str, commit: str, file: str) -> None:
        body = self.hub.repos[name.replace("--", "/")].files[file]
        time.sleep(self.hub.delay)
        if self.hub.status:
            return self.reply(self.hub.status)
        if self.hub.damage:
            body = bytes(len(body))
        start = int(m[1]) if self.hub.ranges and (m := re.match(r"bytes=(\d+)-", self.headers["Range"] or "")) else 0
        headers = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
        self.reply(206 if start else 200, body[start:], headers, self.hub.cut)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.reply(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def reply(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.request_log.sent = len(body[:cut])  # noted before: whoever has read it all may look at once
        self.wfile.write(body[:cut])
        if cut is not None and cut < len(body):
            self.close_connection = True
            if self.hub.hang:
                self.hub.released.wait(20)
