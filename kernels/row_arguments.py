"""The structures of csrc/sampling.h and csrc/cross_entropy.h, filled from tensors: see `arguments.py`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

ADDRESS, INT64, INT32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
FLOAT, DOUBLE = ctypes.c_float, ctypes.c_double


class SamplingArguments(ctypes.Structure):
    _fields_ = [
        ("logits", ADDRESS), ("other", ADDRESS), ("rows", ADDRESS), ("ordinals", ADDRESS), ("positions", ADDRESS),
        ("noisy", ADDRESS), ("tokens", ADDRESS),
        ("key", INT64), ("count", INT64), ("size", INT64), ("logits_stride", INT64), ("left_out", INT64),
        ("temperature", DOUBLE), ("top_p", DOUBLE),
        ("survival", DOUBLE), ("noise", DOUBLE), ("mask", DOUBLE), ("stays", DOUBLE), ("arrives_at_mask", DOUBLE),
        ("arrives", DOUBLE),
        ("guidance", FLOAT), ("rest", FLOAT), ("draw", INT32), ("greedy", INT32), ("bfloat16", INT32),
    ]  # fmt: skip


def sampling(
    tokens: Tensor,
    logits: Tensor,
    other: Tensor | None,
    rows: Tensor | None,
    key: int,
    ordinals: Tensor,
    positions: Tensor,
    guidance: float,
    temperature: float,
    top_p: float,
    left_out: int,
    draw: int,
    greedy: bool,
    noisy: Tensor | None,
    survival: float,
    noise: float,
    mask: float,
    stays: float,
    arrives_at_mask: float,
    arrives: float,
) -> SamplingArguments:
    """Of `sample_into`."""
    return SamplingArguments(
        *map(address, (logits, other, rows, ordinals, positions, noisy, tokens)),
        key, len(tokens), logits.shape[1], logits.stride(0), left_out, temperature, top_p,
        survival, noise, mask, stays, arrives_at_mask, arrives,
        guidance, 1 - guidance, draw, greedy, logits.dtype == torch.bfloat16,
    )  # fmt: skip


class CrossEntropyArguments(ctypes.Structure):
    _fields_ = [
        ("logits", ADDRESS), ("targets", ADDRESS), ("weights", ADDRESS), ("largest", ADDRESS), ("total", ADDRESS),
        ("at_target", ADDRESS), ("rows", INT64), ("size", INT64), ("stride", INT64), ("left_out", INT64),
        ("z_loss", FLOAT), ("statistics", INT32), ("gradient", INT32), ("bfloat16", INT32),
    ]  # fmt: skip


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    z_loss: float,
    left_out: int,
    statistics: bool,
    gradient: bool,
    largest: Tensor,
    total: Tensor,
    at_target: Tensor,
) -> CrossEntropyArguments:
    """Of `cross_entropy_into`."""
    return CrossEntropyArguments(
        *map(address, (logits, targets, weights, largest, total, at_target)), *logits.shape, logits.stride(0), left_out,
        z_loss, statistics, gradient, logits.dtype == torch.bfloat16,
    )  # fmt: skip


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
