"""Which part of a checkpoint's tensors a process has, and which it writes.

A checkpoint is of whole tensors, by the names of one process; those of the optimizer go by `<parameter name>/<state
name>`. A process holds some of them, and of a parameter that the tensor axis divides a part (parallel/layers.Shard).
Each is written once:

    of the pipeline stages that have a name, the lowest writes it (a table shared by embedding and head lies on two);
    what the tensor axis has whole on every rank, its rank 0 writes;
    the ranks of the reduction axis, which have the same part of the model or pieces of it, share it: each writes about
    as many bytes, in tensors that are not cut further.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from braid.parallel.layers import Shard, whole_shape
from braid.parallel.mesh import Axis, Mesh

from .pieces import LocalTensor, local_tensor


@dataclass(frozen=True)
class Layout:
    """Of one process. Keys are names, or a name and what comes behind a slash."""

    shapes: dict[str, torch.Size]
    """Of the whole tensors of the whole model, by name: the state dict as one process has it."""
    shards: dict[str, Shard]
    """Of the parameters here that are divided."""
    here: frozenset[str]
    """Names that this process has."""
    owned: frozenset[str]
    """Names that this process and those of its reduction axis write, or their part of them."""
    first: bool
    """Of the ranks of the tensor axis, it is one that writes what all of them have."""
    writes_the_rest: bool
    """It is one of those that write what belongs to no stage."""
    reduction: Axis
    """Of the ranks that share what is to be written."""

    def shard(self, key: str, num_dims: int) -> Shard | None:
        """How a tensor is divided; an optimizer's step counters are not."""
        return self.shards.get(_name(key)) if num_dims else None

    def writes(self, key: str, num_dims: int) -> bool:
        """Whether one of the reduction axis writes what they have of it."""
        return _name(key) in self.owned and (self.first or self.shard(key, num_dims) is not None)

    def local(self, key: str, held: Tensor) -> LocalTensor:
        """A tensor that this process has, as it is written."""
        return local_tensor(held, self.shard(key, held.ndim))

    def share(self, groups: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, int]]:
        """Group -> key -> the position on the reduction axis that writes it: the largest first, each to whoever has
        least yet. The same on all positions, which have the same tensors (be it on the device `meta`)."""
        named = [(group, key, held) for group, tensors in groups.items() for key, held in tensors.items()]
        loads = [(0, position) for position in range(self.reduction.size)]
        writers: dict[str, dict[str, int]] = {group: {} for group in groups}
        for group, key, held in sorted(named, key=lambda each: -each[2].nbytes):
            load, writers[group][key] = loads[0]
            heapq.heapreplace(loads, (load + held.nbytes, writers[group][key]))
        return writers

    def has(self, key: str) -> bool:
        return _name(key) in self.here


def build_layout(module: nn.Module, mesh: Mesh) -> Layout:
    """The layout of a module whose parameters say in `shard` what they are of the whole. Collective over all ranks."""
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    shapes |= {name: whole_shape(parameter) for name, parameter in module.named_parameters()}
    by_rank = mesh.world.all_gather_object((mesh.pipeline.rank, shapes)) if mesh.pipeline.size > 1 else []
    lower = {name for stage, others in by_rank if stage < mesh.pipeline.rank for name in others}
    everywhere = shapes.copy()
    for _, others in by_rank:
        everywhere |= others
    return Layout(
        shapes=everywhere,
        shards=shards_of(module),
        here=frozenset(shapes),
        owned=frozenset(shapes.keys() - lower),
        first=mesh.tensor.rank == 0,
        writes_the_rest=mesh.tensor.rank == 0 and mesh.is_first_stage,
        reduction=mesh.reduction,
    )


def shards_of(module: nn.Module) -> dict[str, Shard]:
    """Name -> which part this process holds, of every parameter that is divided."""
    named = ((name, getattr(parameter, "shard", None)) for name, parameter in module.named_parameters())
    return {name: shard for name, shard in named if shard is not None}


def _name(key: str) -> str:
    """Of the parameter a key is about."""
    return key.partition("/")[0]
