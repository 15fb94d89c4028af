"""The latents' own denoiser: a transformer over slots, written out; its counts and its FLOPs."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from braid.pretrain.config.schema import ModelConfig
from braid.pretrain.model.blocks import DropoutKey, rope_tables
from braid.pretrain.model.latent_denoiser import LatentDenoiser
from braid.pretrain.model.network import parameter_counts

MODEL, S, D = ModelConfig(width=32, num_layers=2, num_heads=2, cond_dim=16), 6, 5
LATENTS = torch.randn(3, S, D, generator=torch.Generator().manual_seed(1))
TIMES = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)


def denoiser(model: ModelConfig = MODEL) -> LatentDenoiser:
    network = LatentDenoiser(model, num_slots=S, latent_dim=D, seed=1).eval()
    generator = torch.Generator().manual_seed(5)
    assert not network(LATENTS, TIMES).any(), "the head starts at zero"
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network


def test_it_is_linear_blocks_and_a_modulated_head():
    network = denoiser()
    c, rope = network.time_embedding(TIMES), rope_tables(S, 16, 10000.0, LATENTS.device)
    x = LATENTS @ network.latent_input.weight.T + network.latent_input.bias
    for block in network.blocks:
        x = block(x, c, rope)
    head = network.latent_head
    shift, scale = (c @ head.adaln.weight.T + head.adaln.bias)[:, None].chunk(2, -1)
    x = F.layer_norm(x, (32,)) * head.norm.weight * (1 + scale) + shift
    found = network(LATENTS, TIMES)
    assert found.shape == LATENTS.shape and found.dtype == torch.float32
    assert torch.allclose(found, x @ head.linear.weight.T + head.linear.bias, atol=1e-4)
    later = network(LATENTS, TIMES.flip(0))
    assert not torch.allclose(later[0], found[0], atol=1e-3), "it is told the time"


def test_every_slot_sees_every_slot_and_all_learn():
    network = denoiser(replace(MODEL, dropout=0.2)).train()
    key = DropoutKey(3, torch.arange(3), torch.arange(S))
    network(LATENTS, TIMES, key).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())
    network.eval()
    changed = LATENTS.clone()
    changed[:, -1] += 1
    assert ((network(changed, TIMES) - network(LATENTS, TIMES)).abs().amax(-1) > 1e-4).all()


def test_counts_and_flops():
    network, w, c = denoiser(), 32, 16
    block = 4 * w * w + (4 * w * w + 4 * w) + (4 * w * w + w) + 2 * w + (c * 6 * w + 6 * w)
    counts = parameter_counts(network)
    assert counts["blocks"] == 2 * block and counts["heads"] == w + (2 * w * c + 2 * w) + w * D + D
    assert counts["other"] == D * w + w + 256 * c + c + c * c + c
    products = []

    def count(module, args, output):
        first = module in (network.time_embedding.input, network.latent_input)
        products.append((4 if first else 6) * module.weight.numel() * (args[0].numel() // args[0].shape[-1]))

    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(count)
    network(LATENTS[:1], TIMES[:1])
    length = 20
    assert network.training_flops(length).total * length == pytest.approx(sum(products) + 12 * 2 * w * S * S)


def test_the_published_size():
    """12 layers of width 768: the 92.1M of the backbone's blocks (arXiv 2510.18114, SEQ)."""
    with torch.device("meta"):
        network = LatentDenoiser(ModelConfig(), num_slots=64, latent_dim=32, seed=0)
    assert parameter_counts(network)["blocks"] == 92_132_352
