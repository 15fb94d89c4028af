"""What runs on the ranks of test_pipeline.py, and the same on one process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from gathering import gather_stages, gather_tensors
from tensor_bodies import look
from tensor_cases import BATCH, CASES, LENGTH, MODEL, batch_and_noise, build

from braid.data_pipeline.loader import Batch
from braid.parallel.data_parallel import World
from braid.parallel.deepspeed_engine import build_deepspeed_engine
from braid.parallel.engine import NotFinite, PlainEngine, gradient_norm
from braid.parallel.layers import Shard, sum_partial_gradients
from braid.parallel.megatron_engine import MegatronEngine
from braid.parallel.mesh import Mesh, build_mesh
from braid.parallel.pipeline import Schedule, Stage, mark_replicated, spread, sum_replicated_gradients
from braid.parallel.plan import ParallelConfig, deal_blocks
from braid.pretrain.checkpoint.layout import shards_of
from braid.pretrain.model.network import parameter_counts
from braid.pretrain.model.probe import check_direction
from braid.pretrain.objectives.base import Noise, Objective
from braid.pretrain.training.gradients import Gradients

PAIRS = "ccdd-mmdit"
NAMES = [name for name in CASES if "own-denoiser" not in name]
"""But for the one that a pipeline is refused for."""


@dataclass
class Result:
    """Of one case on one rank."""

    loss: float
    terms: dict[str, float]
    norm: float
    statistics: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    """Whole ones of all parameters; on the first rank alone."""
    held: set[str]
    """Names of the parameters that are here."""
    counts: dict[str, int]


def num_blocks(name: str, plan: ParallelConfig) -> int:
    """At least four, or four pairs, and at least one for each piece."""
    return max(4, plan.pipeline * plan.virtual) * (2 if name == PAIRS else 1)


def build_piece(name: str, mesh: Mesh, plan: ParallelConfig, **model: Any) -> Objective:
    """This process's part of the case."""
    number = num_blocks(name, plan)
    pieces = deal_blocks(number, plan.pipeline, plan.virtual, alternates=name == PAIRS)
    stage = Stage(mesh.pipeline, pieces[mesh.pipeline.rank])
    return build(name, mesh.tensor, plan.sequence, stage=stage, num_layers=number, **model)


def micro_batches(num: int, *, packed: bool = False) -> list[tuple[Batch, Noise]]:
    """Of the batch; where there are more than rows, of the same rows again with other noise."""
    batch, noise = batch_and_noise(packed=packed)
    pieces = []
    for numbers in torch.arange(max(BATCH, num)).chunk(num):
        rows, again = numbers % BATCH, numbers - numbers % BATCH
        part = Batch(**{name: None if x is None else x[rows] for name, x in vars(batch).items()})
        fields = {field: getattr(noise, field)[rows] for field in ("index", "shift")}
        ordinals = part.ordinals + again
        pieces.append((replace(part, ordinals=ordinals), replace(noise, ordinals=ordinals, **fields)))
    assert len(pieces) == num
    return pieces


def step(
    objective: Objective,
    mesh: Mesh,
    plan: ParallelConfig,
    num: int,
    precision: str = "fp32",
    *,
    freed: bool = False,
    packed: bool = False,
) -> Result:
    """The gradients of a step of `num` micro-batches, as an engine makes them whole. `freed`: what was sent to the next
    piece is freed, as on a GPU."""
    pieces, network = micro_batches(num, packed=packed), objective.network
    optimizer = torch.optim.SGD(objective.parameters())
    engine = PlainEngine(objective, optimizer, mesh)
    schedule = Schedule(network.stage, plan, MODEL.width) if network.stage.divided else None
    if freed:
        schedule.config.deallocate_pipeline_outputs = True
    count = sum(objective.num_scored(*piece) for piece in pieces)
    sums = Gradients(objective, engine, precision, schedule).add_up(pieces, count)
    sums.reduce(mesh.reduction, mesh.data, mesh.pipeline)
    sum_partial_gradients(engine.held, mesh.tensor)
    sum_replicated_gradients(engine.held, mesh.pipeline)
    gradients = {
        key: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for key, parameter in objective.named_parameters()
        if parameter.requires_grad
    }
    held = set(gradients)
    gradients = gather_tensors(gradients, shards_of(objective), mesh.tensor)
    gradients = gather_stages({"": gradients}, objective, mesh.pipeline)[""]
    norm = gradient_norm(engine.held, mesh.tensor, None, mesh.pipeline).item()
    first, found = mesh.world.rank == 0, sums.read()
    counts = parameter_counts(network)
    return Result(found.total, found.terms, norm, sums.statistics, gradients if first else {}, held, counts)


def steps(
    world: World,
    names: list[str],
    fields: dict,
    num: int,
    precision: str,
    model: dict,
    freed: bool = False,
    packed: bool = False,
) -> dict[str, Result]:
    """A step of each case, divided as a plan of `fields` says."""
    plan = ParallelConfig(**fields)
    mesh, results = build_mesh(world, plan), {}
    for name in names:
        results[name] = step(
            build_piece(name, mesh, plan, **model), mesh, plan, num, precision, freed=freed, packed=packed
        )
    return results


def looks(world: World, names: list[str], fields: dict) -> dict[str, tuple]:
    """What each case evaluates to and samples; and that the start-up probe passes."""
    plan = ParallelConfig(**fields)
    mesh, seen = build_mesh(world, plan), {}
    for name in names:
        objective = build_piece(name, mesh, plan)
        seen[name] = look(objective, guided=False)
        check_direction(objective.network, length=LENGTH)
    return seen


class Parts(NamedTuple):
    """Something nested."""

    numbers: torch.Tensor
    more: dict[str, Any]
    nothing: None = None


def nested(world: World) -> Parts:
    """What the last rank has, on all."""
    axis = build_mesh(world, ParallelConfig(pipeline=world.size)).pipeline
    columns = torch.arange(6, dtype=torch.float64).view(2, 3).T  # not contiguous
    mine = Parts(columns + world.rank, {"flags": [torch.tensor([True, False])], "text": f"of {world.rank}"})
    return spread(axis, mine, world.size - 1)


class Descent(torch.optim.AdamW):
    """Plain gradient descent, for an engine that takes no optimizer but this one."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter -= group["lr"] * parameter.grad


NUM = 100
"""Of the elements of each weight below: enough for every rank to hold some where they are divided."""


def weights(world: World, fields: dict, bad: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """A step of plain gradient descent on pipeline 2 x tensor 2 x data 2, by gradients that are functions of the ranks:
    the norm that is found, and the weights afterwards, all zero before. `bad`: some data has no gradient on one stage.
    """
    plan = ParallelConfig(pipeline=2, tensor=2, **fields)
    mesh = build_mesh(world, plan)
    module = torch.nn.ParameterDict(
        {name: torch.nn.Parameter(torch.zeros(NUM)) for name in ("alone", "everywhere", "everywhere_divided")}
    )
    mark_replicated(module, ["alone"])
    module["everywhere_divided"].shard = Shard(0, 1, mesh.tensor.rank, 2, 2 * NUM)
    optimizer = Descent(module.parameters(), lr=1.0)
    builders = {
        "plain": PlainEngine,
        "deepspeed": partial(build_deepspeed_engine, plan=plan),
        "megatron": partial(MegatronEngine, overlap=plan.overlap),
    }
    engine = builders[plan.engine](module, optimizer, mesh)
    for number, parameter in enumerate(module.values()):
        gradient = torch.full((NUM,), 1.0 + number + 10 * mesh.pipeline.rank + 100 * mesh.data.rank)
        if parameter is module["everywhere_divided"]:
            gradient += mesh.tensor.rank
        if bad and mesh.pipeline.rank == mesh.data.rank == 1 and parameter is module["alone"]:
            gradient[0] = torch.nan
        (parameter * gradient).sum().backward()  # as a schedule does, which knows no engine
    try:
        norm = engine.step(0.0).item()
    except NotFinite:
        norm = torch.nan
    engine.publish()  # what the next forward pass would wait for
    return norm, {name: parameter.detach() for name, parameter in module.items()}
