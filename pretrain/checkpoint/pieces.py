"""Whole tensors in pieces: which part of one lies in which file, and how a part that somebody wants is put together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from braid.parallel.layers import Shard

from .tensor_files import DTYPES, NAMES, TensorFile

Ranges = tuple[tuple[int, int], ...]
"""(start, stop) along one dimension, one after the other."""


@dataclass(frozen=True)
class Part:
    """Of a whole tensor, what lies in `ranges` along `dim`, laid end to end."""

    dim: int
    ranges: Ranges

    @staticmethod
    def of(shard: Shard) -> Part:
        """What a process holds, without the zeros at its end."""
        (start, stop), length = shard.span, shard.length // shard.parts
        return Part(shard.dim, tuple((n * length + start, n * length + stop) for n in range(shard.parts)))

    @property
    def length(self) -> int:
        return sum(stop - start for start, stop in self.ranges)


@dataclass(frozen=True)
class Piece:
    """What one file has of a tensor, under the tensor's name: a part of it, or (None) all of it."""

    file: str
    part: Part | None = None


@dataclass(frozen=True)
class Entry:
    """A whole tensor, and the pieces that together are it."""

    dtype: str
    """As safetensors says it."""
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def to_json(self) -> dict[str, Any]:
        pieces = [
            {"file": piece.file} | ({} if piece.part is None else {"dim": piece.part.dim, "ranges": piece.part.ranges})
            for piece in self.pieces
        ]
        return {"dtype": self.dtype, "shape": self.shape, "pieces": pieces}

    @staticmethod
    def from_json(entry: Mapping[str, Any]) -> Entry:
        pieces = (
            Piece(each["file"], Part(each["dim"], tuple(map(tuple, each["ranges"]))) if "dim" in each else None)
            for each in entry["pieces"]
        )
        return Entry(entry["dtype"], tuple(entry["shape"]), tuple(pieces))


Index = dict[str, dict[str, Entry]]
"""Group -> name -> entry."""


@dataclass(frozen=True)
class LocalTensor:
    """A tensor, or a part of one, that a process writes."""

    values: Tensor
    """Without padding."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    part: Part | None = None

    def entry(self, file: str) -> Entry:
        """As it is when it lies in `file`."""
        return Entry(NAMES[self.values.dtype], self.shape, (Piece(file, self.part),))


def local_tensor(held: Tensor, shard: Shard | None) -> LocalTensor:
    """What a process holds of a tensor, as it is written."""
    if shard is None:
        return LocalTensor(held, tuple(held.shape))
    shape = list(held.shape)
    shape[shard.dim] = shard.length
    return LocalTensor(shard.trim(held), tuple(shape), Part.of(shard))


def merge_indices(indices: Iterable[Index]) -> Index:
    """The index of what several processes wrote, in their order."""
    merged: Index = {}
    for index in indices:
        for group, entries in index.items():
            known = merged.setdefault(group, {})
            for name, entry in entries.items():
                before = known.get(name, Entry(entry.dtype, entry.shape, ()))
                assert (before.dtype, before.shape) == (entry.dtype, entry.shape), f"{group}: {name} is there twice"
                known[name] = Entry(entry.dtype, entry.shape, before.pieces + entry.pieces)
    for group, entries in merged.items():
        for name, entry in entries.items():
            assert _is_whole(entry), f"{group}: the pieces of {name} are not the whole tensor"
    return merged


def read_part(
    entry: Entry,
    name: str,
    wanted: Part | None,
    open_file: Callable[[str], TensorFile],
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """The wanted part of a tensor, all of it for None, on the CPU, reading nothing else of its pieces. Of that part
    the `rows` (start, stop) alone, where they are given."""
    whole = [(0, length) for length in entry.shape]
    if wanted is None and rows is None and entry.pieces[0].part is None:
        return open_file(entry.pieces[0].file).read(name, whole)
    wanted = wanted or Part(0, (whole[0],))
    shape = list(entry.shape)
    shape[wanted.dim] = wanted.length
    rows = rows or (0, shape[0])
    shape[0] = rows[1] - rows[0]
    values, found = torch.empty(shape, dtype=DTYPES[entry.dtype]), 0
    for piece in entry.pieces:
        held = piece.part or Part(wanted.dim, (whole[wanted.dim],))
        for target, source in _between(rows, _common(wanted, held, whole)):
            place = values[tuple(slice(*edges) for edges in target)]
            if place.is_contiguous():
                open_file(piece.file).read(name, source, place)
            else:
                place.copy_(open_file(piece.file).read(name, source))
            found += place.numel()
    if found != values.numel():
        raise ValueError(f"its pieces have {found} of {values.numel()} values of {name}")
    return values


def read_span(
    entry: Entry, name: str, shard: Shard | None, start: int, stop: int, open_file: Callable[[str], TensorFile]
) -> Tensor:
    """Of what a process holds of a tensor (all of it for None; zeros at its end included), laid end to end, the values
    from `start` to `stop`. What is read are the rows in which they lie."""
    part = None if shard is None else Part.of(shard)
    shape = list(entry.shape)
    if shard is not None:
        shape[shard.dim] = shard.parts * shard.piece
    row = math.prod(shape[1:])
    first, last = start // row, -(-stop // row)
    padded = shard is not None and part.length < shape[shard.dim]
    if padded and shard.dim == 0:  # its rows are not those of the files
        rows = shard.pad(read_part(entry, name, part, open_file))[first:last]
    else:
        rows = read_part(entry, name, part, open_file, (first, last))
        rows = shard.pad(rows) if padded else rows
    return rows.reshape(-1)[start - first * row : stop - first * row]


Box = list[tuple[int, int]]


def _common(wanted: Part, held: Part, whole: Sequence[tuple[int, int]]) -> Iterator[tuple[Box, Box]]:
    """What both parts have of a tensor: (where in the wanted part, where in the one that is held)."""
    if wanted.dim == held.dim:
        for mine, theirs in _overlaps(wanted.ranges, held.ranges):
            yield _box(whole, {wanted.dim: mine}), _box(whole, {held.dim: theirs})
        return
    for mine, along in _overlaps(wanted.ranges, (whole[wanted.dim],)):
        for across, theirs in _overlaps((whole[held.dim],), held.ranges):
            yield (
                _box(whole, {wanted.dim: mine, held.dim: across}),
                _box(whole, {wanted.dim: along, held.dim: theirs}),
            )


def _between(rows: tuple[int, int], boxes: Iterable[tuple[Box, Box]]) -> Iterator[tuple[Box, Box]]:
    """The same of these rows of the wanted part alone, which then begins with the first of them."""
    for target, source in boxes:
        (start, stop), (low, _) = target[0], source[0]
        begin, end = max(start, rows[0]), min(stop, rows[1])
        if begin < end:
            yield (
                [(begin - rows[0], end - rows[0]), *target[1:]],
                [(low + begin - start, low + end - start), *source[1:]],
            )


def _overlaps(some: Ranges, others: Ranges) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where two lists of ranges meet: in the one laid end to end, and in the other."""
    first = 0
    for start, stop in some:
        second = 0
        for low, high in others:
            begin, end = max(start, low), min(stop, high)
            if begin < end:
                yield (first + begin - start, first + end - start), (second + begin - low, second + end - low)
            second += high - low
        first += stop - start


def _box(whole: Sequence[tuple[int, int]], changes: Mapping[int, tuple[int, int]]) -> Box:
    return [changes.get(dim, edges) for dim, edges in enumerate(whole)]


def _is_whole(entry: Entry) -> bool:
    """Whether the pieces cover the tensor once."""
    parts = [piece.part for piece in entry.pieces]
    if None in parts:
        return len(parts) == 1
    [dim] = {part.dim for part in parts}
    at = 0
    for start, stop in sorted(edges for part in parts for edges in part.ranges if edges[0] < edges[1]):
        if start != at:
            return False
        at = stop
    return at == entry.shape[dim]
