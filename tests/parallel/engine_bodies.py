"""Some steps of training with an engine, in one process or on ranks; for test_megatron_engine.py.

The global batch is that of tensor_cases.py, a row to each micro-batch. The first step is not clipped, so that Adam's
first moment tells the gradient; the later ones are. At the end the module has the weights that are held, on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from tensor_cases import BATCH, batch_and_noise, build
from torch import Tensor

from braid.data_pipeline.loader import Batch
from braid.parallel.data_parallel import World
from braid.parallel.engine import Engine, PlainEngine
from braid.parallel.layers import gather_whole
from braid.parallel.megatron_engine import MegatronEngine
from braid.parallel.mesh import Mesh, build_mesh
from braid.parallel.plan import ParallelConfig
from braid.pretrain.config.schema import OptimizerConfig
from braid.pretrain.objectives.base import Noise, Objective
from braid.pretrain.training.ema import EMA
from braid.pretrain.training.optimizer import build_optimizer, set_learning_rate
from braid.pretrain.training.precision import autocast, cast_by_autocast

CLIPPED_TO = 0.05
# Adam's epsilon is large, for it must not blow the rounding of gradients that are almost zero up to whole steps.
OPTIMIZER = OptimizerConfig(lr=1e-2, eps=1e-4, weight_decay=0.1)


@dataclass
class Run:
    """Whole tensors by the name of their parameter, and what was seen on the way."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    """Of the first step."""
    weights: dict[str, Tensor]
    state: dict[str, Tensor]
    averages: dict[str, Tensor]
    averaged_loss: float
    """Of the batch, with the averaged weights in the module, before the last step."""


def row(index: int) -> tuple[Batch, Noise]:
    """One of the batch."""
    batch, noise = batch_and_noise()
    which = slice(index, index + 1)
    fields = {name: value[which] for name, value in vars(batch).items() if isinstance(value, Tensor)}
    noises = {"ordinals": noise.ordinals[which], "index": noise.index[which], "shift": noise.shift[which]}
    return replace(batch, **fields), replace(noise, **noises)


def engine_for(name: str, mesh: Mesh, plan: ParallelConfig, precision: str, bucket_size: int | None) -> Engine:
    return engine_around(build(name, mesh.tensor, plan.sequence), mesh, plan, precision, bucket_size)


def engine_around(
    objective: Objective, mesh: Mesh, plan: ParallelConfig, precision: str, bucket_size: int | None
) -> Engine:
    optimizer = build_optimizer(objective, OPTIMIZER, mesh.tensor)
    if plan.engine == "plain":
        return PlainEngine(objective, optimizer, mesh)
    half = cast_by_autocast(objective) if precision == "bf16" else ()
    return MegatronEngine(
        objective,
        optimizer,
        mesh,
        half=half,
        overlap=plan.overlap,
        fused=plan.fused_accumulation,
        bucket_size=bucket_size,
    )


def losses(objective: Objective, mesh: Mesh, precision: str) -> Iterator[tuple[Tensor, bool]]:
    """This rank's micro-batches, over the count of all; and whether each is the last."""
    batch, noise = batch_and_noise()
    count, share = objective.num_scored(batch, noise), BATCH // mesh.data.size
    first = mesh.data.rank * share
    for index in range(first, first + share):
        corrupted = objective.corrupt(*row(index))
        with autocast(precision, torch.device("cpu")):
            prediction = objective.predict(corrupted)
        yield objective.loss(prediction, corrupted).total / count, index == first + share - 1


def total(objective: Objective, mesh: Mesh, precision: str) -> float:
    with torch.no_grad():
        own = sum(loss for loss, _ in losses(objective, mesh, precision))
    return mesh.reduction.all_reduce_sum(own).item()


def whole(engine: Engine, mesh: Mesh, named: Iterator[tuple[str, Tensor]]) -> dict[str, Tensor]:
    shards = {name: getattr(p, "shard", None) for name, p in engine.module.named_parameters()}
    found = {}
    for key, value in named:
        shard = shards[key.partition("/")[0]] if value.ndim else None
        found[key] = value.detach().clone() if shard is None else gather_whole(value, shard, mesh.tensor)
    return found


def train(mesh: Mesh, name: str, plan: ParallelConfig, precision: str, num_steps: int, bucket_size: int | None) -> Run:
    torch.manual_seed(0)
    engine = engine_for(name, mesh, plan, precision, bucket_size)
    objective, ema = engine.module, EMA(engine, 0.9)
    run = Run([], [], {}, {}, {}, {}, 0.0)
    for step in range(num_steps):
        if step == num_steps - 1:
            with ema.applied():
                run.averaged_loss = total(objective, mesh, precision)
        own = 0.0
        for loss, last in losses(objective, mesh, precision):
            engine.backward(loss, last=last)
            own += loss.detach()
        run.losses.append(mesh.reduction.all_reduce_sum(own).item())
        set_learning_rate(engine.optimizer, (step + 1) / num_steps)
        run.norms.append(engine.step(CLIPPED_TO if step else 0).item())
        ema.update(step + 1)
        if step == 0:
            moments = whole(engine, mesh, engine.optimizer_state())
            run.gradients = {
                key.removesuffix("/exp_avg"): value / (1 - OPTIMIZER.beta1)
                for key, value in moments.items()
                if key.endswith("/exp_avg")
            }
    with engine.writing() as held:
        parts = {name: value.detach().clone() for name, value in engine.named(held)}
    trained = {key: value for key, value in objective.named_parameters() if value.requires_grad}
    assert all(torch.equal(value, parts[key].to(value.dtype)) for key, value in trained.items())
    run.weights = whole(engine, mesh, engine.named(engine.held))
    run.state = whole(engine, mesh, engine.optimizer_state())
    run.averages = whole(engine, mesh, engine.named(ema.averages))
    return run


def train_on_ranks(
    world: World, names: list[str], plan: ParallelConfig, precision: str, num_steps: int, bucket_size: int | None
) -> dict[str, Run]:
    mesh = build_mesh(world, plan)
    return {name: train(mesh, name, plan, precision, num_steps, bucket_size) for name in names}
