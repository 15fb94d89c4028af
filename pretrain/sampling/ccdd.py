"""Joint sampling of CCDD: ancestral for the masked tokens, DDIM or DDPM for the latents, from the same network call.

    ddim, ddpm    the process of z_0 = E(x), on an even grid from t = 1 to 0
    joint_nelbo   what the bound of this name is about: ancestral steps of q(z_0|x) = N(E(x), latent_sigma^2 I), on an
                  even grid from 1 to the bound's smallest time tau, where the last call decodes all that is left

Both strands follow one grid of times. Guidance by the latents costs a second call a step:
w logits(x, z) + (1 - w) logits(x, 0). Where latents are not diffused (clean, or features of the visible tokens) they
are not generated: the encoder reads the visible tokens anew before each call. Its own calls are not counted.
With uniform noise every token is drawn anew at each step, as in GIDD.
"""

from __future__ import annotations

import torch
from torch import Tensor

from braid.kernels.errors import ConfigError
from braid.pretrain.diffusion.gaussian import ddim_step, ddpm_step, noised
from braid.pretrain.objectives.ccdd import CCDD

from .draws import Draws
from .duo import redrawn
from .mdlm import fill, reveal
from .prompts import Prompt


def sample(objective: CCDD, prompt: Prompt, draws: Draws) -> Tensor:
    """Tokens int64 [N, L]; the latents are thrown away at the end.

    Raises ConfigError when a sampler of latents is named for a model that generates none.
    """
    tokens = torch.where(prompt.known, prompt.tokens, objective.mask_id)
    if objective.diffused:
        return _jointly(objective, tokens, prompt, draws)
    if draws.settings.sampler:
        raise ConfigError(
            "this model's latents are not diffused, so no sampler takes steps with them",
            found=f"sampler {draws.settings.sampler!r}",
            change="leave the sampler out",
        )
    return _from_visible(objective, tokens, prompt, draws)


def _jointly(objective: CCDD, tokens: Tensor, prompt: Prompt, draws: Draws) -> Tensor:
    latents = _Latents(objective, prompt, draws)
    times = draws.times(draws.settings.steps, objective.tau if draws.sampler == "joint_nelbo" else 0.0)
    everyone = torch.ones_like(prompt.known[:, 0])
    for step, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        logits, unguided, zhat = _predict(objective, tokens, latents.z, t, draws, everyone)
        if objective.hybrid is not None:
            reverse = objective.hybrid.reverse_step(t, s)
            tokens = redrawn(tokens, prompt, logits, objective.mask_id, reverse, s, step, draws, unguided)
        elif (revealed := reveal(tokens, objective.mask_id, t, s, step, draws)).any():
            tokens = fill(tokens, revealed, logits, everyone, objective.mask_id, s, step, draws, unguided)
        latents.step(zhat, t, s, step)
        draws.frame(s, tokens, latents.z)
        draws.progress(step + 1, draws.settings.steps)
    return tokens


def _from_visible(objective: CCDD, tokens: Tensor, prompt: Prompt, draws: Draws) -> Tensor:
    """Masked diffusion whose denoiser is also told what the encoder says of the visible tokens. As there, a step that
    reveals nothing in a sample needs no call for it."""
    given = objective.encoder.encode(prompt.tokens, ~prompt.known) if objective.conditional else None
    times = draws.times(draws.settings.steps)
    for step, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        if objective.hybrid is None:
            revealed = reveal(tokens, objective.mask_id, t, s, step, draws)
            active = revealed.any(1)
        else:
            active = torch.ones_like(prompt.known[:, 0])
        if active.any():
            z = objective.encoder.encode(tokens[active], tokens[active] == objective.mask_id)
            if given is not None:  # trained with the representations of the given tokens alone
                z = torch.where(prompt.known[active][..., None], given[active], z)
            logits, unguided, _ = _predict(objective, tokens[active], z, t, draws, active)
            if objective.hybrid is None:
                tokens = fill(tokens, revealed, logits, active, objective.mask_id, s, step, draws, unguided)
            else:
                reverse = objective.hybrid.reverse_step(t, s)
                tokens = redrawn(tokens, prompt, logits, objective.mask_id, reverse, s, step, draws, unguided)
        draws.frame(s, tokens)
        draws.progress(step + 1, draws.settings.steps)
    return tokens


def _predict(
    objective: CCDD, tokens: Tensor, z: Tensor, t: float, draws: Draws, rows: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Logits, those to guide away from where asked, and the estimate of the clean latents, for the samples `rows` (bool
    [N])."""
    times = draws.batch_times(t)[rows]
    draws.call(rows)
    prediction = objective.denoise(tokens, times, z)
    unguided = None
    if draws.settings.guidance != 1.0:
        # The second call sees no latents (trained by latent dropout).
        draws.call(rows)
        unguided = objective.denoise(tokens, times, torch.zeros_like(z)).logits
    return prediction.logits, unguided, prediction.latents


class _Latents:
    """The continuous strand while sampling. Known positions follow the forward process of what the encoder says of
    the prompt, with one fixed noise each. The network has seen them so in training where the encoder is a table, which
    looks at one token at a time, or rows are pairs; else a contextual one has read other visible tokens beside them."""

    def __init__(self, objective: CCDD, prompt: Prompt, draws: Draws) -> None:
        self.schedule, self.draws = objective.schedule, draws
        self.sigma = objective.config.latent_sigma if draws.sampler == "joint_nelbo" else 0.0
        self.known = prompt.known[..., None]
        self.clean = objective.encoder.encode(prompt.tokens, ~prompt.known)
        self.eps = draws.fixed_normals(draws.length, objective.encoder.latent_dim)
        self.z = self.eps

    def step(self, zhat: Tensor, t: float, s: float, step: int) -> None:
        if self.draws.sampler == "ddim":
            z = ddim_step(self.z, zhat, t, s, self.schedule)
        else:
            eps = self.draws.normals(step, *zhat.shape[1:])
            z = ddpm_step(self.z, zhat, eps, t, s, self.schedule, self.sigma)
        time = self.draws.batch_times(s)
        pinned = noised(self.clean, self.eps, self.schedule.alpha(time), self.schedule.sigma(time))
        self.z = torch.where(self.known, pinned, z)
