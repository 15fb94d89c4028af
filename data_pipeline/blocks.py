"""Writing a split: token rows into shards, and the journal that lets an interrupted preparation go on.

A shard that is complete on disk is followed by one synced line in the journal, which says where in the input the next
shard begins. Whoever starts again after a crash reads the last line of each split and goes on from there; the result
is the same, byte for byte, as if nothing had happened.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from braid.data_pipeline.corpus import write_rows_file
from braid.data_pipeline.formats import shard_writer, write_index
from braid.data_pipeline.readers import Piece
from braid.kernels.errors import InputError

JOURNAL_FILE = "prepare.journal"
AFTER_ALL = (1 << 62, 0, 0)
"""Where a finished split goes on: after every piece."""


class Mark(NamedTuple):
    """Where a row begins: `skip` tokens into the piece (file, index, part), and what was counted before that piece."""

    piece: tuple[int, int, int] = (0, 0, 0)
    skip: int = 0
    documents: int = 0
    num_bytes: int = 0


class BlockWriter:
    """Packs the token ids of one split's pieces into rows of `row_tokens` and the rows into shards.

    `format`: one of `formats.FORMATS`. `records`: the journal's lines about this split; writing goes on after them.
    `on_shard` gets one new line per finished shard. `keep_empty`: a document of no tokens is one too (half of a pair).
    `documents`, `num_bytes` and `num_tokens` count what has been added.
    """

    def __init__(
        self,
        folder: Path,
        dtype: np.dtype,
        *,
        format: str,
        row_tokens: int,
        shard_bytes: int,
        records: list[dict],
        on_shard: Callable[[dict], None],
        keep_empty: bool = False,
    ) -> None:
        self._folder, self._format, self.dtype = folder, format, dtype
        self._on_shard, self._keep_empty = on_shard, keep_empty
        self._shards = [record["shard"] for record in records]
        self._rows = [tuple(row) for record in records for row in record["rows"]]
        self._num_recorded_rows = len(self._rows)
        known = {shard["raw_data"]["basename"] for shard in self._shards}
        for path in folder.glob("shard.*"):  # finished or begun after the journal's last line
            if path.name not in known:
                path.unlink()
        self._writer = shard_writer(format, folder, dtype, shard_bytes=shard_bytes, first_shard=len(self._shards))
        self._block = np.empty(row_tokens, dtype)
        self._filled = 0
        self._ends: list[int] = []
        self.resume_at = self._row_mark = _mark(records[-1]["next"]) if records else Mark()
        self._skip = self.resume_at.skip
        self._in_document = False  # has the document that goes on had any token yet?
        self.documents, self.num_bytes = self.resume_at.documents, self.resume_at.num_bytes
        self.num_tokens = sum(tokens for tokens, _ in self._rows)

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    def add(self, piece: Piece, ids: np.ndarray) -> None:
        """Append a piece and its token ids; pieces before `resume_at` must be left out, in it tokens are skipped."""
        before = Mark(piece[:3], 0, self.documents, self.num_bytes)
        start, self._skip = self._skip, 0
        while start < len(ids):
            if self._filled == len(self._block):  # only now: an end may still fall on the last offset of the row
                self._write_row()
                self._row_mark = before._replace(skip=start)
            taken = ids[start : start + len(self._block) - self._filled]
            self._block[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            self.num_tokens += len(taken)
            start += len(taken)
        self.num_bytes += piece.num_bytes
        self._in_document |= len(ids) > 0  # at `resume_at` as well: a mark stands before a token of its piece
        if piece.last and (self._in_document or self._keep_empty):  # else a document of no tokens leaves no trace
            self.documents += 1
            self._ends.append(self._filled)
            self._in_document = False

    def finish(self) -> None:
        """Write what is left, then the index and the table of rows."""
        if self._filled:
            self._write_row()
        self._row_mark = Mark(AFTER_ALL, 0, self.documents, self.num_bytes)
        self._record_shard(self._writer.finish, following_rows=0)
        write_index(self._format, self._folder, self.dtype, self._shards)
        write_rows_file(self._folder, np.array(self._rows, np.int64).reshape(-1, 2))

    def _write_row(self) -> None:
        sample = {"tokens": self._block[: self._filled], "ends": np.array(self._ends, np.int32)}
        self._rows.append((self._filled, len(self._ends)))
        self._record_shard(lambda: self._writer.write(sample), following_rows=1)
        self._filled, self._ends = 0, []

    def _record_shard(self, write: Callable[[], None], *, following_rows: int) -> None:
        """Call `write`; if it completed a shard, record it. The last `following_rows` rows belong to the next one."""
        before = len(self._writer.finished_shards)
        write()
        for shard in self._writer.finished_shards[before:]:
            stop = len(self._rows) - following_rows
            rows = self._rows[self._num_recorded_rows : stop]
            self._num_recorded_rows = stop
            self._shards.append(shard)
            self._on_shard({"shard": shard, "rows": rows, "next": self._row_mark})


def _mark(values: list) -> Mark:
    piece, *counts = values
    return Mark(tuple(piece), *counts)


class Journal:
    """The file that makes a folder resumable: a line with what is being prepared, a line with what was decided at the
    start (`plan`), a line per finished shard. It is locked while a preparation runs, and removed at the end."""

    def __init__(self, folder: Path, header: dict) -> None:
        """Open or create the journal of `folder`. Raises InputError when the folder holds something else, or a
        preparation of something else, or another process is at work in it."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / JOURNAL_FILE
        if not self.path.exists() and any(folder.iterdir()):
            found = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
            change = "give another --output, or empty this folder first"
            raise InputError(f"the output folder {folder} is not empty", found=found, change=change)
        self._file = open(self.path, "a+b")
        try:
            self._lock()
            records = self._read()
            if not any("shard" in record for record in records) and records[:1] != [{"header": header}]:
                # Nothing is finished, so nothing is lost by starting anew with other settings.
                self._file.truncate(0)
                records = []
            if not records:
                self.append({"header": header})
            elif differing := differences(records[0]["header"], header):
                raise InputError(
                    f"the output folder {folder} holds an unfinished preparation of something else",
                    found=differing,
                    change=f"continue with the same settings and inputs, or delete {folder} and start again, "
                    "or give another --output",
                )
        except BaseException:
            self._file.close()
            raise
        self.plan: dict | None = next((record["plan"] for record in records if "plan" in record), None)
        self._shards = [record for record in records if "shard" in record]

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    def records(self, split: str) -> list[dict]:
        """Lines about the finished shards of a split. Raises InputError when one of these is not there any more."""
        records = [record for record in self._shards if record["split"] == split]
        for record in records:
            expected = record["shard"]["raw_data"]
            path = self.path.parent / split / expected["basename"]
            size = path.stat().st_size if path.is_file() else None
            if size != expected["bytes"]:
                raise InputError(
                    f"the finished shard {path} was changed since",
                    found="missing" if size is None else f"{size} bytes instead of {expected['bytes']}",
                    change=f"delete {self.path.parent} and start again",
                )
        return records

    def append(self, record: dict) -> None:
        """Add a line; when this returns it is on disk."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def remove(self) -> None:
        self.path.unlink()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            change = "wait for it or stop it, or give another --output"
            raise InputError(f"another `braid prepare` is writing to {self.path.parent}", change=change) from error

    def _read(self) -> list[dict]:
        """The lines that were written completely; the rest of a line that a crash cut off is removed."""
        self._file.seek(0)
        content = self._file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._file.truncate(len(whole))
        return [json.loads(line) for line in whole.splitlines()]


def differences(stored: dict, wanted: dict) -> str:
    """Which settings, inputs or versions differ, one after the other; empty when none do."""
    found = []
    for part in ("settings", "versions"):
        for key in sorted({*stored[part], *wanted[part]}):
            old, new = stored[part].get(key), wanted[part].get(key)
            if old != new:
                found.append(f"{key} was {old!r}, now {new!r}")
    old_files, new_files = ({file["name"]: file for file in side["sources"]} for side in (stored, wanted))
    for name in sorted({*old_files, *new_files}):
        if old_files.get(name) != new_files.get(name):
            kind = "new" if name not in old_files else "gone" if name not in new_files else "changed"
            found.append(f"input {name} is {kind}")
    if not found and [*old_files] != [*new_files]:
        found.append("the inputs are in another order")
    return "; ".join(found[:8]) + (f"; and {len(found) - 8} more" if len(found) > 8 else "")
