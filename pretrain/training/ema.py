"""Exponential moving average of the weights that are trained, in float32, divided among processes as the engine's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from braid.parallel.engine import Engine


class EMA:
    """average <- d average + (1 - d) weight, with d = min(decay, (1 + step) / (10 + step)) so that short runs are not
    averages of their initialisation."""

    def __init__(self, engine: Engine, decay: float) -> None:
        self.engine, self.decay = engine, decay
        self.averages = self._copies()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step number `step` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for numbers in self.engine.present():
            weights = [self.engine.held[number].detach().float() for number in numbers]
            torch._foreach_lerp_([self.averages[number] for number in numbers], weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run the block with the averaged weights in the model; the trained ones are back afterwards, bit for bit."""
        trained = self._copies()
        try:
            self._hold(self.averages)
            yield
        finally:
            self._hold(trained)

    @torch.no_grad()
    def _hold(self, values: Sequence[Tensor]) -> None:
        with self.engine.writing() as held:
            for numbers in self.engine.present():
                for number in numbers:
                    held[number].copy_(values[number])

    def _copies(self) -> list[Tensor]:
        """Of the weights; in memory, where the engine keeps them on a disk."""
        held = self.engine.held
        return [held[number].detach().float().clone() for numbers in self.engine.present() for number in numbers]
