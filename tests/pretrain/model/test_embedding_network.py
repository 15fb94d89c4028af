"""The network of embedding diffusion: its inputs, what starts at zero, precision, counts."""

import pytest
import torch

from braid.kernels.random import initial_normal
from braid.pretrain.config.schema import ModelConfig
from braid.pretrain.model.backbone import Backbone
from braid.pretrain.model.embedding_network import EmbeddingNetwork
from braid.pretrain.model.flops import training_flops
from braid.pretrain.model.network import parameter_counts
from braid.pretrain.model.probe import check_direction

MODEL = ModelConfig(width=32, num_layers=2, num_heads=2, cond_dim=16)
VOCAB, DIM = 23, 16


def build(*, randomise: bool = True, **changes) -> EmbeddingNetwork:
    network = EmbeddingNetwork(ModelConfig(**(MODEL.__dict__ | changes)), vocab_size=VOCAB, num_dims=DIM, seed=3).eval()
    if randomise:
        with torch.no_grad():
            for key, parameter in network.named_parameters():
                parameter.add_(0.2 * initial_normal(5, key, tuple(parameter.shape)))
    return network


def inputs(num: int = 3, length: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    noisy, estimates = initial_normal(1, "noisy", (num, length, DIM)), 0.1 * initial_normal(1, "x", (num, length, DIM))
    return noisy, estimates, torch.linspace(-3, 6, num, dtype=torch.float64)


def test_embeddings_have_length_one_at_the_start_and_in_use():
    network = build(randomise=False)
    assert torch.allclose(network.embedding.raw.norm(dim=-1), torch.ones(VOCAB), atol=1e-6)
    with torch.no_grad():
        network.embedding.raw.mul_(torch.linspace(0.1, 30, VOCAB)[:, None])
    assert torch.allclose(network.embedding().norm(dim=-1), torch.ones(VOCAB), atol=1e-6)
    # directions are isotropic: no mean, and the same mean square in every coordinate
    many = EmbeddingNetwork(MODEL, vocab_size=5000, num_dims=DIM, seed=3).embedding.raw
    assert many.mean(0).abs().max() < 0.015 and (many.square().mean(0) - 1 / DIM).abs().max() < 0.006


def test_the_first_logits_are_uniform_and_estimates_are_ignored_at_first():
    network = build(randomise=False)
    noisy, estimates, level = inputs()
    assert torch.equal(network(noisy, estimates, level).whole, torch.zeros(3, 6, VOCAB))
    c = network.time_embedding(level)
    assert torch.equal(network.trunk(noisy, estimates, c), network.trunk(noisy, 0 * estimates, c))
    assert not torch.equal(network.trunk(noisy, estimates, c), network.trunk(0 * noisy, estimates, c))


def test_what_enters_the_blocks():
    """W_in z + W_sc (sqrt(16) x), and nothing else."""
    network, seen = build(), []
    network.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    noisy, estimates, level = inputs()
    network(noisy, estimates, level)
    expected = noisy.double() @ network.input.weight.double().T
    expected = expected + 4 * estimates.double() @ network.estimate_input.weight.double().T
    assert torch.allclose(seen[0].double(), expected, atol=1e-5)


def test_the_level_conditions_and_carries_gradient():
    network = build()
    noisy, estimates, level = inputs()
    level.requires_grad_()
    logits = network(noisy, estimates, level).whole
    (gradient,) = torch.autograd.grad(logits.square().sum(), level)
    assert gradient.dtype == torch.float64 and (gradient != 0).all()
    with torch.no_grad():
        step = torch.tensor([0.0, 1e-2, 0.0], dtype=torch.float64)
        change = (
            network(noisy, estimates, level + step).whole.square().sum()
            - network(noisy, estimates, level - step).whole.square().sum()
        )
    assert float(change) / 2e-2 == pytest.approx(float(gradient[1]), rel=2e-2)


def test_residual_stream_and_logits_are_float32_under_autocast():
    network, seen = build(), []
    network.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits = network(*inputs()).whole
    assert logits.dtype == torch.float32 and seen == [torch.float32]
    exact = build()(*inputs()).whole
    assert torch.allclose(logits, exact, atol=0.1) and not torch.equal(logits, exact)


def test_it_is_bidirectional():
    check_direction(build(randomise=False))


def test_activation_checkpointing_changes_nothing():
    gradients = []
    for kind in ("none", "block"):
        network = build(activation_checkpointing=kind).train()
        network(*inputs()).whole.square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 20
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_counts_and_flops_against_the_backbone():
    """The blocks, the head and the time embedding are the backbone's; V x 16 and two 16 x width matrices replace the
    token embedding."""
    ours = parameter_counts(build())
    backbone = parameter_counts(Backbone(MODEL, vocab_size=VOCAB, causal=False, time_conditioned=True, seed=0))
    assert ours["blocks"] == backbone["blocks"] and ours["heads"] == backbone["heads"]
    assert ours["embedding"] == VOCAB * DIM
    assert ours["other"] == backbone["other"] + 2 * DIM * MODEL.width
    flops, plain = build().training_flops(64), training_flops(MODEL, vocab_size=VOCAB, sequence_length=64)
    assert flops.linear - plain.linear == 6 * 2 * DIM * MODEL.width
    assert flops.head - plain.head == 6 * 2 * DIM * VOCAB
    assert (flops.attention, flops.conditioning) == (plain.attention, plain.conditioning)
