"""Linear layers of the blocks in 8-bit floating point, by Transformer Engine (written for its version 2.20).

Weights stay float32 and have the names they had: a checkpoint does not know of fp8. In training a layer's input, its
weight and the gradient of its output are rounded to 8 bits, each tensor scaled by its own largest value. There is no
history of largest values: a layer may be used twice in a step or run again (recomputation), and a resumed run continues
as it would have. Without gradients the layer is torch's.
"""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from braid.kernels.capabilities import require
from braid.kernels.errors import BraidError


class FP8Linear(nn.Module):
    """A linear layer with the parameters of `whole`."""

    def __init__(self, whole: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = whole.in_features, whole.out_features
        self.weight = whole.weight
        self.register_parameter("bias", whole.bias)
        self._product: tuple = ()  # in a tuple its layer is no sub-module, and its state is not this layer's

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return F.linear(x, self.weight, self.bias)
        if not self._product:
            self._product = self._make_product()
        layer, autocast, scaling = self._product
        with autocast(enabled=True, recipe=scaling):
            return layer(x)

    def _make_product(self) -> tuple:
        """Transformer Engine's layer on this layer's own parameters, its context, and how tensors are scaled in it."""
        engine, recipes = require("transformer-engine"), importlib.import_module("transformer_engine.common.recipe")
        layer = engine.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            params_dtype=self.weight.dtype,
            device=self.weight.device,
        )
        layer.weight = self.weight
        if self.bias is not None:
            layer.bias = self.bias
        return layer, engine.autocast, recipes.Float8CurrentScaling()


def use_fp8(network: nn.Module) -> None:
    """Replace the linear layers that the blocks of `network` call `divided`: those of attention and MLP."""
    for owner in list(network.blocks.modules()):
        for name in getattr(owner, "divided", {}):
            owner.set_submodule(name, FP8Linear(owner.get_submodule(name)))


def require_fp8() -> None:
    """BraidError where Transformer Engine is not there, or this GPU has no products in fp8."""
    engine = require("transformer-engine")
    if not hasattr(engine, "autocast"):
        works, reason = False, "this Transformer Engine is older than its function autocast"
    else:
        works, reason = engine.is_fp8_available(return_reason=True)
    if not works:
        raise BraidError("accelerators.linears = 'transformer-engine' needs fp8", reason, "accelerators.linears=torch")
