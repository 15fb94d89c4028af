"""What runs on the ranks of test_deepspeed_engine.py: training steps of tiny systems through an engine."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from gathering import gather_stages, part_of
from pipeline_bodies import build_piece
from tensor_cases import BATCH, MODEL, batch_and_noise, build

from braid.data_pipeline.loader import Batch
from braid.parallel import deepspeed_engine
from braid.parallel.data_parallel import World
from braid.parallel.engine import Engine, NotFinite
from braid.parallel.layers import gather_whole
from braid.parallel.mesh import Mesh, build_mesh
from braid.parallel.pipeline import Schedule
from braid.parallel.plan import ParallelConfig
from braid.pretrain.checkpoint.layout import shards_of
from braid.pretrain.config.schema import Config, OptimizerConfig, RunConfig
from braid.pretrain.objectives.base import LossTerms, Noise, Objective
from braid.pretrain.training.ema import EMA
from braid.pretrain.training.engines import build_engine, build_store
from braid.pretrain.training.gradients import Gradients
from braid.pretrain.training.optimizer import set_learning_rate
from braid.pretrain.training.precision import autocast, cast_by_autocast

ADAMW = OptimizerConfig(lr=1e-3, weight_decay=0.1, beta2=0.99)
MUON = replace(ADAMW, name="muon")
CLIP_NORM = 0.5
"""Below every norm here."""
Tensors = dict[str, torch.Tensor]


@dataclass
class Trained:
    """Of one case on one rank: whole tensors by name."""

    norms: list[float]
    weights: Tensors
    moments: list[Tensors]
    """The optimizer's state after each step."""
    average: Tensors
    averaged: Tensors
    """The module's weights while the average is applied, as `weights_seen` finds them."""
    seen: Tensors
    """The same afterwards."""
    sizes: list[int]
    """Elements of the tensors this rank holds."""


def train(
    world: World,
    names: list[str],
    plan: ParallelConfig,
    num_steps: int = 2,
    precision: str = "fp32",
    width: int = 32,
    optimizer: OptimizerConfig = ADAMW,
) -> dict[str, Trained]:
    """Train each case on two micro-batches a rank and step (of one row, where two ranks share the rows)."""
    deepspeed_engine.SMALL_PARAMETER = 0  # every parameter of these models is small
    mesh = build_mesh(world, plan)
    return {name: _train(name, mesh, plan, num_steps, precision, width, optimizer) for name in names}


def _train(
    name: str,
    mesh: Mesh,
    plan: ParallelConfig,
    num_steps: int,
    precision: str,
    width: int,
    optimizer: OptimizerConfig,
) -> Trained:
    objective, engine = start(name, mesh, plan, width, optimizer, precision)
    ema = EMA(engine, 0.5)
    norms, moments = [], []
    for step in range(num_steps):
        norms.append(one_step(objective, engine, mesh, precision).item())
        ema.update(step + 1)
        moments.append(whole(engine.optimizer_state(), objective, mesh))
    with ema.applied():
        averaged = weights_seen(objective, engine, mesh)
    return Trained(
        norms,
        whole(engine.named(engine.held), objective, mesh),
        moments,
        whole(engine.named(ema.averages), objective, mesh),
        averaged,
        weights_seen(objective, engine, mesh),
        [tensor.numel() for tensor in engine.held],
    )


def built(world: World, names: list[str], plan: ParallelConfig) -> dict[str, Tensors]:
    """The first weights of each case out of an engine around a model whose modules were divided when they had them."""
    mesh, found = build_mesh(world, plan), {}
    for name in names:
        objective = build(name, mesh.tensor, plan.sequence, randomise=False, store=build_store(plan, mesh))
        assert all(parameter.numel() == 0 for parameter in objective.network.parameters())
        engine = build_engine(Config(optimizer=ADAMW, parallel=plan), objective, mesh)
        found[name] = whole(engine.named(engine.held), objective, mesh)
        rest = {key: value for key, value in engine.untrained().items() if key in dict(objective.named_parameters())}
        found[name] |= whole(rest, objective, mesh)
    return found


@dataclass
class InPieces:
    """Of one case on one rank of a pipeline."""

    norms: list[float]
    weights: Tensors
    """Whole ones; on the first rank alone."""
    copies: dict[str, bool]
    """Weights and moments of parameters that every stage has -> whether they are those of the first, to the bit."""


def train_in_pieces(
    world: World, names: list[str], plan: ParallelConfig, optimizer: OptimizerConfig = ADAMW, num_steps: int = 3
) -> dict[str, InPieces]:
    """Train each case, four blocks or more, on a micro-batch a row. Rows need not divide by the data axis."""
    mesh = build_mesh(world, plan)
    return {name: _train_in_pieces(name, mesh, plan, optimizer, num_steps) for name in names}


def _train_in_pieces(
    name: str, mesh: Mesh, plan: ParallelConfig, optimizer: OptimizerConfig, num_steps: int
) -> InPieces:
    objective = build_piece(name, mesh, plan)
    engine = build_engine(Config(optimizer=optimizer, parallel=plan), objective, mesh)
    set_learning_rate(engine.optimizer, 1.0)
    schedule = Schedule(objective.stage, plan, MODEL.width) if objective.stage.divided else None
    gradients, norms = Gradients(objective, engine, "fp32", schedule), []
    batch, noise = batch_and_noise()
    mine = torch.arange(BATCH).tensor_split(mesh.data.size)[mesh.data.rank]
    micro_batches = [(_cut(batch, row), _rows(noise, row)) for row in mine.split(1)]
    for _ in range(num_steps):
        gradients.add_up(micro_batches, batch.loss_mask.sum())
        norms.append(engine.step(CLIP_NORM).item())
    copies = {}
    held = dict(engine.named(engine.held)) | dict(engine.optimizer_state())
    for key in sorted(held):
        value, replicated = held[key], getattr(objective.get_parameter(key.partition("/")[0]), "replicated", False)
        if replicated and value.ndim:
            first = mesh.pipeline.broadcast(value.detach().clone(), 0)
            copies[key] = torch.equal(first, value) and ("/" in key or torch.equal(first, objective.get_parameter(key)))
    weights = whole(engine.named(engine.held), objective, mesh)
    return InPieces(norms, gather_stages({"": weights}, objective, mesh.pipeline)[""], copies)


def start(
    name: str,
    mesh: Mesh,
    plan: ParallelConfig,
    width: int = 32,
    optimizer: OptimizerConfig = ADAMW,
    precision: str = "fp32",
) -> tuple[Objective, Engine]:
    objective, store = build(name, mesh.tensor, plan.sequence, width=width), build_store(plan, mesh)
    for module in objective.modules():
        store(module)
    config = Config(run=RunConfig(precision=precision), optimizer=optimizer, parallel=plan)
    engine = build_engine(config, objective, mesh)
    set_learning_rate(engine.optimizer, 1.0)
    return objective, engine


def one_step(
    objective: Objective,
    engine: Engine,
    mesh: Mesh,
    precision: str = "fp32",
    factor: Callable[[int], float] = lambda ordinal: 1.0,
) -> torch.Tensor:
    """`factor(ordinal of the first row)` multiplies the loss of a micro-batch."""
    batch, noise = batch_and_noise()
    count = batch.loss_mask.sum()
    rows = BATCH // mesh.data.size
    micro_batches = torch.arange(mesh.data.rank * rows, (mesh.data.rank + 1) * rows).chunk(2)
    for number, micro_batch in enumerate(micro_batches, 1):
        loss = engine.forward(partial(_loss, objective, _cut(batch, micro_batch), _rows(noise, micro_batch), precision))
        engine.backward(loss.total / count * factor(int(micro_batch[0])), last=number == len(micro_batches))
    return engine.step(CLIP_NORM)


def _loss(objective: Objective, batch: Batch, noise: Noise, precision: str) -> LossTerms:
    corrupted = objective.corrupt(batch, noise)
    with autocast(precision, torch.device("cpu")):
        prediction = objective.predict(corrupted)
    return objective.loss(prediction, corrupted)


def _cut(batch: Batch, rows: torch.Tensor) -> Batch:
    return Batch(batch.tokens[rows], batch.loss_mask[rows], batch.ordinals[rows], batch.condition[rows])


def _rows(noise: Noise, rows: torch.Tensor) -> Noise:
    return replace(noise, ordinals=noise.ordinals[rows], index=noise.index[rows], shift=noise.shift[rows])


def whole(tensors: Any, objective: Objective, mesh: Mesh) -> Tensors:
    """Whole over the tensor axis too."""
    shards, found = shards_of(objective), {}
    for key, tensor in dict(tensors).items():
        shard = shards.get(key.partition("/")[0]) if tensor.ndim else None
        full = tensor if shard is None else gather_whole(tensor, shard, mesh.tensor)
        found[key] = full.detach().clone()
    return found


def part(tensors: Tensors, objective: Objective) -> Tensors:
    """This process's, on the tensor axis."""
    shards = shards_of(objective)
    return {
        key: tensor if not tensor.ndim or (shard := shards.get(key.partition("/")[0])) is None else shard.cut(tensor)
        for key, tensor in tensors.items()
    }


def weights_seen(objective: Objective, engine: Engine, mesh: Mesh) -> Tensors:
    """The weights as a calculation with the module finds them."""

    def look() -> Tensors:
        owners = [(prefix, owner) for prefix, owner in objective.named_modules() if owner._parameters]
        return {
            f"{prefix}.{name}".lstrip("."): getattr(owner, name).detach().clone()
            for prefix, owner in owners
            for name in owner._parameters
            if getattr(owner, name) is not None
        }

    with torch.no_grad():
        return whole(engine.forward(look), objective, mesh)


def poisoned(
    world: World, name: str, plan: ParallelConfig, optimizer: OptimizerConfig
) -> tuple[bool, bool, bool, list[float]]:
    """A step whose gradient is NaN on the last rank alone: whether every rank is told, and whether weights and state
    are what they were, to the bit; and the norms of the steps before and after."""
    deepspeed_engine.SMALL_PARAMETER = 0
    mesh = build_mesh(world, plan)
    objective, engine = start(name, mesh, plan, optimizer=optimizer)
    first = one_step(objective, engine, mesh)
    before = _everything(objective, engine, mesh)
    told = False
    try:
        one_step(objective, engine, mesh, factor=lambda ordinal: math.nan if ordinal == BATCH - 1 else 1.0)
    except NotFinite:
        told = True
    after = _everything(objective, engine, mesh)
    second = one_step(objective, engine, mesh)
    moved = any(not torch.equal(value, before[key]) for key, value in _everything(objective, engine, mesh).items())
    same = before.keys() == after.keys() and all(torch.equal(value, after[key]) for key, value in before.items())
    return told, same, moved, [first.item(), second.item()]


def gathered_bytes(world: World, precision: str) -> tuple[int, int, int]:
    """Of a step of stage 3: bytes of gathered weights, and elements of the matrices and of all weights."""
    from deepspeed.runtime.zero import partition_parameters

    deepspeed_engine.SMALL_PARAMETER = 0
    mesh = build_mesh(world, ParallelConfig(engine="deepspeed", zero=3))
    objective, engine = start("mdlm", mesh, ParallelConfig(engine="deepspeed", zero=3), 64, ADAMW, precision)
    one_step(objective, engine, mesh, precision)  # in which DeepSpeed learns the order
    sizes, gather = [], partition_parameters._dist_allgather_fn

    def watched(piece: torch.Tensor, whole: torch.Tensor, group: Any) -> Any:
        sizes.append(whole.nbytes)
        return gather(piece, whole, group)

    partition_parameters._dist_allgather_fn = watched
    one_step(objective, engine, mesh, precision)
    matrices = sum(objective.get_parameter(name).ds_numel for name in cast_by_autocast(objective))
    return sum(sizes), matrices, sum(parameter.ds_numel for parameter in objective.parameters())


def _everything(objective: Objective, engine: Engine, mesh: Mesh) -> Tensors:
    held = whole(engine.named(engine.held), objective, mesh)
    state = whole(engine.optimizer_state(), objective, mesh)
    seen = {f"seen {name}": value for name, value in weights_seen(objective, engine, mesh).items()}
    rest = {f"rest {name}": value.clone() for name, value in engine.untrained().items()}
    return held | state | seen | rest


def moved(world: World, name: str, plan: ParallelConfig, width: int = 32, optimizer: OptimizerConfig = ADAMW) -> bool:
    """Everything of a trained engine into a fresh one, which then goes on as the first does."""
    deepspeed_engine.SMALL_PARAMETER = 0
    mesh = build_mesh(world, plan)
    objective, engine = start(name, mesh, plan, width, optimizer)
    for _ in range(2):
        one_step(objective, engine, mesh)
    if plan.offload == "nvme":
        plan = replace(plan, offload_dir=f"{plan.offload_dir}/other")
    other, fresh = start(name, mesh, plan, width, optimizer)
    weights = part(whole(engine.named(engine.held), objective, mesh), other)
    state = part(whole(engine.optimizer_state(), objective, mesh), other)
    rest = {key: value.clone() for key, value in engine.untrained().items()}
    with fresh.writing() as held:
        for key, value in fresh.untrained().items():
            value.copy_(rest[key])
        fresh.fill(held, part_of(weights))
    fresh.load_optimizer_state(state.keys(), part_of(state))
    same = [_same(objective, engine, other, fresh, mesh)]
    norms = [one_step(*each, mesh) for each in ((objective, engine), (other, fresh))]
    return all([*same, torch.equal(*norms), _same(objective, engine, other, fresh, mesh)])


def _same(objective: Objective, engine: Engine, other: Objective, fresh: Engine, mesh: Mesh) -> bool:
    found, wanted = _everything(other, fresh, mesh), _everything(objective, engine, mesh)
    assert found.keys() == wanted.keys()
    return all(torch.equal(value, found[key]) for key, value in wanted.items())
