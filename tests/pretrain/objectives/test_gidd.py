"""GIDD's loss and bound against float64 references, enumeration and Bayes denoisers."""

import math

import pytest
import torch
import torch.nn.functional as F

from braid.kernels.random import fold_key
from braid.pretrain.config.check import Check
from braid.pretrain.config.objectives import gidd as gidd_config
from braid.pretrain.config.schema import Config
from braid.pretrain.model.token_logits import TokenLogits
from braid.pretrain.objectives.base import Noise
from braid.pretrain.objectives.mdlm import MDLM

from ..diffusion.chains import Chain
from .noisy_oracles import Bayes, SoftTable, build, exact_figure, real_batch, rows
from .references import replacements, toy_law

VOCAB, MASK, K = 9, 3, 8


def chain(p_uniform: float, gamma: float = 1.0) -> Chain:
    return Chain(VOCAB, MASK, p_uniform=p_uniform, gamma=gamma)


def training_noise(num: int, key: str = "train") -> Noise:
    return Noise.training(fold_key(1, key), 0, num, torch.arange(num))


def c_and_slope(process: Chain, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    half = process.gamma / 2
    c = 2**process.gamma * process.p_uniform / (1 - process.p_uniform) * t**half * (1 - t) ** half
    return c, half * (1 - 2 * t) / (t * (1 - t)) * c


def naive_divergence(process: Chain, logits, x_t, x_0, t) -> torch.Tensor:
    """KL plus Itakura-Saito divergence of both marginals, written out over the vocabulary, float64 [B, L]."""
    t = t[:, None, None]
    c, _ = c_and_slope(process, t)
    mask = (torch.arange(VOCAB) == MASK).double()
    noise = (t * mask + c / K * (1 - mask)) / (1 + c)
    p = torch.where(mask.bool(), -torch.inf, logits.double()).softmax(-1)
    true = (1 - t) / (1 + c) * F.one_hot(x_0, VOCAB) + noise
    model = (1 - t) / (1 + c) * p + noise
    kl = torch.special.xlogy(true, true) - torch.special.xlogy(true, model)
    ratio = (true / model).gather(-1, x_t[..., None])[..., 0]
    return kl.sum(-1) + ratio - ratio.log() - 1


def naive_elbo_weight(process: Chain, x_t, x_0, t) -> torch.Tensor:
    """The three weights of the specification, float64 [B, L]."""
    t = t[:, None]
    c, slope = c_and_slope(process, t)
    rate = c + (1 - t) * slope
    same, other = rate / (K * (1 - t) * (1 - t + c / K)), rate / ((1 - t) * c)
    return torch.where(x_t == MASK, 1 / (t * (1 - t)), torch.where(x_t == x_0, same, other))


@pytest.mark.parametrize("weighting", ["dynamic", "elbo"])
@pytest.mark.parametrize("p_uniform, gamma", [(0.1, 1.0), (0.2, 1.0), (0.3, 2.0)])
def test_loss_is_the_naive_one_and_so_is_its_gradient(p_uniform, gamma, weighting):
    process = chain(p_uniform, gamma)
    gidd = build("gidd", process, token_weight=weighting)
    batch = real_batch(process, 16, 12, padding=2, given=3)
    corrupted = gidd.corrupt(batch, training_noise(16))
    t = corrupted.times
    assert torch.allclose(t, 1e-4 + (1 - 2e-4) * training_noise(16).strata, rtol=1e-12)
    logits = gidd.predict(corrupted).logits.detach().requires_grad_()
    loss = gidd.loss(gidd.predict(corrupted)._replace(tokens=TokenLogits.known(logits)), corrupted)
    if weighting == "elbo":
        weight = naive_elbo_weight(process, corrupted.tokens, batch.tokens, t)
    else:
        scale = 2**gamma * p_uniform / (1 - p_uniform)
        same = (scale / K * (t / (1 - t)) ** (gamma / 2)).clamp(max=2)[:, None]
        weight = torch.where(corrupted.tokens == MASK, 2.0, torch.where(corrupted.tokens == batch.tokens, same, 1.0))
    divergence = naive_divergence(process, logits, corrupted.tokens, batch.tokens, t)
    expected = (weight * divergence * batch.loss_mask).sum()
    assert float(loss.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert int(loss.count) == 16 * 7
    (ours,), (theirs,) = torch.autograd.grad(loss.total, logits), torch.autograd.grad(expected, logits)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6 * float(theirs.abs().max()))
    assert torch.all(ours[..., MASK] == 0)


@pytest.mark.parametrize("weighting", ["dynamic", "elbo"])
def test_without_uniform_noise_it_is_masked_diffusion(weighting):
    """2 (1-t) cross-entropy of masked tokens in training, 1/t of it in the bound; nothing elsewhere."""
    gidd = build("gidd", chain(0.0), token_weight=weighting)
    batch = real_batch(chain(0.0), 16, 12, padding=2)
    corrupted = gidd.corrupt(batch, training_noise(16))
    assert torch.all((corrupted.tokens == batch.tokens) | (corrupted.tokens == MASK))
    prediction = gidd.predict(corrupted)
    keep = torch.arange(VOCAB) != MASK
    log_p = torch.where(keep, prediction.logits.double(), -torch.inf).log_softmax(-1)
    nats = -log_p.gather(-1, batch.tokens[..., None])[..., 0] * (corrupted.tokens == MASK) * batch.loss_mask
    weight = 2 * (1 - corrupted.times) if weighting == "dynamic" else 1 / corrupted.times
    expected = float((weight[:, None] * nats).sum().detach())
    assert float(gidd.loss(prediction, corrupted).total.detach()) == pytest.approx(expected, rel=1e-6)


def test_without_uniform_noise_the_bound_is_that_of_masked_diffusion():
    """Draw by draw MDLM's of the same network, and what decoding at t = 1e-5 adds: log K for a masked token."""
    gidd = build("gidd", chain(0.0))
    mdlm = MDLM(None, gidd.network, mask_id=MASK, bos_id=0, eos_id=0)
    batch, noise = real_batch(chain(0.0), 16, 12, padding=2), training_noise(16, "validation")
    ours, theirs = gidd.evaluate(batch, noise)["bound"], mdlm.evaluate(batch, noise)["bound"]
    assert torch.allclose(ours, theirs + 10 * 1e-5 * math.log(K), rtol=1e-6)


def test_bound_and_published_figure_draw_by_draw():
    """Both conventions written out: ranges of times, weights, and the bound's end."""
    process = chain(0.2)
    gidd = build("gidd", process)
    batch, noise = real_batch(process, 12, 10, padding=2), training_noise(12, "validation")
    figures = gidd.evaluate(batch, noise)
    replacement = torch.tensor(process.real)[replacements(noise, 10, K)]

    def density(times):
        c = c_and_slope(process, times)[0]
        u = noise.uniforms(10)
        noised = torch.where(u < ((times + c) / (1 + c)).float()[:, None], replacement, batch.tokens)
        noised = torch.where(u < (times / (1 + c)).float()[:, None], MASK, noised)
        logits = gidd.network(noised, times).logits
        weight = naive_elbo_weight(process, noised, batch.tokens, times)
        return (weight * naive_divergence(process, logits, noised, batch.tokens, times) * batch.loss_mask).sum(1)

    root = 1e-5 + (1 - 1e-5) * noise.strata  # t = root^2 at gamma = 1
    bound = (1 - 1e-5) * 2 * root * density(root**2) + 8 * gidd.process.end_nats()
    assert torch.allclose(figures["bound"], bound, rtol=1e-7)
    assert torch.allclose(figures["published"], density(1e-4 + (1 - 2e-4) * noise.strata), rtol=1e-7)


def toy(process: Chain, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    sequences, law = toy_law(length=2, vocabulary=3, seed=seed)
    return torch.tensor(process.real)[sequences], law


def bound_times(process: Chain):
    power = 2 / process.gamma if process.p_uniform else 1
    return lambda u: (1e-5 + (1 - 1e-5) * u) ** power


TOYS = [Chain(4, 1, p_uniform=0.0), Chain(4, 1, p_uniform=0.2), Chain(4, 1, p_uniform=0.3, gamma=2.0)]


@pytest.mark.parametrize("process", TOYS)
def test_bound_is_tight_for_the_leave_one_out_posterior(process):
    """By enumeration of two dependent tokens and all x_t, and quadrature over t: the expected bound is the entropy of
    the law, above it by no more than the cost of the end; and for each sequence -log p."""
    sequences, law = toy(process)
    gidd = build("gidd", process, Bayes(process, sequences, law))
    gap = exact_figure(gidd, process, sequences, bound_times(process)) + law.log()
    assert gidd.process.end_nats() < 2e-4
    assert 0 < float((law * gap).sum()) < 2 * gidd.process.end_nats()
    # The decoder at the end does not know the law, so the model's is not quite it: rare sequences gain from their
    # neighbours.
    assert float(gap.abs().max()) < 2e-3


@pytest.mark.parametrize("process", TOYS[1:])
def test_bound_is_loose_for_the_posterior_and_holds_for_any_denoiser(process):
    sequences, law = toy(process)
    entropy = float(-(law * law.log()).sum())
    networks = [Bayes(process, sequences, law, leave_one_out=False), Bayes(process, sequences, toy(process, 1)[1]),
                SoftTable(process)]  # fmt: skip
    for network in networks:
        bound = exact_figure(build("gidd", process, network), process, sequences, bound_times(process))
        assert float((law * bound).sum()) > entropy + 0.05


@pytest.mark.parametrize("p_uniform", [0.0, 0.2])
def test_step_zero_loss_is_the_closed_form_of_a_uniform_prediction(p_uniform):
    """Model marginal (1 - t + c) / (C K) at every real token."""
    process = chain(p_uniform)
    gidd = build("gidd", process, randomise=False)
    batch = real_batch(process, 64, 12)
    corrupted = gidd.corrupt(batch, training_noise(64))
    prediction = gidd.predict(corrupted)
    assert torch.all(prediction.logits == 0)
    t = corrupted.times[:, None]
    c = c_and_slope(process, t)[0]
    same, other, model = (1 - t + c / K) / (1 + c), c / K / (1 + c), (1 - t + c) / (1 + c) / K
    kl = same * (same / model).log() + (K - 1) * torch.special.xlogy(other, other / model)
    masked, right = corrupted.tokens == MASK, corrupted.tokens == batch.tokens
    r = torch.where(masked, 1.0, torch.where(right, same, other) / model)
    weight = torch.where(right, p_uniform / (1 - p_uniform) * 2 / K * (t / (1 - t)).sqrt(), 1.0).clamp(max=2)
    weight = torch.where(masked, 2.0, weight)
    expected = float((weight * (kl + r - r.log() - 1)).sum())
    assert float(gidd.loss(prediction, corrupted).total.detach()) == pytest.approx(expected, rel=1e-6)


# -- what holds for every objective ----------------------------------------------------------------------------------


def test_corrupt_is_a_function_of_the_sample_and_keeps_what_is_given():
    process = chain(0.3)
    gidd = build("gidd", process)
    batch, noise = real_batch(process, 8, 12, given=4), training_noise(8)
    whole = gidd.corrupt(batch, noise)
    assert torch.equal(whole.tokens[:, :4], batch.tokens[:, :4])
    free, clean = whole.tokens[:, 4:], batch.tokens[:, 4:]
    assert (free == MASK).any() and ((free != MASK) & (free != clean)).any() and (free == clean).any()
    for which in ([3], [6, 1], [7, 6, 5, 4, 3, 2, 1, 0]):
        some = gidd.corrupt(*rows(batch, noise, torch.tensor(which)))
        for name in ("tokens", "times"):
            assert torch.equal(getattr(whole, name)[which], getattr(some, name)), name


def test_losses_of_micro_batches_add_up():
    process = chain(0.2)
    gidd = build("gidd", process)
    batch, noise = real_batch(process, 8, 12, padding=2), training_noise(8)

    def loss(piece):
        corrupted = gidd.corrupt(*piece)
        return gidd.loss(gidd.predict(corrupted), corrupted)

    whole = loss((batch, noise))
    parts = [loss(rows(batch, noise, torch.arange(k, k + 2))) for k in range(0, 8, 2)]
    assert sum(float(part.total.detach()) for part in parts) == pytest.approx(float(whole.total.detach()), rel=1e-5)
    assert sum(int(part.count) for part in parts) == int(whole.count) == 80
    assert float(whole.bucket_sums.sum()) == pytest.approx(float(whole.total.detach()), rel=1e-9)


@pytest.mark.parametrize("p_uniform", [0.0, 0.2])
def test_the_mask_is_never_predicted(p_uniform):
    process = chain(p_uniform)
    gidd = build("gidd", process)
    corrupted = gidd.corrupt(real_batch(process, 4, 12), training_noise(4))
    prediction = gidd.predict(corrupted)
    tilted = prediction.logits + 50.0 * (torch.arange(VOCAB) == MASK)
    loss = gidd.loss(prediction, corrupted)
    same = gidd.loss(prediction._replace(tokens=TokenLogits.known(tilted)), corrupted)
    assert float(loss.total.detach()) == pytest.approx(float(same.total.detach()), rel=1e-6)


@pytest.mark.parametrize("options, message", [
    ({"gamma": 4.0}, "objective.gamma = 4.0 must lie in"),
    ({"gamma": 0.0}, "objective.gamma"),
    ({"p_uniform": 1.0}, "objective.p_uniform"),
    ({"p_uniform": 0.0, "gamma": 2.0}, "is ignored"),
    ({"token_weight": "clip"}, "objective.token_weight"),
    ({"time_eps": 0.0}, "objective.time_eps"),
])  # fmt: skip
def test_settings_that_cannot_be_right(options, message):
    check = Check()
    gidd_config.check(check, Config(objective=gidd_config.GIDDConfig(**options)))
    assert len(check.problems) == 1 and message in check.problems[0].what
