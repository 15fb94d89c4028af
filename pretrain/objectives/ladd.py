"""What both forms of latent-augmented discrete diffusion share (LADD, arXiv 2510.18114).

Masked tokens x beside a short sequence of S latent slots y, a function of the text: continuous in Co-LADD, codes in
Di-LADD. Both strands are noised; one network sees (x_t, y_t) and predicts both. A denoiser that knows y needs fewer
dependencies between the tokens it unmasks at once.

Latents made from the whole text contain the answer, so the token term alone is no bound: "token nats given latents"
must be paid for by the latents, along the path the sampler takes. Two paths: joint (both times equal) and sequential
(latents first, at t_x = 1; then the text, at clean latents). The token term by itself is a bound where the latents are
made from the visible tokens only ("token bound").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from braid.data_pipeline.loader import Batch
from braid.pretrain.diffusion.absorbing import mask_tokens, masked_cross_entropy
from braid.pretrain.diffusion.ladd import Survival
from braid.pretrain.model.encoders import Encoder
from braid.pretrain.model.joint_attention import JointDenoiser, SlotPrediction
from braid.pretrain.model.pooling import encode_slots

from .base import Figure, Noise, Objective, TokenCorrupted, sum_positions

HIDING_LEVEL_COIN, HIDING_COIN, LATENT_DROPOUT_COIN = 1, 2, 3
BOUND_TIME_MIN = 1e-5
SURVIVAL = Survival()

TOKEN_BOUND = Figure(
    "token_bound",
    "token bound, latents from visible tokens only",
    True,
    "discrete NELBO, t in [1e-5, 1]; the encoder reads what is visible and is part of the model",
)
LATENTS_OFF = Figure(
    "token_bound_latents_off",
    "token bound, latents switched off",
    True,
    "the same with nothing in the slots: what latents are worth to the trained network",
)


def joint_figure(latents: str, note: str) -> Figure:
    """The bound of sampling both strands at equal times."""
    return Figure("joint_nelbo", f"joint NELBO of tokens and latents, {latents}", True, note)


def sequential_figure(latents: str, note: str) -> Figure:
    """The bound of sampling the latents before the text."""
    return Figure("sequential_nelbo", f"NELBO of the latents, then the tokens, {latents}", True, note)


def given_latents_figure(path: str) -> Figure:
    """The token term of the bound of one path."""
    note = f"the latents were made from the whole text; the token part of the {path} NELBO"
    return Figure("token_nats_given_latents", "token nats given latents", False, note)


@dataclass(frozen=True, kw_only=True)
class SlotCorrupted(TokenCorrupted):
    """Noised tokens and slots. `times` are the tokens'."""

    by_position = (*TokenCorrupted.by_position, "latents", "latent_targets")

    latents: Tensor
    """What the network sees in the slots, float32 [B, S, D]."""
    latent_times: Tensor
    """float64 [B]."""
    latent_targets: Tensor | None = None
    """Clean latents, float32 [B, S, D], or codes, int64 [B, S]."""
    latent_weight: Tensor | None = None
    """0 where the latent loss is off (latent dropout), float32 [B]."""


class LADD(Objective):
    """Base of Co-LADD and Di-LADD: corruption of the tokens, hiding, pooling, the token terms of bounds."""

    network: JointDenoiser

    def __init__(self, config: Any, network: JointDenoiser, encoder: Encoder | None, **ids: int) -> None:
        super().__init__(config, network, **ids)
        assert encoder is None or not encoder.leaky, "LADD hides tokens before the encoder"
        self.encoder = encoder
        self.training_survival = Survival(eps=config.time_eps)

    # -- corruption --------------------------------------------------------------------------------------------

    def mask_text(self, batch: Batch, noise: Noise, times: Tensor, survival: Survival) -> tuple[Tensor, Tensor]:
        """x_t and where it is masked, [B, L] each."""
        uniforms = noise.uniforms(batch.tokens.shape[1])
        return mask_tokens(batch.tokens, uniforms, survival.masked(times), self.mask_id, keep=batch.condition)

    def mask_all(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """x_1: every token masked but the given ones."""
        return torch.where(batch.condition, batch.tokens, self.mask_id), ~batch.condition

    def hidden_tokens(self, masked_BL: Tensor, noise: Noise) -> Tensor:
        """What the encoder does not see in training: with a probability r ~ U[0, hidden_max] of its own, a sequence's
        masked tokens, all of them."""
        level = self.config.hidden_max * noise.coins(HIDING_LEVEL_COIN)
        return masked_BL & (noise.coins(HIDING_COIN) < level)[:, None]

    def frozen_slots(self, batch: Batch, hidden_BL: Tensor) -> Tensor:
        """Pooled raw representations [B, S, D] by the frozen encoder, float32 whatever autocast says."""
        text = batch.loss_mask | batch.condition
        with torch.autocast(batch.tokens.device.type, enabled=False):
            return encode_slots(self.encoder, batch.tokens, hidden_BL, text, self.config.pooling, self.config.num_slots)

    def latents_kept(self, noise: Noise) -> Tensor:
        """False where a sequence trains without latents, bool [B]."""
        return noise.coins(LATENT_DROPOUT_COIN) >= self.config.latent_dropout

    # -- prediction and its terms ------------------------------------------------------------------------------

    def call(self, corrupted: SlotCorrupted) -> SlotPrediction:
        dropout = corrupted.dropout if self.training else None
        return self.network(corrupted.tokens, corrupted.latents, corrupted.times, corrupted.latent_times, dropout)

    def token_nats(self, prediction: SlotPrediction, targets: Tensor, masked: Tensor) -> Tensor:
        """Cross-entropy of masked tokens, [B, L]."""
        return masked_cross_entropy(prediction.logits, targets, masked, self.mask_id, self.vocabulary)

    def latent_scale(self) -> float:
        """Factor of the latent loss: 0 in stage one."""
        return self.config.latent_scale if self.step >= self.config.stage_one_steps else 0.0

    def bound_terms(
        self,
        batch: Batch,
        text: tuple[Tensor, Tensor],
        latents_BSD: Tensor,
        times_B: Tensor,
        latent_times_B: Tensor,
    ) -> tuple[Tensor, SlotPrediction]:
        """Cross-entropy of each sequence's masked tokens (float64 [B], over the positions that count), and all the
        network says, of x_t (`text`: tokens and where they are masked) and y_t."""
        tokens, masked = text
        prediction = self.network(tokens, latents_BSD, times_B, latent_times_B)
        nats = self.token_nats(prediction, batch.tokens, masked)
        return sum_positions(nats, batch.loss_mask), prediction
