"""GIDD: diffusion with masks and uniform noise (arXiv 2503.04482), for models that can revise what they wrote."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from braid.data_pipeline.loader import Batch
from braid.data_pipeline.tokenizers import Tokenizer
from braid.parallel.layers import ALONE, Region
from braid.pretrain.config.schema import Config
from braid.pretrain.diffusion.hybrid import Hybrid
from braid.pretrain.diffusion.times import to_range
from braid.pretrain.model.backbone import Backbone, Prediction
from braid.pretrain.model.encoders import Encoder
from braid.pretrain.model.network import Network
from braid.pretrain.model.token_logits import TokenLoss

from .base import Figure, LossTerms, Noise, Objective, Summed, TokenCorrupted, special_ids, sum_positions, sum_terms

PUBLISHED_EPS = 1e-4


class GIDD(Objective):
    """The network predicts x_0 from all positions but, where they may be noise, each one's own; it is told the time."""

    name = "gidd"
    figures = (
        Figure(
            "bound",
            "token bound",
            True,
            "NELBO up to t = 1, where all is masked (no prior term), from the time where the odds of uniform noise are "
            "1e-5 of their scale, and what decoding there costs",
        ),
        Figure(
            "published",
            "published convention",
            False,
            "mean over t in [1e-4, 1 - 1e-4] of the NELBO's density, without its end: some 0.04 nats low at p_u = 0.1",
        ),
    )

    def __init__(self, config: Any, network: Network, *, mask_id: int, bos_id: int, eos_id: int) -> None:
        super().__init__(config, network, mask_id=mask_id, bos_id=bos_id, eos_id=eos_id)
        self.process = Hybrid(config.p_uniform, config.gamma, network.vocab_size - 1)
        self.token_share = 0.5 if config.p_uniform == 0 else 1.0

    def corrupt(self, batch: Batch, noise: Noise) -> TokenCorrupted:
        return self._corrupt(batch, noise, to_range(noise.strata, self.config.time_eps, 1 - self.config.time_eps))

    def _corrupt(self, batch: Batch, noise: Noise, times: Tensor) -> TokenCorrupted:
        length, process = batch.tokens.shape[1], self.process
        tokens, _ = noise.noised_tokens(
            batch.tokens,
            self.mask_id,
            mask_probability=process.mask_probability(times),
            uniform_probability=process.num_tokens * process.noise(times),
            num_tokens=process.num_tokens,
            keep=batch.condition,
        )
        return TokenCorrupted(
            tokens=tokens,
            targets=batch.tokens,
            loss_mask=batch.loss_mask,
            segments=batch.segments,
            times=times,
            # With uniform noise the loss is about all tokens.
            masked=tokens == self.mask_id if process.p_uniform == 0 else None,
            dropout=noise.dropout_key(length),
        )

    def loss(self, prediction: Prediction, corrupted: TokenCorrupted) -> LossTerms:
        process = self.process
        weight = process.elbo_weight if self.config.token_weight == "elbo" else process.dynamic_weight
        weight_BL = weight(corrupted.tokens, corrupted.targets, corrupted.times, self.mask_id)
        term = Summed.of(self._divergence(prediction, corrupted, weight_BL), weight_BL)
        return sum_terms({"token_loss": term}, corrupted.loss_mask, corrupted.times)

    def _divergence(
        self, prediction: Prediction, corrupted: TokenCorrupted, weight_BL: Tensor, *, precise: bool = False
    ) -> TokenLoss:
        """KL plus Itakura-Saito divergence of true and predicted marginals; see `Hybrid.divergence`."""
        process, tokens, targets = self.process, corrupted.tokens, corrupted.targets
        if process.p_uniform == 0:
            survival = process.survival(corrupted.times)[:, None]
            weight = survival * weight_BL
            nats = prediction.tokens.cross_entropy(targets, corrupted.rows, weight, without=self.mask_id)
            return TokenLoss(nats.total, survival * nats.values_BL)
        common = {"mask_id": self.mask_id, "vocabulary": self.vocabulary, "precise": precise}
        divergence = process.divergence(tokens, targets, corrupted.times, weight_BL, **common)
        return prediction.tokens.loss(divergence, corrupted.rows, targets.shape)

    def evaluate(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        times, speed = self.process.bound_times(noise.strata)
        end = self.process.end_nats()
        return {
            "bound": speed * self._density(batch, noise, times) + end * batch.loss_mask.sum(1),
            "published": self._density(batch, noise, to_range(noise.strata, PUBLISHED_EPS, 1 - PUBLISHED_EPS)),
        }

    def _density(self, batch: Batch, noise: Noise, times: Tensor) -> Tensor:
        """NELBO density of each sequence per unit of time, float64 throughout: [B]."""
        corrupted = self._corrupt(batch, noise, times)
        weight_BL = self.process.elbo_weight(corrupted.tokens, batch.tokens, times, self.mask_id)
        nats = self._divergence(self.predict(corrupted), corrupted, weight_BL, precise=True).values_BL
        return sum_positions(weight_BL * nats, batch.loss_mask)

    def schedule_curves(self, times: Tensor) -> dict[str, Tensor]:
        return {
            "token survival": self.process.survival(times),
            "mask probability": self.process.mask_probability(times),
            "uniform probability": self.process.num_tokens * self.process.noise(times),
        }


def build(config: Config, tokenizer: Tokenizer, encoder: Encoder | None, region: Region = ALONE) -> GIDD:
    """From a configuration and the corpus's tokenizer."""
    network = Backbone(
        config.model,
        vocab_size=tokenizer.vocab_size,
        causal=False,
        time_conditioned=True,
        seed=config.run.seed,
        region=region,
    )
    return GIDD(config.objective, network, **special_ids(tokenizer))
