"""GIDD: diffusion with masks and uniform noise (arXiv 2503.04482), for models that can revise what they wrote."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from braid.data_pipeline.loader import Batch
from braid.data_pipeline.tokenizers import Tokenizer
from braid.parallel.layers import ALONE, Region
from braid.pretrain.config.schema import Config
from braid.pretrain.diffusion.hybrid import Hybrid
from braid.pretrain.diffusion.times import to_range
from braid.pretrain.diffusion.uniform import in_float64
from braid.pretrain.model.backbone import Backbone, Prediction
from braid.pretrain.model.encoders import Encoder
from braid.pretrain.model.network import Network

from .base import Figure, LossTerms, Noise, Objective, TokenCorrupted, special_ids, sum_positions, sum_terms

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
            times=times,
            masked=tokens == self.mask_id,
            dropout=noise.dropout_key(length),
        )

    def loss(self, prediction: Prediction, corrupted: TokenCorrupted) -> LossTerms:
        process = self.process
        weight = process.elbo_weight if self.config.token_weight == "elbo" else process.dynamic_weight
        place = corrupted.tokens, corrupted.targets, corrupted.times, self.mask_id
        divergence = process.divergence(prediction.logits, *place, self.vocabulary)
        terms = {"token_loss": weight(*place) * divergence}
        return sum_terms(terms, corrupted.loss_mask, corrupted.times)

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
        place = corrupted.tokens, batch.tokens, times
        divergence = partial(self.process.divergence, mask_id=self.mask_id, vocabulary=self.vocabulary)
        nats = in_float64(divergence, self.predict(corrupted).logits, *place)
        return sum_positions(self.process.elbo_weight(*place, self.mask_id) * nats, batch.loss_mask)

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
