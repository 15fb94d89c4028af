"""Autoregressive baseline: exact negative log-likelihood by next-token cross-entropy on a causal backbone."""

from __future__ import annotations

import torch
from torch import Tensor

from braid.data_pipeline.loader import Batch
from braid.data_pipeline.tokenizers import Tokenizer
from braid.parallel.layers import ALONE, Region
from braid.pretrain.config.schema import Config
from braid.pretrain.model.backbone import Backbone, Prediction
from braid.pretrain.model.encoders import Encoder
from braid.pretrain.model.token_logits import TokenLoss

from .base import Figure, LossTerms, Noise, Objective, Summed, TokenCorrupted, special_ids, sum_positions, sum_terms


class AR(Objective):
    """Predicts every token of the row from the tokens before it, the first one (of each document, where they do not
    see each other) from a BOS put in front.

    The likelihood is of all L tokens, the same event the diffusion bounds are about, and no token is dropped.
    """

    name = "ar"
    causal = True
    answers = False
    """Trained on (source, target) pairs: what it writes ends at the first EOS, and EOS fills the row."""
    figures = (Figure("nll", "exact NLL", True, "exact: next-token cross-entropy of every token of the row"),)

    def corrupt(self, batch: Batch, noise: Noise) -> TokenCorrupted:
        shifted = torch.roll(batch.tokens, 1, dims=1)
        shifted[:, 0] = self.bos_id
        if batch.segments is not None:  # nor is the first token of a document predicted from the one before it
            shifted[:, 1:][batch.segments.diff(dim=1) != 0] = self.bos_id
        return TokenCorrupted(
            tokens=shifted,
            targets=batch.tokens,
            loss_mask=batch.loss_mask,
            segments=batch.segments,
            dropout=noise.dropout_key(shifted.shape[1]),
        )

    def _nats(self, prediction: Prediction, corrupted: TokenCorrupted) -> TokenLoss:
        return prediction.tokens.cross_entropy(corrupted.targets, corrupted.rows, without=self.mask_id)

    def loss(self, prediction: Prediction, corrupted: TokenCorrupted) -> LossTerms:
        return sum_terms({"token_loss": Summed.of(self._nats(prediction, corrupted))}, corrupted.loss_mask, None)

    def evaluate(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        corrupted = self.corrupt(batch, noise)
        return {"nll": sum_positions(self._nats(self.predict(corrupted), corrupted).values_BL, batch.loss_mask)}


def build(config: Config, tokenizer: Tokenizer, encoder: Encoder | None, region: Region = ALONE) -> AR:
    """From a configuration and the corpus's tokenizer."""
    network = Backbone(
        config.model,
        vocab_size=tokenizer.vocab_size,
        causal=True,
        time_conditioned=False,
        seed=config.run.seed,
        region=region,
    )
    objective = AR(config.objective, network, **special_ids(tokenizer))
    objective.answers = config.data.packing == "pairs"
    return objective
