"""Duo: uniform-state diffusion (arXiv 2506.10892), and the curriculum of soft tokens that begins its training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from braid.data_pipeline.loader import Batch
from braid.data_pipeline.tokenizers import Tokenizer
from braid.parallel.layers import ALONE, Region
from braid.pretrain.config.schema import Config
from braid.pretrain.diffusion.duality import soft_tokens, token_survival
from braid.pretrain.diffusion.times import BOUND_TIME_MIN, to_range
from braid.pretrain.diffusion.uniform import MarginalDivergence, decoding_nats, jump_weight
from braid.pretrain.model.backbone import Backbone, Prediction
from braid.pretrain.model.encoders import Encoder
from braid.pretrain.model.network import Network

from .base import Corrupted, Figure, LossTerms, Noise, Objective, Summed, special_ids, sum_positions, sum_terms

PUBLISHED_EPS = 1e-3


@dataclass(frozen=True, kw_only=True)
class DuoCorrupted(Corrupted):
    """Tokens of the uniform process at `times`; survival is 1 - times."""

    by_position = (*Corrupted.by_position, "tokens", "noised")

    tokens: Tensor
    """Network input: x_t, int64 [B, L], or in the curriculum softmax(w / tau), float32 [B, L, V]."""
    noised: Tensor
    """x_t, int64 [B, L]; in the curriculum argmax(w)."""
    speed: Tensor
    """-d alpha / du, float64 [B]: survival lost per unit of the stratum u that the time was made of."""


class Duo(Objective):
    """The network predicts x_0 from all positions but each one's own (see `diffusion.uniform`); it is told the time.

    All losses are estimates of the NELBO's integral over a range of survival: [1 - time_max, 1 - time_min], or what
    the curriculum's gammas span.
    """

    name = "duo"
    figures = (
        Figure(
            "bound",
            "token bound",
            True,
            "NELBO with alpha = 1 - t, t in [1e-5, 1], plus what decoding at 1e-5 costs; no prior term (alpha_1 = 0)",
        ),
        Figure(
            "published",
            "published convention",
            False,
            "mean over t in [1e-3, 1] with alpha = 1 - 0.999 t, without its end terms: some 0.02 nats low",
        ),
    )

    def __init__(self, config: Any, network: Network, *, mask_id: int, bos_id: int, eos_id: int) -> None:
        super().__init__(config, network, mask_id=mask_id, bos_id=bos_id, eos_id=eos_id)
        self.num_tokens = network.vocab_size - 1  # the mask is no state of this process

    @property
    def in_curriculum(self) -> bool:
        """Whether the network is now trained on soft tokens."""
        return self.step < self.config.curriculum_steps

    # -- training ----------------------------------------------------------------------------------------------

    def corrupt(self, batch: Batch, noise: Noise) -> DuoCorrupted:
        if self.in_curriculum:
            return self._soften(batch, noise)
        return self._corrupt(batch, noise, to_range(noise.strata, self.config.time_min, self.config.time_max))

    def _corrupt(self, batch: Batch, noise: Noise, times: Tensor) -> DuoCorrupted:
        """The discrete process at `times`; `speed` is that of training."""
        length = batch.tokens.shape[1]
        noised, _ = noise.noised_tokens(
            batch.tokens, self.mask_id, uniform_probability=times, num_tokens=self.num_tokens, keep=batch.condition
        )
        return DuoCorrupted(
            tokens=noised,
            noised=noised,
            targets=batch.tokens,
            loss_mask=batch.loss_mask,
            segments=batch.segments,
            times=times,
            speed=torch.full_like(times, self.config.time_max - self.config.time_min),
            dropout=noise.dropout_key(length),
        )

    def _soften(self, batch: Batch, noise: Noise) -> DuoCorrupted:
        """The Gaussian process at gamma uniform in its range; its argmax has survival T, and so the time 1 - T."""
        length, config = batch.tokens.shape[1], self.config
        gamma = to_range(noise.strata, config.curriculum_gamma_min, config.curriculum_gamma_max)
        survival, rate = token_survival(gamma, self.num_tokens)
        normals = noise.normals(length, self.network.vocab_size)
        soft, noised = soft_tokens(
            batch.tokens, normals, gamma, config.curriculum_tau, self.mask_id, keep=batch.condition
        )
        return DuoCorrupted(
            tokens=soft,
            noised=noised,
            targets=batch.tokens,
            loss_mask=batch.loss_mask,
            segments=batch.segments,
            times=1 - survival,
            speed=(config.curriculum_gamma_max - config.curriculum_gamma_min) * rate,
            dropout=noise.dropout_key(length),
        )

    def nats(self, prediction: Prediction, corrupted: DuoCorrupted, *, precise: bool = False) -> Summed:
        """NELBO density times `speed` at each position; `precise`: float64 over the vocabulary, too."""
        survival, shape = 1 - corrupted.times, corrupted.targets.shape
        place = corrupted.noised, corrupted.targets
        weight = corrupted.speed[:, None] * jump_weight(*place, survival, self.num_tokens)
        survival = survival[:, None].expand(shape)
        each = (values.flatten() for values in (*place, survival, (1 - survival) / self.num_tokens, weight))
        divergence = MarginalDivergence(*each, self.mask_id, self.vocabulary, precise)
        return Summed.of(prediction.tokens.loss(divergence, corrupted.rows, shape), weight)

    def loss(self, prediction: Prediction, corrupted: DuoCorrupted) -> LossTerms:
        return sum_terms({"token_loss": self.nats(prediction, corrupted)}, corrupted.loss_mask, corrupted.times)

    # -- evaluation --------------------------------------------------------------------------------------------

    def evaluate(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        span = 1 - BOUND_TIME_MIN
        end = decoding_nats(span, BOUND_TIME_MIN / self.num_tokens, self.num_tokens)
        bound = span * self._density(batch, noise, to_range(noise.strata, BOUND_TIME_MIN))
        published_span = 1 - PUBLISHED_EPS
        published_times = published_span * to_range(noise.strata, PUBLISHED_EPS)
        return {
            "bound": bound + end * batch.loss_mask.sum(1),
            "published": published_span * self._density(batch, noise, published_times),
        }

    def _density(self, batch: Batch, noise: Noise, times: Tensor) -> Tensor:
        """NELBO density of each sequence per unit of survival, float64 throughout: [B]."""
        corrupted = replace(self._corrupt(batch, noise, times), speed=torch.ones_like(times))
        density = self.nats(self.predict(corrupted), corrupted, precise=True)
        return sum_positions(density.values_BL, batch.loss_mask)

    def schedule_curves(self, times: Tensor) -> dict[str, Tensor]:
        return {"token survival": 1 - times}


def build(config: Config, tokenizer: Tokenizer, encoder: Encoder | None, region: Region = ALONE) -> Duo:
    """From a configuration and the corpus's tokenizer."""
    network = Backbone(
        config.model,
        vocab_size=tokenizer.vocab_size,
        causal=False,
        time_conditioned=True,
        seed=config.run.seed,
        region=region,
    )
    return Duo(config.objective, network, **special_ids(tokenizer))
