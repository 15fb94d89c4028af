"""The Gaussian process on latents: noising, reverse steps and the terms of its bound.

Steps take the network's estimate `zhat` of z_0. Both were checked against an oracle denoiser: samples of a Gaussian
keep its standard deviation (a DDPM step with its two coefficients exchanged collapses to the mean).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .schedules import GaussianSchedule


def noised(z_BLD: Tensor, eps_BLD: Tensor, alpha_B: Tensor, sigma_B: Tensor) -> Tensor:
    """alpha z + sigma eps with coefficients rounded once to float32 and each product rounded on its own."""
    alpha_B11, sigma_B11 = alpha_B.float()[:, None, None], sigma_B.float()[:, None, None]
    return alpha_B11 * z_BLD + sigma_B11 * eps_BLD


def ddim_step(z_t: Tensor, zhat: Tensor, t: float, s: float, schedule: GaussianSchedule) -> Tensor:
    """Deterministic step from t to s < t: z_s = alpha_s zhat + (sigma_s / sigma_t) (z_t - alpha_t zhat)."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = _coefficients(schedule, t), _coefficients(schedule, s)
    ratio = sigma_s / sigma_t
    return (alpha_s - ratio * alpha_t) * zhat + ratio * z_t


def ddpm_step(
    z_t: Tensor,
    zhat: Tensor,
    eps: Tensor,
    t: float,
    s: float,
    schedule: GaussianSchedule,
    latent_sigma: float = 0.0,
) -> Tensor:
    """Ancestral step from t to s < t, right for any schedule: q(z_s | z_t) for z_0 ~ N(zhat, latent_sigma^2 I), which
    with latent_sigma = 0 is the posterior q(z_s | z_t, z_0 = zhat).

    With a = alpha_t / alpha_s, k = sigma_t^2 - a^2 sigma_s^2 and the variance v = sigma^2 + alpha^2 latent_sigma^2 of
    z given zhat: mean a (v_s / v_t) z_t + alpha_s (k / v_t) zhat, variance v_s k / v_t. That is the posterior mean of
    z_0 in the place of z_0, and its variance added.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = _coefficients(schedule, t), _coefficients(schedule, s)
    a = alpha_t / alpha_s
    k = sigma_t**2 - a**2 * sigma_s**2
    v_t, v_s = (sigma**2 + (alpha * latent_sigma) ** 2 for alpha, sigma in ((alpha_t, sigma_t), (alpha_s, sigma_s)))
    return a * (v_s / v_t) * z_t + alpha_s * (k / v_t) * zhat + math.sqrt(v_s * k / v_t) * eps


def posterior_mean(z_t: Tensor, zhat: Tensor, t_B: Tensor, latent_sigma: float, schedule: GaussianSchedule) -> Tensor:
    """E[z_0 | z_t] when z_0 ~ N(zhat, latent_sigma^2 I): precision-weighted mean of z_t / alpha_t and zhat. float64."""
    snr = schedule.snr(t_B)[:, None, None]
    alpha = schedule.alpha(t_B)[:, None, None]
    prior = 1 / latent_sigma**2
    # snr / alpha stays finite at t = 1, where alpha and snr both reach 0.
    weight = torch.where(alpha > 0, snr / alpha.clamp(min=1e-300), 0.0)
    return (weight * z_t.double() + prior * zhat.double()) / (snr + prior)


def reconstruction_nats(error_squared: Tensor, num_dims: int, latent_sigma: float, snr: float) -> Tensor:
    """E[log q(z_0|x) - log p(z_0|z_t)] at the smallest time, for q(z_0|x) = N(E(x), latent_sigma^2 I).

    p(z_0|z_t) = N(estimate, v I) with v = 1 / (snr + 1/latent_sigma^2); `error_squared` is ||z_0 - estimate||^2 with
    the sampled z_0, summed over the `num_dims` dimensions of one position. (LADD, B6.)
    """
    v = 1 / (snr + 1 / latent_sigma**2)
    return num_dims / 2 * math.log(v / latent_sigma**2) + error_squared / (2 * v) - num_dims / 2


def _coefficients(schedule: GaussianSchedule, t: float) -> tuple[float, float]:
    time = torch.tensor(t, dtype=torch.float64)
    return float(schedule.alpha(time)), float(schedule.sigma(time))
