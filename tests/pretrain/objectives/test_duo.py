"""Duo's loss and bound against float64 references, enumeration and Bayes denoisers; its curriculum."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from braid.kernels.random import fold_key
from braid.pretrain.config.check import Check
from braid.pretrain.config.objectives import duo as duo_config
from braid.pretrain.config.schema import Config
from braid.pretrain.diffusion import uniform
from braid.pretrain.diffusion.duality import token_survival
from braid.pretrain.model.token_logits import TokenLogits
from braid.pretrain.objectives.base import Noise
from braid.pretrain.objectives.duo import DuoCorrupted

from ..diffusion.chains import Chain
from .noisy_oracles import Bayes, SoftTable, build, exact_figure, real_batch, rows
from .references import replacements, toy_law

CHAIN = Chain(vocab_size=9, mask_id=3)
K = 8
CURRICULUM = {"curriculum_steps": 10, "curriculum_gamma_min": -2.0, "curriculum_gamma_max": 0.5, "curriculum_tau": 0.2}


def training_noise(num: int, key: str = "train") -> Noise:
    return Noise.training(fold_key(1, key), 0, num, torch.arange(num))


def naive_density(logits, x_t, x_0, survival) -> torch.Tensor:
    """Sum over all jumps of model rate - true rate + true rate log(true / model), with [B, L, V] tensors of one-hots
    and rates, float64 [B, L], per unit of survival."""
    keep = torch.arange(CHAIN.vocab_size) != CHAIN.mask_id
    p = logits.double()[..., keep].softmax(-1)
    onehot = F.one_hot(x_0, CHAIN.vocab_size).double()[..., keep]
    now = F.one_hot(x_t, CHAIN.vocab_size).double()[..., keep]
    a = survival[:, None, None]
    model, true = a * p + (1 - a) / K, a * onehot + (1 - a) / K
    model_rate = model / (model * now).sum(-1, keepdim=True) / (a * K)
    true_rate = true / (true * now).sum(-1, keepdim=True) / (a * K)
    return ((model_rate - true_rate + true_rate * (true_rate / model_rate).log()) * (1 - now)).sum(-1)


@pytest.mark.parametrize("curriculum", [False, True])
def test_loss_is_the_naive_one_and_so_is_its_gradient(curriculum):
    duo = build("duo", CHAIN, **(CURRICULUM if curriculum else {}))
    batch = real_batch(CHAIN, 16, 12, padding=2, given=3)
    corrupted = duo.corrupt(batch, training_noise(16))
    assert corrupted.tokens.is_floating_point() == curriculum
    logits = duo.predict(corrupted).logits.detach().requires_grad_()
    loss = duo.loss(duo.predict(corrupted)._replace(tokens=TokenLogits.known(logits)), corrupted)
    density = naive_density(logits, corrupted.noised, batch.tokens, 1 - corrupted.times)
    if curriculum:
        gamma = -2.0 + 2.5 * training_noise(16).strata
        survival, rate = token_survival(gamma, K)
        assert torch.allclose(corrupted.times, 1 - survival, rtol=1e-12)
        range_of_survival = 2.5 * rate
    else:
        assert torch.allclose(corrupted.times, 1e-3 + (0.999 - 1e-3) * training_noise(16).strata, rtol=1e-12)
        range_of_survival = torch.full((16,), 0.998, dtype=torch.float64)
    expected = (range_of_survival[:, None] * density * batch.loss_mask).sum()
    assert float(loss.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert float(loss.terms["token_loss"]) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert int(loss.count) == 16 * 7
    (ours,), (theirs,) = torch.autograd.grad(loss.total, logits), torch.autograd.grad(expected, logits)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6 * float(theirs.abs().max()))
    assert torch.all(ours[..., CHAIN.mask_id] == 0)


def test_bound_and_published_figure_draw_by_draw():
    """Both conventions written out: ranges of times, weights, and the bound's end."""
    duo = build("duo", CHAIN)
    batch, noise = real_batch(CHAIN, 12, 10, padding=2), training_noise(12, "validation")
    figures = duo.evaluate(batch, noise)
    u, position = noise.strata, torch.tensor(CHAIN.real)[replacements(noise, 10, K)]

    def density(times):
        noised = torch.where(noise.uniforms(10) < times.float()[:, None], position, batch.tokens)
        logits = duo.network(noised, times).logits
        return (naive_density(logits, noised, batch.tokens, 1 - times) * batch.loss_mask).sum(1)

    t = 1e-5 + (1 - 1e-5) * u
    same, other = 1 - 1e-5 + 1e-5 / K, 1e-5 / K  # decoding x at t = 1e-5 by p(x_0 | x) with equally likely tokens
    end = -same * math.log(same) - (K - 1) * other * math.log(other)
    assert torch.allclose(figures["bound"], (1 - 1e-5) * density(t) + 8 * end, rtol=1e-9)
    published = 1e-3 + (1 - 1e-3) * u  # alpha = 1 - (1 - 1e-3) t
    assert torch.allclose(figures["published"], (1 - 1e-3) * density((1 - 1e-3) * published), rtol=1e-9)


def test_the_bound_does_not_depend_on_the_rows_looked_at_together(monkeypatch):
    duo = build("duo", CHAIN)
    batch, noise = real_batch(CHAIN, 7, 10), training_noise(7, "validation")
    whole = duo.evaluate(batch, noise)["bound"]
    monkeypatch.setattr(uniform, "FLOAT64_CHUNK", 3 * 10 * CHAIN.vocab_size)  # three rows at a time
    assert torch.equal(duo.evaluate(batch, noise)["bound"], whole)


TOY = Chain(vocab_size=4, mask_id=1)


def toy(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    sequences, law = toy_law(length=2, vocabulary=3, seed=seed)
    return torch.tensor(TOY.real)[sequences], law


def bound_times(u: torch.Tensor) -> torch.Tensor:
    return 1e-5 + (1 - 1e-5) * u


def test_bound_is_tight_for_the_leave_one_out_posterior():
    """By enumeration of two dependent tokens and all x_t, and quadrature over t: the expected bound is the entropy of
    the law, above it by no more than the cost of the end at t = 1e-5; and for each sequence -log p."""
    sequences, law = toy()
    duo = build("duo", TOY, Bayes(TOY, sequences, law))
    gap = exact_figure(duo, TOY, sequences, bound_times) + law.log()
    assert 0 < float((law * gap).sum()) < 2 * 1.3e-4
    # The decoder at the end does not know the law, so the model's is not quite it: rare sequences gain from their
    # neighbours.
    assert float(gap.abs().max()) < 1.5e-3


def test_bound_is_loose_for_the_posterior_and_holds_for_any_denoiser():
    sequences, law = toy()
    entropy = float(-(law * law.log()).sum())
    posterior = build("duo", TOY, Bayes(TOY, sequences, law, leave_one_out=False))
    assert float((law * exact_figure(posterior, TOY, sequences, bound_times)).sum()) > entropy + 0.1
    for seed in (1, 2):
        other = toy(seed)[1]
        duo = build("duo", TOY, Bayes(TOY, sequences, other))
        bound = exact_figure(duo, TOY, sequences, bound_times)
        assert torch.allclose(bound, -other.log(), atol=1.5e-3)  # the other law's own
        assert float((law * bound).sum()) > entropy + 0.01
    network = build("duo", TOY, SoftTable(TOY))
    assert float((law * exact_figure(network, TOY, sequences, bound_times)).sum()) > entropy + 0.01


def test_step_zero_loss_is_the_closed_form_of_a_uniform_prediction():
    """All y are 1: (1 - 1/b + K_c / (V b)) / alpha, with the constants of the specification."""
    duo = build("duo", CHAIN, randomise=False)
    batch = real_batch(CHAIN, 64, 12)
    corrupted = duo.corrupt(batch, training_noise(64))
    prediction = duo.predict(corrupted)
    assert torch.all(prediction.logits == 0)
    a = (1 - corrupted.times)[:, None]
    h, c, same = 1 - a, K * a + 1 - a, corrupted.noised == batch.tokens
    b = torch.where(same, c, h)
    constant = torch.where(same, -(K - 1) * h, c) * (c / h).log()
    expected = 0.998 * ((1 - 1 / b + constant / (K * b)) / a).sum()
    assert float(duo.loss(prediction, corrupted).total.detach()) == pytest.approx(float(expected), rel=1e-6)


# -- the curriculum --------------------------------------------------------------------------------------------------


def test_the_curriculum_is_on_during_its_steps():
    duo = build("duo", CHAIN, **CURRICULUM)
    batch, noise = real_batch(CHAIN, 4, 12), training_noise(4)
    for step, soft in ((0, True), (9, True), (10, False), (11, False)):
        duo.begin_step(step, 20)
        corrupted = duo.corrupt(batch, noise)
        assert corrupted.tokens.is_floating_point() == soft
    plain = build("duo", CHAIN)
    plain.begin_step(0, 20)
    assert torch.equal(plain.corrupt(batch, noise).tokens, corrupted.tokens)


def test_evaluation_knows_no_curriculum():
    batch, noise = real_batch(CHAIN, 4, 12), training_noise(4)
    figures = build("duo", CHAIN, **CURRICULUM).evaluate(batch, noise)
    for name, value in build("duo", CHAIN).evaluate(batch, noise).items():
        assert torch.equal(figures[name], value)


def test_soft_tokens_are_seen_as_the_hard_ones_they_tend_to():
    """The network's answer to softmax(w / tau) at a tiny tau is its answer to argmax(w) at the time 1 - T."""
    duo = build("duo", CHAIN, **CURRICULUM | {"curriculum_tau": 1e-7})
    corrupted = duo.corrupt(real_batch(CHAIN, 8, 12), training_noise(8))
    hard = duo.network(corrupted.noised, corrupted.times).logits
    assert torch.allclose(duo.predict(corrupted).logits, hard, atol=1e-5)


def test_the_curriculum_estimates_the_bound_over_its_range_of_survival():
    """Mean of many draws at a tiny tau against enumeration of x_t and quadrature over alpha: within 4 standard errors,
    which are below 1%."""
    network = SoftTable(TOY)
    duo = build("duo", TOY, network, **CURRICULUM | {"curriculum_tau": 1e-7})
    num = 60_000
    batch = real_batch(TOY, num, 1)
    corrupted = duo.corrupt(batch, training_noise(num))
    draws = duo.nats(duo.predict(corrupted), corrupted).values_BL[:, 0]

    low, high = (float(token_survival(torch.tensor([g], dtype=torch.float64), 3)[0]) for g in (0.5, -2.0))
    nodes, weights = np.polynomial.legendre.leggauss(30)
    expected = 0.0
    pairs = torch.cartesian_prod(torch.tensor(TOY.real), torch.tensor(TOY.real))
    for alpha, weight in zip(low + (high - low) * (nodes + 1) / 2, (high - low) * weights / 2, strict=True):
        noised, clean = pairs[:, 1:], pairs[:, :1]
        times = torch.full((len(pairs),), 1 - alpha, dtype=torch.float64)
        given = {"tokens": noised, "noised": noised, "targets": clean, "loss_mask": torch.ones_like(clean) > 0}
        place = DuoCorrupted(**given, times=times, speed=torch.ones_like(times))
        density = duo.nats(network(noised, times), place).values_BL[:, 0]
        probability = TOY.marginal(1 - alpha)[clean[:, 0], noised[:, 0]] / 3
        expected += weight * float((probability * density).sum())
    error = float(draws.std()) / math.sqrt(num)
    assert error < 0.01 * expected
    assert float(draws.mean()) == pytest.approx(expected, abs=4 * error)


# -- what holds for every objective ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, CURRICULUM])
def test_corrupt_is_a_function_of_the_sample_and_keeps_what_is_given(options):
    duo = build("duo", CHAIN, **options)
    batch, noise = real_batch(CHAIN, 8, 12, given=4), training_noise(8)
    whole = duo.corrupt(batch, noise)
    assert torch.equal(whole.noised[:, :4], batch.tokens[:, :4])
    shown = whole.tokens.argmax(-1) if options else whole.tokens
    assert torch.equal(shown[:, :4], batch.tokens[:, :4])
    assert not torch.equal(whole.noised[:, 4:], batch.tokens[:, 4:])
    assert not (whole.noised == CHAIN.mask_id).any()
    for which in ([3], [6, 1], [7, 6, 5, 4, 3, 2, 1, 0]):
        some = duo.corrupt(*rows(batch, noise, torch.tensor(which)))
        for name in ("tokens", "noised", "times", "speed"):
            assert torch.equal(getattr(whole, name)[which], getattr(some, name)), name


@pytest.mark.parametrize("options", [{}, CURRICULUM])
def test_losses_of_micro_batches_add_up(options):
    duo = build("duo", CHAIN, **options)
    batch, noise = real_batch(CHAIN, 8, 12, padding=2), training_noise(8)

    def loss(piece):
        corrupted = duo.corrupt(*piece)
        return duo.loss(duo.predict(corrupted), corrupted)

    whole = loss((batch, noise))
    parts = [loss(rows(batch, noise, torch.arange(k, k + 2))) for k in range(0, 8, 2)]
    assert sum(float(part.total.detach()) for part in parts) == pytest.approx(float(whole.total.detach()), rel=1e-5)
    assert sum(int(part.count) for part in parts) == int(whole.count) == 80
    assert float(whole.bucket_sums.sum()) == pytest.approx(float(whole.total.detach()), rel=1e-9)


def test_the_mask_is_never_predicted():
    duo = build("duo", CHAIN)
    corrupted: DuoCorrupted = duo.corrupt(real_batch(CHAIN, 4, 12), training_noise(4))
    prediction = duo.predict(corrupted)
    tilted = prediction.logits + 50.0 * (torch.arange(CHAIN.vocab_size) == CHAIN.mask_id)
    loss = duo.loss(prediction, corrupted)
    same = duo.loss(prediction._replace(tokens=TokenLogits.known(tilted)), corrupted)
    assert float(loss.total.detach()) == pytest.approx(float(same.total.detach()), rel=1e-6)


@pytest.mark.parametrize("options, message", [
    ({"time_min": 0.5, "time_max": 0.4}, "must be below objective.time_max"),
    ({"time_max": 1.5}, "objective.time_max"),
    ({"curriculum_tau": 0.1}, "is ignored"),
    ({"curriculum_steps": 5, "curriculum_gamma_min": -1.0}, "curriculum_gamma_max"),
    ({"curriculum_steps": 5, "curriculum_tau": 0.0}, "curriculum_tau"),
])  # fmt: skip
def test_settings_that_cannot_be_right(options, message):
    check = Check()
    duo_config.check(check, Config(objective=duo_config.DuoConfig(**options)))
    assert len(check.problems) == 1 and message in check.problems[0].what
