"""Documents and paragraphs as spans of a corpus's stream, and how rows are cut from them or filled with them.

Everything is a stream of arrays, a shard's at a time: a corpus is never held in memory, a document that goes on through
several shards ends with the last of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from braid.data_pipeline.corpus import TokenCorpus
from braid.data_pipeline.tokenizers import Tokenizer


class Pieces(NamedTuple):
    """Spans of the stream, int64 [n] each, in the order of their rows."""

    starts: np.ndarray
    lengths: np.ndarray
    firsts: np.ndarray
    """Where the first piece of the same row begins."""

    @classmethod
    def none(cls) -> Pieces:
        return cls(*(np.empty(0, np.int64) for _ in range(3)))

    def then(self, other: Pieces) -> Pieces:
        """Both, one after the other."""
        return Pieces(*map(np.concatenate, zip(self, other, strict=True)))

    def part(self, start: int, stop: int | None) -> Pieces:
        """Some of them."""
        return Pieces(*(values[start:stop] for values in self))


Units = Iterator[tuple[np.ndarray, np.ndarray]]
"""Starts and lengths of documents or paragraphs, without the EOS after them; int64 [n] each."""


def documents(corpus: TokenCorpus, left_out: dict[int, str]) -> Units:
    """The documents of a corpus that have a token, those that end in one shard at a time. Where the corpus skips
    damaged shards, those that touch one are not among them, nor the first that follows, for its beginning might be in
    the shard; the shards and what is wrong with them are put into `left_out`."""
    yield from _units(corpus, left_out, None)


def paragraphs(corpus: TokenCorpus, left_out: dict[int, str]) -> Units:
    """The same with paragraphs: a document is divided after each run of tokens that hold a line break. Tokenizers
    that keep no line breaks (T5's) leave documents whole."""
    yield from _units(corpus, left_out, line_breaks(corpus.tokenizer))


def line_breaks(tokenizer: Tokenizer) -> np.ndarray:
    """Which ids stand for text with a line break, bool [V]."""
    return np.array(["\n" in tokenizer.decode([i]) for i in range(tokenizer.vocab_size)])


def _units(corpus: TokenCorpus, left_out: dict[int, str], breaks: np.ndarray | None) -> Units:
    begin: int | None = 0  # where the unit that goes on began; None: in a shard that cannot be read
    for shard in range(len(corpus.shard_names)):
        reason = corpus.damage(shard) if corpus.damaged == "skip" else None
        if reason is not None:
            left_out[shard] = reason
            begin = None
            continue
        stops, skipped = _stops(corpus, shard, breaks)
        if not len(stops):
            continue
        after = stops + skipped
        if begin is None:
            ended = int(np.argmax(skipped)) if skipped.any() else len(stops)  # paragraphs of a document cut off
            if ended == len(stops):
                continue
            begin, stops, after = int(after[ended]), stops[ended + 1 :], after[ended + 1 :]
        starts = np.concatenate([[begin], after])
        begin = int(starts[-1])
        kept = stops > starts[:-1]
        yield starts[:-1][kept], (stops - starts[:-1])[kept]


def _stops(corpus: TokenCorpus, shard: int, breaks: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Stream positions behind the last token of what ends in a shard, and whether an EOS is there (1) or not (0)."""
    ends, inside = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for first, tokens, offsets in corpus.blocks(shard):
        ends.append(first + offsets + np.arange(len(offsets)))
        if breaks is not None:
            found = np.flatnonzero(breaks[tokens]) + 1
            inside.append(first + found + np.searchsorted(offsets, found, "left"))
    ends, inside = np.concatenate(ends), np.concatenate(inside)
    # Of a run of breaks the last one counts; before an EOS none does.
    inside = inside[~np.isin(inside + 1, inside) & ~np.isin(inside, ends)]
    stops, skipped = np.concatenate([inside, ends]), np.repeat([0, 1], [len(inside), len(ends)])
    order = np.argsort(stops, kind="stable")
    return stops[order], skipped[order]


def cut(units: Units, room: int, oversized: str, about: dict, *, ended: bool) -> Iterator[Pieces]:
    """Each unit as pieces of at most `room` positions: one, or several where it is longer and `oversized` is `cut`;
    else those that are longer are left out. `ended`: the EOS after a unit belongs to it, if need be cut off: an EOS
    alone makes no piece. Counts `units`, `long` and `longest` in `about`."""
    for starts, lengths in units:
        long = lengths + ended > room
        about["units"] += len(lengths)
        about["long"] += int(np.count_nonzero(long))
        about["longest"] = max(about["longest"], int(lengths.max(initial=0)))
        if oversized != "cut":
            starts, lengths = starts[~long], lengths[~long]
        num_pieces = -(-lengths // room)
        unit = np.repeat(np.arange(len(lengths)), num_pieces)
        offset = (np.arange(len(unit)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)) * room
        begins = starts[unit] + offset
        yield Pieces(begins, np.minimum(room, lengths[unit] + ended - offset), begins)


def fill(pieces: Iterator[Pieces], room: int) -> Iterator[Pieces]:
    """Rows filled with one piece after the other; where the next does not fit, the row is closed and another begun.
    Pieces that follow each other in the stream become one."""
    held = Pieces.none()
    for following in pieces:
        held = held.then(following)
        filled = held._replace(firsts=_filled(held, room))
        last = int(np.searchsorted(filled.firsts, filled.firsts[-1])) if len(filled.firsts) else 0
        yield _joined(filled.part(0, last))
        held = held.part(last, None)  # the row that may go on
    yield _joined(held._replace(firsts=_filled(held, room)))


def _filled(pieces: Pieces, room: int) -> np.ndarray:
    """Where the row of each piece begins."""
    ends = np.cumsum(pieces.lengths)
    begins, first = [], 0
    while first < len(ends):
        begins.append(first)
        before = ends[first - 1] if first else 0
        first = int(np.searchsorted(ends, before + room, "right"))
    counts = np.diff([*begins, len(ends)])
    return np.repeat(pieces.starts[begins], counts) if begins else pieces.starts


def _joined(pieces: Pieces) -> Pieces:
    follows = np.zeros(len(pieces.starts), bool)
    follows[1:] = (pieces.starts[1:] == pieces.starts[:-1] + pieces.lengths[:-1]) & np.equal(
        pieces.firsts[1:], pieces.firsts[:-1]
    )
    begins = np.flatnonzero(~follows)
    if not len(begins):
        return pieces
    return Pieces(pieces.starts[begins], np.add.reduceat(pieces.lengths, begins), pieces.firsts[begins])
