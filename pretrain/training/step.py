"""What one optimizer step adds up: the losses of its micro-batches, over micro-batches and over ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from braid.parallel.mesh import Axis
from braid.parallel.pipeline import spread
from braid.pretrain.objectives.base import NUM_TIME_BUCKETS, LossTerms


@dataclass
class StepSums:
    """Sums over the micro-batches that were added, float64; over all ranks once `reduce` was called."""

    device: torch.device
    terms: dict[str, Tensor] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)
    """See `LossTerms`."""

    def __post_init__(self) -> None:
        self._sums = torch.zeros(2 * NUM_TIME_BUCKETS + 2, dtype=torch.float64, device=self.device)

    def add(self, loss: LossTerms) -> None:
        """Take in a micro-batch. Nothing waits for the device."""
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
        up, and tell the others."""
        last, reduced = pipeline.size - 1, None
        if pipeline.rank == last:
            totals = peers.all_reduce_sum(torch.cat([self._sums, torch.stack(list(self.terms.values()))]))
            statistics = {name: rows.all_reduce_sum(value) for name, value in self.statistics.items()}
            reduced = totals.tolist(), list(self.terms), statistics
        (count, self.total, *rest), names, self.statistics = spread(pipeline, reduced, last)
        self.count = int(count)
        self.bucket_sums, self.bucket_counts = rest[:NUM_TIME_BUCKETS], rest[NUM_TIME_BUCKETS : 2 * NUM_TIME_BUCKETS]
        self.term_sums = dict(zip(names, rest[2 * NUM_TIME_BUCKETS :], strict=True))
