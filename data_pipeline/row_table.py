"""Rows that lengths of documents decide: which pieces of the stream each row holds, worked out once and kept in a file.

Where rows are pieces of equal length, arithmetic tells where each begins. Rows made of documents (`document`,
`best_fit`, `paragraph`, see packing.py) have to be worked out from the ends of all documents, which are in the shards.
That takes one pass over the corpus, shard by shard; the result is a table that later starts map into memory:

    rows-<hash of the settings>.bin     the pieces, 16 bytes each, row by row and shard by shard
    rows-<hash of the settings>.json    what it is about, and rows, pieces and xxh3_64 hash of each shard's part

beside the shards, or where those cannot be written in ~/.cache/braid. A part is checked when it is first used. While
one process works it out, the others that need it wait: a file lock, which a killed process does not leave behind.

Memory: three numbers per shard, and while the table is made the documents of one shard, some 300 MB for 400,000 of
them. One core packs 0.7 million documents a second by best fit, fills rows with as many paragraphs, and lays 1.8
million documents one by one, beside what it takes to read and check the shards. So 10^9 documents are 24 minutes, 16
GB of table, and the reading of the corpus, once; a start that finds the table takes milliseconds whatever its size.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np
import xxhash

from braid.data_pipeline.corpus import TokenCorpus
from braid.data_pipeline.documents import Pieces, cut, documents, fill, paragraphs
from braid.data_pipeline.shards import atomic_file
from braid.kernels.errors import InputError

TABLE_VERSION = 1
PIECE = np.dtype([("start", "<i8"), ("length", "<i4"), ("row", "<i4")])
"""Where in the stream a piece begins, how many positions it has, and which row of its shard it is in."""
SAY_EVERY = 20.0  # seconds


class RowTable:
    """The rows of a corpus in one of the styles that need a table, see the module.

    rows_per_shard: int64 [shards]. num_units, num_long: documents (paragraphs), and how many of them do not fit a row.
    longest: tokens of the longest. hash: 16 hex digits that name the rows. left_out: shard -> reason, of those that
    could not be read when the table was made, where the corpus skips damaged shards.
    Safe to use from several threads and after a fork; can be pickled.
    """

    @classmethod
    def open(cls, corpus: TokenCorpus, sequence_length: int, packing: str, oversized: str) -> RowTable:
        """From its file, which is made first where there is none. Raises InputError for a shard that cannot be read,
        unless the corpus skips those, and when the table can be written nowhere."""
        settings = {
            "version": TABLE_VERSION,
            "corpus": corpus.fingerprint,
            "sequence_length": sequence_length,
            "packing": packing,
            "oversized": oversized,
            "damaged": corpus.damaged,
        }
        name = f"rows-{xxhash.xxh3_64_hexdigest(json.dumps(settings, sort_keys=True).encode())}"
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "braid"
        problems = []
        for folder in (corpus.folder / corpus.split, cache):
            path = folder / f"{name}.json"
            try:
                if not path.is_file():
                    folder.mkdir(parents=True, exist_ok=True)
                    with open(folder / f"{name}.lock", "a") as lock:
                        fcntl.flock(lock, fcntl.LOCK_EX)
                        if not path.is_file():  # nobody made it while we waited
                            _make(path, corpus, settings)
                content = path.read_bytes()
            except OSError as error:
                problems.append(f"{path}: {error.strerror}")
                continue
            return cls(path, content)
        raise InputError(
            f"the rows of data.packing={packing} can be kept nowhere",
            found="; ".join(problems),
            change="make one of these folders writable, or free space there",
        )

    def __init__(self, path: Path, content: bytes) -> None:
        self._path = path.with_suffix(".bin")
        try:
            about = json.loads(content)
            self._parts = about["shards"]
            self.rows_per_shard = np.array([part["rows"] for part in self._parts], np.int64)
            self.num_units, self.num_long, self.longest = about["units"], about["long"], about["longest"]
            self.left_out = {int(shard): reason for shard, reason in about["left_out"].items()}
            self.hash = xxhash.xxh3_64_hexdigest("".join(part["hash"] for part in self._parts).encode())
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(f"{path.name}: {type(error).__name__}: {error}") from error
        self._first_rows = [0, *accumulate(part["rows"] for part in self._parts)]
        self._first_pieces = [0, *accumulate(part["pieces"] for part in self._parts)]
        self._checked: set[int] = set()
        self._map()

    @property
    def num_rows(self) -> int:
        return self._first_rows[-1]

    def spans(self, i: int) -> list[tuple[int, int]]:
        """Where in the stream each piece of row `i` begins and ends."""
        shard = bisect_right(self._first_rows, i) - 1
        part, k = self._part(shard), i - self._first_rows[shard]
        rows = part["row"]
        pieces = part[bisect_left(rows, k) : bisect_right(rows, k)]
        return [(start, start + length) for start, length, _ in pieces.tolist()]

    def rows_of(self, shard: int) -> tuple[int, int]:
        """The rows that begin in a shard: the first, and the first after them."""
        return self._first_rows[shard], self._first_rows[shard + 1]

    def reaching(self, shard: int, position: int) -> list[int]:
        """Rows of earlier shards that hold something from `position`, where the shard begins, on."""
        found: list[int] = []
        for earlier in reversed(range(shard)):
            part = self._part(earlier)
            across = part["start"] + part["length"] > position
            found = (self._first_rows[earlier] + np.unique(part["row"][across])).tolist() + found
            if len(part) and not across.any():
                break  # what comes before ends before
        return found

    def _part(self, shard: int) -> np.ndarray:
        """The pieces of a shard's rows, checked once."""
        part = self._pieces[self._first_pieces[shard] : self._first_pieces[shard + 1]]
        if shard not in self._checked:
            expected = self._parts[shard]
            if (xxhash.xxh3_64_hexdigest(part.tobytes()), _num_rows(part)) != (expected["hash"], expected["rows"]):
                raise self._damaged(f"the part of shard {shard} is not what {self._path.stem}.json says")
            self._checked.add(shard)
        return part

    def _map(self) -> None:
        num = self._first_pieces[-1]
        try:
            size = self._path.stat().st_size
            if size != num * PIECE.itemsize:
                raise self._damaged(f"{size} bytes instead of {num * PIECE.itemsize}")
            self._pieces = np.memmap(self._path, PIECE, "r") if num else np.empty(0, PIECE)
        except FileNotFoundError as error:
            raise self._damaged("it is missing") from error

    def _damaged(self, found: str) -> InputError:
        return InputError(
            f"the table of rows {self._path} is damaged",
            found=found,
            change=f"delete it and {self._path.stem}.json: the next start makes both anew",
        )

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_pieces"}  # which would be copied

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._map()


def best_fit(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Which bin each item goes to, int64 [n]: from the largest item to the smallest, each into the bin with the least
    room left that is enough for it (best-fit decreasing, as arXiv 2404.10830 packs documents). Bins are numbered by
    their first item. 0 < sizes <= capacity."""
    order = np.argsort(-sizes, kind="stable")
    bins = np.empty(len(sizes), np.int64)
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set where there is a bin with room for r
    num_bins = 0
    for item, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        enough = rooms >> size
        if enough:
            room = size + (enough & -enough).bit_length() - 1
            into = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, into, num_bins = capacity, num_bins, num_bins + 1
        bins[item] = into
        if room > size:
            by_room[room - size].append(into)
            rooms |= 1 << (room - size)
    _, first, inverse = np.unique(bins, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def _make(path: Path, corpus: TokenCorpus, settings: dict) -> None:
    """Work the table out and write it, the description last: who finds that finds all."""
    about = {"settings": settings, "units": 0, "long": 0, "longest": 0, "left_out": {}, "shards": []}
    num_shards, begun = len(corpus.shard_names), time.monotonic()
    said = begun
    with atomic_file(path.with_suffix(".bin")) as file:
        for part in _rows(corpus, settings, about):
            file.write(part.tobytes())
            about["shards"].append(
                {
                    "rows": _num_rows(part),
                    "pieces": len(part),
                    "hash": xxhash.xxh3_64_hexdigest(part.tobytes()),
                }
            )
            if time.monotonic() - said > SAY_EVERY:
                said, done = time.monotonic(), len(about["shards"])
                left = (said - begun) * (num_shards - done) / done
                print(
                    f"rows of data.packing={settings['packing']}: shard {done:,} of {num_shards:,} of "
                    f"{corpus.folder / corpus.split}, {left / 60:.0f} min left; only the first start needs this",
                    file=sys.stderr,
                    flush=True,
                )
    with atomic_file(path) as file:
        file.write(json.dumps(about).encode())


def _num_rows(part: np.ndarray) -> int:
    return int(part["row"][-1]) + 1 if len(part) else 0


def _rows(corpus: TokenCorpus, settings: dict, about: dict) -> Iterator[np.ndarray]:
    """The pieces of each shard's rows, in order, as they are stored. Counts into `about`."""
    packing, room = settings["packing"], settings["sequence_length"] - 1
    units = paragraphs if packing == "paragraph" else documents
    pieces = cut(units(corpus, about["left_out"]), room, settings["oversized"], about, ended=packing != "paragraph")
    rows = fill(pieces, room) if packing == "paragraph" else pieces
    for part in _by_shard(rows, corpus.shard_starts):
        if packing == "best_fit":
            number = best_fit(part.lengths + 1, room + 1)  # each piece has a BOS before it
            order = np.argsort(number, kind="stable")
            part, number = Pieces(part.starts[order], part.lengths[order], part.firsts[order]), number[order]
        else:
            number = np.cumsum(part.starts == part.firsts) - 1
        stored = np.empty(len(number), PIECE)
        stored["start"], stored["length"], stored["row"] = part.starts, part.lengths, number
        yield stored


def _by_shard(rows: Iterator[Pieces], shard_starts: list[int]) -> Iterator[Pieces]:
    """The pieces of the rows that begin in each shard, one after the other."""
    held = Pieces.none()
    for end in shard_starts[1:-1]:
        while not len(held.firsts) or held.firsts[-1] < end:
            following = next(rows, None)
            if following is None:
                break
            held = held.then(following)
        num = int(np.searchsorted(held.firsts, end))
        yield held.part(0, num)
        held = held.part(num, None)
    for following in rows:
        held = held.then(following)
    yield held
