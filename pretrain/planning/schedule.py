"""How long a pipeline takes for a step, and how much of that its processes wait."""

from __future__ import annotations

from collections.abc import Sequence


def pipeline_seconds(stages: Sequence[float], num_micro_batches: int, virtual: int = 1) -> float:
    """Time of one step of 1F1B, or of the interleaved schedule with `virtual` > 1 pieces a stage.

    `stages`: time of each stage for one micro-batch, forward and backward. The slowest stage works without a pause
    once the first micro-batch has come to it, and the last one has to go through the others; interleaved stages begin
    after one piece instead of a whole stage (arXiv 2104.04473, 2.2). Exact for equal stages and where the last one is
    the slowest; a little long otherwise.
    """
    slowest = max(stages)
    return num_micro_batches * slowest + (sum(stages) - slowest) / virtual


def waiting_share(stages: Sequence[float], num_micro_batches: int, virtual: int = 1) -> float:
    """Share of the processes' time in which they have nothing to do: the bubble, and what uneven stages cost. With p
    equal stages (p - 1) / (v m + p - 1)."""
    busy = num_micro_batches * sum(stages)
    return 1 - busy / (len(stages) * pipeline_seconds(stages, num_micro_batches, virtual))
