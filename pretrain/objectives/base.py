"""What every objective provides; the training loop, evaluation and samplers know nothing more of it.

    corrupt(batch, noise) -> Corrupted      pure: the same for the same (batch, noise), on any layout and device
    predict(corrupted) -> Prediction        one call of the network
    loss(prediction, corrupted) -> LossTerms    sums and a count, divided once, by the global count
    evaluate(batch, noise) -> {figure: nats per sequence}    one Monte-Carlo draw of each figure

An objective owns its network as `network`. Shapes: B sequences, L positions, D latent dimensions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from braid.data_pipeline.loader import Batch
from braid.kernels import random
from braid.kernels.random import Stream
from braid.pretrain.diffusion.times import time_buckets
from braid.pretrain.model.backbone import Backbone, DropoutKey, Prediction

NUM_TIME_BUCKETS = 10


@dataclass(frozen=True)
class Noise:
    """Everything random about a batch: a pure function of (key, ordinal, position) plus the stratified times."""

    key: int
    """64-bit key: the run's seed folded with the purpose ("train", "validation", ...)."""
    ordinals: Tensor
    """Global sample ordinals, int64 [B]."""
    strata: Tensor
    """Stratified u in [0, 1), float64 [B]; objectives map it to their range of times."""
    draw: int = 0
    """Number of the Monte-Carlo draw (evaluation)."""

    def uniforms(self, num_positions: int, *, word: int = 0) -> Tensor:
        """Token-level uniforms, float32 [B, L]. Word 0 decides masking, word 2 what the encoder does not see."""
        positions = torch.arange(num_positions, device=self.ordinals.device)
        return random.uniform(self.key, Stream.TOKEN, self.ordinals, positions, draw=self.draw, word=word)

    def normals(self, num_positions: int, num_channels: int, *, purpose: str = "latent") -> Tensor:
        """Standard normals, float32 [B, L, channels]; another `purpose` gives independent ones."""
        key = self.key if purpose == "latent" else random.fold_key(self.key, purpose)
        positions = torch.arange(num_positions, device=self.ordinals.device)
        return random.normal(key, self.ordinals, positions, num_channels, draw=self.draw)

    def coins(self, which: int) -> Tensor:
        """One uniform in (0, 1) per sequence, float64 [B]. Number 0 belongs to the times."""
        assert which > 0
        return random.coins(self.key, self.ordinals, which=which, draw=self.draw)

    def dropout_key(self, num_positions: int) -> DropoutKey:
        positions = torch.arange(num_positions, device=self.ordinals.device)
        return DropoutKey(random.fold_key(self.key, "dropout"), self.ordinals, positions)


@dataclass(frozen=True)
class Corrupted:
    """A noised batch: what the network sees and what the loss compares with."""

    tokens: Tensor
    """Network input, int64 [B, L]."""
    targets: Tensor
    """Clean tokens, int64 [B, L]."""
    loss_mask: Tensor
    """False at padding, bool [B, L]."""
    times: Tensor | None = None
    """float64 [B]; None for AR."""
    masked: Tensor | None = None
    """Positions whose token is masked, bool [B, L]."""
    latents: Tensor | None = None
    """Noised latents, float32 [B, L, D]."""
    latent_targets: Tensor | None = None
    """Clean latents, float32 [B, L, D]."""
    latent_weight: Tensor | None = None
    """0 where the latent loss is off (latent dropout), float32 [B]."""
    dropout: DropoutKey | None = None


@dataclass(frozen=True)
class LossTerms:
    """Sums over this micro-batch; nothing is divided before every rank's sums and counts have been added up."""

    total: Tensor
    """Scalar to back-propagate: the sum of all terms over all positions that count."""
    count: Tensor
    """Number of non-padding positions, the one denominator. Scalar int64."""
    terms: dict[str, Tensor] = field(default_factory=dict)
    """Detached scalar sums by name."""
    bucket_sums: Tensor | None = None
    """Detached sums of the total by time bucket, float64 [10]; None where there is no time."""
    bucket_counts: Tensor | None = None
    """Non-padding positions by time bucket, float64 [10]."""


@dataclass(frozen=True)
class Figure:
    """One number `evaluate` reports, and what it is."""

    name: str
    label: str
    is_bound: bool
    """An upper bound on the negative log-likelihood of the text (or exact)."""
    note: str = ""


class Objective(nn.Module):
    """Base of all objectives. Subclasses set `figures` and implement the four methods of the module's docstring."""

    name: str
    figures: tuple[Figure, ...]
    causal = False

    def __init__(self, config: Any, network: Backbone, *, mask_id: int, bos_id: int) -> None:
        super().__init__()
        self.config, self.network = config, network
        self.mask_id, self.bos_id = mask_id, bos_id

    def corrupt(self, batch: Batch, noise: Noise) -> Corrupted:
        raise NotImplementedError

    def predict(self, corrupted: Corrupted) -> Prediction:
        dropout = corrupted.dropout if self.training else None
        return self.network(corrupted.tokens, corrupted.times, corrupted.latents, dropout)

    def loss(self, prediction: Prediction, corrupted: Corrupted) -> LossTerms:
        raise NotImplementedError

    def evaluate(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        """One draw of every figure of `figures`: nats per sequence, float64 [B]."""
        raise NotImplementedError

    def schedule_curves(self, times: Tensor) -> dict[str, Tensor]:
        """Named curves over `times` for the report; empty where there is no time."""
        return {}


def sum_terms(terms_BL: dict[str, Tensor], loss_mask_BL: Tensor, times_B: Tensor | None) -> LossTerms:
    """Add up per-position losses (float32 [B, L], weights included) where `loss_mask` is True."""
    weight_BL = loss_mask_BL.float()
    total_BL = sum(terms_BL.values()) * weight_BL
    buckets: dict[str, Tensor] = {}
    if times_B is not None:
        index_B = time_buckets(times_B, NUM_TIME_BUCKETS)
        zeros = torch.zeros(NUM_TIME_BUCKETS, dtype=torch.float64, device=weight_BL.device)
        buckets["bucket_sums"] = zeros.index_add(0, index_B, total_BL.detach().double().sum(1))
        buckets["bucket_counts"] = zeros.index_add(0, index_B, weight_BL.double().sum(1))
    return LossTerms(
        total=total_BL.sum(),
        count=loss_mask_BL.sum(),
        terms={name: (value.detach().double() * weight_BL).sum() for name, value in terms_BL.items()},
        **buckets,
    )


def sum_positions(nats_BL: Tensor, loss_mask_BL: Tensor) -> Tensor:
    """Nats per sequence, float64 [B], over the positions that count."""
    return (nats_BL.double() * loss_mask_BL).sum(1)
