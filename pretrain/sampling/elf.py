"""Sampling of ELF (arXiv 2605.10938): a flow from noise to latents, then one call that decodes them.

`steps` intervals of flow time tau, from 0 (noise) to 1 (data); frames are labelled with Braid's t = 1 - tau. Each step
predicts the clean latents, is shown the prediction of the step before, and moves along the velocity to the new one.

    ode           z moves from where it is
    sde           z is first stepped back towards the noise (gamma = `noise_scale`) and moves from there, with the
                  released code's formula, which leaves too little noise (diffusion/flow.py); published numbers are its
    sde_marginal  the same with a step back that keeps the law of z
    sde_paper     the paper's algorithm: only what the network sees is stepped back, z moves from where it was

The last interval is always the ODE's. Guidance (`guidance`) is told to the network and costs nothing; guidance by the
source of a pair (`input_guidance`) costs a second call a step. Decoding takes the most probable tokens (published);
with `draw_final`, another temperature than 1, or a nucleus below 1, it draws them. Calls: steps + 1, with guidance by
the source 2 steps + 1.

With an exact denoiser of Gaussian data all but `sde` keep its standard deviation on an even grid, but for the floor
under 1 - tau. No sampler does on the published one, the quantiles of the training times: few of those lie near the
data, so the last interval, which ends at the mean, is long (from tau = 0.65 with 256 steps; ODE: 0.68 of the standard
deviation, and 0.53 with 64).

Known text: the source of a pair stays clean at every step, as in training. In other rows known positions follow the
forward process with one fixed noise each, and their latents are what the encoder says of the known text alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from braid.kernels import random
from braid.kernels.errors import ConfigError
from braid.kernels.random import fold_key
from braid.pretrain.diffusion.flow import euler, flow_grid, interpolate, stepped_back
from braid.pretrain.objectives.elf import ELF

from .draws import Draws
from .prompts import Prompt


def sample(objective: ELF, prompt: Prompt, draws: Draws) -> Tensor:
    """Tokens int64 [N, L]. Raises ConfigError when the guidance is none the model was trained for."""
    _check_guidance(objective, draws)
    state = _State(objective, prompt, draws)
    grid = _grid(objective, draws)
    unknown = torch.where(prompt.known, prompt.tokens, objective.mask_id)
    for step, (tau, after) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        last = after == 1.0
        state.step(step, tau, after, last=last)
        if not last:
            draws.frame(1 - after, unknown, state.z)
        draws.progress(step + 1, draws.settings.steps)
    tokens = torch.where(prompt.known, prompt.tokens, state.decode(len(grid)))
    draws.frame(0.0, tokens, state.z)
    return tokens


class _State:
    """The latents z [N, L, D], the last prediction of the clean ones, and the calls that change them."""

    def __init__(self, objective: ELF, prompt: Prompt, draws: Draws) -> None:
        self.objective, self.network, self.config, self.draws = objective, objective.network, objective.config, draws
        self.known = prompt.known[..., None]
        nowhere = torch.zeros_like(prompt.known)
        self.condition = self.known if objective.paired else nowhere[..., None]
        self.everywhere = ~nowhere
        text = torch.where(prompt.known, prompt.tokens, 0)
        self.clean = objective.text.encode(text, prompt.known)
        self.noise = draws.fixed_normals(draws.length, objective.network.latent_dim)
        self.z = self.pinned(self.config.noise_scale * self.noise, 0.0)
        self.estimate = self.restored(torch.zeros_like(self.z))

    def step(self, step: int, tau: float, after: float, *, last: bool) -> None:
        """From flow time `tau` to `after`."""
        sampler, settings, floor = self.draws.sampler, self.draws.settings, self.config.velocity_floor
        seen, tau_seen = self.z, tau
        if sampler != "ode" and not last:
            eps = self.draws.normals(step, *self.z.shape[1:])
            seen, tau_seen = stepped_back(
                self.z, eps, tau, after, settings.noise_scale, self.config.noise_scale,
                marginal=sampler == "sde_marginal",
            )  # fmt: skip
            seen = self.pinned(seen, tau_seen)
        self.estimate = self.predict(seen, tau_seen)
        if sampler == "sde_paper":
            seen, tau_seen = self.z, tau
        self.z = self.pinned(euler(seen, self.estimate, tau_seen, after, floor), after)

    def predict(self, z: Tensor, tau: float) -> Tensor:
        """The clean latents, guided by the source where asked."""
        w = self.draws.settings.input_guidance
        with_source = self.call(z, self.estimate, tau)
        if w == 1.0:
            return self.restored(with_source)
        without = self.call(z.masked_fill(self.condition, 0.0), self.estimate.masked_fill(self.condition, 0.0), tau)
        return self.restored(without + w * (with_source - without))

    def call(self, z: Tensor, estimate: Tensor, tau: float) -> Tensor:
        self.draws.call()
        return self.network(z, estimate, *self.told(tau, decode=False), heads=("denoise",)).latents

    def decode(self, step: int) -> Tensor:
        """Tokens int64 [N, L] of the latents as they are."""
        self.draws.call()
        told = self.told(1.0, decode=True)
        logits = self.network(self.z, torch.zeros_like(self.z), *told, heads=("decode",)).logits
        mask_id, settings = self.objective.mask_id, self.draws.settings
        if settings.temperature == 1.0 and settings.top_p == 1.0 and not settings.draw_final:
            logits = self.draws.whole(logits)
            logits[..., mask_id] = -torch.inf
            return logits.argmax(-1)
        rows, columns = self.everywhere.nonzero(as_tuple=True)
        drawn = self.draws.tokens(logits.flatten(0, 1), step, rows, columns, forbidden=mask_id)
        return drawn.view(logits.shape[:2])

    def told(self, tau: float, *, decode: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the network is told beside the latents: flow time, guidance, mode, and that there is text everywhere."""
        times = self.draws.batch_times(tau)
        guidance = torch.full_like(times, self.draws.settings.guidance)
        return times, guidance, torch.full_like(times, decode, dtype=torch.bool), self.everywhere

    def pinned(self, z: Tensor, tau: float) -> Tensor:
        """z with the known positions as the flow has them at `tau`."""
        known = interpolate(self.clean, self.noise, self.draws.batch_times(tau), self.config.noise_scale)
        return torch.where(self.condition, self.clean, torch.where(self.known, known, z))

    def restored(self, estimate: Tensor) -> Tensor:
        return torch.where(self.condition, self.clean, estimate)


def _grid(objective: ELF, draws: Draws) -> list[float]:
    config, steps, kind, uniforms = objective.config, draws.settings.steps, draws.settings.grid, None
    if kind == "random":  # one grid for all samples of a key, so that a sample does not depend on its batch
        numbers = torch.arange(steps - 1)
        uniforms = random.coins(fold_key(draws.key, "grid"), numbers, which=1)
    return flow_grid(kind, steps, config.time_mean, config.time_std, uniforms)


def _check_guidance(objective: ELF, draws: Draws) -> None:
    config, settings = objective.config, draws.settings
    if not config.guidance_min <= settings.guidance <= config.guidance_max:
        raise ConfigError(
            "the model was not trained for this scale of guidance",
            found=f"guidance {settings.guidance}, trained for {config.guidance_min} to {config.guidance_max}",
            change=f"--guidance (sampling.guidance) from {config.guidance_min} to {config.guidance_max}",
        )
    if settings.input_guidance != 1.0 and not (objective.paired and config.condition_dropout > 0):
        raise ConfigError(
            "there is no source to guide by: the model was not trained on pairs with some sources left out",
            found=f"input_guidance {settings.input_guidance}",
            change="--input-guidance 1 (sampling.input_guidance)",
        )
