"""Times of the diffusion process: t = 0 is clean, t = 1 is noise. All times are float64 and stratified."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from braid.kernels import random

BOUND_TIME_MIN = 1e-5
"""Smallest time of bounds whose integrand is singular at t = 0."""
GOLDEN = (math.sqrt(5) - 1) / 2


def training_strata(
    key: int, first_ordinal: int, global_batch_size: int, ordinals: Tensor, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """Low-discrepancy u = (index + shift) / N in [0, 1) for the samples `ordinals` [B] of the global batch of N that
    begins at `first_ordinal`.

    One shift is shared by the global batch (unbiased, and the strata cover [0, 1) evenly), and the indices are a
    permutation of 0..N-1 drawn anew for each batch, so that every rank and micro-batch sees the whole range of times.
    Of several `groups`, the samples whose places in the batch agree modulo their number, each has every so many'th
    index, and so an even grid of its own.
    Returns index int64 [B] and shift float64 [B], on the device of `ordinals`.
    """
    position = ordinals - first_ordinal
    assert 0 <= int(position.min()) and int(position.max()) < global_batch_size, "ordinals outside this global batch"
    index = random.permutation(key, "strata", first_ordinal, n=global_batch_size)
    for group in range(groups if groups > 1 else 0):
        index[group::groups] = group + groups * index[group::groups].argsort().argsort()
    shift = random.coins(key, ordinals.new_tensor([first_ordinal]), which=SHIFT_COIN)
    return index.to(ordinals.device)[position], shift.expand(len(ordinals))


def second_strata(index: Tensor, shift: Tensor) -> Tensor:
    """A second low-discrepancy number in [0, 1) for the samples of a batch, float64 [B], independent of the strata
    (index + shift) / N: the golden-ratio sequence frac(index * golden + shift') over the batch's random order.

    shift' = frac(2^16 shift) are the shift's lower 16 bits, so every rank knows it. For a fixed index the pair is
    uniform on its stratum times [0, 1) (to 2^-16), and the N pairs together are a lattice that fills the square evenly.
    """
    return (index.double() * GOLDEN + shift * 2.0**16) % 1.0


def evaluation_strata(key: int, ordinals: Tensor, draw: int) -> tuple[Tensor, Tensor]:
    """Index and shift of draw number `draw`: u = (draw + shift) / draws is stratified over the draws of each sequence.

    The shift is independent between sequences, so a standard error over sequences is valid. Shapes as above.
    """
    return torch.full_like(ordinals, draw), random.coins(key, ordinals, which=SHIFT_COIN)


def to_range(strata: Tensor, smallest: float, largest: float = 1.0) -> Tensor:
    """Map u in [0, 1) to times in [smallest, largest)."""
    return smallest + (largest - smallest) * strata


def time_buckets(times: Tensor, num_buckets: int = 10) -> Tensor:
    """Index of the equal-width bucket of [0, 1] each time falls into; int64, same shape."""
    return (times * num_buckets).long().clamp_(0, num_buckets - 1)


SHIFT_COIN = 0
"""Coin number reserved for times; objectives number theirs from 1."""


def log_uniform_mixture(strata: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    """Times from an even mixture of the uniform and the log-uniform law on [smallest, 1], with their density.

    For integrands that grow like 1/t^2 near t = 0 (Gaussian bounds in x-prediction): divide by the density.
    Inverse of the mixture's distribution function by bisection in float64 (60 halvings: exact to rounding).
    Returns (times [B], density [B]).
    """
    span = -torch.log(torch.tensor(smallest, dtype=torch.float64))

    def distribution(t: Tensor) -> Tensor:
        return 0.5 * (t - smallest) / (1 - smallest) + 0.5 * (1 + torch.log(t) / span)

    low, high = torch.full_like(strata, smallest), torch.ones_like(strata)
    for _ in range(60):
        middle = (low + high) / 2
        below = distribution(middle) < strata
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    times = (low + high) / 2
    return times, 0.5 / (1 - smallest) + 0.5 / (times * span)
