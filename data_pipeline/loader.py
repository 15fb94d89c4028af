"""Batches for training and validation: which rows, in which order, for which rank.

The only state is how far the run has come: one number for the samples consumed and, where rows of damaged shards are
left out, how many those were of each source. Global batch k is the same, in the same order, whatever the number of
data-parallel ranks, micro-batches and workers; a rank takes its contiguous slice of it. Nothing here is collective: a
rank that needs no tokens builds no loader.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from braid.data_pipeline.mixture import MixedOrder, MixedRows, Stage
from braid.data_pipeline.order import ShuffledOrder
from braid.data_pipeline.packing import SINGLE, Packed, Rows
from braid.kernels.errors import BraidError, CheckpointError, ConfigError, DataExhausted, TrainingFailed

T = TypeVar("T")

STATE_VERSION = 1
LEFT_OUT, UNIQUE, REPEATED = range(3)
"""What is counted of each source, over all ranks: rows left out, tokens of its first epoch, tokens of later ones."""
PREFETCHED = 4  # micro-batches each worker reads ahead, at least
TOGETHER, MAX_TOKENS = 8, 1 << 18
"""Micro-batches that a worker reads before it hands them over, if they have no more tokens than that: to hand over is
as much work as to read some tens of rows."""


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
    def of_rows(cls, rows: Rows | MixedRows, packed: Packed, ordinals: np.ndarray) -> Batch:
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
    which counts a step in as soon as it is handed out; what workers have read ahead does not count.

    Rows of damaged shards, where the corpus skips them, are replaced by the rows that follow in the order of the same
    source; ordinals do not move. `position` is then ahead of `consumed` by the rows left out. Every rank checks all
    shards of the global batch in that case, so that all ranks replace the same rows.

    rows and order: `Rows` and their `ShuffledOrder`, or `MixedRows` of several sources and their `MixedOrder`.
    workers: processes that read ahead; 0 reads in this one. A worker that dies raises TrainingFailed within seconds.

    Raises ConfigError when the batch does not divide, DataExhausted when a source has fewer rows than a global batch
    takes of it, and while iterating InputError with the name of a missing or damaged shard.
    """

    def __init__(
        self,
        rows: Rows | MixedRows,
        order: ShuffledOrder | MixedOrder,
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
        self.rows, self.order, self.workers = rows, order, workers
        self._parts = list(rows.parts.values())
        self._mixture = order if isinstance(order, MixedOrder) else MixedOrder.of_one(SINGLE, order)
        assert self._mixture.names == list(rows.parts), (self._mixture.names, list(rows.parts))
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self._check_sizes()
        self.consumed = consumed
        self._counts = self._counts_at(consumed)
        self._skips = any(part.corpus.damaged == "skip" for part in self._parts)
        self._first = data_rank * global_batch_size // data_size
        self._stop = (data_rank + 1) * global_batch_size // data_size

    @property
    def position(self) -> int:
        """How many rows the run has come past: those consumed and those left out."""
        return self.consumed + int(self._counts[:, LEFT_OUT].sum())

    @property
    def num_real(self) -> int:
        """The tokens of all ranks so far, padding left out."""
        return int(self._counts[:, [UNIQUE, REPEATED]].sum())

    def __iter__(self) -> Iterator[list[Batch]]:
        num_micro_batches = (self._stop - self._first) // self.micro_batch_size
        planned: deque[np.ndarray] = deque()  # the counts after each step, perhaps one that is only read ahead
        fetching = [(number, part.corpus.fetching_ahead(self.order.window)) for number, part in enumerate(self._parts)]
        ahead = {number: threads for number, threads in fetching if threads is not None}
        if ahead:
            from braid.data_pipeline.cache import check_limit

            check_limit([*ahead.values()])

        def requests() -> Iterator[np.ndarray]:
            consumed, counts, wanted = self.consumed, self._counts, {}
            while True:
                for number, threads in ahead.items():
                    position = int(self._mixture.given(consumed)[number] + counts[number, LEFT_OUT])
                    if (coming := self._coming_shards(number, position)) != wanted.get(number):
                        wanted[number] = coming
                        threads.want(coming)
                indices, counts = self._plan_step(consumed, counts)
                consumed += self.global_batch_size
                planned.append(counts)
                mine = indices[self._first : self._stop]
                yield from mine.reshape(num_micro_batches, -1)

        if self.workers:
            packed = _read_in_workers(self.rows, requests(), self.micro_batch_size, self.workers)
        else:
            packed = map(self.rows.load, requests())

        def make_steps() -> Iterator[tuple[list[Batch], np.ndarray]]:
            ordinals = self.consumed + np.arange(self._first, self._stop)
            while True:
                parts = ordinals.reshape(num_micro_batches, -1)
                yield [Batch.of_rows(self.rows, next(packed), part) for part in parts], planned.popleft()
                ordinals = ordinals + self.global_batch_size

        made = make_steps()
        steps = _one_ahead(made) if self.workers else made
        try:
            for step, counts in steps:
                self.consumed += self.global_batch_size
                self._counts = counts
                yield step
        finally:
            steps.close()
            made.close()
            for threads in ahead.values():
                threads.close()

    def _coming_shards(self, source: int, position: int) -> list[int]:
        """The shards of a source that the rows of this window and the next are read from. A row may reach into the
        shard that follows its own."""
        last = len(self._parts[source].rows_per_shard) - 1
        windows = self._mixture.coming_shards(source, position)
        read = (k for shards in windows for k in (*shards, *(min(shard + 1, last) for shard in shards)))
        return list(dict.fromkeys(read))

    def state_dict(self) -> dict:
        """What a run needs to go on, whatever its layout then, and what must not have changed meanwhile.

        A mixture's has its fingerprints by source, and the stages it went through, see `MixedOrder.continue_from`.
        Where rows are padded or were left out: `counts`, source -> LEFT_OUT, UNIQUE and REPEATED.
        """
        state = {"consumed": self.consumed, "position": self.position, **self._identity()}
        if isinstance(self.order, MixedOrder):
            state["stages"] = [
                {"first": stage.first, "shares": stage.shares} for stage in self.order.begun(self.consumed)
            ]
        if self.rows.table_hash or self._counts[:, LEFT_OUT].any():
            state["counts"] = dict(zip(self._mixture.names, self._counts.tolist(), strict=True))
        return state

    def load_state_dict(self, state: dict) -> bool:
        """Go on where `state` was taken. Raises CheckpointError when a corpus, the rows or the order differ; a mixture
        may have got other weights, and sources it did not have. Returns whether they begin a new stage here."""
        ours = self._identity()
        mixed = isinstance(self.order, MixedOrder) and isinstance(state.get("fingerprint"), dict)
        state = {"target_tokens": {} if mixed else None} | state  # earlier versions cut no pairs
        if mixed:  # what is gone or new among the sources is the order's to judge
            common = state["fingerprint"].keys() & ours["fingerprint"].keys()
            for by_source in state, ours:
                for name in ("fingerprint", "rows", "target_tokens"):
                    if isinstance(by_source.get(name), dict):
                        by_source[name] = {source: by_source[name].get(source) for source in sorted(common)}
        for name, value in ours.items():
            if state.get(name) != value:
                raise CheckpointError(
                    f"the checkpoint's data cannot be continued: {name} differs",
                    found=f"checkpoint {state.get(name)}, this run {value}",
                    change="use the checkpoint's corpus and data settings, or start afresh",
                )
        changed = mixed and self.order.continue_from([Stage(**each) for each in state["stages"]], state["consumed"])
        counts = state.get("counts", {})
        passed = state["position"] - state["consumed"] if not counts else 0  # earlier versions counted nothing else
        self._counts = self._counts_at(state["consumed"], passed)
        for number, name in enumerate(self._mixture.names):
            self._counts[number] = counts.get(name, self._counts[number])
        self.consumed = state["consumed"]
        return changed

    @property
    def shares(self) -> dict[str, float]:
        """What part of the samples comes from each source now, 0 from some."""
        return dict.fromkeys(self._mixture.names, 0.0) | self._mixture.stage(self.consumed).fractions

    def bookkeeping(self) -> dict:
        """What the run has eaten so far, as it stands in metrics.jsonl.

        unique_tokens: of the samples that came in the first epoch of their source; repeated_tokens: of all others;
        padding is none. epoch: how often the source was gone through, a fraction included. A mixture has these by
        source as well, with its tokens_seen, its weight now, and left_out, the rows it lost to damaged shards.
        """
        given, shares = self._mixture.given(self.consumed), self.shares
        sources = {}
        for number, (name, part) in enumerate(self.rows.parts.items()):
            left_out, unique, repeated = self._counts[number].tolist()
            sources[name] = {
                "weight": shares[name],
                "tokens_seen": unique + repeated,
                "unique_tokens": unique,
                "repeated_tokens": repeated,
                "epoch": (int(given[number]) + left_out) / len(part),
                "left_out": left_out,
            }
        if not isinstance(self.order, MixedOrder):
            return {name: sources[SINGLE][name] for name in ("unique_tokens", "repeated_tokens", "epoch")}
        unique, repeated = self._counts[:, UNIQUE].sum(), self._counts[:, REPEATED].sum()
        return {"unique_tokens": int(unique), "repeated_tokens": int(repeated), "sources": sources}

    def _counts_at(self, consumed: int, left_out: int = 0) -> np.ndarray:
        """The counts of a run without padding; `left_out`: rows of a single source."""
        given, sizes = self._mixture.given(consumed), np.array([len(part) for part in self._parts])
        unique = np.minimum(given, sizes - left_out)
        length = self.rows.sequence_length
        return np.stack([np.full_like(given, left_out), unique * length, (given - unique) * length], 1)

    def _identity(self) -> dict:
        fingerprints = {name: part.corpus.fingerprint for name, part in self.rows.parts.items()}
        target_tokens = {name: part.target_tokens for name, part in self.rows.parts.items()}
        return {
            "version": STATE_VERSION,
            "seed": self.order.seed,
            "window": self.order.window,
            "fingerprint": fingerprints if isinstance(self.order, MixedOrder) else fingerprints[SINGLE],
            "sequence_length": self.rows.sequence_length,
            "packing": self.rows.packing,
            "target_tokens": target_tokens if isinstance(self.order, MixedOrder) else target_tokens[SINGLE],
            **({"rows": self.rows.table_hash} if self.rows.table_hash else {}),
        }

    def _check_sizes(self) -> None:
        for name, part in self.rows.parts.items():
            share = max(stage.fraction(name) for stage in self._mixture.stages)
            taken = -(-share * self.global_batch_size // 1)
            if len(part) < taken:
                several = len(self.rows.parts) > 1
                raise DataExhausted(
                    f"the {part.corpus.split} split of {part.corpus.source} has fewer rows than one global batch"
                    + (" takes of it" if several else ""),
                    found=f"{len(part)} rows of {part.sequence_length} tokens, global_batch_size "
                    f"{self.global_batch_size}" + (f", of which source {name} gives {taken}" if several else ""),
                    change="use more data, a smaller global_batch_size or a shorter sequence_length"
                    + (", or lower its weight" if several else ""),
                )

    def _plan_step(self, consumed: int, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row indices of the global batch after `consumed` samples, and the counts after it, where `counts` are those
        before."""
        mixture, counts = self._mixture, counts.copy()
        sources, positions = mixture.places(consumed, consumed + self.global_batch_size, counts[:, LEFT_OUT])
        if self._skips:
            positions = self._past_damage(sources, positions)
            given = mixture.given(consumed + self.global_batch_size)
            for number, mine in mixture.of_each(sources):
                counts[number, LEFT_OUT] = positions[mine][-1] + 1 - given[number]
        indices = mixture.rows(sources, positions)
        for number, mine in mixture.of_each(sources):
            part, rows = self._parts[number], indices[mine] - mixture.first_rows[number]
            in_first_epoch = int(positions[mine].searchsorted(len(part)))
            counts[number, UNIQUE] += part.num_real(rows[:in_first_epoch])
            counts[number, REPEATED] += part.num_real(rows[in_first_epoch:])
        return indices, counts

    def _past_damage(self, sources: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """`positions` in the orders of `sources`, each moved on to the next row that is not left out and not taken."""
        moved, ahead = [], [0] * len(self._mixture.names)
        for source, position in zip(sources.tolist(), positions.tolist(), strict=True):
            begin = position = position + ahead[source]
            part = self._parts[source]
            while self.rows.is_left_out(self._mixture.row(source, position)):
                position += 1
                if position - begin == 2 * len(part):  # a whole epoch lies in between, wherever the first of them was
                    raise DataExhausted(
                        f"every shard of the {part.corpus.split} split is missing or damaged",
                        found=f"{part.corpus.source}, ledger {part.corpus.ledger}",
                        change="copy the corpus again or prepare it again",
                    )
            ahead[source] += position - begin
            moved.append(position)
        return np.array(moved)


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
    """Runs in a worker: indices of some micro-batches -> their rows, to the first that cannot be read. An error a user
    can act on travels as a value, for torch would hand it on as the text of a traceback."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __getitem__(self, requests: list[np.ndarray]) -> list[Packed | BraidError]:
        results: list[Packed | BraidError] = []
        for indices in requests:
            try:
                results.append(self.rows.load(indices))
            except BraidError as error:
                return [*results, error]
        return results


def _read_in_workers(
    rows: Rows, requests: Iterator[np.ndarray], micro_batch_size: int, workers: int
) -> Iterator[Packed]:
    """`map(rows.load, requests)`, read ahead by processes."""
    together = max(1, min(TOGETHER, MAX_TOKENS // (micro_batch_size * rows.sequence_length)))
    loader = DataLoader(
        _RowReader(rows),
        batch_size=None,
        sampler=iter(lambda: list(islice(requests, together)), []),
        collate_fn=_unchanged,
        num_workers=workers,
        prefetch_factor=max(2, PREFETCHED // together),
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
                found = next(results)
            except RuntimeError as error:
                died = TrainingFailed(
                    "a data worker died",
                    found=str(error),
                    change="look for the kernel's out-of-memory killer; data.workers=0 reads without workers",
                )
                found = [died]
            except BraidError as error:  # from planning the requests
                found = [error.with_traceback(None)]
            for result in found:
                if isinstance(result, BraidError):
                    raise result
                yield result
    finally:
        del results  # which ends the workers: the frames of an error, this one included, may live long


def _one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same, each made by a thread while the one before is in use: to take over what a worker has read is as much
    work as reading it. The first is made at once, because it starts the workers, and threads and forks do not mix."""
    item = next(items)
    with ThreadPoolExecutor(1, thread_name_prefix="next-step") as thread:
        while True:
            coming = thread.submit(next, items)
            yield item
            item = coming.result()


def _unchanged(results: list) -> list:
    return results


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
