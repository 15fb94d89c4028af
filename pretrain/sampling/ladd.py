"""What the samplers of both forms of LADD share.

Tokens are unmasked as in masked diffusion: survival 1 - t, on a grid that ends at t = 0 exactly, where everything left
is filled. (The release stops at 1e-5 and fills in one more call, so its "N steps" are N + 1 calls.) Known tokens of a
prompt hold from the start; the latents are free: the network makes them fit the tokens it sees. Where the prompt has
texts that they are to describe, a sequential sampler shows the network the latents of these (the release's
use_encoder_latent) and draws the text alone, which tells what is lost by sampling the latents. (In joint sampling the
tokens that are revealed while such latents are still noisy would have to fit a text that nobody has seen yet.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from braid.data_pipeline.loader import Batch
from braid.kernels.errors import ConfigError
from braid.pretrain.model.joint_attention import SlotPrediction
from braid.pretrain.objectives.ladd import LADD

from .draws import Draws
from .mdlm import fill, reveal
from .prompts import Prompt


def start(objective: LADD, prompt: Prompt) -> Tensor:
    """x_1, int64 [N, L]: masks but for the prompt."""
    return torch.where(prompt.known, prompt.tokens, objective.mask_id)


def described(prompt: Prompt) -> tuple[Batch, Tensor] | None:
    """The texts to be described, as what an objective encodes: a batch, and that nothing of it is hidden."""
    if prompt.described is None:
        return None
    nothing = torch.zeros_like(prompt.known)
    return Batch(prompt.described, ~nothing, torch.arange(len(nothing), device=nothing.device)), nothing


def latent_steps(objective: LADD, draws: Draws) -> int:
    """Steps of the latents in sequential sampling. Raises ConfigError where the model cannot be sampled that way."""
    if not objective.config.independent_times and not getattr(objective.config, "latent_denoiser", False):
        raise ConfigError(
            f"sampler {draws.sampler} shows the network times it was never trained at",
            found="objective.independent_times = false: tokens and latents always had the same time",
            change="the sampler joint, or train with objective.independent_times=true",
        )
    return draws.settings.latent_steps or draws.settings.steps


def call(
    objective: LADD, tokens: Tensor, latents: Tensor, t: float, latent_t: float, draws: Draws, rows: Tensor
) -> SlotPrediction:
    """One counted call for the samples of `rows` (bool [N]): tokens at time t, latents at `latent_t`."""
    draws.call(rows)
    times, latent_times = draws.batch_times(t)[rows], draws.batch_times(latent_t)[rows]
    return objective.network(tokens[rows], latents[rows], times, latent_times)


def everyone(draws: Draws) -> Tensor:
    """All rows, bool [N]."""
    return torch.ones_like(draws.ordinals, dtype=torch.bool)


def fill_text(objective: LADD, tokens: Tensor, latents: Tensor, draws: Draws, first_step: int) -> Tensor:
    """The second half of sequential sampling: the text, given clean latents [N, S, D]. `first_step` numbers its draws,
    and is the number of steps already done. A step that reveals nothing in a sample needs no call for it."""
    steps = draws.settings.steps
    times = draws.times(steps)
    for step, (t, s) in enumerate(zip(times[:-1], times[1:], strict=True), first_step):
        revealed = reveal(tokens, objective.mask_id, t, s, step, draws)
        active = revealed.any(1)
        if active.any():
            logits = call(objective, tokens, latents, t, 0.0, draws, active).logits
            tokens = fill(tokens, revealed, logits, active, objective.mask_id, s, step, draws)
        draws.frame(s, tokens, latents)
        draws.progress(step + 1, first_step + steps)
    return tokens
