"""Draws of tokens in Triton, one program for each row: for GPUs where neither nvcc nor NVRTC is to be had. See
`sampling.py` for what is drawn, and csrc/sampling.h for the reasons of the screening.

Rows are read more often than by the compiled kernels, a block at a time: once for the largest logit and once for the
race, where only blocks that float32 leaves a chance are looked at in float64; a reverse step reads them once more for
the sum, a nucleus 36 times, to bisect the logit at which it ends and to find the last of the tokens that have it. Sums
of a nucleus are those of the compiled kernels: integers, whose order does not matter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from braid.kernels.noising_triton import NO_FUSION, philox
from braid.kernels.normals import as_key
from braid.kernels.random import Stream, fold_key
from braid.kernels.reference import LOW_WORDS

MOST_LOGITS = 512
"""Logits that a program looks at together."""
CATEGORICAL = tl.constexpr(int(Stream.CATEGORICAL) << 24)
TWO_44, TWO_52 = tl.constexpr(2.0**44), tl.constexpr(2.0**52)


@triton.jit
def _logits(logits, other, first, size, left_out, guidance, rest, BLOCK: tl.constexpr):
    """float32 [BLOCK] from the token `first` on; -inf where there is none to draw."""
    token = first + tl.arange(0, BLOCK)
    read = (token < size) & (token != left_out)
    values = tl.load(logits + token, mask=read, other=0.0).to(tl.float32)
    if other is not None:
        values = guidance * values + rest * tl.load(other + token, mask=read, other=0.0).to(tl.float32)
    return tl.where(read, values, -float("inf"))


@triton.jit
def _order(values):
    """Logits as integers of the same order, -0 as 0: int64 from 0 to 2^32."""
    bits = (values + 0.0).to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    return tl.where(bits >= 0x80000000, 0xFFFFFFFF - bits, bits + 0x80000000)


@triton.jit
def _weights(values, temperature, reference):
    """exp(logit / temperature - reference), float64."""
    return tl.exp(values.to(tl.float64) / temperature - reference)


@triton.jit
def _masses(values, temperature, reference):
    """The same in units of 2^-44, to nearest: int64."""
    scaled = _weights(values, temperature, reference) * TWO_44 + TWO_52
    return scaled.to(tl.int64, bitcast=True) & 0xFFFFFFFFFFFFF


@triton.jit
def _mass_from(
    order, logits, other, size, left_out, guidance, rest, temperature, reference, BLOCK: tl.constexpr
):  # fmt: skip
    """Of all tokens of this order or a higher one, int64."""
    total = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, size, BLOCK):
        values = _logits(logits, other, first, size, left_out, guidance, rest, BLOCK)
        total += tl.where(_order(values) >= order, _masses(values, temperature, reference), 0)
    return tl.sum(total, 0)


@triton.jit
def _end_of_nucleus(
    top_p, logits, other, size, left_out, guidance, rest, temperature, reference, BLOCK: tl.constexpr
):  # fmt: skip
    """(order, token): what is above the order is kept, and what has it up to that token."""
    target = top_p * _mass_from(
        tl.zeros((), tl.int64), logits, other, size, left_out, guidance, rest, temperature, reference, BLOCK
    ).to(tl.float64)  # fmt: skip
    low, high = tl.zeros((), tl.int64), tl.full((), 0x100000000, tl.int64)
    above, reached = tl.zeros((), tl.int64), tl.zeros((), tl.int64)  # masses from `high` and from `low` on
    for _ in range(33):
        middle = (low + high) // 2
        mass = _mass_from(middle, logits, other, size, left_out, guidance, rest, temperature, reference, BLOCK)
        is_enough = mass.to(tl.float64) >= target
        low, reached = tl.where(is_enough, middle, low), tl.where(is_enough, mass, reached)
        high, above = tl.where(is_enough, high, middle), tl.where(is_enough, above, mass)
    each = tl.zeros((), tl.int64)  # mass of one token of the order at which it ends
    for first in range(0, size, BLOCK):
        values = _logits(logits, other, first, size, left_out, guidance, rest, BLOCK)
        masses = tl.where(_order(values) == low, _masses(values, temperature, reference), 0)
        each = tl.maximum(each, tl.max(masses, 0))
    kept = tl.full((), 1, tl.int64)
    while (above + kept * each < reached) & ((above + kept * each).to(tl.float64) < target):
        kept += 1
    seen, last = tl.zeros((), tl.int64), tl.full((), -1, tl.int64)
    for first in range(0, size, BLOCK):
        values = _logits(logits, other, first, size, left_out, guidance, rest, BLOCK)
        equal = (_order(values) == low).to(tl.int64)
        number = seen + tl.cumsum(equal, 0)
        token = first + tl.arange(0, BLOCK).to(tl.int64)
        last = tl.maximum(last, tl.max(tl.where((equal > 0) & (number <= kept), token, -1), 0))
        seen += tl.sum(equal, 0)
    return low, last


@triton.jit
def _race_times(high, low):
    """float64 -log(1 - v), v = (high * 2^32 + low + 1/2) / 2^64, from the nearer end so that no digit is lost."""
    in_upper_half = high >= 0x80000000
    near_high = tl.where(in_upper_half, high ^ 0xFFFFFFFF, high).to(tl.float64)
    near_low = tl.where(in_upper_half, low ^ 0xFFFFFFFF, low).to(tl.float64)
    nearer = (near_high * 4294967296.0 + near_low + 0.5) * 5.421010862427522e-20
    left = 1.0 - nearer  # log1p(-x) = log(1 - x) * x / (x as 1 - x has it), where Triton has no log1p
    rounded = 1.0 - left
    log1p = tl.where(rounded == 0.0, -nearer, tl.log(left) * (nearer / tl.where(rounded == 0.0, 1.0, rounded)))
    return tl.where(in_upper_half, -tl.log(nearer), -log1p)


@triton.jit
def _words(key, position, ordinal, first, draw, BLOCK: tl.constexpr):
    """A 32-bit word for each of [BLOCK] tokens from `first` on, a multiple of 4."""
    blocks = ((first >> 2) + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    w0, w1, w2, w3 = philox(key, position, blocks | CATEGORICAL | (draw << 16), ordinal, blocks * 0)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def sampling_kernel(
    tokens, logits, other, rows, ordinals, positions, noisy, integers, numbers, guidance, rest, stride, size, draw,
    NUCLEUS: tl.constexpr, STEP: tl.constexpr, GREEDY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    position, ordinal = tl.load(positions + i), tl.load(ordinals + i)
    key, low_key, left_out = tl.load(integers), tl.load(integers + 1), tl.load(integers + 2)
    temperature, top_p, survival = tl.load(numbers), tl.load(numbers + 1), tl.load(numbers + 2)
    noise, mask, stays = tl.load(numbers + 3), tl.load(numbers + 4), tl.load(numbers + 5)
    is_open = True
    at, arrives = tl.full((), -1, tl.int64), tl.full((), 1.0, tl.float64)
    if STEP:
        at = tl.load(noisy + i)
        arrives = tl.load(numbers + tl.where(at == left_out, 6, 7))
        is_open = arrives != 0.0
    if is_open:
        row = i
        if rows is not None:
            row = tl.load(rows + i)
        logits += row * stride
        if other is not None:
            other += row * stride
        bad, largest = 0, -float("inf")
        for first in range(0, size, BLOCK):
            values = _logits(logits, other, first, size, left_out, guidance, rest, BLOCK)
            is_bad = (values != values) | (values == float("inf"))
            bad = tl.maximum(bad, tl.max(is_bad.to(tl.int32), 0))
            largest = tl.maximum(largest, tl.max(tl.where(is_bad, -float("inf"), values), 0))
        best_token = tl.full((), -1, tl.int64)
        if (bad == 0) & (largest > -float("inf")):
            reference = largest.to(tl.float64) / temperature
            ending, last = tl.full((), -1, tl.int64), tl.full((), -1, tl.int64)
            if NUCLEUS:
                ending, last = _end_of_nucleus(
                    top_p, logits, other, size, left_out, guidance, rest, temperature, reference, BLOCK
                )
            slope, floor = tl.full((), 1.0, tl.float64), tl.full((), 0.0, tl.float64)
            if STEP:
                total = tl.zeros((BLOCK,), tl.float64)
                for first in range(0, size, BLOCK):
                    values = _logits(logits, other, first, size, left_out, guidance, rest, BLOCK)
                    token, order = first + tl.arange(0, BLOCK), _order(values)
                    kept = (order > ending) | ((order == ending) & (token <= last))
                    total += tl.where(kept, _weights(values, temperature, reference), 0.0)
                slope, floor = survival / tl.sum(total, 0), noise
            best = tl.full((), 1e300, tl.float64)
            temperature32 = tl.maximum(temperature.to(tl.float32), 1e-30)
            for first in range(0, size, BLOCK):
                values = _logits(logits, other, first, size, left_out, guidance, rest, BLOCK)
                token, order = first + tl.arange(0, BLOCK), _order(values)
                kept = (order > ending) | ((order == ending) & (token <= last))
                high = _words(key, position, ordinal, first, draw, BLOCK)
                # About the weight, not below it by more than 2^-11 of itself: none of what can still win is left out.
                about = tl.exp((values - largest) / temperature32).to(tl.float64)
                about = (slope * tl.where(kept, about, 0.0) + floor) * arrives
                may_win = high.to(tl.float64) * 2.3283064365386963e-10 <= best * about * 1.00048828125
                if STEP:
                    may_win |= (token == left_out) | (token == at)
                if GREEDY or tl.max((may_win & (token < size)).to(tl.int32), 0) > 0:
                    weight = tl.where(kept, _weights(values, temperature, reference), 0.0)
                    if STEP:
                        weight = slope * weight + floor
                        weight = tl.where(token == left_out, mask, weight)
                        weight = weight * arrives + tl.where(token == at, stays * weight, 0.0)
                    time = tl.full((BLOCK,), 1.0, tl.float64)
                    if not GREEDY:
                        time = _race_times(high, _words(low_key, position, ordinal, first, draw, BLOCK))
                    runs = (token < size) & (weight > 0.0)
                    time = tl.where(runs, time / tl.where(runs, weight, 1.0), float("inf"))
                    earliest = tl.min(time, 0)
                    if earliest < best:
                        best = earliest
                        best_token = tl.min(tl.where(time == earliest, token, size), 0).to(tl.int64)
        tl.store(tokens + i, best_token)
    else:
        tl.store(tokens + i, at)


def sample_into(
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
    *step: float,
) -> None:
    """Fills `tokens` [N], with -1 where a row has no distribution; `key` is a signed integer, `left_out` -1 where every
    token may come."""
    size, device = logits.shape[1], logits.device
    low_key = int(as_key(fold_key(key % (1 << 64), LOW_WORDS)))
    integers = torch.tensor([key, low_key, left_out], device=device)
    numbers = torch.tensor([temperature, top_p, *step], dtype=torch.float64, device=device)
    sampling_kernel[(len(tokens),)](
        tokens, logits, other, rows, ordinals, positions, noisy, integers, numbers, guidance, 1 - guidance,
        logits.stride(0), size, draw, NUCLEUS=top_p < 1, STEP=noisy is not None, GREEDY=greedy,
        BLOCK=min(MOST_LOGITS, max(16, triton.next_power_of_2(size))), **NO_FUSION,
    )  # fmt: skip
