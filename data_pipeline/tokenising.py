"""Tokenising in several processes: batches of pieces go out, their ids come back in the same order."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from braid.data_pipeline.readers import Piece
from braid.data_pipeline.splitting import Source
from braid.data_pipeline.tokenizers import Tokenizer, load_tokenizer
from braid.data_pipeline.workers import Workers

BATCH_BYTES = 2 << 20
BATCH_PIECES = 4096
"""What one process tokenises at a time."""


class Batch(NamedTuple):
    """Pieces, the split each belongs to, and how far the source had been read when the batch was complete."""

    pieces: list[tuple[str, Piece]]
    position: int

    @property
    def texts(self) -> list[str]:
        return [piece.text for _, piece in self.pieces]


def batches_of(pieces: Iterator[tuple[str, Piece]], source: Source) -> Iterator[Batch]:
    """Group the pieces of a source into batches worth sending to a process."""
    batch: list[tuple[str, Piece]] = []
    size = 0
    for name, piece in pieces:
        batch.append((name, piece))
        size += piece.num_bytes
        if size >= BATCH_BYTES or len(batch) >= BATCH_PIECES:
            yield Batch(batch, source.position)
            batch, size = [], 0
    if batch:
        yield Batch(batch, source.position)


def tokenised(
    batches: Iterator[Batch], tokenizer: Tokenizer, folder: Path, workers: Workers
) -> Iterator[tuple[Batch, list[np.ndarray]]]:
    """(batch, token ids of its pieces) in the order of the batches. `folder`: where processes load the tokenizer."""
    if workers.num == 1:
        yield from workers.map(tokenizer.encode_batch, batches, attrgetter("texts"))
        return
    for batch, (ids, lengths) in workers.map(partial(_tokenise, str(folder)), batches, attrgetter("texts")):
        yield batch, np.split(ids, np.cumsum(lengths[:-1]))


def _tokenise(folder: str, texts: list[str]) -> tuple[np.ndarray, list[int]]:
    rows = _loaded_once(folder).encode_batch(texts)
    return np.concatenate(rows), [len(row) for row in rows]


@cache
def _loaded_once(folder: str) -> Tokenizer:
    return load_tokenizer(folder)
