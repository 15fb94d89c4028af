"""A vocabulary whose logits are divided among the processes of the tensor axis.

Every process has the columns of its own rows of the token table, padding at the end of the last: [..., V'] where one
process has [..., V]. What is done over all tokens is done here, by methods that on one process are torch's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from braid.kernels.linear_cross_entropy import CrossEntropy
from braid.parallel.layers import Shard, megatron, shared, summed
from braid.parallel.mesh import Axis


@dataclass(frozen=True)
class Vocabulary:
    """`size` tokens (V), V' of them on this process. Losses come out the same on every process; gradients of logits are
    those of this process's."""

    size: int
    axis: Axis | None = None

    @property
    def divided(self) -> bool:
        return self.axis is not None and self.axis.size > 1

    @property
    def first(self) -> int:
        """The first token of this process."""
        return self.axis.rank * self._shard(0).piece if self.divided else 0

    def logits(self, raw: Tensor) -> Tensor:
        """What the head says, in float32 at least; -inf at padding, in place where it was float32."""
        logits = raw.to(torch.promote_types(raw.dtype, torch.float32))
        if self.divided and self.first + logits.shape[-1] > self.size:
            logits[..., max(self.size - self.first, 0) :].fill_(float("-inf"))
        return logits

    def without(self, logits: Tensor, token: int) -> Tensor:
        """The logits with a token's set to -inf."""
        column = torch.arange(logits.shape[-1], device=logits.device) == token - self.first
        return logits.masked_fill(column, float("-inf"))

    def without_(self, logits: Tensor, token: int) -> Tensor:
        """The same in place."""
        if 0 <= token - self.first < logits.shape[-1]:
            logits.select(-1, token - self.first).fill_(float("-inf"))
        return logits

    def cross_entropy(
        self, targets: Tensor, weights: Tensor, *, without: int | None = None, z_loss: float = 0.0
    ) -> CrossEntropy:
        """The cross-entropy of each row of logits [N, V'], for `linear_loss`: -log p(target) in nats, targets int64 of
        N elements, times weights. A token that is left out has no probability."""
        targets, weights = targets.flatten(), weights.flatten().float()
        if not self.divided:
            return CrossEntropy(targets, weights, z_loss, without)
        first, columns = self.first, self._shard(0).piece
        is_here = without is not None and first <= without < first + columns
        return CrossEntropy(
            targets_N=(targets - first).masked_fill(targets >= first + columns, -1),
            weights_N=weights,
            z_loss=z_loss,
            without=without - first if is_here else None,
            num_tokens=max(self.size - first, 0),
            join=self._join,
        )

    def log_softmax(self, logits: Tensor) -> Tensor:
        """Log-probabilities [..., V']."""
        if not self.divided:
            return F.log_softmax(logits, -1)
        shifted, _, total = self._exponentials(logits)
        return shifted - total.log()

    def softmax(self, logits: Tensor) -> Tensor:
        """Probabilities [..., V']."""
        if not self.divided:
            return logits.softmax(-1)
        _, exponentials, total = self._exponentials(logits)
        return exponentials / total

    def softmax_(self, logits: Tensor) -> Tensor:
        """The same in place, without gradient."""
        largest = logits.amax(-1, keepdim=True)
        if self.divided:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.axis.group)
        exponentials = logits.sub_(largest).exp_()
        return exponentials.div_(self.sum(exponentials.sum(-1, keepdim=True)))

    def take(self, values: Tensor, tokens: Tensor) -> Tensor:
        """Of values [..., V'] those at tokens int64 [..., K], [..., K] on every process."""
        if not self.divided:
            return values.gather(-1, tokens)
        column = tokens - self.first
        elsewhere = (column < 0) | (column >= values.shape[-1])
        return self.sum(values.gather(-1, column.masked_fill(elsewhere, 0)).masked_fill(elsewhere, 0))

    def add_(self, values: Tensor, tokens: Tensor, added: Tensor) -> Tensor:
        """Add to values [..., V'] what belongs to tokens int64 [..., K], in place. They may be the same token twice."""
        column = tokens - self.first
        elsewhere = (column < 0) | (column >= values.shape[-1])
        for place, more in zip(
            column.masked_fill(elsewhere, 0).split(1, -1), added.masked_fill(elsewhere, 0).split(1, -1), strict=True
        ):
            values.scatter_(-1, place, values.gather(-1, place) + more)
        return values

    def sum(self, partial: Tensor) -> Tensor:
        """The sum over the processes of what each has summed over its tokens."""
        if not self.divided:
            return partial
        return summed(partial.clone(), self.axis)

    def columns(self, weights: Tensor) -> Tensor:
        """This process's [..., V'] of weights [..., V] that every process has."""
        return self._shard(weights.ndim - 1).cut(weights) if self.divided else weights

    def rows(self, table: Tensor) -> Tensor:
        """This process's [V', D] of a table [V, D] that every process has; the table's gradient is whole."""
        return self._shard(0).cut(shared(table, self.axis)) if self.divided else table

    def shared(self, x: Tensor) -> Tensor:
        """x, the same on every process, to be multiplied with `rows`; its gradient is whole."""
        return shared(x, self.axis) if self.divided else x

    def gather(self, logits: Tensor) -> Tensor:
        """The logits of all tokens [..., V] on every process."""
        if not self.divided:
            return logits
        return megatron().gather_from_tensor_model_parallel_region(logits, group=self.axis.group)[..., : self.size]

    def _join(self, largest: Tensor, total: Tensor, at_target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What `CrossEntropy` asks for, in one message."""
        each = self.axis.all_gather(torch.stack([largest.double(), total.double(), at_target.double()])[None], 0)
        largest = each[:, 0].amax(0)
        return largest, (each[:, 1] * (each[:, 0] - largest).exp()).sum(0), each[:, 2].sum(0)

    def _exponentials(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The logits less the largest of all processes', their exponentials, and the sum of these over all tokens."""
        largest = logits.detach().amax(-1, keepdim=True)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.axis.group)
        shifted = logits - largest
        exponentials = shifted.exp()
        return shifted, exponentials, self.shared(self.sum(exponentials.sum(-1, keepdim=True)))

    def _shard(self, dim: int) -> Shard:
        return Shard(dim, 1, self.axis.rank, self.axis.size, self.size)
