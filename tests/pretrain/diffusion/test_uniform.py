"""The uniform process in index form against matrices, enumeration and the numbers of the specification."""

import math
from dataclasses import astuple

import numpy as np
import pytest
import torch

from braid.kernels.linear_loss import Rows, linear_loss
from braid.kernels.sampling_eager import log_posterior
from braid.parallel.vocabulary import Vocabulary
from braid.pretrain.diffusion import uniform
from braid.pretrain.diffusion.uniform import (
    MarginalDivergence,
    decoding_nats,
    jump_weight,
    marginal_divergences,
    reverse_step,
    skip_mask,
)

from .chains import Chain, random_laws

CHAIN = Chain(vocab_size=6, mask_id=2)
K = 5


@pytest.mark.parametrize("mask_id", [0, 2, 5])
def test_integers_become_the_ids_that_are_not_the_mask(mask_id):
    expected = [token for token in range(6) if token != mask_id]
    assert skip_mask(torch.arange(5), mask_id).tolist() == expected


def uniform_nats(probabilities, tokens, targets, survival, num_tokens):
    """NELBO density of each position, from the two parts that the losses use."""
    kl, ratio = marginal_divergences(probabilities, tokens, targets, survival, (1 - survival) / num_tokens)
    return jump_weight(tokens, targets, survival, num_tokens) * (kl + ratio)


def every_place(law: torch.Tensor, t: float, chain: Chain = CHAIN, dtype=torch.float64):
    """x_t, x_0 [1, K * K] over all pairs of real tokens, and one law for all of them."""
    tokens, targets = torch.cartesian_prod(torch.tensor(chain.real), torch.tensor(chain.real)).T
    probabilities = law.to(dtype).expand(1, len(tokens), -1)
    return probabilities, tokens[None], targets[None], torch.tensor([1 - t], dtype=torch.float64)


def naive_nats(law: torch.Tensor, i: int, m: int, alpha: float) -> float:
    """Difference of the jump rates and their KL, jump by jump, per unit of alpha."""
    y = K * alpha * law + 1 - alpha
    x = K * alpha * CHAIN.clean(m) + 1 - alpha
    total = 0.0
    for j in CHAIN.real:
        if j != i:
            model, true = float(y[j] / y[i]) / (K * alpha), float(x[j] / x[i]) / (K * alpha)
            total += model - true + true * math.log(true / model)
    return total


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("t", [1e-4, 0.2, 0.7, 0.999])
def test_nats_are_the_kl_of_the_jump_rates(t, dtype, tolerance):
    for law in random_laws(3, CHAIN, seed=1):
        probabilities, tokens, targets, survival = every_place(law, t, dtype=dtype)
        nats = uniform_nats(probabilities, tokens, targets, survival, K)[0]
        assert nats.dtype == torch.float64
        expected = [naive_nats(law, i, m, 1 - t) for i, m in zip(tokens[0].tolist(), targets[0].tolist(), strict=True)]
        # Close to t = 1 the density vanishes like alpha; what is lost there is absolute.
        expected = torch.tensor(expected, dtype=torch.float64)
        assert torch.allclose(nats, expected, rtol=tolerance, atol=tolerance)
        assert torch.all(nats > 0)


@pytest.mark.parametrize("t", [0.05, 0.5, 0.95])
def test_nats_are_the_rate_of_kl_between_true_and_model_steps(t):
    """Finite-step KL of the reverse kernels over dt, which tends to the density: error below 1e-4 at dt = 1e-6."""
    law = random_laws(1, CHAIN, seed=2)[0]
    probabilities, tokens, targets, survival = every_place(law, t)
    nats = uniform_nats(probabilities, tokens, targets, survival, K)[0]
    for value, i, m in zip(nats.tolist(), tokens[0].tolist(), targets[0].tolist(), strict=True):
        rough, fine = (CHAIN.kl_rate(t, dt, i, m, law) for dt in (1e-4, 1e-6))
        assert fine == pytest.approx(value, rel=1e-4)
        assert abs(fine - value) < 0.05 * abs(rough - value) + 1e-9


def test_divergences_are_those_of_the_marginals():
    law, t = random_laws(1, CHAIN, seed=3)[0], 0.4
    probabilities, tokens, targets, survival = every_place(law, t)
    kl, ratio = marginal_divergences(probabilities, tokens, targets, survival, (1 - survival) / K)
    matrix, model = CHAIN.marginal(t), law @ CHAIN.marginal(t)
    for n, (i, m) in enumerate(zip(tokens[0].tolist(), targets[0].tolist(), strict=True)):
        true = matrix[m]
        seen = true > 0
        assert float(kl[0, n]) == pytest.approx(float((true[seen] * (true / model)[seen].log()).sum()), rel=1e-10)
        r = float(true[i] / model[i])
        assert float(ratio[0, n]) == pytest.approx(r - math.log(r) - 1, rel=1e-10)


def test_nats_agree_in_float32_at_a_large_vocabulary():
    """50257 tokens, sharp and flat predictions, early and late times: float32 within 1e-6 relative in sum."""
    generator = torch.Generator().manual_seed(0)
    num_tokens = 50257
    logits = torch.randn(4, 3, num_tokens + 1, generator=generator) * torch.tensor([0.0, 1.0, 3.0, 8.0])[:, None, None]
    logits[..., 7] = -torch.inf
    targets = torch.tensor([[1, 2, 3]]).expand(4, -1)
    logits[2:, 0, 1] += 30.0  # right and sure of it
    tokens = torch.tensor([[1, 2, 9], [1, 9, 3], [1, 9, 3], [9, 2, 11]])
    survival = torch.tensor([0.001, 0.4, 0.9, 0.999], dtype=torch.float64)
    low = uniform_nats(logits.softmax(-1), tokens, targets, survival, num_tokens)
    high = uniform_nats(logits.double().softmax(-1), tokens, targets, survival, num_tokens)
    assert torch.allclose(low, high, rtol=2e-6, atol=1e-7)
    assert float(low.sum()) == pytest.approx(float(high.sum()), rel=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1.0, 6.0])
def test_the_gradient_in_closed_form_is_that_of_autograd(scale, monkeypatch):
    """Of the loss of logits, in float64 and, closely, float32; right tokens, wrong ones, and rows that do not count."""
    generator, num, size = torch.Generator().manual_seed(1), 40, 12
    logits = scale * torch.randn(num, size, generator=generator, dtype=torch.float64)
    tokens, targets = skip_mask(torch.randint(0, size - 1, (2, num), generator=generator), 2)
    tokens[:15] = targets[:15]
    survival = torch.rand(num, generator=generator, dtype=torch.float64).clamp(1e-3, 1 - 1e-3)
    noise, weights = (1 - survival) / (size - 1), torch.rand(num, generator=generator, dtype=torch.float64)
    counts = torch.arange(num) % 4 > 0

    def both(logits, precise=False):
        each = (tokens, targets, survival, noise, weights)
        row_loss = MarginalDivergence(*each, 2, Vocabulary(size), precise)
        return linear_loss(logits, None, None, Rows(counts), row_loss)

    given = logits.clone().requires_grad_()
    law = torch.where(torch.arange(size) == 2, -torch.inf, given).softmax(-1)
    kl, ratio = marginal_divergences(law[:, None], tokens[:, None], targets[:, None], survival, noise)
    nats = (kl + ratio)[:, 0]
    expected = (weights * nats)[counts].sum()
    (wanted,) = torch.autograd.grad(expected, given)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        leaf = logits.to(dtype, copy=True).requires_grad_()
        total, values = both(leaf)
        total.backward()
        assert float(total) == pytest.approx(float(expected), rel=max(tolerance / 20, 1e-12))
        torch.testing.assert_close(values, (nats * counts).detach(), rtol=tolerance, atol=tolerance)
        assert (leaf.grad - wanted).abs().max() < tolerance * wanted.abs().max()
    monkeypatch.setattr(uniform, "FLOAT64_CHUNK", 7 * size)  # seven rows at a time
    total, values = both(logits.float(), precise=True)
    assert float(total) == pytest.approx(float(expected), rel=1e-6) and values.dtype == torch.float64


def test_minimiser_is_the_leave_one_out_posterior():
    """V = 3, L = 1, law (.7, .2, .1), alpha = 1 - t: the integral is the entropy 0.801819 when the denoiser says the
    law of x_0 without position l (so here the law itself), and 1.257363 when it says p(x_0 | x_t)."""
    chain = Chain(vocab_size=4, mask_id=3)
    law = torch.tensor([0.7, 0.2, 0.1, 0.0], dtype=torch.float64)
    nodes, weights = np.polynomial.legendre.leggauss(60)
    v, dv = (nodes + 1) / 2, weights / 2
    totals = {"leave-one-out": 0.0, "posterior": 0.0}
    for t, weight in zip((v**3).tolist(), (3 * v**2 * dv).tolist(), strict=True):  # tames the logarithm at t = 0
        joint = law[:, None] * chain.marginal(t)  # x_0, x_t
        posterior = joint / joint.sum(0).clamp(min=1e-300)
        _, tokens, targets, survival = every_place(law, t, chain)
        probability = joint[targets[0], tokens[0]]
        for name, said in {
            "leave-one-out": law.expand(len(probability), -1),
            "posterior": posterior.T[tokens[0]],
        }.items():
            nats = uniform_nats(said[None], tokens, targets, survival, 3)[0]
            totals[name] += weight * float((probability * nats).sum())
    assert totals["leave-one-out"] == pytest.approx(0.801819, abs=2e-6)
    assert totals["leave-one-out"] == pytest.approx(float(-torch.special.xlogy(law, law).sum()), abs=1e-7)
    assert totals["posterior"] == pytest.approx(1.257363, abs=2e-6)


@pytest.mark.parametrize("t, s", [(1.0, 0.75), (0.5, 0.3), (0.2, 0.0)])
def test_posterior_is_bayes_rule(t, s):
    law = random_laws(1, CHAIN, seed=4)[0]
    tokens = torch.tensor(CHAIN.real)
    step = reverse_step(1 - t, 1 - s, K)
    posterior = log_posterior(law.expand(K, -1), tokens, CHAIN.mask_id, *astuple(step))
    assert torch.all(posterior[:, CHAIN.mask_id] == -torch.inf)
    expected = torch.stack([CHAIN.reverse(s, t, i, law) for i in CHAIN.real])
    assert torch.allclose(posterior.softmax(-1), expected, rtol=1e-12, atol=0)


def test_last_step_weighs_the_prediction_with_the_evidence():
    """At s = 0: p[k] (a [k = i] + h / V)."""
    law, a = random_laws(1, CHAIN, seed=5)[0], 0.25
    step = reverse_step(a, 1.0, K)
    posterior = log_posterior(law[None], torch.tensor([4]), CHAIN.mask_id, *astuple(step)).softmax(-1)[0]
    expected = law * (a * CHAIN.clean(4) + (1 - a) / K)
    assert torch.allclose(posterior, expected / expected.sum(), rtol=1e-12)


def test_decoding_without_a_network():
    """E[-log p(x_0 | x_t)] by Bayes' rule from equally likely tokens, written out; and its size where bounds use it."""
    for chain, t in ((CHAIN, 0.3), (Chain(6, 2, p_uniform=0.2), 0.3), (Chain(6, 2, p_uniform=0.0), 0.3)):
        matrix = chain.marginal(t)[chain.real]  # x_0 real, x_t any
        posterior = matrix / matrix.sum(0).clamp(min=1e-300)
        expected = float(-(matrix * posterior.clamp(min=1e-300).log()).sum(1)[0])
        alpha, noise = chain.coefficients(t)
        other, mask = float(noise[0]), float(noise[chain.mask_id])
        assert decoding_nats(alpha, other, K, mask) == pytest.approx(expected, rel=1e-12)
    assert 0 < decoding_nats(1 - 1e-5, 1e-5 / 50257, 50257) < 3e-4
