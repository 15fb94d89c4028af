"""Joint noising and plain normals in Triton: for GPUs where neither nvcc nor NVRTC is to be had.

The same counters, tables and roundings as everywhere (see `random.py`); products and sums must not be fused, so every
kernel is launched with NO_FUSION. One program works on one position.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from braid.kernels import normal_table

NO_FUSION = {"enable_fp_fusion": False}
MOST_BLOCKS = 64
"""Blocks of four channels that a program draws at a time."""


@triton.jit
def philox(key, position, word, ordinal, zeros):
    """The four words, uint32 in the shape of `zeros`."""
    c0 = zeros + (position & 0xFFFFFFFF).to(tl.uint32)
    c2 = zeros + (ordinal & 0xFFFFFFFF).to(tl.uint32)
    c3 = zeros + ((ordinal >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(key, c0, zeros + word, c2, c3, 10)


@triton.jit
def _normals(key, position, ordinal, draw, first_block, table, BLOCKS: tl.constexpr):
    """float32 [4 BLOCKS], from the block `first_block` on."""
    blocks = (first_block + tl.arange(0, BLOCKS)).to(tl.uint32) & 0xFFFF
    word = blocks | (2 << 24) | (draw << 16)
    w0, w1, w2, w3 = philox(key, position, word, ordinal, blocks * 0)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    x = ((words << 1) | 1).to(tl.float32)
    segment = (x.to(tl.uint32, bitcast=True) >> 17).to(tl.int32) - (127 << 6)
    magnitude = tl.load(table + 2 * segment) + tl.load(table + 2 * segment + 1) * x
    return (magnitude.to(tl.uint32, bitcast=True) ^ (words & 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def _store(to, values, mask, IN_BFLOAT16: tl.constexpr):
    """To nearest, ties to even."""
    if IN_BFLOAT16:
        bits = values.to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        rounded = tl.where(values == values, rounded, 0x7FC0).to(tl.uint16)
        tl.store(to, rounded.to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(to, values, mask=mask)


@triton.jit
def normals_kernel(
    out, key, ordinals, positions, table, length, channels, positions_row_stride, first_channel, draw,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    row, column = i // length, i % length
    skipped = first_channel % 4
    for start in range(0, skipped + channels, 4 * BLOCKS):
        position = tl.load(positions + row * positions_row_stride + column)
        block = (first_channel + start) // 4
        drawn = _normals(tl.load(key), position, tl.load(ordinals + row), draw, block, table, BLOCKS)
        channel = start - skipped + tl.arange(0, 4 * BLOCKS)
        tl.store(out + i * channels + channel, drawn, mask=(channel >= 0) & (channel < channels))


@triton.jit
def noising_kernel(
    tokens, vectors, key, ordinals, positions, keep, weights_by_kind,
    mask_below, mask_below_row, mask_below_column, noise_below, noise_below_row, noise_below_column,
    alpha, alpha_row, alpha_column, sigma, sigma_row, sigma_column,
    alpha_corrupted, alpha_corrupted_row, alpha_corrupted_column,
    sigma_corrupted, sigma_corrupted_row, sigma_corrupted_column,
    latents, noised_tokens, kinds, eps, weights, table,
    length, channels, positions_row_stride, mask_id, num_tokens, first_channel, word, draw,
    FROM_TABLE: tl.constexpr, EMBED_NOISED: tl.constexpr, IN_BFLOAT16: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    row, column = i // length, i % length
    position, ordinal, key = (
        tl.load(positions + row * positions_row_stride + column), tl.load(ordinals + row), tl.load(key)
    )  # fmt: skip
    source = i
    kind = 0
    if tokens is not None:
        token = tl.load(tokens + i)
        noised = token
        if (mask_below is not None) or (noise_below is not None):
            zeros = tl.zeros((1,), tl.uint32)
            w0, w1, w2, w3 = philox(key, position, zeros | (1 << 24) | (draw << 16), ordinal, zeros)
            decider = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
            u = tl.sum((decider >> 8).to(tl.float32) * 5.9604644775390625e-08)
            free = True
            if keep is not None:
                free = tl.load(keep + i) == 0
            if noise_below is not None:
                replacement = (tl.sum(w1.to(tl.uint64)).to(tl.int64) * num_tokens) >> 32
                replacement += (replacement >= mask_id).to(tl.int64)
                threshold = tl.load(noise_below + row * noise_below_row + column * noise_below_column)
                hit = (u < threshold) & free
                noised = tl.where(hit, replacement, noised)
                kind = tl.where(hit, 2, kind)
            if mask_below is not None:
                hit = (u < tl.load(mask_below + row * mask_below_row + column * mask_below_column)) & free
                noised = tl.where(hit, mask_id, noised)
                kind = tl.where(hit, 1, kind)
        tl.store(noised_tokens + i, noised)
        tl.store(kinds + i, kind)
        if weights is not None:
            tl.store(weights + i, tl.load(weights_by_kind + 3 * row + kind))
        if FROM_TABLE:
            source = noised if EMBED_NOISED else token
    if vectors is not None:
        a = tl.load(alpha + row * alpha_row + column * alpha_column)
        s = tl.load(sigma + row * sigma_row + column * sigma_column)
        if alpha_corrupted is not None:
            other_a = tl.load(alpha_corrupted + row * alpha_corrupted_row + column * alpha_corrupted_column)
            other_s = tl.load(sigma_corrupted + row * sigma_corrupted_row + column * sigma_corrupted_column)
            a = tl.where(kind == 0, a, other_a)
            s = tl.where(kind == 0, s, other_s)
        skipped = first_channel % 4
        for start in range(0, skipped + channels, 4 * BLOCKS):
            drawn = _normals(key, position, ordinal, draw, (first_channel + start) // 4, table, BLOCKS)
            channel = start - skipped + tl.arange(0, 4 * BLOCKS)
            inside = (channel >= 0) & (channel < channels)
            clean = tl.load(vectors + source * channels + channel, mask=inside, other=0.0).to(tl.float32)
            _store(latents + i * channels + channel, a * clean + s * drawn, inside, IN_BFLOAT16)
            if eps is not None:
                tl.store(eps + i * channels + channel, drawn, mask=inside)


@triton.jit
def noising_backward_kernel(
    latents_gradient, sources, kinds, vectors, key, ordinals, positions,
    alpha, alpha_row, alpha_column, alpha_corrupted, alpha_corrupted_row, alpha_corrupted_column,
    vectors_gradient, table_gradient, alpha_gradient, sigma_gradient, table,
    length, channels, positions_row_stride, first_channel, draw,
    FROM_TABLE: tl.constexpr, IN_BFLOAT16: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    row, column = i // length, i % length
    a = tl.load(alpha + row * alpha_row + column * alpha_column)
    if alpha_corrupted is not None:
        if kinds is not None:
            other = tl.load(alpha_corrupted + row * alpha_corrupted_row + column * alpha_corrupted_column)
            a = tl.where(tl.load(kinds + i) == 0, a, other)
    source = i
    if FROM_TABLE:
        source = tl.load(sources + i)
    of_alpha = tl.zeros((4 * BLOCKS,), tl.float32)
    of_sigma = tl.zeros((4 * BLOCKS,), tl.float32)
    skipped = first_channel % 4
    for start in range(0, skipped + channels, 4 * BLOCKS):
        channel = start - skipped + tl.arange(0, 4 * BLOCKS)
        inside = (channel >= 0) & (channel < channels)
        gradient = tl.load(latents_gradient + i * channels + channel, mask=inside, other=0.0).to(tl.float32)
        if vectors_gradient is not None:
            _store(vectors_gradient + i * channels + channel, a * gradient, inside, IN_BFLOAT16)
        if table_gradient is not None:
            tl.atomic_add(table_gradient + source * channels + channel, a * gradient, mask=inside)
        if alpha_gradient is not None:
            clean = tl.load(vectors + source * channels + channel, mask=inside, other=0.0).to(tl.float32)
            of_alpha += gradient * clean
        if sigma_gradient is not None:
            position = tl.load(positions + row * positions_row_stride + column)
            block = (first_channel + start) // 4
            of_sigma += gradient * _normals(tl.load(key), position, tl.load(ordinals + row), draw, block, table, BLOCKS)
    if alpha_gradient is not None:
        tl.store(alpha_gradient + i, tl.sum(of_alpha))
    if sigma_gradient is not None:
        tl.store(sigma_gradient + i, tl.sum(of_sigma))


# -- the functions of an implementation (see dispatch.py) ----------------------------------------------------------


@cache
def _table(device: torch.device) -> Tensor:
    """float32 [2049, 2]."""
    return torch.from_numpy(normal_table.load()).to(device)


def _blocks(first_channel: int, channels: int) -> int:
    return min(MOST_BLOCKS, triton.next_power_of_2(-(-(first_channel % 4 + channels) // 4)))


def _strided(x: Tensor | None) -> tuple[Tensor | None, int, int]:
    return (None, 0, 0) if x is None else (x, *x.stride())


def _is_bfloat16(x: Tensor | None) -> bool:
    return x is not None and x.dtype == torch.bfloat16


def normals_into(out: Tensor, key: Tensor, ordinals: Tensor, positions: Tensor, first_channel: int, draw: int) -> None:
    rows, length, channels = out.shape
    normals_kernel[(rows * length,)](
        out, key.to(out.device), ordinals, positions, _table(out.device), length, channels,
        length if positions.ndim == 2 else 0, first_channel, draw, BLOCKS=_blocks(first_channel, channels), **NO_FUSION,
    )  # fmt: skip


def noise_into(
    tokens: Tensor | None,
    vectors: Tensor | None,
    key: Tensor,
    ordinals: Tensor,
    positions: Tensor,
    keep: Tensor | None,
    weights_by_kind: Tensor | None,
    mask_below: Tensor | None,
    noise_below: Tensor | None,
    alpha: Tensor | None,
    sigma: Tensor | None,
    alpha_corrupted: Tensor | None,
    sigma_corrupted: Tensor | None,
    mask_id: int,
    num_tokens: int,
    first_channel: int,
    word: int,
    draw: int,
    embed_noised: bool,
    latents: Tensor | None,
    noised_tokens: Tensor | None,
    kind: Tensor | None,
    eps: Tensor | None,
    weights: Tensor | None,
) -> None:
    rows, length = tokens.shape if tokens is not None else latents.shape[:2]
    channels = 1 if vectors is None else vectors.shape[-1]
    keep = None if keep is None else keep.view(torch.uint8)
    noising_kernel[(rows * length,)](
        tokens, vectors, key.to(ordinals.device), ordinals, positions, keep, weights_by_kind, *_strided(mask_below),
        *_strided(noise_below), *_strided(alpha), *_strided(sigma), *_strided(alpha_corrupted),
        *_strided(sigma_corrupted), latents, noised_tokens, kind, eps, weights, _table(ordinals.device), length,
        channels, length if positions.ndim == 2 else 0, mask_id, num_tokens, first_channel, word, draw,
        FROM_TABLE=vectors is not None and vectors.ndim == 2, EMBED_NOISED=embed_noised,
        IN_BFLOAT16=_is_bfloat16(latents), BLOCKS=_blocks(first_channel, channels), **NO_FUSION,
    )  # fmt: skip


def noise_backward_into(
    latents_gradient: Tensor,
    sources: Tensor | None,
    kind: Tensor | None,
    order: Tensor | None,
    vectors: Tensor,
    key: Tensor,
    ordinals: Tensor,
    positions: Tensor,
    alpha: Tensor,
    alpha_corrupted: Tensor | None,
    first_channel: int,
    draw: int,
    vectors_gradient: Tensor | None,
    table_gradient: Tensor | None,
    partials: Tensor | None,
    alpha_gradient: Tensor | None,
    sigma_gradient: Tensor | None,
) -> None:
    rows, length, channels = latents_gradient.shape
    noising_backward_kernel[(rows * length,)](
        latents_gradient, sources, kind, vectors, key.to(ordinals.device), ordinals, positions, *_strided(alpha),
        *_strided(alpha_corrupted), vectors_gradient, table_gradient if order is None else None, alpha_gradient,
        sigma_gradient, _table(ordinals.device), length, channels, length if positions.ndim == 2 else 0, first_channel,
        draw, FROM_TABLE=vectors.ndim == 2, IN_BFLOAT16=_is_bfloat16(vectors),
        BLOCKS=_blocks(first_channel, channels), **NO_FUSION,
    )  # fmt: skip
    if table_gradient is not None and order is not None:  # in a fixed order: torch's, where it is told to
        if alpha_corrupted is not None:
            alpha = torch.where(kind == 0, alpha, alpha_corrupted)
        scaled = alpha[..., None] * latents_gradient.float()
        table_gradient.index_add_(0, sources.flatten(), scaled.flatten(0, 1))
