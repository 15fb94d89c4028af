"""ELF's network: published sizes, an independent float64 forward pass, what attends to what, initial values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from braid.kernels.random import initial_normal
from braid.pretrain.config.schema import ModelConfig
from braid.pretrain.model.elf_network import ELFNetwork, RMSNorm
from braid.pretrain.model.network import parameter_counts
from braid.pretrain.model.probe import check_direction

TINY = ModelConfig(width=24, num_layers=2, num_heads=3)
V, D, BOTTLENECK, B, L = 13, 6, 5, 3, 7


def build(model: ModelConfig = TINY, *, randomise: bool = True, seed: int = 3) -> ELFNetwork:
    network = ELFNetwork(model, vocab_size=V, latent_dim=D, bottleneck=BOTTLENECK, seed=seed)
    if randomise:  # zero heads and norms of 1 hide errors
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.add_(0.2 * initial_normal(5, name, tuple(parameter.shape)))
    return network.eval()


def inputs(seed: int = 0) -> list[torch.Tensor]:
    """z, estimate, flow times, guidance, decode, valid: one row is padded, one decodes."""
    generator = torch.Generator().manual_seed(seed)
    z, estimate = torch.randn(2, B, L, D, generator=generator)
    valid = torch.ones(B, L, dtype=torch.bool)
    valid[1, 5:] = False
    return [z, estimate, torch.tensor([0.3, 0.9, 1.0]), torch.tensor([1.0, 3.0, 0.5]), torch.arange(B) == 2, valid]


@pytest.mark.parametrize(
    ("layers", "width", "heads", "total"),
    [(12, 768, 12, 104_594_304), (24, 1056, 16, 342_554_400), (32, 1280, 16, 652_117_696)],
    ids=["ELF-B", "ELF-M", "ELF-L"],
)
def test_the_published_parameter_counts(layers, width, heads, total):
    """104.59M, 342.55M and 652.12M at V = 32128, D = 512."""
    with torch.device("meta"):
        model = ModelConfig(width=width, num_layers=layers, num_heads=heads)
        network = ELFNetwork(model, vocab_size=32128, latent_dim=512, bottleneck=128, seed=0)
    counts = parameter_counts(network)
    assert counts["total"] == total
    inner = width * 8 // 3
    block = 4 * width**2 + 4 * width + 2 * width + 2 * (width // heads) + 3 * width * inner + 2 * inner + width
    assert counts["blocks"] == layers * block and counts["embedding"] == 0
    decode_head = width * 512 + 512 + 512 * 32128 + 32128
    assert counts["heads"] == decode_head + width + width * 512 + 512


def reference(network: ELFNetwork, z, estimate, tau, w, decode, valid) -> tuple[np.ndarray, np.ndarray]:
    """The forward pass written out in NumPy, float64, one sequence and one head at a time."""
    parameters = {name: p.detach().double().numpy() for name, p in network.named_parameters()}
    heads, width = network.config.num_heads, network.config.width
    k = width // heads

    def linear(x, name):
        y = x @ parameters[f"{name}.weight"].T
        return y + parameters[f"{name}.bias"] if f"{name}.bias" in parameters else y

    def rms(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * parameters[f"{name}.weight"]

    def silu(x):
        return x / (1 + np.exp(-x))

    def embedding(scalar, name):
        angles = scalar / 10000 ** (np.arange(128) / 128)
        return linear(silu(linear(np.concatenate([np.cos(angles), np.sin(angles)]), f"{name}.input")), f"{name}.output")

    def rotated(x):  # [12 + L, K], the first 12 stay
        turned = x.copy()
        for position in range(len(x) - 12):
            for i in range(k // 2):
                angle = position / 10000 ** (2 * i / k)
                a, b = x[12 + position, 2 * i], x[12 + position, 2 * i + 1]
                turned[12 + position, 2 * i] = a * math.cos(angle) - b * math.sin(angle)
                turned[12 + position, 2 * i + 1] = a * math.sin(angle) + b * math.cos(angle)
        return turned

    latents, logits = [], []
    for row in range(len(z)):
        text = linear(np.concatenate([z[row].double().numpy(), estimate[row].double().numpy()], -1), "self_condition")
        text = linear(linear(text, "bottleneck"), "input")
        prefix = [
            parameters["time_tokens"][0] + embedding(float(tau[row]), "time_embedding"),
            parameters["guidance_tokens"][0] + embedding(float(w[row]), "guidance_embedding"),
            parameters["mode_tokens"][0] * float(decode[row]),
        ]
        x = np.concatenate([*prefix, text])
        keys = np.concatenate([np.ones(12, bool), valid[row].numpy()])
        for layer in range(network.config.num_layers):
            name = f"blocks.{layer}"
            qkv = linear(rms(x, f"{name}.attention_norm"), f"{name}.attention.qkv").reshape(-1, 3, heads, k)
            mixed = []
            for head in range(heads):
                q = rotated(rms(qkv[:, 0, head], f"{name}.attention.query_norm"))
                key = rotated(rms(qkv[:, 1, head], f"{name}.attention.key_norm"))
                weights = np.exp(q @ key.T / math.sqrt(k)) * keys
                mixed.append(weights / weights.sum(-1, keepdims=True) @ qkv[:, 2, head])
            x = x + linear(np.concatenate(mixed, -1), f"{name}.attention.out")
            gate, value = np.split(linear(rms(x, f"{name}.mlp_norm"), f"{name}.mlp.gate_value"), 2, axis=-1)
            x = x + linear(silu(gate) * value, f"{name}.mlp.output")
        x = x[12:]
        latents.append(linear(rms(x, "denoise_head.norm"), "denoise_head.linear"))
        hidden = linear(x, "decode_head.hidden")
        hidden = 0.5 * hidden * (1 + np.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        logits.append(linear(hidden, "decode_head.unembedding"))
    return np.stack(latents), np.stack(logits)


@torch.no_grad()
def test_forward_against_an_independent_float64_model():
    network, given = build(), inputs()
    prediction, (latents, logits) = network(*given), reference(network, *given)
    assert prediction.latents.shape == (B, L, D) and prediction.logits.shape == (B, L, V)
    np.testing.assert_allclose(prediction.latents.numpy(), latents, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(prediction.logits.numpy(), logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_head_that_is_not_asked_says_nothing():
    network, given = build(), inputs()
    both = network(*given)
    denoise, decode = (network(*given, heads=(head,)) for head in ("denoise", "decode"))
    assert denoise.logits is None and decode.latents is None
    assert torch.equal(denoise.latents, both.latents) and torch.equal(decode.logits, both.logits)


@torch.no_grad()
@pytest.mark.parametrize("which", range(5), ids=["z", "estimate", "tau", "guidance", "decode"])
def test_every_input_matters_everywhere(which):
    """Each moves both heads at every position, in its own row alone."""
    network, given = build(), inputs()
    before = network(*given)
    given[which] = given[which].clone()
    if which < 2:
        given[which][0, 3] += 1.0
    else:
        given[which][0] = ~given[which][0] if which == 4 else given[which][0] + 0.2
    after = network(*given)
    for one, other in ((before.latents, after.latents), (before.logits, after.logits)):
        moved = (one != other).any(-1)
        assert moved[0].all() and not moved[1:].any()


@torch.no_grad()
def test_padding_does_not_change_valid_outputs():
    network, given = build(), inputs()
    before, valid = network(*given), given[-1]
    for content in (7.0, -100.0):
        z, estimate = (each.masked_fill(~valid[..., None], content) for each in given[:2])
        after = network(z, estimate, *given[2:])
        for one, other in ((before.latents, after.latents), (before.logits, after.logits)):
            assert torch.equal(one[valid], other[valid])
    # and a row that ends there says the same
    short = network(*(each[1:2, :5] if each.ndim > 1 else each[1:2] for each in given))
    torch.testing.assert_close(short.latents, before.latents[1:2, :5], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_initial_values():
    """Xavier-uniform matrices, normal(0.02) conditioning, norms 1, biases 0, and a denoise head that says 0."""
    model = ModelConfig(width=48, num_layers=2, num_heads=4)
    network = ELFNetwork(model, vocab_size=97, latent_dim=40, bottleneck=20, seed=1)
    for name, parameter in network.named_parameters():
        if name.startswith("denoise_head.linear") or name.endswith("bias"):
            assert torch.all(parameter == 0), name
        elif name.endswith("norm.weight"):
            assert torch.all(parameter == 1), name
        elif "_tokens" in name or "_embedding" in name:
            assert float(parameter.std()) == pytest.approx(0.02, rel=0.2), name
        else:
            bound = math.sqrt(6 / sum(parameter.shape))
            assert float(parameter.abs().max()) <= bound * (1 + 1e-6), name
            assert float(parameter.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05), name
    assert network.time_tokens.ndim == 3  # a vector to the optimizer, not a matrix
    same, other = (ELFNetwork(model, vocab_size=97, latent_dim=40, bottleneck=20, seed=seed) for seed in (1, 2))
    for name, parameter in network.named_parameters():
        assert torch.equal(parameter, same.get_parameter(name))
    assert not torch.equal(network.input.weight, other.input.weight)


def test_what_stays_float32_under_autocast():
    """Inputs, conditioning, norms and the denoise head; matrices of the blocks and of the decode head do not."""
    network, given = build(), inputs()
    dtypes: dict[str, set] = {}

    def record(name):
        return lambda module, args, output: dtypes.setdefault(name, set()).add(output.dtype)

    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | RMSNorm):
            module.register_forward_hook(record(name))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = network(*given)
    low = {name for name, found in dtypes.items() if found == {torch.bfloat16}}
    assert low == {name for name in dtypes if name.startswith(("blocks.", "decode_head.")) and "norm" not in name}
    assert all(found == {torch.float32} for name, found in dtypes.items() if name not in low)
    assert prediction.latents.dtype == prediction.logits.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(prediction.latents, network(*given).latents, rtol=0.1, atol=0.1)


def test_activation_checkpointing_changes_no_gradient():
    given = inputs()

    def gradients(**options) -> dict[str, torch.Tensor]:
        network = build(ModelConfig(width=24, num_layers=2, num_heads=3, **options))
        prediction = network(*given)
        (prediction.latents.square().sum() + prediction.logits.square().sum()).backward()
        return {name: parameter.grad for name, parameter in network.named_parameters()}

    plain, recomputed = gradients(), gradients(activation_checkpointing="block")
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in plain.values())
    assert all(torch.equal(gradient, recomputed[name]) for name, gradient in plain.items())


def test_the_direction_probe_passes():
    """Xavier blocks are open from the start: the probe sees every position move."""
    network = build(randomise=False)
    check_direction(network)
    hidden = network.probe(torch.arange(16)[None] % V)
    assert hidden.shape == (1, 16, TINY.width)


def test_flops_against_counted_products():
    """torch counts the products of one forward pass; the backward pass has twice as many."""
    from torch.utils.flop_counter import FlopCounterMode

    network, given = build(), inputs()
    given[-1] = torch.ones_like(given[-1])
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _ = network(*given).logits
    flops = network.training_flops(L)
    # of a scalar's embedding the first layer counts 4 and not 6 FLOPs a parameter
    first_layers = 2 * 2 * 256 * TINY.width / L
    assert (flops.total + first_layers) / 3 == pytest.approx(counter.get_total_flops() / (B * L), rel=1e-6)
