"""GIDD's mask + uniform process in index form against matrices: marginals, steps, weights, divergences, posterior."""

import math
from dataclasses import astuple

import pytest
import torch

from braid.kernels.sampling_eager import log_posterior
from braid.parallel.vocabulary import Vocabulary
from braid.pretrain.diffusion.absorbing import masked_cross_entropy
from braid.pretrain.diffusion.hybrid import Hybrid

from .chains import Chain, places, random_laws

MASK, K = 2, 5
PROCESSES = [(0.0, 1.0), (0.1, 1.0), (0.2, 1.0), (0.2, 0.5), (0.3, 2.0)]


def pair(p_uniform: float, gamma: float) -> tuple[Hybrid, Chain]:
    return Hybrid(p_uniform, gamma, K), Chain(K + 1, MASK, p_uniform=p_uniform, gamma=gamma)


def at(t: float) -> torch.Tensor:
    return torch.tensor([t], dtype=torch.float64)


@pytest.mark.parametrize("p_uniform, gamma", PROCESSES)
@pytest.mark.parametrize("t", [1e-6, 0.3, 0.5, 0.999])
def test_marginals(t, p_uniform, gamma):
    hybrid, chain = pair(p_uniform, gamma)
    alpha, noise = chain.coefficients(t)
    assert float(hybrid.survival(at(t))) == pytest.approx(alpha, rel=1e-12)
    assert float(hybrid.mask_probability(at(t))) == pytest.approx(float(noise[MASK]), rel=1e-12)
    assert float(hybrid.noise(at(t))) == pytest.approx(float(noise[0]), rel=1e-12)
    if t == 0.5:
        assert K * float(hybrid.noise(at(t))) == pytest.approx(p_uniform, rel=1e-12, abs=1e-15)


def index_form(hybrid: Hybrid, law: torch.Tensor, t: float, i: int, m: int) -> tuple[float, float]:
    """Weight and divergences of one place."""
    token, target = torch.tensor([[i]]), torch.tensor([[m]])
    logits = law.log()
    logits[MASK] = 3.0  # must not count
    weight = hybrid.elbo_weight(token, target, at(t), MASK)
    if hybrid.p_uniform == 0:
        nats = masked_cross_entropy(logits[None, None], target, token == MASK, MASK)
        return float(weight), float(hybrid.survival(at(t)) * nats)
    row_loss = hybrid.divergence(token, target, at(t), weight, mask_id=MASK, vocabulary=Vocabulary(K + 1))
    added, nats = row_loss(logits[None].clone(), torch.tensor([0]), False)
    assert float(added) == pytest.approx(float(weight * nats))
    return float(weight), float(nats)


@pytest.mark.parametrize("p_uniform, gamma", PROCESSES)
@pytest.mark.parametrize("t", [0.05, 0.5, 0.9])
def test_density_is_the_rate_of_kl_between_true_and_model_steps(t, p_uniform, gamma):
    """Weight times divergences against the finite-step KL of the reverse kernels over dt = 1e-7."""
    hybrid, chain = pair(p_uniform, gamma)
    law = random_laws(1, chain, seed=6)[0]
    for i, m in places(chain):
        if i not in chain.reachable(t, m):
            continue
        weight, divergence = index_form(hybrid, law, t, i, m)
        expected = chain.kl_rate(t, 1e-7, i, m, law)
        # A visible token does not change any more where there is no uniform noise.
        if p_uniform == 0 and i != MASK:
            assert weight * divergence == expected == 0
        else:
            assert weight * divergence == pytest.approx(expected, rel=1e-4)
            assert weight > 0 and divergence > 0


@pytest.mark.parametrize("p_uniform", [0.1, 0.3])
@pytest.mark.parametrize("t", [1e-5, 0.4, 0.99])
def test_divergences_are_those_of_the_marginals(t, p_uniform):
    hybrid, chain = pair(p_uniform, 1.0)
    law = random_laws(1, chain, seed=7)[0]
    for i, m in places(chain):
        true, model = chain.marginal(t)[m], law @ chain.marginal(t)
        r = float(true[i] / model[i])
        expected = float((true * (true / model).log()).sum()) + r - math.log(r) - 1
        assert index_form(hybrid, law, t, i, m)[1] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("t", [0.01, 0.5, 0.99])
def test_without_uniform_noise_the_elbo_is_cross_entropy_over_t(t):
    hybrid, chain = pair(0.0, 1.0)
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, 7, K + 1, generator=generator, dtype=torch.float64)
    targets = torch.tensor(chain.real)[torch.randint(0, K, (4, 7), generator=generator)]
    masked = torch.rand(4, 7, generator=generator) < 0.5
    tokens = torch.where(masked, MASK, targets)
    times = torch.full((4,), t, dtype=torch.float64)
    cross_entropy = masked_cross_entropy(logits, targets, masked, MASK)
    nats = hybrid.elbo_weight(tokens, targets, times, MASK) * hybrid.survival(times)[:, None] * cross_entropy
    assert torch.allclose(nats, cross_entropy / t, rtol=1e-12)
    assert torch.equal(nats == 0, ~masked)


@pytest.mark.parametrize("t", [0.1, 0.6])
def test_dynamic_weights_are_the_elbos_at_gamma_1(t):
    """Twice the ratio to the mask's: exactly 1 at wrong tokens, and up to 1 / V at right ones."""
    num_tokens = 10**6
    hybrid = Hybrid(0.2, 1.0, num_tokens)
    tokens, targets = torch.tensor([[7, 3, 4]]), torch.tensor([[3, 3, 3]])  # the mask, right, wrong
    elbo = hybrid.elbo_weight(tokens, targets, at(t), 7)[0]
    dynamic = hybrid.dynamic_weight(tokens, targets, at(t), 7)[0]
    assert torch.allclose(dynamic, 2 * elbo / elbo[0], rtol=1e-6)
    assert dynamic[0] == 2 and dynamic[2] == 1
    small = Hybrid(0.5, 1.0, 2).dynamic_weight(tokens[:, 1:2], targets[:, 1:2], at(0.99), 7)
    assert small == 2  # B / K sqrt(99) = 9.9, clipped


@pytest.mark.parametrize("p_uniform, gamma", PROCESSES)
@pytest.mark.parametrize("t, s", [(1.0, 0.8), (0.5, 0.3), (0.2, 0.0)])
def test_posterior_is_bayes_rule(t, s, p_uniform, gamma):
    hybrid, chain = pair(p_uniform, gamma)
    law = random_laws(1, chain, seed=8)[0]
    # At t = 1, and without uniform noise, some tokens cannot be seen.
    seen = [i for i in range(K + 1) if float((law @ chain.marginal(t))[i]) > 0]
    step = astuple(hybrid.reverse_step(t, s))
    posterior = log_posterior(law.expand(len(seen), -1), torch.tensor(seen), MASK, *step)
    expected = torch.stack([chain.reverse(s, t, i, law) for i in seen])
    assert torch.allclose(posterior.softmax(-1), expected, rtol=1e-10, atol=1e-15)
    if s == 0:
        assert torch.all(posterior[:, MASK] == -torch.inf)


@pytest.mark.parametrize("p_uniform, gamma", PROCESSES)
def test_times_of_the_bound_integrate_over_the_whole_range(p_uniform, gamma):
    """The mean of dt/du f(t) is the integral of f over [time_min, 1], time_min being so small that the end is cheap."""
    hybrid, _ = pair(p_uniform, gamma)
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    times, speed = hybrid.bound_times(u)
    first = float(hybrid.bound_times(at(0.0))[0])
    assert times.min() > first > 0 and times.max() < 1
    power = gamma / 2 - 1 if p_uniform else 0.5  # the density's singularity
    exact = (1 - first ** (power + 1)) / (power + 1)
    assert float((speed * times**power).mean()) == pytest.approx(exact, rel=1e-6)
    assert 0 < hybrid.end_nats() < 5e-4


def test_a_faster_decay_than_quadratic_is_no_process():
    """Above gamma = 2 the chain's matrices have negative entries (the specification's gamma = 4 from t = 2/3 on)."""
    with pytest.raises(AssertionError):
        Hybrid(0.2, 2.1, K)
    chain = Chain(K + 1, MASK, p_uniform=0.2, gamma=4.0)
    chain.step(0.6, 0.66)
    with pytest.raises(AssertionError):
        chain.step(0.67, 0.7)
