"""What runs on the ranks of test_direction.py: what the probe of a run's start says of a network that an engine has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gathering import part_of
from pipeline_bodies import num_blocks
from tensor_cases import LENGTH, build

from braid.kernels.errors import BraidError
from braid.parallel import deepspeed_engine
from braid.parallel.context import Context, CoreAttention
from braid.parallel.data_parallel import World
from braid.parallel.mesh import build_mesh
from braid.parallel.pipeline import ONE_PIECE, Stage
from braid.parallel.plan import ParallelConfig, deal_blocks
from braid.pretrain.config.schema import Config, OptimizerConfig, RunConfig
from braid.pretrain.training.direction import check_passes
from braid.pretrain.training.engines import build_engine

attend = CoreAttention.forward


def causal_in_training(self: CoreAttention, *tensors: torch.Tensor, **options: Any) -> torch.Tensor:
    """Attention that is causal where gradients are recorded."""
    return attend(self, *tensors, **options | {"causal": torch.is_grad_enabled()})


def causal_where_divided(self: CoreAttention, *tensors: torch.Tensor, **options: Any) -> torch.Tensor:
    """Attention that is causal where the context axis divides sequences."""
    return attend(self, *tensors, **options | {"causal": self.context.size > 1})


BREAKS: dict[str, tuple[type, str, Callable]] = {
    "causal in training": (CoreAttention, "forward", causal_in_training),
    "causal where divided": (CoreAttention, "forward", causal_where_divided),
}


def probes(world: World, names: list[str], plan: ParallelConfig, broken: str, precision: str) -> dict[str, list[str]]:
    """What is said of each case ("" where nothing is wrong): as it is, broken, and with weights in the engine, written
    there, by which no position sees another."""
    deepspeed_engine.SMALL_PARAMETER = 0  # every parameter of these models is small
    mesh, said = build_mesh(world, plan), {}
    for name in names:
        number = num_blocks(name, plan)
        pieces = deal_blocks(number, plan.pipeline, plan.virtual, alternates=name == "ccdd-mmdit")
        stage = Stage(mesh.pipeline, pieces[mesh.pipeline.rank]) if plan.pipeline > 1 else ONE_PIECE
        context = Context(mesh.context, plan.context_by)
        objective = build(name, mesh.tensor, plan.sequence, context, stage=stage, num_layers=number)
        config = Config(parallel=plan, run=RunConfig(precision=precision), optimizer=OptimizerConfig(lr=1e-3))
        engine = build_engine(config, objective, mesh)

        def look(objective=objective, engine=engine) -> str:
            try:
                check_passes(objective, engine, precision, LENGTH)
            except BraidError as error:
                return str(error)
            return ""

        said[name] = [look()]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(*BREAKS[broken])
            said[name].append(look())
        with engine.writing() as held:
            whole = {key: value.clone() for key, value in engine.named(held)}
            for key, value in whole.items():
                if key.endswith("out.weight"):  # of an attention
                    value.zero_()
            engine.fill(held, part_of(whole))
        said[name].append(look())
    return said
