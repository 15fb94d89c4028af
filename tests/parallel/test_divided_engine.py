"""Muon, which needs matrices whole, on the engines that cut parameters laid end to end: beside one process."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from deepspeed_bodies import CLIP_NORM, MUON, Trained, moved, poisoned, train, train_in_pieces

from braid.parallel.data_parallel import World
from braid.parallel.divided_engine import Cut, _rounds
from braid.parallel.plan import ParallelConfig

NAMES = ["elf", "mdlm", "ccdd-moedit-1"]
"""What Muon is for; a table, and a head that shares it or not; stacks of matrices."""
PATIENCE_S = 300
ZERO_1, ZERO_2, ZERO_3 = (ParallelConfig(engine="deepspeed", zero=stage) for stage in (1, 2, 3))
MEGATRON = ParallelConfig(engine="megatron")
LAYOUTS = {
    "ZeRO-1": (2, ZERO_1),
    "ZeRO-2": (2, ZERO_2),
    "ZeRO-3": (4, ZERO_3),
    "Megatron": (4, MEGATRON),
    "ZeRO-1, offloaded": (2, replace(ZERO_1, offload="cpu")),
    "ZeRO-3, offloaded": (2, replace(ZERO_3, offload="cpu")),
    "ZeRO-3, tensor 2 with sequence": (4, replace(ZERO_3, tensor=2, sequence=True)),
    "Megatron, tensor 2 with sequence": (4, replace(MEGATRON, tensor=2, sequence=True)),
    "Megatron, no overlap": (2, replace(MEGATRON, overlap=False)),
}
QUICK = ("ZeRO-2", "Megatron")
ENGINES = pytest.mark.parametrize(
    "plan",
    [pytest.param(ZERO_1, marks=pytest.mark.slow), ZERO_3, MEGATRON],
    ids=["ZeRO-1", "ZeRO-3", "Megatron"],
)


@functools.cache
def expected(name: str) -> Trained:
    [trained] = train(World.single(), [name], ParallelConfig(), optimizer=MUON).values()
    assert min(trained.norms) > 2 * CLIP_NORM, "clipping must be at work"
    return trained


def assert_near(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], relative: float) -> None:
    """Relative to the largest value of each tensor."""
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        bound = relative * value.abs().max().item() + 1e-9
        torch.testing.assert_close(found[key], value, rtol=0, atol=bound, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("layout", [pytest.param(x, marks=[] if x in QUICK else pytest.mark.slow) for x in LAYOUTS])
def test_muon_trains_as_on_one_process(ranks, layout: str) -> None:
    """The state after the first step, and norms, weights and averages after the second."""
    number, plan = LAYOUTS[layout]
    for of_rank in ranks(train, number, NAMES, plan, 2, "fp32", 32, MUON, timeout_s=PATIENCE_S):
        for name, found in of_rank.items():
            wanted = expected(name)
            assert found.norms == pytest.approx(wanted.norms, rel=1e-5), name
            assert_near(found.moments[0], wanted.moments[0], 1e-5)
            for kind in ("weights", "average", "averaged", "seen"):
                tensors = getattr(found, kind)
                assert_near({key: tensors[key] for key in getattr(wanted, kind)}, getattr(wanted, kind), 1e-4)


@pytest.mark.parametrize(
    ("number", "plan"),
    [
        (4, replace(ZERO_1, pipeline=2)),  # only the first stage has a table, which is a group of its own
        pytest.param(4, replace(ZERO_1, pipeline=2, virtual=2), marks=pytest.mark.slow),
        pytest.param(4, replace(MEGATRON, pipeline=2), marks=pytest.mark.slow),
        pytest.param(8, replace(MEGATRON, pipeline=2, tensor=2), marks=pytest.mark.slow),
    ],
    ids=["ZeRO-1", "ZeRO-1, interleaved", "Megatron", "Megatron, tensor 2"],
)
def test_muon_in_a_pipeline(ranks, number: int, plan: ParallelConfig) -> None:
    """What every stage has stays the same on all of them, to the bit."""
    names = ["mdlm", "elf"]
    found = ranks(train_in_pieces, number, names, plan, MUON, timeout_s=PATIENCE_S)
    for name, wanted in train_in_pieces(World.single(), names, ParallelConfig(), MUON).items():
        for of_rank in found:
            assert of_rank[name].norms == pytest.approx(wanted.norms, rel=1e-5), name
            assert all(of_rank[name].copies.values()), (name, of_rank[name].copies)
        assert_near(found[0][name].weights, wanted.weights, 1e-4)


@ENGINES
def test_state_of_two_kinds_is_saved_and_loaded(ranks, plan: ParallelConfig) -> None:
    assert all(ranks(moved, 3, "mdlm", plan, 32, MUON, timeout_s=PATIENCE_S))


@pytest.mark.parametrize("plan", [pytest.param(ZERO_1, marks=pytest.mark.slow), MEGATRON], ids=["ZeRO-1", "Megatron"])
def test_a_gradient_that_is_not_finite_changes_nothing(ranks, plan: ParallelConfig) -> None:
    for told, same, then_moved, _ in ranks(poisoned, 2, "mdlm", plan, MUON, timeout_s=PATIENCE_S):
        assert told and same and then_moved


def test_matrices_are_orthogonalised_where_they_lie() -> None:
    """What is whole on one rank stays there; of what all have a part of, each gets as much as the others."""
    weight = torch.nn.Parameter(torch.empty(0))

    def cut(numel: int, *pieces: tuple[int, int, int]) -> Cut:
        return Cut(weight, torch.Size([numel]), pieces, ())

    own = [cut(10, (1, 0, 10)), cut(8, (0, 0, 8)), cut(6, (0, 0, 1), (1, 1, 6))]
    rounds = _rounds(own, 2)
    assert [sorted((at, each.shape.numel()) for at, each in dealt.items()) for dealt in rounds] == [
        [(0, 8), (1, 10)], [(1, 6)],
    ]  # fmt: skip
    shared = [cut(6, (0, 0, 2), (1, 2, 4), (2, 4, 6)) for _ in range(7)]
    assert [sorted(dealt) for dealt in _rounds(shared, 3)] == [[0, 1, 2], [0, 1, 2], [0]]
    assert _rounds([], 3) == []


@pytest.mark.slow
def test_muon_with_its_state_on_a_disk(ranks, asynchronous_io, tmp_path) -> None:
    plan = replace(ZERO_3, offload="nvme", offload_dir=str(tmp_path))
    (wanted,) = train(World.single(), ["mdlm"], ParallelConfig(), 2, "fp32", 256, MUON).values()
    for of_rank in ranks(train, 2, ["mdlm"], plan, 2, "fp32", 256, MUON, timeout_s=PATIENCE_S):
        found = of_rank["mdlm"]
        assert 0 in found.sizes, "nothing was put there"
        assert found.norms == pytest.approx(wanted.norms, rel=1e-5)
        for kind in ("weights", "average", "averaged"):
            tensors = getattr(found, kind)
            assert_near({key: tensors[key] for key in getattr(wanted, kind)}, getattr(wanted, kind), 1e-4)
    assert all(ranks(moved, 2, "mdlm", plan, 256, MUON, timeout_s=PATIENCE_S))
