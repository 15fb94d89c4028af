"""The joint denoiser of LADD: size to the unit, the whole network against float64, positions, times, dropout."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from braid.pretrain.config.schema import ModelConfig
from braid.pretrain.model.blocks import DropoutKey
from braid.pretrain.model.joint_attention import JointDenoiser
from braid.pretrain.model.network import parameter_counts
from braid.pretrain.model.probe import check_direction

TINY = ModelConfig(width=32, num_layers=3, num_heads=4, cond_dim=16)
V, L, S, D, O = 50, 9, 5, 6, 7


def denoiser(model: ModelConfig = TINY, *, nonzero: bool = True, **changes) -> JointDenoiser:
    """A tiny network; `nonzero` shifts every parameter at random, because zero gates and heads would hide errors."""
    settings = dict(vocab_size=V, num_slots=S, latent_dim=D, latent_outputs=O, latent_positions="rope",
                    times="latents", masked_latents=True, seed=1) | changes  # fmt: skip
    network = JointDenoiser(model, **settings)
    if nonzero:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return network


def inputs(batch: int = 3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    tokens, latents = (
        torch.randint(0, V, (batch, L), generator=generator),
        torch.randn(batch, S, D, generator=generator),
    )
    return tokens, latents, torch.rand(batch, generator=generator), torch.rand(batch, generator=generator)


def test_size_b_has_the_published_number_of_parameters_in_its_blocks():
    w, c, vocab = 768, 128, 151_670
    with torch.device("meta"):
        network = denoiser(ModelConfig(), nonzero=False, vocab_size=vocab, num_slots=64, latent_dim=32,
                           latent_outputs=32, masked_latents=False)  # fmt: skip
    stream = (
        (3 * w * w + w * w)  # attention, no biases
        + (4 * w * w + 4 * w) + (4 * w * w + w)  # MLP with biases
        + 2 * w  # two norms, weights only
        + (c * 6 * w + 6 * w)  # adaLN
    )  # fmt: skip
    counts = parameter_counts(network)
    assert counts["blocks"] == 12 * 2 * stream == 184_264_704
    assert f"{counts['blocks'] / 1e6:.2f}M" == "184.26M"
    assert counts["embedding"] == vocab * w
    head = w + (c * 2 * w + 2 * w)
    assert counts["heads"] == (head + vocab * w + vocab) + (head + 32 * w + 32)
    time_embedding = (256 * c + c) + (c * c + c)
    assert counts["other"] == 2 * time_embedding + (32 * 4 * w + 4 * w) + (4 * w * w + w)


def test_slot_embedding_and_mask_are_counted():
    plain, more = (
        parameter_counts(denoiser(nonzero=False, latent_positions=positions, masked_latents=masked))["other"]
        for positions, masked in (("rope", False), ("learned", True))
    )
    assert more - plain == S * 32 + D


def test_parameter_names_are_a_contract_with_checkpoints():
    port = ["norm.weight", "adaln.weight", "adaln.bias", "linear.weight", "linear.bias"]
    mlp = ["input.weight", "input.bias", "output.weight", "output.bias"]
    block = ["adaln.weight", "adaln.bias", "attention_norm.weight", "attention.qkv.weight", "attention.out.weight"]
    block += ["mlp_norm.weight", *(f"mlp.{name}" for name in mlp)]
    expected = ["slot_embedding", "latent_mask", "token_embedding.weight"]
    expected += [f"{part}.{name}" for part in ("latent_input", "token_time", "latent_time") for name in mlp]
    expected += [f"blocks.{i}.{stream}.{name}" for i in range(3) for stream in ("tokens", "latents") for name in block]
    expected += [f"{head}.{name}" for head in ("token_head", "latent_head") for name in port]
    assert list(denoiser(latent_positions="learned").state_dict()) == expected


def test_first_prediction_is_uniform_and_initial_values_follow_the_rules():
    network = denoiser(nonzero=False, latent_positions="learned", num_slots=200, latent_dim=8)
    tokens, _, times, latent_times = inputs()
    prediction = network(tokens, torch.randn(3, 200, 8), times, latent_times)
    assert prediction.logits.shape == (3, L, V) and prediction.latents.shape == (3, 200, O)
    assert not prediction.logits.any() and not prediction.latents.any()
    assert not network.latent_mask.any()
    assert network.slot_embedding.std().item() == pytest.approx(0.02, rel=0.05)
    assert network.latent_input.input.weight.std().item() == pytest.approx(1 / math.sqrt(3 * 8), rel=0.1)
    with torch.device("meta"):
        assert denoiser(nonzero=False).token_embedding.weight.is_meta


def reference(network: JointDenoiser, tokens, latents, token_times, latent_times) -> tuple[np.ndarray, np.ndarray]:
    """The whole network in float64 numpy, written from the specification."""
    p = {name: value.detach().double().numpy() for name, value in network.named_parameters()}
    w, heads = network.config.width, network.config.num_heads
    k, length = w // heads, tokens.shape[1]

    def silu(x):
        return x / (1 + np.exp(-x))

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0)

    def norm(x, name):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p[f"{name}.weight"]

    def adaln(c, name, count):
        return np.split(linear(c, name)[:, None, :], count, axis=-1)

    def time_vector(times, name):
        angles = times[:, None] * np.exp(-math.log(10000) * np.arange(128) / 128)
        return linear(
            silu(linear(np.concatenate([np.cos(angles), np.sin(angles)], -1), f"{name}.input")), f"{name}.output"
        )

    def head(x, c, name):
        shift, scale = adaln(c, f"{name}.adaln", 2)
        return linear(norm(x, f"{name}.norm") * (1 + scale) + shift, f"{name}.linear")

    told = {"none": (0, 0), "latents": (0, 1), "both": (1, 1)}[network.times]
    c = silu(time_vector(told[0] * token_times, "token_time") + time_vector(told[1] * latent_times, "latent_time"))
    x = p["token_embedding.weight"][tokens]
    y = linear(silu(linear(latents, "latent_input.input")), "latent_input.output")
    positions = np.arange(length + y.shape[1])
    if network.latent_positions == "learned":
        y, positions = y + p["slot_embedding"], np.where(positions < length, positions, 0)
    turn = np.exp(1j * positions[:, None] / 10000.0 ** (np.arange(k // 2) / (k // 2)))
    for i in range(network.config.num_layers):
        streams, queries, keys, values = {"tokens": x, "latents": y}, [], [], []
        modulation = {name: adaln(c, f"blocks.{i}.{name}.adaln", 6) for name in streams}
        for name, h in streams.items():
            shift, scale = modulation[name][:2]
            qkv = linear(norm(h, f"blocks.{i}.{name}.attention_norm") * (1 + scale) + shift,
                         f"blocks.{i}.{name}.attention.qkv")  # fmt: skip
            for part, list_ in zip(np.split(qkv, 3, axis=-1), (queries, keys, values), strict=True):
                list_.append(part.reshape(*part.shape[:2], heads, k))
        q, key, v = (np.concatenate(part, axis=1) for part in (queries, keys, values))
        q, key = ((t[..., : k // 2] + 1j * t[..., k // 2 :]) * turn[:, None] for t in (q, key))
        scores = np.einsum("bnhk,bmhk->bhnm", q, np.conj(key)).real / math.sqrt(k)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("bhnm,bmhk->bnhk", scores / scores.sum(-1, keepdims=True), v).reshape(len(x), -1, w)
        mixes = {"tokens": mixed[:, :length], "latents": mixed[:, length:]}
        for name, h in streams.items():
            _, _, gate, shift, scale, mlp_gate = modulation[name]
            h = h + gate * linear(mixes[name], f"blocks.{i}.{name}.attention.out")
            hidden = linear(
                norm(h, f"blocks.{i}.{name}.mlp_norm") * (1 + scale) + shift, f"blocks.{i}.{name}.mlp.input"
            )
            hidden = 0.5 * hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
            streams[name] = h + mlp_gate * linear(hidden, f"blocks.{i}.{name}.mlp.output")
        x, y = streams["tokens"], streams["latents"]
    return head(x, c, "token_head"), head(y, c, "latent_head")


@pytest.mark.parametrize("times", ["none", "latents", "both"])
@pytest.mark.parametrize("positions", ["rope", "learned"])
def test_forward_is_the_specification_in_float64(positions, times):
    network, given = denoiser(latent_positions=positions, times=times), inputs()
    prediction = network(*given)
    logits, latents = reference(network, *(tensor.double().numpy() if tensor.is_floating_point() else tensor.numpy()
                                           for tensor in given))  # fmt: skip
    for ours, theirs in ((prediction.logits, logits), (prediction.latents, latents)):
        assert ours.dtype == torch.float32
        assert np.abs(ours.detach().numpy() - theirs).max() < 2e-5 * np.abs(theirs).max()


def test_both_streams_see_each_other_and_themselves():
    network, (tokens, latents, *times) = denoiser(), inputs(1)
    base = network(tokens, latents, *times)
    other_tokens, other_latents = tokens.clone(), latents.clone()
    other_tokens[0, -1] = (tokens[0, -1] + 1) % V
    other_latents[0, -1] += 1
    for changed in (network(other_tokens, latents, *times), network(tokens, other_latents, *times)):
        for before, after in ((base.logits, changed.logits), (base.latents, changed.latents)):
            assert (before - after).abs().amax(-1).min() > 1e-5, "every position and slot moves"
    check_direction(network)


def test_learned_slots_know_their_place_by_their_embedding_alone():
    """Without the embeddings slots are a set: exchanging two leaves the tokens as they were. Under `rope` not so."""
    tokens, latents, *times = inputs()
    swapped = latents.clone()
    swapped[:, [0, 3]] = latents[:, [3, 0]]
    learned = denoiser(latent_positions="learned")
    with torch.no_grad():
        learned.slot_embedding.zero_()
    assert torch.allclose(learned(tokens, latents, *times).logits, learned(tokens, swapped, *times).logits, atol=1e-4)
    rope = denoiser()
    assert not torch.allclose(rope(tokens, latents, *times).logits, rope(tokens, swapped, *times).logits, atol=1e-2)


def test_dropout_is_counter_based_in_both_streams_and_recomputed():
    model = dataclasses.replace(TINY, dropout=0.3)
    given = inputs()
    key = DropoutKey(7, torch.arange(3), torch.arange(L))
    results = []
    for checkpointing in ("none", "block"):
        network = denoiser(dataclasses.replace(model, activation_checkpointing=checkpointing)).train()
        prediction = network(*given, key)
        (prediction.logits.square().sum() + prediction.latents.square().sum()).backward()
        results.append([prediction.logits.detach(), *(p.grad for p in network.parameters() if p.grad is not None)])
    for once, again in zip(*results, strict=True):
        assert torch.equal(once, again)
    alone = network(*(tensor[1:2] for tensor in given), DropoutKey(7, torch.tensor([1]), torch.arange(L)))
    assert torch.allclose(alone.logits, results[0][0][1:2], atol=1e-4)
    block = network.blocks[0]
    tokens, slots = block.dropout_masks(key, 32, S)
    both = block.tokens.dropout_masks(DropoutKey(7, torch.arange(3), torch.arange(L + S)), 32)
    for part, whole in zip(zip(tokens, slots, strict=True), both, strict=True):
        assert torch.equal(torch.cat(part, 1), whole), "slots are the positions after the tokens"
    assert not torch.allclose(network.eval()(*given).logits, results[0][0], atol=1e-2)


def test_training_flops_are_six_for_every_use_of_a_weight():
    """Multiplications of all linear layers counted by hooks, six FLOPs each, and of the two attention products."""
    network, given = denoiser(), inputs(1)
    products, ports = [0], []

    def count(module, args, output):
        factor = 4 if module in ports else 6
        products[0] += factor * module.weight.numel() * (args[0].numel() // args[0].shape[-1])

    ports += [network.latent_input.input, network.token_time.input, network.latent_time.input]
    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(count)
    _ = network(*given).logits
    attention = 12 * 3 * 32 * (L + S) ** 2
    flops = network.training_flops(L)
    assert flops.total * L == pytest.approx(products[0] + attention)
    assert flops.head * L == 6 * V * 32 * L and flops.attention * L == pytest.approx(attention)
