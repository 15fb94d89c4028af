"""What runs on the ranks of test_memory.py, which imports it by name: what processes really hold, in bytes."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import torch
from torch import nn

from braid.data_pipeline.loader import Batch
from braid.kernels.random import initial_normal
from braid.parallel.data_parallel import World
from braid.parallel.mesh import build_mesh
from braid.pretrain.config.schema import Config
from braid.pretrain.objectives.base import Noise
from braid.pretrain.objectives.build import build_objective
from braid.pretrain.training.engines import build_engine
from braid.pretrain.training.precision import autocast


def live_bytes() -> int:
    """Of the storages that Python's collector can reach."""
    gc.collect()
    storages = [each.untyped_storage() for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def of_engine(world: World, config: Config, vocab_size: int) -> tuple[int, int]:
    """Bytes of this rank's weights, and of all that is left after two steps through the engine of the plan: weights and
    optimizer state, and what else the engine keeps."""
    initial_normal(0, "a first draw loads the table behind all of them", torch.Size((1,)))
    plan, before = config.parallel, live_bytes()
    mesh = build_mesh(world, plan)
    tokenizer = SimpleNamespace(vocab_size=vocab_size, mask_id=vocab_size - 1, bos_id=0, eos_id=0)
    objective = build_objective(config, tokenizer, None, world.device, mesh.tensor, plan.sequence)
    engine = build_engine(config, objective, mesh)
    length, ordinals = config.data.sequence_length, torch.arange(1)
    for step in range(2):
        tokens = torch.randint(0, vocab_size - 2, (1, length), generator=torch.Generator().manual_seed(step))
        batch = Batch(tokens=tokens, loss_mask=torch.ones_like(tokens, dtype=torch.bool), ordinals=ordinals)
        corrupted = objective.corrupt(batch, Noise.training(1, 0, 1, ordinals))
        with autocast(config.run.precision, world.device):
            prediction = objective.predict(corrupted)
        engine.backward(objective.loss(prediction, corrupted).total / length, last=True)
        del prediction, corrupted
        engine.step(1.0)
    return sum(parameter.nbytes for parameter in objective.parameters()), live_bytes() - before


def of_bare_deepspeed(world: World, zero: int) -> float:
    """Bytes per parameter in the second micro-batch of the second step, between the backward pass and the step.

    Gradients that DeepSpeed keeps itself are among them, those that only autograd holds are not.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}  # it would compile an all-reduce that training never calls
    deepspeed.init_distributed("gloo", verbose=False)
    small = {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000, "overlap_comm": False}
    nothing_gathered = {
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": 0,
    }
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": zero, **small, **nothing_gathered},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    before = live_bytes()
    network = nn.Sequential(*[nn.Linear(128, 128) for _ in range(24)])
    size = sum(parameter.numel() for parameter in network.parameters())
    engine, *_ = deepspeed.initialize(model=network, optimizer=torch.optim.AdamW(network.parameters()), config=settings)
    for micro_batch in range(4):
        engine.backward(engine(torch.randn(1, 128)).square().mean())
        if micro_batch == 2:
            held = live_bytes() - before
        engine.step()
    return held / size
