"""One cache for many processes: each shard is fetched once, nothing that is read is removed, and no death blocks it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from small_corpus import build, damage, texts

from braid.data_pipeline import cache as cache_module
from braid.data_pipeline.cache import check_limit, locked
from braid.data_pipeline.corpus import TokenCorpus
from braid.data_pipeline.remote import Fetching
from braid.kernels.errors import ConfigError, StoreFailed

SHARD = "train/shard.00001.mds"

READER = """
import sys
import numpy as np
from braid.data_pipeline.corpus import TokenCorpus
from braid.data_pipeline.remote import Fetching
url, here, cache, gigabytes, seed = sys.argv[1:]
corpus = TokenCorpus.open(url, "train", fetching=Fetching(cache, float(gigabytes), timeout_s=30))
expected = TokenCorpus.open(here, "train").read(0, corpus.num_stream_tokens)
print("opened", flush=True)
for start in np.random.default_rng(int(seed)).integers(0, len(expected) - 50, 80).tolist():
    assert (corpus.read(start, start + 50) == expected[start : start + 50]).all()
print("done")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    build(folder, texts(120, 40), block=100, shard_bytes=1500)
    return folder


def opened(url, tmp_path, **fetching) -> TokenCorpus:
    return TokenCorpus.open(url, "train", fetching=Fetching(cache=str(tmp_path / "cache"), **fetching))


def shards_in(cache: Path) -> list[Path]:
    return [path for path in cache.glob("*/*/shard.*") if path.suffix not in (".lock", ".tmp")]


def size_of(cache: Path) -> int:
    sizes = []
    for path in shards_in(cache):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:
            pass
    return sum(sizes)


def reader(server, folder, tmp_path, gigabytes, seed) -> subprocess.Popen:
    words = [server.url, folder, tmp_path / "cache", gigabytes, seed]
    return subprocess.Popen([sys.executable, "-c", READER, *map(str, words)], stdout=subprocess.PIPE, text=True)


def test_processes_fetch_each_shard_once(server, folder, tmp_path):
    server.delay_s = 0.02
    readers = [reader(server, folder, tmp_path, 0, seed) for seed in range(2)]
    assert [one.wait(60) for one in readers] == [0, 0]
    fetched = {name: number for name, number in server.requests.items() if "shard" in name}
    assert len(fetched) == len(list((folder / "train").glob("*.mds"))) and set(fetched.values()) == {1}
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_two_processes_on_a_cache_smaller_than_the_corpus(server, folder, tmp_path):
    """They read in different orders, each maps a quarter of the cache, and it never holds more than its limit."""
    size_of_corpus = sum(path.stat().st_size for path in (folder / "train").glob("*.mds"))
    limit = size_of_corpus // 2
    readers = [reader(server, folder, tmp_path, limit / 1e9, seed) for seed in range(2)]
    largest = 0
    while any(one.poll() is None for one in readers):
        largest = max(largest, size_of(tmp_path / "cache"))
        time.sleep(0.002)
    assert [one.returncode for one in readers] == [0, 0]
    assert 0 < largest <= limit < size_of_corpus
    assert sum(server.requests.values()) > 2 * len(list((folder / "train").glob("*.mds"))), "shards came back"


def test_what_is_read_is_not_removed_and_the_oldest_goes_first(server, folder, tmp_path):
    sizes = [path.stat().st_size for path in sorted((folder / "train").glob("*.mds"))]
    limit = sum(sizes[:4]) + 10
    corpus = opened(server.url, tmp_path, cache_gb=limit / 1e9)
    remote, entries = corpus._reader.remote, [corpus._reader.stored(k) for k in range(len(sizes))]
    held = remote.open(entries[0])
    for k in (1, 2, 3, 4, 5):
        remote.open(entries[k]).close()
        time.sleep(0.01)
    here = {path.name for path in shards_in(tmp_path / "cache")}
    assert "shard.00000.mds" in here and {"shard.00004.mds", "shard.00005.mds"} <= here and size_of(tmp_path) <= limit
    assert "shard.00001.mds" not in here and len(here) >= 3
    held.close()
    remote.open(entries[6]).close()
    assert "shard.00000.mds" not in {path.name for path in shards_in(tmp_path / "cache")}


def test_a_map_keeps_its_shard_and_its_content(server, tmp_path):
    corpus = opened(server.url, tmp_path)
    path = corpus.folder / SHARD
    start = corpus.shard_starts[1]
    tokens = corpus._reader.shard_row(1, 0)["tokens"]
    before = tokens.tolist()
    with pytest.raises(BlockingIOError), locked(path, 0):
        pass
    path.unlink()  # as on a file system whose locks do not reach another machine
    assert tokens.tolist() == before and corpus.read(start, start + 5).tolist() == before[:5]
    corpus._reader._maps.clear()
    assert corpus.read(start, start + 5).tolist() == before[:5] and server.requests[SHARD] == 2


def test_a_killed_fetch_leaves_nothing_in_the_way(server, folder, tmp_path):
    server.faults[SHARD].append("hang")
    fetching = reader(server, folder, tmp_path, 0, 0)
    assert fetching.stdout.readline() == "opened\n"
    while not (left := list((tmp_path / "cache").rglob("shard.00001.mds.*.tmp"))):
        time.sleep(0.01)
    os.kill(fetching.pid, signal.SIGKILL)
    assert fetching.wait() == -signal.SIGKILL and left[0].exists()
    begun = time.monotonic()
    corpus = opened(server.url, tmp_path)
    assert not left[0].exists(), "before the shard is asked for"
    expected = TokenCorpus.open(folder, "train")
    np.testing.assert_array_equal(corpus.read(0, 2000), expected.read(0, 2000))
    assert time.monotonic() - begun < 5 and server.requests[SHARD] == 2


def test_who_waited_for_a_fetch_that_failed_fails_with_it(server, folder, tmp_path):
    """And does not try for as long again: with many ranks that would be never."""
    server.always[SHARD] = "hang"
    code = READER.replace("timeout_s=30", "timeout_s=1, retries=1")
    words = [server.url, folder, tmp_path / "cache", 0, 0]
    ranks = [
        subprocess.Popen([sys.executable, "-c", code, *map(str, words)], stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert all("shard.00001.mds could not be fetched from" in text for text in said), said
    assert server.requests[SHARD] <= 4, "one fetch of two attempts, or one more by who came later"


def test_a_fetch_that_another_process_holds_for_too_long(server, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "GRACE_S", 0.1)
    corpus = opened(server.url, tmp_path, timeout_s=5)  # which a loaded machine needs for the small files
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'ab'); fcntl.flock(f, 2); print(1, flush=True); time.sleep(60)"
    )
    lock = str(corpus.folder / SHARD) + ".lock"
    holder = subprocess.Popen([sys.executable, "-c", code, lock], stdout=subprocess.PIPE)
    holder.stdout.readline()
    with pytest.raises(StoreFailed, match="shard.00001.mds of .*another process") as caught:
        corpus.read(corpus.shard_starts[1], corpus.shard_starts[1] + 1)
    assert "data.timeout_s=5" in caught.value.found
    holder.kill()
    holder.wait()
    assert corpus.read(corpus.shard_starts[1], corpus.shard_starts[1] + 1).size == 1


@pytest.mark.parametrize("how", ["truncated", "flipped"])
def test_a_shard_that_was_damaged_in_the_cache_is_fetched_again(server, folder, tmp_path, how):
    expected = TokenCorpus.open(folder, "train").read(0, 2000)
    before = opened(server.url, tmp_path)
    np.testing.assert_array_equal(before.read(0, 2000), expected)
    damage(before.folder / SHARD, how)
    np.testing.assert_array_equal(opened(server.url, tmp_path).read(0, 2000), expected)
    assert server.requests[SHARD] == 2


def test_shards_are_fetched_before_they_are_read(server, folder, tmp_path):
    corpus = opened(server.url, tmp_path)
    ahead = corpus.fetching_ahead(window=2)
    ahead.want([3, 1, 2])
    deadline = time.monotonic() + 10
    while len(shards_in(tmp_path / "cache")) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert {path.name for path in shards_in(tmp_path / "cache")} == {f"shard.{k:05}.mds" for k in (1, 2, 3)}
    ahead.close()
    for thread in ahead._threads:
        thread.join(5)
        assert not thread.is_alive()
    assert TokenCorpus.open(folder, "train").fetching_ahead(window=2) is None, "what is here is not fetched"


def test_a_cache_that_cannot_hold_two_windows_is_refused(server, folder, tmp_path):
    sizes = sorted((path.stat().st_size for path in (folder / "train").glob("*.mds")), reverse=True)
    corpus = opened(server.url, tmp_path, cache_gb=(sum(sizes[:8]) - 1) / 1e9)
    with pytest.raises(ConfigError, match="too small") as caught:
        check_limit([corpus.fetching_ahead(window=2)])
    assert "data.cache_gb=" in caught.value.change and "8 shards" in caught.value.found
    check_limit([corpus.fetching_ahead(window=1)])
