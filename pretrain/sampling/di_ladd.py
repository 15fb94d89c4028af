"""Sampling Di-LADD: `joint` (tokens and codes unmasked by the same calls) or `sequential` (all codes, then the text).

Codes are unmasked as the tokens are, under their own survival, and drawn exactly; temperature and nucleus are the
tokens' alone. In joint sampling both take the same number of steps: with a longer grid of their own most codes would
still be masked when the last call fills them all at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from braid.kernels.random import fold_key
from braid.kernels.sampling import draw_tokens
from braid.pretrain.diffusion.absorbing import unmask_probability
from braid.pretrain.objectives.di_ladd import CODE_WORD, DiLADD

from .draws import Draws
from .ladd import call, described, fill_text, latent_steps, start
from .mdlm import fill, reveal
from .prompts import Prompt


def sample(objective: DiLADD, prompt: Prompt, draws: Draws) -> Tensor:
    """Tokens int64 [N, L]; the codes are thrown away at the end."""
    tokens = start(objective, prompt)
    codes = torch.full((len(tokens), objective.network.num_slots), objective.mask_code, device=draws.device)
    if draws.sampler == "sequential":
        return _sequential(objective, tokens, codes, prompt, draws)
    times = draws.times(draws.settings.steps)
    for step, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        revealed = reveal(tokens, objective.mask_id, t, s, step, draws)
        revealed_codes = _reveal_codes(objective, codes, t, s, step, draws)
        active = revealed.any(1) | revealed_codes.any(1)
        if active.any():
            prediction = call(objective, tokens, _slots(objective, codes), t, t, draws, active)
            codes = _fill_codes(codes, revealed_codes, prediction.latents, active, objective, step, draws)
            tokens = fill(tokens, revealed, prediction.logits, active, objective.mask_id, s, step, draws)
        draws.frame(s, tokens)
        draws.progress(step + 1, draws.settings.steps)
    return tokens


def _sequential(objective: DiLADD, tokens: Tensor, codes: Tensor, prompt: Prompt, draws: Draws) -> Tensor:
    steps = latent_steps(objective, draws)
    if prompt.described is not None:
        codes = objective.codes(*described(prompt))[1]
        return fill_text(objective, tokens, _slots(objective, codes), draws, 0)
    times = draws.times(steps)
    for step, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        revealed = _reveal_codes(objective, codes, t, s, step, draws)
        active = revealed.any(1)
        if active.any():
            logits = call(objective, tokens, _slots(objective, codes), 1.0, t, draws, active).latents
            codes = _fill_codes(codes, revealed, logits, active, objective, step, draws)
        draws.frame(1.0, tokens)
        draws.progress(step + 1, steps + draws.settings.steps)
    return fill_text(objective, tokens, _slots(objective, codes), draws, steps)


def _reveal_codes(objective: DiLADD, codes: Tensor, t: float, s: float, step: int, draws: Draws) -> Tensor:
    """Masked codes revealed between t and s, bool [N, S]."""
    alpha_t, alpha_s = (
        float(objective.code_survival.alpha(torch.tensor(time, dtype=torch.float64))) for time in (t, s)
    )
    uniforms = draws.uniforms(step, word=CODE_WORD)[:, : codes.shape[1]]
    return (codes == objective.mask_code) & (uniforms < unmask_probability(alpha_t, alpha_s))


def _fill_codes(
    codes: Tensor, revealed: Tensor, logits_ASK: Tensor, active: Tensor, objective: DiLADD, step: int, draws: Draws
) -> Tensor:
    """The codes with the revealed slots drawn from the logits, which the samples `active` (bool [N]) have."""
    rows, columns = revealed.nonzero(as_tuple=True)
    drawn = draw_tokens(
        fold_key(draws.step_key(step), "codes"),
        logits_ASK.flatten(0, 1),
        draws.ordinals[rows],
        columns,
        rows=revealed[active].flatten().nonzero().squeeze(1),
        left_out=objective.mask_code,
    )
    return codes.index_put((rows, columns), drawn)


def _slots(objective: DiLADD, codes: Tensor) -> Tensor:
    """What the network sees of the codes, [N, S, D]."""
    masked = codes == objective.mask_code
    return objective.shown(objective.codebook.vectors[codes.masked_fill(masked, 0)], masked)
