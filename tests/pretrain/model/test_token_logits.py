"""Predictions whose logits are made when asked for: the same numbers, and no more of them than a loss needs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from braid.data_pipeline.loader import Batch
from braid.kernels import linear_loss
from braid.kernels.linear_loss import Rows
from braid.kernels.random import fold_key
from braid.parallel.context import UNDIVIDED
from braid.pretrain.config.schema import ModelConfig
from braid.pretrain.model.backbone import Backbone
from braid.pretrain.model.token_logits import TokenLogits
from braid.pretrain.objectives.base import Noise, Summed, TokenCorrupted, sum_terms

B, L, V = 3, 10, 37
MODEL = ModelConfig(width=16, num_layers=1, num_heads=2, cond_dim=8)


def network() -> Backbone:
    """None of its parameters is zero."""
    made = Backbone(MODEL, vocab_size=V, causal=False, time_conditioned=True, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return made


def inputs():
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, V, (B, L), generator=generator)
    return tokens, torch.rand(B, generator=generator), torch.rand(B, L, generator=generator)


def reference(logits, targets, counts, weights, without):
    logits = torch.where(torch.arange(V) == without, -torch.inf, logits)
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(B, L)
    return (weights * nats * counts).sum(), nats * counts


def test_the_z_loss_is_trained_and_not_reported():
    """Squares of the logarithms of the normalisers, weighted as the losses are; not where nothing is trained."""
    model, (tokens, times, weights) = network(), inputs()
    counts, targets, parameters = weights < 0.6, (tokens + 1) % (V - 1), list(model.parameters())
    logits = model(tokens, times).logits
    plain, nats = reference(logits, targets, counts, weights, V - 1)
    squares = logits[..., : V - 1].logsumexp(-1).square()
    expected = plain + 0.1 * (weights * squares * counts).sum()
    wanted = torch.autograd.grad(expected, parameters)
    model.config = dataclasses.replace(MODEL, z_loss=0.1)
    loss = model(tokens, times).tokens.cross_entropy(targets, Rows(counts), weights, without=V - 1)
    found = torch.autograd.grad(loss.total, parameters)
    assert float(loss.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    torch.testing.assert_close(loss.values_BL.float(), nats.detach(), rtol=1e-6, atol=1e-6)
    for (name, _), ours, theirs in zip(model.named_parameters(), found, wanted, strict=True):
        assert (ours - theirs).abs().max() <= 2e-6 * theirs.abs().max(), name
    with torch.no_grad():
        loss = model(tokens, times).tokens.cross_entropy(targets, Rows(counts), weights, without=V - 1)
    assert float(loss.total) == pytest.approx(float(plain.detach()), rel=1e-6)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("asked_before", [False, True])
def test_the_loss_is_that_of_all_logits(asked_before, precision, monkeypatch):
    """Gradients too, under autocast that is over when the loss is computed; whether or not all logits exist already."""
    monkeypatch.setattr(linear_loss, "CHUNK_LOGITS", 4 * 64)
    model, (tokens, times, weights) = network(), inputs()
    counts, targets, parameters = weights < 0.6, (tokens + 1) % (V - 1), list(model.parameters())

    def predict():
        with torch.autocast("cpu", dtype=precision, enabled=precision is not None):
            return model(tokens, times)

    expected, nats = reference(predict().logits, targets, counts, weights, V - 1)
    wanted = torch.autograd.grad(expected, parameters)
    prediction = predict()
    assert prediction.tokens.hidden_BLW.dtype == (precision or torch.float32)
    if asked_before:
        assert prediction.logits is prediction.logits
    loss = prediction.tokens.cross_entropy(targets, Rows(counts), weights, without=V - 1)
    found = torch.autograd.grad(loss.total, parameters)
    tolerance = 1e-6 if precision is None else 2e-2
    torch.testing.assert_close(loss.values_BL.float(), nats.detach(), rtol=1e-6, atol=1e-6)
    assert float(loss.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for (name, _), ours, theirs in zip(model.named_parameters(), found, wanted, strict=True):
        assert (ours - theirs).abs().max() <= 2 * tolerance * theirs.abs().max(), name


def test_the_head_computes_the_rows_that_count_alone(monkeypatch):
    model, (tokens, times, weights) = network(), inputs()
    seen = []
    monkeypatch.setattr(
        torch, "addmm", lambda *args, out, true=torch.addmm: seen.append(len(out)) or true(*args, out=out)
    )
    monkeypatch.setattr(linear_loss, "CHUNK_LOGITS", 7 * 64)
    prediction, counts = model(tokens, times), weights < 0.5
    loss = prediction.tokens.cross_entropy(tokens, Rows(counts))
    number = int(counts.sum())
    assert 7 < number < B * L and seen == [7] * (number // 7) + [number % 7] * (number % 7 > 0)
    assert "whole" not in prediction.tokens.__dict__ and torch.all((loss.values_BL > 0) == counts)


def test_weights_may_be_of_rows_of_the_batch():
    model, (tokens, times, _) = network(), inputs()
    tokens_said, rows = model(tokens, times).tokens, Rows(torch.ones(B, L, dtype=torch.bool))
    weights = torch.tensor([1.0, 0.0, 2.0])[:, None]
    loss = tokens_said.cross_entropy(tokens, rows, weights)
    assert float(loss.total) == pytest.approx(float((weights * loss.values_BL).sum()), rel=1e-6)
    assert float(tokens_said.cross_entropy(tokens, rows).total) == pytest.approx(float(loss.values_BL.sum()), rel=1e-6)


def test_known_logits():
    tokens, _, weights = inputs()
    logits = torch.randn(B, L, V, generator=torch.Generator().manual_seed(5)).requires_grad_()
    known = TokenLogits.known(logits)
    assert known.whole is logits
    counts = weights < 0.5
    loss = known.cross_entropy(tokens, Rows(counts), weights)
    expected, _ = reference(logits, tokens, counts, weights, -1)
    (ours,), (theirs,) = torch.autograd.grad(loss.total, logits), torch.autograd.grad(expected, logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_rows_are_counted_before_the_network_is_called():
    tokens, _, weights = inputs()
    corrupted = TokenCorrupted(tokens=tokens, targets=tokens, loss_mask=weights < 0.8, masked=weights > 0.3)
    here = corrupted.part(UNDIVIDED)
    assert here.rows is here.rows and here.rows._number is not None, "on its way"
    assert here.rows.number == int(((weights < 0.8) & (weights > 0.3)).sum())
    everything = dataclasses.replace(corrupted, masked=None)
    assert everything.rows.number == int((weights < 0.8).sum()), "a copy counts anew"
    assert torch.cat(everything.rows.chunks(4)).tolist() == (weights < 0.8).flatten().nonzero()[:, 0].tolist()


def test_terms_of_either_kind_add_up():
    """A sum that is there already, and a loss of each position."""
    _, _, weights = inputs()
    mask, times = weights < 0.7, torch.tensor([0.05, 0.15, 0.15], dtype=torch.float64)
    each, other = weights.clone().requires_grad_(), (2 * weights).requires_grad_()
    summed = Summed((each * mask).sum(), each.detach().double())
    loss = sum_terms({"one": summed, "two": other}, mask, times)
    plain = sum_terms({"one": each, "two": other}, mask, times)
    for name in ("total", "count", "bucket_sums", "bucket_counts"):
        torch.testing.assert_close(getattr(loss, name).double(), getattr(plain, name).double(), rtol=1e-6, atol=0)
    for name in ("one", "two"):
        torch.testing.assert_close(loss.terms[name], plain.terms[name])
    assert float(loss.bucket_sums.sum()) == pytest.approx(float(loss.total), rel=1e-6)
    assert all(torch.equal(gradient, mask.float()) for gradient in torch.autograd.grad(loss.total, (each, other)))


def test_a_batch_whose_tokens_all_stay_has_a_gradient_of_zero():
    from types import SimpleNamespace

    from braid.pretrain.objectives.mdlm import MDLM

    config = SimpleNamespace(schedule_eps=1e-3, time_min=1e-3, loss="nelbo")
    objective = MDLM(config, network(), mask_id=V - 1, bos_id=0, eos_id=0)
    tokens = torch.zeros(2, L, dtype=torch.int64)
    given = Batch(tokens, torch.zeros_like(tokens, dtype=torch.bool), torch.arange(2), tokens == 0)
    corrupted = objective.corrupt(given, Noise.training(fold_key(1, "train"), 0, 2, torch.arange(2)))
    loss = objective.loss(objective.predict(corrupted), corrupted)
    loss.total.backward()
    assert float(loss.total) == 0 and int(loss.count) == 0
    assert all(torch.all(parameter.grad == 0) for parameter in objective.parameters() if parameter.grad is not None)
