"""Batches for training and validation: which rows, in which order, for which rank.

The only state is how far the run has come, one number for the samples consumed. Global batch k is the same, in the same
order, whatever the number of data-parallel ranks, micro-batches and workers; a rank takes its contiguous slice of it.
Nothing here is collective: a rank that needs no tokens builds no loader.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from braid.data_pipeline.order import ShuffledOrder
from braid.data_pipeline.packing import Packed, Rows
from braid.kernels.errors import BraidError, CheckpointError, ConfigError, DataExhausted, TrainingFailed

STATE_VERSION = 1
PREFETCHED = 4  # micro-batches each worker reads ahead


@dataclass
class Batch:
    """b sequences of L tokens.

    tokens: int64 [b, L]. loss_mask: bool [b, L], what is learnt and scored: False at padding and at given tokens.
    ordinals: int64 [b], positions of the samples in the endless global order; they key all noise. condition: bool
    [b, L], tokens that are given and never noised (the source of a pair); none, when left out. segments: int32 [b, L],
    positions of the same number may see each other, 0 is padding; None: all see all.
    """

    tokens: torch.Tensor
    loss_mask: torch.Tensor
    ordinals: torch.Tensor
    condition: torch.Tensor | None = None
    segments: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.condition is None:
            self.condition = torch.zeros_like(self.loss_mask)

    def to(self, device: torch.device) -> Batch:
        """The same on `device`."""
        tensors = (self.tokens, self.loss_mask, self.ordinals, self.condition, self.segments)
        return Batch(*(None if x is None else upload(x, device) for x in tensors))

    @classmethod
    def of_rows(cls, rows: Rows, packed: Packed, ordinals: np.ndarray) -> Batch:
        """packed: what `rows.load` returned, b rows; ordinals: int64 [b]."""
        condition = torch.from_numpy(rows.condition(packed.tokens))
        loss_mask, segments = ~condition, None
        if packed.segments is not None:
            segments = torch.from_numpy(packed.segments)
            loss_mask &= segments > 0
        tokens = torch.from_numpy(packed.tokens.astype(np.int64))
        return cls(tokens, loss_mask, torch.from_numpy(ordinals), condition, segments)


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on `device`, without waiting for what the device is doing: a GPU copies by itself only from
    memory that stays where it is."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Loader:
    """Endless training batches of one data-parallel rank: rank r of n takes samples [r G/n, (r+1) G/n) of each global
    batch of G, cut into micro-batches.

    Iterating yields, for each step, the list of this rank's micro-batches (list[Batch]) and goes on from `consumed`,
    which counts a step in as soon as it is handed out; what workers have read ahead does not count. `num_real` counts
    the tokens of all ranks so far, padding left out.

    Rows of damaged shards, where the corpus skips them, are replaced by the rows that follow in the order; ordinals do
    not move. `position` is then ahead of `consumed` by the rows left out. Every rank checks all shards of the global
    batch in that case, so that all ranks replace the same rows.

    workers: processes that read ahead; 0 reads in this one. A worker that dies raises TrainingFailed within seconds.

    Raises ConfigError when the batch does not divide, DataExhausted when the corpus has fewer rows than a global batch,
    and while iterating InputError with the name of a missing or damaged shard.
    """

    def __init__(
        self,
        rows: Rows,
        order: ShuffledOrder,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        data_rank: int,
        data_size: int,
        consumed: int = 0,
        workers: int = 0,
    ) -> None:
        assert len(rows) == len(order) and 0 <= data_rank < data_size and consumed >= 0
        if global_batch_size < 1 or global_batch_size % (micro_batch_size * data_size):
            raise ConfigError(
                "the global batch cannot be cut into equal micro-batches",
                found=f"global_batch_size {global_batch_size}, micro_batch_size {micro_batch_size} x "
                f"{data_size} data-parallel ranks = {micro_batch_size * data_size}",
                change="make global_batch_size a multiple of micro_batch_size x data-parallel ranks",
            )
        if len(rows) < global_batch_size:
            corpus = rows.corpus
            raise DataExhausted(
                f"the {corpus.split} split of {corpus.source} has fewer rows than one global batch",
                found=f"{len(rows)} rows of {rows.sequence_length} tokens, global_batch_size {global_batch_size}",
                change="use more data, a smaller global_batch_size or a shorter sequence_length",
            )
        self.rows, self.order, self.workers = rows, order, workers
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.consumed = self.position = consumed
        self.num_real = consumed * rows.sequence_length
        self._first = data_rank * global_batch_size // data_size
        self._stop = (data_rank + 1) * global_batch_size // data_size

    def __iter__(self) -> Iterator[list[Batch]]:
        num_micro_batches = (self._stop - self._first) // self.micro_batch_size
        planned: deque[tuple[int, int]] = deque()  # where each step, perhaps only read ahead, ends; its real tokens
        ahead = self.rows.corpus.fetching_ahead(self.order.window)

        def requests() -> Iterator[np.ndarray]:
            position, wanted = self.position, []
            while True:
                if ahead and (coming := self._coming_shards(position)) != wanted:
                    wanted = coming
                    ahead.want(wanted)
                indices, position = self._plan_step(position)
                planned.append((position, self.rows.num_real(indices)))
                mine = indices[self._first : self._stop]
                yield from mine.reshape(num_micro_batches, -1)

        if self.workers:
            packed = _read_in_workers(self.rows, requests(), self.workers)
        else:
            packed = map(self.rows.load, requests())
        try:
            while True:
                ordinals = self.consumed + np.arange(self._first, self._stop)
                parts = ordinals.reshape(num_micro_batches, -1)
                step = [Batch.of_rows(self.rows, next(packed), part) for part in parts]
                self.consumed += self.global_batch_size
                self.position, num_real = planned.popleft()
                self.num_real += num_real
                yield step
        finally:
            if ahead:
                ahead.close()

    def _coming_shards(self, position: int) -> list[int]:
        """The shards that the rows of this window and the next are read from. A row may reach into the shard that
        follows its own."""
        last = len(self.rows.rows_per_shard) - 1
        windows = self.order.coming_shards(position)
        read = (k for shards in windows for k in (*shards, *(min(shard + 1, last) for shard in shards)))
        return list(dict.fromkeys(read))

    def state_dict(self) -> dict:
        """What a run needs to go on, whatever its layout then, and what must not have changed meanwhile."""
        padded = {"num_real": self.num_real} if self.rows.table_hash else {}
        return {"consumed": self.consumed, "position": self.position, **padded, **self._identity()}

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state` was taken. Raises CheckpointError when the corpus, the rows or the order differ."""
        for name, ours in self._identity().items():
            if state.get(name) != ours:
                raise CheckpointError(
                    f"the checkpoint's data cannot be continued: {name} differs",
                    found=f"checkpoint {state.get(name)}, this run {ours}",
                    change="use the checkpoint's corpus and data settings, or start afresh",
                )
        self.consumed, self.position = state["consumed"], state["position"]
        self.num_real = state.get("num_real", self.consumed * self.rows.sequence_length)

    def _identity(self) -> dict:
        return {
            "version": STATE_VERSION,
            "seed": self.order.seed,
            "window": self.order.window,
            "fingerprint": self.rows.corpus.fingerprint,
            "sequence_length": self.rows.sequence_length,
            "packing": self.rows.packing,
            **({"rows": self.rows.table_hash} if self.rows.table_hash else {}),
        }

    def _plan_step(self, position: int) -> tuple[np.ndarray, int]:
        """Row indices of the global batch that starts at `position`, and the position where it ends."""
        if self.rows.corpus.damaged == "stop":
            stop = position + self.global_batch_size
            return self.order.span(position, stop), stop
        kept: list[int] = []
        num_left_out = 0
        while len(kept) < self.global_batch_size:
            row = self.order[position]
            position += 1
            if not self.rows.is_left_out(row):
                kept.append(row)
                num_left_out = 0
                continue
            num_left_out += 1
            if num_left_out == 2 * len(self.rows):  # a whole epoch lies in between, wherever the first of them was
                raise DataExhausted(
                    f"every shard of the {self.rows.corpus.split} split is missing or damaged",
                    found=f"{self.rows.corpus.source}, ledger {self.rows.corpus.ledger}",
                    change="copy the corpus again or prepare it again",
                )
        return np.array(kept), position


def spread(num_rows: int, num_chosen: int) -> np.ndarray:
    """`num_chosen` of `num_rows` row numbers (at most all), evenly spread and increasing: int64."""
    num_chosen = min(num_chosen, num_rows)
    return np.arange(num_chosen) * num_rows // max(num_chosen, 1)


def validation_batches(
    rows: Rows, num_sequences: int, micro_batch_size: int, data_rank: int, data_size: int
) -> Iterator[Batch]:
    """This rank's share of `num_sequences` rows spread evenly over the split (all, when there are fewer), in order.

    Neighbouring rows come from one document, so the first rows would be a few documents and not the split. Row i has
    ordinal i. Over the ranks every chosen row comes exactly once, except rows of damaged shards where the corpus skips
    those; the last batch may be short. All ranks have the same number of batches, for they may need each other to go
    through one: what a rank lacks is made up by a row of which nothing is scored (`loss_mask` False).
    """
    chosen = spread(len(rows), num_sequences)
    edges = [rank * len(chosen) // data_size for rank in range(data_size + 1)]
    shares = [[i for i in chosen[a:b].tolist() if not rows.is_left_out(i)] for a, b in pairwise(edges)]
    mine = shares[data_rank]
    num_batches = max(-(-len(share) // micro_batch_size) for share in shares)
    for first in range(0, num_batches * micro_batch_size, micro_batch_size):
        indices = mine[first : first + micro_batch_size]
        if indices:
            yield Batch.of_rows(rows, rows.load(indices), np.array(indices))
        else:
            spare = next(share[:1] for share in shares if share)
            batch = Batch.of_rows(rows, rows.load(spare), np.array(spare))
            yield replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))


class _RowReader(Dataset):
    """Runs in a worker: indices -> rows. An error a user can act on travels as a value, for torch would hand it on as
    the text of a traceback."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __getitem__(self, indices: np.ndarray) -> Packed | BraidError:
        try:
            return self.rows.load(indices)
        except BraidError as error:
            return error


def _read_in_workers(rows: Rows, requests: Iterable[np.ndarray], workers: int) -> Iterator[Packed]:
    """`map(rows.load, requests)`, read ahead by processes."""
    loader = DataLoader(
        _RowReader(rows),
        batch_size=None,
        sampler=requests,
        collate_fn=_unchanged,
        num_workers=workers,
        prefetch_factor=PREFETCHED,
        worker_init_fn=_live_as_long_as_the_trainer,
        generator=torch.Generator(),
    )  # else it would draw a number from the global one
    previous = signal.getsignal(signal.SIGCHLD)
    results = iter(loader)
    if previous is not None and threading.current_thread() is threading.main_thread():
        # torch has just installed a handler that raises wherever the main thread is when a worker dies, were it in the
        # middle of a checkpoint. Without it `next` finds out (it looks every 5 s while waiting), in one place.
        signal.signal(signal.SIGCHLD, previous)
    try:
        while True:
            try:
                result = next(results)
            except RuntimeError as error:
                result = TrainingFailed(
                    "a data worker died",
                    found=str(error),
                    change="look for the kernel's out-of-memory killer; data.workers=0 reads without workers",
                )
            except BraidError as error:  # from planning the requests
                result = error.with_traceback(None)
            if isinstance(result, BraidError):
                raise result
            yield result
    finally:
        del results  # which ends the workers: the frames of an error, this one included, may live long


def _unchanged(batch: Packed) -> Packed:
    return batch


def _live_as_long_as_the_trainer(worker: int) -> None:
    """Schedulers signal every process of a job when they preempt it. The trainer then finishes its step and saves, for
    which it needs its workers: they end when the trainer says so or is gone, not by signals from elsewhere."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    trainer = multiprocessing.parent_process().pid

    def wait_for_the_trainer() -> None:
        while os.getppid() == trainer:
            received = signal.sigtimedwait({signal.SIGTERM}, 1.0)
            if received is not None and received.si_pid == trainer:
                break
        os._exit(0)

    threading.Thread(target=wait_for_the_trainer, daemon=True).start()
