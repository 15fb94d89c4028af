"""ELF: Embedded Language Flows (arXiv 2605.10938). A rectified flow on latents of the text, and its own decoder.

A frozen encoder says what the clean latents x are. One network learns two things at once, each sequence one of them:
to *denoise* (predict x from z at a random time; the loss is on velocities) and to *decode* (predict the tokens from
slightly noisy latents; cross-entropy). Sampling is a flow from noise to latents, and then one call that decodes.

**Time.** Interfaces speak Braid's t (0 clean, 1 noise): `Corrupted.times`, reports, frames. ELF's formulas and its
network speak flow time tau = 1 - t (0 noise, 1 data). Decoding happens at tau = 1, t = 0.

There is no likelihood here: neither loss bounds it, and no figure is called a bound.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from braid.data_pipeline.loader import Batch
from braid.data_pipeline.tokenizers import Tokenizer
from braid.parallel.layers import ALONE, Region
from braid.pretrain.config.schema import Config
from braid.pretrain.diffusion.flow import (
    guidance_scales,
    guided_target,
    interpolation,
    logit_normal,
    logit_normal_density,
    velocity_weight,
)
from braid.pretrain.model.elf_network import ELFNetwork, ELFPrediction
from braid.pretrain.model.encoders import Encoder
from braid.pretrain.model.t5_encoder import text_latents
from braid.pretrain.model.token_logits import TokenLogits

from .base import Corrupted, Figure, LossTerms, Noise, Objective, Pass, Summed, special_ids, sum_positions, sum_terms

DECODE_COIN, GUIDANCE_COIN, SELF_CONDITION_COIN, DROP_CONDITION_COIN = 1, 2, 3, 4
NO_GUIDANCE = 1.0
NO_LIKELIHOOD = "ELF has no likelihood"


@dataclass(frozen=True, kw_only=True)
class FlowCorrupted(Corrupted):
    """Noised latents, and what each sequence is to learn from them."""

    by_position = (*Corrupted.by_position, "latents", "clean", "condition")

    latents: Tensor
    """z, float32 [B, L, D]; the clean latents at the condition."""
    clean: Tensor
    """x, float32 [B, L, D]; 0 at padding and at a condition that is dropped."""
    flow_times: Tensor
    """tau as the network is told, float64 [B]; 1 for rows that decode."""
    decode: Tensor
    """Rows that learn to decode, bool [B]; the others learn to denoise."""
    guidance: Tensor
    """w as the network is told, float64 [B]."""
    self_conditioned: Tensor
    """m: rows that see an earlier estimate of x and are guided by it, bool [B]."""
    condition: Tensor
    """Given tokens, never noised, bool [B, L]."""
    estimates: tuple[Tensor, Tensor] | None = None
    """Of x, float32 [B, L, D] each: made from nothing, and made when shown the first."""

    @property
    def valid(self) -> Tensor:
        """Where there is text, bool [B, L]."""
        return self.loss_mask | self.condition

    @property
    def token_scored(self) -> Tensor:
        return self.loss_mask & self.decode[:, None]


class FlowPrediction(NamedTuple):
    """What the network says in training, and what the denoiser is compared with."""

    latents: Tensor
    """float32 [B, L, D]."""
    tokens: TokenLogits
    target: Tensor
    """x moved by training-time guidance, float32 [B, L, D], without gradient."""


class ELF(Objective):
    """Flow matching on frozen latents with x-prediction, self-conditioning, trained-in guidance and a decode mode."""

    name = "elf"
    extra_forward_passes = 2.0
    figures = (
        Figure("velocity_mse", "velocity error of the denoiser", False,
               f"guidance off, second pass, training times; mean square per dimension; {NO_LIKELIHOOD}", "value"),
        Figure("latent_mse", "latent error of the denoiser", False,
               f"the same without the weight 1 / max(1 - tau, floor)^2; {NO_LIKELIHOOD}", "value"),
        Figure("decode_accuracy", "decode accuracy under the training noise", False,
               "share of tokens whose decoded token is right", "value"),
        Figure("decode_accuracy_clean", "decode accuracy on clean latents", False,
               "the same without noise: the most a perfect denoiser could reach", "value"),
        Figure("decode_loss", "decode cross-entropy under the training noise", False,
               f"nats, given noisy latents of the token itself; {NO_LIKELIHOOD}", "value"),
        Figure("decode_loss_clean", "decode cross-entropy on clean latents", False,
               f"nats, given the latents of the token itself; {NO_LIKELIHOOD}", "value"),
    )  # fmt: skip

    def __init__(self, config: Any, network: ELFNetwork, encoder: Encoder, *, paired: bool = False, **ids: int) -> None:
        super().__init__(config, network, **ids)
        self.encoder, self.token_share = encoder, config.decode_probability
        std = 1.0 if config.encoder.kind == "trained" else config.latent_std  # its channels are normalised already
        self.text = text_latents(encoder, latent_dim=network.latent_dim, std=std)
        self.paired = paired
        """Rows are (source, target) pairs: what a prompt gives is a source, clean at every step."""

    # -- training ----------------------------------------------------------------------------------------------

    def corrupt(self, batch: Batch, noise: Noise) -> FlowCorrupted:
        config = self.config
        return self._noised(
            batch,
            noise,
            self._clean(batch, noise.coins(DROP_CONDITION_COIN) < config.condition_dropout),
            decode=noise.coins(DECODE_COIN) < config.decode_probability,
            shares=logit_normal(noise.uniforms(batch.tokens.shape[1]), config.decode_time_mean, config.decode_time_std),
            guidance=guidance_scales(noise.coins(GUIDANCE_COIN), config.guidance_min, config.guidance_max),
            self_conditioned=noise.coins(SELF_CONDITION_COIN) < config.self_condition_probability,
        )

    def _clean(self, batch: Batch, dropped: Tensor | None) -> Tensor:
        """x [B, L, D], in the rows `dropped` [B] without their condition."""
        return self.text.encode(batch.tokens, batch.loss_mask | batch.condition, batch.condition, dropped)

    def _noised(
        self,
        batch: Batch,
        noise: Noise,
        clean: Tensor,
        *,
        decode: Tensor,
        shares: Tensor,
        guidance: Tensor,
        self_conditioned: Tensor,
    ) -> FlowCorrupted:
        """Rows that denoise are at one time of the flow, stratified over the batch; in rows that decode each token has
        its own share of clean latent, `shares` [B, L], and the noise another scale."""
        config = self.config
        tau = logit_normal(noise.strata, config.time_mean, config.time_std)
        share = torch.where(decode[:, None], shares, tau[:, None])
        scale = torch.where(decode, config.decode_noise_scale, config.noise_scale).double()
        z = noise.noised_latents(clean, *interpolation(share, scale[:, None]))
        told = torch.where(decode, 1.0, tau)
        return FlowCorrupted(
            targets=batch.tokens,
            loss_mask=batch.loss_mask,
            times=1 - told,
            latents=torch.where(batch.condition[..., None], clean, z),
            clean=clean,
            flow_times=told,
            decode=decode,
            guidance=guidance,
            self_conditioned=self_conditioned,
            condition=batch.condition,
        )

    def passes(self, corrupted: FlowCorrupted) -> Generator[Pass, Tensor, FlowCorrupted]:
        """An estimate from nothing, and one that is shown the first. Their difference is the direction of guidance.

        Rows that decode are never shown anything; their first two calls are not used.
        """
        num_rows = len(corrupted.latents)
        first = yield Pass(partial(self._estimate, corrupted, self._given(corrupted)), num_rows)
        first = self._restored(corrupted, first)
        second = yield Pass(partial(self._estimate, corrupted, first), num_rows)
        return replace(corrupted, estimates=(first, second))

    def call(self, corrupted: FlowCorrupted) -> FlowPrediction:
        """Shown the first estimate in the rows with m = 1."""
        first, second = corrupted.estimates
        shown = torch.where(corrupted.self_conditioned[:, None, None], first, self._given(corrupted))
        output = self._call(corrupted, shown.masked_fill(corrupted.decode[:, None, None], 0.0))
        if not self.stage.at_end:
            return output
        strength = (corrupted.self_conditioned * (1 - 1 / corrupted.guidance)).float()[:, None, None]
        target = guided_target(corrupted.clean, first, second, strength)
        return FlowPrediction(output.latents, output.tokens, target)

    def loss(self, prediction: FlowPrediction, corrupted: FlowCorrupted) -> LossTerms:
        decode = corrupted.decode[:, None]
        error = (prediction.latents - prediction.target).square().mean(-1)
        weight = velocity_weight(corrupted.flow_times, self.config.velocity_floor).float()[:, None]
        terms = {
            "denoise_loss": torch.where(decode, 0.0, weight * error),
            "decode_loss": Summed.of(prediction.tokens.cross_entropy(corrupted.targets, corrupted.rows)),
        }
        return sum_terms(terms, corrupted.loss_mask, corrupted.times)

    # -- calls of the network ----------------------------------------------------------------------------------

    def _call(self, corrupted: FlowCorrupted, shown: Tensor, **options: Any) -> ELFPrediction:
        told = (corrupted.flow_times, corrupted.guidance, corrupted.decode, corrupted.valid)
        return self.network(corrupted.latents, shown, *told, **options)

    def _estimate(self, corrupted: FlowCorrupted, shown: Tensor) -> Tensor:
        output = self._call(corrupted, shown, heads=("denoise",))
        return output.latents if self.stage.at_end else output

    def _given(self, corrupted: FlowCorrupted) -> Tensor:
        """What is shown before there is an estimate: the condition's latents, 0 elsewhere."""
        return self._restored(corrupted, torch.zeros_like(corrupted.clean))

    def _restored(self, corrupted: FlowCorrupted, estimate: Tensor) -> Tensor:
        return torch.where(corrupted.condition[..., None], corrupted.clean, estimate)

    # -- evaluation --------------------------------------------------------------------------------------------

    def evaluate(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        clean, length = self._clean(batch, None), batch.tokens.shape[1]
        everywhere = torch.ones_like(batch.ordinals, dtype=torch.bool)
        common = {"guidance": torch.full_like(noise.shift, NO_GUIDANCE), "self_conditioned": everywhere}
        shares = logit_normal(noise.uniforms(length), self.config.decode_time_mean, self.config.decode_time_std)

        denoise = self._noised(batch, noise, clean, decode=~everywhere, shares=shares, **common)
        first = self._restored(denoise, self._estimate(denoise, self._given(denoise)))
        error = (self._estimate(denoise, first) - clean).square().mean(-1)
        weight = velocity_weight(denoise.flow_times, self.config.velocity_floor)

        def decoded(shares: Tensor) -> tuple[Tensor, Tensor]:
            corrupted = self._noised(batch, noise, clean, decode=everywhere, shares=shares, **common)
            prediction = self._call(corrupted, torch.zeros_like(clean), heads=("decode",))
            right = self.vocabulary.gather(prediction.logits).argmax(-1) == batch.tokens
            return prediction.tokens.cross_entropy(batch.tokens, corrupted.rows).values_BL, right

        nats, right = decoded(shares)
        nats_clean, right_clean = decoded(torch.ones_like(shares))
        values = {
            "velocity_mse": weight[:, None] * error,
            "latent_mse": error,
            "decode_accuracy": right,
            "decode_accuracy_clean": right_clean,
            "decode_loss": nats,
            "decode_loss_clean": nats_clean,
        }
        return {name: sum_positions(value, batch.loss_mask) for name, value in values.items()}

    def schedule_curves(self, times: Tensor) -> dict[str, Tensor]:
        config, tau = self.config, 1 - times
        return {
            "share of clean latent": tau,
            "noise": config.noise_scale * times,
            "density of training times": logit_normal_density(tau, config.time_mean, config.time_std),
            "weight of the latent error": velocity_weight(tau, config.velocity_floor),
        }


def build(config: Config, tokenizer: Tokenizer, encoder: Encoder | None, region: Region = ALONE) -> ELF:
    assert encoder is not None, "ELF needs the latents of an encoder"
    network = ELFNetwork(
        config.model,
        vocab_size=tokenizer.vocab_size,
        latent_dim=encoder.latent_dim,
        bottleneck=config.objective.bottleneck,
        seed=config.run.seed,
        region=region,
    )
    paired = config.data.packing == "pairs"
    return ELF(config.objective, network, encoder, paired=paired, **special_ids(tokenizer))
