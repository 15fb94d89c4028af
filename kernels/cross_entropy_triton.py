"""Cross-entropy and its gradient in Triton: one program for each row. See `cross_entropy.py`.

Exponentials are the device's fast ones: probabilities are right to 4e-6, relatively, down to e^-30 of the largest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_LOGITS = 4096
"""Logits that a program looks at together."""


@triton.jit
def cross_entropy_kernel(
    logits, targets, weights, largest_out, total_out, at_target_out, stride, left_out, z_loss,
    SIZE: tl.constexpr, STATISTICS: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    of_row, lanes = logits + row * stride, tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    infinite = float("inf")
    if STATISTICS:
        largest = tl.full([BLOCK], -3.4028234663852886e38, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, SIZE, BLOCK):
            token = start + lanes
            read = (token < SIZE) & (token != left_out)
            logit = tl.load(of_row + token, mask=read, other=-infinite).to(tl.float32)
            higher = tl.maximum(largest, logit)
            total = total * tl.exp(largest - higher) + tl.exp(logit - higher)
            largest = higher
        highest = tl.max(largest, 0)
        sum_of_all = tl.sum((total * tl.exp(largest - highest)).to(tl.float64), 0)
        here = (target >= 0) & (target != left_out) & (target < SIZE)
        at_target = tl.load(of_row + target, mask=here, other=0.0).to(tl.float32)
        at_target = tl.where(target < SIZE, at_target, float("nan"))
        tl.store(largest_out + row, highest)
        tl.store(total_out + row, sum_of_all)
        tl.store(at_target_out + row, tl.where((target >= 0) & (target == left_out), -infinite, at_target))
    else:
        highest = tl.load(largest_out + row)
        sum_of_all = tl.load(total_out + row)
    if GRADIENT:
        weight = tl.load(weights + row)
        lse = highest.to(tl.float64) + tl.log(sum_of_all)
        z_part = tl.where(z_loss == 0.0, 0.0, 2.0 * z_loss * lse)
        scale = (weight * (1.0 + z_part) / sum_of_all).to(tl.float32)
        for start in range(0, SIZE, BLOCK):
            token = start + lanes
            logit = tl.load(of_row + token, mask=token < SIZE, other=-infinite).to(tl.float32)
            gradient = tl.where(token == left_out, 0.0, scale * tl.exp(logit - highest))
            gradient = tl.where(token == target, gradient - weight, gradient)
            gradient = tl.where(weight == 0.0, 0.0, gradient)
            tl.store(of_row + token, gradient.to(logits.dtype.element_ty), mask=token < SIZE)


def cross_entropy_into(
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
) -> None:
    """`statistics` fills the last three, [M]; `gradient` reads them and overwrites the logits [M, V]."""
    rows, size = logits.shape
    if rows and size:
        block = min(MOST_LOGITS, max(16, triton.next_power_of_2(size)))
        with torch.cuda.device_of(logits):
            cross_entropy_kernel[(rows,)](
                logits, targets, weights, largest, total, at_target, logits.stride(0), left_out, z_loss,
                SIZE=size, STATISTICS=statistics, GRADIENT=gradient, BLOCK=block, num_warps=8,
            )  # fmt: skip
