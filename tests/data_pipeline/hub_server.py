"""A server that answers as the Hugging Face hub does, for one data set: a folder. Written from the hub's open API."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
import pytest

REPOSITORY, COMMIT = "own/corpus", "0" * 40


class Hub(BaseHTTPRequestHandler):
    """Information of the repository and of paths, the tree, and files with ranges."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *args: object, folder: Path) -> None:
        self.folder = folder
        super().__init__(*args)

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, query = unquote(urlsplit(self.path).path), parse_qs(urlsplit(self.path).query)
        if re.fullmatch(rf"/api/datasets/{REPOSITORY}(/revision/\w+)?", path):
            self._tell({"id": REPOSITORY, "sha": COMMIT, "siblings": []})
        elif found := re.fullmatch(rf"/api/datasets/{REPOSITORY}/tree/\w+/?(.*)", path):
            recursive = query.get("recursive", ["false"])[0].lower() == "true"
            top = self.folder / found[1]
            within = sorted(top.rglob("*") if recursive else top.glob("*"))
            self._tell([self._entry(each) for each in within]) if top.is_dir() else self._refuse("EntryNotFound")
        elif found := re.fullmatch(rf"/datasets/{REPOSITORY}/resolve/\w+/(.*)", path):
            file = self.folder / found[1]
            self._send(file.read_bytes(), _hash(file)) if file.is_file() else self._refuse("EntryNotFound")
        else:
            self._refuse("RepoNotFound")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if not re.match(rf"/api/datasets/{REPOSITORY}/paths-info/\w+$", self.path):
            return self._refuse("RepoNotFound")
        asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
        self._tell([self._entry(self.folder / name) for name in asked if (self.folder / name).exists()])

    def _entry(self, path: Path) -> dict:
        name = path.relative_to(self.folder).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": COMMIT, "size": 0}
        return {"type": "file", "path": name, "oid": _hash(path), "size": path.stat().st_size}

    def _tell(self, answer: dict | list) -> None:
        self._send(json.dumps(answer).encode())

    def _refuse(self, code: str) -> None:
        self._send(b'{"error": "not found"}', status=404, code=code)

    def _send(self, content: bytes, tag: str = "", status: int = 200, code: str = "") -> None:
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes", "X-Error-Code": code}
        if status == 200 and (wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            first, last, size = int(wanted[1]), int(wanted[2] or len(content) - 1), len(content)
            content, status = content[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{first + len(content) - 1}/{size}"
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(content)}.items():
            if value:
                self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _hash(path: Path) -> str:
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()


@contextmanager
def hub_of(folder: Path) -> Iterator[str]:
    """The URL of a data set with these files, while this process takes our server for the hub."""
    constants = pytest.importorskip("huggingface_hub.constants")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, address)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "ENDPOINT", address)
        files = fsspec.filesystem("hf")
        files.clear_instance_cache()
        try:
            yield f"hf://datasets/{REPOSITORY}"
        finally:
            files.clear_instance_cache()
            server.shutdown()
            server.server_close()
