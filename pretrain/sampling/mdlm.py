"""Ancestral sampling of masked diffusion: which positions are revealed and what they become are two separate draws.

Survival is alpha_t = 1 - t. From all masks at t = 1 the grid ends at t = 0 exactly, where every mask left is filled, so
T steps are at most T network calls. A step that reveals nothing in a sample needs no call for it: the published
sampling cache (reuse the last output while the tokens have not changed, arXiv 2406.07524) saves the same calls, but
keeps [N, L, V] probabilities for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from braid.pretrain.diffusion.absorbing import unmask_probability
from braid.pretrain.objectives.mdlm import MDLM

from .draws import Draws
from .prompts import Prompt


def sample(objective: MDLM, prompt: Prompt, draws: Draws) -> Tensor:
    """Tokens int64 [N, L]."""
    tokens = torch.where(prompt.known, prompt.tokens, objective.mask_id)
    times = draws.times(draws.settings.steps)
    for step, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        revealed = reveal(tokens, objective.mask_id, t, s, step, draws)
        active = revealed.any(1)
        if active.any():
            draws.call(active)
            logits = objective.network(tokens[active], draws.batch_times(t)[active]).logits
            tokens = fill(tokens, revealed, logits, active, objective.mask_id, s, step, draws)
        draws.frame(s, tokens)
        draws.progress(step + 1, draws.settings.steps)
    return tokens


def reveal(tokens: Tensor, mask_id: int, t: float, s: float, step: int, draws: Draws) -> Tensor:
    """Masked positions revealed between t and s under linear survival, bool [N, L]."""
    return (tokens == mask_id) & (draws.uniforms(step) < unmask_probability(1 - t, 1 - s))


def fill(
    tokens: Tensor,
    revealed: Tensor,
    logits_ALV: Tensor,
    active: Tensor,
    mask_id: int,
    s: float,
    step: int,
    draws: Draws,
    unguided_ALV: Tensor | None = None,
) -> Tensor:
    """The tokens with the positions revealed up to time s drawn from the logits, which the samples `active` have (bool
    [N], all those with anything revealed). With `greedy_final` the last step takes the most probable ones.
    """
    rows, columns = revealed.nonzero(as_tuple=True)
    drawn = draws.tokens(
        logits_ALV.flatten(0, 1),
        step,
        rows,
        columns,
        forbidden=mask_id,
        places_M=revealed[active].flatten().nonzero().squeeze(1),
        unguided_RV=None if unguided_ALV is None else unguided_ALV.flatten(0, 1),
        greedy=draws.settings.greedy_final and s == 0,
    )
    return tokens.index_put((rows, columns), drawn)
