"""Whatever a store does, a shard comes whole, or an error names it, the store and what to change, within the limit."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
from small_corpus import build, texts
from stores import FaultyServer

from braid.data_pipeline import remote
from braid.data_pipeline.corpus import TokenCorpus
from braid.data_pipeline.packing import Rows
from braid.data_pipeline.remote import Fetching, Store, default_cache
from braid.kernels.errors import BraidError, ConfigError, InputError, StoreFailed

SHARD = "train/shard.00001.mds"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    build(folder, texts(40, 40), block=100, shard_bytes=1500)
    return folder


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.01)


def opened(url, tmp_path, damaged="stop", **fetching) -> TokenCorpus:
    settings = {"retries": 3, "timeout_s": 4.0} | fetching
    fetching = Fetching(cache=str(tmp_path / "cache"), **settings)
    return TokenCorpus.open(url, "train", damaged, tmp_path / "ledger.jsonl", fetching)


def whole(corpus: TokenCorpus) -> np.ndarray:
    return corpus.read(0, corpus.num_stream_tokens)


def left_over(tmp_path) -> list[str]:
    return [path.name for path in (tmp_path / "cache").rglob("*.tmp")]


@pytest.mark.parametrize(
    "faults",
    [["500"], ["500", "500", "500"], ["drop"], ["short"], ["flip"], ["hang"], ["drop", "flip", "500"]],
    ids=lambda faults: "-".join(faults),
)
def test_what_fails_now_and_then_is_fetched_again(server, folder, tmp_path, faults):
    server.faults[SHARD].extend(faults)
    corpus = opened(server.url, tmp_path)
    np.testing.assert_array_equal(whole(corpus), whole(TokenCorpus.open(folder, "train")))
    assert server.requests[SHARD] == len(faults) + 1
    assert left_over(tmp_path) == [] or faults == ["hang"]


@pytest.mark.parametrize("fault", ["500", "drop", "hang", "slow"])
@pytest.mark.parametrize("damaged", ["stop", "skip"])
def test_a_store_that_keeps_failing_is_an_error_within_the_limit(server, tmp_path, fault, damaged):
    """Also where damaged shards are skipped: a store that is down is no damage, and no rows are lost by it."""
    server.always[SHARD] = fault
    corpus = opened(server.url, tmp_path, damaged, retries=2, timeout_s=1.0)
    begun = time.monotonic()
    with pytest.raises(StoreFailed) as caught:
        corpus.damage(1) if damaged == "skip" else whole(corpus)
    assert time.monotonic() - begun < 2
    assert SHARD in caught.value.what and server.url in caught.value.what
    assert "data.retries=2, data.timeout_s=1" in caught.value.found
    assert {"500": "500", "drop": "Payload", "hang": "bytes had come, the last", "slow": "bytes had come"}[
        fault
    ] in caught.value.found
    assert "data.timeout_s" in caught.value.change and caught.value.exit_code == 4
    assert not (tmp_path / "ledger.jsonl").exists()
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.what, copy.found, copy.change) == (caught.value.what, caught.value.found, caught.value.change)


@pytest.mark.parametrize(
    ("fault", "reason"), [("flip", "hash is"), ("short", "bytes, index.json says"), ("missing", "no such object")]
)
def test_what_is_damaged_in_the_store_is_treated_as_in_a_folder(folder, tmp_path, fault, reason):
    build(tmp_path / "corpus", texts(40, 40), block=100, shard_bytes=1500)
    server = FaultyServer(tmp_path / "corpus")
    if fault == "missing":
        (tmp_path / "corpus" / SHARD).unlink()
    else:
        server.always[SHARD] = fault
    with pytest.raises(InputError) as caught:
        whole(opened(server.url, tmp_path))
    assert f"{server.url}/{SHARD} is missing or damaged" == caught.value.what and reason in caught.value.found
    assert server.requests[SHARD] == (1 if fault == "missing" else 2)

    rows = Rows(opened(server.url, tmp_path, "skip"), 32, "wrap")
    left_out = [i for i in range(len(rows)) if rows.is_left_out(i)]
    (entry,) = map(json.loads, (tmp_path / "ledger.jsonl").read_text().splitlines())
    assert entry["shard"] == "shard.00001.mds" and reason in entry["reason"]
    assert left_out == list(range(*entry["rows"])) != []
    here = Rows(TokenCorpus.open(folder, "train"), 32, "wrap")
    kept = [i for i in range(len(rows)) if i not in left_out]
    np.testing.assert_array_equal(rows.read(kept), here.read(kept))
    assert not (opened(server.url, tmp_path).folder / SHARD).exists(), "what is damaged is not kept"
    server.stop()


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer/tokenizer.json", "train/index.json", "train/rows.npy"])
@pytest.mark.parametrize("fault", ["flip", "short"])
def test_small_files_are_checked_before_they_are_used(server, folder, tmp_path, name, fault):
    server.faults[name].append(fault)
    np.testing.assert_array_equal(whole(opened(server.url, tmp_path)), whole(TokenCorpus.open(folder, "train")))
    (tmp_path / "cache").rename(tmp_path / "before")
    server.always[name] = fault
    with pytest.raises(InputError) as caught:
        opened(server.url, tmp_path)
    assert caught.value.change
    server.always.clear()
    assert opened(server.url, tmp_path).fingerprint == TokenCorpus.open(folder, "train").fingerprint


def test_what_is_not_there_or_not_allowed_is_said_at_once(server, tmp_path):
    with pytest.raises(InputError, match="nowhere/manifest.json is missing"):
        opened(f"{server.url}/nowhere", tmp_path)
    with pytest.raises(InputError, match="no split validation"):
        TokenCorpus.open(server.url, "validation", fetching=Fetching(cache=str(tmp_path / "cache")))
    server.always[SHARD] = "403"
    corpus = opened(server.url, tmp_path)
    with pytest.raises(InputError, match="may not be read") as caught:
        whole(corpus)
    assert server.requests[SHARD] == 1 and "credentials" in caught.value.change


def test_a_server_that_is_not_there(tmp_path):
    server = FaultyServer(tmp_path)
    server.stop()
    with pytest.raises(StoreFailed, match="could not be fetched") as caught:
        opened(server.url, tmp_path, timeout_s=1)
    assert "Cannot connect" in caught.value.found


def test_urls_of_unknown_kinds_and_without_their_package():
    with pytest.raises(ConfigError, match="kind of URL") as caught:
        Store("ftp://host/corpus", Fetching())
    assert "s3://" in caught.value.change
    code = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from braid.data_pipeline.remote import Fetching, Store\nStore('s3://bucket/corpus', Fetching())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert BraidError.__name__ in done.stderr and "s3fs is needed here" in done.stderr
    assert "pip install 'braid-lm[s3]'" in done.stderr


def test_pauses_grow_and_are_not_all_alike(monkeypatch):
    slept = []
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.25)
    monkeypatch.setattr(remote.time, "sleep", slept.append)
    for _ in range(50):
        for attempt in range(1, 12):
            Store("file:///nowhere", Fetching())._pause(attempt, time.monotonic() + 1e6)
    pauses = np.array(slept).reshape(50, 11)
    longest = np.minimum(0.25 * 2.0 ** np.arange(11), 30)
    assert (pauses <= longest).all() and (pauses >= longest / 2).all() and (pauses.std(axis=0) > 0.1 * longest).all()


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(Fetching().folder) == str(default_cache()) == "/somewhere/braid/corpora"
    assert str(Fetching(cache="here").folder) == "here"


def test_a_cache_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreFailed, match="cannot be used") as caught:
        TokenCorpus.open(server.url, "train", fetching=Fetching(cache=str(tmp_path / "file" / "cache")))
    assert "data.cache" in caught.value.change
