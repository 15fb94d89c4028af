"""The average against a loop in float64, and the weights it is swapped for, back to the last bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from braid.pretrain.training.ema import EMA


def module(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    network = nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 7), nn.LayerNorm(7)).to(dtype)
    network.register_buffer("counter", torch.zeros(1))
    return network


def move(network: nn.Module, step: int) -> None:
    """A step of training: every weight goes somewhere else."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.9999])
def test_against_a_loop_in_float64(decay: float) -> None:
    network = module()
    ema = EMA(network, decay)
    averages = {name: p.detach().double() for name, p in network.named_parameters()}
    for step in range(1, 201):
        move(network, step)
        ema.update(network, step)
        d = min(decay, (1 + step) / (10 + step))
        for name, parameter in network.named_parameters():
            averages[name] = d * averages[name] + (1 - d) * parameter.detach().double()
    assert ema.tensors.keys() == averages.keys()
    for name, average in averages.items():
        torch.testing.assert_close(ema.tensors[name].double(), average, rtol=1e-5, atol=2e-6)


def test_the_decay_is_reached_and_no_sooner() -> None:
    """On weights that stay at 1 after an average that began at 0, 1 - average is the product of the decays."""
    network = nn.Linear(1, 1)
    nn.init.zeros_(network.weight), nn.init.zeros_(network.bias)
    ema = EMA(network, 0.6)
    nn.init.ones_(network.weight)
    left = 1.0
    for step, expected in enumerate([2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 9 / 18, 10 / 19], 1):
        ema.update(network, step)
        left *= expected
        assert 1 - ema.tensors["weight"].item() == pytest.approx(left, rel=1e-3)
    for step in (13, 14, 500):
        before = 1 - ema.tensors["weight"].item()
        ema.update(network, step)
        assert (1 - ema.tensors["weight"].item()) / before == pytest.approx(0.6, abs=5e-3)


def test_a_run_of_bf16_is_averaged_in_float32() -> None:
    network = module(torch.bfloat16)
    ema = EMA(network, 0.999)
    assert all(tensor.dtype == torch.float32 for tensor in ema.tensors.values())
    before = ema.tensors["1.weight"].clone()
    with torch.no_grad():
        network[1].weight += 0.01
    ema.update(network, 10**5)
    moved = (ema.tensors["1.weight"] - before).abs()
    assert 0 < moved.max() < 1e-4, "a change that bf16 could not hold"


def test_the_average_is_its_own_copy() -> None:
    network = module()
    ema = EMA(network, 0.9)
    before = {name: value.clone() for name, value in ema.tensors.items()}
    move(network, 1)
    assert all(torch.equal(ema.tensors[name], value) for name, value in before.items())


def test_applied_and_back_bit_for_bit() -> None:
    network = module()
    ema = EMA(network, 0.9)
    for step in range(1, 6):
        move(network, step)
        ema.update(network, step)
    trained = {name: p.detach().clone() for name, p in network.named_parameters()}
    averages = {name: value.clone() for name, value in ema.tensors.items()}
    addresses = [p.data_ptr() for p in network.parameters()]
    with pytest.raises(KeyError), ema.applied(network):
        for name, parameter in network.named_parameters():
            assert torch.equal(parameter, averages[name]) and not torch.equal(parameter, trained[name])
            assert parameter.requires_grad
        raise KeyError
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, trained[name]), "an error in the block changes nothing"
        assert torch.equal(ema.tensors[name], averages[name])
    assert [p.data_ptr() for p in network.parameters()] == addresses, "the optimizer's parameters are still these"


def test_load_continues_bit_for_bit() -> None:
    network = module()
    ema = EMA(network, 0.99)
    move(network, 1)
    ema.update(network, 1)
    twin = copy.deepcopy(network)
    other = EMA(twin, 0.99)
    handed_over = {name: value.clone() for name, value in ema.tensors.items()}
    other.load(handed_over)
    for step in range(2, 9):
        for each, average in ((network, ema), (twin, other)):
            move(each, step)
            average.update(each, step)
    assert all(torch.equal(ema.tensors[name], other.tensors[name]) for name in ema.tensors)
    with pytest.raises(AssertionError):
        other.load({"another": torch.zeros(1)})
