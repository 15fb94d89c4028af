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

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from braid.data_pipeline.loader import Batch
from braid.data_pipeline.tokenizers import Tokenizer
from braid.kernels.linear_loss import Rows
from braid.kernels.random import fold_key
from braid.parallel.context import UNDIVIDED
from braid.parallel.layers import Region
from braid.pretrain.config.schema import Config
from braid.pretrain.diffusion.ladd import Independence, Survival, warmup_factor
from braid.pretrain.model.blocks import DropoutKey
from braid.pretrain.model.encoders import Encoder
from braid.pretrain.model.joint_attention import JointDenoiser, SlotPrediction
from braid.pretrain.model.latent_encoder import LatentEncoder
from braid.pretrain.model.network import Network
from braid.pretrain.model.pooling import encode_slots
from braid.pretrain.model.token_logits import TokenLoss

from .base import Figure, Noise, Objective, Summed, TokenCorrupted, sum_positions

HIDING_LEVEL_COIN, HIDING_COIN, LATENT_DROPOUT_COIN = 1, 2, 3
ENCODER_MASKING_WORD = 2
SURVIVAL = Survival()

TOKEN_BOUND = Figure(
    "token_bound",
    "token bound, latents from visible tokens only",
    True,
    "discrete NELBO, t in [1e-5, 1]; of unmasking beside what the encoder, part of the model, says of the visible "
    "tokens at every step, which no sampler here does",
)
LATENTS_OFF = Figure(
    "token_bound_latents_off",
    "token bound, latents switched off",
    True,
    "the same with nothing in the slots: what latents are worth to the trained network",
)


def joint_figure(latents: str, note: str, sampler: str) -> Figure:
    """The bound of sampling both strands at equal times, as `sampler` does."""
    note = f"{note}; of the sampler {sampler} in many steps"
    return Figure("joint_nelbo", f"joint NELBO of tokens and latents, {latents}", True, note)


def sequential_figure(latents: str, note: str, sampler: str) -> Figure:
    """The bound of sampling the latents before the text, as `sampler` does."""
    note = f"{note}; of the sampler {sampler} in many steps"
    return Figure("sequential_nelbo", f"NELBO of the latents, then the tokens, {latents}", True, note)


def given_latents_figure(path: str) -> Figure:
    """The token term of the bound of one path."""
    note = f"the latents were made from the whole text; the token part of the {path} NELBO"
    return Figure("token_nats_given_latents", "token nats given latents", False, note)


@dataclass(frozen=True, kw_only=True)
class SlotCorrupted(TokenCorrupted):
    """Noised tokens and slots. `times` are the tokens'."""

    by_position = (*TokenCorrupted.by_position, "latents", "latent_targets", "without_tokens")

    latents: Tensor
    """What the network sees in the slots, float32 [B, S, D]."""
    latent_times: Tensor
    """float64 [B]."""
    latent_targets: Tensor | None = None
    """Clean latents, float32 [B, S, D], or codes, int64 [B, S]."""
    latent_weight: Tensor | None = None
    """0 where the latent loss is off (latent dropout), float32 [B]."""
    without_tokens: Tensor | None = None
    """x_1, int64 [B, L], where the network is called a second time with it."""


class LADD(Objective):
    """Base of Co-LADD and Di-LADD: corruption of the tokens, hiding, pooling, the token terms of bounds."""

    network: JointDenoiser

    def __init__(
        self,
        config: Any,
        network: JointDenoiser,
        encoder: Encoder | None,
        latent_encoder: LatentEncoder | None = None,
        **ids: int,
    ) -> None:
        super().__init__(config, network, **ids)
        assert (encoder is None) != (latent_encoder is None), "the slots come from one encoder"
        assert encoder is None or not encoder.leaky, "LADD hides tokens before the encoder"
        self.encoder, self.latent_encoder = encoder, latent_encoder
        self.token_share = 0.5
        self.training_survival = Survival(eps=config.time_eps)

    # -- corruption --------------------------------------------------------------------------------------------

    def mask_text(self, batch: Batch, noise: Noise, times: Tensor, survival: Survival) -> tuple[Tensor, Tensor]:
        """x_t and where it is masked, [B, L] each."""
        probability = survival.masked(times)
        return noise.noised_tokens(batch.tokens, self.mask_id, mask_probability=probability, keep=batch.condition)

    def mask_all(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """x_1: every token masked but the given ones."""
        return torch.where(batch.condition, batch.tokens, self.mask_id), ~batch.condition

    def hidden_tokens(self, masked_BL: Tensor, noise: Noise) -> Tensor:
        """What the encoder does not see in training: with a probability r ~ U[0, hidden_max] of its own, a sequence's
        masked tokens, all of them; and any token with probability `encoder_masking`."""
        level = self.config.hidden_max * noise.coins(HIDING_LEVEL_COIN)
        hidden_BL = masked_BL & (noise.coins(HIDING_COIN) < level)[:, None]
        if self.config.encoder_masking:
            uniforms_BL = noise.uniforms(masked_BL.shape[1], word=ENCODER_MASKING_WORD)
            hidden_BL = hidden_BL | (uniforms_BL < self.config.encoder_masking)
        return hidden_BL

    def raw_slots(self, batch: Batch, hidden_BL: Tensor, dropout: DropoutKey | None = None) -> Tensor:
        """[B, S, D], float32 whatever autocast says, with a gradient where the encoder is learnt."""
        if self.latent_encoder is None:
            return self.frozen_slots(batch, hidden_BL)
        if dropout is not None:
            dropout = replace(dropout, key=fold_key(dropout.key, "latent_encoder"))
        with torch.autocast(batch.tokens.device.type, enabled=False):
            return self.latent_encoder(batch.tokens, hidden_BL, dropout)

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
        latents, times = corrupted.latents, corrupted.latent_times
        prediction = self.network(corrupted.tokens, latents, corrupted.times, times, dropout)
        if corrupted.without_tokens is None:
            return prediction
        blind = self.network(corrupted.without_tokens, latents, torch.ones_like(corrupted.times), times, dropout)
        return prediction._replace(without_tokens=blind.tokens)

    def token_nats(
        self, prediction: SlotPrediction, targets: Tensor, rows: Rows, weights_BL: Tensor | None = None
    ) -> TokenLoss:
        """Cross-entropy of masked tokens, `rows`."""
        return prediction.tokens.cross_entropy(targets, rows, weights_BL, without=self.mask_id)

    def latent_scale(self) -> float:
        """Factor of the latent loss: 0 in stage one, then as the warm-up says."""
        config, steps = self.config, self.step - self.config.stage_one_steps
        return (
            config.latent_scale * warmup_factor(config.latent_warmup, steps, config.latent_warmup_steps) * (steps >= 0)
        )

    def blind_tokens(self, batch: Batch) -> Tensor | None:
        """x_1 where a second call of the network is to see it."""
        return self.mask_all(batch)[0] if self.config.independence_scale else None

    def independence_terms(self, prediction: SlotPrediction, corrupted: SlotCorrupted) -> dict[str, Summed]:
        """The independence loss of masked tokens, where it is asked for."""
        if prediction.without_tokens is None:
            return {}
        scale = self.config.independence_scale
        loss = partial(Independence, scale=scale, mask_id=self.mask_id, vocabulary=self.vocabulary)
        shape = corrupted.targets.shape
        nats = prediction.without_tokens.loss_beside(prediction.tokens, loss, corrupted.rows, shape)
        return {"independence_loss": Summed.of(nats, scale)}

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
        nats = self.token_nats(prediction, batch.tokens, Rows(masked & batch.loss_mask)).values_BL
        return sum_positions(nats, batch.loss_mask), prediction


def build_latent_encoder(
    config: Config, tokenizer: Tokenizer, region: Region, num_outputs: int
) -> LatentEncoder | None:
    """The encoder that is learnt, where it is, with slots of `num_outputs` dimensions."""
    ladd = config.objective
    if ladd.encoder.kind != "learned":
        return None
    return LatentEncoder(
        replace(config.model, num_layers=ladd.encoder_layers or config.model.num_layers),
        vocab_size=tokenizer.vocab_size,
        num_slots=ladd.num_slots,
        latent_dim=num_outputs,
        mask_id=tokenizer.mask_id,
        seed=fold_key(config.run.seed, "latent_encoder"),
        # It is part of the corruption, which is of whole sequences everywhere.
        region=replace(region, context=UNDIVIDED),
    )


def extra_passes(config: Config, network: JointDenoiser, *others: Network | None) -> float:
    """What a training step computes beside a forward and backward pass of `network`, in its forward passes: those of
    `others` and of the independence loss."""
    length = config.data.sequence_length
    whole = network.training_flops(length).total
    share = sum(other.training_flops(length).total / whole for other in others if other is not None)
    return 3 * (share + (config.objective.independence_scale > 0))
