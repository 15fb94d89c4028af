"""Settings of Di-LADD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from braid.pretrain.config.check import Check

from .ladd import LADDConfig, check_ignored, check_ladd

if TYPE_CHECKING:
    from braid.pretrain.config.schema import Config


GUMBEL = ("gumbel_start", "gumbel_end", "gumbel_steps")
VQ = ("codebook_decay", "codebook_settling", "codebook_dead_below", "commitment")
"""Settings of one quantiser that the other one ignores."""


@dataclass(frozen=True, kw_only=True)
class DiLADDConfig(LADDConfig):
    """Latent-augmented discrete diffusion with discrete latents (Di-LADD, arXiv 2510.18114): masked tokens and a short
    sequence of masked codes, the vector-quantised pooled representations of an encoder, denoised by one network."""

    name: str = "di_ladd"
    """`di_ladd`"""
    time_conditioning: str = "none"
    """Which times the network is told: `none` (the masks show them), `latents` or `both`."""
    independent_times: bool = True
    """Draw the codes' time apart from the tokens'. Sequential sampling (all codes, then the text) needs it."""
    codebook_size: int = 512
    """Codes K, the mask included: K - 1 vectors."""
    quantiser: str = "vq"
    """How a slot becomes a code: `vq`, the nearest vector of a codebook that follows the slots; or `gumbel`, for a
    learned encoder, which then says logits of the codes (hard straight-through draws in training, the most probable
    code elsewhere)."""
    gumbel_start: float = 1.0
    """Temperature of the straight-through gradient at the first step."""
    gumbel_end: float = 1e-5
    """And after `gumbel_steps` steps, to which it falls evenly on a logarithmic scale."""
    gumbel_steps: int = 200_000
    """Steps of that fall."""
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
    check.one_of("objective.quantiser", ladd.quantiser, ("vq", "gumbel"))
    for name in GUMBEL:
        check.positive(f"objective.{name}", getattr(ladd, name))
    learned, kind = ladd.encoder.kind == "learned", f"objective.encoder.kind = {ladd.encoder.kind!r}"
    if ladd.quantiser == "gumbel" and not learned:
        change = "objective.quantiser=vq, or objective.encoder.kind=learned"
        check.add("objective.quantiser = 'gumbel' is for an encoder that is learnt", kind, change)
    elif ladd.quantiser == "gumbel":
        check_ignored(check, ladd, VQ, "objective.quantiser = 'gumbel'")
        return
    check_ignored(check, ladd, GUMBEL, "objective.quantiser = 'vq'")
    if not learned:
        check_ignored(check, ladd, ("commitment",), "a frozen encoder", kind)
    # The first update takes every vector from the batch; those without one would stay where they began.
    slots = config.training.global_batch_size * ladd.num_slots
    if ladd.codebook_size - 1 > slots >= 1:
        check.add(
            "the codebook has more vectors than a global batch has slots",
            found=f"objective.codebook_size - 1 = {ladd.codebook_size - 1} > training.global_batch_size * "
            f"objective.num_slots = {slots}",
            change=f"objective.codebook_size={slots + 1}, or a larger batch",
        )
