"""Exponential moving average of the weights, in float32, by parameter name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """average <- d average + (1 - d) weight, with d = min(decay, (1 + step) / (10 + step)) so that short runs are not
    averages of their initialisation."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: p.detach().float().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """After optimizer step number `step` (from 1)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages = list(self.tensors.values())
        weights = [p.detach().float() for _, p in module.named_parameters()]
        torch._foreach_lerp_(averages, weights, 1 - decay)

    def load(self, tensors: dict[str, Tensor]) -> None:
        assert tensors.keys() == self.tensors.keys()
        for name, value in tensors.items():
            self.tensors[name].copy_(value)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Run the block with the averaged weights in `module`; the trained ones are back afterwards, bit for bit."""
        trained = {name: p.detach().clone() for name, p in module.named_parameters()}
        try:
            _copy(module, self.tensors)
            yield
        finally:
            _copy(module, trained)


@torch.no_grad()
def _copy(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        parameter.copy_(tensors[name])
