"""Gaussian steps against an oracle denoiser, and the terms of the joint bound against a case known in closed form."""

import math

import pytest
import torch

from braid.pretrain.diffusion.gaussian import (
    ddim_step,
    ddpm_step,
    noised,
    posterior_mean,
    reconstruction_nats,
)
from braid.pretrain.diffusion.schedules import GaussianSchedule

MEAN, STD = 1.0, 0.5
SCHEDULES = ["vp_linear", "flow_linear"]


def oracle(z, t, schedule):
    """E[z_0 | z_t] for z_0 ~ N(MEAN, STD^2)."""
    time = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = float(schedule.alpha(time)), float(schedule.sigma(time))
    gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    return MEAN + gain * (z - alpha * MEAN)


def sample(step, schedule, num_steps, generator):
    z = torch.randn(40000, generator=generator, dtype=torch.float64)
    times = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64).tolist()
    for t, s in zip(times[:-1], times[1:], strict=True):
        eps = torch.randn(z.shape, generator=generator, dtype=torch.float64)
        z = step(z, oracle(z, t, schedule), eps, t, s, schedule)
    return z


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_oracle_denoiser_keeps_the_data_distribution(name, sampler):
    """Mean within 1 %, standard deviation within 3 % at 256 steps, and closer than at 16: it converges."""

    def step(z, zhat, eps, t, s, schedule):
        return ddim_step(z, zhat, t, s, schedule) if sampler == "ddim" else ddpm_step(z, zhat, eps, t, s, schedule)

    schedule, generator = GaussianSchedule(name), torch.Generator().manual_seed(1)
    coarse, fine = (sample(step, schedule, n, generator) for n in (16, 256))
    assert abs(fine.mean() / MEAN - 1) < 0.01
    assert abs(fine.std() / STD - 1) < 0.03
    assert abs(fine.std() - STD) <= abs(coarse.std() - STD) + 0.005


def test_the_swapped_ddpm_step_would_fail_the_oracle_test():
    """Guards the test above: exchanging the two coefficients collapses the samples."""
    schedule = GaussianSchedule("vp_linear")

    def swapped(z, zhat, eps, t, s, schedule):
        return ddpm_step(zhat, z, eps, t, s, schedule)

    samples = sample(swapped, schedule, 256, torch.Generator().manual_seed(1))
    assert not abs(samples.std() / STD - 1) < 0.5


@pytest.mark.parametrize("latent_sigma", [0.0, 0.3])
@pytest.mark.parametrize("name", SCHEDULES)
def test_ddpm_step_is_the_posterior(name, latent_sigma):
    """Mean and variance of q(z_s | z_t) for z_0 ~ N(m, latent_sigma^2) by Gaussian conditioning on the joint law, in
    float64: that of q(z_s | z_t, z_0 = m) without a deviation."""
    schedule = GaussianSchedule(name)
    t, s, z_t, z_0 = 0.7, 0.4, torch.tensor(0.3, dtype=torch.float64), torch.tensor(-1.2, dtype=torch.float64)
    at = lambda f, x: float(f(torch.tensor(x, dtype=torch.float64)))  # noqa: E731
    alpha_t, alpha_s, sigma_t, sigma_s = (
        at(schedule.alpha, t), at(schedule.alpha, s), at(schedule.sigma, t), at(schedule.sigma, s),
    )  # fmt: skip
    a = alpha_t / alpha_s
    v_t, v_s = sigma_t**2 + alpha_t**2 * latent_sigma**2, sigma_s**2 + alpha_s**2 * latent_sigma**2
    covariance = a * v_s  # Cov(z_s, z_t), because z_t = a z_s + independent noise
    mean = alpha_s * z_0 + covariance / v_t * (z_t - alpha_t * z_0)
    variance = v_s - covariance**2 / v_t
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    middle = ddpm_step(z_t, z_0, zero, t, s, schedule, latent_sigma)
    assert middle.item() == pytest.approx(mean.item(), rel=1e-12)
    deviation = ddpm_step(z_t, z_0, one, t, s, schedule, latent_sigma) - middle
    assert deviation.item() ** 2 == pytest.approx(variance, rel=1e-10)
    if latent_sigma:  # the same from the posterior of z_0, whose mean the bound's error is about
        at_t = torch.tensor([t], dtype=torch.float64)
        estimate = posterior_mean(z_t.view(1, 1, 1), z_0.view(1, 1, 1), at_t, latent_sigma, schedule).squeeze()
        assert ddpm_step(z_t, estimate, zero, t, s, schedule).item() == pytest.approx(middle.item(), rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_last_step_returns_the_estimate(name, sampler):
    schedule, z, zhat = GaussianSchedule(name), torch.randn(5), torch.randn(5)
    last = ddim_step(z, zhat, 0.1, 0.0, schedule) if sampler == "ddim" else ddpm_step(z, zhat, z, 0.1, 0.0, schedule)
    assert torch.allclose(last, zhat)


def test_noised_rounds_coefficients_once():
    z, eps = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    alpha, sigma = torch.rand(2, dtype=torch.float64), torch.rand(2, dtype=torch.float64)
    expected = alpha.float().view(2, 1, 1) * z + sigma.float().view(2, 1, 1) * eps
    assert torch.equal(noised(z, eps, alpha, sigma), expected)


@pytest.mark.parametrize("name", SCHEDULES)
def test_joint_bound_terms_give_the_exact_kl_for_a_known_latent(name):
    """One latent z_0 ~ N(m, s^2) whose mean the network knows: diffusion + reconstruction terms must cancel exactly.

    With the exact posterior mean the bound on E[log q(z_0|x) - log p(z_0)] is KL(q || p) = 0 when the model's own
    marginal is q: the integral of (1/2) (-dSNR/dt) E||z_0 - E[z_0|z_t]||^2 is a mutual information, the
    reconstruction term is what is left of it below the smallest time.
    """
    schedule, s, m = GaussianSchedule(name), 0.1, 0.7
    tau = schedule.time_of_snr(1 / s**2)
    times = torch.logspace(math.log10(tau), 0, 200001, dtype=torch.float64)
    posterior_variance = 1 / (schedule.snr(times) + 1 / s**2)
    diffusion = torch.trapezoid(schedule.snr_rate(times) / 2 * posterior_variance, times)
    error_at_tau = 1 / (1 / s**2 + 1 / s**2)
    reconstruction = reconstruction_nats(torch.tensor(error_at_tau), 1, s, 1 / s**2)
    assert abs(diffusion + reconstruction) < 1e-6

    # and `posterior_mean` is that posterior mean: its error has that variance
    generator = torch.Generator().manual_seed(0)
    for t in (tau, 0.5, 1.0):
        z_0 = m + s * torch.randn(20000, 1, 1, generator=generator, dtype=torch.float64)
        time = torch.full((20000,), t, dtype=torch.float64)
        eps = torch.randn(z_0.shape, generator=generator, dtype=torch.float64)
        z_t = schedule.alpha(time)[:, None, None] * z_0 + schedule.sigma(time)[:, None, None] * eps
        estimate = posterior_mean(z_t, torch.full_like(z_0, m), time, s, schedule)
        variance = float(1 / (schedule.snr(time[0]) + 1 / s**2))
        assert abs((z_0 - estimate).square().mean() / variance - 1) < 5 * math.sqrt(2 / 20000)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("t", [0.2, 0.5, 0.8])
def test_gaussian_integrand_is_the_rate_of_kl_between_true_and_model_posteriors(name, t):
    """Finite-step float64 KL(q(z_s|z_t,z_0) || q(z_s|z_t,zhat)) / dt against (1/2) (-dSNR/dt) (z_0 - zhat)^2.

    Both posteriors come from Gaussian conditioning on the joint law of (z_s, z_t), not from the sampler's formulas.
    """
    schedule, dt, z_0, zhat = GaussianSchedule(name), 1e-6, 0.8, 0.1
    s = t - dt
    at = lambda f, x: float(f(torch.tensor(x, dtype=torch.float64)))  # noqa: E731
    ratio = at(schedule.alpha, t) / at(schedule.alpha, s)
    sigma_s, sigma_t = at(schedule.sigma, s), at(schedule.sigma, t)
    gain = ratio * sigma_s**2 / sigma_t**2
    variance = sigma_s**2 - gain**2 * sigma_t**2

    def mean(clean):  # z_t cancels between the two
        return at(schedule.alpha, s) * clean - gain * at(schedule.alpha, t) * clean

    kl = (mean(z_0) - mean(zhat)) ** 2 / (2 * variance)
    integrand = at(schedule.snr_rate, t) / 2 * (z_0 - zhat) ** 2
    assert kl / dt == pytest.approx(integrand, rel=5e-5)
