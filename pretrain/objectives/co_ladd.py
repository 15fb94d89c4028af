"""Co-LADD: masked tokens with a few continuous latents, the unit-norm pooled representations of the text.

arXiv 2510.18114. Plain losses, as published: the cross-entropy of masked tokens and the squared error of the latents,
without weights over time. Tokens and latents have one time; the latents' schedule keeps them cleaner. A learned encoder
follows the gradients of both losses, of the second also as its target.

With a denoiser of their own (the published SEQ) the latents come first, from it alone, and the joint network is only
ever shown y at t = 0 of the process, where the sampler leaves it; what it says of the slots is then nobody's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from braid.data_pipeline.loader import Batch
from braid.data_pipeline.tokenizers import Tokenizer
from braid.kernels.random import fold_key
from braid.parallel.layers import ALONE, Region
from braid.pretrain.config.schema import Config
from braid.pretrain.diffusion.ladd import LatentSchedule, bound_times, shifted_times
from braid.pretrain.diffusion.times import BOUND_TIME_MIN, second_strata, to_range
from braid.pretrain.model.blocks import DropoutKey
from braid.pretrain.model.encoders import Encoder
from braid.pretrain.model.joint_attention import JointDenoiser, SlotPrediction
from braid.pretrain.model.latent_denoiser import LatentDenoiser
from braid.pretrain.model.latent_encoder import LatentEncoder
from braid.pretrain.model.pooling import unit_norm

from .base import Figure, LossTerms, Noise, Summed, special_ids, sum_terms
from .ladd import (
    LADD,
    LATENTS_OFF,
    SURVIVAL,
    TOKEN_BOUND,
    SlotCorrupted,
    build_latent_encoder,
    extra_passes,
    given_latents_figure,
    joint_figure,
    sequential_figure,
)


@dataclass(frozen=True, kw_only=True)
class CoCorrupted(SlotCorrupted):
    """Noised tokens and Gaussian latents."""

    by_position = (*SlotCorrupted.by_position, "noised_latents")

    time_weight: Tensor
    """Correction for the time shift, float32 [B]."""
    noised_latents: Tensor | None = None
    """What the latents' own denoiser sees, float32 [B, S, D], and its times, float64 [B]."""
    noised_latent_times: Tensor | None = None


class CoLADD(LADD):
    """Continuous latents."""

    name = "co_ladd"

    def __init__(
        self,
        config: Any,
        network: JointDenoiser,
        encoder: Encoder | None,
        latent_encoder: LatentEncoder | None = None,
        latent_denoiser: LatentDenoiser | None = None,
        **ids: int,
    ) -> None:
        super().__init__(config, network, encoder, latent_encoder, **ids)
        self.latent_denoiser = latent_denoiser
        self.schedule = LatentSchedule(config.latent_schedule, config.latent_power, config.time_eps)
        self.figures = self._figures()

    def _figures(self) -> tuple[Figure, ...]:
        latents = f"q(y_0|x) = N(E(x), {self.config.latent_sigma:g}^2 I)"
        note = "latent, token and prior terms, t in [1e-5, 1]"
        if self.latent_denoiser is not None:
            sequential = sequential_figure(latents, "of the latents' own denoiser; " + note, "sequential_nelbo")
            return (TOKEN_BOUND, LATENTS_OFF, sequential, given_latents_figure("sequential"))
        figures = [TOKEN_BOUND, LATENTS_OFF, joint_figure(latents, note, "joint_nelbo"), given_latents_figure("joint")]
        if self.config.independent_times:
            figures.append(sequential_figure(latents, note, "sequential_nelbo"))
        return tuple(figures)

    # -- training ----------------------------------------------------------------------------------------------

    def corrupt(self, batch: Batch, noise: Noise) -> CoCorrupted:
        times, weight = self._training_times(noise.strata)
        latent_times = times
        if self.config.independent_times:
            latent_times, latent_weight = self._training_times(second_strata(noise.index, noise.shift))
            weight = weight * latent_weight
        tokens, masked = self.mask_text(batch, noise, times, self.training_survival)
        dropout = noise.dropout_key(batch.tokens.shape[1])
        # The target is what was noised, the representation of a partly hidden text included.
        clean = self.slots(batch, self.hidden_tokens(masked, noise), dropout)
        kept = self.latents_kept(noise)
        seen_times, own = latent_times, {}
        if self.latent_denoiser is not None:
            seen_times = torch.zeros_like(times)
            noised_latents = self._noised(clean, noise, latent_times, purpose="latent_denoiser")
            own = {"noised_latents": noised_latents, "noised_latent_times": latent_times}
        return CoCorrupted(
            tokens=tokens,
            targets=batch.tokens,
            loss_mask=batch.loss_mask,
            times=times,
            masked=masked,
            latents=self._noised(clean, noise, seen_times) * kept[:, None, None],
            latent_times=seen_times,
            latent_targets=clean,
            latent_weight=kept.float(),
            time_weight=weight.float() if self.config.time_shift_correction else torch.ones_like(weight).float(),
            without_tokens=self.blind_tokens(batch),
            dropout=dropout,
            **own,
        )

    def slots(self, batch: Batch, hidden_BL: Tensor, dropout: DropoutKey | None = None) -> Tensor:
        """E(x) of the text but for its hidden tokens, [B, S, D]."""
        slots = self.raw_slots(batch, hidden_BL, dropout)
        return unit_norm(slots) if self.config.latent_norm == "unit" else slots

    def call(self, corrupted: CoCorrupted) -> SlotPrediction:
        prediction = super().call(corrupted)
        if self.latent_denoiser is None:
            return prediction
        dropout = corrupted.dropout if self.training else None
        latents = self.denoise(corrupted.noised_latents, corrupted.noised_latent_times, dropout)
        return prediction._replace(latents=latents)

    def denoise(self, latents: Tensor, times: Tensor, dropout: DropoutKey | None = None) -> Tensor:
        """What the latents' own denoiser says of y_0, [B, S, D]."""
        if dropout is not None:
            slots = self.context.start(latents.shape[1]) + torch.arange(latents.shape[1], device=latents.device)
            dropout = DropoutKey(fold_key(dropout.key, "latent_denoiser"), dropout.ordinals, slots)
        return self.latent_denoiser(latents, times, dropout)

    def _training_times(self, strata: Tensor) -> tuple[Tensor, Tensor]:
        """Times and the derivative of the shift that made them."""
        return shifted_times(to_range(strata, self.config.time_eps), self.config.time_shift)

    def _noised(
        self, clean: Tensor, noise: Noise, times: Tensor, sigma: float = 0.0, purpose: str = "latent"
    ) -> Tensor:
        """y_t for y_0 ~ N(clean, sigma^2 I): one Gaussian of both noises."""
        alpha = self.schedule.alpha(times)
        deviation = torch.sqrt(self.schedule.sigma(times).square() + (alpha * sigma).square())
        return noise.noised_latents(clean, alpha, deviation, purpose=purpose)

    def loss(self, prediction: SlotPrediction, corrupted: CoCorrupted) -> LossTerms:
        """Sums over positions: a sequence's mean squared error stands at each of its positions."""
        mask, time_weight = corrupted.loss_mask, corrupted.time_weight[:, None]
        independence = self.independence_terms(prediction, corrupted)
        nats = self.token_nats(prediction, corrupted.targets, corrupted.rows, time_weight)
        error = self.context.mean((prediction.latents - corrupted.latent_targets).square().mean(2))
        latent_weight = self.latent_scale() * corrupted.time_weight * corrupted.latent_weight
        terms = {
            "token_loss": Summed.of(nats, time_weight),
            "latent_loss": (latent_weight * error)[:, None].expand_as(mask),
        }
        if self.config.latent_prior_scale:
            prior = self.context.mean(corrupted.latent_targets.square().mean(2)) / 2
            terms["prior_loss"] = self.config.latent_prior_scale * prior[:, None].expand_as(mask)
        return sum_terms(terms | independence, mask, corrupted.times)

    # -- evaluation --------------------------------------------------------------------------------------------

    def evaluate(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        figures = {}
        if self.latent_denoiser is None:
            figures["joint_nelbo"], figures["token_nats_given_latents"] = self._joint_nelbo(batch, noise)
        figures["token_bound"] = self._token_bound(batch, noise, latents=True)
        figures["token_bound_latents_off"] = self._token_bound(batch, noise, latents=False)
        if self.config.independent_times or self.latent_denoiser is not None:
            figures["sequential_nelbo"], token_part = self._sequential_nelbo(batch, noise)
            figures.setdefault("token_nats_given_latents", token_part)
        return figures

    def _joint_nelbo(self, batch: Batch, noise: Noise) -> tuple[Tensor, Tensor]:
        """-log p(x) <= this, and its token part, in nats per sequence.

        q(y_0|x) = N(E(x), s^2 I). Given the text, y_t is Markov with a known drift, and the network's differs from it
        by its error about E(x): the KL divergence of the two diffusions is

            1/2 int -SNR' / (1 + s^2 SNR)^2 ||yhat - E(x)||^2 dt + KL(q(y_1|x) || N(0, I)).

        The text is decoded from x_t beside y_t and y_0 itself never is, so there is no reconstruction term; adding one
        (LADD, B6: v = 1 / (SNR + 1/s^2)) adds the KL divergence of a last step that samples y_0. For the same reason
        the bound stays finite at s = 0: the latents then end at y_t of the smallest time.
        """
        times, density = bound_times(noise.strata, BOUND_TIME_MIN)
        clean = self._clean(batch)
        latents = self._noised(clean, noise, times, self.config.latent_sigma)
        text = self.mask_text(batch, noise, times, SURVIVAL)
        nats, prediction = self.bound_terms(batch, text, latents, times, times)
        token_part = SURVIVAL.elbo_weight(times) * nats / density
        latent_part = self._latent_rate(times) * _squared_error(prediction.latents, clean) / density
        return token_part + latent_part + self._prior_nats(clean), token_part

    def _sequential_nelbo(self, batch: Batch, noise: Noise) -> tuple[Tensor, Tensor]:
        """The latents' part at t_x = 1 or of their own denoiser, then the tokens' at the cleanest latents; the sum and
        the latter."""
        times, density = bound_times(noise.strata, BOUND_TIME_MIN)
        clean, sigma = self._clean(batch), self.config.latent_sigma
        latents = self._noised(clean, noise, times, sigma)
        if self.latent_denoiser is not None:
            yhat = self.denoise(latents, times)
        else:
            yhat = self.bound_terms(batch, self.mask_all(batch), latents, torch.ones_like(times), times)[1].latents
        latent_part = self._latent_rate(times) * _squared_error(yhat, clean) / density + self._prior_nats(clean)
        times, first = to_range(noise.strata, BOUND_TIME_MIN), torch.full_like(times, BOUND_TIME_MIN)
        text = self.mask_text(batch, noise, times, SURVIVAL)
        nats, _ = self.bound_terms(batch, text, self._noised(clean, noise, first, sigma), times, first)
        token_part = (1 - BOUND_TIME_MIN) * SURVIVAL.elbo_weight(times) * nats
        return latent_part + token_part, token_part

    def _token_bound(self, batch: Batch, noise: Noise, *, latents: bool) -> Tensor:
        times = to_range(noise.strata, BOUND_TIME_MIN)
        text = self.mask_text(batch, noise, times, SURVIVAL)
        latent_times = times if self.latent_denoiser is None else torch.zeros_like(times)
        seen = self._noised(self.slots(batch, text[1]), noise, latent_times)
        nats, _ = self.bound_terms(batch, text, seen if latents else torch.zeros_like(seen), times, latent_times)
        return (1 - BOUND_TIME_MIN) * SURVIVAL.elbo_weight(times) * nats

    def _clean(self, batch: Batch) -> Tensor:
        """E(x) of the whole text."""
        return self.slots(batch, torch.zeros_like(batch.condition))

    def _latent_rate(self, times: Tensor) -> Tensor:
        """Weight of ||yhat - E(x)||^2 in the bounds, float64 [B]."""
        divisor = 1 + self.config.latent_sigma**2 * self.schedule.snr(times)
        return self.schedule.snr_rate(times) / 2 / divisor.square()

    def _prior_nats(self, clean: Tensor) -> Tensor:
        """KL(q(y_1|x) || N(0, I)), float64 [B]."""
        alpha_squared = float(self.schedule.alpha_squared(torch.tensor(1.0, dtype=torch.float64)))
        added = alpha_squared * (self.config.latent_sigma**2 - 1)  # variance of q(y_1|x) less 1
        num_dims = clean.shape[1] * clean.shape[2]
        length_squared = clean.double().square().sum((1, 2))
        return (alpha_squared * length_squared + num_dims * (added - math.log1p(added))) / 2

    def schedule_curves(self, times: Tensor) -> dict[str, Tensor]:
        return {
            "token survival": self.training_survival.alpha(times),
            "latent alpha": self.schedule.alpha(times),
            "latent sigma": self.schedule.sigma(times),
        }


def _squared_error(yhat: Tensor, clean: Tensor) -> Tensor:
    """||yhat - E(x)||^2 of each sequence, float64 [B]."""
    return (yhat.double() - clean.double()).square().sum((1, 2))


def build(config: Config, tokenizer: Tokenizer, encoder: Encoder | None, region: Region = ALONE) -> CoLADD:
    """From a configuration, the corpus's tokenizer and the frozen encoder, or none where it is learnt."""
    ladd, seed = config.objective, config.run.seed
    slots = {"num_slots": ladd.num_slots, "latent_dim": ladd.encoder.latent_dim, "region": region}
    network = JointDenoiser(
        config.model,
        **slots,
        vocab_size=tokenizer.vocab_size,
        latent_outputs=ladd.encoder.latent_dim,
        latent_positions=ladd.latent_positions,
        times=ladd.time_conditioning,
        masked_latents=False,
        seed=seed,
    )
    latent_encoder = build_latent_encoder(config, tokenizer, region, ladd.encoder.latent_dim)
    latent_denoiser = None
    if ladd.latent_denoiser:
        model = replace(config.model, num_layers=ladd.latent_denoiser_layers or config.model.num_layers)
        latent_denoiser = LatentDenoiser(model, **slots, seed=fold_key(seed, "latent_denoiser"))
    objective = CoLADD(ladd, network, encoder, latent_encoder, latent_denoiser, **special_ids(tokenizer))
    objective.extra_forward_passes = extra_passes(config, network, latent_encoder, latent_denoiser)
    return objective
