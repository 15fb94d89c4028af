"""Context parallelism: each sequence is divided among the processes of the context axis, and attention sees all of it.

A stream of positions (tokens, latent slots, the tokens ELF puts before its text) is divided into as many contiguous
parts as there are processes, all of one length. What is done position by position needs no more than that. Attention
does, in one of two ways:

    ulysses   all-to-all: each process gets all positions of some of its heads, and afterwards all heads of its
              positions back (arXiv 2309.14509)
    gather    each process gets the keys and values of all positions for the queries it has (as in arXiv 2407.21783,
              3.3.2); their gradients are summed where they came from

Where several streams are one sequence (tokens and slots, two strands), a process holds a part of each, and attention
sees them in the order of the processes. That order matters to nobody: a network that is causal has one stream.

A loss is a sum over positions, so that the losses of all processes add up to that of the sequence, and so do the
gradients they leave on parameters, which every process has whole. What is no sum over positions, a function of a
row's mean, asks for `Context.sum`.

Shape suffixes: B sequences, H heads, L positions of the whole sequence, l of this process, K head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from braid.kernels.attention import attention
from braid.parallel.mesh import Axis


class Context:
    """How sequences are divided, and whether they are now.

    Only within `dividing` they are: a training step, its forward and its backward pass (which runs blocks again where
    activations are recomputed). Everywhere else, in validation, sampling and evaluation, and for a network on one
    process, sequences are whole, and every method gives back what it is given.
    """

    def __init__(self, axis: Axis | None = None, by: str = "ulysses") -> None:
        """`by`: `ulysses`, for which the heads of this process must divide, or `gather`."""
        self.axis, self.by = axis, by
        self._dividing = False

    @contextmanager
    def dividing(self) -> Iterator[None]:
        """Sequences are divided within: all that is given to the network are this process's positions."""
        assert not self._dividing
        self._dividing = self.divides
        try:
            yield
        finally:
            self._dividing = False

    @property
    def divides(self) -> bool:
        """Whether there are several processes to divide sequences among."""
        return self.axis is not None and self.axis.size > 1

    @property
    def size(self) -> int:
        """Into how many parts sequences are divided now."""
        return self.axis.size if self._dividing else 1

    def start(self, length: int) -> int:
        """Where in the stream the `length` positions of this process begin."""
        return self.axis.rank * length if self._dividing else 0

    def part(self, x: Tensor, dim: int = 1) -> Tensor:
        """This process's positions of x, which has those of a whole stream along `dim`. It may be a view."""
        length, rest = divmod(x.shape[dim], self.size)
        assert rest == 0, "check_plan refuses it"
        return x.narrow(dim, self.start(length), length)

    def gather(self, x: Tensor, dim: int = 1) -> Tensor:
        """The positions of all processes along `dim`, in the order of the processes. Not differentiable."""
        return self.axis.all_gather(x, dim) if self._dividing else x

    def visible(self, segments: Tensor | None) -> Tensor | None:
        """Which positions may see each other, for `CoreAttention`: those of one segment. bool [B, 1, queries, L], from
        the segments of this process's positions [B, l]; None: all may."""
        if segments is None:
            return None
        whole = self.gather(segments)
        queries = segments if self.by == "gather" else whole  # by ulysses a process has all queries of some heads
        return (queries[:, :, None] == whole[:, None, :])[:, None]

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the processes, for what each goes on with by itself; its gradient is the sum of theirs."""
        return _Sum.apply(x, self.axis) if self._dividing else x

    def mean(self, x: Tensor, dim: int = 1) -> Tensor:
        """The mean over all positions of a stream, of which x has this process's along `dim`; as `sum`."""
        return self.sum(x.sum(dim)) / (x.shape[dim] * self.size)


UNDIVIDED = Context()
"""Sequences that are never divided."""


class CoreAttention(nn.Module):
    """softmax(q k^T / sqrt K) v over the whole sequence, however it is divided: every attention of the house."""

    context = UNDIVIDED

    def forward(
        self,
        q_BHlK: Tensor,
        k_BHlK: Tensor,
        v_BHlK: Tensor,
        *,
        keys: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Queries, keys and values of this process's positions to its positions of the outcome, [B, H, l, K]. Queries
        may be of another stream than keys and values.

        keys: which of all L keys may be seen, bool that broadcasts to [B, H, l, L]: the same for every head, and for
        every query or as `Context.visible` gives it.
        causal: position i sees none above i.
        """
        context = self.context
        if context.size == 1:
            return attention(q_BHlK, k_BHlK, v_BHlK, keys, causal)
        if context.by == "gather":
            assert not causal, "check_plan refuses it"
            return attention(q_BHlK, *_all_positions(context, k_BHlK, v_BHlK), keys)
        return _all_heads(context, attention(*_some_heads(context, q_BHlK, k_BHlK, v_BHlK), keys, causal))


def divide_attention(module: nn.Module, context: Context) -> None:
    """Let every attention of `module` see the whole of sequences that `context` divides."""
    for part in module.modules():
        if isinstance(part, CoreAttention):
            part.context = context


@torch.compiler.disable
def _some_heads(context: Context, *tensors: Tensor) -> list[Tensor]:
    """Of [B, H, l, K] each all positions of this process's share of the heads, [B, H / size, L, K], in one message."""
    size, lengths = context.size, [x.shape[2] for x in tensors]
    for_each = torch.cat(tensors, 2).unflatten(1, (size, -1)).movedim(1, 0)
    from_each = _AllToAll.apply(for_each, context.axis).split(lengths, 3)
    return [x.movedim(0, 2).flatten(2, 3) for x in from_each]


@torch.compiler.disable
def _all_heads(context: Context, x_BHLK: Tensor) -> Tensor:
    """The inverse of `_some_heads`."""
    for_each = x_BHLK.unflatten(2, (context.size, -1)).movedim(2, 0)
    return _AllToAll.apply(for_each, context.axis).movedim(0, 1).flatten(1, 2)


@torch.compiler.disable
def _all_positions(context: Context, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Of [B, H, l, K] each all positions, [B, H, L, K], in one message."""
    from_each = _Gather.apply(torch.stack(tensors), context.axis)
    return from_each.movedim(0, 3).flatten(3, 4).unbind(0)


class _AllToAll(torch.autograd.Function):
    """`Axis.all_to_all`, whose gradient goes the same way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return axis.all_to_all(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.axis.all_to_all(gradient), None


class _Gather(torch.autograd.Function):
    """The tensors of all processes, one beside the other in a new dimension 0; the gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return axis.all_gather(x[None], 0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.axis.reduce_scatter(gradient)[0], None


class _Sum(torch.autograd.Function):
    """`Axis.all_reduce_sum` of a copy, and of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return axis.all_reduce_sum(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.axis.all_reduce_sum(gradient.clone(memory_format=torch.contiguous_format)), None
