"""What one optimizer step adds up, over micro-batches and over ranks, and what the steps between two log lines do.

All of it stays on the device until somebody reads it, so that a step does not wait for the one before to be computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from braid.parallel.mesh import Axis
from braid.parallel.pipeline import spread
from braid.pretrain.objectives.base import NUM_TIME_BUCKETS, LossTerms


@dataclass
class StepSums:
    """Sums over the micro-batches that were added, float64; over all ranks once `reduce` was called."""

    device: torch.device
    of_pieces: bool = False
    """Every process of a pipeline has something to add up, by the same names (`Objective.splits_loss`)."""
    terms: dict[str, Tensor] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)
    """See `LossTerms`."""

    def __post_init__(self) -> None:
        self._sums = torch.zeros(2 * NUM_TIME_BUCKETS + 2, dtype=torch.float64, device=self.device)

    def add(self, loss: LossTerms) -> None:
        """Take in a micro-batch."""
        self._sums[0] += loss.count
        self._sums[1] += loss.total.detach()
        if loss.bucket_sums is not None:
            self._sums[2 : NUM_TIME_BUCKETS + 2] += loss.bucket_sums
            self._sums[NUM_TIME_BUCKETS + 2 :] += loss.bucket_counts
        for name, value in loss.terms.items():
            self.terms[name] = self.terms.get(name, 0.0) + value.double()
        for name, value in loss.statistics.items():
            self.statistics[name] = self.statistics.get(name, 0.0) + value

    def reduce(self, peers: Axis, rows: Axis, pipeline: Axis) -> None:
        """Add up over ranks with positions of their own, `peers`, and what is of whole rows over those with rows of
        their own, `rows`: the others have the same sums. In a pipeline the ranks with the heads have something to add
        up, or all have, and tell the others, by way of the host."""
        last, reduced = pipeline.size - 1, None
        if pipeline.rank == last or self.of_pieces:
            totals = peers.all_reduce_sum(torch.cat([self._sums, torch.stack(list(self.terms.values()))]))
            if self.of_pieces:
                pipeline.all_reduce_sum(totals)
            statistics = {name: rows.all_reduce_sum(value) for name, value in self.statistics.items()}
            reduced = totals, list(self.terms), statistics
        self.totals, self.names, self.statistics = spread(pipeline, reduced, last)

    def read(self) -> Sums:
        """The sums over all ranks, on the host."""
        return Sums.of(self.totals.tolist(), self.names)


@dataclass(frozen=True)
class Sums:
    """On the host."""

    count: int
    """Tokens that count."""
    total: float
    bucket_sums: list[float]
    bucket_counts: list[float]
    terms: dict[str, float]

    @staticmethod
    def of(totals: Sequence[float], names: Sequence[str]) -> Sums:
        """From what `StepSums` lays end to end."""
        (count, total, *rest), n = totals, NUM_TIME_BUCKETS
        return Sums(int(count), total, rest[:n], rest[n : 2 * n], dict(zip(names, rest[2 * n :], strict=True)))

    @property
    def totals(self) -> list[float]:
        """Inverse of `of`."""
        return [self.count, self.total, *self.bucket_sums, *self.bucket_counts, *self.terms.values()]


class Interval:
    """Sums since the last log line; part of a checkpoint, so that a resumed run writes the same lines."""

    def __init__(self, device: torch.device, state: Mapping[str, Any] | None = None) -> None:
        """`state` is what `vars` of the `Sums` gives that an earlier interval was read as."""
        self.device, self._totals, self._names = device, None, []
        if state and state["count"]:
            sums = Sums(**state)
            self._names = list(sums.terms)
            self._totals = torch.tensor(sums.totals, dtype=torch.float64, device=device)

    def add(self, step: StepSums) -> None:
        """Take in a step, reduced over ranks."""
        totals = step.totals.to(self.device)
        assert self._totals is None or self._names == step.names, "every step has the same terms"
        self._totals = totals if self._totals is None else self._totals + totals
        self._names = step.names

    def read(self) -> Sums:
        """The sums so far, on the host. Waits for the device."""
        totals = [0.0] * (2 * NUM_TIME_BUCKETS + 2) if self._totals is None else self._totals.tolist()
        return Sums.of(totals, self._names)
