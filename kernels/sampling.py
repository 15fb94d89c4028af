"""Exact draws of tokens from logits, in one pass over them and without copies of them.

`draw_tokens` draws from softmax(logits), or from the reverse step of a diffusion process whose clean token that
predicts. The draw is the race of the noise contract (`random.categorical`), decided in float64 with 64-bit uniforms;
everything from the logits on is float64, whichever implementation runs (`dispatch`). They draw the same tokens unless

- the two best finish within some 1e-14 of each other, relatively: libraries round logarithms differently, and the sum
  that makes probabilities of a reverse step depends on its order,
- a nucleus ends within 1e-9 of `top_p`: its masses are summed in units of 2^-44 (compiled, Triton) or in order (eager).

Compiled, a token is looked at in float64 only where float32 bounds leave it a chance. A draw takes one pass, a reverse
step one more for the sum of exponentials (in float32, and again in float64 only where two tokens finish within 2^-14 of
each other), a nucleus five more: the largest logit, three digits of the logit at which it ends, and equal ones there.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from braid.kernels import dispatch, random


@dataclass(frozen=True)
class ReverseStep:
    """p(x_s | x_t) of a token for a step from t to an earlier s, given predicted probabilities p of the clean one.

    Bayes' rule: w = survival p + noise, and w = mask at the mask, is the predicted law of x_s; q(x_t | x_s) is
    `arrives` (`arrives_at_mask` where x_t is the mask) for every x_s, and `stays` on top where x_s = x_t.
    """

    survival: float
    noise: float
    mask: float
    stays: float
    arrives_at_mask: float
    arrives: float


ONE_STEP = ReverseStep(1.0, 0.0, 0.0, 0.0, 1.0, 1.0)
"""Draws the clean token."""


def draw_tokens(
    key: int,
    logits: Tensor,
    ordinals: Tensor,
    positions: Tensor,
    *,
    rows: Tensor | None = None,
    other: Tensor | None = None,
    guidance: float = 1.0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    left_out: int | None = None,
    step: ReverseStep | None = None,
    noisy: Tensor | None = None,
    greedy: bool = False,
    draw: int = 0,
) -> Tensor:
    """Token ids int64 [N] for ordinals and positions int64 [N], from `logits` [R, V]: from the rows numbered by `rows`
    int64 [N], or all of them in order.

    In this order: guidance * logits + (1 - guidance) * other, in float32, where `other` [R, V] is given; no probability
    for the token `left_out`; division by `temperature`; the smallest set of most probable tokens whose mass reaches
    `top_p`; softmax; where `step` is given, its law for x_t = `noisy` int64 [N], of which `left_out` is the mask. Rows
    where nothing can change are not read. `greedy` takes the most probable token of that law.

    Raises BraidError if V > 262,144 or if a row has NaN, +inf or nothing but -inf.
    """
    assert (step is None) == (noisy is None) and temperature > 0 and top_p > 0
    random.check_vocabulary_size(logits.shape[1])
    tokens = torch.empty_like(ordinals)
    if not len(tokens):
        return tokens
    logits, other = _readable(logits.detach()), None if other is None else _readable(other.detach())
    if other is not None and (other.dtype, other.stride()) != (logits.dtype, logits.stride()):
        logits, other = logits.float().contiguous(), other.float().contiguous()
    functions = dispatch.functions("sampling", logits.device)
    functions.sample_into(
        tokens, logits, other, None if rows is None else rows.contiguous(), _signed(key),
        ordinals.contiguous(), positions.contiguous(), guidance, temperature, top_p,
        -1 if left_out is None else left_out, draw, greedy, None if noisy is None else noisy.contiguous(),
        *astuple(step or ONE_STEP),
    )  # fmt: skip
    if (tokens < 0).any():
        row = int((tokens < 0).nonzero()[0])
        refused = logits[row if rows is None else int(rows[row])].float()
        if other is not None:
            refused = guidance * refused + (1 - guidance) * other[row if rows is None else int(rows[row])].float()
        if left_out is not None:
            refused[left_out] = -torch.inf
        raise random.no_distribution(float(refused.amax()))
    return tokens


def _readable(logits: Tensor) -> Tensor:
    """float32 or bfloat16, the elements of a row side by side."""
    if logits.dtype not in (torch.float32, torch.bfloat16):
        logits = logits.float()
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _signed(key: int) -> int:
    return key - (1 << 64) if key >> 63 else key
