"""AdamW or Muon with parameter groups, and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from braid.parallel.layers import RowEmbedding, whole_shape
from braid.parallel.mesh import Axis
from braid.pretrain.config.schema import OptimizerConfig
from braid.pretrain.objectives.base import Objective

from .apex_adam import apex_adam
from .muon import Muon


def build_optimizer(
    objective: Objective,
    config: OptimizerConfig,
    tensor: Axis | None = None,
    library: str = "torch",
    *,
    fused: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer of all parameters that are trained, in groups of one peak learning rate and weight decay. `tensor`
    is the axis that the weights are divided on; AdamW is that of `library`, `torch` or `apex`, torch's `fused` one in
    one kernel, which reads and writes everything once.

    Both are the configuration's, the decay on matrices alone (see `parameter_kinds`). Parameters whose name is, or lies
    below, a prefix in `objective.parameter_rates()` have those of the longest such prefix, whatever their kind.
    """
    own_rates = objective.parameter_rates()
    kinds = parameter_kinds(objective)
    prefixes: dict[str, str | None] = {name: _longest_prefix(name, own_rates) for name in kinds}
    assert own_rates.keys() <= set(prefixes.values()), "a rate without parameters"
    is_muon = config.name == "muon"
    groups: dict[tuple, dict] = {}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        kind, prefix = kinds[name], prefixes[name]
        house = (config.lr, config.weight_decay if kind == "matrix" else 0.0)
        peak_lr, decay = house if prefix is None else own_rates[prefix]
        settings = {"lr": peak_lr, "peak_lr": peak_lr, "weight_decay": decay} | ({"kind": kind} if is_muon else {})
        groups.setdefault(tuple(settings.values()), settings | {"params": []})["params"].append(parameter)
    common = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if is_muon:
        return Muon(groups.values(), momentum=config.momentum, tensor=tensor, **common)
    if library == "apex":
        return apex_adam()(list(groups.values()), **common)
    return torch.optim.AdamW(groups.values(), foreach=not fused, fused=fused, **common)


def parameter_kinds(module: nn.Module) -> dict[str, str]:
    """What each parameter is, by name.

    `table`: the weight of an nn.Embedding. `matrix`: a linear map, or a stack of them (experts), which is what a
    parameter of two or more dimensions called `weight` or `..._weight` holds; learned tokens [n, W] and the biases of
    experts [E, out] are called otherwise. `other`: all else.
    """
    tables = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding | RowEmbedding)}
    return {
        name: "table" if id(parameter) in tables
        else "matrix" if len(whole_shape(parameter)) >= 2 and name.endswith("weight")
        else "other"
        for name, parameter in module.named_parameters()
    }  # fmt: skip


def _longest_prefix(name: str, prefixes: dict) -> str | None:
    matching = [prefix for prefix in prefixes if f"{name}.".startswith(f"{prefix}.")]
    return max(matching, key=len, default=None)


def learning_rate_factor(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `num_steps` over its peak: linear warm-up, then the
    schedule."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    floor = config.min_lr_ratio
    match config.schedule:
        case "constant":
            return 1.0
        case "cosine":
            progress = (step + 1 - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        case "wsd":
            remaining = max(0, num_steps - step - 1)
            return floor + (1 - floor) * min(1.0, remaining / config.decay_steps)
    raise AssertionError(config.schedule)


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's learning rate: this factor of the group's own peak."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]
