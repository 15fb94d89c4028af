"""What every objective provides; the training loop, evaluation and samplers know nothing more of it.

    corrupt(batch, noise) -> Corrupted      pure: the same for the same (batch, noise, parameters, state), on any layout
    Corrupted.part(context)     this process's positions, where sequences are divided; what follows sees no others
    passes(corrupted) -> Corrupted          calls of the network without gradient that come before, one after the other
    call(corrupted) -> what the network says    the one call with gradient
    loss(prediction, corrupted) -> LossTerms    sums and a count, divided once, by the global count
    evaluate(batch, noise) -> {figure: sum per sequence}    one Monte-Carlo draw of each figure

An objective owns its network as `network` and uses its logits by `vocabulary`, for they may be divided among processes.
So may sequences be, while the network is trained: a loss that is no sum over positions uses `context`.
Where the network is in pieces on several processes (parallel/pipeline.py), all of them corrupt alike, a call of the
network gives hidden states unless `stage.at_end`, and `loss` is called on the process with the heads alone.
Shapes: B sequences, L positions, D latent dimensions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from braid.data_pipeline.loader import Batch, upload
from braid.data_pipeline.tokenizers import Tokenizer
from braid.kernels import random
from braid.kernels.linear_loss import Rows
from braid.kernels.noising import MASKED, joint_noising
from braid.kernels.random import Stream
from braid.parallel.context import Context
from braid.pretrain.diffusion.gumbel import gumbels
from braid.pretrain.diffusion.times import evaluation_strata, time_buckets, training_strata
from braid.pretrain.model.blocks import DropoutKey
from braid.pretrain.model.network import Network
from braid.pretrain.model.token_logits import TokenLoss

NUM_TIME_BUCKETS = 10


@dataclass(frozen=True)
class Noise:
    """Everything random about a batch: a pure function of (key, ordinal, position) plus the stratified times."""

    key: int
    """64-bit key: the run's seed folded with the purpose ("train", "validation", ...)."""
    ordinals: Tensor
    """Global sample ordinals, int64 [B]."""
    index: Tensor
    """int64 [B]: the sample's place in a random order of its global batch; in evaluation, the number of the draw."""
    shift: Tensor
    """float64 [B] in [0, 1): one number shared by the global batch; in evaluation, one for each sequence."""
    batch_size: int
    """Size of the global batch that `index` orders; in evaluation, the number of draws."""
    draw: int = 0
    """Number of the Monte-Carlo draw (evaluation)."""
    first_ordinal: int = 0
    """Where the global batch begins (training)."""

    @staticmethod
    def training(key: int, first_ordinal: int, global_batch_size: int, ordinals: Tensor, time_groups: int = 1) -> Noise:
        """Noise of the samples `ordinals` of the global batch that begins at `first_ordinal`; `time_groups` is the
        objective's."""
        index, shift = training_strata(key, first_ordinal, global_batch_size, ordinals, time_groups)
        return Noise(key, ordinals, index, shift, global_batch_size, first_ordinal=first_ordinal)

    @staticmethod
    def evaluation(key: int, ordinals: Tensor, draw: int, num_draws: int) -> Noise:
        """Noise of one Monte-Carlo draw out of `num_draws`."""
        index, shift = evaluation_strata(key, ordinals, draw)
        return Noise(key, ordinals, index, shift, num_draws, draw)

    def to(self, device: torch.device) -> Noise:
        """The same on `device`."""
        moved = {name: upload(getattr(self, name), device) for name in ("ordinals", "index", "shift")}
        return replace(self, **moved)

    @property
    def strata(self) -> Tensor:
        """Stratified u in [0, 1), float64 [B]; objectives map it to their range of times."""
        return (self.index.double() + self.shift) / self.batch_size

    def uniforms(self, num_positions: int, *, word: int = 0) -> Tensor:
        """Token-level uniforms, float32 [B, L]. Word 0 decides what is noised, word 1 is the replacement's, word 2
        decides what an encoder does not see."""
        positions = torch.arange(num_positions, device=self.ordinals.device)
        return random.uniform(self.key, Stream.TOKEN, self.ordinals, positions, draw=self.draw, word=word)

    def normals(self, num_positions: int, num_channels: int, *, purpose: str = "latent") -> Tensor:
        """Standard normals, float32 [B, L, channels]; another `purpose` gives independent ones."""
        positions = torch.arange(num_positions, device=self.ordinals.device)
        return random.normal(self._key_of(purpose), self.ordinals, positions, num_channels, draw=self.draw)

    def _key_of(self, purpose: str) -> int:
        return self.key if purpose == "latent" else random.fold_key(self.key, purpose)

    def noised_tokens(
        self,
        tokens: Tensor,
        mask_id: int,
        *,
        mask_probability: Tensor | float = 0.0,
        uniform_probability: Tensor | None = None,
        num_tokens: int = 0,
        keep: Tensor | None = None,
        word: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """x_t [B, L] and where it is masked (bool), from tokens [B, L] and probabilities float64 [B].

        A token is masked where the uniform of `word` is below the mask's probability, replaced by any of the
        `num_tokens` real ones where it is in the next interval, and left above and where `keep` (bool [B, L]) says so.
        The bounds are rounded once to float32, as the uniforms are: the same decision on every device.
        """
        noise_below = None if uniform_probability is None else (mask_probability + uniform_probability).float()
        made = joint_noising(
            tokens,
            None,
            self.key,
            self.ordinals,
            torch.arange(tokens.shape[1], device=self.ordinals.device),
            mask_below=mask_probability.float() if isinstance(mask_probability, Tensor) else None,
            noise_below=noise_below,
            mask_id=mask_id,
            num_tokens=num_tokens,
            keep=keep,
            word=word,
            draw=self.draw,
        )
        return made.tokens, made.kind == MASKED

    def noised_latents(self, clean: Tensor, alpha: Tensor, sigma: Tensor, *, purpose: str = "latent") -> Tensor:
        """alpha z + sigma eps, float32 [B, L, D], with the normals of `purpose`; coefficients [B] or [B, L] are rounded
        once to float32 and each product on its own. Differentiable in all three."""
        positions = torch.arange(clean.shape[1], device=self.ordinals.device)
        key = self._key_of(purpose)
        made = joint_noising(None, clean, key, self.ordinals, positions, alpha=alpha, sigma=sigma, draw=self.draw)
        return made.latents

    def gumbels(self, num_positions: int, num_channels: int) -> Tensor:
        """Standard Gumbel variables, float64 [B, L, channels]."""
        key, positions = random.fold_key(self.key, "gumbel"), torch.arange(num_positions, device=self.ordinals.device)
        num_blocks = -(-num_channels // 4)
        words = random.words(key, Stream.CATEGORICAL, self.ordinals, positions, draw=self.draw, num_blocks=num_blocks)
        return gumbels(words.flatten(2)[..., :num_channels])

    def coins(self, which: int) -> Tensor:
        """One uniform in (0, 1) per sequence, float64 [B]. Number 0 belongs to the times."""
        assert which > 0
        return random.coins(self.key, self.ordinals, which=which, draw=self.draw)

    def batch_coins(self, which: int) -> Tensor:
        """One uniform in (0, 1) for the whole global batch, float64 [B]: the coin of its first sample."""
        assert which > 0
        first = torch.full_like(self.ordinals[:1], self.first_ordinal)
        return random.coins(self.key, first, which=which, draw=self.draw).expand(len(self.ordinals))

    def dropout_key(self, num_positions: int) -> DropoutKey:
        positions = torch.arange(num_positions, device=self.ordinals.device)
        return DropoutKey(random.fold_key(self.key, "dropout"), self.ordinals, positions)


@dataclass(frozen=True, kw_only=True)
class Corrupted:
    """A noised batch: what the network sees (added by each objective) and what the loss compares with."""

    by_position: ClassVar[tuple[str, ...]] = ("targets", "loss_mask", "segments")
    """Fields that have positions, of tokens or of slots, as dimension 1; or are None."""

    targets: Tensor
    """Clean tokens, int64 [B, L]."""
    loss_mask: Tensor
    """What is scored: False at padding and at given tokens, bool [B, L]."""
    segments: Tensor | None = None
    """Positions of the same number may see each other, int32 [B, L]; None: all see all."""
    times: Tensor | None = None
    """float64 [B]; None for AR."""
    dropout: DropoutKey | None = None

    @property
    def token_scored(self) -> Tensor:
        """Positions whose tokens the loss looks at, bool [B, L]."""
        return self.loss_mask

    @cached_property
    def rows(self) -> Rows:
        """The same, for those who compute logits of no others."""
        return Rows(self.token_scored)

    def part(self, context: Context) -> Self:
        """What this process's positions need, where sequences are divided; the rest is left as it is. Comes before any
        call of the network, and so begins to count `rows`."""
        values = {name: getattr(self, name) for name in self.by_position}
        parts: dict[str, Any] = {name: context.part(x) for name, x in values.items() if x is not None}
        if self.dropout is not None:
            parts["dropout"] = replace(self.dropout, positions=context.part(self.dropout.positions, 0))
        here = replace(self, **parts)
        here.rows.begin()
        return here


@dataclass(frozen=True, kw_only=True)
class TokenCorrupted(Corrupted):
    """Noised tokens."""

    by_position = (*Corrupted.by_position, "tokens", "masked")

    tokens: Tensor
    """Network input, int64 [B, L]."""
    masked: Tensor | None = None
    """Positions whose token is masked, bool [B, L]; None where there are no masks."""

    @property
    def token_scored(self) -> Tensor:
        return self.loss_mask if self.masked is None else self.loss_mask & self.masked


@dataclass(frozen=True)
class LossTerms:
    """Sums over this micro-batch; nothing is divided before every rank's sums and counts have been added up."""

    total: Tensor
    """Scalar to back-propagate: the sum of all terms over all positions that count."""
    count: Tensor
    """Number of non-padding positions, the one denominator. Scalar int64."""
    terms: dict[str, Tensor] = field(default_factory=dict)
    """Detached scalar sums by name: the terms of the total, and diagnostics beside them. The same names on every rank
    and in every micro-batch, for they are added up; so also `statistics`."""
    bucket_sums: Tensor | None = None
    """Detached sums of the total by time bucket, float64 [10]; None where there is no time."""
    bucket_counts: Tensor | None = None
    """Non-padding positions by time bucket, float64 [10]."""
    statistics: dict[str, Tensor] = field(default_factory=dict)
    """Detached float64 tensors of any shape: what `update_state` needs, summed over micro-batches and over ranks with
    rows of their own. They speak of whole rows: all processes among which a sequence is divided have the same."""
    row_losses: Tensor | None = None
    """What `finish_gradients` needs of each row, detached [B]."""


class Pass(NamedTuple):
    """One call of the network without gradient."""

    call: Callable[[], Tensor]
    """Makes it: the result that all processes go on with, or the network's hidden states."""
    num_rows: int
    """How many rows the network sees."""


@dataclass(frozen=True)
class Figure:
    """One number `evaluate` reports, and what it is."""

    name: str
    label: str
    is_bound: bool
    """An upper bound on the negative log-likelihood of the text (or exact)."""
    note: str = ""
    unit: str = "nats"
    """`nats` per token, which has a perplexity and bits per byte; or `value`: a plain mean over tokens."""


class Objective(nn.Module):
    """Base of all objectives. Subclasses set `figures` and implement the methods of the module's docstring; most have
    no `passes`, and a `call` like the one here.

    An objective may own parameters beside its network's (a learned schedule, embeddings) and state in registered
    buffers (a codebook, running averages); both are saved and restored with it.
    """

    name: str
    figures: tuple[Figure, ...]
    causal = False
    extra_forward_passes = 0.0
    """Forward passes without gradient that a training step makes beside the main one, per sequence."""
    token_share = 1.0
    """Share of the positions whose logits a training step computes, expected."""
    time_groups = 1
    """Sequences whose places in the global batch agree modulo this number have an even grid of times of their own."""
    follows_row_losses = False
    """Some gradients depend on the losses of rows (`finish_gradients`)."""
    splits_loss = False
    """Every piece of a pipeline has a part in the loss (`loss_of_piece`)."""
    encoder: Any = None
    """The frozen encoder of a joint model (no Module: not trained, not saved with the weights), or None."""
    step = 0
    """Optimizer steps done so far, and how many there will be; what warm-ups, curricula and stages follow."""
    total_steps = 1

    def __init__(self, config: Any, network: Network, *, mask_id: int, bos_id: int, eos_id: int) -> None:
        super().__init__()
        self.config, self.network, self.vocabulary = config, network, network.vocabulary
        self.context, self.stage = network.region.context, network.stage
        self.mask_id, self.bos_id, self.eos_id = mask_id, bos_id, eos_id

    def begin_step(self, step: int, total_steps: int) -> None:
        """Called before each optimizer step, and before validation and sampling, with the steps done so far."""
        self.step, self.total_steps = step, total_steps

    def corrupt(self, batch: Batch, noise: Noise) -> Corrupted:
        raise NotImplementedError

    def num_scored(self, batch: Batch, noise: Noise) -> Tensor:
        """The `count` that the loss of this micro-batch will have, int64 scalar."""
        return batch.loss_mask.sum()

    def passes(self, corrupted: Corrupted) -> Generator[Pass, Tensor, Corrupted]:
        """Yields each pass and is sent its result; returns what `call` is to be given."""
        yield from ()
        return corrupted

    def call(self, corrupted: Corrupted) -> Any:
        dropout = corrupted.dropout if self.training else None
        return self.network(corrupted.tokens, corrupted.times, dropout=dropout, segments=corrupted.segments)

    def predict(self, corrupted: Corrupted) -> Any:
        """What the network says after all passes, here and now."""
        passes = self.passes(corrupted)
        following = advance(passes)
        while isinstance(following, Pass):
            with torch.no_grad():
                result = following.call()
            following = advance(passes, result)
        return self.call(following)

    def loss(self, prediction: Any, corrupted: Corrupted) -> LossTerms:
        raise NotImplementedError

    def loss_of_piece(self, aside: Any, corrupted: Corrupted) -> LossTerms:
        """Where `splits_loss`: the part in the loss of a piece of the network that is not the last, from what it said
        beside its hidden states. The names of its terms are those of `loss`, which of the last piece has its part; the
        positions are counted there."""
        raise NotImplementedError

    def finish_gradients(self, corrupted: Corrupted, row_losses: Tensor) -> None:
        """Called for each micro-batch after the backward passes of a step, on every process of a network in pieces,
        with the `row_losses` of the process with the heads: for gradients that had to wait for them."""

    def update_state(self, statistics: dict[str, Tensor]) -> None:
        """Called after each optimizer step with the global sums of the losses' `statistics`, under no_grad."""

    def evaluate(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        """One draw of every figure of `figures`: sums over the positions that count of each sequence, float64 [B]."""
        raise NotImplementedError

    def parameter_rates(self) -> dict[str, tuple[float, float]]:
        """Prefix of parameter names -> (peak learning rate, weight decay), for those with rates of their own. All
        rates share the shape of the schedule."""
        return {}

    def schedule_curves(self, times: Tensor) -> dict[str, Tensor]:
        """Named curves over `times` for the report; empty where there is no time."""
        return {}


def advance(passes: Generator[Pass, Tensor, Corrupted], result: Tensor | None = None) -> Pass | Corrupted:
    """The pass after that with this result (None: the first), or what they all come to."""
    try:
        return passes.send(result)
    except StopIteration as done:
        return done.value


class Summed(NamedTuple):
    """A term whose sum over the positions that count is there already."""

    total: Tensor
    """Scalar to back-propagate."""
    values_BL: Tensor
    """Detached, weights included."""

    @staticmethod
    def of(loss: TokenLoss, weights_BL: Tensor | float = 1.0) -> Summed:
        """A loss of tokens that was computed with these weights, which broadcast to [B, L]."""
        return Summed(loss.total, weights_BL * loss.values_BL)


def sum_terms(
    terms_BL: dict[str, Tensor | Summed],
    loss_mask_BL: Tensor,
    times_B: Tensor | None,
    statistics: dict[str, Tensor] | None = None,
) -> LossTerms:
    """Add up per-position losses (float32 or float64 [B, L], weights included) where `loss_mask` is True."""
    weight_BL = loss_mask_BL.double()
    detached = {
        name: (term.values_BL if isinstance(term, Summed) else term.detach().double()) * weight_BL
        for name, term in terms_BL.items()
    }
    totals = [term.total if isinstance(term, Summed) else (term * weight_BL).sum() for term in terms_BL.values()]
    total_BL = sum(detached.values())
    buckets: dict[str, Tensor] = {}
    if times_B is not None:
        index_B = time_buckets(times_B, NUM_TIME_BUCKETS)
        zeros = torch.zeros(NUM_TIME_BUCKETS, dtype=torch.float64, device=weight_BL.device)
        buckets["bucket_sums"] = zeros.index_add(0, index_B, total_BL.sum(1))
        buckets["bucket_counts"] = zeros.index_add(0, index_B, weight_BL.sum(1))
    return LossTerms(
        total=sum(totals),
        count=loss_mask_BL.sum(),
        terms={name: value.sum() for name, value in detached.items()},
        statistics=statistics or {},
        **buckets,
    )


def sum_positions(nats_BL: Tensor, loss_mask_BL: Tensor) -> Tensor:
    """Nats per sequence, float64 [B], over the positions that count."""
    return (nats_BL.double() * loss_mask_BL).sum(1)


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids every objective is told."""
    return {"mask_id": tokenizer.mask_id, "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
