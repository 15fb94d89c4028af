"""What runs on the ranks of test_megatron_engine.py, beside the training of engine_bodies.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from engine_bodies import CLIPPED_TO, OPTIMIZER, engine_around, engine_for, losses, row, total, whole
from gathering import gather_stages, part_of
from pipeline_bodies import build_piece
from tensor_cases import BATCH, MODEL, batch_and_noise, build
from torch import Tensor, nn

from braid.parallel.data_parallel import World
from braid.parallel.engine import Engine, NotFinite, PlainEngine
from braid.parallel.megatron_engine import MegatronEngine
from braid.parallel.mesh import Mesh, build_mesh
from braid.parallel.pipeline import Schedule
from braid.parallel.plan import ParallelConfig
from braid.pretrain.training.gradients import Gradients
from braid.pretrain.training.optimizer import build_optimizer, set_learning_rate
from braid.pretrain.training.precision import cast_by_autocast

MEGATRON = ParallelConfig(engine="megatron")
BUCKET = 500


def one_step(engine: Engine, mesh: Mesh) -> None:
    for loss, last in losses(engine.module, mesh, "fp32"):
        engine.backward(loss, last=last)
    engine.step(1.0)


def copies(named: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in named}


def round_trip(world: World, precision: str) -> list[int]:
    """Weights of several shapes in and out of an engine, on any number of ranks; elements held by each."""
    mesh = build_mesh(world, MEGATRON)
    objective = build("elf")
    before = copies(objective.named_parameters())
    half = cast_by_autocast(objective) if precision == "bf16" else ()
    engine = MegatronEngine(objective, build_optimizer(objective, OPTIMIZER), mesh, half=half, bucket_size=BUCKET)
    assert {p.dtype for p in objective.parameters()} == {torch.float32} | ({torch.bfloat16} if half else set())

    def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
        assert list(found) == list(wanted) == engine.names
        for name, value in wanted.items():
            assert found[name].dtype == torch.float32
            assert torch.equal(found[name].view(torch.int32), value.view(torch.int32)), name  # -0.0 is not 0.0

    same(copies(engine.named(engine.held)), before)
    others = {name: torch.randn_like(value).mul_(1e-3) for name, value in before.items()}
    for value in others.values():
        mesh.reduction.broadcast(value)
        value.view(-1)[::3] = -0.0
    like = [torch.full_like(tensor, float("nan")) for tensor in engine.held]
    engine.fill(like, part_of(others))
    same(copies(engine.named(like)), others)
    same(copies(engine.named(engine.held)), before)  # it is where it was
    to = {name: number % world.size for number, name in enumerate(engine.names[1:])}  # the first goes nowhere
    given = copies(engine.named(like, to))
    assert given.keys() == {name for name, position in to.items() if position == world.rank}
    assert all(torch.equal(value, others[name]) for name, value in given.items())
    with engine.writing() as held:
        engine.fill(held, part_of(others))
    for name, value in objective.named_parameters():
        assert torch.equal(value, others[name].to(value.dtype)), name
    return [sum(tensor.numel() for tensor in engine.held), sum(value.numel() for value in before.values())]


def not_finite(world: World, overlap: bool) -> None:
    """One NaN on one rank: nothing changes anywhere, and the next step is as if it had not been."""
    mesh = build_mesh(world, MEGATRON)
    plan = ParallelConfig(engine="megatron", overlap=overlap)
    engine, other = (engine_for("mdlm", mesh, plan, "fp32", BUCKET) for _ in range(2))
    one_step(engine, mesh)
    one_step(other, mesh)
    before = copies(engine.named(engine.held)) | copies(engine.optimizer_state())
    for loss, last in losses(engine.module, mesh, "fp32"):
        engine.backward(loss * (float("nan") if last and world.rank == 1 else 1.0), last=last)
    with pytest.raises(NotFinite):
        engine.step(1.0)
    after = copies(engine.named(engine.held)) | copies(engine.optimizer_state())
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    one_step(engine, mesh)
    one_step(other, mesh)
    found, wanted = (copies(each.named(each.held)) for each in (engine, other))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert total(engine.module, mesh, "fp32") == total(other.module, mesh, "fp32")


class Branches(nn.Module):
    """Layers that a pass uses or not, in any order, once or several times."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict({name: nn.Linear(16, 16) for name in "abcdef"})
        self.never = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor, path: str) -> Tensor:
        for name in path:
            x = torch.tanh(self.layers[name](x))
        return x.square().sum()


PATHS = [
    [["abc", "abcdef"], ["cba", "fedcba"]],
    [["aa", "b"], ["bcb", "e"]],
    [["abcdef", "f"], ["abcdef", "aadd"]],
    [["fedcba", "c"], ["ffff", "abcdef"]],
]
"""[step][rank][micro-batch]: what is used is another in every pass, in the first step and in the last micro-batches."""


def branches(engine: Engine, mesh: Mesh, ranks: range) -> dict[str, Tensor]:
    """Weights after a step for each of PATHS, of the passes of some ranks."""
    begun = []
    for step, paths in enumerate(PATHS):
        passes = [(rank, index, path) for rank in ranks for index, path in enumerate(paths[rank])]
        for rank, index, path in passes:
            draw = torch.Generator().manual_seed(100 * step + 10 * rank + index)
            last = (rank, index, path) == passes[-1]
            engine.backward(engine.module(torch.randn(3, 16, generator=draw), path), last=last)
            begun += [(last, engine._begun)] if isinstance(engine, MegatronEngine) else []
        engine.step(0.5)
    if begun and engine.overlap:
        assert not any(count for last, count in begun if not last), "before the gradients are complete"
        assert max(count for _, count in begun) > 5, "a pass through all layers fills all buckets but one"
    return copies(engine.named(engine.held)) | copies(engine.optimizer_state())


def adamw(module: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(module.parameters(), lr=1e-2, eps=1e-4, weight_decay=0.1)


def train_branches(world: World, overlap: bool) -> dict[str, Tensor]:
    mesh, module = build_mesh(world, MEGATRON), Branches()
    engine = MegatronEngine(module, adamw(module), mesh, overlap=overlap, bucket_size=1)
    return branches(engine, mesh, range(world.rank, world.rank + 1))


def train_branches_plainly() -> dict[str, Tensor]:
    module = Branches()
    return branches(PlainEngine(module, adamw(module), Mesh.single()), Mesh.single(), range(2))


class Late:
    """A bucket whose weights are not numbers until somebody waits for them."""

    def __init__(self, bucket: Any) -> None:
        bucket.param_gather_handle.wait()
        (self.bucket,) = bucket.buckets
        self.weights = self.bucket.param_data.clone()
        self.bucket.param_data.fill_(float("nan"))
        bucket.param_gather_handle = self

    def wait(self) -> None:
        self.bucket.param_data.copy_(self.weights)


def read_late_weights(world: World, names: list[str]) -> dict[str, list[int]]:
    """Training passes whose weights arrive at the last moment see the same as others; how many buckets were late and
    how many there are."""
    mesh, seen = build_mesh(world, MEGATRON), {}
    for name in names:
        engine = engine_for(name, mesh, MEGATRON, "fp32", BUCKET)
        one_step(engine, mesh)
        engine._settle()
        wanted = [loss.detach() for loss, _ in losses(engine.module, mesh, "fp32")]
        engine._begin_to_gather()
        late = [Late(bucket) for bucket in engine._buckets if bucket.param_gather_handle is not None]
        found = [loss.detach() for loss, _ in losses(engine.module, mesh, "fp32")]
        assert found == wanted, name
        seen[name] = [len(late), len(engine._buckets)]
    return seen


@dataclass
class InPieces:
    """Of one case on one rank of a pipeline."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    """Whole ones of the first step, which is not clipped; on the first rank alone, as the weights after the last."""
    weights: dict[str, Tensor]
    begun: list[tuple[int, int, int]]
    """Of each step: reductions begun before the last gradient was there, before `step`, and buckets in all that hold
    nothing which others have too."""


def train_in_pieces(
    world: World, names: list[str], plan: ParallelConfig, precision: str, num_steps: int
) -> dict[str, InPieces]:
    """Train each case, a micro-batch a row, through a pipeline where the plan has one."""
    mesh = build_mesh(world, plan)
    return {name: _in_pieces(name, mesh, plan, precision, num_steps) for name in names}


def _in_pieces(name: str, mesh: Mesh, plan: ParallelConfig, precision: str, num_steps: int) -> InPieces:
    objective = build_piece(name, mesh, plan)
    engine = engine_around(objective, mesh, plan, precision, BUCKET)
    schedule = Schedule(objective.stage, plan, MODEL.width) if objective.stage.divided else None
    gradients = Gradients(objective, engine, precision, schedule)
    events = recorded(engine) if isinstance(engine, MegatronEngine) else []
    rows = torch.arange(BATCH).tensor_split(mesh.data.size)[mesh.data.rank]
    count, found = objective.num_scored(*batch_and_noise()), InPieces([], [], {}, {}, [])
    for step in range(num_steps):
        set_learning_rate(engine.optimizer, (step + 1) / num_steps)
        events.clear()
        sums = gradients.add_up([row(int(index)) for index in rows], count)
        sums.reduce(mesh.reduction, mesh.data, mesh.pipeline)
        found.losses.append(sums.read().total / float(count))
        if events:
            last = len(events) - 1 - events[::-1].index("gradient")
            alone = sum(bucket.params.isdisjoint(engine._replicated) for bucket in engine._buckets)
            found.begun.append((events[:last].count("reduction"), events.count("reduction"), alone))
        found.norms.append(engine.step(CLIPPED_TO if step else 0).item())
        if step == 0:
            moments = whole(engine, mesh, engine.optimizer_state())
            found.gradients = {
                key.removesuffix("/exp_avg"): value / (1 - OPTIMIZER.beta1)
                for key, value in moments.items()
                if key.endswith("/exp_avg")
            }
    gathered = gather_stages(
        {"gradients": found.gradients, "weights": whole(engine, mesh, engine.named(engine.held))},
        objective,
        mesh.pipeline,
    )
    found.gradients, found.weights = gathered["gradients"], gathered["weights"]
    return found


def recorded(engine: MegatronEngine) -> list[str]:
    """Becomes what happens: a parameter's `gradient` is computed, a bucket's `reduction` begins."""
    events: list[str] = []
    for parameter in engine.module.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: events.append("gradient"))
    for bucket in engine._buckets:
        bucket.start_grad_sync = partial(_begin, events, bucket.start_grad_sync)
    return events


def _begin(events: list[str], start: Callable[..., None], **options: Any) -> None:
    events.append("reduction")
    start(**options)
