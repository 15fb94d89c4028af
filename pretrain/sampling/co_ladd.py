"""Sampling Co-LADD: `joint` (tokens and latents from the same calls) or `sequential` (all latents, then the text).

Latents move by DDIM, or by ancestral steps where the sampler's name ends in `_ddpm` (those of y_0 = E(x)) or in
`_nelbo` (those of q(y_0|x) = N(E(x), latent_sigma^2 I), the process that the bound of this name is about; at
latent_sigma = 0 they are the same). Their last state is y at t = 0 of the process, which keeps a trace of noise
(variance time_eps), as the network has seen them there. A denoiser of the latents' own sees no text, so it cannot make
them fit a prompt.
"""

from __future__ import annotations

from torch import Tensor

from braid.kernels.errors import ConfigError
from braid.pretrain.diffusion.gaussian import ddim_step, ddpm_step, noised
from braid.pretrain.objectives.co_ladd import CoLADD

from .draws import Draws
from .ladd import call, described, everyone, fill_text, latent_steps, start
from .mdlm import fill, reveal
from .prompts import Prompt


def sample(objective: CoLADD, prompt: Prompt, draws: Draws) -> Tensor:
    """Tokens int64 [N, L]; the latents are thrown away at the end. Raises ConfigError for a prompt that they would not
    know of."""
    if objective.latent_denoiser is not None and prompt.known.any():
        raise ConfigError(
            "the latents of this model are made without the text, so they cannot fit a prompt",
            found="objective.latent_denoiser = true, and known tokens",
            change="leave the prompt out, or sample a model with objective.latent_denoiser=false",
        )
    tokens = start(objective, prompt)
    latents = draws.fixed_normals(objective.network.num_slots, objective.network.latent_dim)
    if draws.sampler.startswith("sequential"):
        return _sequential(objective, tokens, latents, prompt, draws)
    times = draws.times(draws.settings.steps)
    for step, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        all_rows = everyone(draws)
        prediction = call(objective, tokens, latents, t, t, draws, all_rows)
        revealed = reveal(tokens, objective.mask_id, t, s, step, draws)
        if revealed.any():
            tokens = fill(tokens, revealed, prediction.logits, all_rows, objective.mask_id, s, step, draws)
        latents = _latent_step(objective, latents, prediction.latents, t, s, step, draws)
        draws.frame(s, tokens, latents)
        draws.progress(step + 1, draws.settings.steps)
    return tokens


def _sequential(objective: CoLADD, tokens: Tensor, latents: Tensor, prompt: Prompt, draws: Draws) -> Tensor:
    steps = latent_steps(objective, draws)
    if prompt.described is not None:
        time = draws.batch_times(0.0)
        clean = objective.slots(*described(prompt))
        latents = noised(clean, latents, objective.schedule.alpha(time), objective.schedule.sigma(time))
        return fill_text(objective, tokens, latents, draws, 0)
    times = draws.times(steps)
    for step, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        if objective.latent_denoiser is not None:
            draws.call()
            yhat = objective.denoise(latents, draws.batch_times(t))
        else:
            yhat = call(objective, tokens, latents, 1.0, t, draws, everyone(draws)).latents
        latents = _latent_step(objective, latents, yhat, t, s, step, draws)
        draws.frame(1.0, tokens, latents)
        draws.progress(step + 1, steps + draws.settings.steps)
    return fill_text(objective, tokens, latents, draws, steps)


def _latent_step(
    objective: CoLADD, latents: Tensor, yhat: Tensor, t: float, s: float, step: int, draws: Draws
) -> Tensor:
    if draws.sampler in ("joint", "sequential"):
        return ddim_step(latents, yhat, t, s, objective.schedule)
    sigma = objective.config.latent_sigma if draws.sampler.endswith("_nelbo") else 0.0
    return ddpm_step(latents, yhat, draws.normals(step, *yhat.shape[1:]), t, s, objective.schedule, sigma)
