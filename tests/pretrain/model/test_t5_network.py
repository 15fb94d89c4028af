"""T5's network against the library's own encoder-decoder, and what the house asks of every network."""

from __future__ import annotations

import math

import pytest
import torch
import transformers as tf
from torch.utils.flop_counter import FlopCounterMode

from braid.pretrain.config.schema import ModelConfig
from braid.pretrain.model.network import parameter_counts
from braid.pretrain.model.probe import check_direction
from braid.pretrain.model.t5_network import T5Network

VOCAB, NOISED, SPANS = 23, 5, 2
INPUTS, TARGETS = 16 - NOISED + SPANS, NOISED + SPANS
MODEL = ModelConfig(width=32, num_layers=2, num_heads=4, mlp_ratio=3)


def small(seed: int = 3, model: ModelConfig = MODEL) -> T5Network:
    return T5Network(model, vocab_size=VOCAB, num_noised=NOISED, num_spans=SPANS, seed=seed)


def ids(num: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randint(0, VOCAB + SPANS, (num, length), generator=generator) for length in (INPUTS, TARGETS)]
    return draw[0], draw[1]


def library_model(network: T5Network) -> tf.T5ForConditionalGeneration:
    """The library's T5 with the same weights, float64."""
    rows, width = network.embedding.weight.shape
    config = tf.T5Config(
        vocab_size=rows, d_model=width, d_kv=8, d_ff=3 * width, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=rows - 1, pad_token_id=rows - 1,
    )  # fmt: skip
    model = tf.T5ForConditionalGeneration(config)
    weights = {name.replace("embedding.weight", "shared.weight", 1): w for name, w in network.state_dict().items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) <= set(model.all_tied_weights_keys) and not unexpected
    model.tie_weights()
    return model.double().eval()


def test_the_same_logits_as_the_librarys_own_model():
    network, (inputs, targets) = small(), ids()
    logits = network(inputs, targets).whole
    expected = library_model(network)(input_ids=inputs, labels=targets).logits
    assert logits.shape == (3, TARGETS, VOCAB + SPANS + 1) and logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-5)
    assert expected.std() > 0.3


def test_t5_small_has_its_published_size():
    with torch.device("meta"):
        model = ModelConfig(width=512, num_layers=6, num_heads=8)
        network = T5Network(model, vocab_size=32128 - 52, num_noised=154, num_spans=51, seed=0)
    counts = parameter_counts(network)
    assert (counts["total"], counts["embedding"], counts["other"]) == (60_506_624, 32128 * 512, 0)
    encoder = sum(parameter.numel() for parameter in network.encoder.parameters()) + counts["embedding"]
    assert encoder == 35_330_816


def test_initial_values_follow_the_seed_and_the_name_alone():
    state = torch.get_rng_state()
    first, again, other = small(), small(), small(seed=4)
    assert torch.equal(state, torch.get_rng_state())
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) and (a.dim() == 1 or not torch.equal(a, c)), name
    assert first.state_dict().keys() == dict(first.named_parameters()).keys(), "the shared table is saved once"


def test_initial_values_have_t5s_scales():
    network = small(model=ModelConfig(width=256, num_layers=1, num_heads=4))
    std = {name: parameter.std().item() for name, parameter in network.named_parameters() if parameter.dim() > 1}
    scales = {
        "embedding.weight": 1.0,
        ".q.weight": 1 / math.sqrt(256 * 64),
        ".k.weight": 1 / 16,
        ".v.weight": 1 / 16,
        ".o.weight": 1 / 16,
        ".wi.weight": 1 / 16,
        ".wo.weight": 1 / 32,
        "relative_attention_bias.weight": 1 / 16,
    }
    for name, value in std.items():
        expected = next(scale for end, scale in scales.items() if name.endswith(end))
        assert value == pytest.approx(expected, rel=0.25 if "bias" in name else 0.03), name
    assert all((p == 1).all() for p in network.parameters() if p.dim() == 1)


def test_the_encoder_sees_everything_and_the_decoder_what_came_before():
    network, (inputs, targets) = small(), ids(1)
    check_direction(network)
    before = network(inputs, targets).whole[0]
    for position in range(TARGETS):
        changed = targets.clone()
        changed[:, position] = (changed[:, position] + 1) % VOCAB
        moved = (network(inputs, changed).whole[0] != before).any(-1)
        assert moved.tolist() == [i > position for i in range(TARGETS)], position
    for position in (0, INPUTS - 1):
        changed = inputs.clone()
        changed[:, position] = (changed[:, position] + 1) % VOCAB
        assert (network(changed, targets).whole[0] != before).any(-1).all()


def test_flops_are_those_that_are_done():
    """A forward pass counted by torch, once for itself and twice for the backward pass."""
    network, (inputs, targets) = small(), ids()
    for stack in (network.encoder, network.decoder):
        stack.set_attn_implementation("eager")  # the fused one is not counted on a CPU
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        assert network(inputs, targets).whole.isfinite().all()
    assert network.training_flops(16).total * 16 * len(inputs) == pytest.approx(3 * counter.get_total_flops(), rel=1e-9)


def test_every_parameter_gets_a_gradient():
    network, (inputs, targets) = small(), ids()
    network(inputs, targets).whole.logsumexp(-1).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())
