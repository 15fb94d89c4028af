"""One corpus in every format: the same batches, damage found and named, exact continuation under any layout."""

from __future__ import annotations

import json
import os
import pickle
import signal
import tarfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from small_corpus import build, damage, texts

from braid.data_pipeline.corpus import TokenCorpus
from braid.data_pipeline.formats import FORMATS, shard_reader
from braid.data_pipeline.loader import Loader
from braid.data_pipeline.order import ShuffledOrder
from braid.data_pipeline.packing import Rows
from braid.data_pipeline.prepare import prepare
from braid.kernels.errors import InputError

ENDINGS = {"mds": "mds", "wds": "tar", "flat": "bin"}
LENGTH, GLOBAL, SEED, WINDOW = 32, 24, 5, 2
BLOCKS = {"block": 100, "shard_bytes": 1500}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A corpus of some 20 shards in each format; tests that damage one make their own."""
    folders = {format: tmp_path_factory.mktemp(format) for format in FORMATS}
    for format, folder in folders.items():
        build(folder, texts(120, 40), format=format, **BLOCKS)
    return folders


def open_rows(folder: Path, *options) -> Rows:
    return Rows(TokenCorpus.open(folder, "train", *options), LENGTH, "wrap")


def loaders(rows: Rows, size: int = 1, workers: int = 0, state: dict | None = None) -> list[Loader]:
    order = ShuffledOrder(rows.rows_per_shard, SEED, WINDOW)
    sizes = {"global_batch_size": GLOBAL, "micro_batch_size": 1}
    made = [Loader(rows, order, data_rank=rank, data_size=size, workers=workers, **sizes) for rank in range(size)]
    for one in made if state else []:
        one.load_state_dict(state)
    return made


def global_batches(ranks: list[Loader], num_steps: int) -> np.ndarray:
    """int64 [steps, G, L], the ranks' samples one after the other."""
    iterators = [iter(one) for one in ranks]
    steps = [[batch.tokens for iterator in iterators for batch in next(iterator)] for _ in range(num_steps)]
    return np.array([torch.cat(step).numpy() for step in steps])


# --- the same in every format ---


def test_batches_are_equal_to_the_bit(folders):
    expected, *others = (open_rows(folders[format]) for format in FORMATS)
    num_steps = 2 * len(expected) // GLOBAL
    batches = global_batches(loaders(expected), num_steps)
    for rows in others:
        assert rows.rows_per_shard.tolist() == expected.rows_per_shard.tolist() and len(rows.rows_per_shard) > 15
        np.testing.assert_array_equal(global_batches(loaders(rows, 4, 1), num_steps), batches)


@pytest.mark.parametrize("format", ["wds", "flat"])
def test_rows_are_those_of_mds_and_views_of_the_file(folders, format):
    expected = shard_reader("mds", folders["mds"] / "train")
    reader = pickle.loads(pickle.dumps(shard_reader(format, folders[format] / "train")))
    assert reader.num_rows == expected.num_rows > 40
    for i in np.random.default_rng(0).permutation(reader.num_rows).tolist():
        row, other = reader.row(i), expected.row(i)
        assert row.keys() == other.keys()
        for name, array in row.items():
            assert array.dtype == other[name].dtype and not array.flags.owndata and not array.flags.writeable
            np.testing.assert_array_equal(array, other[name])
    for i in (-1, reader.num_rows):
        with pytest.raises(IndexError):
            reader.row(i)


@pytest.mark.parametrize("format", ["wds", "flat"])
def test_prepared_corpora_differ_only_in_their_shards(tmp_path, format):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(400, 200)))
    options = {"row_tokens": 500, "shard_bytes": 8192, "progress": False}
    for name, more in (("mds", {}), ("one", {"format": format}), ("two", {"format": format, "workers": 2})):
        prepare([tmp_path / "a.jsonl"], "train:300", tmp_path / name, **options, **more)
    trees = {
        name: {str(path.relative_to(tmp_path / name)): path.read_bytes() for path in (tmp_path / name).rglob("*.*")}
        for name in ("mds", "one", "two")
    }
    assert trees["one"] == trees["two"], "the number of processes changes nothing"
    assert len([name for name in trees["one"] if name.endswith(ENDINGS[format])]) > 10
    for split in ("train", "validation"):
        ours, mds = (TokenCorpus.open(tmp_path / name, split) for name in ("one", "mds"))
        assert ours.shard_starts == mds.shard_starts and ours.fingerprint != mds.fingerprint
        np.testing.assert_array_equal(ours.read(0, ours.num_stream_tokens), mds.read(0, mds.num_stream_tokens))
    with pytest.raises(InputError, match="prepared differently") as caught:
        prepare([tmp_path / "a.jsonl"], "train:300", tmp_path / "one", **options)
    assert caught.value.found == f"format was '{format}', now None"


def test_pairs_in_every_format(tmp_path):
    lines = [{"source": f"what is {i}", "target": "" if i % 7 == 0 else str(i * i)} for i in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = []
    for format in FORMATS:
        fields = {"pair_fields": ("source", "target"), "format": format, "progress": False}
        prepare([tmp_path / "a.jsonl"], "bytes", tmp_path / format, row_tokens=300, shard_bytes=2000, **fields)
        rows.append(Rows(TokenCorpus.open(tmp_path / format, "train"), 40, "pairs"))
        np.testing.assert_array_equal(rows[-1].read(range(len(rows[0]))), rows[0].read(range(len(rows[0]))))


def test_an_unknown_format_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    with pytest.raises(InputError, match="format is not known"):
        prepare([tmp_path / "a.txt"], "bytes", tmp_path / "out", format="csv", progress=False)


# --- other readers ---


def test_webdataset_reads_the_tars(folders):
    webdataset = pytest.importorskip("webdataset")
    urls = [str(path) for path in sorted((folders["wds"] / "train").glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    reader = shard_reader("wds", folders["wds"] / "train")
    assert len(samples) == reader.num_rows and len({sample["__key__"] for sample in samples}) == len(samples)
    for i, sample in enumerate(samples):
        for name, array in reader.row(i).items():
            assert sample[f"{name}.npy"].dtype == array.dtype
            np.testing.assert_array_equal(sample[f"{name}.npy"], array)


def test_the_table_says_where_members_lie(folders):
    folder = folders["wds"] / "train"
    table = np.fromfile(folder / "blocks.u64", "<u8").reshape(-1, 5).tolist()
    paths = sorted(folder.glob("*.tar"))
    members = [(path, member) for path in paths for member in tarfile.open(path).getmembers()]
    assert len(members) == 2 * len(table)
    for (at, num, ends_at, num_ends, _), *pair in zip(table, members[::2], members[1::2], strict=True):
        for start, count, itemsize, (path, member) in ((at, num, 2, pair[0]), (ends_at, num_ends, 4, pair[1])):
            assert start + count * itemsize == member.offset_data + member.size and member.mtime == member.uid == 0
            assert member.name.startswith(path.name.split(".")[1] + "-")


def test_numpy_reads_the_flat_files(folders):
    folder = folders["flat"] / "train"
    corpus, reader = TokenCorpus.open(folders["flat"], "train"), shard_reader("flat", folder)
    firsts = np.concatenate([[0], np.cumsum(reader.shard_rows)])
    sizes = np.load(folder / "rows.npy")[:, 0]
    found = [
        np.memmap(path, np.uint16, mode="r")[: sizes[a:b].sum()]
        for path, (a, b) in zip(sorted(folder.glob("*.bin")), pairwise(firsts), strict=True)
    ]
    np.testing.assert_array_equal(np.concatenate(found), corpus.stored_tokens(0, corpus.num_tokens))


# --- damage ---


def left_out(rows: Rows, shard: int) -> set[int]:
    """Rows of which some token lies in a shard, written out."""
    lost = range(*rows.corpus.shard_starts[shard : shard + 2])
    stride = LENGTH - 2
    return {i for i in range(len(rows)) if i * stride < lost.stop and (i + 1) * stride > lost.start}


@pytest.mark.parametrize("format", FORMATS)
def test_random_damage_is_found_and_exactly_its_rows_are_left_out(tmp_path, format):
    """70 of truncated, flipped and deleted, at random places of random shards."""
    build(tmp_path, texts(60, 40), format=format, **BLOCKS)
    shards = sorted((tmp_path / "train").glob(f"*.{ENDINGS[format]}"))
    rng = np.random.default_rng(FORMATS.index(format))
    for trial in range(70):
        number = int(rng.integers(len(shards)))
        content = bytearray(shards[number].read_bytes())
        bit = int(rng.integers(8 * len(content)))
        whole = bytes(content)
        if trial % 3 == 0:
            shards[number].unlink()
        elif trial % 3 == 1:
            shards[number].write_bytes(content[: bit // 8])
        else:
            content[bit // 8] ^= 1 << bit % 8
            shards[number].write_bytes(content)

        ledger = tmp_path / f"ledger {trial}"
        rows = open_rows(tmp_path, "skip", ledger)
        missing = {i for i in range(len(rows)) if rows.is_left_out(i)}
        assert missing == left_out(rows, number)
        (entry,) = map(json.loads, ledger.read_text().splitlines())
        assert entry["shard"] == shards[number].name and set(range(*entry["rows"])) == missing
        assert [bool(rows.corpus.damage(k)) for k in range(len(shards))] == [k == number for k in range(len(shards))]
        stopping = open_rows(tmp_path)
        with pytest.raises(InputError, match=shards[number].name):
            stopping.read([min(missing)])
        kept = sorted(set(range(len(rows))) - missing)
        assert stopping.read(kept).shape == (len(kept), LENGTH)
        shards[number].write_bytes(whole)


@pytest.mark.parametrize("format", ["wds", "flat"])
def test_damaged_blocks_are_named(tmp_path, format):
    build(tmp_path, texts(60, 40), format=format, block=100, shard_bytes=3000)
    shard = tmp_path / "train" / f"shard.00001.{ENDINGS[format]}"
    reader = shard_reader(format, tmp_path / "train")
    first, whole = int(reader.shard_rows[0]), shard.read_bytes()
    table = np.fromfile(tmp_path / "train" / "blocks.u64", "<u8").reshape(-1, 5).tolist()

    def found(*places: int) -> str:
        content = bytearray(whole)
        for at in places:
            content[at] ^= 16
        shard.write_bytes(content)
        with pytest.raises(InputError, match=shard.name) as caught:
            shard_reader(format, tmp_path / "train").row(first)
        return caught.value.found

    tokens, ends = table[first + 2][0], next(row[2] for row in table[first + 3 :] if row[3])
    assert f"damaged are 1 of its {reader.shard_rows[1]} blocks: 2" in found(tokens)
    assert f"damaged are 2 of its {reader.shard_rows[1]} blocks: 2, " in found(tokens, ends)
    if format == "wds":
        assert "all of its blocks are whole" in found(0)  # in the name of a member


@pytest.mark.parametrize("format", ["wds", "flat"])
def test_damage_beside_the_shards_is_found(tmp_path, format):
    """A bit of the table belongs to one shard; an index that is not the one that was written is no corpus."""
    build(tmp_path, texts(60, 40), format=format, **BLOCKS)
    folder = tmp_path / "train"
    rng = np.random.default_rng(3)
    for name in ("blocks.u64", "index.json", "rows.npy"):
        whole = (folder / name).read_bytes()
        for trial in range(24):
            content = bytearray(whole)
            bit = int(rng.integers(8 * len(content)))
            content[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(content if trial % 3 else content[: bit // 8])
            if name == "blocks.u64" and trial % 3:
                corpus = TokenCorpus.open(tmp_path, "train")
                wrong = [k for k in range(len(corpus.shard_names)) if corpus.damage(k)]
                row = bit // 8 // 40
                firsts = np.cumsum(shard_reader(format, folder).shard_rows)
                assert wrong == [int(firsts.searchsorted(row, "right"))] and "blocks.u64" in corpus.damage(wrong[0])
            else:
                with pytest.raises(InputError):
                    TokenCorpus.open(tmp_path, "train")
        (folder / name).unlink()
        with pytest.raises(InputError, match=name):
            TokenCorpus.open(tmp_path, "train")
        (folder / name).write_bytes(whole)
    TokenCorpus.open(tmp_path, "train")


def test_a_folder_of_another_format_is_refused(folders):
    for format, other in (("mds", "wds"), ("flat", "mds")):
        with pytest.raises(InputError, match="index.json"):
            shard_reader(format, folders[other] / "train")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("format", ["wds", "flat"])
def test_training_goes_on_without_a_damaged_shard(tmp_path, format, workers):
    build(tmp_path, texts(60, 40), format=format, **BLOCKS)
    damage(tmp_path / "train" / f"shard.00003.{ENDINGS[format]}", "flipped")
    with pytest.raises(InputError, match="shard.00003"):
        global_batches(loaders(open_rows(tmp_path), 1, workers), 8)
    rows = open_rows(tmp_path, "skip", tmp_path / "ledger.jsonl")
    order, missing = ShuffledOrder(rows.rows_per_shard, SEED, WINDOW), left_out(rows, 3)
    kept = [row for row in (order[k] for k in range(len(order))) if row not in missing]
    num_steps = len(kept) // GLOBAL
    found = global_batches(loaders(rows, 2, workers), num_steps).reshape(-1, LENGTH)
    np.testing.assert_array_equal(found, rows.read(kept[: num_steps * GLOBAL]))


# --- the ledger of a run that is killed and continued ---


def run_and_be_killed(folder: Path, ledger: Path, size: int, workers: int, num_steps: int) -> None:
    """A process that trains with `size` ranks from where the ledger ends, and is killed after `num_steps` steps or
    somewhere in the next. A step is in the ledger, with the state after it, or it did not happen."""
    lines = ledger.read_text().splitlines()
    pid = os.fork()
    if pid == 0:
        try:
            with open(ledger, "a") as file:
                ranks = loaders(open_rows(folder), size, workers, json.loads(lines[-1])["state"] if lines else None)
                iterators = [iter(one) for one in ranks]
                for step in range(num_steps + 1):
                    samples = [batch for iterator in iterators for batch in next(iterator)]
                    if step == num_steps:
                        os.kill(os.getpid(), signal.SIGKILL)
                    (state,) = {json.dumps(one.state_dict()) for one in ranks}
                    tokens = torch.cat([batch.tokens for batch in samples]).tolist()
                    ordinals = torch.cat([batch.ordinals for batch in samples]).tolist()
                    print(json.dumps({"state": json.loads(state), "tokens": tokens, "ordinals": ordinals}), file=file)
                    file.flush()
        finally:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert len(ledger.read_text().splitlines()) == len(lines) + num_steps


@pytest.mark.parametrize("format", FORMATS)
def test_ledger_of_changing_layouts_and_kills(folders, tmp_path, format):
    """Data-parallel 1 -> 2 -> 4 -> 3 -> 8, each killed with samples read ahead: every sample once per epoch, in the
    order of one rank that is never interrupted."""
    ledger = tmp_path / "ledger.jsonl"
    ledger.touch()
    legs = ((1, 2, 5), (2, 0, 4), (4, 1, 5), (3, 2, 5), (8, 0, 5))  # ranks, workers of each, steps
    for size, workers, num_steps in legs:
        run_and_be_killed(folders[format], ledger, size, workers, num_steps)
    steps = [json.loads(line) for line in ledger.read_text().splitlines()]
    rows = open_rows(folders["mds"])
    num_rows = len(rows)
    assert len(steps) * GLOBAL > 2 * num_rows, "it should go over the edge of an epoch twice"
    np.testing.assert_array_equal([step["tokens"] for step in steps], global_batches(loaders(rows), len(steps)))
    assert [i for step in steps for i in step["ordinals"]] == list(range(len(steps) * GLOBAL))
    samples = [tuple(sample) for step in steps for sample in step["tokens"]]
    for epoch in range(2):
        assert sorted(samples[epoch * num_rows :][:num_rows]) == sorted(map(tuple, rows.read(range(num_rows)).tolist()))
