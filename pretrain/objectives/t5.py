"""T5's pretraining (arXiv 1910.10683, section 3.1.4): say the spans that were left out of a text.

    text       the quick brown fox jumps over the lazy dog
    input      the <0> fox jumps over <1> dog
    target     <0> quick brown <1> the lazy

Every row leaves out the same number of tokens in the same number of spans, so that inputs and targets have fixed
lengths. The lengths of the spans, and of what is kept between them, are uniformly random compositions, independent of
each other, as in T5's own preprocessing. There a row begins with a kept token and ends with one left out; here either
may come first and last, so that ends are left out no more often than the rest. No end is added to the target: its
length is always the same.

What comes of it is the encoder, for systems that diffuse what an encoder says of the text (model/trained_encoder.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from braid.data_pipeline.loader import Batch
from braid.data_pipeline.tokenizers import Tokenizer
from braid.kernels.errors import ConfigError
from braid.parallel.layers import ALONE, Region
from braid.pretrain.config.objectives.t5 import T5Config
from braid.pretrain.config.schema import Config
from braid.pretrain.model.encoders import Encoder
from braid.pretrain.model.t5_network import T5Network
from braid.pretrain.model.token_logits import TokenLogits

from .base import Corrupted, Figure, LossTerms, Noise, Objective, Summed, special_ids, sum_positions, sum_terms


@dataclass(frozen=True, kw_only=True)
class SpanCorrupted(Corrupted):
    """A row's two parts; `targets` and `loss_mask` are [B, T]."""

    inputs: Tensor
    """Kept tokens with a sentinel for each span left out, int64 [B, I]."""


@dataclass(frozen=True)
class Spans:
    """How many tokens of a row of `length` are left out, and in how many spans."""

    length: int
    num_noised: int
    num_spans: int

    @staticmethod
    def of(length: int, config: T5Config) -> Spans:
        """At least one token is left out and one is kept, no span is empty and no two touch."""
        noised = min(max(round(length * config.noise_density), 1), length - 1)
        spans = min(max(round(noised / config.mean_span_length), 1), noised, length - noised + 1)
        return Spans(length, noised, spans)

    def draw(self, uniforms_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens are left out, bool [B, L], and where each span begins, int64 [B, S]."""
        left_out_BS = composition(uniforms_BL[:, : self.num_noised - 1], self.num_spans)
        kept_BR = composition(uniforms_BL[:, self.num_noised - 1 :], self.num_spans + 1)
        # With a token more at either end, taken off by the 1: nothing may be kept before the first span or after the
        # last.
        edges_BE = torch.stack([kept_BR[:, :-1], left_out_BS], dim=-1).flatten(1).cumsum(1) - 1
        positions_BL = torch.arange(self.length, device=edges_BE.device).expand(len(edges_BE), -1).contiguous()
        return torch.searchsorted(edges_BE, positions_BL, right=True) % 2 == 1, edges_BE[:, ::2]


def composition(uniforms_BM: Tensor, num_parts: int) -> Tensor:
    """M + 1 items in `num_parts` parts of at least one, all ways alike: lengths int64 [B, num_parts]. Items are parted
    at the places with the smallest uniforms."""
    cuts = uniforms_BM.argsort(dim=1, stable=True)[:, : num_parts - 1].sort(dim=1).values + 1
    ends = F.pad(cuts, (0, 1), value=uniforms_BM.shape[1] + 1)
    return ends.diff(dim=1, prepend=torch.zeros_like(ends[:, :1]))


def part_of(values_BL: Tensor, stays_BL: Tensor, starts_BS: Tensor, at_starts_BS: Tensor, size: int) -> Tensor:
    """The values that stay, and `at_starts` right before where the spans begin, in the order of the row:
    [B, size]."""
    length = values_BL.shape[1]
    positions_L = torch.arange(length, device=values_BL.device)
    order = torch.cat([2 * (positions_L + length * ~stays_BL) + 1, 2 * starts_BS], dim=1).argsort(dim=1)
    return torch.cat([values_BL, at_starts_BS], dim=1).gather(1, order[:, :size])


class T5(Objective):
    """Cross-entropy of the target, sentinels included, as in the paper."""

    name = "t5"
    figures = (
        Figure("span_loss", "cross-entropy of the spans left out", False,
               "nats per target token, sentinels included, given the text around them", "value"),
    )  # fmt: skip

    def corrupt(self, batch: Batch, noise: Noise) -> SpanCorrupted:
        network, (num, length) = self.network, batch.tokens.shape
        left_out, starts = Spans(length, network.num_noised, network.num_spans).draw(noise.uniforms(length))
        sentinels = network.vocab_size + torch.arange(network.num_spans, device=starts.device).expand(num, -1)
        num_targets = network.num_noised + network.num_spans
        num_inputs = length - network.num_noised + network.num_spans
        return SpanCorrupted(
            inputs=part_of(batch.tokens, ~left_out, starts, sentinels, num_inputs),
            targets=part_of(batch.tokens, left_out, starts, sentinels, num_targets),
            loss_mask=part_of(batch.loss_mask, left_out, starts, batch.loss_mask.gather(1, starts), num_targets),
        )

    def num_scored(self, batch: Batch, noise: Noise) -> Tensor:
        return self.corrupt(batch, noise).loss_mask.sum()

    def call(self, corrupted: SpanCorrupted) -> TokenLogits:
        """Of the target, [B, T, V]."""
        return self.network(corrupted.inputs, corrupted.targets)

    def loss(self, prediction: TokenLogits, corrupted: SpanCorrupted) -> LossTerms:
        nats = prediction.cross_entropy(corrupted.targets, corrupted.rows)
        return sum_terms({"token_loss": Summed.of(nats)}, corrupted.loss_mask, None)

    def evaluate(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        """A row's mean over its target, for each of its tokens: figures are means over the tokens of the text, and
        every row has the same number of targets."""
        corrupted = self.corrupt(batch, noise)
        each = self.predict(corrupted).cross_entropy(corrupted.targets, corrupted.rows).values_BL
        nats = sum_positions(each, corrupted.loss_mask)
        tokens_each = batch.loss_mask.sum(1).double() / corrupted.loss_mask.sum(1).clamp(min=1)
        return {"span_loss": nats * tokens_each}


def build(config: Config, tokenizer: Tokenizer, encoder: Encoder | None, region: Region = ALONE) -> T5:
    """From a configuration and the corpus's tokenizer. Raises ConfigError where the layers are to be divided."""
    for axis in (region.axis, region.context.axis):
        if axis is not None and axis.size > 1:
            raise ConfigError(
                "T5's blocks are transformers', whose layers are not divided",
                found=f"objective.name=t5, {axis.size} processes on the {axis.name} axis",
                change=f"parallel.{axis.name}=1",
            )
    spans = Spans.of(config.data.sequence_length, config.objective)
    network = T5Network(
        config.model,
        vocab_size=tokenizer.vocab_size,
        num_noised=spans.num_noised,
        num_spans=spans.num_spans,
        seed=config.run.seed,
    )
    return T5(config.objective, network, **special_ids(tokenizer))
