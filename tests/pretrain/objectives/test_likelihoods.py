"""Losses and bounds against independent references in float64: closed forms, enumeration, oracles."""

import itertools
import math

import numpy as np
import pytest
import torch

from braid.data_pipeline.loader import Batch
from braid.pretrain.objectives.base import Noise

from .conftest import BOS, LATENT_DIM, MASK, VOCAB, batch_and_noise, build
from .references import Oracle, SameAnswer, float64_nats, given_mask, given_noise, toy_law


@pytest.mark.parametrize("weighting", ["elbo", "low_variance"])
def test_mdlm_loss_is_the_closed_form(weighting):
    """Same weights, tokens, times and masks: within 1e-6 of float64."""
    objective = build("mdlm", loss=weighting)
    batch, noise = batch_and_noise(16)
    corrupted = objective.corrupt(batch, noise)
    prediction = objective.predict(corrupted)
    nats = float64_nats(prediction.logits, batch.tokens)
    t, eps = corrupted.times, 1e-3
    weight = (1 - eps) / ((1 - eps) * t) if weighting == "elbo" else torch.ones_like(t)
    expected = float((weight[:, None] * nats * (corrupted.tokens == MASK)).sum().detach())
    loss = objective.loss(prediction, corrupted)
    assert float(loss.total.detach()) == pytest.approx(expected, rel=1e-6)
    # times are mapped to [1e-3, 1] and the survival is 1 - (1 - 1e-3) t
    assert torch.equal(t, 1e-3 + (1 - 1e-3) * noise.strata)
    rate = (corrupted.masked.double().mean(1) - (1 - eps) * t).mean().abs()
    assert rate < 5 * math.sqrt(0.25 / corrupted.masked.numel())


def test_ccdd_loss_is_the_closed_form():
    objective = build("ccdd", latent_dropout=0.4)
    batch, noise = batch_and_noise(64)
    corrupted = objective.corrupt(batch, noise)
    with torch.no_grad():
        prediction = objective.predict(corrupted)
    t = corrupted.times
    token = 2 * (1 - t)[:, None] * float64_nats(prediction.logits, batch.tokens) * (corrupted.tokens == MASK)
    kept = torch.all(corrupted.latents == 0, dim=-1).all(-1).logical_not()
    assert 0 < int(kept.sum()) < 64
    error = (prediction.latents.double() - corrupted.latent_targets.double()).square().clamp(max=10).mean(-1)
    latent = (1 / (1 - t)).clamp(max=10)[:, None] * error * kept[:, None]
    loss = objective.loss(prediction, corrupted)
    assert float(loss.terms["token_loss"]) == pytest.approx(float(token.sum()), rel=1e-6)
    assert float(loss.terms["latent_loss"]) == pytest.approx(float(latent.sum()), rel=1e-6)
    assert float(loss.total) == pytest.approx(float((token + latent).sum()), rel=1e-6)


def test_ar_bound_is_the_exact_likelihood():
    """Against the chain rule, one prefix at a time, each in its own forward pass."""
    objective = build("ar")
    batch, noise = batch_and_noise(4)
    measured = objective.evaluate(batch, noise)["nll"]
    exact = torch.zeros(4, dtype=torch.float64)
    inputs = torch.cat([torch.full((4, 1), BOS), batch.tokens], 1)
    for position in range(batch.tokens.shape[1]):
        logits = objective.network(inputs[:, : position + 1], None).logits[:, -1]
        exact += float64_nats(logits, batch.tokens[:, position])
    assert torch.allclose(measured, exact, rtol=1e-6)


def test_ar_probabilities_sum_to_one():
    """Over every sequence of length 2: an exact likelihood of all tokens, the first included."""
    objective = build("ar")
    sequences = torch.tensor(list(itertools.product(range(MASK), repeat=2)))
    batch = Batch(sequences, torch.ones_like(sequences, dtype=torch.bool), torch.arange(len(sequences)))
    noise = Noise.evaluation(0, batch.ordinals, 0, 1)
    nats = objective.evaluate(batch, noise)["nll"].detach()
    assert float((-nats).exp().sum()) == pytest.approx(1, abs=1e-6)


def exact_bound(objective, sequences: torch.Tensor) -> torch.Tensor:
    """E over masks (all of them) and times (Gauss-Legendre) of one draw of the bound: float64 [num sequences]."""
    num, length = sequences.shape
    ordinals = torch.arange(num)
    batch = Batch(sequences, torch.ones_like(sequences, dtype=torch.bool), ordinals)
    nodes, weights = np.polynomial.legendre.leggauss(8)  # exact: the integrand is a polynomial of degree < 3 in t
    total = torch.zeros(num, dtype=torch.float64)
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        strata = torch.full((num,), node, dtype=torch.float64)
        time = 1e-5 + (1 - 1e-5) * node
        for mask in itertools.product([False, True], repeat=length):
            probability = time ** sum(mask) * (1 - time) ** (length - sum(mask))
            noise = given_mask(strata, torch.tensor(mask).expand(num, -1))
            total += weight * probability * objective.evaluate(batch, noise)["bound"]
    return total


def test_mdlm_bound_is_a_bound_and_tight_for_the_bayes_denoiser():
    """By enumeration over sequences, masks and times: E[NELBO] = entropy for the Bayes denoiser, above it for others.

    (Up to the 1e-5 of time that is left out, worth less than 1e-5 times the entropy of a token.)
    """
    sequences, law = toy_law(length=3, vocabulary=3, seed=0)
    entropy = float(-(law * law.log()).sum())
    objective = build("mdlm")
    objective.network = Oracle(sequences, law)
    assert float((law * exact_bound(objective, sequences)).sum()) == pytest.approx(entropy, abs=5e-5)

    # Denoisers of another law: the bound is that law's cost, at least the entropy by Gibbs, for every sequence a bound.
    for seed in (1, 2):
        _, other = toy_law(length=3, vocabulary=3, seed=seed)
        objective.network = Oracle(sequences, other)
        assert float((law * exact_bound(objective, sequences)).sum()) > entropy + 0.01


LAW = torch.randn(VOCAB - 1, generator=torch.Generator().manual_seed(5), dtype=torch.float64).softmax(0)
"""p(x_0 | x_t) of a network that always says the same."""
TOKEN = 3


def nats_at(name: str, which: str, t: float, *, masked: bool = True) -> float:
    """One token that is masked at time t, or not: its nats by `loss`, or those of a figure of `evaluate` per unit of
    time (divided by the length of the range its times are drawn from)."""
    options = {"mdlm": {"loss": "elbo"}, "ccdd": {"token_weight": "elbo", "latent_dropout": 0.0}}[name]
    objective = build(name, **options)
    objective.network = SameAnswer(LAW, LATENT_DIM)
    first, last = {"mdlm": (1e-3, 1.0), "ccdd": (1e-4, 1 - 1e-4)}[name] if which == "loss" else (1e-5, 1.0)
    strata = torch.tensor([(t - first) / (last - first)], dtype=torch.float64)
    noise = given_mask(strata, torch.tensor([[masked]]))
    batch = Batch(torch.tensor([[TOKEN]]), torch.tensor([[True]]), torch.tensor([0]))
    if which != "loss":
        return float(objective.evaluate(batch, noise)[which]) / (last - first)
    corrupted = objective.corrupt(batch, noise)
    assert float(corrupted.times) == pytest.approx(t, rel=1e-12)
    loss = objective.loss(objective.predict(corrupted), corrupted)
    return float(loss.terms["token_loss"])


WAYS = [("mdlm", "loss"), ("mdlm", "bound"), ("ccdd", "loss"), ("ccdd", "token_bound"),
        ("ccdd", "token_bound_latents_off")]  # fmt: skip


@pytest.mark.parametrize("t", [0.9, 0.5, 0.1])
@pytest.mark.parametrize("name, which", WAYS)
def test_nats_are_the_rate_of_kl_between_true_and_model_posteriors(name, which, t):
    """Finite-step float64 KL(q(x_s|x_t,x_0) || p(x_s|x_t)) / dt of a masked token, relative 5e-5; a visible one's is 0.

    The posteriors are written out over all values of one token; nothing of the objective is used for them.
    """
    eps = 1e-3 if (name, which) == ("mdlm", "loss") else 0.0
    s = t - 1e-6
    alpha_t, alpha_s = 1 - (1 - eps) * t, 1 - (1 - eps) * s
    reveal = (alpha_s - alpha_t) / (1 - alpha_t)
    true = torch.zeros(VOCAB, dtype=torch.float64)
    true[TOKEN], true[MASK] = reveal, 1 - reveal
    model = torch.cat([reveal * LAW, torch.tensor([1 - reveal], dtype=torch.float64)])
    kl = float((true[true > 0] * (true[true > 0] / model[true > 0]).log()).sum())
    assert nats_at(name, which, t) == pytest.approx(kl / (t - s), rel=5e-5)
    assert nats_at(name, which, t, masked=False) == 0


@pytest.mark.parametrize("t", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("which", ["loss", "token_bound"])
def test_ccdd_nats_are_the_gidd_elbo_without_uniform_noise(which, t):
    """CCDD's token process is GIDD's with p_u = 0: weight 1/(t(1-t)) times KL plus Itakura-Saito divergence at
    x_t = mask."""
    alpha = 1 - t
    q_true, q_model = torch.zeros(VOCAB, dtype=torch.float64), torch.zeros(VOCAB, dtype=torch.float64)
    q_true[TOKEN], q_true[MASK] = alpha, t
    q_model[: VOCAB - 1], q_model[MASK] = alpha * LAW, t
    present = q_true > 0
    kl = float((q_true[present] * (q_true[present] / q_model[present]).log()).sum())
    ratio = float(q_true[MASK] / q_model[MASK])
    itakura_saito = ratio - math.log(ratio) - 1
    assert nats_at("ccdd", which, t) == pytest.approx((kl + itakura_saito) / (t * (1 - t)), rel=1e-6)


def test_mdlm_figures_are_their_conventions_draw_by_draw():
    """`bound` is weight x cross-entropy times the length of [1e-5, 1]; `published` the plain mean over [1e-3, 1], of
    a process with eps = 1e-3. Uniforms between the two processes' mask probabilities tell them apart."""
    objective = build("mdlm")
    batch, _ = batch_and_noise(16, padding=2)
    u = torch.linspace(0, 0.999, 16, dtype=torch.float64)
    t_published, t_bound = 1e-3 + (1 - 1e-3) * u, 1e-5 + (1 - 1e-5) * u
    uniforms = torch.rand(batch.tokens.shape, generator=torch.Generator().manual_seed(0))
    uniforms[:, 0] = ((1 - 0.5e-3) * t_published).float()  # masked were it not for eps
    uniforms[:, 1] = ((1 - 1.5e-3) * t_published).float()
    figures = objective.evaluate(batch, given_noise(batch.ordinals, u, uniforms))

    def nats(masked):
        logits = objective.network(torch.where(masked, MASK, batch.tokens), None).logits
        return (float64_nats(logits, batch.tokens) * masked * batch.loss_mask).sum(1)

    published = nats(uniforms < ((1 - 1e-3) * t_published)[:, None]) / t_published
    bound = (1 - 1e-5) * nats(uniforms < t_bound[:, None]) / t_bound
    assert torch.allclose(figures["published"], published, rtol=1e-6)
    assert torch.allclose(figures["bound"], bound, rtol=1e-6)


def test_bounds_agree_between_the_objectives_at_p_r_1_without_latents():
    """With the latent input closed, CCDD's token bound is MDLM's of the same network, draw by draw."""
    ccdd, mdlm = build("ccdd"), build("mdlm", time_conditioning=True)
    with torch.no_grad():
        for parameter in ccdd.network.latent_input.linear.parameters():
            parameter.zero_()
    batch, noise = batch_and_noise(8, purpose="validation", padding=2)

    class WithoutLatents(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, tokens, times, dropout=None, segments=None):
            return self.network(tokens, times, torch.zeros(*tokens.shape, self.network.latent_dim), dropout)

    mdlm.network = WithoutLatents(ccdd.network)
    ours, theirs = ccdd.evaluate(batch, noise)["token_bound"], mdlm.evaluate(batch, noise)["bound"]
    assert torch.allclose(ours, theirs, rtol=1e-6)
