"""Rows, shards and the journal: every point at which a preparation can be taken up again gives the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from braid.data_pipeline.blocks import JOURNAL_FILE, BlockWriter, Journal, differences
from braid.data_pipeline.mds import MDSReader
from braid.data_pipeline.readers import Piece
from braid.kernels.errors import InputError

ROW, SHARD = 16, 700
HEADER = {"settings": {"a": 1, "b": "x"}, "versions": {"v": "1"}, "sources": [{"name": "f", "bytes": 1, "xxh3": "0"}]}


def random_pieces(seed: int, num_documents: int = 80) -> list[tuple[Piece, np.ndarray]]:
    """Documents of one to three pieces and 0 to 40 tokens each; lengths that hit the ends of rows are common."""
    rng = np.random.default_rng(seed)
    found = []
    for document in range(num_documents):
        num_parts = rng.integers(1, 4)
        for part in range(num_parts):
            num = rng.choice([0, 1, ROW, ROW - 1, 2 * ROW, *rng.integers(0, 40, 5)])
            ids = rng.integers(0, 1000, num).astype(np.uint16)
            piece = Piece(document // 10, document % 10, part, "", "", "", int(num) * 3, part == num_parts - 1)
            found.append((piece, ids))
    return found


def write(folder: Path, pieces, records=(), format: str = "mds") -> list[dict]:
    """All records of the journal after writing what `records` leave to be written."""
    records = json.loads(json.dumps(list(records)))
    new: list[dict] = []
    writer = BlockWriter(
        folder,
        np.dtype(np.uint16),
        format=format,
        row_tokens=ROW,
        shard_bytes=SHARD,
        records=records,
        on_shard=new.append,
    )
    for piece, ids in pieces:
        if piece[:3] >= writer.resume_at.piece:
            writer.add(piece, ids)
    writer.finish()
    assert writer.num_bytes == sum(piece.num_bytes for piece, _ in pieces)
    assert writer.num_tokens == sum(len(ids) for _, ids in pieces)
    return records + json.loads(json.dumps(new))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("seed", range(3))
def test_rows_hold_the_tokens_and_the_ends_of_documents(tmp_path, seed):
    pieces = random_pieces(seed)
    write(tmp_path, pieces)
    reader = MDSReader(tmp_path)
    rows = [reader.row(i) for i in range(reader.num_rows)]
    tokens = np.concatenate([row["tokens"] for row in rows])
    assert (tokens == np.concatenate([ids for _, ids in pieces])).all()
    assert {len(row["tokens"]) for row in rows[:-1]} == {ROW} and 0 < len(rows[-1]["tokens"]) <= ROW

    ends, total, in_document = [], 0, 0  # documents without a token leave no trace
    for piece, ids in pieces:
        total, in_document = total + len(ids), in_document + len(ids)
        if piece.last:
            ends += [total] * bool(in_document)
            in_document = 0
    stored = np.concatenate([row["ends"] + ROW * i for i, row in enumerate(rows)])
    assert stored.tolist() == ends
    assert all((row["ends"] >= 1).all() and (np.diff(row["ends"]) > 0).all() for row in rows)
    assert np.load(tmp_path / "rows.npy").tolist() == [[len(row["tokens"]), len(row["ends"])] for row in rows]


@pytest.mark.parametrize(("seed", "format"), [(0, "mds"), (1, "mds"), (2, "mds"), (0, "wds"), (1, "flat")])
def test_going_on_after_any_shard_gives_the_same_files(tmp_path, seed, format):
    pieces = random_pieces(seed)
    records = write(tmp_path / "once", pieces, format=format)
    expected = contents(tmp_path / "once")
    assert len(records) > 10 and len(expected) == len(records) + (2 if format == "mds" else 3)
    for number in range(len(records) + 1):
        # What a crash leaves: the finished shards, a later one that the journal does not know, and half of another.
        folder = tmp_path / f"after {number}"
        folder.mkdir()
        for record in records[:number]:
            name = record["shard"]["raw_data"]["basename"]
            (folder / name).write_bytes(expected[name])
        ending = {"mds": "mds", "wds": "tar", "flat": "bin"}[format]
        (folder / f"shard.{number:05}.{ending}").write_bytes(b"unknown")
        (folder / f"shard.{number + 1:05}.{ending}.tmp").write_bytes(b"half")
        assert write(folder, pieces, records[:number], format) == records
        assert contents(folder) == expected


def test_journal_survives_a_line_that_was_cut_off(tmp_path):
    with Journal(tmp_path, HEADER) as journal:
        journal.append({"plan": {"n": 1}})
        for number in range(2):
            (tmp_path / "train").mkdir(exist_ok=True)
            (tmp_path / "train" / f"shard.{number}").write_bytes(b"1234")
            shard = {"raw_data": {"basename": f"shard.{number}", "bytes": 4}}
            journal.append({"split": "train", "shard": shard, "rows": [], "next": [[0, 0, 0], 0, 0, 0]})
    whole = (tmp_path / JOURNAL_FILE).read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for length in range(last, len(whole) + 1):
        (tmp_path / JOURNAL_FILE).write_bytes(whole[:length])
        with Journal(tmp_path, HEADER) as journal:
            assert journal.plan == {"n": 1}
            assert len(journal.records("train")) == journal.num_shards == (2 if length == len(whole) else 1)
            journal.append({"again": 1})
        assert json.loads((tmp_path / JOURNAL_FILE).read_bytes().splitlines()[-1]) == {"again": 1}

    (tmp_path / JOURNAL_FILE).write_bytes(whole)
    (tmp_path / "train" / "shard.1").write_bytes(b"123")
    with Journal(tmp_path, HEADER) as journal, pytest.raises(InputError, match="shard.1 was changed") as caught:
        journal.records("train")
    assert "3 bytes instead of 4" in caught.value.found
    (tmp_path / "train" / "shard.0").unlink()
    with Journal(tmp_path, HEADER) as journal, pytest.raises(InputError, match="shard.0 was changed"):
        journal.records("train")


def test_two_at_once_are_refused(tmp_path):
    with Journal(tmp_path, HEADER), pytest.raises(InputError, match="another `braid prepare`"):
        Journal(tmp_path, HEADER)
    Journal(tmp_path, HEADER).__exit__()


def test_settings_may_change_until_something_is_finished(tmp_path):
    changed = HEADER | {"settings": {"a": 2, "b": "x"}}
    with Journal(tmp_path, HEADER) as journal:
        journal.append({"plan": {"n": 1}})
    with Journal(tmp_path, changed) as journal:
        assert journal.plan is None
        journal.append({"split": "train", "shard": {}, "rows": [], "next": []})
    with pytest.raises(InputError, match="unfinished preparation of something else") as caught:
        Journal(tmp_path, HEADER)
    assert caught.value.found == "a was 2, now 1" and f"delete {tmp_path}" in caught.value.change


def test_differences_are_named():
    def found(**changes) -> str:
        return differences(HEADER, HEADER | changes)

    one, two = {"name": "f", "bytes": 1, "xxh3": "0"}, {"name": "g", "bytes": 1, "xxh3": "1"}
    assert found() == ""
    assert found(settings={"a": 1, "b": "y"}) == "b was 'x', now 'y'"
    assert found(versions={"v": "2"}) == "v was '1', now '2'"
    assert found(sources=[one, two]) == "input g is new"
    assert found(sources=[one | {"xxh3": "2"}]) == "input f is changed"
    assert found(sources=[two]) == "input f is gone; input g is new"
    both = HEADER | {"sources": [one, two]}
    assert differences(both, HEADER | {"sources": [two, one]}) == "the inputs are in another order"
