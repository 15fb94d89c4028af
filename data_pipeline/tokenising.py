"""Tokenising in several processes: batches of pieces go out, their ids come back in the same order."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from braid.data_pipeline.readers import Piece
from braid.data_pipeline.splitting import Source
from braid.data_pipeline.tokenizers import Tokenizer, load_tokenizer
from braid.kernels.errors import InputError

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
    batches: Iterator[Batch], tokenizer: Tokenizer, folder: Path, workers: int
) -> Iterator[tuple[Batch, list[np.ndarray]]]:
    """(batch, token ids of its pieces) in the order of the batches. `folder`: where processes load the tokenizer."""
    if workers == 1:
        for batch in batches:
            yield batch, tokenizer.encode_batch(batch.texts)
        return
    # Spawned, not forked: the tokenizer library has threads of its own, which a fork would leave in an unknown state.
    with ProcessPoolExecutor(workers, mp_context=mp.get_context("spawn"), initializer=_start_worker) as pool:
        pending: deque = deque()
        try:
            for batch in batches:
                pending.append((batch, pool.submit(_tokenise, str(folder), batch.texts)))
                if len(pending) > 2 * workers:
                    yield _collected(*pending.popleft())
            while pending:
                yield _collected(*pending.popleft())
        except BrokenProcessPool as error:
            change = "it may have run out of memory: use fewer --workers; the same command then goes on"
            raise InputError("a tokenising process died", found=str(error), change=change) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _collected(batch: Batch, future: Future) -> tuple[Batch, list[np.ndarray]]:
    ids, lengths = future.result()
    return batch, np.split(ids, np.cumsum(lengths[:-1]))


def _start_worker() -> None:
    """Processes leave Ctrl-C to their parent, and go when it is gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are processes already
    parent = mp.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _tokenise(folder: str, texts: list[str]) -> tuple[np.ndarray, list[int]]:
    rows = _loaded_once(folder).encode_batch(texts)
    return np.concatenate(rows), [len(row) for row in rows]


@cache
def _loaded_once(folder: str) -> Tokenizer:
    return load_tokenizer(folder)
