"""Inputs by URL: the same files, in the same order, with the same names and hashes as local ones."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import xxhash
from hub_server import hub_of
from refused import error

from braid.data_pipeline import inputs
from braid.data_pipeline.prepare import prepare
from braid.data_pipeline.readers import TextFiles, documents

fsspec = pytest.importorskip("fsspec")
NAMES = ("a.jsonl", "c.txt.gz", "b/2.txt", "b/10.txt", "b/deep/x.json", ".hidden/x.txt", "b/.x.txt", "b/image.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Readable files and others, the same that the stores of this module hold."""
    import gzip
    import json

    root = tmp_path_factory.mktemp("corpus")
    for number, name in enumerate(NAMES):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        records = [{"text": f"{name} record {i} " + "ü word" * (i * number % 50)} for i in range(60)]
        content = "".join(json.dumps(record) + "\n" for record in records) if "json" in name else f"text of {name}\n"
        content = json.dumps(records) if name.endswith(".json") else content
        path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    table = pytest.importorskip("pyarrow").table({"text": [f"row {i}" for i in range(1000)]})
    pytest.importorskip("pyarrow.parquet").write_table(table, root / "b" / "rows.parquet")
    return root


def upload(folder: Path, filesystem, target: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            filesystem.pipe_file(f"{target}/{path.relative_to(folder).as_posix()}", path.read_bytes())


@pytest.fixture(scope="module")
def memory(folder) -> str:
    upload(folder, fsspec.filesystem("memory"), "/bucket/corpus")
    return "memory://bucket/corpus"


@pytest.fixture(scope="module")
def s3(folder):
    """A server that speaks S3, in a process of its own."""
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    program = "import sys; from moto.server import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", program, "-H", "127.0.0.1", "-p", address.rpartition(":")[2]]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    secret = {"AWS_ENDPOINT_URL": address, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {**secret, "AWS_DEFAULT_REGION": "us-east-1"}.items():
            environment.setenv(name, value)
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    urllib.request.urlopen(address, timeout=5)
                    break
                except (urllib.error.URLError, ConnectionError):
                    assert server.poll() is None and time.monotonic() < deadline, "no S3 server came up"
                    time.sleep(0.1)
            filesystem = fsspec.filesystem("s3")
            filesystem.mkdir("bucket")
            upload(folder, filesystem, "bucket/corpus")
            yield "s3://bucket/corpus"
        finally:
            server.terminate()
            server.wait()


@pytest.fixture(scope="module")
def gs(folder):
    """A server that speaks as Google's Cloud Storage does."""
    with pytest.MonkeyPatch.context() as environment:  # it is looked at while the package is imported
        environment.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks Google itself, of each bucket
        pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        try:
            upload(folder, fsspec.filesystem("gs", token="anon"), "bucket/corpus")
            yield "gs://bucket/corpus"
        finally:
            server.stop()


@pytest.fixture(scope="module")
def hf(folder):
    """A server that speaks as the Hugging Face hub does."""
    with hub_of(folder) as url:
        yield url


@pytest.fixture(scope="module")
def http(folder):
    """The standard library's server, which knows no ranges."""
    pytest.importorskip("aiohttp")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("store", ["memory", "s3", "gs", "hf"])
def test_a_folder_of_a_store_is_like_a_local_one(folder, store, request):
    url = request.getfixturevalue(store)
    here, there = TextFiles([folder]), TextFiles([url])
    assert (
        there.names == here.names == ["a.jsonl", "c.txt.gz", "b/10.txt", "b/2.txt", "b/rows.parquet", "b/deep/x.json"]
    )
    assert there.describe() == here.describe()
    assert there.num_ignored == here.num_ignored == 1
    assert list(there.pieces()) == list(here.pieces())
    assert there.position == here.position == here.total_bytes > 0
    content = (folder / "b" / "2.txt").read_bytes()
    assert there.describe()[3] == {"name": "b/2.txt", "bytes": len(content), "xxh3": xxhash.xxh3_64_hexdigest(content)}


@pytest.mark.parametrize("store", ["memory", "s3", "hf"])
def test_patterns_files_and_folders_together_each_once(folder, store, request):
    url = request.getfixturevalue(store)
    here, there = ([f"{root}/{name}" for name in ("b/*.txt", "a.jsonl", "b")] for root in (folder, url))
    expected = ["b/10.txt", "b/2.txt", "a.jsonl", "b/rows.parquet", "b/deep/x.json"]
    assert TextFiles(there).names == TextFiles(here).names == expected
    assert list(documents(there)) == list(documents(here))
    assert TextFiles([f"{url}/**/x.json"]).names == ["x.json"]


def test_files_of_a_web_server(folder, http):
    source = TextFiles([f"{http}/a.jsonl?download=true", f"{http}/b/deep/*.json", f"{http}/c.txt.gz"])
    local = [folder / "a.jsonl", folder / "b" / "deep" / "x.json", folder / "c.txt.gz"]
    assert [piece.text for piece in source.pieces()] == [text for _, text in documents(local)]
    assert [file["xxh3"] for file in source.describe()] == [file["xxh3"] for file in TextFiles(local).describe()]


def test_local_and_remote_files_together(folder, memory):
    source = TextFiles([folder / "a.jsonl", f"{memory}/b/2.txt"])
    assert source.names == [str(folder / "a.jsonl"), "memory:///bucket/corpus/b/2.txt"]


def test_a_corpus_is_the_same_wherever_its_texts_lie(folder, s3, tmp_path):
    def tree(root: Path) -> dict[str, bytes]:
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    for name, root in (("here", folder), ("there", s3)):
        prepare([root], "train:300", tmp_path / name, row_tokens=500, shard_bytes=8192, progress=False)
    assert tree(tmp_path / "here") == tree(tmp_path / "there")


def test_what_is_not_there(s3, http, memory, hf):
    assert "does not exist" in error(f"{hf}/no.txt")
    assert "does not exist" in error("hf://datasets/nobody/nothing/no.txt")
    assert "does not exist" in error(f"{s3}/no.txt")
    assert "does not exist" in error("s3://nowhere/no.txt")
    assert "matches no file" in error(f"{s3}/*.zip")
    assert "does not exist" in error(f"{http}/no.txt")
    assert "does not exist" in error("http://127.0.0.1:9/no.txt")  # nobody listens there
    assert "`.png`" in error(f"{memory}/b/image.png")
    assert "URLs of this kind are not read" in error("gopher://host/a.txt")
    fsspec.filesystem("memory").pipe_file("/empty/a.txt", b"")
    assert "memory:///empty/a.txt is empty" in error("memory://empty")
    fsspec.filesystem("memory").pipe_file("/bad/a.jsonl", b'{"text": "good"}\n{"text": \n')
    assert "memory:///bad/a.jsonl, line 2: not valid JSON" in error("memory://bad")


def test_what_needs_ranges_says_so_where_there_are_none(folder, http, monkeypatch):
    assert TextFiles([f"{http}/b/rows.parquet"]).describe() == TextFiles([folder / "b" / "rows.parquet"]).describe()
    monkeypatch.setattr(inputs, "REMOTE_BLOCK", 1000)  # smaller files come whole
    assert "b/rows.parquet cannot be read" in error(f"{http}/b/rows.parquet")


def test_a_store_that_refuses(s3, monkeypatch):
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    message = error(f"{s3}/a.jsonl")
    assert "s3://bucket/corpus/a.jsonl cannot be read" in message and "Could not connect" in message
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    ("url", "package", "extra"),
    [
        ("s3://b/a.txt", "s3fs", "s3"),
        ("gs://b/a.txt", "gcsfs", "gcs"),
        ("https://h/a.txt", "aiohttp", "http"),
    ],
)
def test_without_the_package_of_a_store(url, package, extra):
    program = (
        "import sys; sys.modules[sys.argv[2]] = None\n"
        "from braid.data_pipeline.readers import documents\n"
        "list(documents([sys.argv[1]]))"
    )
    done = subprocess.run([sys.executable, "-c", program, url, package], capture_output=True, text=True, env=os.environ)
    assert f"InputError: {url} cannot be read: {package} is needed here" in done.stderr
    assert f"pip install 'braid-lm[{extra}]'" in done.stderr
