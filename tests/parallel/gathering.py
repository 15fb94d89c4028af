"""Whole tensors on one process, and parts of them, for tests that compare layouts. A run never gathers its model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from torch import Tensor, nn

from braid.parallel.engine import Part
from braid.parallel.layers import Shard, gather_whole
from braid.parallel.mesh import Axis
from braid.parallel.pipeline import counts_here


def gather_tensors(tensors: dict[str, Tensor], shards: dict[str, Shard], axis: Axis) -> dict[str, Tensor]:
    """Every tensor whole, on every process of the tensor axis; the gathered ones on the CPU. Collective."""
    whole = {}
    for key, tensor in tensors.items():
        shard = _shard(key, tensor, shards)
        whole[key] = tensor if shard is None else gather_whole(tensor, shard, axis).cpu()
    return whole


def cut_tensors(tensors: dict[str, Tensor], shards: dict[str, Shard]) -> dict[str, Tensor]:
    """This process's part of whole tensors."""
    cut = {}
    for key, tensor in tensors.items():
        shard = _shard(key, tensor, shards)
        cut[key] = tensor if shard is None else shard.cut(tensor)
    return cut


def gather_stages(groups: dict[str, dict[str, Tensor]], module: nn.Module, axis: Axis) -> dict[str, dict[str, Tensor]]:
    """The tensors of all processes of the pipeline axis, on the first of them; of what several have, its own.
    Collective, and the others get what they had."""
    if not axis.grouped:
        return groups
    named = itertools.chain(module.named_parameters(), module.named_buffers())
    mine = {name for name, tensor in named if counts_here(tensor, axis)}
    parts = axis.gather_object(
        {
            group: {key: tensor.cpu() for key, tensor in tensors.items() if key.partition("/")[0] in mine}
            for group, tensors in groups.items()
        }
    )
    if axis.rank > 0:
        return groups
    return {group: {key: t for part in parts for key, t in part[group].items()} for group in groups}


def part_of(tensors: Mapping[str, Tensor]) -> Part:
    """As an engine asks for it."""

    def part(key: str, *span: int) -> Tensor:
        return tensors[key].reshape(-1)[slice(*span)] if span else tensors[key]

    return part


def _shard(key: str, tensor: Tensor, shards: dict[str, Shard]) -> Shard | None:
    """How the tensor is divided; an optimizer's step counters are not."""
    return shards.get(key.partition("/")[0]) if tensor.ndim else None
