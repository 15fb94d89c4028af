"""What runs on the rank of test_accumulation.py."""

from __future__ import annotations

import functools
from collections import Counter

import torch
from engine_bodies import engine_around, losses
from megatron.core.tensor_parallel import layers as megatron_layers
from tensor_cases import BATCH, build
from torch import Tensor, nn

from braid.parallel.accumulation import KERNEL, add_product
from braid.parallel.data_parallel import World
from braid.parallel.mesh import build_mesh
from braid.parallel.plan import ParallelConfig
from braid.pretrain.training.precision import cast_by_autocast

FUSED = ParallelConfig(engine="megatron", fused_accumulation=True)


def fuse(world: World, name: str) -> None:
    """In a step every fused weight's sum is added to by products, in each micro-batch, and no other sum is."""
    mesh = build_mesh(world, FUSED)
    objective = build(name)
    engine = engine_around(objective, mesh, FUSED, "fp32", None)
    trained = {key: p for key, p in objective.named_parameters() if p.requires_grad}
    sums, added = {p.main_grad.data_ptr(): key for key, p in trained.items()}, Counter()

    def note(inputs: Tensor, of_outputs: Tensor, total: Tensor) -> None:
        added[sums[total.data_ptr()]] += 1
        add_product(inputs, of_outputs, total)

    getattr(megatron_layers, KERNEL).wgrad_gemm_accum_fp32 = note
    for loss, last in losses(objective, mesh, "fp32"):  # of one row each
        engine.backward(loss, last=last)
    assert min(added.values()) >= BATCH
    assert added.keys() == {key for key, p in trained.items() if p.grad_added_to_main_grad}
    # Attention and MLP of every block; experts of which some answer are stacked, and not used one by one.
    attention_and_mlp = {
        key
        for key, p in trained.items()
        if ".blocks." in key and key.endswith("weight") and p.ndim == 2
        and not any(part in key for part in ("adaln", "router", "conditioning", "experts"))
    }  # fmt: skip
    assert added.keys() == attention_and_mlp
    assert all(p.main_grad.isfinite().all() for p in trained.values())


def train_in_bf16(world: World) -> tuple[float, float]:
    """The largest error of the sums of all micro-batches, relative to the largest sum: fused, and not."""
    errors, mesh = [], build_mesh(world, FUSED)
    for plan in (FUSED, ParallelConfig(engine="megatron")):
        objective = build("mdlm")
        engine = engine_around(objective, mesh, plan, "bf16", None)
        half, exact = cast_by_autocast(objective), {}
        for key, module in objective.named_modules():
            if "blocks." in key and f"{key}.weight" in half and "adaln" not in key:
                exact[module] = torch.zeros(module.weight.shape, dtype=torch.float64)
                module.register_forward_hook(functools.partial(watch, exact[module]))
        assert len(exact) == 8
        for _ in range(4):
            for loss, _ in losses(objective, mesh, "bf16"):
                engine.backward(loss, last=False)
        found = [(m.weight.main_grad - total).abs().max() / total.abs().max() for m, total in exact.items()]
        errors.append(max(found).item())
    return tuple(errors)


def watch(total: Tensor, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    """Add up what the gradient of the weight must be, from the input and the gradient of the output as they are."""
    x = inputs[0].detach().to(torch.bfloat16).flatten(0, -2).double()

    def add(gradient: Tensor) -> None:
        total.add_(gradient.flatten(0, -2).double().t() @ x)

    output.register_hook(add)
