"""A linear layer and a loss of its rows, a few rows at a time: logits of all rows never exist together.

An output layer turns hidden states [N, W] into logits [N, V], of which a language model has the most numbers by far: at
V = 50,000 as many for each token as 65 hidden states of 768. What a loss wants of them is one number a row and, in
training, a gradient. Both are made here chunk by chunk, the gradient in the forward pass already, while the logits are
there: the backward pass only multiplies. So a loss needs memory for one chunk of logits, however many rows there are,
and no product is computed twice. And it needs only the rows that count (`Rows`): in masked diffusion, half of them.

Numbers are those of logits made at once. Products, and so logits and their gradients, are of the hidden states' dtype,
as under autocast; losses and the sums over chunks of what the weights get are float32 at least.

Shape suffixes: N rows, M rows of a chunk, W width, V tokens.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_LOGITS = 1 << 26
"""Logits that exist at a time: 128 MiB of bfloat16, 256 of float32. With fewer, the sum over chunks of the weights'
gradient would be read and written more often, and take longer than the products."""
TOKENS_ADDED = 1 << 13
"""Rows of the weights' gradient that a product in half precision is made for at a time, before it is added to it."""
ALIGNMENT = 64
"""Rows of logits begin at multiples of so many elements: fast matrix products want it, and few vocabularies are."""


class RowLoss(Protocol):
    """A loss of each row's logits."""

    def __call__(self, logits_MV: Tensor, rows_M: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        """What each row adds to the total, and what is to be known of it, [M] each.

        The logits are of the products' dtype. rows_M: which of the N rows these are, int64. With `gradient` the logits
        must be overwritten by the gradient of the sum of what the rows add; without, they may be by anything.
        """


class Rows:
    """Which of N rows count: their numbers, in order, and how many they are."""

    def __init__(self, counts: Tensor) -> None:
        """`counts`: bool, any shape of N elements."""
        self._counts = counts.flatten()
        self._number: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def begin(self) -> None:
        """Send the number of rows on its way to the host, where the loop over chunks will ask for it.

        Nothing waits here. Called as soon as the noise is drawn, and before the network is queued on a GPU, this makes
        the later question wait for no more than that noise, which is long done by then; without it, asking would drain
        the device's queue.
        """
        number = self._counts.sum()
        self._number = torch.empty((), dtype=torch.int64, pin_memory=number.is_cuda)
        self._number.copy_(number, non_blocking=True)
        if number.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    @functools.cached_property
    def number(self) -> int:
        """How many rows count."""
        if self._number is None:
            self.begin()
        if self._arrived is not None:
            self._arrived.synchronize()
        return int(self._number.numpy())

    def chunks(self, size: int) -> tuple[Tensor, ...]:
        """Numbers of the rows, int64, `size` at a time; the last ones may be fewer."""
        if self.number == 0:
            return ()
        order = self._counts.byte().argsort(descending=True, stable=True)  # `nonzero` would wait for the device
        return order[: self.number].split(size)


def chunk_rows(num_rows: int, num_tokens: int) -> int:
    """How many of the rows are looked at together."""
    return max(1, min(num_rows, CHUNK_LOGITS // aligned(num_tokens)))


@torch.compiler.disable
def linear_loss(
    hidden_NW: Tensor, weight_VW: Tensor | None, bias_V: Tensor | None, rows: Rows, row_loss: RowLoss
) -> tuple[Tensor, Tensor]:
    """The sum of `row_loss` over `rows`, and what it says of each row, of the logits hidden @ weight^T + bias.

    Returns a float64 scalar that can be differentiated, once, and float64 [N] without gradient, 0 at rows that do not
    count. Gradients that nobody wants are not computed. Without weight the hidden states are the logits.
    Deterministic, where the row loss is. `torch.compile` calls this as it is.
    """
    inputs = hidden_NW, weight_VW, bias_V
    if torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in inputs):
        return _LinearLoss.apply(*inputs, rows, row_loss)
    with torch.no_grad():
        return _forward(*inputs, rows, row_loss, (False, False, False))[:2]


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, rows: Rows, row_loss: RowLoss
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[:3]
        total, values, *gradients = _forward(hidden, weight, bias, rows, row_loss, wanted)
        ctx.save_for_backward(*gradients)
        inputs = hidden, weight, bias
        ctx.dtypes = [None if each is None else each.dtype for each in inputs]
        ctx.sums = [getattr(each, "main_grad", None) for each in inputs]
        ctx.mark_non_differentiable(values)
        return total, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        found = zip(ctx.saved_tensors, ctx.dtypes, ctx.sums, strict=True)
        # In place: a second [V, W] would be the largest tensor here.
        return *(None if each is None else _deliver(each.mul_(of_total), *to) for each, *to in found), None, None


class _ToItsSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.total = weight.main_grad
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _deliver(gradient, gradient.dtype, ctx.total)


def to_its_sum(weight: Tensor) -> Tensor:
    """The same values, to be used once. Where an engine sums up the weight's gradients in a wider dtype than its own,
    that of this use goes there by itself, as those of `linear_loss` do, and is not rounded with those of other uses."""
    total = getattr(weight, "main_grad", None)
    return weight if total is None or total.dtype == weight.dtype else _ToItsSum.apply(weight)


def _deliver(gradient: Tensor, dtype: torch.dtype, total: Tensor | None) -> Tensor:
    """What autograd is given, of the input's dtype; the gradient is spent.

    total: where an engine sums up the gradients of a parameter in a wider dtype than its own (Megatron's `main_grad`).
    It gets the gradient as it is, and autograd, which would carry it there, a zero.
    """
    if total is None or total.dtype == dtype:
        return gradient.to(dtype)
    total += gradient
    return gradient.new_zeros((), dtype=dtype).expand_as(gradient)


def _forward(
    hidden: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rows: Rows,
    row_loss: RowLoss,
    wanted: tuple[bool, ...],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Total, values, and those gradients of hidden, weight and bias that are wanted."""
    dtype, exact = hidden.dtype, torch.promote_types(hidden.dtype, torch.float32)
    matrix, offset = (None if each is None else each.to(dtype) for each in (weight, bias))
    num_rows, num_tokens = len(hidden), hidden.shape[1] if weight is None else len(weight)
    size = chunk_rows(num_rows, num_tokens)
    total = hidden.new_zeros((), dtype=torch.float64)
    values = hidden.new_zeros(num_rows, dtype=torch.float64)
    of_hidden = torch.zeros_like(hidden) if wanted[0] else None
    of_weight = torch.zeros_like(weight, dtype=exact) if wanted[1] else None
    of_bias = torch.zeros_like(bias, dtype=exact) if wanted[2] else None
    buffer = hidden.new_empty(size, aligned(num_tokens))[:, :num_tokens]

    for chunk in rows.chunks(size):
        h, logits = hidden.index_select(0, chunk), buffer[: len(chunk)]
        if matrix is None:
            logits.copy_(h)
        elif offset is None:
            torch.mm(h, matrix.t(), out=logits)
        else:
            torch.addmm(offset, h, matrix.t(), out=logits)
        added, of_rows = row_loss(logits, chunk, any(wanted))  # from here on they may be their gradient
        total += added.double().sum()
        values.index_copy_(0, chunk, of_rows.double())
        if of_bias is not None:
            of_bias += logits.sum(0, dtype=exact)
        if of_hidden is not None:
            of_hidden.index_copy_(0, chunk, logits if matrix is None else logits @ matrix)
        if of_weight is not None:
            _add_product(of_weight, logits, h)
    return total, values, of_hidden, of_weight, of_bias


def _add_product(total_VW: Tensor, left_MV: Tensor, right_MW: Tensor) -> None:
    """total += left^T @ right."""
    if left_MV.dtype == total_VW.dtype:
        total_VW.addmm_(left_MV.t(), right_MW)
        return
    for total, left in zip(total_VW.split(TOKENS_ADDED), left_MV.split(TOKENS_ADDED, 1), strict=True):
        if left.is_cuda:  # a GPU sums up products of half precision in float32, and can leave them so
            total += torch.mm(left.t(), right_MW, out_dtype=total.dtype)
        else:
            total += left.t() @ right_MW


def aligned(num_tokens: int) -> int:
    """From the start of a row of logits to that of the next."""
    return -(-num_tokens // ALIGNMENT) * ALIGNMENT
