"""What a network says of the token at each position: logits, made when somebody asks for them.

A network of W = 768 and V = 50,000 says 65 numbers for every one that its head reads. So what it returns is what the
head reads, and the head is called by whoever needs logits: a sampler all of them, a loss those of the positions that
count, a few at a time (kernels/linear_loss.py). Shape suffixes: B sequences, L positions, W width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from braid.kernels.linear_loss import RowLoss, Rows, chunk_rows, linear_loss, to_its_sum
from braid.parallel.layers import Loss, T
from braid.parallel.pipeline import ONE_PIECE, Stage
from braid.parallel.vocabulary import Vocabulary

RowLogits = Callable[[Tensor], Tensor]
"""Numbers of rows int64 [M] -> their logits [M, V], float32 at least; of a divided vocabulary the columns here."""


class TokenLoss(NamedTuple):
    """A loss of tokens. Only the sum can be differentiated."""

    total: Tensor
    """Over all positions that count, weighted: float64 scalar."""
    values_BL: Tensor
    """Of each position, not weighted: float64, 0 where it does not count."""


class TokenLogits:
    """Logits of every position. Where the layers of the network are divided, each process has its columns; where its
    blocks are in pieces, what is asked for outside of a schedule is on every process, and asked for by all."""

    def __init__(
        self,
        hidden_BLW: Tensor,
        linear: nn.Module | None,
        vocabulary: Vocabulary,
        stage: Stage = ONE_PIECE,
        z_loss: float = 0.0,
    ) -> None:
        """`hidden` are this process's positions, of the dtype that products are to have. `linear` is an `OutputLinear`
        or a `ColumnLinear`; None where there is nothing left to do, or where another process of a pipeline has it."""
        self.hidden_BLW, self.linear, self.vocabulary, self.stage = hidden_BLW, linear, vocabulary, stage
        self.z_loss = z_loss

    @staticmethod
    def known(logits_BLV: Tensor) -> TokenLogits:
        """Of logits that are there."""
        return TokenLogits(logits_BLV, None, Vocabulary(logits_BLV.shape[-1]))

    @functools.cached_property
    def whole(self) -> Tensor:
        """All of them, [B, L, V], float32, the mask token's column included; of a divided network this process's
        columns."""
        return self.stage.from_heads(self._make)

    def cross_entropy(
        self, targets_BL: Tensor, rows: Rows, weights_BL: Tensor | None = None, *, without: int | None = None
    ) -> TokenLoss:
        """-log p(target) in nats at `rows` of the B x L positions; token `without` has no probability. Weights, by
        default 1, broadcast to [B, L]. Where gradients are recorded, the total holds the z-loss too."""
        weights = targets_BL.new_ones((), dtype=torch.float32) if weights_BL is None else weights_BL
        z_loss = self.z_loss if torch.is_grad_enabled() else 0.0
        of_row = self.vocabulary.cross_entropy(
            targets_BL, weights.expand(targets_BL.shape), without=without, z_loss=z_loss
        )
        return self.loss(of_row, rows, targets_BL.shape)

    def loss(self, row_loss: RowLoss, rows: Rows, shape: torch.Size) -> TokenLoss:
        """Any other loss of each position's logits; `shape` is [B, L]."""
        total, values = self.stage.from_heads(partial(self._loss, row_loss, rows))
        return TokenLoss(total, values.view(shape))

    def loss_beside(
        self, other: TokenLogits, row_loss: Callable[[RowLogits], RowLoss], rows: Rows, shape: torch.Size
    ) -> TokenLoss:
        """A loss of each position's logits beside those of `other`, which are constants here: of another call of the
        same network. `row_loss` is given what makes other's logits of some rows."""

        def of(both: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
            hidden, constant = both.flatten(0, 1).chunk(2, -1)

            def logits(rows_M: Tensor) -> Tensor:
                some = constant.detach()[rows_M]
                if weight is not None:
                    some = F.linear(some, weight.to(some.dtype), None if bias is None else bias.to(some.dtype))
                return self.vocabulary.logits(some)

            return linear_loss(hidden, weight, bias, rows, row_loss(logits))

        total, values = self._read(of, torch.cat([self.hidden_BLW, other.hidden_BLW.detach()], -1))
        return TokenLoss(total, values.view(shape))

    def in_chunks(self, read: Callable[..., tuple[Tensor, ...]], *by_row: Tensor) -> tuple[Tensor, ...]:
        """What `read` makes of each position's logits, for losses that are no sum over rows of a function of the logits
        alone: read(logits [M, V], those rows of `by_row` [B L, ...]) -> [M, ...] each; together [B L, ...].

        Differentiable, also in tensors that `read` knows of. Where there are more logits than one chunk
        (linear_loss.py), they never exist together: the backward pass makes those of each chunk again.
        """

        def of(hidden: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> tuple[Tensor, ...]:
            def of_rows(hidden_MW: Tensor, *of_these: Tensor) -> tuple[Tensor, ...]:
                logits = hidden_MW
                if weight is not None:
                    own = (each if each is None else to_its_sum(each).to(logits.dtype) for each in (weight, bias))
                    logits = F.linear(hidden_MW, *own)
                return read(self.vocabulary.logits(logits), *of_these)

            hidden_NW = hidden.flatten(0, 1)
            size = chunk_rows(len(hidden_NW), hidden.shape[-1] if weight is None else len(weight))
            if size == len(hidden_NW):
                return of_rows(hidden_NW, *by_row)
            again = partial(checkpoint, of_rows, use_reentrant=False, preserve_rng_state=False)
            pieces = zip(*(rows.split(size) for rows in (hidden_NW, *by_row)), strict=True)
            return tuple(map(torch.cat, zip(*(again(*piece) for piece in pieces), strict=True)))

        return self.stage.from_heads(partial(self._read, of))

    def _read(self, of: Loss[T], hidden_BLW: Tensor | None = None) -> T:
        """`of` what the head's layer reads, by default its logits where they are there already, and of its weights."""
        if hidden_BLW is None and "whole" in self.__dict__:
            return of(self.whole)
        hidden_BLW = self.hidden_BLW if hidden_BLW is None else hidden_BLW
        if self.linear is None:
            return of(hidden_BLW)
        with self._as_it_is():
            return self.linear(hidden_BLW, loss=of)

    def _make(self) -> Tensor:
        if self.linear is None:
            return self.hidden_BLW
        with self._as_it_is():
            return self.vocabulary.logits(self.linear(self.hidden_BLW))

    def _loss(self, row_loss: RowLoss, rows: Rows) -> tuple[Tensor, Tensor]:
        def of(hidden: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return linear_loss(hidden.flatten(0, 1), weight, bias, rows, row_loss)

        return self._read(of)

    def _as_it_is(self) -> torch.autocast:
        """Losses are computed when the network's autocast is over. What it would have cast is cast already."""
        return torch.autocast(self.hidden_BLW.device.type, enabled=False)
