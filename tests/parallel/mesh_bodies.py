"""What runs on the ranks of test_mesh.py and test_mpu.py."""

from __future__ import annotations

import sys
import time
from dataclasses import fields

import pytest
import torch
import torch.distributed as dist
from megatron_bodies import CLIPPED_TO, EPSILON, LEARNING_RATE, ShardedNetwork, batch, gather

from braid.kernels.errors import BraidError, TrainingFailed
from braid.parallel.data_parallel import World, reduce_gradients
from braid.parallel.mesh import Axis, Mesh, build_mesh
from braid.parallel.mpu import join_deepspeed
from braid.parallel.plan import ParallelConfig


def describe(mesh: Mesh) -> dict[str, tuple[int, list[int]]]:
    """Of every axis: the position on it, and the ranks along it in order."""
    axes = [getattr(mesh, field.name) for field in fields(mesh) if isinstance(getattr(mesh, field.name), Axis)]
    assert all((axis.size == 1) == (axis.group is None) == (not axis.grouped) for axis in axes)
    described = {}
    for axis in axes:
        ranks = dist.get_process_group_ranks(axis.group) if axis.group else [mesh.world.rank]
        assert len(ranks) == axis.size and ranks[axis.rank] == mesh.world.rank
        described[axis.name] = (axis.rank, ranks)
    return described


def build(world: World, plan: ParallelConfig) -> tuple[dict, bool, bool]:
    mesh = build_mesh(world, plan)
    return describe(mesh), mesh.is_first_stage, mesh.is_last_stage


def build_again_and_again(world: World, plans: list[ParallelConfig]) -> list[dict]:
    """One mesh after the other; between them, no group but the world's is left."""
    described = []
    for plan in plans:
        mesh = build_mesh(world, plan)
        described.append(describe(mesh))
        assert mesh.reduction.all_reduce_sum(torch.ones(1)).item() == mesh.reduction.size
        mesh.close()
        mesh.close()
        assert list(dist.distributed_c10d._world.pg_map) == [dist.group.WORLD]
    return described


def virtual_pieces(world: World) -> tuple[int, int, int]:
    mesh = build_mesh(world, ParallelConfig(pipeline=2, virtual=3))
    from megatron.core import parallel_state

    return mesh.virtual, parallel_state.get_virtual_pipeline_model_parallel_world_size(), mesh.pipeline.size


def without_megatron(world: World, plan: ParallelConfig) -> dict | tuple[str, str]:
    """The axes where Megatron-core cannot be imported, or what is said about that."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "megatron"]:
        del sys.modules[name]
    sys.modules["megatron"] = None  # what Python keeps of a module that must not be imported
    try:
        return describe(build_mesh(world, plan))
    except BraidError as error:
        return error.what, error.change


def talk_along_axes(world: World) -> dict[str, list]:
    """Collectives on tensor 2 x data 2, each rank with numbers of its own."""
    mesh = build_mesh(world, ParallelConfig(tensor=2))
    own = torch.tensor([[10.0 * world.rank, 1.0]])
    odd = torch.arange(6).view(2, 3).T + 100 * world.rank  # not contiguous
    return {
        "sums": [axis.all_reduce_sum(own.clone()).tolist() for axis in (mesh.tensor, mesh.data, mesh.context)],
        "broadcast": [axis.broadcast(own.clone(), 1).tolist() for axis in (mesh.tensor, mesh.data)],
        "gathered": [axis.all_gather(own, dim).tolist() for axis in (mesh.tensor, mesh.data) for dim in (0, 1)],
        "odd": mesh.tensor.all_gather(odd, -1).tolist(),
        "joined": [_joined(mesh.data, world.rank, to) for to in (0, 1, None)] + [_joined(mesh.context, world.rank, 0)],
        "cut": [_cut(axis, world.rank, source) for axis, source in ((mesh.data, 0), (mesh.data, 1), (mesh.context, 0))],
        "alone": mesh.context.all_gather(own, 0).tolist() + mesh.context.broadcast(own).tolist(),
        "own": own.tolist(),
    }


def _joined(axis: Axis, rank: int, to: int | None) -> list | None:
    pieces = _pieces(axis)
    own = [torch.full((stop - start,), 10 * rank + start) for at, start, stop in pieces if at == axis.rank]
    whole = axis.join(pieces, own, torch.int64, torch.device("cpu"), to)
    return None if whole is None else whole.tolist()


def _cut(axis: Axis, rank: int, source: int) -> list[list]:
    own = [torch.full((stop - start,), -1) for at, start, stop in _pieces(axis) if at == axis.rank]
    whole = 10 * rank + torch.arange(6) if axis.rank == source else None
    axis.cut(_pieces(axis), own, whole, torch.device("cpu"), source)
    return [piece.tolist() for piece in own]


def _pieces(axis: Axis) -> list[tuple[int, int, int]]:
    """Of lengths 2, 3 and 1, that lie with the last position, the first and the last."""
    return [(axis.size - 1, 0, 2), (0, 2, 5), (axis.size - 1, 5, 6)]


def reduce_over_the_mesh(world: World) -> list[float]:
    """Gradients are summed over data x context, not over the tensor axis."""
    mesh = build_mesh(world, ParallelConfig(tensor=2, context=2))
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([1.0, 10.0**world.rank])
    reduce_gradients([weight], mesh.reduction)
    return weight.grad.tolist()


def wait_for_a_sleeper(world: World) -> str:
    mesh = build_mesh(world, ParallelConfig(tensor=2), timeout_s=2)
    if mesh.tensor.rank == 1:
        time.sleep(60)
    with pytest.raises(TrainingFailed) as caught:
        mesh.tensor.all_reduce_sum(torch.ones(1))
    mesh.close()
    return str(caught.value)


def ask_mpu(world: World, plan: ParallelConfig) -> dict[str, object]:
    """What each method of the mpu answers, with ranks for groups."""
    mpu = join_deepspeed(build_mesh(world, plan))
    answers = {name: getattr(mpu, name)() for name in dir(mpu) if name.startswith("get_")}
    return {
        name: dist.get_process_group_ranks(answer) if isinstance(answer, dist.ProcessGroup) else answer
        for name, answer in answers.items()
    }


def train_with_deepspeed(world: World, plan: ParallelConfig, num_steps: int) -> tuple[list[float], dict]:
    """Steps of ZeRO on this rank's part of each batch: gradient norms, whole weights."""
    import deepspeed

    mesh = build_mesh(world, plan)
    mpu = join_deepspeed(mesh)
    assert deepspeed.comm.comm.cdb.shm_comm_op is None, "nothing was compiled"
    network = ShardedNetwork(mesh, sequence=False)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": CLIPPED_TO,
        "zero_optimization": {"stage": plan.zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, eps=EPSILON, weight_decay=0.0)
    engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=settings, mpu=mpu)
    norms = []
    for step in range(num_steps):
        tokens, targets = batch(2 * step + mesh.data.rank)
        engine.backward(network.losses(engine(tokens), targets).mean())
        engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    parameters = dict(network.named_parameters())
    whole = {name: parameter.detach() for name, parameter in parameters.items()}
    return norms, whole | gather(mesh, parameters)
