"""Settings of Di-LADD."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from braid.pretrain.config.check import Check

from .encoder import EncoderConfig, check_encoder
from .ladd import LADDConfig, check_ladd

if TYPE_CHECKING:
    from braid.pretrain.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class DiLADDConfig(LADDConfig):
    """Latent-augmented discrete diffusion with discrete latents (Di-LADD, arXiv 2510.18114): masked tokens and a short
    sequence of masked codes, the vector-quantised pooled representations of an encoder, denoised by one network."""

    name: str = "di_ladd"
    """`di_ladd`"""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """The encoder of the latents: frozen, its raw representations pooled; or of kind `learned`."""
    encoder_layers: int = 0
    """For objective.encoder.kind = `learned` (a transformer trained with the rest; its last S' outputs are the slots):
    its blocks, of the model's width; 0 takes as many as the model has."""
    time_conditioning: str = "none"
    """Which times the network is told: `none` (the masks show them), `latents` or `both`."""
    independent_times: bool = True
    """Draw the codes' time apart from the tokens'. Sequential sampling (all codes, then the text) needs it."""
    codebook_size: int = 512
    """Codes K, the mask included: K - 1 vectors."""
    codebook_decay: float = 0.95
    """Decay of the moving averages the vectors follow."""
    codebook_settling: int = 10
    """Steps at the start in which every vector becomes the mean of its members in that step's batch (k-means)."""
    codebook_dead_below: float = 2.0
    """A vector with fewer members a global batch (moving average) is replaced by one of the batch; 0 replaces none."""
    commitment: float = 0.1
    """For a learned encoder: factor of the loss that draws the encoder's outputs to their codes."""
    latent_schedule: str = "linear"
    """Survival of a code: `linear` 1-t or `poly` 1-t^latent_power."""
    hidden_max: float = 0.0
    """A sequence's masked tokens are hidden from the encoder with a probability drawn from U[0, hidden_max]."""
    latent_dropout: float = 0.0
    """Probability that a sequence trains without latents (all codes masked, latent loss off)."""


def check(check: Check, config: Config) -> None:
    """What is wrong with the objective's settings."""
    ladd = config.objective
    check_ladd(check, config)
    check.one_of("objective.latent_schedule", ladd.latent_schedule, ("linear", "poly"))
    check.at_least("objective.codebook_size", ladd.codebook_size, 3)
    check.within("objective.codebook_decay", ladd.codebook_decay, "[)", 0, 1)
    check.at_least("objective.codebook_settling", ladd.codebook_settling, 0)
    check.at_least("objective.codebook_dead_below", ladd.codebook_dead_below, 0)
    check.at_least("objective.commitment", ladd.commitment, 0)
    check.at_least("objective.encoder_layers", ladd.encoder_layers, 0)
    if ladd.encoder.kind == "learned":
        _check_learned(check, ladd)
        return
    check_encoder(check, ladd.encoder)
    for name in ("encoder_layers", "commitment"):
        value, default = getattr(ladd, name), getattr(DiLADDConfig, name)
        if value != default:
            check.add(
                f"objective.{name} = {value} is ignored by a frozen encoder",
                found=f"objective.encoder.kind = {ladd.encoder.kind!r}",
                change=f"objective.encoder.kind=learned, or objective.{name}={default}",
            )


def _check_learned(check: Check, ladd: DiLADDConfig) -> None:
    check.at_least("objective.encoder.latent_dim", ladd.encoder.latent_dim, 1)
    ignored = ("path", "layer", "window")
    changed = [f"objective.encoder.{name}" for name in ignored
               if getattr(ladd.encoder, name) != getattr(EncoderConfig, name)]  # fmt: skip
    if ladd.pooling != DiLADDConfig.pooling:
        changed.append("objective.pooling")
    for path in changed:
        check.add(f"{path} is ignored by objective.encoder.kind = 'learned'", change="leave it at its default")
