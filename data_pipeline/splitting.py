"""Which documents are validation, and which train a tokenizer: decided by hashes of ids, the same on every run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import xxhash

from braid.data_pipeline.readers import Piece
from braid.kernels.errors import InputError

ENOUGH = 32
"""Expected groups in the smaller split from which on hashes may simply be compared with the fraction: that a split
then comes out empty has probability exp(-32)."""


class Source(Protocol):
    """Where documents come from: `readers.TextFiles` or `embedded.EmbeddedCorpus`."""

    total_bytes: int
    position: int
    num_ignored: int
    has_pairs: bool
    first_validation: int | None

    def describe(self) -> list[dict]: ...

    def pieces(self, first_file: int = 0) -> Iterator[Piece]: ...


@dataclass(frozen=True)
class Split:
    """A group is validation when the hash of its name is at most `threshold`. A corpus of one document is cut instead:
    what lies beyond about `cut` bytes is validation. Or files are: those from number `first_file` on."""

    threshold: int
    cut: int | None = None
    first_file: int | None = None

    def assign(self, pieces: Iterator[Piece]) -> Iterator[tuple[str, Piece]]:
        """(`train` or `validation`, piece) for every piece."""
        if self.cut is not None:
            yield from _cut_document(pieces, self.cut)
            return
        for piece in pieces:
            if self.first_file is not None:
                is_validation = piece.file >= self.first_file
            else:
                is_validation = _hash(piece.group) <= self.threshold
            yield ("validation" if is_validation else "train"), piece


def choose_split(source: Source, fraction: float | None) -> Split:
    """A few groups are put in the order of their hashes and the first `fraction` of the bytes is taken, so both splits
    get at least one group and about their share; of many, each is taken with probability `fraction`. Where the source
    has files for validation, these are it."""
    if source.first_validation is not None:
        return Split(threshold=0, first_file=source.first_validation)
    sizes: dict[int, int] = {}
    documents: set[str] = set()
    for piece in source.pieces():
        key = _hash(piece.group)
        sizes[key] = sizes.get(key, 0) + piece.num_bytes
        if len(documents) < 2:
            documents.add(piece.document)
        if len(sizes) * min(fraction, 1 - fraction) >= ENOUGH:
            return Split(threshold=int(fraction * 2**64))
    total = sum(sizes.values())
    if not documents:
        raise InputError("the filters leave no document", change="make them milder")
    if len(documents) == 1:
        return Split(threshold=0, cut=total - max(1, round(fraction * total)))
    if len(sizes) == 1:
        change = "add documents of another group"
        raise InputError("all documents belong together, so none can be set apart for validation", change=change)
    ordered = sorted(sizes)
    taken = sizes[ordered[0]]
    count = 1
    # Go on while the next group brings the share nearer to what was asked for; the last one stays in training.
    while count < len(ordered) - 1 and taken + sizes[ordered[count]] / 2 < fraction * total:
        taken += sizes[ordered[count]]
        count += 1
    return Split(threshold=ordered[count - 1])


def training_sample(source: Source, split: Split, limit: int) -> list[str]:
    """Training texts of at most `limit` bytes in all, drawn evenly from the whole corpus: the pieces with the smallest
    hashes, in the order of the corpus. When there are too many, half of the hashes are given up."""
    kept: list[tuple[int, Piece]] = []
    bound, size = 1 << 64, 0
    for name, piece in split.assign(source.pieces()):
        key = _hash(f"{piece.document}/{piece.part}", seed=1)
        if name != "train" or key >= bound:
            continue
        kept.append((key, piece))
        size += piece.num_bytes
        while size > limit and len(kept) > 1:
            bound //= 2
            kept = [(key, piece) for key, piece in kept if key < bound] or kept[:1]
            size = sum(piece.num_bytes for _, piece in kept)
    return [piece.text for _, piece in kept]


def _hash(text: str, seed: int = 0) -> int:
    # File names may hold bytes that are not UTF-8; Python keeps them as surrogates.
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"), seed=seed)


def _cut_document(pieces: Iterator[Piece], target: int) -> Iterator[tuple[str, Piece]]:
    """Cut the only document in two at the line boundary nearest after `target` bytes."""
    before, is_cut = 0, False
    for piece in pieces:
        document = f"{piece.document}:validation"
        if is_cut:
            yield "validation", piece._replace(document=document)
        elif before + piece.num_bytes <= target:
            yield "train", piece
        else:
            data = piece.text.encode("utf-8")
            cut = _cut_position(data, target - before, is_first=before == 0, is_last=piece.last)
            head, tail = data[:cut], data[cut:]
            yield "train", piece._replace(text=head.decode("utf-8"), num_bytes=len(head), last=True)
            yield (
                "validation",
                piece._replace(text=tail.decode("utf-8"), num_bytes=len(tail), document=document, group=document),
            )
            is_cut = True
        before += piece.num_bytes


def _cut_position(data: bytes, target: int, *, is_first: bool, is_last: bool) -> int:
    """After the first line end from `target` on, else after the last one before it, else between two characters. Not
    at the very begin or end where a part would be left empty."""
    smallest, largest = int(is_first), len(data) - int(is_last)
    for cut in (data.find(b"\n", target) + 1 or -1, data.rfind(b"\n", 0, target) + 1 or -1):
        if smallest <= cut <= largest:
            return cut
    for cut in (*range(target, largest + 1), *range(target, smallest - 1, -1)):
        if cut == len(data) or (smallest <= cut and data[cut] & 0xC0 != 0x80):
            return cut
    raise InputError(
        "the only document is too short to set a part of it apart for validation",
        found=f"{len(data)} bytes",
        change="give more text",
    )
