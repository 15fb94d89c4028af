"""The start-up probe sees which way attention really looks, and leaves the model as it was."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from braid.kernels.errors import BraidError
from braid.pretrain.config.schema import ModelConfig
from braid.pretrain.model.backbone import Backbone
from braid.pretrain.model.probe import check_direction

TINY = ModelConfig(width=32, num_layers=2, num_heads=4, cond_dim=16)


def backbone(model: ModelConfig = TINY, *, causal: bool, time_conditioned: bool = True) -> Backbone:
    return Backbone(model, vocab_size=50, causal=causal, time_conditioned=time_conditioned, seed=1)


def trained(network: Backbone) -> Backbone:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("time_conditioned", [False, True])
def test_right_models_pass_fresh_or_trained(causal, time_conditioned):
    network = backbone(causal=causal, time_conditioned=time_conditioned)
    check_direction(network)
    check_direction(trained(network))
    check_direction(backbone(dataclasses.replace(TINY, dropout=0.5), causal=causal))


def test_right_models_pass_in_bfloat16():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_direction(backbone(causal=False))
        check_direction(backbone(causal=True))


def set_causal(network: Backbone, causal: bool) -> Backbone:
    for block in network.blocks:
        block.attention.causal = causal
    return network


@pytest.mark.parametrize("prepare", [lambda network: network, trained])
def test_bidirectional_model_with_causal_attention_is_refused(prepare):
    with pytest.raises(BraidError, match=r"does not see the last token[\s\S]*moves position 0 by 0 "):
        check_direction(prepare(set_causal(backbone(causal=False), True)))


@pytest.mark.parametrize("prepare", [lambda network: network, trained])
def test_causal_model_with_one_bidirectional_block_is_refused(prepare):
    network = backbone(causal=True)
    network.blocks[1].attention.causal = False
    with pytest.raises(BraidError, match=r"sees later tokens[\s\S]*moves position 0 by 0\.\d+ "):
        check_direction(prepare(network))


@pytest.mark.parametrize("causal", [False, True])
def test_model_without_attention_is_refused(causal):
    class Positionwise(nn.Module):
        def forward(self, x, rope, cache, visible):
            return x

    network = backbone(causal=causal)
    for block in network.blocks:
        block.attention = Positionwise()
    with pytest.raises(BraidError, match="does not see"):
        check_direction(network)


def test_an_off_by_one_causal_mask_is_refused():
    """Each position seeing one token ahead is the classic slip; position 0 alone would not show it."""
    network = backbone(causal=True)

    class Peeking(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, rope, cache, visible):
            return self.inner(x, rope).roll(-1, dims=1)

    network.blocks[0].attention = Peeking(network.blocks[0].attention)
    with pytest.raises(BraidError, match=r"sees later tokens[\s\S]*moves position 0 by 0 "):
        check_direction(network)


@pytest.mark.parametrize("training", [False, True])
def test_probe_leaves_no_trace(training):
    network = backbone(causal=False).train(training)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    check_direction(network)
    assert network.training is training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_compiled_model_is_probed_without_compiling():
    network = backbone(dataclasses.replace(TINY, compile=True), causal=False)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    check_direction(network)
    assert not torch._dynamo.utils.counters["stats"]
