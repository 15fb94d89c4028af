"""Schedules in closed form, AdamW written out in float64, groups and clipping on the real network, and the state."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from braid.pretrain.config.schema import ModelConfig, OptimizerConfig
from braid.pretrain.model.backbone import Backbone
from braid.pretrain.training.optimizer import (
    build_optimizer,
    clip_gradients,
    gradient_norm,
    learning_rate,
    load_optimizer_tensors,
    optimizer_tensors,
)

CONFIG = OptimizerConfig(lr=2e-3, warmup_steps=4, weight_decay=0.1, beta1=0.8, beta2=0.95, eps=1e-6)


def network() -> Backbone:
    model = ModelConfig(width=16, num_layers=2, num_heads=2, cond_dim=8)
    return Backbone(model, vocab_size=11, causal=False, time_conditioned=True, latent_dim=4, seed=1)


def fill_gradients(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def rates(config: OptimizerConfig, num_steps: int) -> list[float]:
    return [learning_rate(config, step, num_steps) for step in range(num_steps)]


# -- schedules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_warm_up_is_linear_and_reaches_the_peak(schedule: str) -> None:
    config = replace(CONFIG, schedule=schedule, decay_steps=5)
    assert rates(config, 30)[:4] == pytest.approx([0.5e-3, 1e-3, 1.5e-3, 2e-3], rel=1e-12)
    assert max(rates(config, 30)) == 2e-3
    assert rates(replace(config, warmup_steps=0), 30)[0] == pytest.approx(2e-3, rel=1e-2), "no warm-up, no ramp"


def test_constant() -> None:
    assert rates(replace(CONFIG, schedule="constant"), 30)[3:] == [2e-3] * 27
    assert learning_rate(CONFIG, 10**6, 30) == 2e-3


def test_cosine() -> None:
    """Half a cosine from the peak at the end of warm-up to the floor at the last step."""
    config = replace(CONFIG, schedule="cosine", min_lr_ratio=0.25)
    found = rates(config, 24)
    for step in range(4, 24):
        phase = math.pi * (step - 3) / 20
        assert found[step] == pytest.approx(2e-3 * (0.625 + 0.375 * math.cos(phase)), rel=1e-12)
    assert found[13] == pytest.approx(2e-3 * 0.625), "half-way"
    assert found[-1] == pytest.approx(0.5e-3, rel=1e-12)
    assert learning_rate(config, 1000, 24) == pytest.approx(0.5e-3), "a run made longer does not go up again"
    assert rates(replace(config, min_lr_ratio=0.0), 24)[-1] == pytest.approx(0, abs=1e-15)
    assert rates(replace(config, warmup_steps=24), 24)[-1] == 2e-3, "all warm-up"


def test_wsd() -> None:
    """The peak up to `decay_steps` before the end, then a straight line to the floor at the last step."""
    config = replace(CONFIG, schedule="wsd", decay_steps=5, min_lr_ratio=0.1)
    found = rates(config, 20)
    assert found[3:15] == [2e-3] * 12
    expected = [2e-3 * (1 - 0.9 * part) for part in (0.2, 0.4, 0.6, 0.8, 1.0)]
    assert found[15:] == pytest.approx(expected, rel=1e-12)
    assert rates(replace(config, decay_steps=16), 20)[3:5] == pytest.approx([2e-3, 2e-3 * (1 - 0.9 / 16)])
    assert rates(replace(config, decay_steps=1), 20)[-2:] == pytest.approx([2e-3, 2e-4])


# -- groups and steps -----------------------------------------------------------------------------------------------


def test_matrices_alone_decay() -> None:
    module = network()
    optimizer = build_optimizer(module, CONFIG)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    decayed, plain = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert sorted(decayed + plain) == sorted(names.values()), "each parameter once"
    assert "token_embedding.weight" in plain
    assert all(name.endswith(".weight") and module.get_parameter(name).ndim == 2 for name in decayed)
    norms_and_biases = [name for name in names.values() if name.endswith(".bias") or "norm" in name]
    assert norms_and_biases and set(norms_and_biases) <= set(plain)
    assert {"token_head.linear.weight", "blocks.0.attention.qkv.weight", "blocks.1.adaln.weight"} <= set(decayed)


def test_an_embedding_inside_another_module_is_found() -> None:
    module = nn.ModuleDict({"a": nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2, bias=False))})
    decayed, plain = build_optimizer(module, CONFIG).param_groups
    assert [p.shape for p in decayed["params"]] == [(2, 3)] and [p.shape for p in plain["params"]] == [(5, 3)]
    [only] = build_optimizer(nn.Embedding(5, 3), CONFIG).param_groups
    assert only["weight_decay"] == 0.0


def adamw(weight: torch.Tensor, gradients: list[torch.Tensor], rates: list[float], decay: float) -> torch.Tensor:
    """Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, in float64."""
    weight, first, second = weight.double(), 0.0, 0.0
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        gradient = gradient.double()
        first = CONFIG.beta1 * first + (1 - CONFIG.beta1) * gradient
        second = CONFIG.beta2 * second + (1 - CONFIG.beta2) * gradient**2
        unbiased = first / (1 - CONFIG.beta1**step), second / (1 - CONFIG.beta2**step)
        weight = weight * (1 - rate * decay) - rate * unbiased[0] / (unbiased[1].sqrt() + CONFIG.eps)
    return weight


def test_steps_are_those_of_adamw() -> None:
    module = network()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = build_optimizer(module, CONFIG)
    gradients: dict[str, list[torch.Tensor]] = {name: [] for name in before}
    for step in range(8):
        fill_gradients(module, step)
        for name, parameter in module.named_parameters():
            gradients[name].append(parameter.grad.clone())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(CONFIG, step, 8)
        optimizer.step()
    plain = {id(p) for p in optimizer.param_groups[1]["params"]}
    for name, parameter in module.named_parameters():
        decay = 0.0 if id(parameter) in plain else 0.1
        expected = adamw(before[name], gradients[name], rates(CONFIG, 8), decay)
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(parameter.detach(), before[name])


# -- state ----------------------------------------------------------------------------------------------------------


def test_the_state_by_name_continues_bit_for_bit() -> None:
    module = network()
    optimizer = build_optimizer(module, CONFIG)
    for step in range(3):
        fill_gradients(module, step)
        optimizer.step()
    tensors = {name: value.clone() for name, value in optimizer_tensors(optimizer, module).items()}
    names = dict(module.named_parameters())
    assert tensors.keys() == {f"{name}/{key}" for name in names for key in ("step", "exp_avg", "exp_avg_sq")}
    assert all(tensors[f"{name}/exp_avg"].shape == parameter.shape for name, parameter in names.items())

    twin = network()
    twin.load_state_dict(copy.deepcopy(module.state_dict()))
    fresh = build_optimizer(twin, CONFIG)
    load_optimizer_tensors(fresh, twin, tensors)
    handed_over = {name: value.clone() for name, value in tensors.items()}
    for step in range(3, 6):
        for each, steps in ((module, optimizer), (twin, fresh)):
            fill_gradients(each, step)
            steps.step()
    assert all(torch.equal(tensors[name], value) for name, value in handed_over.items()), "it works on copies"
    for (name, parameter), other in zip(module.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    continued, found = optimizer_tensors(optimizer, module), optimizer_tensors(fresh, twin)
    assert continued.keys() == found.keys() and all(torch.equal(continued[name], found[name]) for name in found)


def test_before_the_first_step_there_is_no_state() -> None:
    module = network()
    optimizer = build_optimizer(module, CONFIG)
    assert optimizer_tensors(optimizer, module) == {}
    load_optimizer_tensors(optimizer, module, {})
    fill_gradients(module, 0)
    optimizer.step()
    assert len(optimizer_tensors(optimizer, module)) == 3 * len(list(module.parameters()))


# -- clipping -------------------------------------------------------------------------------------------------------


def test_the_norm_is_that_of_all_gradients_laid_end_to_end() -> None:
    module = network()
    fill_gradients(module, 7)
    parameters = list(module.parameters())
    parameters[3].grad = None
    together = torch.cat([p.grad.double().flatten() for p in parameters if p.grad is not None])
    expected = together.square().sum().sqrt().item()
    norm = gradient_norm(parameters)
    assert norm.dtype == torch.float32 and norm.shape == () and norm.item() == pytest.approx(expected, rel=1e-6)

    for clip_norm in (0.0, expected * 2):
        before = [None if p.grad is None else p.grad.clone() for p in parameters]
        clip_gradients(parameters, norm, clip_norm)
        for parameter, gradient in zip(parameters, before, strict=True):
            assert parameter.grad is gradient is None or torch.equal(parameter.grad, gradient), "below it: untouched"
    clip_gradients(parameters, norm, 0.5)
    for parameter, gradient in zip(parameters, before, strict=True):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient * (0.5 / expected), rtol=1e-5, atol=0)
    assert gradient_norm(parameters).item() == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_number_shows_in_the_norm(value: float) -> None:
    module = network()
    fill_gradients(module, 7)
    next(module.parameters()).grad.view(-1)[5] = value
    assert not math.isfinite(gradient_norm(list(module.parameters())).item())
