"""Layers in fp8: what they leave alone everywhere, and on a GPU that they learn as bf16 does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from braid.pretrain.config.schema import ModelConfig
from braid.pretrain.model.backbone import Backbone
from braid.pretrain.model.fp8 import FP8Linear, use_fp8

MODEL = ModelConfig(width=128, num_layers=2, num_heads=4, cond_dim=32)


def backbone(device="cpu", **model):
    with torch.device(device):
        network = Backbone(replace(MODEL, **model), vocab_size=64, causal=False, time_conditioned=True, seed=1)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draws).to(device))
    return network


def logits(network, device="cpu"):
    tokens = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(1)).to(device)
    return network(tokens, torch.full((2,), 0.5, device=device)).logits


def test_the_layers_of_attention_and_mlp_are_replaced_and_nothing_else_changes():
    network, plain = backbone(), backbone()
    use_fp8(network)
    replaced = {name for name, module in network.named_modules() if isinstance(module, FP8Linear)}
    layers = ("attention.qkv", "attention.out", "mlp.input", "mlp.output")
    assert replaced == {f"blocks.{index}.{layer}" for index in range(2) for layer in layers}
    assert list(network.state_dict()) == list(plain.state_dict()), "a checkpoint does not know of fp8"
    assert [name for name, _ in network.named_parameters()] == [name for name, _ in plain.named_parameters()]
    with torch.no_grad():
        assert torch.equal(logits(network), logits(plain))
    assert torch.equal(logits(network.eval()), logits(plain.eval())), "sampling and validation are not in fp8"


def test_parameters_are_those_of_the_layer():
    whole = nn.Linear(16, 32, bias=False)
    layer = FP8Linear(whole)
    assert layer.weight is whole.weight and layer.bias is None


@pytest.mark.gpu
@pytest.mark.parametrize("recomputation", ["none", "block"])
def test_gradients_are_those_of_bf16_but_for_rounding(recomputation):
    """Three bits of mantissa in products: a few percent of a tensor's norm. Recomputation changes nothing."""
    engine = pytest.importorskip("transformer_engine.pytorch")
    if not engine.is_fp8_available():
        pytest.skip("the GPU has no fp8")
    networks = [backbone("cuda", activation_checkpointing=recomputation) for _ in range(2)]
    use_fp8(networks[1])
    for network in networks:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = logits(network.train(), "cuda").float().square().mean()
        loss.backward()
    for (name, plain), found in zip(networks[0].named_parameters(), networks[1].parameters(), strict=True):
        assert found.grad.dtype == torch.float32
        similarity = torch.cosine_similarity(plain.grad.flatten(), found.grad.flatten(), 0)
        assert similarity > 0.97, name
