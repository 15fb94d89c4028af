"""What DeepSpeed has to know of the mesh, and how it joins the processes that are already there."""

from __future__ import annotations

import logging
import os

import torch.distributed as dist

from braid.kernels.capabilities import require
from braid.parallel.mesh import Mesh


class Mpu:
    """Megatron-core's parallel state under the names DeepSpeed asks its `mpu` for.

    get_AXIS_group, get_AXIS_rank and get_AXIS_world_size for each axis below, and the two methods at the end.
    DeepSpeed's data axis is the mesh's `reduction`. An axis of one process has a group here.
    """

    def __init__(self) -> None:
        self._state = state = require("megatron-core").parallel_state
        groups = {
            "model_parallel": state.get_model_parallel_group(),
            "tensor_model_parallel": state.get_tensor_model_parallel_group(),
            "pipeline_model_parallel": state.get_pipeline_model_parallel_group(),
            "data_parallel": state.get_data_parallel_group(with_context_parallel=True),
        }
        for axis, group in groups.items():
            setattr(self, f"get_{axis}_group", lambda group=group: group)
            setattr(self, f"get_{axis}_rank", group.rank)
            setattr(self, f"get_{axis}_world_size", group.size)

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._state.get_data_parallel_group(with_context_parallel=True))

    def get_tensor_model_parallel_src_rank(self) -> int:
        return self._state.get_tensor_model_parallel_src_rank()


def join_deepspeed(mesh: Mesh) -> Mpu:
    """Let DeepSpeed use the mesh's process groups; returns the `mpu` for `deepspeed.initialize`. Collective.

    Raises BraidError where DeepSpeed is not installed.
    """
    on_cpu = mesh.world.device.type == "cpu"
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = require("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it reports dozens of lines on stdout
    if on_cpu:
        # It would compile an all-reduce through shared memory that training never calls: 20 s, and it needs ninja.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(verbose=False)
    return Mpu()
