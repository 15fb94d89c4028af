"""A corpus in a store is the corpus of the folder: same batches, same state, at the same speed once it is here."""

from __future__ import annotations

import json
import shutil
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import hub_of
from small_corpus import build, texts
from stores import FaultyServer, S3Server, environment

from braid.data_pipeline.corpus import TokenCorpus
from braid.data_pipeline.loader import Loader
from braid.data_pipeline.mixture import MixedOrder, MixedRows, Stage
from braid.data_pipeline.order import ShuffledOrder
from braid.data_pipeline.packing import Rows
from braid.data_pipeline.prepare import prepare
from braid.data_pipeline.remote import Fetching
from braid.kernels.errors import ConfigError, InputError, StoreFailed

FORMATS = ("mds", "wds")
GLOBAL, LENGTH, WINDOW = 16, 32, 2


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Folders of one corpus in each format, and their URLs in an S3 server."""
    folder, server = tmp_path_factory.mktemp("corpora"), S3Server()
    urls = {}
    for format in FORMATS:
        build(folder / format, texts(120, 40), block=100, shard_bytes=2500 if format == "mds" else 6000, format=format)
        urls[format] = server.upload(folder / format, format)
    with environment(server.environment):
        yield folder, urls
    server.stop()


def loader(path: str | Path, cache: Path, rank: int = 0, size: int = 1, **options) -> Loader:
    fetching = Fetching(cache=str(cache), timeout_s=30)
    rows = Rows(TokenCorpus.open(path, "train", fetching=fetching), LENGTH, "wrap")
    options = {"global_batch_size": GLOBAL, "micro_batch_size": 2, "data_rank": rank, "data_size": size} | options
    return Loader(rows, ShuffledOrder(rows.rows_per_shard, 5, WINDOW), **options)


def batches(loaders: list[Loader], num_steps: int) -> np.ndarray:
    """Global batches: tokens [steps, G, L] and, behind them, the ordinals."""
    steps = zip(*(islice(one, num_steps) for one in loaders), strict=True)
    return np.stack([
        torch.cat([torch.cat([b.tokens, b.ordinals[:, None]], 1) for part in step for b in part]).numpy()
        for step in steps
    ])  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
def test_batches_and_state_are_those_of_the_folder_and_either_continues_the_other(store, tmp_path, format):
    """An epoch and more, with kills in between: S3 on 2 ranks, the folder on 1 with a worker, S3 on 4."""
    folder, urls = store
    straight = loader(folder / format, tmp_path)
    num_steps = len(straight.rows) // GLOBAL + 4
    expected = batches([straight], num_steps)
    pieces, state = [], None
    for path, size, workers, steps in (
        (urls[format], 2, 0, num_steps // 2), (folder / format, 1, 1, 2), (urls[format], 4, 0, None),
    ):  # fmt: skip
        ranks = [loader(path, tmp_path / "cache", rank, size, workers=workers) for rank in range(size)]
        for one in ranks if state else []:
            one.load_state_dict(state)
        pieces.append(batches(ranks, num_steps - sum(map(len, pieces)) if steps is None else steps))
        state = json.loads(json.dumps(ranks[0].state_dict()))
    np.testing.assert_array_equal(np.concatenate(pieces), expected)
    assert state == straight.state_dict()
    corpus = ranks[0].rows.corpus
    assert corpus.source == urls[format] and corpus.fingerprint == straight.rows.corpus.fingerprint
    in_folder = {path.name for path in (folder / format / "train").iterdir()}
    in_cache = {path.name for path in (corpus.folder / "train").iterdir() if path.suffix not in (".lock", ".tmp")}
    assert in_cache == in_folder


def test_a_corpus_on_the_hub(store, tmp_path):
    folder, _ = store
    here = loader(folder / "mds", tmp_path)
    with hub_of(folder) as url:
        there = loader(f"{url}/mds", tmp_path / "cache", workers=1)
        num_steps = len(here.rows) // GLOBAL + 1
        np.testing.assert_array_equal(batches([there], num_steps), batches([here], num_steps))
        with pytest.raises(InputError, match="the store has no such object"):
            loader(f"{url}/flat", tmp_path / "cache")
    assert there.state_dict() == here.state_dict()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mixture_of_a_store_and_a_folder_is_that_of_folders(store, tmp_path, workers):
    """Two corpora share a cache that just holds what both need at a time; the run is continued in between."""
    folder, urls = store
    needed = [sorted((path.stat().st_size for path in (folder / "mds" / "train").glob("*.mds")), reverse=True)[:4]]
    needed += [sorted((path.stat().st_size for path in (folder / "wds" / "train").glob("*.tar")), reverse=True)[:4]]
    needed = sum(map(sum, needed))

    def mixed(mds: str | Path, wds: str | Path, limit: int = needed) -> Loader:
        fetching = Fetching(cache=str(tmp_path), cache_gb=limit / 1e9, timeout_s=30)
        paths = {"mds": mds, "wds": wds}
        rows = MixedRows(
            {name: Rows(TokenCorpus.open(paths[name], "train", fetching=fetching), LENGTH, "wrap") for name in paths}
        )
        orders = {name: ShuffledOrder(part.rows_per_shard, 5, 1) for name, part in rows.parts.items()}
        order = MixedOrder(orders, [Stage.weighted(0, {"mds": 2, "wds": 1})], 5)
        sizes = {"global_batch_size": GLOBAL, "micro_batch_size": GLOBAL, "data_rank": 0, "data_size": 1}
        return Loader(rows, order, workers=workers, **sizes)

    here, there = mixed(folder / "mds", folder / "wds"), mixed(*urls.values())
    num_steps = 2 * len(here.rows) // GLOBAL
    expected = batches([here], num_steps)
    first = batches([there], 3)
    then = mixed(urls["mds"], folder / "wds")
    then.load_state_dict(json.loads(json.dumps(there.state_dict())))
    np.testing.assert_array_equal(np.concatenate([first, batches([then], num_steps - 3)]), expected)
    assert then.state_dict() == here.state_dict()
    with pytest.raises(ConfigError, match="the cache is too small") as caught:
        next(iter(mixed(*urls.values(), limit=needed - 1)))
    assert "8 shards of 2 sources" in caught.value.found


def test_workers_read_from_a_store_through_a_small_cache(store, tmp_path):
    """Four windows of the corpus do not fit; the cache keeps its limit, and every row comes once an epoch."""
    folder, urls = store
    sizes = sorted((path.stat().st_size for path in (folder / "mds" / "train").glob("*.mds")), reverse=True)
    limit = sum(sizes[:4]) + 1
    assert limit < sum(sizes) / 2
    fetching = Fetching(str(tmp_path), limit / 1e9, timeout_s=30)
    rows = Rows(TokenCorpus.open(urls["mds"], "train", fetching=fetching), LENGTH, "wrap")
    one = Loader(
        rows, ShuffledOrder(rows.rows_per_shard, 5, 1), global_batch_size=GLOBAL, micro_batch_size=GLOBAL,
        data_rank=0, data_size=1, workers=2,
    )  # fmt: skip
    num_steps, largest, tokens = len(rows) // GLOBAL, 0, []
    for (batch,) in islice(one, num_steps):
        tokens += batch.tokens.tolist()
        kept = [path for path in tmp_path.glob("*/train/shard.*") if path.suffix == ".mds"]
        largest = max(largest, sum(path.stat().st_size for path in kept if path.exists()))
    here = Rows(TokenCorpus.open(folder / "mds", "train"), LENGTH, "wrap")
    order = ShuffledOrder(here.rows_per_shard, 5, 1)
    assert tokens == here.read(order.span(0, num_steps * GLOBAL)).tolist()
    assert 0 < largest <= limit


def test_the_loader_fetches_the_next_window_while_one_is_read(tmp_path):
    build(tmp_path / "corpus", texts(120, 40), block=100, shard_bytes=1500)
    server = FaultyServer(tmp_path / "corpus")
    one = loader(server.url, tmp_path / "cache")
    ahead = {f"train/shard.{k:05}.mds" for k in one._coming_shards(0, 0)}
    windows = [shard for shards in one.order.coming_shards(0) for shard in shards]
    assert len(windows) == 2 * WINDOW and {f"train/shard.{k:05}.mds" for k in windows} <= ahead
    iterator = iter(one)
    next(iterator)
    deadline = time.monotonic() + 10
    while not ahead <= server.requests.keys():
        assert time.monotonic() < deadline, server.requests
        time.sleep(0.01)
    fetched = {name: number for name, number in server.requests.items() if "shard" in name}
    assert set(fetched.values()) == {1} and len(fetched) < len(one.rows.rows_per_shard)
    iterator.close()
    server.stop()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_store_that_goes_away_while_training_is_an_error_with_its_name(tmp_path, workers):
    build(tmp_path / "corpus", texts(60, 40), block=100, shard_bytes=1500)
    server = FaultyServer(tmp_path / "corpus")
    fetching = Fetching(str(tmp_path / "cache"), retries=1, timeout_s=0.5)
    rows = Rows(TokenCorpus.open(server.url, "train", fetching=fetching), LENGTH, "wrap")
    order = ShuffledOrder(rows.rows_per_shard, 5, 1)
    one = Loader(
        rows, order, global_batch_size=4, micro_batch_size=4, data_rank=0, data_size=1, workers=workers
    )  # fmt: skip
    for name in (f"train/shard.{k:05}.mds" for k in range(3, len(rows.rows_per_shard))):
        server.always[name] = "hang"
    begun = time.monotonic()
    with pytest.raises(StoreFailed, match=r"train/shard\.\d+\.mds could not be fetched from http"):
        for _ in one:
            pass
    assert time.monotonic() - begun < 10
    server.stop()


def test_a_corpus_that_was_prepared_anew_is_another_one(tmp_path):
    text = tmp_path / "text.txt"
    for number in range(2):
        text.write_text("\n\n".join(texts(60, 40, seed=number)))
        shutil.rmtree(tmp_path / "corpus", ignore_errors=True)
        prepare([text], "bytes", tmp_path / "corpus", validation_fraction=0.2)
        opened = TokenCorpus.open(f"file://{tmp_path}/corpus", "train", fetching=Fetching(str(tmp_path / "cache")))
        here = TokenCorpus.open(tmp_path / "corpus", "train")
        assert opened.fingerprint == here.fingerprint
        np.testing.assert_array_equal(opened.read(0, 500), here.read(0, 500))
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 2


def test_rows_from_a_warm_cache_cost_what_those_of_a_folder_do(tmp_path):
    build(tmp_path / "corpus", ["words of text " * 200] * 200, block=4096, shard_bytes=1 << 17)
    cached = TokenCorpus.open(f"file://{tmp_path}/corpus", "train", fetching=Fetching(str(tmp_path / "cache")))
    both = [Rows(corpus, 128, "wrap") for corpus in (TokenCorpus.open(tmp_path / "corpus", "train"), cached)]
    indices = np.random.default_rng(0).permutation(len(both[0]))[:1000]
    best = [float("inf")] * 2
    for _ in range(200):  # in turn, until both have met the machine at rest
        for k, rows in enumerate(both):
            begun = time.process_time()
            rows.read(indices)
            best[k] = min(best[k], time.process_time() - begun)
        if best[1] <= 1.05 * best[0]:
            break
    assert best[1] <= 1.1 * best[0], f"{best[1] / best[0]:.2f} times"
