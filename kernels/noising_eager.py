"""Joint noising in plain torch operations: the implementation where nothing else works, built on `random.py`.

The functions have the arguments of the compiled ones (csrc/noising_binding.cpp) and fill the tensors they are given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from braid.kernels import normals, random
from braid.kernels.random import Stream


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
    if tokens is not None:
        _corrupt(
            tokens, normals.as_int(key), ordinals, positions, keep, mask_below, noise_below, mask_id, num_tokens, word,
            draw, noised_tokens, kind,
        )  # fmt: skip
        if weights is not None:
            weights.copy_(weights_by_kind.gather(1, kind.long()))
    if latents is None:
        return
    drawn = torch.empty_like(latents, dtype=torch.float32) if eps is None else eps
    random.normals_into(drawn, key, ordinals, positions, first_channel, draw)
    clean = vectors if vectors.ndim == 3 else vectors[noised_tokens if embed_noised else tokens]
    alpha, sigma = (_chosen(*pair, kind) for pair in ((alpha, alpha_corrupted), (sigma, sigma_corrupted)))
    latents.copy_(alpha[..., None] * clean.float() + sigma[..., None] * drawn)


def _corrupt(
    tokens: Tensor,
    key: int,
    ordinals: Tensor,
    positions: Tensor,
    keep: Tensor | None,
    mask_below: Tensor | None,
    noise_below: Tensor | None,
    mask_id: int,
    num_tokens: int,
    word: int,
    draw: int,
    noised_tokens: Tensor,
    kind: Tensor,
) -> None:
    noised_tokens.copy_(tokens)
    kind.zero_()
    u = random.uniform(key, Stream.TOKEN, ordinals, positions, draw=draw, word=word)
    free = torch.ones_like(tokens, dtype=torch.bool) if keep is None else ~keep
    if noise_below is not None:
        replaced = (u < noise_below) & free
        drawn = random.integers(key, Stream.TOKEN, ordinals, positions, num_tokens, draw=draw)
        noised_tokens.copy_(torch.where(replaced, drawn + (drawn >= mask_id), noised_tokens))
        kind.masked_fill_(replaced, 2)
    if mask_below is not None:
        masked = (u < mask_below) & free
        noised_tokens.masked_fill_(masked, mask_id)
        kind.masked_fill_(masked, 1)


def _chosen(own: Tensor, of_corrupted: Tensor | None, kind: Tensor | None) -> Tensor:
    """The coefficient of each position, [B, L]."""
    return own if of_corrupted is None or kind is None else torch.where(kind == 0, own, of_corrupted)


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
    gradient = latents_gradient.float()
    scaled = _chosen(alpha, alpha_corrupted, kind)[..., None] * gradient
    if vectors_gradient is not None:
        vectors_gradient.copy_(scaled)
    if table_gradient is not None:  # in the order of positions on the CPU, and where torch is told to on CUDA
        table_gradient.index_add_(0, sources.flatten(), scaled.flatten(0, 1))
    if alpha_gradient is not None:
        clean = vectors if vectors.ndim == 3 else vectors[sources]
        alpha_gradient.copy_((gradient * clean.float()).sum(-1))
    if sigma_gradient is not None:
        eps = torch.empty_like(gradient)
        random.normals_into(eps, key, ordinals, positions, first_channel, draw)
        sigma_gradient.copy_((gradient * eps).sum(-1))
