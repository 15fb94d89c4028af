"""Settings that both forms of LADD share, and what can be wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from braid.pretrain.config.check import Check

from .encoder import EncoderConfig, check_encoder

if TYPE_CHECKING:
    from braid.pretrain.config.schema import Config

LATENT_WARMUPS = ("none", "linear", "delayed")
POOLINGS = ("last_layer", "adaptive_chunk_mean", "adaptive_chunk_mean_eos")


@dataclass(frozen=True, kw_only=True)
class LADDConfig:
    """What latent-augmented discrete diffusion (LADD, arXiv 2510.18114) needs whatever its latents are."""

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """The encoder of the latents: frozen, its raw representations pooled; or of kind `learned`."""
    encoder_layers: int = 0
    """For objective.encoder.kind = `learned` (a transformer trained with the rest; its last S' outputs are the slots):
    its blocks, of the model's width; 0 takes as many as the model has."""
    encoder_masking: float = 0.0
    """Probability that a token, masked or not, is hidden from the encoder in training (published for text8: 0.1 to 0.6;
    none else)."""
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
    latent_warmup: str = "none"
    """How the latents' loss comes in after that: `none` (at once), `linear` over `latent_warmup_steps`, or `delayed`
    (not at all for a fifth of them, then linearly)."""
    latent_warmup_steps: int = 20_000
    """Steps after which the latents' loss counts whole."""
    independence_scale: float = 0.0
    """Factor of KL(p(x_0|x_t,y_t) || p(x_0|y_t)) of masked tokens, whose first argument is constant: it asks the slots
    to say what the visible tokens say. Another forward and backward pass of the network."""


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
    check.one_of("objective.latent_warmup", ladd.latent_warmup, LATENT_WARMUPS)
    check.at_least("objective.latent_warmup_steps", ladd.latent_warmup_steps, 1)
    if ladd.latent_warmup == "none":
        check_ignored(check, ladd, ("latent_warmup_steps",), "objective.latent_warmup = 'none'")
    if ladd.latent_scale == 0:
        stages = ("stage_one_steps", "latent_warmup")
        check_ignored(check, ladd, stages, "objective.latent_scale = 0", "the latents never have a loss")
    check.at_least("objective.independence_scale", ladd.independence_scale, 0)
    check.within("objective.encoder_masking", ladd.encoder_masking, "[)", 0, 1)
    _check_encoder(check, ladd)

    _check_plan(check, config)

    sampling = config.sampling
    sequential = sampling.sampler.startswith("sequential")
    own_denoiser = getattr(ladd, "latent_denoiser", False)
    if sequential and not ladd.independent_times and not own_denoiser:
        check.add(
            f"sampling.sampler = {sampling.sampler!r} shows the network times it is never trained at",
            found="objective.independent_times = false: tokens and latents always have the same time",
            change="sampling.sampler=joint, or objective.independent_times=true",
        )


def _check_plan(check: Check, config: Config) -> None:
    """A pipeline divides one call of one network."""
    ladd, pipeline = config.objective, config.parallel.pipeline
    more = {"independence_scale": ladd.independence_scale, "latent_denoiser": getattr(ladd, "latent_denoiser", False)}
    for name in (name for name, value in more.items() if value and pipeline > 1):
        check.add(
            f"objective.{name} needs the whole network in one process: it calls more than the one that is divided",
            found=f"parallel.pipeline = {pipeline}",
            change="parallel.pipeline=1; tensor and context axes and the batch can be divided",
        )


def check_ignored(check: Check, ladd: LADDConfig, names: Sequence[str], by: str, found: str = "") -> None:
    """Options that are not what they are by default, and that what `by` says makes inert."""
    for name in names:
        value, default = getattr(ladd, name), getattr(type(ladd), name)
        if value != default:
            check.add(
                f"objective.{name} = {value} is ignored by {by}", found, f"objective.{name}={str(default).lower()}"
            )


def _check_encoder(check: Check, ladd: LADDConfig) -> None:
    encoder, path = ladd.encoder, "objective.encoder"
    check.at_least("objective.encoder_layers", ladd.encoder_layers, 0)
    if encoder.kind != "learned":
        check_encoder(check, encoder)
        check_ignored(check, ladd, ("encoder_layers",), "a frozen encoder", f"{path}.kind = {encoder.kind!r}")
        if encoder.variance_floor != EncoderConfig.variance_floor:
            check.add(
                f"{path}.variance_floor is ignored: LADD pools raw representations",
                change=f"{path}.variance_floor={EncoderConfig.variance_floor}",
            )
        return
    check.at_least(f"{path}.latent_dim", encoder.latent_dim, 1)
    for name in ("path", "layer", "random_weights", "window", "variance_floor"):
        if getattr(encoder, name) != getattr(EncoderConfig, name):
            check.add(f"{path}.{name} is ignored by {path}.kind = 'learned'", change="leave it at its default")
    check_ignored(check, ladd, ("pooling",), f"{path}.kind = 'learned'")
