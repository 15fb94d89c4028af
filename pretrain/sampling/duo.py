"""Ancestral sampling of processes whose tokens may change again: every position is drawn anew at each step.

x_s comes from the exact posterior given x_t and the network's prediction (see `diffusion.uniform`, `diffusion.hybrid`),
computed and drawn in float64. Temperature and nucleus act on the prediction, not on the posterior: there they would
favour staying, the more so the smaller the step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from braid.kernels import random
from braid.kernels.random import Stream, fold_key
from braid.kernels.sampling import ReverseStep
from braid.pretrain.diffusion.uniform import reverse_step, skip_mask
from braid.pretrain.objectives.base import Objective
from braid.pretrain.objectives.duo import Duo

from .draws import Draws
from .prompts import Prompt


def sample(objective: Duo, prompt: Prompt, draws: Draws) -> Tensor:
    """Tokens int64 [N, L], from any tokens alike at t = 1."""
    num_tokens, mask_id = objective.num_tokens, objective.mask_id
    start = random.integers(fold_key(draws.key, "start"), Stream.TOKEN, draws.ordinals, draws.positions, num_tokens)

    def reverse(t: float, s: float) -> ReverseStep:
        return reverse_step(1 - t, 1 - s, num_tokens)

    return ancestral(objective, prompt, draws, skip_mask(start, mask_id), reverse)


def ancestral(
    objective: Objective,
    prompt: Prompt,
    draws: Draws,
    start_NL: Tensor,
    reverse: Callable[[float, float], ReverseStep],
) -> Tensor:
    """From `start_NL` at t = 1 to tokens at t = 0, what the prompt knows held at every step; one call a step.

    `reverse(t, s)` is the step from t to s. With `greedy_final` the last one takes its most probable token.
    """
    settings = draws.settings
    tokens = torch.where(prompt.known, prompt.tokens, start_NL)
    times = draws.times(settings.steps)
    for step, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        draws.call()
        logits = objective.network(tokens, draws.batch_times(t)).logits
        tokens = redrawn(tokens, prompt, logits, objective.mask_id, reverse(t, s), s, step, draws)
        draws.frame(s, tokens)
        draws.progress(step + 1, settings.steps)
    return tokens


def redrawn(
    tokens: Tensor,
    prompt: Prompt,
    logits_NLV: Tensor,
    mask_id: int,
    reverse: ReverseStep,
    s: float,
    step: int,
    draws: Draws,
    unguided_NLV: Tensor | None = None,
) -> Tensor:
    """The tokens int64 [N, L] at time s: every one that the prompt does not know, drawn by the step `reverse`."""
    rows, columns = (~prompt.known).nonzero(as_tuple=True)
    drawn = draws.tokens(
        logits_NLV.flatten(0, 1),
        step,
        rows,
        columns,
        forbidden=mask_id,
        places_M=rows * draws.length + columns,
        unguided_RV=None if unguided_NLV is None else unguided_NLV.flatten(0, 1),
        reverse=reverse,
        noisy_M=tokens[rows, columns],
        greedy=draws.settings.greedy_final and s == 0,
    )
    return tokens.index_put((rows, columns), drawn)
