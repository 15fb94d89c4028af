"""Samplers: ancestral for masked tokens, DDIM or DDPM for latents beside them, left to right for AR.

Every draw is keyed by (seed, sample ordinal, position, step), so a sample does not depend on how samples are batched.
Tokens are drawn exactly (braid.kernels.random.categorical): which positions are revealed and what they become are two
separate draws. Network calls are counted: guidance costs two a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from braid.kernels import random
from braid.kernels.random import Stream, fold_key
from braid.pretrain.config.schema import SamplingConfig
from braid.pretrain.diffusion.absorbing import unmask_probability, without_mask
from braid.pretrain.diffusion.gaussian import ddim_step, ddpm_step, noised
from braid.pretrain.objectives.base import Objective
from braid.pretrain.objectives.ccdd import CCDD

from .prompts import Prompt, prefix_length


@dataclass
class Samples:
    """Finished samples and what they cost."""

    tokens: Tensor
    """int64 [N, L]."""
    network_calls: int
    frames: list[dict] = field(default_factory=list)
    """State of the first sample after each step, where recording was asked for: time, tokens, latent_norm."""


@torch.no_grad()
def draw_samples(
    objective: Objective,
    settings: SamplingConfig,
    prompt: Prompt,
    *,
    key: int,
    first_ordinal: int = 0,
    record: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Samples:
    """Draw one sample for every row of `prompt` (N x L) on the objective's device, in evaluation mode."""
    device = next(objective.parameters()).device
    training = objective.training
    objective.eval()
    prompt = prompt.to(device)
    ordinals = torch.arange(first_ordinal, first_ordinal + len(prompt.tokens), device=device)
    draw = _autoregressive if objective.causal else _diffusion
    samples = draw(objective, settings, prompt, fold_key(key, "sampler"), ordinals, record, progress)
    objective.train(training)
    return samples


def _diffusion(
    objective: Objective,
    settings: SamplingConfig,
    prompt: Prompt,
    key: int,
    ordinals: Tensor,
    record: bool,
    progress: Callable[[int, int], None],
) -> Samples:
    """From all masks (and Gaussian latents) at t = 1 to text at t = 0 in `settings.steps` steps.

    Survival is alpha_t = 1 - t; the last step ends at t = 0 exactly, where every mask left is filled.
    """
    length, device = prompt.tokens.shape[1], prompt.tokens.device
    tokens = torch.where(prompt.known, prompt.tokens, objective.mask_id)
    latents = _Latents(objective, prompt, key, ordinals) if isinstance(objective, CCDD) else None
    samples = Samples(tokens, 0)
    positions = torch.arange(length, device=device)
    times = torch.linspace(1, 0, settings.steps + 1, dtype=torch.float64).tolist()
    for step, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True)):
        step_key = fold_key(key, "step", step)
        logits, zhat = _predict(objective, settings, tokens, t, latents, samples)
        uniforms = random.uniform(step_key, Stream.TOKEN, ordinals, positions)
        revealed = (tokens == objective.mask_id) & (uniforms < unmask_probability(1 - t, 1 - s))
        rows, columns = revealed.nonzero(as_tuple=True)
        if len(rows):
            drawn = _draw_tokens(objective, settings, logits[rows, columns], step_key, ordinals[rows], columns)
            tokens = tokens.index_put((rows, columns), drawn)
        if latents is not None:
            latents.step(zhat, t, s, settings.continuous_sampler, step_key)
        if record:
            norm = None if latents is None else float(latents.z[0].norm(dim=-1).mean())
            samples.frames.append({"time": s, "tokens": tokens[0].tolist(), "latent_norm": norm})
        progress(step + 1, settings.steps)
    samples.tokens = tokens
    return samples


def _predict(
    objective: Objective, settings: SamplingConfig, tokens: Tensor, t: float, latents: _Latents | None, samples: Samples
) -> tuple[Tensor, Tensor | None]:
    """Logits (guided where asked) and the estimate of the clean latents."""
    times = torch.full((len(tokens),), t, dtype=torch.float64, device=tokens.device)
    if latents is None:
        samples.network_calls += 1
        return objective.network(tokens, times).logits, None
    prediction = objective.network(tokens, times, latents.z)
    samples.network_calls += 1
    logits = prediction.logits
    if settings.guidance != 1.0:
        # w logits(x, z) + (1 - w) logits(x, 0): the second call sees no latents (trained by latent dropout).
        without = objective.network(tokens, times, torch.zeros_like(latents.z)).logits
        samples.network_calls += 1
        logits = settings.guidance * logits + (1 - settings.guidance) * without
    return logits, prediction.latents


class _Latents:
    """The continuous strand while sampling. Known positions follow the forward process of what the encoder says of
    the prompt, with one fixed noise each, so that the network sees them as in training at every step."""

    def __init__(self, objective: CCDD, prompt: Prompt, key: int, ordinals: Tensor) -> None:
        self.schedule, self.ordinals = objective.schedule, ordinals
        length, num_dims = prompt.tokens.shape[1], objective.encoder.latent_dim
        self.positions = torch.arange(length, device=ordinals.device)
        self.known = prompt.known[..., None]
        self.clean = objective.encoder.encode(prompt.tokens, ~prompt.known)
        self.eps = random.normal(fold_key(key, "latents"), ordinals, self.positions, num_dims)
        self.z = self.eps

    def step(self, zhat: Tensor, t: float, s: float, sampler: str, step_key: int) -> None:
        if sampler == "ddim":
            z = ddim_step(self.z, zhat, t, s, self.schedule)
        else:
            eps = random.normal(step_key, self.ordinals, self.positions, zhat.shape[-1])
            z = ddpm_step(self.z, zhat, eps, t, s, self.schedule)
        time = torch.full((len(z),), s, dtype=torch.float64, device=z.device)
        pinned = noised(self.clean, self.eps, self.schedule.alpha(time), self.schedule.sigma(time))
        self.z = torch.where(self.known, pinned, z)


def _autoregressive(
    objective: Objective,
    settings: SamplingConfig,
    prompt: Prompt,
    key: int,
    ordinals: Tensor,
    record: bool,
    progress: Callable[[int, int], None],
) -> Samples:
    """Left to right, one call a token that is not known. Only prefixes can be known."""
    tokens, length, prefix = prompt.tokens.clone(), prompt.tokens.shape[1], prefix_length(prompt)
    samples = Samples(tokens, 0)
    for position in range(prefix, length):
        shifted = torch.roll(tokens, 1, dims=1)
        shifted[:, 0] = objective.bos_id
        logits = objective.network(shifted[:, : position + 1], None).logits[:, position]
        samples.network_calls += 1
        column = torch.full_like(ordinals, position)
        tokens[:, position] = _draw_tokens(objective, settings, logits, fold_key(key, "step", 0), ordinals, column)
        if record:
            shown = torch.where(torch.arange(length) > position, objective.mask_id, tokens[0].cpu())
            samples.frames.append({"time": 1 - (position + 1) / length, "tokens": shown.tolist(), "latent_norm": None})
        progress(position + 1, length)
    return samples


def _draw_tokens(
    objective: Objective, settings: SamplingConfig, logits_NV: Tensor, key: int, ordinals_N: Tensor, positions_N: Tensor
) -> Tensor:
    logits_NV = without_mask(logits_NV.float(), objective.mask_id)
    if settings.temperature != 1.0:
        logits_NV = logits_NV / settings.temperature
    if settings.top_p < 1.0:
        logits_NV = nucleus(logits_NV, settings.top_p)
    return random.categorical(key, logits_NV, ordinals_N, positions_N)


def nucleus(logits_NV: Tensor, top_p: float) -> Tensor:
    """Keep, per row, the smallest set of most probable tokens whose mass reaches `top_p`; -inf elsewhere."""
    ordered, order = logits_NV.sort(dim=-1, descending=True, stable=True)
    mass = ordered.double().softmax(-1)
    beyond = mass.cumsum(-1) - mass >= top_p  # the mass before a token already suffices
    return logits_NV.masked_fill(beyond.scatter(-1, order, beyond), float("-inf"))


def sample_entropy(tokens_NL: Tensor) -> list[float]:
    """Unigram entropy of each sample in nats: low values betray repetition."""
    entropies = []
    for row in tokens_NL:
        counts = torch.unique(row, return_counts=True)[1].double()
        p = counts / counts.sum()
        entropies.append(float(-(p * p.log()).sum()))
    return entropies
