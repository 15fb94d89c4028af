"""What holds for every objective: start at log V, sums that split, purity, dropout by counters."""

import math
from dataclasses import fields, replace

import pytest
import torch

from braid.data_pipeline.loader import Batch
from braid.pretrain.model.token_logits import TokenLogits
from braid.pretrain.objectives.base import Noise

from .conftest import LENGTH, MASK, MODEL, VOCAB, batch_and_noise, build, rows
from .references import float64_nats


def part(batch: Batch, noise: Noise, which) -> tuple[Batch, Noise]:
    return (
        Batch(batch.tokens[which], batch.loss_mask[which], batch.ordinals[which]),
        rows(noise, which),
    )


@pytest.mark.parametrize("name", ["ar", "mdlm", "ccdd"])
def test_step_zero_token_loss_is_log_v(name):
    """Zero-initialised heads: uniform over the vocabulary without the mask token."""
    objective = build(name, randomise=False)
    batch, noise = batch_and_noise(256)
    corrupted = objective.corrupt(batch, noise)
    prediction = objective.predict(corrupted)
    logits = prediction.logits
    assert torch.all(logits == 0)
    loss = objective.loss(prediction, corrupted)
    if name == "ar":
        expected = loss.count * math.log(VOCAB - 1)
    else:
        per_position = objective.weight if name == "mdlm" else objective.token_weight
        weight = per_position(corrupted.times).float()[:, None] * corrupted.masked
        expected = weight.sum() * math.log(VOCAB - 1)
    assert loss.terms["token_loss"].item() == pytest.approx(float(expected), rel=1e-5)


def test_corrupt_is_a_pure_function_of_the_key(objective):
    """The same sample is corrupted alike whatever batch it is in, and in whatever order."""
    batch, noise = batch_and_noise(8)
    whole = objective.corrupt(batch, noise)
    for which in ([3], [6, 1], [7, 6, 5, 4, 3, 2, 1, 0]):
        some = objective.corrupt(*part(batch, noise, torch.tensor(which)))
        for field in fields(whole):
            expected, value = getattr(whole, field.name), getattr(some, field.name)
            assert (expected is None) == (value is None)
            if isinstance(value, torch.Tensor):
                assert torch.equal(expected[which], value), field.name


def test_sums_and_gradients_of_micro_batches_add_up(objective):
    batch, noise = batch_and_noise(8, padding=2)
    parts = [part(batch, noise, torch.arange(k, k + 2)) for k in range(0, 8, 2)]

    def gradients(pieces):
        objective.zero_grad()
        losses = []
        for piece in pieces:
            corrupted = objective.corrupt(*piece)
            losses.append(objective.loss(objective.predict(corrupted), corrupted))
            losses[-1].total.backward()
        return losses, [p.grad.clone() for p in objective.parameters() if p.grad is not None]

    (whole,), one = gradients([(batch, noise)])
    split, many = gradients(parts)
    assert sum(int(loss.count) for loss in split) == int(whole.count) == 8 * (LENGTH - 2)
    assert sum(float(loss.total) for loss in split) == pytest.approx(float(whole.total), rel=1e-5)
    for name, value in whole.terms.items():
        assert sum(float(loss.terms[name]) for loss in split) == pytest.approx(float(value), rel=1e-5)
    if whole.bucket_sums is not None:
        assert torch.allclose(sum(loss.bucket_sums for loss in split), whole.bucket_sums, rtol=1e-5)
        assert float(whole.bucket_sums.sum()) == pytest.approx(float(whole.total), rel=1e-5)
        assert float(whole.bucket_counts.sum()) == int(whole.count)
    for a, b in zip(one, many, strict=True):
        # Terms of weights up to 1000 cancel in a sum: float32's error is relative to the tensor, not to the entry.
        assert (a - b).abs().max() <= 1e-4 * a.abs().max() + 1e-7


def per_position_loss(objective, corrupted, prediction) -> torch.Tensor:
    """The default losses of every position, written out in float64 [B, L]."""
    nats, t = float64_nats(prediction.logits, corrupted.targets), corrupted.times
    if objective.name == "ar":
        return nats
    nats = nats * (corrupted.tokens == MASK)
    if objective.name == "mdlm":
        return nats / t[:, None]
    error = (prediction.latents.double() - corrupted.latent_targets.double()).square().clamp(max=10).mean(-1)
    weight = (1 / (1 - t)).clamp(max=10) * (corrupted.latents != 0).any(-1).any(-1)
    return 2 * (1 - t)[:, None] * nats + weight[:, None] * error


def test_padding_does_not_count(objective):
    """The loss is the sum over the other positions, their number the count: in total and by time."""
    batch, noise = batch_and_noise(8, padding=3)
    corrupted = objective.corrupt(batch, noise)
    prediction = objective.predict(corrupted)
    loss = objective.loss(prediction, corrupted)
    values = per_position_loss(objective, corrupted, prediction)[:, :-3].detach()
    assert int(loss.count) == 8 * (LENGTH - 3)
    assert float(loss.total.detach()) == pytest.approx(float(values.sum()), rel=1e-6)
    assert sum(map(float, loss.terms.values())) == pytest.approx(float(values.sum()), rel=1e-6)
    if objective.name != "ar":
        for bucket in range(10):
            inside = (corrupted.times * 10).long() == bucket
            assert float(loss.bucket_sums[bucket]) == pytest.approx(float(values[inside].sum()), rel=1e-6)
            assert int(loss.bucket_counts[bucket]) == int(inside.sum()) * (LENGTH - 3)


@pytest.mark.parametrize("padding", [0, 3])
def test_padding_does_not_count_in_the_exact_likelihood(padding):
    objective = build("ar")
    batch, noise = batch_and_noise(4, padding=padding)
    prediction = objective.predict(objective.corrupt(batch, noise))
    expected = float64_nats(prediction.logits, batch.tokens)[:, : LENGTH - padding].sum(1)
    assert torch.allclose(objective.evaluate(batch, noise)["nll"], expected, rtol=1e-6)


def test_the_mask_token_is_never_predicted(objective):
    """Raising the mask's logit changes nothing: it is -inf before any normalisation."""
    batch, noise = batch_and_noise(4)
    corrupted = objective.corrupt(batch, noise)
    prediction = objective.predict(corrupted)
    tilted = prediction.logits + 50.0 * (torch.arange(VOCAB) == MASK)
    loss = objective.loss(prediction, corrupted)
    same = objective.loss(prediction._replace(tokens=TokenLogits.known(tilted)), corrupted)
    assert float(loss.total) == pytest.approx(float(same.total), rel=1e-6)


@pytest.mark.parametrize("name", ["ar", "mdlm", "ccdd"])
def test_dropout_is_counter_based_and_off_in_evaluation(name):
    objective = build(name, model=replace(MODEL, dropout=0.3))
    batch, noise = batch_and_noise(6)
    corrupted = objective.corrupt(batch, noise)
    objective.train()
    once, again = objective.predict(corrupted).logits, objective.predict(corrupted).logits
    assert torch.equal(once, again)
    alone = objective.predict(objective.corrupt(*part(batch, noise, torch.tensor([4])))).logits
    assert torch.allclose(once[4:5], alone, atol=1e-5)
    objective.eval()
    assert not torch.allclose(objective.predict(corrupted).logits, once, atol=1e-3)


def test_draws_are_independent(objective):
    if objective.name == "ar":
        pytest.skip("nothing is drawn")
    batch, noise = batch_and_noise(32)
    other = objective.corrupt(batch, replace(noise, draw=1))
    assert not torch.equal(objective.corrupt(batch, noise).masked, other.masked)
