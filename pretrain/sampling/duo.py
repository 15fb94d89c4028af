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
from braid.pretrain.config.schema import SamplingConfig
from braid.pretrain.diffusion.absorbing import without_mask
from braid.pretrain.diffusion.uniform import FLOAT64_CHUNK, log_posterior, skip_mask
from braid.pretrain.objectives.base import Objective
from braid.pretrain.objectives.duo import Duo

from .draws import Draws, nucleus
from .prompts import Prompt


def sample(objective: Duo, prompt: Prompt, draws: Draws) -> Tensor:
    """Tokens int64 [N, L], from any tokens alike at t = 1."""
    num_tokens, mask_id = objective.num_tokens, objective.mask_id
    start = random.integers(fold_key(draws.key, "start"), Stream.TOKEN, draws.ordinals, draws.positions, num_tokens)

    def posterior(probabilities: Tensor, tokens: Tensor, t: float, s: float) -> Tensor:
        return log_posterior(probabilities, tokens, 1 - t, 1 - s, num_tokens, mask_id)

    return ancestral(objective, prompt, draws, skip_mask(start, mask_id), posterior)


def ancestral(
    objective: Objective,
    prompt: Prompt,
    draws: Draws,
    start_NL: Tensor,
    log_posterior: Callable[[Tensor, Tensor, float, float], Tensor],
) -> Tensor:
    """From `start_NL` at t = 1 to tokens at t = 0, what the prompt knows held at every step; one call a step.

    `log_posterior(probabilities, tokens, t, s)` gives log p(x_s | x_t), [M, V] for M places. With `greedy_final` the
    last step takes its most probable token.
    """
    settings = draws.settings
    tokens = torch.where(prompt.known, prompt.tokens, start_NL)
    free = (~prompt.known).nonzero().split(max(1, FLOAT64_CHUNK // objective.network.vocab_size))
    times = draws.times(settings.steps)
    for step, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        draws.call()
        logits = objective.network(tokens, draws.batch_times(t)).logits
        for place_M2 in free:  # a few at a time: the vocabulary is wide
            rows, columns = place_M2.unbind(1)
            probabilities = predicted(draws.whole(logits[rows, columns]), settings, objective.mask_id)
            posterior = log_posterior(probabilities, tokens[rows, columns], t, s)
            if settings.greedy_final and s == 0:
                tokens[rows, columns] = posterior.argmax(-1)
            else:
                key = draws.step_key(step)
                tokens[rows, columns] = random.categorical(key, posterior, draws.ordinals[rows], columns)
        draws.frame(s, tokens)
        draws.progress(step + 1, settings.steps)
    return tokens


def predicted(logits_MV: Tensor, settings: SamplingConfig, mask_id: int) -> Tensor:
    """Probabilities of the clean tokens, float64 [M, V], after temperature and nucleus."""
    logits_MV = without_mask(logits_MV.double(), mask_id) / settings.temperature
    return (nucleus(logits_MV, settings.top_p) if settings.top_p < 1.0 else logits_MV).softmax(-1)
