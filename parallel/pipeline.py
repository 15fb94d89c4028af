"""Pipeline parallelism: a network's stack of blocks in pieces, and Megatron-core's schedules over them.

Every process of the pipeline axis holds one piece of the stack or, interleaved, several (`plan.deal_blocks`). What
comes before the blocks is with the first piece, the heads are with the last. All else (time embeddings, a learned
schedule, embeddings that are noised) every process has: the parameters marked `replicated`. Between pieces only the
hidden states travel, one float32 tensor; noise, times and targets each process makes for itself, out of the batch.

A network asks its `Stage` what to do. It runs

    whole        where there is no pipeline
    as a piece   inside `Stage.running`: from `incoming` to the hidden states after the piece or, `at_end`, to what the
                 network predicts
    through      called anywhere else: all pieces one after the other, without gradient, and every process gets what the
                 last one says

Gradients. Of a replicated parameter each process has what its pieces contribute, and `sum_replicated_gradients` adds
them up. As the last of all sums it leaves the same bits everywhere, so that the copies stay equal. For norms, counts
and checkpoints the copy of the first process stands for all (`counts_here`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from braid.kernels.capabilities import require
from braid.parallel.data_parallel import reduce_gradients
from braid.parallel.mesh import Axis
from braid.parallel.plan import ParallelConfig

T = TypeVar("T")

NUM_SIZES = 6
"""Room for the dimensions of hidden states in the message that announces them."""


# -- the pieces of a process -----------------------------------------------------------------------------------------


class Stage:
    """What this process holds and runs of a network. `pieces` are the numbers of the blocks of each of its pieces."""

    def __init__(
        self, axis: Axis | None = None, pieces: Sequence[Sequence[int]] = (), device: torch.device | str = "cpu"
    ) -> None:
        self.axis, self.pieces, self.device = axis, tuple(map(tuple, pieces)), torch.device(device)
        self.piece: int | None = None
        """Number of the piece that runs."""
        self.incoming: Tensor | None = None
        """The hidden states before it; None at the start."""
        self.aside: Any = None
        """What it says beside the hidden states after it, where it has something to say: this process's alone."""

    @property
    def divided(self) -> bool:
        return self.axis is not None and self.axis.size > 1

    @property
    def holds_start(self) -> bool:
        """Has what comes before the blocks."""
        return not self.divided or self.axis.rank == 0

    @property
    def holds_end(self) -> bool:
        """Has the heads."""
        return not self.divided or self.axis.rank == self.axis.size - 1

    @property
    def at_start(self) -> bool:
        """The piece that runs begins with the network's inputs."""
        return not self.divided or (self.holds_start and self.piece == 0)

    @property
    def at_end(self) -> bool:
        """A call of the network returns its prediction, not hidden states."""
        return not self.divided or self.piece is None or (self.holds_end and self.piece == len(self.pieces) - 1)

    def pick(self, blocks: nn.ModuleList) -> Sequence[nn.Module]:
        """Those of the blocks held that run now."""
        if not self.divided:
            return blocks
        return [blocks.get_submodule(str(number)) for number in self.pieces[self.piece]]

    def drop_elsewhere(self, module: nn.Module, at_start: Collection[str], at_end: Collection[str]) -> None:
        """Take away what other processes hold: blocks (`module.blocks`, which keep their numbers in the whole stack as
        names), and the children or parameters named in `at_start` and `at_end`."""
        if not self.divided:
            return
        mine = {str(number) for piece in self.pieces for number in piece}
        for name in [name for name, _ in module.blocks.named_children() if name not in mine]:
            delattr(module.blocks, name)
        gone = [*([] if self.holds_start else at_start), *([] if self.holds_end else at_end)]
        for name in gone:
            if getattr(module, name, None) is not None:
                delattr(module, name)

    def add_up(self, numbers: Sequence[int]) -> list[int]:
        """Sums over the processes of the pipeline. Collective."""
        if not self.divided:
            return list(numbers)
        return self.axis.all_reduce_sum(torch.tensor(numbers, device=self.device)).tolist()

    @contextmanager
    def running(self, piece: int, incoming: Tensor | None) -> Iterator[None]:
        """Networks called in the block run this piece."""
        self.piece, self.incoming = piece, incoming
        try:
            yield
        finally:
            self.piece = self.incoming = self.aside = None

    def through(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """`call(*arguments, **options)` of the whole network; without gradient where it is in pieces. Then collective
        over the axis, whose processes give the same arguments and get the same answer."""
        if not self.divided or self.piece is not None:
            return call(*arguments, **options)
        assert not torch.is_grad_enabled(), "gradients go back through the pieces by a schedule alone"
        axis = self.axis
        before, after = (axis.rank - 1) % axis.size, (axis.rank + 1) % axis.size
        for piece in range(len(self.pieces)):
            first = self.holds_start and piece == 0
            with self.running(piece, None if first else _receive(axis, before, self.device)):
                output, at_end = call(*arguments, **options), self.at_end
            if not at_end:
                _send(axis, output, after)
        return spread(axis, output, axis.size - 1)

    def from_heads(self, compute: Callable[[], T]) -> T:
        """What the process with the heads computes by them; on every process, but while a piece runs."""
        if not self.divided or self.piece is not None:
            return compute()
        return spread(self.axis, compute() if self.holds_end else None, self.axis.size - 1)


ONE_PIECE = Stage()
"""Of a network that is in one piece."""


def _send(axis: Axis, hidden: Tensor, to: int) -> None:
    sizes = torch.tensor([*hidden.shape] + [0] * (NUM_SIZES - hidden.ndim), device=hidden.device)
    axis.send(sizes, to)
    axis.send(_leaving(hidden), to)


def _receive(axis: Axis, source: int, device: torch.device) -> Tensor:
    sizes = axis.receive(torch.empty(NUM_SIZES, dtype=torch.int64, device=device), source)
    return axis.receive(torch.empty([size for size in sizes.tolist() if size], device=device), source)


def _leaving(hidden: Tensor) -> Tensor:
    """Hidden states as they travel."""
    assert hidden.dtype == torch.float32, f"hidden states of {hidden.dtype} would be rounded between two pieces alone"
    hidden = hidden.contiguous()
    return hidden if hidden._base is None else hidden.clone()  # Megatron frees what it has sent, but for its graph


@dataclass(frozen=True)
class _Like:
    """What a tensor is that another process has."""

    shape: torch.Size
    dtype: torch.dtype
    device: str

    @staticmethod
    def of(tensor: Tensor) -> _Like:
        return _Like(tensor.shape, tensor.dtype, tensor.device.type)

    def empty(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


def spread(axis: Axis | None, value: Any, source: int) -> Any:
    """What the process `source` has (tensors in tuples, lists and dictionaries, beside anything that pickles), on every
    process of the axis. What the others pass is ignored. Collective."""
    if axis is None or not axis.grouped:
        return value
    likes = axis.broadcast_object(tree_map_only(Tensor, _Like.of, value) if axis.rank == source else None, source)
    if axis.rank == source:
        tree_map_only(Tensor, lambda tensor: axis.broadcast(tensor.contiguous(), source), value)
        return value
    return tree_map_only(_Like, lambda like: axis.broadcast(like.empty(), source), likes)


class _Beside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor) -> Tensor:
        ctx.of_loss = torch.ones_like(loss)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, ctx.of_loss


def beside(hidden: Tensor, loss: Tensor) -> Tensor:
    """The hidden states after a piece, whose backward pass goes back from a part of the loss (scalar) as well:
    one that this piece knows."""
    return _Beside.apply(hidden, loss)


# -- parameters that every process has -------------------------------------------------------------------------------


def mark_replicated(module: nn.Module, alone: Collection[str]) -> None:
    """Say of every parameter of a module in pieces whether every process has it, `replicated`. Those that are, or lie
    below, what is named in `alone` one process has alone."""
    for name, parameter in module.named_parameters():
        parameter.replicated = not any(f"{name}.".startswith(f"{prefix}.") for prefix in alone)


def sum_replicated_gradients(parameters: Iterable[nn.Parameter], axis: Axis) -> None:
    """Make the gradients of replicated parameters whole, on every process of the pipeline axis the same bits. Call it
    when all other sums of a step are done, with the same parameters in the same order everywhere."""
    reduce_gradients((parameter for parameter in parameters if getattr(parameter, "replicated", False)), axis)


def counts_here(tensor: Tensor, axis: Axis | None) -> bool:
    """Whether this process's copy of a parameter or buffer is the one that counts, in a norm, in a sum of sizes and in
    a checkpoint. A buffer is never marked: every process has those of the objective."""
    replicated = getattr(tensor, "replicated", not isinstance(tensor, nn.Parameter))
    return axis is None or axis.rank == 0 or not replicated


# -- schedules -------------------------------------------------------------------------------------------------------


class Schedule:
    """Megatron-core's order of forward and backward passes for a plan: 1F1B (arXiv 2006.09503) or, where a process has
    several pieces, interleaved (arXiv 2104.04473). All methods are collective over the pipeline axis."""

    def __init__(self, stage: Stage, plan: ParallelConfig, width: int) -> None:
        """`width` is the last dimension of the hidden states."""
        require("megatron-core")
        self.stage, self.context = stage, plan.context
        overlap = plan.overlap and plan.virtual > 1  # 1F1B has nothing to compute meanwhile
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is not installed, and of options that are not used
            from megatron.core.pipeline_parallel import get_forward_backward_func
            from megatron.core.transformer import TransformerConfig

            self._run = get_forward_backward_func()
            self.config = TransformerConfig(
                num_layers=plan.pipeline * plan.virtual,
                num_attention_heads=1,
                hidden_size=width,
                pipeline_model_parallel_size=plan.pipeline,
                virtual_pipeline_model_parallel_size=plan.virtual if plan.virtual > 1 else None,
                pipeline_dtype=torch.float32,
                overlap_p2p_comm=overlap,
                batch_p2p_comm=plan.batched_transfers and not overlap,
                # Gloo sends from the tensor itself while the next piece is computed: it must not be freed.
                deallocate_pipeline_outputs=stage.device.type == "cuda",
                calculate_per_token_loss=True,  # else losses are divided by the number of micro-batches
            )
        self._models = [_Model(self.config, piece) for piece in range(len(stage.pieces))]

    def run(
        self,
        num_micro_batches: int,
        step: Callable[[int], Tensor],
        shape: Sequence[int],
        *,
        forward_only: bool = False,
        more_to_come: Callable[[], AbstractContextManager] | None = None,
    ) -> list[Tensor]:
        """Take all micro-batches through all pieces.

        `step(i)` runs micro-batch i through the piece of `stage` that is running, and returns the hidden states after
        it, float32 of `shape`; at the end a scalar to back-propagate or, `forward_only`, what is to be returned: on the
        process with the heads the list of these, elsewhere [].

        more_to_come: `Engine.more_to_come`. Backward passes of the last micro-batch through a piece are outside of its
        block, all others inside.
        """
        results: list[Tensor] = []
        nothing = torch.zeros((), dtype=torch.int32)

        def forward(numbers: Iterator[int], model: _Model) -> tuple[Tensor, Callable | None]:
            incoming = None if model.incoming is None else model.incoming.view(shape)
            with self.stage.running(model.piece, incoming):
                output, at_end = step(next(numbers)), self.stage.at_end
            if not at_end:
                return _leaving(output.flatten(1, -2)), None  # Megatron's are of three dimensions
            if forward_only:
                results.append(output)
            return output, lambda output: (output, nothing, None)

        self.config.no_sync_func = more_to_come
        self._run(
            forward_step_func=forward,
            data_iterator=[iter(range(num_micro_batches)) for _ in self._models],
            model=self._models,
            num_microbatches=num_micro_batches,
            seq_length=shape[0] * self.context,  # which Megatron would divide
            micro_batch_size=math.prod(shape[1:-1]),
            forward_only=forward_only,
        )
        return results


class _Model(nn.Module):
    """A piece as Megatron's schedules see it."""

    def __init__(self, config: Any, piece: int) -> None:
        from megatron.core.enums import ModelType

        super().__init__()
        self.config, self.model_type = config, ModelType.encoder_or_decoder
        self.piece, self.incoming = piece, None

    def set_input_tensor(self, tensors: list[Tensor | None]) -> None:
        self.incoming = tensors[0]
