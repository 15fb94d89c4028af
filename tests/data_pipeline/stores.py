"""Stores on this machine: an S3 server (moto), and an HTTP server that misbehaves as it is told."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

S3_ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
BUCKET = "corpora"


class S3Server:
    """An S3 server of this process, with one bucket. `environment` leads any client to it."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.environment = S3_ENVIRONMENT | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}
        self._client = self._connected()
        self._client.create_bucket(Bucket=BUCKET)

    def _connected(self):
        import boto3

        return boto3.client(
            "s3", endpoint_url=self.environment["AWS_ENDPOINT_URL"], region_name="us-east-1",
            aws_access_key_id="test", aws_secret_access_key="test",
        )  # fmt: skip

    def upload(self, folder: Path, prefix: str) -> str:
        """Put a folder's files below `prefix`; returns the URL."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self._client.upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(folder)}")
        return f"s3://{BUCKET}/{prefix}"

    def stop(self) -> None:
        self._server.stop()


class FaultyServer:
    """Serves a folder over HTTP. `faults[path]` holds what goes wrong with the next requests for a file, one each:

    "500"        an internal error           "403"        not allowed
    "drop"       the connection is closed after half of the body
    "short"      half of the body, with its length as if it were all
    "flip"       one bit of the body is another
    "hang"       nothing comes until the server stops
    "slow"       a byte every 20 ms
    `always[path]` does so with every request. `requests` counts them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.requests = folder, Counter()
        self.faults: dict[str, deque[str]] = defaultdict(deque)
        self.always: dict[str, str] = {}
        self.delay_s = 0.0
        self.stopped = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:  # noqa: N802
                server._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.lstrip("/")
        self.requests[name] += 1
        fault = self.faults[name].popleft() if self.faults[name] else self.always.get(name)
        time.sleep(self.delay_s)
        path = self.folder / name
        code = int(fault) if fault in ("500", "403") else 200 if path.is_file() else 404
        body = path.read_bytes() if code == 200 else b""
        if fault == "flip":
            body = body[:-9] + bytes([body[-9] ^ 4]) + body[-8:]
        if fault == "short":
            body = body[: len(body) // 2]
        request.send_response(code)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if fault == "drop":
            request.wfile.write(body[: len(body) // 2])
            request.close_connection = True
        elif fault == "hang":
            request.wfile.write(body[:10])
            request.wfile.flush()
            self.stopped.wait()
        elif fault == "slow":
            for k in range(len(body)):
                if self.stopped.wait(0.02):
                    return
                try:
                    request.wfile.write(body[k : k + 1])
                    request.wfile.flush()
                except OSError:  # the client had enough
                    return
        else:
            request.wfile.write(body)

    def stop(self) -> None:
        self.stopped.set()
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
