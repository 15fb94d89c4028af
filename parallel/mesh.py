"""The mesh: where this process stands on the axes tensor, context, data and pipeline, and who is beside it on each.

Ranks count along the tensor axis first, then context, data and pipeline:

    rank = tensor + T * (context + C * (data + D * pipeline))

so that those who talk most sit next to each other. Process groups are Megatron-core's, because its layers and schedules
look them up in its global state; pure data parallelism needs neither them nor Megatron.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from braid.kernels.capabilities import require
from braid.kernels.errors import ConfigError, TrainingFailed
from braid.parallel import megatron_cpu
from braid.parallel.data_parallel import TIMEOUT_S, World
from braid.parallel.plan import ParallelConfig

T = TypeVar("T")


@dataclass(frozen=True)
class Axis:
    """This process among its neighbours along one axis. Every method is collective: all of them call it, in one order.

    On an axis of one process nothing is sent. A neighbour that died or did not come raises TrainingFailed.
    """

    name: str
    rank: int
    """Position along the axis, from 0."""
    size: int
    group: dist.ProcessGroup | None
    """None when the size is 1."""

    @property
    def grouped(self) -> bool:
        """There is somebody to talk to."""
        return self.group is not None

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum along the axis, in place, of a tensor of one shape and type everywhere; returns it."""
        if self.grouped:
            with self._named("sum"):
                dist.all_reduce(tensor, group=self.group)
        return tensor

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Overwrite `tensor` with that of position `source`, of the same shape and type; returns it."""
        if self.grouped:
            with self._named("broadcast"):
                dist.broadcast(tensor, group=self.group, group_src=source)
        return tensor

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        """The tensors of all positions, of one shape and type, laid end to end along `dim`. Not differentiable."""
        if not self.grouped:
            return tensor
        pieces = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        with self._named("gather"):
            dist.all_gather(pieces, tensor.contiguous(), group=self.group)
        return torch.cat(pieces, dim)

    def all_to_all(self, tensor: Tensor) -> Tensor:
        """Piece i of this process, along dimension 0, goes to position i; what comes out is laid out by where it came
        from. Done twice, everything is back. Not differentiable."""
        if not self.grouped:
            return tensor
        tensor = tensor.contiguous()
        received = torch.empty_like(tensor)
        with self._named("all-to-all"):
            dist.all_to_all_single(received, tensor, group=self.group)
        return received

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        """Of the sum along the axis this process's piece of dimension 0. Not differentiable."""
        if not self.grouped:
            return tensor
        tensor = tensor.contiguous()
        piece = tensor.new_empty(len(tensor) // self.size, *tensor.shape[1:])
        with self._named("sum"):
            dist.reduce_scatter_tensor(piece, tensor, group=self.group)
        return piece

    def send(self, tensor: Tensor, to: int) -> None:
        """Give a contiguous tensor to the position `to`, which receives it."""
        with self._named("transfer"):
            dist.send(tensor, group=self.group, group_dst=to)

    def receive(self, tensor: Tensor, source: int) -> Tensor:
        """Overwrite `tensor` with what the position `source` sends, of the same shape and type; returns it."""
        with self._named("transfer"):
            dist.recv(tensor, group=self.group, group_src=source)
        return tensor

    @torch.no_grad()
    def join(
        self,
        pieces: Sequence[tuple[int, int, int]],
        own: Iterable[Tensor],
        dtype: torch.dtype,
        device: torch.device,
        to: int | None = None,
    ) -> Tensor | None:
        """A flat tensor out of pieces that lie with several positions: whole on position `to` and None elsewhere, or
        whole everywhere for None. What moves is what `to` does not have.

        Args:
            pieces: (position, start, stop) of each, which together cover the tensor once.
            own: those of this process, in their order.
            device: of the result; a piece of `own` may lie elsewhere.
        """
        here, own, transfers = to is None or to == self.rank, iter(own), []
        whole = torch.empty(sum(stop - start for _, start, stop in pieces) if here else 0, dtype=dtype, device=device)
        for source, start, stop in pieces:
            piece = whole[start:stop]
            if source == self.rank:
                piece = piece.copy_(next(own)) if here else next(own).detach().to(device)
            if to is None:
                self.broadcast(piece, source)
            elif self.rank == source != to:
                transfers.append(dist.P2POp(dist.isend, piece, group=self.group, group_peer=to))
            elif self.rank == to != source:
                transfers.append(dist.P2POp(dist.irecv, piece, group=self.group, group_peer=source))
        with self._named("transfer"):
            for transfer in dist.batch_isend_irecv(transfers) if transfers else ():
                transfer.wait()
        return whole if here else None

    @torch.no_grad()
    def cut(
        self,
        pieces: Sequence[tuple[int, int, int]],
        own: Iterable[Tensor],
        whole: Tensor | None,
        device: torch.device,
        source: int,
    ) -> None:
        """Inverse of `join`: overwrite the pieces of all positions with those of the flat tensor `whole`, which the
        position `source` has; the others pass None. It travels on `device`."""
        own, arriving, transfers = iter(own), [], []
        for holder, start, stop in pieces:
            if holder == self.rank == source:
                next(own).copy_(whole[start:stop])
            elif holder == self.rank:
                piece = next(own)
                arriving.append((piece, torch.empty_like(piece, device=device)))
                transfers.append(dist.P2POp(dist.irecv, arriving[-1][1], group=self.group, group_peer=source))
            elif self.rank == source:
                transfers.append(dist.P2POp(dist.isend, whole[start:stop], group=self.group, group_peer=holder))
        with self._named("transfer"):
            for transfer in dist.batch_isend_irecv(transfers) if transfers else ():
                transfer.wait()
        for piece, arrived in arriving:
            piece.copy_(arrived)

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """The value of position `source` (anything that pickles) everywhere; what the others pass is ignored."""
        if not self.grouped:
            return value
        box = [value]
        with self._named("broadcast"):
            dist.broadcast_object_list(box, group=self.group, group_src=source, device=torch.device("cpu"))
        return box[0]

    def all_gather_object(self, value: T) -> list[T]:
        """The values of all positions (anything that pickles), in their order."""
        if not self.grouped:
            return [value]
        values: list[Any] = [None] * self.size
        with self._named("gather"):
            dist.all_gather_object(values, value, group=self.group)
        return values

    def gather_object(self, value: T) -> list[T]:
        """The same on position 0; [] elsewhere."""
        values: list[Any] = [None] * self.size if self.rank == 0 else []
        with self._named("gather"):
            dist.gather_object(value, values or None, group=self.group, group_dst=0)
        return values

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Turn the backend's complaint about a neighbour into an error that says which rank met it, on which axis."""
        try:
            yield
        except RuntimeError as error:  # all that gloo and NCCL raise
            raise TrainingFailed(
                f"a {what} over the {self.size} ranks of the {self.name} axis did not complete: "
                "another rank died or is stuck",
                found=f"at position {self.rank}: {str(error).splitlines()[0]}",
                change="look at the logs of the other ranks for the first failure",
            ) from error


@dataclass(frozen=True)
class Mesh:
    """All axes of this process."""

    world: World
    tensor: Axis
    """Shares every layer."""
    context: Axis
    """Shares every sequence."""
    data: Axis
    """Shares the global batch: its rank and size are the loader's."""
    pipeline: Axis
    """Shares the stack of blocks."""
    reduction: Axis
    """Data x context: the ranks with the same weights, over which losses and gradients are summed."""
    model: Axis
    """Tensor x pipeline: the ranks that hold one whole set of weights."""
    virtual: int
    """Pieces of each pipeline stage; above 1, the interleaved schedule."""
    megatron: bool
    """Megatron-core's parallel state holds these axes."""

    @staticmethod
    def single(device: torch.device | str = "cpu") -> Mesh:
        """One process on its own."""
        return build_mesh(World.single(device), ParallelConfig())

    @property
    def is_first_stage(self) -> bool:
        """Holds the embedding, with `virtual` pieces in the first of them."""
        return self.pipeline.rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Holds the head, with `virtual` pieces in the last of them."""
        return self.pipeline.rank == self.pipeline.size - 1

    def close(self) -> None:
        """Leave the axes, after which another mesh can be built. Safe after a failed collective, and twice."""
        if self.megatron:
            _leave_megatron()


def build_mesh(world: World, plan: ParallelConfig, timeout_s: float = TIMEOUT_S) -> Mesh:
    """Lay the ranks of `world` out as `plan` says; the data axis takes what the other axes leave. Collective.

    timeout_s: patience of every collective of an axis; World has its own.

    Raises:
        ConfigError: the ranks do not divide; there is no process group where Megatron-core needs one; the run is on the
            CPU of a machine whose GPUs Megatron-core would use; or its version is not supported on the CPU.
        BraidError: Megatron-core is needed and not installed.
    """
    shards = plan.tensor * plan.context * plan.pipeline
    if world.size % shards:
        raise ConfigError(
            "the number of processes is no multiple of tensor x context x pipeline",
            found=f"{world.size} processes; {plan.tensor} x {plan.context} x {plan.pipeline} = {shards}",
            change=f"start a multiple of {shards} processes, or change parallel.tensor, .context or .pipeline",
        )
    if shards == 1 and plan.engine == "plain":
        alone = {name: Axis(name, 0, 1, None) for name in ("tensor", "context", "pipeline", "model")}
        group = dist.group.WORLD if world.size > 1 else None
        shared = {name: Axis(name, world.rank, world.size, group) for name in ("data", "reduction")}
        return Mesh(world=world, **alone, **shared, virtual=plan.virtual, megatron=False)
    return Mesh(world=world, **_join_megatron(world, plan, timeout_s), virtual=plan.virtual, megatron=True)


def _join_megatron(world: World, plan: ParallelConfig, timeout_s: float) -> dict[str, Axis]:
    """Set up Megatron-core's parallel state; the axes by name."""
    if not world.grouped:
        raise ConfigError(
            f"parallel.engine={plan.engine} needs a process group, for one process too",
            change="start with torchrun --nproc-per-node 1, or choose parallel.engine=plain",
        )
    if world.device.type == "cpu" and torch.cuda.is_available():
        raise ConfigError(
            "Megatron-core would put its tensors on the GPU, and the run is on the CPU",
            found=f"run.device={world.device}, {torch.cuda.device_count()} GPUs",
            change="choose run.device=cuda, or hide the GPUs: export CUDA_VISIBLE_DEVICES=",
        )
    megatron_cpu.install()
    # Megatron and DeepSpeed call collectives by their old names, and torch says so at every call.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # Megatron warns of what is not installed, and of options that are not used.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    state = require("megatron-core").parallel_state
    state.initialize_model_parallel(
        tensor_model_parallel_size=plan.tensor,
        context_parallel_size=plan.context,
        pipeline_model_parallel_size=plan.pipeline,
        virtual_pipeline_model_parallel_size=plan.virtual if plan.virtual > 1 else None,
        distributed_timeout_minutes=timeout_s / 60,
        order="tp-cp-ep-dp-pp",
    )
    groups = {
        "tensor": state.get_tensor_model_parallel_group(),
        "context": state.get_context_parallel_group(),
        "data": state.get_data_parallel_group(),
        "pipeline": state.get_pipeline_model_parallel_group(),
        "reduction": state.get_data_parallel_group(with_context_parallel=True),
        "model": state.get_model_parallel_group(),
    }
    return {
        name: Axis(name, group.rank(), group.size(), group if group.size() > 1 else None)
        for name, group in groups.items()
    }


def _leave_megatron() -> None:
    """Undo `_join_megatron`. Megatron forgets most of its groups without ending them."""
    state = require("megatron-core").parallel_state
    if dist.is_initialized():
        for group in state._global_process_group_list or []:
            if group is not None:  # the world's
                dist.destroy_process_group(group)
    state.destroy_model_parallel()
