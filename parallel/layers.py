"""Tensor and sequence parallelism: layers divided among the processes of the tensor axis, on Megatron-core's functions.

A network is written for one process. Its classes say in `divided` which of their layers can be divided, and
`shard_layers` replaces those, before they have values, by layers of the same names that hold a part of the weights:

    Columns   the output features are divided: heads, hidden units, the vocabulary's logits
    Rows      the input features are divided, and the outputs of all processes are added up: what comes after Columns,
              and a token table, whose input is the vocabulary

Everything else is replicated. The hidden states between a Rows and the next Columns are whole on every process, or,
with sequence parallelism, divided along the positions (arXiv 2205.05198): then the sum of a Rows leaves every process
its positions only, and a Columns gathers all of them. A `Region` is what a network asks for this.

Gradients. Of a divided parameter they are this process's part. Of a replicated one they are whole, and the same on
every process, except where each process sees only some positions or some heads: such a parameter is marked `partial`,
and `sum_partial_gradients` makes them whole. Shape suffixes: B sequences, L positions of the whole sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from braid.kernels.capabilities import require
from braid.kernels.errors import ConfigError
from braid.parallel.accumulation import autocast_dtype, fused_linear, fused_product, is_fused
from braid.parallel.context import UNDIVIDED, Context
from braid.parallel.data_parallel import reduce_gradients
from braid.parallel.mesh import Axis
from braid.parallel.pipeline import ONE_PIECE, Stage

T = TypeVar("T")
Loss = Callable[[Tensor, Tensor, Tensor | None], T]
"""Of the input, the weight and the bias of a linear layer, as `linear_loss` takes them."""


@functools.cache
def megatron() -> ModuleType:
    """Megatron-core's functions for tensor parallelism, imported when the first divided layer runs."""
    return require("megatron-core").tensor_parallel


# -- parameters that are divided -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """Which part of a tensor a process holds: along `dim`, of each of `parts` equal parts (queries, keys and values in
    one matrix) the piece number `rank` of `size`. Where a part does not divide, its last pieces end in zeros."""

    dim: int
    parts: int
    rank: int
    size: int
    length: int
    """Of the whole tensor along `dim`, without the zeros."""

    @property
    def piece(self) -> int:
        """Length of a piece, zeros included."""
        return -(-self.length // (self.parts * self.size))

    @property
    def span(self) -> tuple[int, int]:
        """Where this process's piece starts and stops in each part, zeros left out."""
        part = self.length // self.parts
        return min(self.rank * self.piece, part), min((self.rank + 1) * self.piece, part)

    def cut(self, full: Tensor) -> Tensor:
        """This process's part of the whole tensor; it may be a view."""
        start, stop = self.span
        parts = full.unflatten(self.dim, (self.parts, self.length // self.parts))
        return self.pad(parts.narrow(self.dim + 1, start, stop - start).flatten(self.dim, self.dim + 1))

    def pad(self, values: Tensor) -> Tensor:
        """What this process holds, from its values without the zeros; `trim` is the inverse."""
        start, stop = self.span
        missing = self.piece - (stop - start)
        if not missing:
            return values
        held = values.unflatten(self.dim, (self.parts, stop - start))
        return F.pad(held, (0, 0) * (values.ndim - self.dim - 1) + (0, missing)).flatten(self.dim, self.dim + 1)

    def trim(self, held: Tensor) -> Tensor:
        """The values of what this process holds, without the zeros; it may be a view."""
        start, stop = self.span
        if stop - start == self.piece:
            return held
        parts = held.unflatten(self.dim, (self.parts, self.piece))
        return parts.narrow(self.dim + 1, 0, stop - start).flatten(self.dim, self.dim + 1)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole tensor from the parts of all processes, in their order."""
        pieces = [part.unflatten(self.dim, (self.parts, self.piece)) for part in parts]
        whole = torch.cat(pieces, self.dim + 1).narrow(self.dim + 1, 0, self.length // self.parts)
        return whole.flatten(self.dim, self.dim + 1)


def whole_shape(parameter: Tensor) -> torch.Size:
    """Shape of the parameter's whole tensor."""
    # Between uses DeepSpeed's ZeRO 3 leaves a parameter empty, and keeps its shape.
    shape, shard = list(getattr(parameter, "ds_shape", parameter.shape)), getattr(parameter, "shard", None)
    if shard is not None:
        shape[shard.dim] = shard.length
    return torch.Size(shape)


@torch.no_grad()
def set_whole(parameter: Tensor, full: Tensor) -> None:
    """Give the parameter its values out of its whole tensor's."""
    shard = getattr(parameter, "shard", None)
    parameter.copy_(full if shard is None else shard.cut(full))


@torch.no_grad()
def gather_whole(local: Tensor, shard: Shard, axis: Axis) -> Tensor:
    """The whole tensor, on every process of the tensor axis, from each one's part. Collective."""
    return shard.join(axis.all_gather(local[None], 0))


def sum_partial_gradients(parameters: Iterable[nn.Parameter], axis: Axis) -> None:
    """Make the gradients of parameters marked `partial` whole; call it after the last backward pass of a step, with
    the same parameters in the same order on every process of the tensor axis."""
    reduce_gradients((parameter for parameter in parameters if getattr(parameter, "partial", False)), axis)


# -- activations -----------------------------------------------------------------------------------------------------


Store = Callable[[nn.Module], None]
"""Called with each module of a network when its own parameters have their values."""


def keep_whole(module: nn.Module) -> None:
    """Leaves the parameters as they are."""


@dataclass(frozen=True)
class Region:
    """The part of a network, from the embedding to the heads, whose work the processes of the tensor axis divide.

    Positions are dimension 1 of every tensor here; where sequences are divided among processes of the context axis,
    all positions L are those of this process of that axis. On one process all methods return what they are given.
    """

    axis: Axis | None = None
    sequence: bool = False
    """Divide the hidden states along the positions."""
    context: Context = UNDIVIDED
    """How sequences are divided."""
    stage: Stage = ONE_PIECE
    """The blocks of the network that are on this process at all, where a pipeline divides them."""
    store: Store = keep_whole
    """What this process keeps of the parameters between uses."""

    @property
    def size(self) -> int:
        return 1 if self.axis is None else self.axis.size

    @property
    def divided(self) -> bool:
        """Whether hidden states are divided now. They are where gradients are recorded: without, nothing is kept of
        them that would have to be divided, and a sampler may show any number of positions."""
        return self.sequence and self.size > 1 and torch.is_grad_enabled()

    def enter(self, x: Tensor) -> Tensor:
        """This process's positions of x [B, L, ...], the same on every process; its gradient is whole."""
        if not self.divided:
            return x
        self._check_length(x.shape[1])
        return self._by_position(megatron().scatter_to_sequence_parallel_region, x)

    def leave(self, x: Tensor) -> Tensor:
        """All positions [B, L, ...] of x on every process, for what every process then does alike."""
        if not self.divided:
            return x
        return self._by_position(megatron().gather_from_sequence_parallel_region, x, tensor_parallel_output_grad=False)

    def spread(self, x: Tensor) -> Tensor:
        """All positions of x on every process, for what each then does a part of: the way into divided weights."""
        if self.size == 1:
            return x
        x = x.to(autocast_dtype(x))  # what comes next would do it, and there may be fewer bytes to send
        if not self.divided:
            return shared(x, self.axis)
        return self._by_position(megatron().gather_from_sequence_parallel_region, x)

    def collect(self, x: Tensor) -> Tensor:
        """The sum over the processes of x [B, L, ...], of which each has computed its part: the way out of divided
        weights. x is used up."""
        if self.size == 1:
            return x
        if not self.divided:
            return summed(x, self.axis)
        self._check_length(x.shape[1])
        return self._by_position(megatron().reduce_scatter_to_sequence_parallel_region, x)

    def condition(self, c: Tensor) -> Tensor:
        """c, the same on every process and every position, for use on divided hidden states; its gradient is whole."""
        return shared(c, self.axis) if self.divided else c

    def length(self, x: Tensor) -> int:
        """L of hidden states [B, L, ...] that may be divided."""
        return x.shape[1] * (self.size if self.divided else 1)

    def share(self, length: int) -> int:
        """How many of the positions of a whole sequence are in the hidden states here."""
        return length // self.context.size // (self.size if self.divided else 1)

    def positions(self, x_L: Tensor) -> Tensor:
        """This process's of a list of all positions that hidden states would have here if they were not divided."""
        return x_L.chunk(self.size)[self.axis.rank] if self.divided else x_L

    @torch.compiler.disable
    def _by_position(self, function: Callable[..., Tensor], x: Tensor, **options: Any) -> Tensor:
        """Megatron's functions divide dimension 0."""
        return function(x.transpose(0, 1).contiguous(), group=self.axis.group, **options).transpose(0, 1)

    def _check_length(self, length: int) -> None:
        if length % self.size:
            raise ConfigError(
                "the positions do not divide among the processes of the tensor axis",
                found=f"{length} positions / {self.size} processes = {length / self.size:.2f}",
                change="parallel.sequence=false, another parallel.tensor, or a multiple of it for the positions: "
                "data.sequence_length, for ELF 12 more; beside them objective.num_slots",
            )


ALONE = Region()
"""The region of a network on one process."""


@torch.compiler.disable
def shared(x: Tensor, axis: Axis) -> Tensor:
    """x, the same on every process, for what each computes a part of: its gradient is the sum of theirs."""
    x = megatron().copy_to_tensor_model_parallel_region(x, group=axis.group)
    if x.requires_grad:
        # Megatron sums this gradient in place, and only if it is contiguous; others may hold the same memory.
        x.register_hook(lambda gradient: gradient.clone(memory_format=torch.contiguous_format))
    return x


@torch.compiler.disable
def summed(x: Tensor, axis: Axis) -> Tensor:
    """The sum over the processes of what each has computed a part of, for what all then do alike. x is used up: it is
    summed in place where it is contiguous."""
    return megatron().reduce_from_tensor_model_parallel_region(x.contiguous(), group=axis.group)


# -- layers ----------------------------------------------------------------------------------------------------------


class OutputLinear(nn.Linear):
    """The linear layer of a head, in the dtype of its input. It may be asked for a loss in place of all its outputs,
    and so sees its weights as its input does: inside a call, where an engine has them whole."""

    def forward(self, x: Tensor, loss: Loss[T] | None = None) -> Tensor | T:
        if loss is not None:
            return loss(x, self.weight, self.bias)
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class ColumnLinear(nn.Module):
    """A linear layer whose output features are divided: [B, L, ..., in] to this process's [B, L, ..., out / size].

    All positions come out, where the hidden states are divided too. The gradient of the input is summed over the
    processes while that of the weights is computed. As an `OutputLinear`, it may be asked for a loss.
    """

    def __init__(self, whole: nn.Linear, parts: int, region: Region) -> None:
        super().__init__()
        self.region = region
        self.shards = _divide(self, whole, Shard(0, parts, region.axis.rank, region.size, whole.out_features))

    @torch.compiler.disable
    def forward(self, x: Tensor, loss: Loss[T] | None = None) -> Tensor | T:
        if loss is not None:
            return loss(self.region.spread(x), self.weight, self.bias)
        divided, dtype = self.region.divided, autocast_dtype(x)
        if divided:
            x = x.transpose(0, 1)
        # Megatron's function takes [positions, others, features], or rows of features where it gathers nothing.
        rows = (x.flatten(1, -2) if divided else x.flatten(0, -2)).to(dtype).contiguous()
        bias = None if self.bias is None else self.bias.to(dtype)
        if is_fused(self.weight):
            group = self.region.axis.group
            output = fused_linear(rows, self.weight, bias, allreduce=not divided, sequence=divided, group=group)
        else:
            output = megatron().linear_with_grad_accumulation_and_async_allreduce(
                rows,
                self.weight.to(dtype),
                bias,
                gradient_accumulation_fusion=False,
                allreduce_dgrad=not divided,
                sequence_parallel=divided,
                tp_group=self.region.axis.group,
            )
        if divided:
            return output.unflatten(1, x.shape[1:-1]).transpose(0, 1)
        return output.unflatten(0, x.shape[:-1])


class RowLinear(nn.Module):
    """A linear layer whose input features are divided: this process's [B, L, ..., in / size] to [B, L, ..., out], of
    this process's positions where the hidden states are divided."""

    def __init__(self, whole: nn.Linear, region: Region) -> None:
        super().__init__()
        self.region = region
        self.shards = _divide(self, whole, Shard(1, 1, region.axis.rank, region.size, whole.in_features))

    def forward(self, x: Tensor) -> Tensor:
        product = fused_product if is_fused(self.weight) else F.linear
        x = self.region.collect(product(x, self.weight))
        return x if self.bias is None else x + self.bias.to(x.dtype)


class RowEmbedding(nn.Module):
    """A table whose rows are divided: tokens [B, L] to vectors [B, L, W], of this process's positions where the hidden
    states are divided."""

    def __init__(self, whole: nn.Embedding, region: Region) -> None:
        super().__init__()
        self.region = region
        self.shards = _divide(self, whole, Shard(0, 1, region.axis.rank, region.size, whole.num_embeddings))

    def forward(self, tokens: Tensor) -> Tensor:
        num_rows = len(self.weight)
        row = tokens - self.region.axis.rank * num_rows
        elsewhere = (row < 0) | (row >= num_rows)
        vectors = F.embedding(row.masked_fill(elsewhere, 0), self.weight)
        return self.region.collect(vectors.masked_fill(elsewhere[..., None], 0))


@dataclass(frozen=True)
class Columns:
    """Divide the output features, of each of `parts` equal parts."""

    parts: int = 1
    outside: bool = False
    """The input has all positions even where hidden states are divided: a layer behind `Region.leave`."""

    def divide(self, whole: nn.Linear, region: Region) -> nn.Module:
        return ColumnLinear(whole, self.parts, Region(region.axis) if self.outside else region)


@dataclass(frozen=True)
class Rows:
    """Divide the input features, of a table its rows."""

    def divide(self, whole: nn.Linear | nn.Embedding, region: Region) -> nn.Module:
        return RowEmbedding(whole, region) if isinstance(whole, nn.Embedding) else RowLinear(whole, region)


def shard_layers(module: nn.Module, region: Region) -> None:
    """Replace what the classes of `module` (made on `meta`) call `divided`: {name of a layer: Columns or Rows}."""
    for owner in list(module.modules()):
        for name, how in getattr(owner, "divided", {}).items():
            owner.set_submodule(name, how.divide(owner.get_submodule(name), region))


def mark_shards(owner: nn.Module) -> None:
    """Say of a layer's own parameters which part of the whole they are."""
    for name, shard in getattr(owner, "shards", {}).items():
        getattr(owner, name).shard = shard


def mark_parameters(module: nn.Module, region: Region, inside: Collection[str]) -> None:
    """Say of each parameter of a module with divided layers which part of the whole it is, `shard`, or, where its
    gradient is that of some positions or heads only, `partial`.

    inside: first components of the names of what is used between `enter` and `leave`. Classes say in `per_head` which
    of their modules are applied to each head.
    """
    for owner in module.modules():
        mark_shards(owner)
        for name in getattr(owner, "per_head", ()):
            for parameter in owner.get_submodule(name).parameters():
                parameter.partial = True
    for name, parameter in module.named_parameters():
        if region.sequence and name.partition(".")[0] in inside and not hasattr(parameter, "shard"):
            parameter.partial = True


def _divide(layer: nn.Module, whole: nn.Linear | nn.Embedding, shard: Shard) -> dict[str, Shard]:
    """Give `layer` this process's part of the parameters of `whole`, without values; which of them are parts."""
    layer.weight = nn.Parameter(torch.empty_like(shard.cut(whole.weight)))
    bias, shards = getattr(whole, "bias", None), {"weight": shard}
    if bias is not None and shard.dim == 0:
        bias, shards = shard.cut(bias), shards | {"bias": shard}
    layer.register_parameter("bias", None if bias is None else nn.Parameter(torch.empty_like(bias)))
    return shards
