"""The average against a loop in float64, and the weights it is swapped for, back to the last bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from braid.parallel.engine import PlainEngine
from braid.parallel.mesh import Mesh
from braid.pretrain.training.ema import EMA


def averaged(network: nn.Module, decay: float) -> EMA:
    return EMA(PlainEngine(network, torch.optim.SGD(network.parameters()), Mesh.single()), decay)


def tensors(ema: EMA) -> dict[str, torch.Tensor]:
    """The averages by name."""
    return dict(ema.engine.named(ema.averages))


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
    ema = averaged(network, decay)
    averages = {name: p.detach().double() for name, p in network.named_parameters()}
    for step in range(1, 201):
        move(network, step)
        ema.update(step)
        d = min(decay, (1 + step) / (10 + step))
        for name, parameter in network.named_parameters():
            averages[name] = d * averages[name] + (1 - d) * parameter.detach().double()
    assert tensors(ema).keys() == averages.keys()
    for name, average in averages.items():
        torch.testing.assert_close(tensors(ema)[name].double(), average, rtol=1e-5, atol=2e-6)


def test_the_decay_is_reached_and_no_sooner() -> None:
    """On weights that stay at 1 after an average that began at 0, 1 - average is the product of the decays."""
    network = nn.Linear(1, 1)
    nn.init.zeros_(network.weight), nn.init.zeros_(network.bias)
    ema = averaged(network, 0.6)
    nn.init.ones_(network.weight)
    left = 1.0
    for step, expected in enumerate([2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 9 / 18, 10 / 19], 1):
        ema.update(step)
        left *= expected
        assert 1 - tensors(ema)["weight"].item() == pytest.approx(left, rel=1e-3)
    for step in (13, 14, 500):
        before = 1 - tensors(ema)["weight"].item()
        ema.update(step)
        assert (1 - tensors(ema)["weight"].item()) / before == pytest.approx(0.6, abs=5e-3)


def test_a_run_of_bf16_is_averaged_in_float32() -> None:
    network = module(torch.bfloat16)
    ema = averaged(network, 0.999)
    assert all(tensor.dtype == torch.float32 for tensor in tensors(ema).values())
    before = tensors(ema)["1.weight"].clone()
    with torch.no_grad():
        network[1].weight += 0.01
    ema.update(10**5)
    moved = (tensors(ema)["1.weight"] - before).abs()
    assert 0 < moved.max() < 1e-4, "a change that bf16 could not hold"


def test_the_average_is_its_own_copy() -> None:
    network = module()
    ema = averaged(network, 0.9)
    before = {name: value.clone() for name, value in tensors(ema).items()}
    move(network, 1)
    assert all(torch.equal(tensors(ema)[name], value) for name, value in before.items())


def test_applied_and_back_bit_for_bit() -> None:
    network = module()
    ema = averaged(network, 0.9)
    for step in range(1, 6):
        move(network, step)
        ema.update(step)
    trained = {name: p.detach().clone() for name, p in network.named_parameters()}
    averages = {name: value.clone() for name, value in tensors(ema).items()}
    addresses = [p.data_ptr() for p in network.parameters()]
    with pytest.raises(KeyError), ema.applied():
        for name, parameter in network.named_parameters():
            assert torch.equal(parameter, averages[name]) and not torch.equal(parameter, trained[name])
            assert parameter.requires_grad
        raise KeyError
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, trained[name]), "an error in the block changes nothing"
        assert torch.equal(tensors(ema)[name], averages[name])
    assert [p.data_ptr() for p in network.parameters()] == addresses, "the optimizer's parameters are still these"


def test_load_continues_bit_for_bit() -> None:
    network = module()
    ema = averaged(network, 0.99)
    move(network, 1)
    ema.update(1)
    twin = copy.deepcopy(network)
    other = averaged(twin, 0.99)
    handed_over = {name: value.clone() for name, value in tensors(ema).items()}
    other.engine.fill(other.averages, handed_over.__getitem__)
    for step in range(2, 9):
        for each, average in ((network, ema), (twin, other)):
            move(each, step)
            average.update(step)
    assert all(torch.equal(tensors(ema)[name], tensors(other)[name]) for name in tensors(ema))
