"""Batches of a mixture are the same in the same order whatever the layout, the kills and the changes of weights; and
what was seen of each source is counted."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import signal
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from small_corpus import build, damage, texts

from braid.data_pipeline.corpus import TokenCorpus
from braid.data_pipeline.loader import Loader
from braid.data_pipeline.mixture import BLOCK, MixedOrder, MixedRows, Stage
from braid.data_pipeline.order import ShuffledOrder
from braid.data_pipeline.packing import Rows
from braid.data_pipeline.tokenizers import load_tokenizer, train_bpe
from braid.kernels.errors import CheckpointError, DataExhausted, InputError
from braid.kernels.reference import fold_key

GLOBAL, SEED, WINDOW, LENGTH = 12, 5, 2, 32
WEIGHTS = {"web": 0.6, "code": 0.3, "math": 0.1}
CURRICULUM = (Stage.weighted(0, WEIGHTS), Stage.weighted(100, {"web": 0, "code": 1, "math": 1}))
SIZES = {"math": 12, "web": 90, "code": 50}  # documents


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Three corpora, the smallest of some ten rows."""
    root = tmp_path_factory.mktemp("sources")
    for number, (name, num) in enumerate(SIZES.items()):
        build(root / name, texts(num, 40, seed=number), block=100, shard_bytes=1500)
    return {name: root / name for name in SIZES}


def open_rows(
    folders: dict[str, Path], damaged: str = "stop", ledgers: Path | None = None, packing: str = "wrap"
) -> MixedRows:
    def rows(name: str) -> Rows:
        ledger = ledgers and ledgers / f"{name}.jsonl"
        return Rows(TokenCorpus.open(folders[name], "train", damaged, ledger), LENGTH, packing)

    return MixedRows({name: rows(name) for name in folders})


def order_of(rows: MixedRows, *stages: Stage) -> MixedOrder:
    orders = {
        name: ShuffledOrder(part.rows_per_shard, fold_key(SEED, name), WINDOW) for name, part in rows.parts.items()
    }
    return MixedOrder(orders, stages or [Stage.weighted(0, WEIGHTS)], SEED)


def loader(rows: MixedRows, rank: int = 0, size: int = 1, *, stages=(), micro: int = 1, **options) -> Loader:
    layout = {"global_batch_size": GLOBAL, "micro_batch_size": micro, "data_rank": rank, "data_size": size}
    return Loader(rows, order_of(rows, *stages), **layout | options)


def global_batches(loaders: list[Loader], num_steps: int) -> np.ndarray:
    """What the ranks get together, in rank order: tokens [steps x G, L]. Ordinals go on without a gap."""
    first, iterators = loaders[0].consumed, [iter(one) for one in loaders]
    batches = [batch for _ in range(num_steps) for iterator in iterators for batch in next(iterator)]
    ordinals = torch.cat([batch.ordinals for batch in batches])
    assert ordinals.tolist() == list(range(first, first + num_steps * GLOBAL))
    return torch.cat([batch.tokens for batch in batches]).numpy()


def test_other_weights_begin_a_new_stage_where_the_run_stands(folders):
    """What was consumed stays what it was; a stage planned for later comes when it was planned; state and counters say
    so, and the next resume finds nothing new."""
    rows = open_rows(folders)
    planned = (Stage.weighted(0, WEIGHTS), Stage.weighted(50 * GLOBAL, {"math": 1}))
    run = loader(rows, stages=planned)
    before = global_batches([run], 20)
    state = json.loads(json.dumps(run.state_dict()))
    assert state["stages"] == [{"first": 0, "shares": {"code": 3, "math": 1, "web": 6}}]

    same = loader(rows, stages=planned)
    assert same.load_state_dict(state) is False and same.order.stages == list(planned)
    changed = (Stage.weighted(0, {"web": 1, "code": 1, "math": 0}), planned[1])
    other = loader(rows, stages=changed)
    assert other.load_state_dict(state) is True
    now = Stage(20 * GLOBAL, {"code": 1, "web": 1})
    assert other.order.stages == [planned[0], now, planned[1]]
    np.testing.assert_array_equal(other.order.given(240), run.order.given(240))
    after = global_batches([other], 35)
    assert not np.array_equal(after[: 20 * GLOBAL], before)

    again = loader(rows, 0, 1, stages=changed)
    assert again.load_state_dict(json.loads(json.dumps(other.state_dict()))) is False
    assert again.order.stages == other.order.stages and again.bookkeeping() == other.bookkeeping()
    back = loader(rows, stages=changed)
    back.load_state_dict(state)
    np.testing.assert_array_equal(global_batches([back], 35), after)


def test_a_source_may_come_and_none_that_gave_samples_may_go(folders):
    two = {name: folders[name] for name in ("web", "math")}
    run = loader(open_rows(two), stages=[Stage.weighted(0, {"web": 3, "math": 1})])
    seen = global_batches([run], 10)
    state = json.loads(json.dumps(run.state_dict()))
    more = loader(open_rows(folders))
    assert more.load_state_dict(state) is True
    assert [stage.first for stage in more.order.stages] == [0, 120]
    np.testing.assert_array_equal(expected_rows(more.rows, more.order, 120), seen)
    assert more.bookkeeping()["sources"]["code"]["tokens_seen"] == 0
    global_batches([more], 5)
    with pytest.raises(CheckpointError, match="source code is gone") as caught:
        loader(open_rows(two), stages=[Stage.weighted(0, {"web": 1})]).load_state_dict(more.state_dict())
    assert "weight 0" in caught.value.change


def expected_rows(rows: MixedRows, order: MixedOrder, num: int, first: int = 0) -> np.ndarray:
    """Row by row from the sources' orders, by counting."""
    counts: Counter = Counter()
    found = []
    for n, source in enumerate(order.sources(0, first + num).tolist()):
        name = order.names[source]
        if n >= first:
            found.append(rows.parts[name][order._orders[source][counts[name]]])
        counts[name] += 1
    return np.array(found)


def test_rows_are_those_of_the_sources(folders):
    rows = open_rows(folders)
    assert len(rows) == sum(map(len, rows.parts.values())) and list(rows.parts) == ["code", "math", "web"]
    whole = [part[i] for part in rows.parts.values() for i in range(len(part))]
    np.testing.assert_array_equal(rows.read(range(len(rows))), whole)
    shuffled = np.random.default_rng(0).permutation(len(rows))
    copy = pickle.loads(pickle.dumps(rows))
    np.testing.assert_array_equal(copy.read(shuffled), np.array(whole)[shuffled])
    numbers = [part.num_bytes(i) for part in rows.parts.values() for i in range(len(part))]
    assert [rows.num_bytes(i) for i in range(len(rows))] == numbers
    np.testing.assert_array_equal(rows[len(rows) - 1], whole[-1])


def test_other_tokenizers_are_refused_and_both_named(folders, tmp_path):
    tokenizer, other = load_tokenizer("bytes"), train_bpe(["some words and some more words " * 50], 280)
    build(tmp_path / "other", texts(50, 40), tokenizer=other)
    with pytest.raises(InputError, match="sources math and other") as caught:
        open_rows({"math": folders["math"], "other": tmp_path / "other"})
    assert tokenizer.hash[:16] in caught.value.found and other.hash[:16] in caught.value.found
    assert str(folders["math"]) in caught.value.found and str(tmp_path / "other") in caught.value.found


@pytest.mark.parametrize(("size", "micro", "workers"), [(1, 12, 0), (2, 2, 1), (4, 3, 0), (3, 2, 2), (6, 1, 0)])
def test_global_batches_are_the_same_whatever_the_layout(folders, size, micro, workers):
    rows = open_rows(folders)
    loaders = [loader(rows, rank, size, micro=micro, workers=workers, stages=CURRICULUM) for rank in range(size)]
    found = global_batches(loaders, 12)  # over the first change of weights, which is inside a batch
    np.testing.assert_array_equal(found, expected_rows(rows, loaders[0].order, 12 * GLOBAL))


def ledger_of(loaders: list[Loader], file: Path, num_steps: int) -> None:
    """Runs in a process of its own: steps, a line for each with the rows' hashes and, every second one, the state; then
    it is killed, workers, read-ahead and all."""
    iterators = [iter(one) for one in loaders]
    with open(file, "a") as ledger:
        for step in range(num_steps):
            batches = [batch for iterator in iterators for batch in next(iterator)]
            hashes = [hashlib.sha256(row.tobytes()).hexdigest() for b in batches for row in b.tokens.numpy()]
            state = loaders[-1].state_dict() if step % 2 else None
            ledger.write(json.dumps({"rows": hashes, "state": state}) + "\n")
            ledger.flush()
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("format", ["mds", "wds"])
def test_ledger_over_layouts_and_kills(tmp_path, format):
    """1 -> 2 -> 4 -> 3 -> 8 ranks, 0, 1 and 2 workers, killed after each, resumed from the last state before the kill,
    over two changes of weights: the rows of an uninterrupted run on one rank, in its order."""
    for number, (name, num) in enumerate(SIZES.items()):
        build(tmp_path / name, texts(num, 40, seed=number), block=100, shard_bytes=1500, format=format)
    rows, seen, state = open_rows({name: tmp_path / name for name in SIZES}), [], None
    stages = (Stage.weighted(0, WEIGHTS), Stage.weighted(200, {"math": 1, "code": 4}), Stage.weighted(380, WEIGHTS))
    size_of_batch = 2 * GLOBAL  # 24 can be divided by 8
    for part, (size, workers, num_steps) in enumerate([(1, 0, 5), (2, 2, 7), (4, 1, 5), (3, 2, 3), (8, 1, 5)]):
        options = {"workers": workers, "stages": stages, "global_batch_size": size_of_batch}
        loaders = [loader(rows, rank, size, **options) for rank in range(size)]
        for one in loaders:
            state and one.load_state_dict(state)
        file = tmp_path / f"part-{part}.jsonl"
        process = multiprocessing.get_context("fork").Process(target=ledger_of, args=(loaders, file, num_steps))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(lines) == num_steps
        last = max(number for number, line in enumerate(lines) if line["state"])
        seen += [row for line in lines[: last + 1] for row in line["rows"]]
        state = lines[last]["state"]
    assert state["consumed"] == len(seen) == 20 * size_of_batch
    whole = expected_rows(rows, order_of(rows, *stages), len(seen))
    assert seen == [hashlib.sha256(row.tobytes()).hexdigest() for row in whole]


def test_the_start_takes_no_longer_late_in_a_run(folders):
    """At sample 10^12, behind a hundred changes of weights, as at sample 0; and the counts are exact."""
    rows = open_rows(folders)
    late = 10**12 + 7
    weights = [{"web": 1, "code": 1 + number, "math": 1 + number % 2} for number in range(100)]
    many = tuple(Stage.weighted(number * 10**10, each) for number, each in enumerate(weights))
    seconds = {}
    for consumed, stages in ((0, CURRICULUM), (late, CURRICULUM), (late, many)):
        tries = []
        for _ in range(5):
            start = time.perf_counter()
            one = loader(rows, stages=stages, consumed=consumed)
            (step,) = islice(one, 1)
            tries.append(time.perf_counter() - start)
        seconds[consumed, len(stages)] = min(tries)
        assert step[0].ordinals.tolist() == [consumed]
    assert max(seconds.values()) < 20 * seconds[0, len(CURRICULUM)] and max(seconds.values()) < 1, seconds
    given = one.order.given(late)
    exact = [sum(stage.fraction(name) * 10**10 for stage in many) for name in one.order.names]
    assert given.sum() == late
    assert all(abs(int(count) - share) < 100 + BLOCK for count, share in zip(given, exact, strict=True))


def test_state_of_another_mixture_is_refused(folders, tmp_path):
    rows = open_rows(folders)
    state = loader(rows, consumed=48).state_dict()
    assert state["fingerprint"] == {name: part.corpus.fingerprint for name, part in rows.parts.items()}
    assert {"version", "consumed", "position", "seed", "window", "sequence_length", "packing"} < state.keys()
    build(tmp_path, texts(60, 40, seed=9), block=100, shard_bytes=1500)
    with pytest.raises(CheckpointError, match="fingerprint"):
        loader(open_rows(folders | {"math": tmp_path})).load_state_dict(state)
    single = rows.parts["web"]
    alone = Loader(
        single, ShuffledOrder(single.rows_per_shard, SEED, WINDOW), global_batch_size=GLOBAL, micro_batch_size=1,
        data_rank=0, data_size=1,
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="fingerprint"):
        alone.load_state_dict(state)
    with pytest.raises(CheckpointError, match="fingerprint"):
        loader(rows).load_state_dict(alone.state_dict())


def test_a_source_smaller_than_its_part_of_a_batch_is_exhausted(folders):
    rows = open_rows(folders)
    num = len(rows.parts["math"])
    for weights, stages in (({"math": 1, "web": 1}, 1), (WEIGHTS, 2)):
        curriculum = [Stage.weighted(0, weights), Stage.weighted(5000, {"math": 1, "web": 1})][:stages]
        with pytest.raises(DataExhausted, match="takes of it") as caught:
            loader(rows, stages=curriculum, global_batch_size=2 * num + 2)
        assert f"{num} rows of 32 tokens" in caught.value.found and f"source math gives {num + 1}" in caught.value.found
        loader(rows, stages=curriculum, global_batch_size=2 * num)


def counted(rows: MixedRows, tokens: np.ndarray, sources: list[str]) -> dict[str, dict[str, int]]:
    """Tokens seen, unique and repeated, by remembering every row of every source."""
    numbers = {name: {part[i].tobytes(): i for i in range(len(part))} for name, part in rows.parts.items()}
    found = {name: Counter() for name in rows.parts}
    for row, name in zip(tokens, sources, strict=True):
        found[name][numbers[name][row.tobytes()]] += 1
    return {
        name: {
            "tokens_seen": LENGTH * sum(rows_seen.values()),
            "unique_tokens": LENGTH * len(rows_seen),
            "repeated_tokens": LENGTH * (sum(rows_seen.values()) - len(rows_seen)),
        }
        for name, rows_seen in found.items()
    }


@pytest.mark.parametrize("broken", [False, True], ids=["whole", "damaged"])
def test_bookkeeping_is_a_count_of_all_that_was_seen(folders, tmp_path, broken):
    """Two epochs of the smallest source, one and a half of the next; resumed in between on other ranks. Damaged
    shards are replaced by rows of the same source: which sample is whose does not change."""
    sources = dict(folders)
    if broken:
        for number, name in enumerate(SIZES):
            build(tmp_path / name, texts(SIZES[name], 40, seed=number), block=100, shard_bytes=1500)
        sources = {name: tmp_path / name for name in SIZES}
        damage(tmp_path / "math" / "train" / "shard.00001.mds", "flipped")
        damage(tmp_path / "code" / "train" / "shard.00002.mds", "missing")
    rows = open_rows(sources, "skip", tmp_path / "ledgers")
    whole = open_rows(folders)
    stages = (Stage.weighted(0, WEIGHTS), Stage.weighted(160, {"web": 1, "code": 4, "math": 4}))
    run, tokens = loader(rows, stages=stages), []
    names = [run.order.names[source] for source in order_of(whole, *stages).sources(0, 30 * GLOBAL)]
    for size, num_steps in ((2, 3), (1, 8), (4, 12), (3, 7)):
        state = json.loads(json.dumps(run.state_dict()))
        loaders = [loader(rows, rank, size, stages=stages, workers=size % 2) for rank in range(size)]
        for one in loaders:
            one.load_state_dict(state)
        tokens += list(global_batches(loaders, num_steps))
        run = loaders[0]
        book, seen = run.bookkeeping(), names[: run.consumed]
        expected = counted(whole, np.array(tokens), seen)
        for name, counts in expected.items():
            found, part = book["sources"][name], whole.parts[name]
            assert counts.items() <= found.items()
            assert found["epoch"] == (seen.count(name) + found["left_out"]) / len(part)
            assert found["weight"] == run.order.stage(run.consumed).fractions[name]
        for total in ("unique_tokens", "repeated_tokens"):
            assert book[total] == sum(counts[total] for counts in expected.values())
    assert book["sources"]["math"]["epoch"] > 2 and book["sources"]["code"]["epoch"] > 1.2
    left_out = {name: source["left_out"] for name, source in book["sources"].items()}
    if not broken:
        assert left_out == dict.fromkeys(SIZES, 0) and run.position == run.consumed
        return
    assert left_out["web"] == 0 and left_out["math"] > 3 and left_out["code"] > 1
    assert run.position == run.consumed + sum(left_out.values())
    ledgers = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "ledgers").iterdir()}
    assert {name: entry["shard"] for name, entry in ledgers.items()} == {
        "math": "shard.00001.mds", "code": "shard.00002.mds"
    }  # fmt: skip
    lost = {whole.parts[name][i].tobytes() for name, entry in ledgers.items() for i in range(*entry["rows"])}
    assert lost and not lost & {row.tobytes() for row in tokens}


def test_padding_is_no_token(folders):
    """Rows that are packed documents: what is counted, source by source, is what is scored; a resumed run goes on."""
    rows = open_rows(folders, packing="best_fit")
    run = loader(rows, stages=[Stage.weighted(0, {"web": 1, "code": 2, "math": 2})])
    names = run.order.sources(0, 20 * GLOBAL)
    scored: list[int] = []
    for _ in range(2):
        scored += [int(row.sum()) for step in islice(run, 10) for batch in step for row in batch.loss_mask]
        state = json.loads(json.dumps(run.state_dict()))
        run = loader(rows, stages=run.order.stages)
        run.load_state_dict(state)
    book = run.bookkeeping()
    for number, name in enumerate(run.order.names):
        tokens = np.array(scored)[names == number]
        unique = tokens[: len(rows.parts[name])].sum()
        found = [book["sources"][name][f"{what}_tokens"] for what in ("unique", "repeated")]
        assert found == [unique, tokens.sum() - unique]
    assert sum(scored) == run.num_real == book["unique_tokens"] + book["repeated_tokens"] < 20 * GLOBAL * LENGTH
    assert book["sources"]["math"]["repeated_tokens"] > 0


def test_a_source_without_a_whole_shard_is_an_error(folders, tmp_path):
    build(tmp_path / "math", texts(12, 40), block=100, shard_bytes=1500)
    for shard in (tmp_path / "math" / "train").glob("*.mds"):
        shard.unlink()
    rows = open_rows(folders | {"math": tmp_path / "math"}, "skip", tmp_path)
    with pytest.raises(DataExhausted, match="every shard") as caught:
        next(iter(loader(rows)))
    assert str(tmp_path / "math") in caught.value.found


def test_bookkeeping_of_a_single_corpus(folders):
    rows = open_rows(folders).parts["math"]
    one = Loader(
        rows, ShuffledOrder(rows.rows_per_shard, SEED, WINDOW), global_batch_size=4, micro_batch_size=4, data_rank=0,
        data_size=1,
    )  # fmt: skip
    steps = 3 * len(rows) // 4
    for _ in islice(one, steps):
        pass
    unique = min(4 * steps, len(rows)) * LENGTH
    expected = {"unique_tokens": unique, "repeated_tokens": 4 * steps * LENGTH - unique, "epoch": 4 * steps / len(rows)}
    assert one.bookkeeping() == expected
