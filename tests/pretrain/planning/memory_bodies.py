"""What runs on the ranks of test_memory.py, which imports it by name: what processes really hold, in bytes."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import torch
from torch import nn

from braid.data_pipeline.loader import Batch
from braid.kernels.random import initial_normal
from braid.parallel import deepspeed_engine
from braid.parallel.data_parallel import World
from braid.parallel.mesh import build_mesh
from braid.parallel.pipeline import Schedule
from braid.pretrain.config.schema import Config
from braid.pretrain.objectives.base import Noise
from braid.pretrain.objectives.build import build_objective, build_stage
from braid.pretrain.training.engines import build_engine, build_store
from braid.pretrain.training.gradients import Gradients


def live_bytes() -> int:
    """Of the storages that Python's collector can reach."""
    gc.collect()
    storages = [each.untyped_storage() for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def while_built(world: World, config: Config, vocab_size: int) -> int:
    """The most bytes that are there beside what was, each time one of the larger modules has its values."""
    initial_normal(0, "a first draw loads the table behind all of them", torch.Size((1,)))
    before, found = live_bytes(), []
    mesh = build_mesh(world, config.parallel)
    store, large = build_store(config.parallel, mesh), config.model.width**2

    def watched(module: nn.Module) -> None:
        if sum(parameter.numel() for parameter in module.parameters(recurse=False)) >= large:
            found.append(live_bytes() - before)
        store(module)

    tokenizer = SimpleNamespace(vocab_size=vocab_size, mask_id=vocab_size - 1, bos_id=0, eos_id=0)
    build_objective(config, tokenizer, None, world.device, mesh.tensor, store=watched)
    return max(found)


def of_engine(world: World, config: Config, vocab_size: int) -> tuple[int, int]:
    """Bytes of this rank's weights, and of all that is left after two steps through the engine of the plan: weights and
    optimizer state, and what else the engine keeps."""
    initial_normal(0, "a first draw loads the table behind all of them", torch.Size((1,)))
    # Every parameter of these models is small, and would fit into a bucket that is always there.
    deepspeed_engine.SMALL_PARAMETER, deepspeed_engine.LARGEST_BUCKET = 0, 1000
    plan, before = config.parallel, live_bytes()
    mesh = build_mesh(world, plan)
    tokenizer = SimpleNamespace(vocab_size=vocab_size, mask_id=vocab_size - 1, bos_id=0, eos_id=0)
    stage = build_stage(config, mesh)
    objective = build_objective(config, tokenizer, None, world.device, mesh.tensor, plan.sequence, stage=stage)
    engine = build_engine(config, objective, mesh)
    schedule = Schedule(stage, plan, config.model.width) if stage.divided else None
    gradients = Gradients(objective, engine, config.run.precision, schedule)
    length, ordinals = config.data.sequence_length, torch.arange(1)
    for step in range(2):
        tokens = torch.randint(0, vocab_size - 2, (1, length), generator=torch.Generator().manual_seed(step))
        batch = Batch(tokens=tokens, loss_mask=torch.ones_like(tokens, dtype=torch.bool), ordinals=ordinals)
        gradients.add_up([(batch, Noise.training(1, 0, 1, ordinals))], torch.tensor(length))
        engine.step(1.0)
    weights = sum(getattr(parameter, "ds_tensor", parameter).nbytes for parameter in objective.parameters())
    return weights, live_bytes() - before
