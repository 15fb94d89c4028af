"""Which documents are left out: by length, as repetitions, by a function of the user's.

A document is judged whole, and so is a (source, target) pair: it stays or goes with both of its documents. To that end
it is held in memory as a whole (a longer one than the longest allowed is not), which without filters it never is. What
was decided is kept in a file beside the corpus until that is finished: a preparation that goes on after it was stopped
decides nothing anew, and what repeats a document from before is still found.

Finding repetitions takes some 100 bytes of memory for every document that stays.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from braid.data_pipeline.readers import Piece, TextFiles
from braid.data_pipeline.workers import Workers
from braid.kernels.errors import InputError

FILTERS_FILE = "prepare.filters"
REASONS = ("kept", "too_short", "too_long", "duplicate", "filter")
KEPT, TOO_SHORT, TOO_LONG, DUPLICATE, REFUSED = range(len(REASONS))
END_OF_FILE = 255
NO_HASH = bytes(16)
RECORD = np.dtype([("reason", "u1"), ("hash", "V16")])
"""One for each document (or pair), in order. The hash is zero where there was no need of it."""
BATCH_BYTES, BATCH_DOCUMENTS = 2 << 20, 4096
"""What one process is asked about at a time."""


@dataclass(frozen=True)
class Filters:
    """What makes a document stay. Without any, all do."""

    min_bytes: int | None = None
    """Shortest length in bytes of UTF-8; of a pair, that of both texts together. So for the longest."""
    max_bytes: int | None = None
    deduplicate: bool = False
    """Of documents whose texts have the same 128-bit hash (xxh3), the first in the order of the input stays."""
    filter: str | None = None
    """`module:function`, called in the tokenising processes with the text of a document (with source and target of a
    pair); it returns True for what stays, and must depend on its arguments alone."""

    def settings(self) -> dict:
        """Those that are set."""
        return {name: value for name, value in asdict(self).items() if value not in (None, False)}

    def check(self) -> None:
        """Raise InputError for what cannot be meant, and for a function that cannot be had."""
        for name in ("min_bytes", "max_bytes"):
            if (value := getattr(self, name)) is not None and value < 1:
                change = "give a number of bytes, 1 or more"
                raise InputError(f"impossible --{name.replace('_', '-')}", found=str(value), change=change)
        if self.min_bytes and self.max_bytes and self.min_bytes > self.max_bytes:
            found = f"--min-bytes {self.min_bytes}, --max-bytes {self.max_bytes}"
            raise InputError("no document is as short and as long as that", found=found, change="exchange the two")
        if self.filter:
            _function(self.filter)


class _Document(NamedTuple):
    """A document or pair that has been read whole, and what is known of it before the user's function is asked."""

    file: int
    pieces: list[Piece]  # empty where it is left out
    reason: int
    hash: bytes

    @property
    def texts(self) -> list[str]:
        """The text, or source and target."""
        parts = groupby(self.pieces, key=lambda piece: piece.document)
        return ["".join(piece.text for piece in pieces) for _, pieces in parts]


class FilteredSource:
    """The documents of `source` that `filters` let through; otherwise like it.

    `folder`: where verdicts are kept, or None to keep them nowhere. `goes_on`: there may be some already; else they are
    deleted. Memory: see the head of this file.
    """

    def __init__(
        self, source: TextFiles, filters: Filters, workers: Workers, folder: Path | None, *, goes_on: bool = False
    ) -> None:
        self._source, self._filters, self._workers = source, filters, workers
        self.total_bytes, self.num_ignored, self.has_pairs = source.total_bytes, source.num_ignored, source.has_pairs
        self.first_validation = source.first_validation
        self._path = folder / FILTERS_FILE if folder else None
        content = self._path.read_bytes() if goes_on and self._path.exists() else b""
        records = np.frombuffer(content[: len(content) // RECORD.itemsize * RECORD.itemsize], RECORD)
        ends = np.flatnonzero(records["reason"] == END_OF_FILE)
        records = records[: ends[-1] + 1 if len(ends) else 0]  # a file judged in part is judged again
        self._files = [records[start:end] for start, end in zip([0, *(ends[:-1] + 1)], ends, strict=False)]
        if self._path:
            self._stored = open(self._path, "ab")
            self._stored.truncate(records.nbytes)

    @property
    def position(self) -> int:
        """Of the input bytes, how many have been read."""
        return self._source.position

    def describe(self) -> list[dict]:
        """See `TextFiles`."""
        return self._source.describe()

    def pieces(self, first_file: int = 0) -> Iterator[Piece]:
        """Pieces of the documents that stay, from file number `first_file` on; all files before it have been judged."""
        documents = groupby(self._source.pieces(first_file), key=lambda piece: (piece.file, piece.group))
        known = chain.from_iterable(file["reason"].tolist() for file in self._files[first_file:])
        for reason, (_, pieces) in zip(known, documents, strict=False):
            if reason == KEPT:
                yield from pieces
        yield from self._judged((file, pieces) for (file, _), pieces in documents)

    def _judged(self, documents: Iterator[tuple[int, Iterator[Piece]]]) -> Iterator[Piece]:
        """Judge the (file, pieces) of documents, from the first file on that has not been, and note it file by file."""
        stayed = (file["hash"][np.isin(file["reason"], (KEPT, REFUSED))] for file in self._files)
        seen = {digest for hashes in stayed for digest in hashes.tolist()}
        records: list[tuple[int, bytes]] = []
        for document in self._asked(self._read(file, pieces, seen) for file, pieces in documents):
            if document.file > len(self._files):
                self._record(records)
                records = []
            records.append((document.reason, document.hash))
            yield from document.pieces
        if records:
            self._record(records)

    def _read(self, file: int, pieces: Iterator[Piece], seen: set[bytes]) -> _Document:
        """Read a document and judge what can be judged without the user's function."""
        held: list[Piece] = []
        num_bytes, digest = 0, xxhash.xxh3_128()
        shortest, longest = self._filters.min_bytes, self._filters.max_bytes
        for piece in pieces:
            num_bytes += piece.num_bytes
            if longest and num_bytes > longest:
                held.clear()
                continue
            held.append(piece)
            if self._filters.deduplicate:
                digest.update(piece.text.encode("utf-8"))
                if piece.last:
                    digest.update(b"\xff")  # in no UTF-8: it tells where the source of a pair ends
        if (shortest and num_bytes < shortest) or (longest and num_bytes > longest):
            return _Document(file, [], TOO_SHORT if shortest and num_bytes < shortest else TOO_LONG, NO_HASH)
        if not self._filters.deduplicate:
            return _Document(file, held, KEPT, NO_HASH)
        if digest.digest() in seen:
            return _Document(file, [], DUPLICATE, NO_HASH)
        seen.add(digest.digest())
        return _Document(file, held, KEPT, digest.digest())

    def _asked(self, documents: Iterator[_Document]) -> Iterator[_Document]:
        """What the user's function says about those that are still to stay."""
        if not self._filters.filter:
            yield from documents
            return
        ask = partial(_ask, self._filters.filter)
        for batch, answers in self._workers.map(ask, _batches(documents), _questions):
            verdicts = iter(answers)
            for document in batch:
                stays = document.reason != KEPT or next(verdicts)
                yield document if stays else document._replace(pieces=[], reason=REFUSED)

    def _record(self, records: list[tuple[int, bytes]]) -> None:
        """Note the verdicts about all documents of the next file."""
        self._files.append(np.array(records, RECORD))
        if self._path:
            self._stored.write(self._files[-1].tobytes() + np.array([(END_OF_FILE, NO_HASH)], RECORD).tobytes())
            self._stored.flush()

    def left_out(self) -> dict[str, int]:
        """How many documents (or pairs) were left out for each reason."""
        counts = sum((np.bincount(file["reason"], minlength=len(REASONS)) for file in self._files), np.zeros(1, int))
        return dict(zip(REASONS[1:], counts[1:].tolist(), strict=True))

    def sync(self) -> None:
        """When this returns, all verdicts about the files that have been read to their end are on disk."""
        self._stored.flush()
        os.fsync(self._stored.fileno())

    def remove(self) -> None:
        """Close and delete the file of verdicts."""
        self._stored.close()
        self._path.unlink()


def _batches(documents: Iterator[_Document]) -> Iterator[list[_Document]]:
    batch: list[_Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += sum(piece.num_bytes for piece in document.pieces)
        if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _questions(batch: list[_Document]) -> list[tuple[str, list[str]]]:
    """(name, texts) of the documents the user's function is asked about."""
    return [(document.pieces[0].group, document.texts) for document in batch if document.reason == KEPT]


def _ask(name: str, documents: list[tuple[str, list[str]]]) -> list[bool]:
    function = _function(name)
    answers = []
    for document, texts in documents:
        try:
            answer = function(*texts)
        except Exception as error:  # it is the user's, and may raise anything
            found = f"{type(error).__name__}: {error}"
            change = "repair the function; the same command then goes on where it stopped"
            raise InputError(f"--filter {name} failed on {document}", found=found, change=change) from error
        if not isinstance(answer, bool | np.bool_):
            found, change = (
                f"{type(answer).__name__}: {answer!r:.60}",
                "return True for a document that stays, or False",
            )
            raise InputError(f"--filter {name} gave no bool for {document}", found=found, change=change)
        answers.append(bool(answer))
    return answers


@cache
def _function(name: str) -> Callable[..., bool]:
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        change = "write module:function, of a module that is installed or lies in a folder named in PYTHONPATH"
        raise InputError(f"there is no --filter {name}", found=str(error), change=change) from error
    if not callable(found):
        raise InputError(f"--filter {name} is no function", found=type(found).__name__, change="name a function")
    return found
