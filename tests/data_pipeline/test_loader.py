"""Global batches do not depend on the layout, resuming is exact, damage and dead workers are errors with a name."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from itertools import islice

import numpy as np
import pytest
import torch
from small_corpus import build, damage, texts

from braid.data_pipeline.corpus import TokenCorpus
from braid.data_pipeline.loader import Batch, Loader, validation_batches
from braid.data_pipeline.order import ShuffledOrder
from braid.data_pipeline.packing import Rows
from braid.kernels.errors import CheckpointError, ConfigError, DataExhausted, InputError, TrainingFailed

GLOBAL = 16
SEED, WINDOW, LENGTH = 5, 2, 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A corpus of some 20 shards; tests that damage it make their own."""
    folder = tmp_path_factory.mktemp("corpus")
    build(folder, texts(120, 40), block=100, shard_bytes=1500)
    return folder


def open_rows(folder, damaged="stop", ledger=None, length=LENGTH, packing="wrap") -> Rows:
    return Rows(TokenCorpus.open(folder, "train", damaged, ledger), length, packing)


def loader(
    rows: Rows, rank: int = 0, size: int = 1, *, micro: int = 1, seed: int = SEED, window: int = WINDOW, **options
) -> Loader:
    order = ShuffledOrder(rows.rows_per_shard, seed, window)
    options = {"global_batch_size": GLOBAL, "micro_batch_size": micro, "data_rank": rank, "data_size": size} | options
    return Loader(rows, order, **options)


def global_batches(loaders: list[Loader], num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """What the ranks get together: tokens [steps, G, L] and ordinals [steps, G], in rank order."""
    iterators = [iter(one) for one in loaders]
    steps = [[batch for iterator in iterators for batch in next(iterator)] for _ in range(num_steps)]
    return (
        np.stack([torch.cat([batch.tokens for batch in step]).numpy() for step in steps]),
        np.stack([torch.cat([batch.ordinals for batch in step]).numpy() for step in steps]),
    )


def expected_batches(rows: Rows, num_steps: int, first: int = 0) -> np.ndarray:
    """Written out from the order, without the loader."""
    order = ShuffledOrder(rows.rows_per_shard, SEED, WINDOW)
    return np.array([[rows[order[first + k * GLOBAL + j]] for j in range(GLOBAL)] for k in range(num_steps)])


LAYOUTS = [
    (size, micro, workers)
    for size in (1, 2, 4, 8)
    for micro in (1, 2, 4)
    for workers in (0, 1, 2)
    if size * micro <= GLOBAL and (workers != 1 or size <= 2)
]  # one worker with few ranks, to save processes


@pytest.mark.parametrize(("size", "micro", "workers"), LAYOUTS)
def test_global_batches_are_the_same_whatever_the_layout(folder, size, micro, workers):
    rows = open_rows(folder)
    loaders = [loader(rows, rank, size, micro=micro, workers=workers) for rank in range(size)]
    tokens, ordinals = global_batches(loaders, 6)
    np.testing.assert_array_equal(tokens, expected_batches(rows, 6))
    np.testing.assert_array_equal(ordinals, np.arange(6 * GLOBAL).reshape(6, GLOBAL))
    assert all(one.consumed == one.position == 6 * GLOBAL for one in loaders)


def test_what_a_batch_is(folder):
    (step,) = islice(loader(open_rows(folder), 1, 2, micro=2), 1)
    assert len(step) == GLOBAL // 2 // 2
    for k, batch in enumerate(step):
        assert batch.tokens.dtype == torch.int64 and batch.tokens.shape == (2, LENGTH)
        assert batch.loss_mask.dtype == torch.bool and batch.loss_mask.shape == (2, LENGTH) and batch.loss_mask.all()
        assert batch.ordinals.dtype == torch.int64 and batch.ordinals.tolist() == [8 + 2 * k, 9 + 2 * k]


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_at_another_layout(folder, workers):
    """Stopped after 3 steps of 4 ranks, and again after 2 steps of 2 ranks with other micro-batches and workers."""
    rows = open_rows(folder)
    whole, _ = global_batches([loader(rows)], 9)
    first = [loader(rows, rank, 4, micro=2, workers=workers) for rank in range(4)]
    pieces = [global_batches(first, 3)]
    for size, steps, other_workers in ((2, 2, 2 - workers), (1, 4, workers)):
        state = json.loads(json.dumps(first[-1].state_dict()))
        first = [loader(rows, rank, size, micro=4, workers=other_workers) for rank in range(size)]
        for one in first:
            one.load_state_dict(state)
        pieces.append(global_batches(first, steps))
    np.testing.assert_array_equal(np.concatenate([tokens for tokens, _ in pieces]), whole)
    np.testing.assert_array_equal(np.concatenate([ordinals for _, ordinals in pieces]).ravel(), np.arange(9 * GLOBAL))


def test_consumed_counts_what_was_taken_not_what_was_read_ahead(folder):
    one = loader(open_rows(folder), workers=2)
    iterator = iter(one)
    assert one.consumed == 0
    for k in range(1, 4):
        next(iterator)
        assert one.consumed == one.state_dict()["consumed"] == k * GLOBAL
    (again,) = islice(one, 1)
    assert again[0].ordinals.tolist() == [3 * GLOBAL], "a new iterator goes on from what was consumed"
    (given,) = islice(loader(open_rows(folder), consumed=5 * GLOBAL), 1)
    assert given[0].ordinals.tolist() == [5 * GLOBAL]


@pytest.mark.parametrize("workers", [0, 2])
def test_each_row_once_per_epoch_and_over_its_edge(folder, workers):
    rows = open_rows(folder)
    num_rows = len(rows)
    assert num_rows % GLOBAL, "the edge of the epoch should fall inside a global batch"
    tokens, _ = global_batches([loader(rows, workers=workers, micro=GLOBAL)], 3 * num_rows // GLOBAL)
    stream = tokens.reshape(-1, LENGTH)
    all_rows = sorted(rows[i].tolist() for i in range(num_rows))
    epochs = [stream[k * num_rows : (k + 1) * num_rows].tolist() for k in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [all_rows, all_rows]
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
def test_a_damaged_shard_stops_with_its_name(tmp_path, how, workers):
    build(tmp_path, texts(60, 40), block=100, shard_bytes=1500)
    damage(tmp_path / "train" / "shard.00003.mds", how)
    start = time.monotonic()
    one = loader(open_rows(tmp_path), workers=workers)
    with pytest.raises(InputError) as caught:
        for _ in islice(one, len(one.rows) // GLOBAL + 1):
            pass
    assert time.monotonic() - start < 2
    assert "shard.00003.mds" in caught.value.what and "Traceback" not in str(caught.value)
    reason = {"truncated": "bytes, index.json says", "flipped": "hash is", "missing": "No such file"}[how]
    assert reason in caught.value.found
    assert "data.damaged=skip" in caught.value.change
    assert not multiprocessing.active_children()


def surviving_rows(folder, rows: Rows, shards: list[int]) -> list[int]:
    """Rows in the order of epoch 0 without those that touch one of `shards`."""
    starts, stride = rows.corpus.shard_starts, rows.sequence_length - 2
    lost = {p for shard in shards for p in range(starts[shard], starts[shard + 1])}
    order = ShuffledOrder(rows.rows_per_shard, SEED, WINDOW)
    return [
        row
        for row in (order[k] for k in range(2 * len(order)))
        if not lost & set(range(row * stride, (row + 1) * stride))
    ]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", [1, 4])
def test_skipping_leaves_out_exactly_the_damaged_rows(tmp_path, size, workers):
    build(tmp_path, texts(60, 40), block=100, shard_bytes=1500)
    ledger = tmp_path / "ledger.jsonl"
    for shard, how in ((0, "flipped"), (3, "missing"), (4, "truncated")):
        damage(tmp_path / "train" / f"shard.{shard:05}.mds", how)
    loaders = [loader(open_rows(tmp_path, "skip", ledger), rank, size, workers=workers) for rank in range(size)]
    rows = open_rows(tmp_path, "skip", ledger)
    kept = surviving_rows(tmp_path, rows, [0, 3, 4])
    num_steps = len(kept) // GLOBAL
    tokens, ordinals = global_batches(loaders, num_steps)
    expected = [rows[row] for row in kept[: num_steps * GLOBAL]]
    np.testing.assert_array_equal(tokens.reshape(-1, LENGTH), expected)
    np.testing.assert_array_equal(ordinals.ravel(), np.arange(num_steps * GLOBAL))
    entries = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert sorted(entry["shard"] for entry in entries) == [f"shard.{k:05}.mds" for k in (0, 3, 4)]
    in_ledger = {row for entry in entries for row in range(*entry["rows"])}
    assert in_ledger == set(range(len(rows))) - set(kept)
    assert loaders[0].consumed == num_steps * GLOBAL < loaders[0].position


def test_damage_found_after_a_restart_loses_no_whole_row(tmp_path):
    """A shard breaks whose rows were partly consumed: the rest of them is left out, nothing else lost or repeated."""
    build(tmp_path, texts(60, 40), block=100, shard_bytes=1500)
    ledger = tmp_path / "ledger.jsonl"
    before = [loader(open_rows(tmp_path, "skip", ledger), rank, 2) for rank in range(2)]
    seen = global_batches(before, 4)[0].reshape(-1, LENGTH).tolist()
    assert not ledger.exists()
    order = before[0].order
    broken = before[0].rows.rows_per_shard.cumsum().searchsorted(order[0], "right")
    damage(tmp_path / "train" / f"shard.{broken:05}.mds", "flipped")

    after = loader(open_rows(tmp_path, "skip", ledger), micro=4, workers=2)
    after.load_state_dict(before[0].state_dict())
    rows = after.rows
    position = after.position
    rest = [order[k] for k in range(position, len(order)) if not rows.is_left_out(order[k])]
    assert len(rest) < len(order) - position, "some rows of the broken shard should still be to come"
    num_steps = len(rest) // GLOBAL
    tokens, ordinals = global_batches([after], num_steps)
    assert tokens.reshape(-1, LENGTH).tolist() == [rows[row].tolist() for row in rest[: num_steps * GLOBAL]]
    assert ordinals.ravel().tolist() == list(range(4 * GLOBAL, (4 + num_steps) * GLOBAL))
    assert not {tuple(row) for row in seen} & {tuple(row) for row in tokens.reshape(-1, LENGTH).tolist()}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corpus_without_a_whole_shard_is_an_error(tmp_path, workers):
    build(tmp_path, texts(60, 40), block=100, shard_bytes=1500)
    for shard in (tmp_path / "train").glob("*.mds"):
        shard.unlink()
    with pytest.raises(DataExhausted, match="every shard"):
        next(iter(loader(open_rows(tmp_path, "skip", tmp_path / "ledger.jsonl"), workers=workers)))
    assert not multiprocessing.active_children()


def test_a_shard_that_breaks_between_check_and_read_still_stops(tmp_path):
    """Skipping is decided before reading; what a worker then cannot read is an error, not other data."""
    build(tmp_path, texts(60, 40), block=100, shard_bytes=1500)
    rows = open_rows(tmp_path, "skip", tmp_path / "ledger.jsonl")
    assert not any(rows.is_left_out(i) for i in range(len(rows)))
    damage(tmp_path / "train" / "shard.00003.mds", "missing")
    fresh = pickle.loads(pickle.dumps(rows))
    fresh.corpus._reader._verified.clear()
    one = loader(fresh, workers=2)
    with pytest.raises(InputError, match="shard.00003.mds"):
        for _ in islice(one, len(rows) // GLOBAL):
            pass


def test_a_killed_worker_is_an_error_and_not_a_hang(folder):
    one = loader(open_rows(folder), workers=2)
    iterator = iter(one)
    handler = signal.getsignal(signal.SIGCHLD)
    next(iterator)
    assert signal.getsignal(signal.SIGCHLD) is handler, "a dead worker must not interrupt the trainer just anywhere"
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    start, taken = time.monotonic(), one.consumed
    with pytest.raises(TrainingFailed, match="worker") as caught:
        for _ in range(1000):
            next(iterator)
            taken += GLOBAL
    assert time.monotonic() - start < 15 and caught.value.exit_code == 4
    assert not multiprocessing.active_children()
    assert one.consumed == taken


def test_workers_outlive_signals_to_the_whole_job_but_not_the_loader(folder):
    iterator = iter(loader(open_rows(folder), workers=2))
    next(iterator)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        for number in ("TERM", "INT", "USR1"):  # from elsewhere: kill(1) is not the trainer
            subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)
    time.sleep(0.3)
    for _ in range(20):
        next(iterator)
    assert all(worker.is_alive() for worker in workers)
    start = time.monotonic()
    iterator.close()
    for worker in workers:
        worker.join(5)
    assert not any(worker.is_alive() for worker in workers) and time.monotonic() - start < 3


def test_the_trainer_can_terminate_its_workers(folder):
    iterator = iter(loader(open_rows(folder), workers=1))
    next(iterator)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(5)
    assert worker.exitcode == 0


def test_workers_end_with_a_killed_trainer(folder):
    code = f"""
import multiprocessing, os, sys, time
from pathlib import Path
from braid.data_pipeline import corpus, loader, order, packing
rows = packing.Rows(corpus.TokenCorpus.open(Path({str(folder)!r}), "train"), 32, "wrap")
one = loader.Loader(rows, order.ShuffledOrder(rows.rows_per_shard, 0, 2), global_batch_size=4, micro_batch_size=4,
                    data_rank=0, data_size=1, workers=2)
iterator = iter(one)
next(iterator)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(60)
"""
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in trainer.stdout.readline().split()]
    assert len(workers) == 2
    trainer.kill()
    trainer.wait()
    deadline = time.monotonic() + 15
    while any(
        os.path.exists(f"/proc/{pid}") and "Z" not in open(f"/proc/{pid}/stat").read().split()[2] for pid in workers
    ):
        assert time.monotonic() < deadline, "workers are still there"
        time.sleep(0.1)


def test_reading_draws_nothing_from_torch(folder):
    before = torch.get_rng_state()
    for workers in (0, 2):
        next(iter(loader(open_rows(folder), workers=workers)))
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_can_be_sent_to_spawned_workers(folder):
    rows = open_rows(folder)
    copy = pickle.loads(pickle.dumps(rows))
    np.testing.assert_array_equal(copy.read(range(len(rows))), rows.read(range(len(rows))))


def test_state_of_another_run_is_refused(folder, tmp_path):
    rows = open_rows(folder)
    state = loader(rows, consumed=48).state_dict()
    assert state == {
        "version": 1,
        "consumed": 48,
        "position": 48,
        "seed": SEED,
        "window": WINDOW,
        "packing": "wrap",
        "target_tokens": None,
        "sequence_length": LENGTH,
        "fingerprint": rows.corpus.fingerprint,
    }
    build(tmp_path, texts(120, 40, seed=9), block=100, shard_bytes=1500)
    others = {
        "seed": loader(rows, seed=SEED + 1),
        "window": loader(rows, window=WINDOW + 1),
        "packing": loader(open_rows(folder, packing="stream")),
        "sequence_length": loader(open_rows(folder, length=LENGTH + 1)),
        "fingerprint": loader(open_rows(tmp_path)),
    }
    for name, other in others.items():
        with pytest.raises(CheckpointError, match=name) as caught:
            other.load_state_dict(state)
        assert str(state[name]) in caught.value.found and str(other.state_dict()[name]) in caught.value.found
        assert other.consumed == 0
    earlier = {name: value for name, value in state.items() if name != "target_tokens"}
    assert loader(rows).load_state_dict(earlier) is False
    with pytest.raises(CheckpointError, match="version"):
        loader(rows).load_state_dict(state | {"version": 0})
    with pytest.raises(CheckpointError, match="seed"):
        loader(rows).load_state_dict({"version": 1, "consumed": 3})


def test_batches_that_do_not_divide_are_refused(folder):
    for options in ({"micro": 3}, {"size": 3}, {"micro": 16, "size": 2}, {"global_batch_size": 0}):
        with pytest.raises(ConfigError, match="global_batch_size"):
            loader(open_rows(folder), **options)


def test_a_corpus_smaller_than_a_global_batch_is_exhausted(tmp_path):
    build(tmp_path, ["a" * 30 * 15])
    with pytest.raises(DataExhausted, match="15 rows of 32 tokens, global_batch_size 16"):
        loader(open_rows(tmp_path))
    build(tmp_path, ["a" * 30 * 16])
    next(iter(loader(open_rows(tmp_path))))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("num_sequences", [1, 37, 10**9])
def test_validation_takes_every_row_once(folder, size, num_sequences):
    rows = open_rows(folder)
    all_batches = [list(validation_batches(rows, num_sequences, 4, rank, size)) for rank in range(size)]
    ranks = [[batch for batch in batches if batch.loss_mask.any()] for batches in all_batches]
    ordinals = torch.cat([batch.ordinals for rank in ranks for batch in rank])
    tokens = torch.cat([batch.tokens for rank in ranks for batch in rank])
    num_chosen = min(num_sequences, len(rows))
    assert ordinals.tolist() == [k * len(rows) // num_chosen for k in range(num_chosen)]  # evenly spread
    np.testing.assert_array_equal(tokens, [rows[i] for i in ordinals])
    for rank in ranks:
        assert all(len(batch.ordinals) == 4 for batch in rank[:-1]) and all(batch.loss_mask.all() for batch in rank)
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1
    for whole, kept in zip(all_batches, ranks, strict=True):
        assert len(whole) == len(all_batches[0]) == max(map(len, ranks))
        assert [batch.ordinals.tolist() for batch in whole[: len(kept)]] == [b.ordinals.tolist() for b in kept]


def test_validation_leaves_out_damaged_rows_and_keeps_ordinals(tmp_path):
    build(tmp_path, texts(60, 40), block=100, shard_bytes=1500)
    damage(tmp_path / "train" / "shard.00001.mds", "flipped")
    rows = open_rows(tmp_path, "skip", tmp_path / "ledger.jsonl")
    batches = [batch for rank in range(2) for batch in validation_batches(rows, 10**9, 4, rank, 2)]
    found = [i for batch in batches if batch.loss_mask.any() for i in batch.ordinals]
    (entry,) = map(json.loads, (tmp_path / "ledger.jsonl").read_text().splitlines())
    assert [int(i) for i in found] == [i for i in range(len(rows)) if i not in range(*entry["rows"])]
    with pytest.raises(InputError, match="shard.00001.mds"):
        list(validation_batches(open_rows(tmp_path), 10**9, 4, 0, 1))


def test_the_next_step_is_made_beside_the_present_one(folder, monkeypatch):
    """But not the first, which forks; and when the loader is left, so has the thread."""
    made, real = [], Batch.of_rows
    here = threading.get_ident()

    def watched(*arguments) -> Batch:
        made.append(threading.get_ident() == here)
        return real(*arguments)

    monkeypatch.setattr(Batch, "of_rows", watched)
    one = loader(open_rows(folder), workers=1, micro=GLOBAL)
    iterator = iter(one)
    next(iterator)
    deadline = time.monotonic() + 30
    while len(made) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made == [True, False] and one.consumed == GLOBAL
    next(iterator)
    assert one.consumed == 2 * GLOBAL
    iterator.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("next-step")]
    assert len(made) == 3 and not multiprocessing.active_children()
