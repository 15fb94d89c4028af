"""Losses and bounds against independent references in float64: closed forms, enumeration, oracles."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from braid.data_pipeline.loader import Batch
from braid.kernels.random import fold_key
from braid.pretrain.diffusion.times import evaluation_strata
from braid.pretrain.model.backbone import Prediction
from braid.pretrain.objectives.base import Noise
from braid.pretrain.objectives.mdlm import BOUND

from .conftest import BOS, MASK, VOCAB, batch_and_noise, build


def float64_nats(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log softmax over the vocabulary without the mask, written out in float64."""
    logits = logits.double()
    clean = torch.cat([logits[..., :MASK], logits[..., MASK + 1 :]], -1)
    assert targets.max() < MASK
    return torch.logsumexp(clean, -1) - logits.gather(-1, targets[..., None]).squeeze(-1)


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
    assert float(loss.total.double()) == pytest.approx(expected, rel=1e-6)
    # times are mapped to [1e-3, 1] and the survival is 1 - (1 - 1e-3) t
    assert torch.equal(t, 1e-3 + (1 - 1e-3) * noise.strata)
    rate = (corrupted.masked.double().mean(1) - (1 - eps) * t).mean().abs()
    assert rate < 5 * math.sqrt(0.25 / corrupted.masked.numel())


def test_ccdd_loss_is_the_closed_form():
    objective = build("ccdd", latent_dropout=0.4)
    batch, noise = batch_and_noise(64)
    corrupted = objective.corrupt(batch, noise)
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
    noise = Noise(0, batch.ordinals, torch.zeros(len(sequences), dtype=torch.float64))
    assert float((-objective.evaluate(batch, noise)["nll"]).exp().sum()) == pytest.approx(1, abs=1e-6)


class Oracle(torch.nn.Module):
    """The Bayes denoiser of a known law over short sequences: exact posteriors p(x_0^l | visible tokens)."""

    def __init__(self, sequences: torch.Tensor, probabilities: torch.Tensor) -> None:
        super().__init__()
        self.sequences, self.probabilities = sequences, probabilities
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def forward(self, tokens, times=None, latents=None, dropout=None) -> Prediction:
        logits = torch.full((*tokens.shape, VOCAB), -1e30, dtype=torch.float64)
        for row, visible in enumerate(tokens):
            known = visible != MASK
            fits = (self.sequences[:, known] == visible[known]).all(1)
            weights = self.probabilities * fits
            for position in range(len(visible)):
                mass = torch.zeros(VOCAB, dtype=torch.float64)
                mass.index_add_(0, self.sequences[:, position], weights)
                logits[row, position] = (mass / mass.sum()).clamp(min=1e-300).log()
        return Prediction(logits)


def toy_law(length: int, vocabulary: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    sequences = torch.tensor(list(itertools.product(range(vocabulary), repeat=length)))
    logits = torch.randn(len(sequences), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1.5
    return sequences, logits.softmax(0)


@dataclass(frozen=True)
class GivenMask(Noise):
    """Noise whose uniforms mask exactly the positions of `mask`, whatever the time."""

    mask: torch.Tensor = None

    def uniforms(self, num_positions, *, word=0):
        return torch.where(self.mask, 0.0, 1.0)


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
            noise = GivenMask(0, ordinals, strata, mask=torch.tensor(mask).expand(num, -1))
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


@pytest.mark.parametrize("t", [0.9, 0.5, 0.1])
def test_mdlm_integrand_is_the_rate_of_kl_between_true_and_model_posteriors(t):
    """Finite-step float64 KL(q(x_s|x_t,x_0) || p(x_s|x_t)) / dt against weight x cross-entropy, relative 5e-5.

    The posteriors are written out over all values of one token; nothing of the objective is used for them.
    """
    generator = torch.Generator().manual_seed(int(t * 10))
    p = torch.randn(VOCAB - 1, generator=generator, dtype=torch.float64).softmax(0)  # model's p(x_0 | x_t)
    x_0, dt = 3, 1e-6
    s = t - dt
    alpha_t, alpha_s = 1 - t, 1 - s
    reveal = (alpha_s - alpha_t) / (1 - alpha_t)
    true = torch.zeros(VOCAB, dtype=torch.float64)
    true[x_0], true[MASK] = reveal, 1 - reveal
    model = torch.cat([reveal * p, torch.tensor([1 - reveal], dtype=torch.float64)])
    kl = float((true[true > 0] * (true[true > 0] / model[true > 0]).log()).sum())
    rate = (1 - alpha_t) * kl / dt  # the token is masked with probability 1 - alpha_t; else both posteriors agree
    time = torch.tensor(t, dtype=torch.float64)
    integrand = float((1 - BOUND.alpha(time)) * BOUND.elbo_weight(time) * -p[x_0].log())
    assert rate == pytest.approx(integrand, rel=5e-5)


def test_gidd_elbo_without_uniform_noise_is_ce_over_t():
    """CCDD's token process is GIDD's with p_u = 0: its ELBO weight 1/(t(1-t)) times D = (1-t) CE is CE / t."""
    for t in (0.05, 0.5, 0.95):
        p = torch.randn(VOCAB - 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64).softmax(0)
        x_0, alpha = 2, 1 - t
        q_true, q_model = torch.zeros(VOCAB, dtype=torch.float64), torch.zeros(VOCAB, dtype=torch.float64)
        q_true[x_0], q_true[MASK] = alpha, t
        q_model[: VOCAB - 1], q_model[MASK] = alpha * p, t
        present = q_true > 0
        kl = float((q_true[present] * (q_true[present] / q_model[present]).log()).sum())
        ratio = float(q_true[MASK] / q_model[MASK])
        itakura_saito = ratio - math.log(ratio) - 1  # at x_t = mask
        assert (kl + itakura_saito) / (t * (1 - t)) == pytest.approx(-math.log(float(p[x_0])) / t, rel=1e-12)


def test_bounds_agree_between_the_objectives_at_p_r_1_without_latents():
    """With the latent input closed, CCDD's token bound is MDLM's of the same network, draw by draw."""
    ccdd, mdlm = build("ccdd"), build("mdlm", time_conditioning=True)
    with torch.no_grad():
        for parameter in ccdd.network.latent_input.linear.parameters():
            parameter.zero_()
    mdlm.network = build("ccdd").network
    batch, noise = batch_and_noise(8, purpose="validation")

    class WithoutLatents(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, tokens, times, latents=None, dropout=None):
            return self.network(tokens, times, torch.zeros(*tokens.shape, self.network.latent_dim), dropout)

    mdlm.network = WithoutLatents(ccdd.network)
    ours, theirs = ccdd.evaluate(batch, noise)["token_bound"], mdlm.evaluate(batch, noise)["bound"]
    assert torch.allclose(ours, theirs, rtol=1e-6)


def test_joint_nelbo_of_an_uninformative_model_is_the_exact_cost():
    """One fixed text and a network that knows it: the joint bound must not go below the truth, which is 0 nats."""
    ccdd = build("ccdd", latent_sigma=0.2)
    text = torch.randint(0, VOCAB - 1, (1, 8), generator=torch.Generator().manual_seed(3))
    clean = ccdd.encoder.encode(text, torch.zeros_like(text, dtype=torch.bool))

    class KnowsTheText(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.anchor = torch.nn.Parameter(torch.zeros(1))

        def forward(self, tokens, times, latents=None, dropout=None):
            logits = 60.0 * F.one_hot(text, VOCAB).double()
            return Prediction(logits.expand(len(tokens), -1, -1), clean.expand(len(tokens), -1, -1))

    ccdd.network = KnowsTheText()
    num = 256
    ordinals = torch.arange(num)
    batch = Batch(text.expand(num, -1), torch.ones(num, 8, dtype=torch.bool), ordinals)
    key, draws = fold_key(0, "validation"), 16
    values = torch.stack([
        ccdd.evaluate(batch, Noise(key, ordinals, evaluation_strata(key, ordinals, d, draws), d))["joint_nelbo"]
        for d in range(draws)
    ]).mean(0)  # fmt: skip
    error = float(values.std() / math.sqrt(num))
    assert error < 0.5
    assert abs(float(values.mean())) < 4 * error
