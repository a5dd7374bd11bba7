"""A Hub of data set repositories on this machine's loopback that can be written to.

The real client talks to it: repositories are made, large files go by LFS, a commit is NDJSON, and
files are fetched at a commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants
from huggingface_hub.hf_api import api

TOKEN = "hf_" + "abcdefghijklmnop" * 2


@dataclass
class WritableHub:
    """What the Hub has: of every repository its commits, the newest last, and stored objects.

    `requests` are all that were made, `denied` answers every write with that status.
    """

    endpoint: str = ""
    commits: dict[str, list[tuple[str, dict[str, bytes]]]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    denied: int = 0

    def files(self, repository: str) -> dict[str, bytes]:
        """The files of the newest commit."""
        return self.commits[repository][-1][1]

    def put(self, repository: str, files: dict[str, bytes]) -> None:
        """Make a commit in which the files are these."""
        number = len(self.commits.setdefault(repository, []))
        commit = hashlib.sha1(f"{repository} {number}".encode()).hexdigest()
        self.commits[repository].append((commit, dict(files)))

    def fetched(self) -> list[str]:
        """The paths of the files that were fetched, in order, each once."""
        paths = (line.partition("/resolve/")[2] for line in self.requests if line[:4] == "GET ")
        return list(dict.fromkeys(path.partition("/")[2] for path in paths if path))


class Answering(BaseHTTPRequestHandler):
    """What the imitations of the Hub share: how they answer, and that they log nothing."""

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class _Handler(Answering):
    hub: WritableHub

    def do_GET(self) -> None:
        path = self._path()
        if path.startswith("/api/datasets/"):
            parts = path.removeprefix("/api/datasets/").split("/")
            self._describe("/".join(parts[:2]), parts[3] if len(parts) > 3 else "main")
        elif "/resolve/" in path:
            repository, _, rest = path.removeprefix("/datasets/").partition("/resolve/")
            revision, _, name = rest.partition("/")
            self._serve(repository, revision, name)
        else:
            self._answer(404)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        path, body = self._path(), self._body()
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        if self.hub.denied:
            self._answer(self.hub.denied)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            self._modes(json.loads(body))
        elif path.endswith("/info/lfs/objects/batch"):
            self._batch(json.loads(body))
        elif "/commit/" in path:
            repository = path.removeprefix("/api/datasets/").partition("/commit/")[0]
            self._commit(repository, [json.loads(line) for line in body.splitlines()])
        else:
            self._answer(404)

    def do_PUT(self) -> None:
        oid, body = self._path().rpartition("/")[2], self._body()
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self._answer(200)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if name in self.hub.commits:
            url = f"{self.hub.endpoint}/datasets/{name}"
            self._json({"error": "You already created this dataset repo", "url": url}, 409)
            return
        self.hub.private[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.put(name, {".gitattributes": b"*.h5 filter=lfs\n"})
        self._json({"url": f"{self.hub.endpoint}/datasets/{name}"})

    def _modes(self, asked: dict[str, Any]) -> None:
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".h5") else "regular",
                "shouldIgnore": False,
            }
            for file in asked["files"]
        ]
        self._json({"files": modes})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for each in asked["objects"]:
            if each["oid"] not in self.hub.objects:
                href = f"{self.hub.endpoint}/upload/{each['oid']}"
                each = {**each, "actions": {"upload": {"href": href}}}
            objects.append(each)
        self._json({"objects": objects, "transfer": "basic"})

    def _commit(self, repository: str, lines: list[dict[str, Any]]) -> None:
        commit, files = self.hub.commits[repository][-1]
        if lines[0]["value"].get("parentCommit") not in (None, commit):
            self._answer(412)
            return
        files = dict(files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                del files[value["path"]]
        self.hub.put(repository, files)
        made = self.hub.commits[repository][-1][0]
        url = f"{self.hub.endpoint}/datasets/{repository}/commit/{made}"
        self._json({"commitUrl": url, "commitOid": made, "success": True})

    def _describe(self, repository: str, revision: str) -> None:
        if repository not in self.hub.commits:
            self._answer(404, X_Error_Code="RepoNotFound")
            return
        found = self._at(repository, revision)
        if found is None:
            self._answer(404, X_Error_Code="RevisionNotFound")
            return
        siblings = [{"rfilename": name} for name in found[1]]
        self._json({"id": repository, "sha": found[0], "siblings": siblings})

    def _at(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.hub.commits[repository]
        if revision == "main":
            return commits[-1]
        return next((each for each in commits if each[0] == revision), None)

    def _serve(self, repository: str, revision: str, name: str) -> None:
        found = self._at(repository, revision)
        if found is None or name not in found[1]:
            self._answer(404, X_Error_Code="EntryNotFound")
            return
        body = found[1][name]
        etag = hashlib.sha256(body).hexdigest()
        self._answer(200, body, X_Repo_Commit=found[0], ETag=f'"{etag}"')

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        return path

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, value: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), Content_Type="application/json")


@contextmanager
def writable_hub(monkeypatch: pytest.MonkeyPatch, cache: str) -> Iterator[WritableHub]:
    """A running Hub, to which the client of this process talks, with an empty cache."""
    hub = WritableHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(api, "endpoint", hub.endpoint)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", hub.endpoint)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
