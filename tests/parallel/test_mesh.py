"""Meshes against groups written down by hand; what the axes say; a world that does not fit; taking a mesh down."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from mesh_bodies import (
    build,
    build_again_and_again,
    reduce_over_the_mesh,
    talk_along_axes,
    virtual_pieces,
    wait_for_a_sleeper,
    without_megatron,
)

from braid.kernels.errors import ConfigError
from braid.parallel.data_parallel import World
from braid.parallel.mesh import Mesh, build_mesh
from braid.parallel.plan import ParallelConfig

PAIR = [[0, 1]]
APART = [[0], [1]]
EIGHT = [[0], [1], [2], [3], [4], [5], [6], [7]]
LAYOUTS = {
    "tensor 2": (
        ParallelConfig(tensor=2),
        dict(tensor=PAIR, context=APART, data=APART, pipeline=APART, reduction=APART, model=PAIR),
    ),
    "context 2": (
        ParallelConfig(context=2),
        dict(tensor=APART, context=PAIR, data=APART, pipeline=APART, reduction=PAIR, model=APART),
    ),
    "pipeline 2": (
        ParallelConfig(pipeline=2),
        dict(tensor=APART, context=APART, data=APART, pipeline=PAIR, reduction=APART, model=PAIR),
    ),
    "data 2, plain": (
        ParallelConfig(),
        dict(tensor=APART, context=APART, data=PAIR, pipeline=APART, reduction=PAIR, model=APART),
    ),
    "data 2, with Megatron's engine": (
        ParallelConfig(engine="megatron"),
        dict(tensor=APART, context=APART, data=PAIR, pipeline=APART, reduction=PAIR, model=APART),
    ),
    "tensor 2, data 2, pipeline 2": (
        ParallelConfig(tensor=2, pipeline=2),
        dict(
            tensor=[[0, 1], [2, 3], [4, 5], [6, 7]],
            context=EIGHT,
            data=[[0, 2], [1, 3], [4, 6], [5, 7]],
            pipeline=[[0, 4], [1, 5], [2, 6], [3, 7]],
            reduction=[[0, 2], [1, 3], [4, 6], [5, 7]],
            model=[[0, 1, 4, 5], [2, 3, 6, 7]],
        ),
    ),
    "tensor 2, context 2, data 2": (
        ParallelConfig(tensor=2, context=2),
        dict(
            tensor=[[0, 1], [2, 3], [4, 5], [6, 7]],
            context=[[0, 2], [1, 3], [4, 6], [5, 7]],
            data=[[0, 4], [1, 5], [2, 6], [3, 7]],
            pipeline=EIGHT,
            reduction=[[0, 2, 4, 6], [1, 3, 5, 7]],
            model=[[0, 1], [2, 3], [4, 5], [6, 7]],
        ),
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rank_order_and_groups(ranks, layout: str) -> None:
    plan, groups = LAYOUTS[layout]
    size = sum(map(len, groups["tensor"]))
    for rank, (axes, is_first, is_last) in enumerate(ranks(build, size, plan)):
        for name, group in groups.items():
            (mine,) = [along for along in group if rank in along]
            assert axes[name] == (mine.index(rank), mine), (rank, name)
        (stages,) = [along for along in groups["pipeline"] if rank in along]
        assert (is_first, is_last) == (rank == stages[0], rank == stages[-1])


def test_one_process_needs_no_group() -> None:
    mesh = Mesh.single("cpu")
    assert mesh.world == World.single("cpu") and mesh.is_first_stage and mesh.is_last_stage and mesh.virtual == 1
    for axis in (mesh.tensor, mesh.context, mesh.data, mesh.pipeline, mesh.reduction, mesh.model):
        assert (axis.rank, axis.size, axis.group) == (0, 1, None)
        assert axis.all_reduce_sum(torch.ones(2)).tolist() == [1.0, 1.0]
    mesh.close()


def test_virtual_pieces_reach_megatron(ranks) -> None:
    assert ranks(virtual_pieces, 2) == [(3, 3, 2)] * 2


def test_collectives_along_axes(ranks) -> None:
    """Four ranks as tensor 2 x data 2: ranks 0 and 1 are one tensor axis, 0 and 2 one data axis."""
    for rank, found in enumerate(ranks(talk_along_axes, 4)):
        beside, across = rank ^ 1, rank ^ 2
        own = [10.0 * rank, 1.0]
        sums = [[[10.0 * (rank + other), 2.0]] for other in (beside, across)]
        assert found["sums"] == [*sums, [own]]
        assert found["broadcast"] == [[[10.0 * (rank | 1), 1.0]], [[10.0 * (rank | 2), 1.0]]]
        rows = [[[10.0 * r, 1.0] for r in sorted((rank, other))] for other in (beside, across)]
        assert found["gathered"] == [rows[0], [sum(rows[0], [])], rows[1], [sum(rows[1], [])]]
        first, second = sorted((rank, beside))
        assert found["odd"] == [[100 * r + n for r in (first, second) for n in (i, i + 3)] for i in range(3)]
        low, high = (10 * r for r in sorted((rank, across)))
        joined = [high, high, low + 2, low + 2, low + 2, high + 5]
        there = [joined, None] if rank < across else [None, joined]
        assert found["joined"] == [*there, joined, [10 * rank + start for start in (0, 0, 2, 2, 2, 5)]]
        of_low, of_high, alone = ([n + m for n in range(6)] for m in (low, high, 10 * rank))
        mine = slice(2, 5) if rank < across else None
        expected = [[whole[mine]] if mine else [whole[:2], whole[5:]] for whole in (of_low, of_high)]
        assert found["cut"] == [*expected, [alone[:2], alone[2:5], alone[5:]]]
        assert found["alone"] == [own, own] and found["own"] == [own], "what is gathered or copied is left as it was"


def test_gradients_are_reduced_over_data_and_context(ranks) -> None:
    """Eight ranks as tensor 2 x context 2 x data 2: the even ones hold the same weights, and the odd ones."""
    even, odd = [4.0, 1.0 + 1e2 + 1e4 + 1e6], [4.0, 1e1 + 1e3 + 1e5 + 1e7]
    assert ranks(reduce_over_the_mesh, 8) == [even, odd] * 4


def test_a_mesh_can_be_taken_down_and_another_built(ranks) -> None:
    plans = [ParallelConfig(tensor=2), ParallelConfig(), ParallelConfig(pipeline=2), ParallelConfig(engine="deepspeed")]
    for rank, (tensor, plain, pipeline, deepspeed) in enumerate(ranks(build_again_and_again, 2, plans)):
        assert tensor["tensor"] == plain["data"] == pipeline["pipeline"] == deepspeed["reduction"] == (rank, [0, 1])
        assert plain == deepspeed and pipeline["tensor"] == (0, [rank])


def test_a_missing_neighbour_is_an_error_that_names_the_axis(ranks) -> None:
    text, _ = ranks(wait_for_a_sleeper, 2, lost={1})
    assert text.startswith("a sum over the 2 ranks of the tensor axis did not complete") and "at position 0" in text


def test_data_parallelism_needs_no_megatron(ranks) -> None:
    for rank, found in enumerate(ranks(without_megatron, 2, ParallelConfig())):
        assert found["data"] == found["reduction"] == (rank, [0, 1])


def test_without_megatron_other_axes_name_the_extra(ranks) -> None:
    what, change = ranks(without_megatron, 2, ParallelConfig(tensor=2))[0]
    assert "megatron-core is needed here, but it is not installed" in what
    assert change == "pip install 'braid-lm[megatron]'"


def test_building_a_plain_mesh_imports_no_megatron() -> None:
    code = (
        "import sys\nfrom braid.parallel.mesh import Mesh\nMesh.single()\n"
        "heavy = [name for name in sys.modules if name.startswith(('megatron', 'deepspeed'))]\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_world_that_does_not_divide_is_refused_with_the_arithmetic() -> None:
    world = World(rank=0, size=6, local_rank=0, device=torch.device("cpu"), grouped=True)
    with pytest.raises(ConfigError) as caught:
        build_mesh(world, ParallelConfig(tensor=2, pipeline=2))
    assert caught.value.found == "6 processes; 2 x 1 x 2 = 4"
    assert "a multiple of 4 processes" in caught.value.change


def test_an_engine_needs_a_process_group() -> None:
    with pytest.raises(ConfigError, match="parallel.engine=deepspeed needs a process group") as caught:
        build_mesh(World.single(), ParallelConfig(engine="deepspeed"))
    assert "torchrun" in caught.value.change


def test_the_cpu_of_a_machine_with_gpus_is_refused(monkeypatch) -> None:
    """Megatron-core asks torch for the current GPU wherever there is one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    world = World(rank=0, size=2, local_rank=0, device=torch.device("cpu"), grouped=True)
    with pytest.raises(ConfigError, match="on the GPU, and the run is on the CPU") as caught:
        build_mesh(world, ParallelConfig(tensor=2))
    assert "CUDA_VISIBLE_DEVICES=" in caught.value.change
