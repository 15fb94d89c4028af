"""Span corruption: exact counts, nothing lost, the same for a row wherever it is; and the loss in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from braid.data_pipeline.loader import Batch
from braid.kernels.errors import ConfigError
from braid.kernels.random import fold_key, initial_normal
from braid.pretrain.config.load import load_config
from braid.pretrain.config.objectives.t5 import T5Config
from braid.pretrain.config.schema import ModelConfig, SamplingConfig
from braid.pretrain.config.validate import problems
from braid.pretrain.model.t5_network import T5Network
from braid.pretrain.objectives.base import Noise
from braid.pretrain.objectives.t5 import T5, Spans, composition
from braid.pretrain.sampling.prompts import no_prompt
from braid.pretrain.sampling.sampler import draw_samples

from .conftest import rows

VOCAB, LENGTH = 19, 40
IDS = {"mask_id": 18, "bos_id": 17, "eos_id": 16}


def build_t5(length: int = LENGTH, **options) -> T5:
    config = T5Config(**options)
    spans = Spans.of(length, config)
    model = ModelConfig(width=16, num_layers=2, num_heads=2)
    size = {"num_noised": spans.num_noised, "num_spans": spans.num_spans}
    network = T5Network(model, vocab_size=VOCAB, seed=3, **size)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.add_(0.2 * initial_normal(5, name, tuple(parameter.shape)))
    return T5(config, network, **IDS)


def batch_of(num: int = 6, length: int = LENGTH, *, first: int = 0) -> tuple[Batch, Noise]:
    tokens = torch.randint(0, VOCAB, (num, length), generator=torch.Generator().manual_seed(first))
    ordinals = torch.arange(first, first + num)
    noise = Noise.training(fold_key(1, "train"), first, num, ordinals)
    return Batch(tokens, torch.ones_like(tokens, dtype=torch.bool), ordinals), noise


def restored(inputs: list[int], targets: list[int]) -> list[int]:
    """The text: each sentinel of the input replaced by what follows it in the target."""
    said: dict[int, list[int]] = {}
    for token in targets:
        if token >= VOCAB:
            assert token not in said, "a sentinel stands for one span"
            said[token] = []
        else:
            said[next(reversed(said))].append(token)
    assert all(said.values()), "no span is empty"
    assert [token for token in inputs if token >= VOCAB] == list(said) == [VOCAB + i for i in range(len(said))]
    return [token for symbol in inputs for token in (said[symbol] if symbol >= VOCAB else [symbol])]


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(2, 70),
    density=st.floats(0.01, 0.99),
    mean=st.floats(1, 9),
    first=st.integers(0, 2**40),
)
def test_counts_are_exact_and_nothing_is_lost(length, density, mean, first):
    spans = Spans.of(length, T5Config(noise_density=density, mean_span_length=mean))
    assert 1 <= spans.num_spans <= spans.num_noised < length
    batch, noise = batch_of(5, length, first=first)
    left_out, starts = spans.draw(noise.uniforms(length))
    assert left_out.sum(1).tolist() == [spans.num_noised] * 5
    begins = left_out & ~torch.nn.functional.pad(left_out, (1, 0))[:, :-1]
    assert [row.nonzero().flatten().tolist() for row in begins] == starts.tolist(), "spans do not touch"
    corrupted = build_t5(length, noise_density=density, mean_span_length=mean).corrupt(batch, noise)
    for row in range(5):
        text, targets = batch.tokens[row], corrupted.targets[row]
        assert restored(corrupted.inputs[row].tolist(), targets.tolist()) == text.tolist()
        assert torch.equal(targets[targets < VOCAB], text[left_out[row]])


def test_the_papers_numbers():
    """15 % in spans of 3: T5's own rows of 568 tokens become inputs of 511 and targets of 113, each before its EOS."""
    for length, noised, num in ((1024, 154, 51), (568, 85, 28), (32, 5, 2), (4, 1, 1)):
        assert Spans.of(length, T5Config()) == Spans(length, noised, num)
    assert 568 - 85 + 28 == 511 and 85 + 28 == 113


def test_every_composition_is_as_likely_as_any_other():
    """All orders of four uniforms: each of the six ways to part five items in three comes from four of them."""
    orders = torch.tensor(list(itertools.permutations([0.1, 0.4, 0.6, 0.9])))
    found, counts = composition(orders, 3).unique(dim=0, return_counts=True)
    assert sorted(map(tuple, found.tolist())) == sorted(
        parts for parts in itertools.product(range(1, 6), repeat=3) if sum(parts) == 5
    )
    assert counts.tolist() == [4] * 6
    assert composition(torch.empty(2, 0), 1).tolist() == [[1], [1]]


def test_every_way_to_place_the_spans_is_as_likely_as_any_other():
    """Three tokens in two spans, four kept with at least one between: 2 x 10 ways, each in a twentieth of the rows."""
    _, noise = batch_of(20_000, 7)
    masks, counts = Spans(7, 3, 2).draw(noise.uniforms(7))[0].unique(dim=0, return_counts=True)
    assert len(masks) == 20
    assert (counts - 1000).abs().max() < 5 * (1000 * 19 / 20) ** 0.5, counts


def test_corruption_does_not_know_the_batch():
    objective, (batch, noise) = build_t5(), batch_of()
    whole = objective.corrupt(batch, noise)
    for which in ([4], [1, 5, 2]):
        part = Batch(batch.tokens[which], batch.loss_mask[which], batch.ordinals[which])
        corrupted = objective.corrupt(part, rows(noise, which))
        assert torch.equal(corrupted.inputs, whole.inputs[which])
        assert torch.equal(corrupted.targets, whole.targets[which])
    again = [objective.corrupt(batch, Noise.evaluation(7, batch.ordinals, draw, 2)).inputs for draw in (0, 1)]
    assert not torch.equal(*again) and not torch.equal(again[0][0], again[0][1])


def expected_nats(objective: T5, batch: Batch, noise: Noise) -> torch.Tensor:
    """Cross-entropy of every target position, float64 [B, T], with targets written out from the spans."""
    network = objective.network
    left_out, _ = Spans(batch.tokens.shape[1], network.num_noised, network.num_spans).draw(noise.uniforms(LENGTH))
    inputs, targets = [], []
    for text, out in zip(batch.tokens.tolist(), left_out.tolist(), strict=True):
        read, asked, spans = [], [], 0
        for position, token in enumerate(text):
            if out[position] and not (position and out[position - 1]):
                read.append(VOCAB + spans)
                asked.append(VOCAB + spans)
                spans += 1
            (asked if out[position] else read).append(token)
        inputs.append(read)
        targets.append(asked)
    targets = torch.tensor(targets)
    logits = network.double()(torch.tensor(inputs), targets).whole.double()
    network.float()
    return torch.logsumexp(logits, -1) - logits.gather(-1, targets[..., None]).squeeze(-1)


def test_the_loss_is_the_targets_cross_entropy():
    objective, (batch, noise) = build_t5(noise_density=0.3), batch_of()
    corrupted = objective.corrupt(batch, noise)
    loss = objective.loss(objective.predict(corrupted), corrupted)
    nats = expected_nats(objective, batch, noise)
    assert loss.count == nats.numel() == 6 * (12 + 4) and loss.bucket_sums is None
    assert loss.total.item() == pytest.approx(nats.sum().item(), rel=1e-6)
    assert loss.terms["token_loss"].item() == pytest.approx(nats.sum().item(), rel=1e-6)
    assert nats.std() > 0.5


def test_tokens_that_do_not_count_are_not_scored():
    objective, (batch, noise) = build_t5(), batch_of()
    counted = torch.rand(batch.tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    left_out, starts = Spans.of(LENGTH, T5Config()).draw(noise.uniforms(LENGTH))
    batch = Batch(batch.tokens, counted, batch.ordinals)
    corrupted = objective.corrupt(batch, noise)
    said = corrupted.targets < VOCAB
    for row in range(6):
        assert corrupted.loss_mask[row][said[row]].tolist() == counted[row][left_out[row]].tolist()
        assert corrupted.loss_mask[row][~said[row]].tolist() == counted[row][starts[row]].tolist()


def test_the_figure_is_the_mean_over_targets():
    """The evaluation divides sums by the number of tokens of the text."""
    objective, (batch, _) = build_t5(), batch_of()
    noise = Noise.evaluation(3, batch.ordinals, 1, 4)
    with torch.no_grad():
        sums = objective.evaluate(batch, noise)["span_loss"]
        nats = expected_nats(objective, batch, noise)
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums / LENGTH, nats.mean(1), rtol=1e-5, atol=0)
    assert [(figure.unit, figure.is_bound) for figure in objective.figures] == [("value", False)]


def test_it_cannot_be_sampled():
    with pytest.raises(ConfigError, match="cannot be sampled"):
        draw_samples(build_t5(), SamplingConfig(), no_prompt(1, LENGTH), key=0)


@pytest.mark.parametrize(
    ("option", "what"),
    [
        ("training.sample_every=5", "writes no text"),
        ("sampling.sampler=ddim", "sampling.sampler = 'ddim' is ignored"),
        ("sampling.guidance=2", "sampling.guidance = 2.0 is ignored"),
        ("data.packing=pairs", "running text"),
        ("model.dropout=0.1", "model.dropout"),
        ("model.compile=true", "model.compile"),
        ("model.activation_checkpointing=block", "model.activation_checkpointing"),
        ("model.rope_base=500", "model.rope_base"),
        ("objective.noise_density=1", "objective.noise_density"),
        ("objective.mean_span_length=0.5", "objective.mean_span_length"),
    ],
)
def test_what_a_run_cannot_have(option, what):
    assert problems(load_config("tiny_t5")) == []
    found = problems(load_config("tiny_t5", [option]))
    assert len(found) == 1 and what in found[0].what, found
