"""Batches of rows made of documents: the same on every layout, each row once per epoch, tables shared and checked."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from small_corpus import build, texts

from braid.data_pipeline import row_table
from braid.data_pipeline.corpus import TokenCorpus
from braid.data_pipeline.loader import Loader, validation_batches
from braid.data_pipeline.order import ShuffledOrder
from braid.data_pipeline.packing import Rows
from braid.kernels.errors import CheckpointError, InputError

GLOBAL, LENGTH = 8, 48
STYLES = ("document", "best_fit", "paragraph")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    build(folder, [text.replace(" ", "\n") for text in texts(120, 30)], block=100, shard_bytes=1000)
    return folder


def open_rows(folder: Path, packing: str, length: int = LENGTH) -> Rows:
    return Rows(TokenCorpus.open(folder, "train"), length, packing)


def loader(rows: Rows, rank: int = 0, size: int = 1, **options) -> Loader:
    order = ShuffledOrder(rows.rows_per_shard, 5, 2)
    common = {"global_batch_size": GLOBAL, "micro_batch_size": 1, "data_rank": rank, "data_size": size}
    return Loader(rows, order, **common, **options)


def step_of(iterators: list) -> list[np.ndarray]:
    """Tokens, segments and what is scored of a global batch, [G, L] each."""
    batches = [batch for iterator in iterators for batch in next(iterator)]
    return [torch.cat([getattr(b, name) for b in batches]).numpy() for name in ("tokens", "segments", "loss_mask")]


@pytest.mark.parametrize("packing", STYLES)
def test_an_epoch_over_changing_layouts(folder, packing):
    rows = open_rows(folder, packing)
    num_steps = -(-len(rows) // GLOBAL)
    order = ShuffledOrder(rows.rows_per_shard, 5, 2).span(0, num_steps * GLOBAL)
    tokens, segments = rows.load(order)
    seen, state = 0, None
    for number, (size, workers) in enumerate([(1, 0), (2, 0), (4, 0), (8, 0), (2, 1)]):
        ranks = [loader(rows, rank, size, workers=workers) for rank in range(size)]
        for one in ranks if state else ():
            one.load_state_dict(state)
        iterators = [iter(one) for one in ranks]
        for _ in range(2 if number < 4 else num_steps - 8):
            found = step_of(iterators)
            where = slice(seen, seen + GLOBAL)
            for ours, expected in zip(found, (tokens[where], segments[where], segments[where] > 0), strict=True):
                np.testing.assert_array_equal(ours, expected)
            seen += GLOBAL
        state = json.loads(json.dumps(ranks[0].state_dict()))
        assert {one.num_real for one in ranks} == {int((segments[:seen] > 0).sum())}
    assert sorted(order[: len(rows)].tolist()) == list(range(len(rows))) and seen >= len(rows)


def test_validation_scores_no_padding(folder):
    rows = open_rows(folder, "best_fit")
    batches = list(validation_batches(rows, len(rows), 16, 0, 1))
    assert sum(int(batch.loss_mask.sum()) for batch in batches) == rows.num_real(range(len(rows)))
    num_bytes = sum(rows.num_bytes(i) for i in range(len(rows)))
    assert num_bytes == rows.corpus.num_bytes, "no byte is counted twice, none is left out"


def test_another_packing_or_table_cannot_be_continued(folder):
    state = loader(open_rows(folder, "best_fit")).state_dict()
    with pytest.raises(CheckpointError, match="packing"):
        loader(open_rows(folder, "document")).load_state_dict(state)
    skipping = Rows(TokenCorpus.open(folder, "train"), LENGTH, "best_fit", oversized="skip")
    with pytest.raises(CheckpointError, match="rows differs"):
        loader(skipping).load_state_dict(state)


def table_files(folder: Path) -> list[Path]:
    return sorted((folder / "train").glob("rows-*.*"))


@pytest.fixture
def corpus(tmp_path):
    build(tmp_path / "corpus", texts(120, 30), block=100, shard_bytes=1000)
    return tmp_path / "corpus"


@pytest.mark.parametrize("how", ["flipped", "truncated", "missing"])
def test_a_damaged_table_is_found(corpus, how):
    expected = open_rows(corpus, "best_fit").read(range(10))
    table, _, _ = table_files(corpus)
    content = table.read_bytes()
    table.unlink()
    if how != "missing":
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
        table.write_bytes(flipped if how == "flipped" else content[:-16])
    with pytest.raises(InputError, match=rf"{table.name} is damaged"):
        rows = open_rows(corpus, "best_fit")
        rows.read(range(len(rows)))
    for path in table_files(corpus):
        path.unlink()
    np.testing.assert_array_equal(open_rows(corpus, "best_fit").read(range(10)), expected)


def test_a_table_is_made_once_and_by_one(corpus, monkeypatch):
    """Eight that start together: one reads the shards, seven wait for it; later nobody reads any."""
    made = []

    def make(*arguments):
        made.append(threading.get_ident())
        original(*arguments)

    original = row_table._make
    monkeypatch.setattr(row_table, "_make", make)
    hashes = []
    threads = [
        threading.Thread(target=lambda: hashes.append(open_rows(corpus, "best_fit").table_hash)) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and len(hashes) == 8 and len(set(hashes)) == 1
    monkeypatch.setattr(TokenCorpus, "blocks", None)
    assert open_rows(corpus, "best_fit").table_hash == hashes[0]


def die_while_making(folder: Path) -> None:
    def blocks(self, shard):
        if shard == 3:
            os.kill(os.getpid(), 9)
        return original(self, shard)

    original, TokenCorpus.blocks = TokenCorpus.blocks, blocks
    open_rows(folder, "best_fit")


def test_nobody_waits_for_a_killed_process(corpus):
    process = multiprocessing.get_context("fork").Process(target=die_while_making, args=(corpus,))
    process.start()
    process.join()
    assert process.exitcode == -9 and not [path for path in table_files(corpus) if path.suffix == ".json"]
    assert len(open_rows(corpus, "best_fit")) > 10
    assert [path.suffix for path in table_files(corpus)] == [".bin", ".json", ".lock"]


def test_a_corpus_that_cannot_be_written_has_its_tables_elsewhere(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    original = Path.mkdir

    def mkdir(self, *arguments, **options):
        if self.is_relative_to(corpus):
            raise PermissionError(13, "Permission denied", str(self))
        return original(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    rows = open_rows(corpus, "best_fit")
    assert len(rows) > 10 and not table_files(corpus)
    assert len(list((tmp_path / "cache" / "braid").glob("rows-*.bin"))) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(corpus / "cache"))
    with pytest.raises(InputError, match="kept nowhere"):
        open_rows(corpus, "document")
