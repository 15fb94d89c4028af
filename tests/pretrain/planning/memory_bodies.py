"""What runs on the ranks of test_memory.py, which imports it by name: what processes really hold, in bytes."""

from __future__ import annotations

import gc

import torch
from torch import nn

from braid.parallel.data_parallel import World


def live_bytes() -> int:
    """Of the storages that Python's collector can reach."""
    gc.collect()
    storages = [each.untyped_storage() for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def of_bare_deepspeed(world: World, zero: int, precision: str) -> float:
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
    if precision == "bf16":
        settings |= {
            "bf16": {"enabled": True, "immediate_grad_update": True},
            "data_types": {"grad_accum_dtype": "fp32"},
        }
    before = live_bytes()
    network = nn.Sequential(*[nn.Linear(128, 128) for _ in range(24)])
    size = sum(parameter.numel() for parameter in network.parameters())
    engine, *_ = deepspeed.initialize(
        model=network, optimizer=torch.optim.AdamW(network.parameters()), config=settings
    )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    for micro_batch in range(4):
        engine.backward(engine(torch.randn(1, 128, dtype=dtype)).float().square().mean())
        if micro_batch == 2:
            held = live_bytes() - before
        engine.step()
    return held / size
