"""Settings of Co-LADD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from braid.pretrain.config.check import Check

from .ladd import LADDConfig, check_ignored, check_ladd

if TYPE_CHECKING:
    from braid.pretrain.config.schema import Config

LATENT_SCHEDULES = ("sqrt", "cosine", "linear", "poly")


@dataclass(frozen=True, kw_only=True)
class CoLADDConfig(LADDConfig):
    """Latent-augmented discrete diffusion with continuous latents (Co-LADD, arXiv 2510.18114): masked tokens and a
    short sequence of Gaussian latents, the pooled representations of an encoder, denoised by one network or by two."""

    name: str = "co_ladd"
    """`co_ladd`"""
    time_conditioning: str = "latents"
    """Which times the network is told: `none`, `latents` or `both`."""
    independent_times: bool = False
    """Draw the latents' time apart from the tokens'. Sequential sampling (all latents, then the text) needs it, unless
    the latents have a denoiser of their own."""
    latent_denoiser: bool = False
    """The published `SEQ`: a transformer of its own denoises the latents and sees no token; the joint network sees
    clean latents, at their time 0. Sampled sequentially, without prompts."""
    latent_denoiser_layers: int = 0
    """Its blocks, of the model's width; 0 takes as many as the model has."""
    latent_norm: str = "unit"
    """`unit`: every slot has length 1 (published for frozen encoders). `none`, for a learned encoder: as it comes;
    `latent_prior_scale` then keeps it from growing."""
    latent_prior_scale: float = 0.0
    """Factor of KL(N(y_0, I) || N(0, I)), that is y_0^2 / 2, meant over slots and dimensions."""
    latent_schedule: str = "sqrt"
    """Squared signal over time: `sqrt` sqrt(1-t), `cosine`, `linear` 1-t or `poly` 1-t^latent_power."""
    time_shift: float = 1.0
    """a of the training times a t / (1 + (a-1) t); 1 is none, below 1 moves towards clean. Bounds do not use it."""
    time_shift_correction: bool = False
    """Weight the training loss by the shift's derivative, so that its mean is one over even times again."""
    hidden_max: float = 0.9
    """A sequence's masked tokens are hidden from the encoder with a probability drawn from U[0, hidden_max]."""
    latent_dropout: float = 0.15
    """Probability that a sequence trains without latents (y = 0, latent loss off)."""
    latent_sigma: float = 0.02
    """Standard deviation s of q(y_0|x) = N(E(x), s^2 I), for the joint bounds and the samplers they are about,
    `joint_nelbo` and `sequential_nelbo`; 0 leaves y_0 = E(x)."""


def check(check: Check, config: Config) -> None:
    """What is wrong with the objective's settings."""
    ladd = config.objective
    check_ladd(check, config)
    check.one_of("objective.latent_schedule", ladd.latent_schedule, LATENT_SCHEDULES)
    if ladd.latent_schedule == "poly" and ladd.latent_power < 1:
        check.add(
            f"objective.latent_power = {ladd.latent_power} must be at least 1",
            found="below 1 the latents lose their signal infinitely fast at t = 0",
        )
    check.positive("objective.time_shift", ladd.time_shift)
    if ladd.time_shift_correction and ladd.time_shift == 1:
        check.add("objective.time_shift_correction is ignored", "objective.time_shift = 1, which shifts nothing")
    check.at_least("objective.latent_sigma", ladd.latent_sigma, 0)
    check.one_of("objective.latent_norm", ladd.latent_norm, ("unit", "none"))
    check.at_least("objective.latent_prior_scale", ladd.latent_prior_scale, 0)
    if ladd.latent_norm == "none" and ladd.encoder.kind != "learned":
        found = f"objective.encoder.kind = {ladd.encoder.kind!r}"
        change = "objective.latent_norm=unit, or objective.encoder.kind=learned"
        check.add("objective.latent_norm = 'none' is for an encoder that is learnt", found, change)
    if ladd.latent_norm == "unit":
        check_ignored(check, ladd, ("latent_prior_scale",), "objective.latent_norm = 'unit'", "all lengths are 1")
    check.at_least("objective.latent_denoiser_layers", ladd.latent_denoiser_layers, 0)
    if not ladd.latent_denoiser:
        check_ignored(check, ladd, ("latent_denoiser_layers",), "objective.latent_denoiser = false")
        return
    check_ignored(check, ladd, ("independent_times",), "objective.latent_denoiser = true", "no network sees both times")
    if config.data.packing == "pairs":
        check.add(
            "a latent denoiser of its own does not see the source, so it cannot make latents that fit it",
            found="objective.latent_denoiser = true, data.packing = 'pairs'",
            change="objective.latent_denoiser=false",
        )
