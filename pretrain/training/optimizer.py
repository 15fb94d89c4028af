"""AdamW with parameter groups, the learning-rate schedule, clipping, and the optimizer's state by parameter name."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from braid.pretrain.config.schema import OptimizerConfig


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Decoupled weight decay on matrices only: never on embeddings, biases, norms or vectors."""
    embeddings = {
        f"{prefix}.{name}" if prefix else name
        for prefix, child in module.named_modules()
        if isinstance(child, nn.Embedding)
        for name, _ in child.named_parameters(recurse=False)
    }
    decayed, plain = [], []
    for name, parameter in module.named_parameters():
        (decayed if parameter.ndim >= 2 and name not in embeddings else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        foreach=True,
    )


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) of `num_steps`: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    floor = config.min_lr_ratio
    match config.schedule:
        case "constant":
            return config.lr
        case "cosine":
            progress = (step + 1 - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
            return config.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
        case "wsd":
            remaining = max(0, num_steps - step - 1)
            return config.lr * (floor + (1 - floor) * min(1.0, remaining / config.decay_steps))
    raise AssertionError(config.schedule)


def gradient_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Global L2 norm over every gradient, float32 scalar."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip_gradients(parameters: list[nn.Parameter], norm: Tensor, clip_norm: float) -> None:
    """Scale gradients so that their global norm is at most `clip_norm` (0: leave them)."""
    if clip_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)


def optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state keyed by `<parameter name>/<state name>`, whatever the grouping."""
    return {
        f"{name}/{key}": value
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`; the step counters stay on the CPU where AdamW keeps them."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, state = key.rsplit("/", 1)
        by_name.setdefault(name, {})[state] = value
    for name, parameter in module.named_parameters():
        optimizer.state[parameter] = {
            key: value.clone() if key == "step" else value.to(parameter.device, copy=True)
            for key, value in by_name.get(name, {}).items()
        }
