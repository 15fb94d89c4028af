"""MDLM: masked diffusion (arXiv 2406.07524). The NELBO is the 1/t-weighted cross-entropy of masked tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from braid.data_pipeline.loader import Batch
from braid.data_pipeline.tokenizers import Tokenizer
from braid.parallel.layers import ALONE, Region
from braid.pretrain.config.schema import Config
from braid.pretrain.diffusion.schedules import LogLinear
from braid.pretrain.diffusion.times import BOUND_TIME_MIN, to_range
from braid.pretrain.model.backbone import Backbone, Prediction
from braid.pretrain.model.encoders import Encoder
from braid.pretrain.model.token_logits import TokenLoss

from .base import Figure, LossTerms, Noise, Objective, Summed, TokenCorrupted, special_ids, sum_positions, sum_terms

BOUND = LogLinear(eps=0.0)
PUBLISHED = LogLinear(eps=1e-3)
PUBLISHED_TIME_MIN = 1e-3


class MDLM(Objective):
    """Masked diffusion with the SUBS parametrisation and the log-linear schedule."""

    name = "mdlm"
    token_share = 0.5
    figures = (
        Figure("bound", "token bound", True, "NELBO with eps = 0, t in [1e-5, 1]"),
        Figure("published", "published convention", False, "mean over t in [1e-3, 1], eps = 1e-3: some 0.007 nats low"),
    )

    def _corrupt(self, batch: Batch, noise: Noise, schedule: LogLinear, time_min: float) -> TokenCorrupted:
        times = to_range(noise.strata, time_min)
        length = batch.tokens.shape[1]
        probability = 1 - schedule.alpha(times)
        tokens, masked = noise.noised_tokens(
            batch.tokens, self.mask_id, mask_probability=probability, keep=batch.condition
        )
        return TokenCorrupted(
            tokens=tokens,
            targets=batch.tokens,
            loss_mask=batch.loss_mask,
            segments=batch.segments,
            times=times,
            masked=masked,
            dropout=noise.dropout_key(length),
        )

    def corrupt(self, batch: Batch, noise: Noise) -> TokenCorrupted:
        return self._corrupt(batch, noise, LogLinear(self.config.schedule_eps), self.config.time_min)

    def weight(self, times: Tensor) -> Tensor:
        """Training weight of a masked token's cross-entropy at `times`; float64."""
        if self.config.loss == "low_variance":
            return torch.ones_like(times)
        return LogLinear(self.config.schedule_eps).elbo_weight(times)

    def _nats(self, prediction: Prediction, corrupted: TokenCorrupted, weights_BL: Tensor | None = None) -> TokenLoss:
        """Cross-entropy of masked tokens."""
        return prediction.tokens.cross_entropy(corrupted.targets, corrupted.rows, weights_BL, without=self.mask_id)

    def loss(self, prediction: Prediction, corrupted: TokenCorrupted) -> LossTerms:
        weight = self.weight(corrupted.times).float()[:, None]
        term = Summed.of(self._nats(prediction, corrupted, weight), weight)
        return sum_terms({"token_loss": term}, corrupted.loss_mask, corrupted.times)

    def evaluate(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        return {
            # The uniform density on [t_min, 1] is 1 / (1 - t_min); the published number leaves this factor out.
            "bound": (1 - BOUND_TIME_MIN) * self._weighted_nats(batch, noise, BOUND, BOUND_TIME_MIN),
            "published": self._weighted_nats(batch, noise, PUBLISHED, PUBLISHED_TIME_MIN),
        }

    def _weighted_nats(self, batch: Batch, noise: Noise, schedule: LogLinear, time_min: float) -> Tensor:
        corrupted = self._corrupt(batch, noise, schedule, time_min)
        nats = self._nats(self.predict(corrupted), corrupted).values_BL
        return schedule.elbo_weight(corrupted.times) * sum_positions(nats, corrupted.loss_mask)

    def schedule_curves(self, times: Tensor) -> dict[str, Tensor]:
        schedule = LogLinear(self.config.schedule_eps)
        return {"token survival": schedule.alpha(times), "token loss weight": self.weight(times.clamp(min=1e-2))}


def build(config: Config, tokenizer: Tokenizer, encoder: Encoder | None, region: Region = ALONE) -> MDLM:
    """From a configuration and the corpus's tokenizer."""
    network = Backbone(
        config.model,
        vocab_size=tokenizer.vocab_size,
        causal=False,
        time_conditioned=config.objective.time_conditioning,
        seed=config.run.seed,
        region=region,
    )
    return MDLM(config.objective, network, **special_ids(tokenizer))
