"""Conditioning, attention, RoPE, norms and dropout of one block against independent float64 references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from braid.pretrain.config.schema import ModelConfig
from braid.pretrain.model.blocks import MLP, Attention, Block, DropoutKey, rope_tables, rotate
from braid.pretrain.model.conditioning import LayerNorm, Modulation, TimeEmbedding, modulate, sinusoid

MODEL = ModelConfig(width=32, num_layers=2, num_heads=4, cond_dim=16, dropout=0.25)
CPU = torch.device("cpu")


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter non-zero: zero gates would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def randn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_sinusoid_is_cosines_then_sines_of_the_raw_time():
    times = np.array([0.0, 0.3, 1.0])
    angles = times[:, None] / 10000.0 ** (np.arange(128) / 128)
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    np.testing.assert_allclose(sinusoid(torch.tensor(times)).numpy(), expected, atol=1e-6)


def test_time_embedding_is_float32_under_autocast():
    embedding, times = randomised(TimeEmbedding(16)), torch.tensor([0.998, 0.9985])
    plain = embedding(times)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = embedding(times)
    assert cast.dtype == torch.float32 and torch.equal(cast, plain)
    assert not torch.equal(plain[0], plain[1])

    def silu(x: np.ndarray) -> np.ndarray:
        return x / (1 + np.exp(-x))

    (w1, b1), (w2, b2) = (
        (layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy())
        for layer in (embedding.input, embedding.output)
    )
    expected = silu(silu(sinusoid(times).double().numpy() @ w1.T + b1) @ w2.T + b2)
    np.testing.assert_allclose(plain.detach().numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_layer_norm_is_float32_whatever_autocast_says(autocast):
    norm, x = randomised(LayerNorm(32)), 100 + randn(3, 5, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = norm(x)
    z = x.double().numpy()
    z = (z - z.mean(-1, keepdims=True)) / np.sqrt(z.var(-1, keepdims=True) + 1e-5) * norm.weight.detach().numpy()
    assert y.dtype == torch.float32
    np.testing.assert_allclose(y.detach().numpy(), z, atol=1e-4)


def test_modulation_gives_one_vector_per_sequence_in_order():
    adaln, c = randomised(Modulation(16, 8, 3)), randn(2, 16)
    parts = adaln(c)
    assert [part.shape for part in parts] == [(2, 1, 8)] * 3
    whole = c @ adaln.weight.T + adaln.bias
    for i, part in enumerate(parts):
        torch.testing.assert_close(part[:, 0], whole[:, 8 * i : 8 * (i + 1)])
    x = randn(2, 5, 8)
    torch.testing.assert_close(modulate(x, parts[0], parts[1])[1, 3], x[1, 3] * (1 + parts[1][1, 0]) + parts[0][1, 0])


def test_rope_is_complex_rotation_of_half_split_pairs():
    x, (cos, sin) = randn(2, 3, 7, 8), rope_tables(7, 8, 10000.0, CPU)
    pairs = x[..., :4].double().numpy() + 1j * x[..., 4:].double().numpy()
    angles = np.arange(7)[:, None] * 10000.0 ** (-np.arange(4) / 4)
    turned = pairs * np.exp(1j * angles)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(rotate(x, cos, sin).numpy(), expected, atol=1e-6)


def test_rope_scores_depend_on_distance_only():
    q, k = randn(8), randn(8, seed=2)
    tables = rope_tables(20, 8, 10000.0, CPU)
    at = [rotate(vector.expand(1, 1, 20, 8), *tables)[0, 0] for vector in (q, k)]
    torch.testing.assert_close(at[0][3] @ at[1][9], at[0][11] @ at[1][17])
    assert not torch.allclose(at[0][3] @ at[1][9], at[0][3] @ at[1][10])


@pytest.mark.parametrize("causal", [False, True])
def test_attention_against_a_float64_reference(causal):
    attention, x = randomised(Attention(32, 4, causal)), randn(2, 9, 32)
    y = attention(x, rope_tables(9, 8, 10000.0, CPU)).detach().numpy()

    w = attention.qkv.weight.detach().double().numpy().reshape(3, 4, 8, 32)
    q, k, v = np.einsum("blw,nhkw->nbhlk", x.double().numpy(), w)
    angles = np.arange(9)[:, None] * 10000.0 ** (-np.arange(4) / 4)

    def turn(u: np.ndarray) -> np.ndarray:
        pairs = (u[..., :4] + 1j * u[..., 4:]) * np.exp(1j * angles)
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    scores = np.einsum("bhlk,bhmk->bhlm", turn(q), turn(k)) / math.sqrt(8)
    if causal:
        scores[..., np.triu(np.ones((9, 9), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    heads = np.einsum("bhlm,bhmk->blhk", weights, v).reshape(2, 9, 32)
    np.testing.assert_allclose(y, heads @ attention.out.weight.detach().double().numpy().T, atol=1e-5)


def test_mlp_uses_the_tanh_form_of_gelu():
    mlp, x = randomised(MLP(8, 32)), 2 * randn(4, 8)
    p = {name: value.detach().double().numpy() for name, value in mlp.named_parameters()}
    h = x.double().numpy() @ p["input.weight"].T + p["input.bias"]
    h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    np.testing.assert_allclose(mlp(x).detach().numpy(), h @ p["output.weight"].T + p["output.bias"], atol=1e-5)


def test_block_with_zero_modulation_is_the_identity():
    block = randomised(Block(MODEL, 0, causal=False))
    nn.init.zeros_(block.adaln.weight)
    nn.init.zeros_(block.adaln.bias)
    x = randn(2, 6, 32)
    assert torch.equal(block(x, randn(2, 16), rope_tables(6, 8, 10000.0, CPU)), x)


def test_block_is_two_gated_residual_branches():
    block = randomised(Block(MODEL, 0, causal=False))
    x, c, rope = randn(2, 6, 32), randn(2, 16), rope_tables(6, 8, 10000.0, CPU)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (c @ block.adaln.weight.T + block.adaln.bias).split(32, dim=1)
    h = torch.stack([
        x[b] + gate[b] * block.attention((block.attention_norm(x[b]) * (1 + scale[b]) + shift[b])[None], rope)[0]
        for b in range(2)
    ])  # fmt: skip
    expected = torch.stack([
        h[b] + mlp_gate[b] * block.mlp(block.mlp_norm(h[b]) * (1 + mlp_scale[b]) + mlp_shift[b]) for b in range(2)
    ])  # fmt: skip
    torch.testing.assert_close(block(x, c, rope), expected, atol=1e-5, rtol=1e-5)


def dropout_key(ordinals: list[int], length: int = 6, key: int = 7) -> DropoutKey:
    return DropoutKey(key, torch.tensor(ordinals), torch.arange(length))


def test_dropout_masks_differ_by_layer_site_sample_and_key_and_by_nothing_else():
    block = Block(MODEL, 0, causal=False)
    attention, mlp = block.dropout_masks(dropout_key([3, 4, 5]), 32)
    assert attention.shape == mlp.shape == (3, 6, 32)
    alone = block.dropout_masks(dropout_key([4]), 32)[0]
    assert torch.equal(alone[0], attention[1]), "a mask does not depend on the batch"
    tail = DropoutKey(7, torch.tensor([4]), torch.arange(2, 6))
    assert torch.equal(block.dropout_masks(tail, 32)[0][0], attention[1, 2:]), "nor on how the sequence is cut"
    others = {
        "site": mlp,
        "sample": attention.roll(1, 0),
        "layer": Block(MODEL, 1, causal=False).dropout_masks(dropout_key([3, 4, 5]), 32)[0],
        "key": block.dropout_masks(dropout_key([3, 4, 5], key=8), 32)[0],
    }
    for name, other in others.items():
        agreement = (other == attention).float().mean().item()
        assert 0.5 < agreement < 0.75, f"{name}: independent masks agree on 0.625 of the places, found {agreement}"


def test_dropout_keeps_the_mean_and_the_rate():
    block = Block(MODEL, 0, causal=False)
    keep = block.dropout_masks(dropout_key(list(range(64)), length=50), 32)[0]
    assert abs(keep.float().mean().item() - 0.75) < 5 * math.sqrt(0.25 * 0.75 / keep.numel())
    dropped = block.drop(torch.ones(64, 50, 32), keep)
    assert torch.equal(dropped, keep.float() / 0.75)
    assert torch.equal(block.drop(torch.ones(3), None), torch.ones(3))
