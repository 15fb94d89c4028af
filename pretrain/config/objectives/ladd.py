"""Settings that both forms of LADD share, and what can be wrong with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from braid.pretrain.config.check import Check

from .encoder import EncoderConfig

if TYPE_CHECKING:
    from braid.pretrain.config.schema import Config

POOLINGS = ("last_layer", "adaptive_chunk_mean", "adaptive_chunk_mean_eos")


@dataclass(frozen=True, kw_only=True)
class LADDConfig:
    """What latent-augmented discrete diffusion (LADD, arXiv 2510.18114) needs whatever its latents are."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """The encoder of the latents; a frozen one's raw representations are pooled."""
    num_slots: int = 64
    """Latent slots S' a text is pooled into."""
    pooling: str = "adaptive_chunk_mean"
    """`last_layer` (a slot for every token), `adaptive_chunk_mean` (means of S' chunks of the text) or
    `adaptive_chunk_mean_eos` (the last slot is the last token's alone)."""
    latent_positions: str = "rope"
    """`rope`: slots follow the tokens in one rotary sequence; `learned`: an embedding for every slot, not rotated."""
    latent_power: float = 2.0
    """Power of the `poly` schedule."""
    time_eps: float = 1e-4
    """Smallest training time, and the e of alpha = (1-2e)(1-t) + e (of tokens, and of codes or of the latents' squared
    signal)."""
    latent_scale: float = 1.0
    """Factor of the latents' loss."""
    stage_one_steps: int = 0
    """Steps at the start without the latents' loss."""


def check_ladd(check: Check, config: Config) -> None:
    """Slots, times, corruption and stages."""
    ladd, length = config.objective, config.data.sequence_length
    slots = f"objective.num_slots = {ladd.num_slots}"
    if check.at_least("objective.num_slots", ladd.num_slots, 1) and ladd.num_slots > length:
        check.add(
            "there are more latent slots than tokens in a row",
            found=f"{slots} > data.sequence_length = {length}",
            change=f"objective.num_slots={length // 2}",
        )
    check.one_of("objective.pooling", ladd.pooling, POOLINGS)
    if ladd.pooling == "last_layer" and ladd.num_slots != length:
        check.add(
            "objective.pooling = 'last_layer' has one slot for every token",
            found=f"{slots}, data.sequence_length = {length}",
            change=f"objective.num_slots={length}, or objective.pooling=adaptive_chunk_mean",
        )
    if ladd.pooling == "adaptive_chunk_mean_eos" and ladd.num_slots == 1:
        check.add("objective.pooling = 'adaptive_chunk_mean_eos' needs a slot beside the last", slots)
    if ladd.encoder.variance_floor != EncoderConfig.variance_floor:
        check.add(
            "objective.encoder.variance_floor is ignored: LADD pools raw representations",
            change=f"objective.encoder.variance_floor={EncoderConfig.variance_floor}",
        )
    check.one_of("objective.latent_positions", ladd.latent_positions, ("rope", "learned"))
    check.one_of("objective.time_conditioning", ladd.time_conditioning, ("none", "latents", "both"))
    check.within("objective.time_eps", ladd.time_eps, "()", 0, 0.5)
    check.positive("objective.latent_power", ladd.latent_power)
    if ladd.latent_schedule != "poly" and ladd.latent_power != type(ladd).latent_power:
        check.add(
            f"objective.latent_power = {ladd.latent_power} is ignored",
            found=f"objective.latent_schedule = {ladd.latent_schedule!r}",
            change=f"objective.latent_schedule=poly, or objective.latent_power={type(ladd).latent_power}",
        )
    check.within("objective.hidden_max", ladd.hidden_max, "[]", 0, 1)
    check.within("objective.latent_dropout", ladd.latent_dropout, "[)", 0, 1)
    check.at_least("objective.latent_scale", ladd.latent_scale, 0)
    check.shorter_than_the_run("objective.stage_one_steps", ladd.stage_one_steps, config.training.steps)

    sampling = config.sampling
    sequential = sampling.sampler.startswith("sequential")
    if sequential and not ladd.independent_times:
        check.add(
            f"sampling.sampler = {sampling.sampler!r} shows the network times it is never trained at",
            found="objective.independent_times = false: tokens and latents always have the same time",
            change="sampling.sampler=joint, or objective.independent_times=true",
        )
