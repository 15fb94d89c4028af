"""Draws of tokens in plain torch operations, in float64: what the compiled ones must draw too. See `sampling.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from braid.kernels import random

CHUNK = 1 << 25
"""Logits looked at in float64 at a time: a quarter of a GB for each of the few tensors made of them."""


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
    """Fills `tokens` [N]; `key` is a signed integer, `left_out` -1 where every token may come."""
    drawn = torch.arange(len(tokens), device=tokens.device)
    places = drawn if rows is None else rows
    if noisy is not None:  # where nothing arrives, the token stays
        *_, arrives_at_mask, arrives = step
        tokens.copy_(noisy)
        drawn = torch.where(noisy == left_out, arrives_at_mask, arrives).nonzero().squeeze(1)
    for part in drawn.split(max(1, CHUNK // logits.shape[1])):
        chosen = logits[places[part]].float()
        if other is not None:
            chosen = guidance * chosen + (1 - guidance) * other[places[part]].float()
        law = tempered(chosen, temperature, top_p, left_out)
        if noisy is not None:
            law = log_posterior(law.softmax(-1), noisy[part], left_out, *step)
        if greedy:
            tokens[part] = law.argmax(-1)
        else:
            tokens[part] = random.categorical(key % (1 << 64), law, ordinals[part], positions[part], draw=draw)


def tempered(logits_NV: Tensor, temperature: float, top_p: float, left_out: int) -> Tensor:
    """Logits after temperature and nucleus, float64, -inf at the token that is left out."""
    law = logits_NV.double()
    if left_out >= 0:
        law[:, left_out] = -torch.inf
    law = law / temperature
    return nucleus(law, top_p) if top_p < 1.0 else law


def nucleus(logits_NV: Tensor, top_p: float) -> Tensor:
    """Keep, per row, the smallest set of most probable tokens whose mass reaches `top_p`; -inf elsewhere."""
    ordered, order = logits_NV.sort(dim=-1, descending=True, stable=True)
    mass = ordered.double().softmax(-1)
    beyond = mass.cumsum(-1) - mass >= top_p  # the mass before a token already suffices
    return logits_NV.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))


def log_posterior(
    probabilities_NV: Tensor,
    noisy_N: Tensor,
    mask_id: int,
    survival: float,
    noise: float,
    mask: float,
    stays: float,
    arrives_at_mask: float,
    arrives: float,
) -> Tensor:
    """log p(x_s | x_t = noisy) up to a constant of each row, [N, V] in the probabilities' precision: `ReverseStep`."""
    weights_NV = survival * probabilities_NV + noise
    weights_NV[:, mask_id] = mask
    stays_N1 = stays * weights_NV.gather(1, noisy_N[:, None])
    arrives_N1 = torch.where(noisy_N == mask_id, weights_NV.new_tensor(arrives_at_mask), arrives)[:, None]
    return (weights_NV * arrives_N1).scatter_add_(1, noisy_N[:, None], stays_N1).log_()
