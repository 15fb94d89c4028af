"""Settings of ELF."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from braid.pretrain.config.check import Check

from .conditioning import check_cond_dim
from .encoder import EncoderConfig, check_encoder

if TYPE_CHECKING:
    from braid.pretrain.config.schema import Config

GRIDS = ("quantiles", "random", "uniform")
"""Flow times of the samplers (`sampling.grid`)."""


@dataclass(frozen=True, kw_only=True)
class ELFConfig:
    """Embedded Language Flows (ELF, arXiv 2605.10938): a rectified flow on a frozen encoder's latents, decoded by the
    same network. Flow times below run from 0 (noise) to 1 (data), as in the paper, against Braid's t = 1 - flow time.
    Its conditioning is tokens of the model's width, so that `model.cond_dim` has no part in it.
    """

    name: str = "elf"
    """`elf`"""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """What the latents are: `huggingface` with a T5 (as published: google-t5/t5-small, latent_dim 512), or without
    pretrained weights `trained` (a T5 of one's own), `table` (the corpus's own) or `random` (a frozen Gaussian one), in
    falling order of quality."""
    latent_std: float = 0.2
    """A `huggingface` encoder's outputs are divided by this. All others have standard deviation 1 in each dimension."""
    bottleneck: int = 128
    """Width through which the latents enter the network."""
    noise_scale: float = 2.0
    """Standard deviation of the noise at flow time 0."""
    time_mean: float = -1.5
    """Flow times of training are sigmoid(normal): the normal's mean."""
    time_std: float = 0.8
    """The normal's standard deviation."""
    velocity_floor: float = 0.05
    """Velocities divide by max(1 - flow time, this)."""
    decode_probability: float = 0.2
    """Probability that a sequence trains the decoder (tokens from slightly noisy latents), not the denoiser."""
    decode_time_mean: float = 0.8
    """Each token's share of clean latent when decoding is trained is sigmoid(normal): the normal's mean."""
    decode_time_std: float = 0.8
    """The normal's standard deviation."""
    decode_noise_scale: float = 5.0
    """Standard deviation of that noise: 5 for free text, 1 for translation and summarisation."""
    self_condition_probability: float = 0.5
    """Probability that a sequence sees an earlier estimate of its own and is guided by it."""
    guidance_min: float = 0.5
    """Smallest scale of guidance the network is trained for, and told; at most 1, which is none."""
    guidance_max: float = 5.0
    """Largest scale; scales are log-uniform in 1 + scale between the two."""
    condition_dropout: float = 0.1
    """For (source, target) pairs: probability that a row trains without its source, for guidance by it."""


def check(check: Check, config: Config) -> None:
    """What is wrong with the objective's settings."""
    elf, sampling, paired = config.objective, config.sampling, config.data.packing == "pairs"
    _latents(check, elf)
    check.at_least("objective.bottleneck", elf.bottleneck, 1)
    for name in ("noise_scale", "time_std", "decode_time_std", "decode_noise_scale"):
        check.positive(f"objective.{name}", getattr(elf, name))
    check.within("objective.velocity_floor", elf.velocity_floor, "()", 0, 1)
    check.within("objective.decode_probability", elf.decode_probability, "()", 0, 1)
    check.within("objective.self_condition_probability", elf.self_condition_probability, "[]", 0, 1)
    check.within("objective.condition_dropout", elf.condition_dropout, "[)", 0, 1)
    if not paired and elf.condition_dropout != ELFConfig.condition_dropout:
        check.add(
            f"objective.condition_dropout = {elf.condition_dropout} is ignored: there are no sources to drop",
            found=f"data.packing = {config.data.packing!r}",
            change=f"objective.condition_dropout={ELFConfig.condition_dropout}, or data.packing=pairs",
        )
    ranged = check.within("objective.guidance_min", elf.guidance_min, "(]", 0, 1)
    if check.at_least("objective.guidance_max", elf.guidance_max, 1) and ranged:
        check.within("sampling.guidance", sampling.guidance, "[]", elf.guidance_min, elf.guidance_max)
    if sampling.input_guidance != 1 and (not paired or elf.condition_dropout == 0):
        check.add(
            "there is nothing to guide: the model never learns to do without a source",
            found=f"sampling.input_guidance = {sampling.input_guidance}, data.packing = {config.data.packing!r}, "
            f"objective.condition_dropout = {elf.condition_dropout}",
            change="sampling.input_guidance=1, or pairs and a condition_dropout above 0",
        )
    if config.model.dropout != 0:
        found = f"model.dropout = {config.model.dropout}"
        check.add("model.dropout is ignored by objective.name = 'elf'", found, "model.dropout=0")
    check_cond_dim(check, config)


def _latents(check: Check, elf: ELFConfig) -> None:
    encoder = elf.encoder
    check_encoder(check, encoder)
    check.positive("objective.latent_std", elf.latent_std)
    if encoder.kind != "huggingface" and elf.latent_std != ELFConfig.latent_std:
        found = f"objective.encoder.kind = {encoder.kind!r}"
        check.add("objective.latent_std is ignored: a table or trained encoder is standardised by itself", found,
                  f"objective.latent_std={ELFConfig.latent_std}")  # fmt: skip
    if encoder.kind == "huggingface" and encoder.layer != -1:
        found = f"objective.encoder.layer = {encoder.layer}"
        check.add("ELF takes the encoder's last layer", found, "objective.encoder.layer=-1")
    if encoder.variance_floor != EncoderConfig.variance_floor:
        found = f"objective.encoder.variance_floor = {encoder.variance_floor}"
        check.add("objective.encoder.variance_floor is ignored: ELF does not standardise each latent", found,
                  f"objective.encoder.variance_floor={EncoderConfig.variance_floor}")  # fmt: skip
