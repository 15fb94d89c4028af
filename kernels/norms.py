"""LayerNorm and RMSNorm with a weight and no bias, in float32 whatever autocast says, by torch or by apex."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from braid.kernels.capabilities import require

LAYER_EPS = 1e-5
_apex: ModuleType | None = None


def use_norms(library: str) -> None:
    """Which library computes norms in this process from now on: `torch` or `apex`. BraidError, saying how to install
    it, where it is not there."""
    global _apex
    _apex = None
    if library == "apex":
        require("apex")
        _apex = importlib.import_module("apex.normalization.fused_layer_norm")


def layer_norm(x: Tensor, weight: Tensor) -> Tensor:
    """(x - mean) / deviation * weight over the last dimension, float32."""
    x, weight = x.float(), weight.float()
    if _apex is None or not x.is_cuda:
        return F.layer_norm(x, weight.shape, weight, eps=LAYER_EPS)
    with torch.autocast("cuda", enabled=False):  # it would cast to bf16
        # Its kernel wants a bias; that of zeros gets no gradient.
        return _apex.fused_layer_norm_affine(x, weight, torch.zeros_like(weight), weight.shape, LAYER_EPS)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, float32."""
    x, weight = x.float(), weight.float()
    if _apex is None or not x.is_cuda:
        return F.rms_norm(x, weight.shape, weight, eps)
    with torch.autocast("cuda", enabled=False):
        return _apex.fused_rms_norm_affine(x, weight, weight.shape, eps)
