"""Schedules in closed form, AdamW written out in float64, groups and clipping on the real network, and the state."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from braid.parallel.engine import PlainEngine, clip_gradients, gradient_norm
from braid.parallel.mesh import Mesh
from braid.pretrain.config.schema import ModelConfig, OptimizerConfig
from braid.pretrain.model.joint import MDiT
from braid.pretrain.training.muon import Muon
from braid.pretrain.training.optimizer import (
    build_optimizer,
    learning_rate_factor,
    parameter_kinds,
    set_learning_rate,
)

CONFIG = OptimizerConfig(lr=2e-3, warmup_steps=4, weight_decay=0.1, beta1=0.8, beta2=0.95, eps=1e-6)


class Learnt(nn.Module):
    """As much of an objective as an optimizer sees."""

    def __init__(self, network: nn.Module, **rates: tuple[float, float]) -> None:
        super().__init__()
        self.network = network
        self.rates = {name.replace("__", "."): rate for name, rate in rates.items()}

    def parameter_rates(self) -> dict[str, tuple[float, float]]:
        return self.rates


def learnt(**rates: tuple[float, float]) -> Learnt:
    model = ModelConfig(width=16, num_layers=2, num_heads=2, cond_dim=8)
    return Learnt(MDiT(model, vocab_size=11, latent_dim=4, seed=1), **rates)


def fill_gradients(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def optimizer_state(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(PlainEngine(module, optimizer, Mesh.single()).optimizer_state())


def load_state(optimizer: torch.optim.Optimizer, module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    PlainEngine(module, optimizer, Mesh.single()).load_optimizer_state(tensors.keys(), tensors.__getitem__)


def rates(config: OptimizerConfig, num_steps: int) -> list[float]:
    return [config.lr * learning_rate_factor(config, step, num_steps) for step in range(num_steps)]


def named_groups(optimizer: torch.optim.Optimizer, module: nn.Module) -> list[set[str]]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [{names[id(p)] for p in group["params"]} for group in optimizer.param_groups]


# -- schedules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "cosine", "wsd"])
def test_warm_up_is_linear_and_reaches_the_peak(schedule: str) -> None:
    config = replace(CONFIG, schedule=schedule, decay_steps=5)
    assert rates(config, 30)[:4] == pytest.approx([0.5e-3, 1e-3, 1.5e-3, 2e-3], rel=1e-12)
    assert max(rates(config, 30)) == 2e-3
    assert rates(replace(config, warmup_steps=0), 30)[0] == pytest.approx(2e-3, rel=1e-2), "no warm-up, no ramp"


def test_constant() -> None:
    assert rates(replace(CONFIG, schedule="constant"), 30)[3:] == [2e-3] * 27
    assert learning_rate_factor(CONFIG, 10**6, 30) == 1


def test_cosine() -> None:
    """Half a cosine from the peak at the end of warm-up to the floor at the last step."""
    config = replace(CONFIG, schedule="cosine", min_lr_ratio=0.25)
    found = rates(config, 24)
    for step in range(4, 24):
        phase = math.pi * (step - 3) / 20
        assert found[step] == pytest.approx(2e-3 * (0.625 + 0.375 * math.cos(phase)), rel=1e-12)
    assert found[13] == pytest.approx(2e-3 * 0.625), "half-way"
    assert found[-1] == pytest.approx(0.5e-3, rel=1e-12)
    assert learning_rate_factor(config, 1000, 24) == pytest.approx(0.25), "a run made longer does not go up again"
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


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_matrices_alone_decay(name: str) -> None:
    module = learnt()
    optimizer = build_optimizer(module, replace(CONFIG, name=name))
    assert type(optimizer) is (Muon if name == "muon" else torch.optim.AdamW)
    groups = named_groups(optimizer, module)
    assert sum(map(len, groups)) == len(set.union(*groups)) == len(list(module.parameters())), "each parameter once"
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    [decayed] = [names for names, decay in zip(groups, decays, strict=True) if decay == 0.1]
    plain = set.union(*(names for names, decay in zip(groups, decays, strict=True) if decay == 0))
    assert "network.token_embedding.weight" in plain
    assert all(name.endswith(".weight") and module.get_parameter(name).ndim == 2 for name in decayed)
    norms_and_biases = {name for name in decayed | plain if name.endswith(".bias") or "norm" in name}
    assert norms_and_biases and norms_and_biases <= plain
    expected = {"token_head.linear.weight", "blocks.0.attention.qkv.weight", "blocks.1.adaln.weight"}
    assert {f"network.{name}" for name in expected} <= decayed


class Odds(nn.Module):
    """What is not plainly a matrix, a table or a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
        self.up_weight, self.up_bias = nn.Parameter(torch.ones(2, 4, 3)), nn.Parameter(torch.ones(2, 4))
        self.tokens, self.scale = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(()))
        self.weight = nn.Parameter(torch.ones(3))
        self.frozen = nn.Linear(3, 3, bias=False).requires_grad_(False)


def test_kinds() -> None:
    """Experts are a stack of matrices, their biases are not; nor are learned tokens and the weight of a norm."""
    expected = {"inner.0.weight": "table", "inner.1.weight": "matrix", "inner.1.bias": "other", "up_weight": "matrix"}
    expected |= dict.fromkeys(("up_bias", "tokens", "scale", "weight"), "other") | {"frozen.weight": "matrix"}
    assert parameter_kinds(Odds()) == expected
    assert parameter_kinds(nn.Embedding(5, 3)) == {"weight": "table"}


def test_muon_knows_the_kinds_and_leaves_the_frozen_alone() -> None:
    module = Learnt(Odds())
    optimizer = build_optimizer(module, replace(CONFIG, name="muon", momentum=0.8))
    kinds = {
        group["kind"]: names
        for group, names in zip(optimizer.param_groups, named_groups(optimizer, module), strict=True)
    }
    assert kinds["matrix"] == {"network.inner.1.weight", "network.up_weight"}
    assert kinds["table"] == {"network.inner.0.weight"}
    assert {"network.up_bias", "network.tokens", "network.scale"} <= kinds["other"]
    assert all(group["momentum"] == 0.8 and group["betas"] == (0.8, 0.95) for group in optimizer.param_groups)
    assert not any("frozen" in name for name in set.union(*kinds.values()))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_objective_may_have_rates_of_its_own(name: str) -> None:
    """The longest prefix counts, whole components of a name only, whatever the kind; the schedule's shape is shared."""
    own = {
        "network__blocks__1": (0.5, 0.01),
        "network__token_embedding": (0.1, 0.0),
        "network__blocks__1__mlp": (0.2, 0.3),
    }
    module = learnt(**own)
    module.network.blocks_1 = nn.Linear(2, 2)
    optimizer = build_optimizer(module, replace(CONFIG, name=name))
    found = {
        parameter: (group["peak_lr"], group["weight_decay"])
        for group, names in zip(optimizer.param_groups, named_groups(optimizer, module), strict=True)
        for parameter in names
    }
    assert found.keys() == dict(module.named_parameters()).keys()
    for parameter, rate in found.items():
        if parameter.startswith("network.blocks.1.mlp."):
            assert rate == (0.2, 0.3), parameter
        elif parameter.startswith("network.blocks.1."):
            assert rate == (0.5, 0.01), parameter
        elif parameter == "network.token_embedding.weight":
            assert rate == (0.1, 0.0)
        else:
            assert rate[0] == CONFIG.lr and rate[1] in (0.0, 0.1), parameter
    set_learning_rate(optimizer, 0.25)
    assert all(group["lr"] == 0.25 * group["peak_lr"] for group in optimizer.param_groups)
    set_learning_rate(optimizer, 1.0)
    assert {group["lr"] for group in optimizer.param_groups} == {CONFIG.lr, 0.5, 0.1, 0.2}


def test_a_rate_of_nothing_is_a_mistake() -> None:
    with pytest.raises(AssertionError, match="a rate without parameters"):
        build_optimizer(learnt(network__token_embeddin=(0.1, 0.0)), CONFIG)


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
    module = learnt()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = build_optimizer(module, CONFIG)
    gradients: dict[str, list[torch.Tensor]] = {name: [] for name in before}
    for step in range(8):
        fill_gradients(module, step)
        for name, parameter in module.named_parameters():
            gradients[name].append(parameter.grad.clone())
        set_learning_rate(optimizer, learning_rate_factor(CONFIG, step, 8))
        optimizer.step()
    plain = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    for name, parameter in module.named_parameters():
        decay = 0.0 if id(parameter) in plain else 0.1
        expected = adamw(before[name], gradients[name], rates(CONFIG, 8), decay)
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(parameter.detach(), before[name])


# -- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_state_by_name_continues_bit_for_bit(name: str) -> None:
    config = replace(CONFIG, name=name)
    module = learnt(network__token_head=(0.1, 0.0))
    optimizer = build_optimizer(module, config)
    for step in range(3):
        fill_gradients(module, step)
        optimizer.step()
    tensors = {name: value.clone() for name, value in optimizer_state(optimizer, module).items()}
    names, kinds = dict(module.named_parameters()), parameter_kinds(module)
    states = {
        name: ("step", "momentum")
        if config.name == "muon" and kinds[name] != "other"
        else ("step", "exp_avg", "exp_avg_sq")
        for name in names
    }
    assert tensors.keys() == {f"{name}/{key}" for name in names for key in states[name]}
    assert all(tensors[f"{name}/{states[name][1]}"].shape == parameter.shape for name, parameter in names.items())

    twin = learnt()  # grouped otherwise: the state is by name
    twin.load_state_dict(copy.deepcopy(module.state_dict()))
    fresh = build_optimizer(twin, config)
    load_state(fresh, twin, tensors)
    for group in (*optimizer.param_groups, *fresh.param_groups):
        group["lr"] = config.lr
        group["weight_decay"] = 0.0
    handed_over = {name: value.clone() for name, value in tensors.items()}
    for step in range(3, 6):
        for each, steps in ((module, optimizer), (twin, fresh)):
            fill_gradients(each, step)
            steps.step()
    assert all(torch.equal(tensors[name], value) for name, value in handed_over.items()), "it works on copies"
    for (name, parameter), other in zip(module.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    continued, found = optimizer_state(optimizer, module), optimizer_state(fresh, twin)
    assert continued.keys() == found.keys() and all(torch.equal(continued[name], found[name]) for name in found)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_before_the_first_step_there_is_no_state(name: str) -> None:
    module = learnt()
    optimizer = build_optimizer(module, replace(CONFIG, name=name))
    assert optimizer_state(optimizer, module) == {}
    fill_gradients(module, 0)
    optimizer.step()
    assert len(optimizer_state(optimizer, module)) >= 2 * len(list(module.parameters()))
    load_state(optimizer, module, {})
    assert optimizer_state(optimizer, module) == {}, "what was there is gone"
    optimizer.step()
    assert optimizer_state(optimizer, module)["network.token_head.linear.bias/step"] == 1


# -- clipping -------------------------------------------------------------------------------------------------------


def test_the_norm_is_that_of_all_gradients_laid_end_to_end() -> None:
    module = learnt()
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
    module = learnt()
    fill_gradients(module, 7)
    next(module.parameters()).grad.view(-1)[5] = value
    assert not math.isfinite(gradient_norm(list(module.parameters())).item())
