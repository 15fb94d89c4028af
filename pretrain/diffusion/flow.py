"""The rectified flow of ELF (Embedded Language Flows, arXiv 2605.10938): pure functions of tensors and times.

**Flow time runs the other way.** Everywhere else in Braid t = 0 is clean and t = 1 is noise. ELF's formulas are
written in flow time tau = 1 - t: tau = 0 is noise, tau = 1 is data. This file, and what calls it, says `tau` for flow
time; whatever leaves an objective or a sampler is t.

    z_tau = tau x + (1 - tau) s eps        s: noise scale (2 in the paper), eps standard normal
    v(x)  = (x - z_tau) / max(1 - tau, floor)        the velocity towards x; its exact value below the floor

The network predicts x. All velocities at one (z, tau) differ as their x do, over max(1 - tau, floor): a squared
difference of velocities is a squared difference of x times `velocity_weight`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from braid.pretrain.config.objectives.elf import GRIDS


def logit_normal(u: Tensor, mean: float, std: float) -> Tensor:
    """sigmoid(mean + std Phi^-1(u)): the quantiles of the logit-normal law, float64; u in [0, 1), 0 goes to 0.

    Stratified u give stratified times.
    """
    return torch.sigmoid(mean + std * torch.special.ndtri(u.double()))


def logit_normal_density(tau: Tensor, mean: float, std: float) -> Tensor:
    """The density of that law, 0 at both ends; float64, shape of tau."""
    inside = tau.double().clamp(1e-9, 1 - 1e-9)
    deviation = (torch.logit(inside) - mean) / std
    return torch.exp(-deviation.square() / 2) / (math.sqrt(2 * math.pi) * std * inside * (1 - inside))


def interpolation(tau: Tensor, noise_scale: float | Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients of x and eps at tau, float64; `noise_scale` may be a tensor that broadcasts against tau."""
    return tau.double(), noise_scale * (1 - tau.double())


def interpolate(x_BLD: Tensor, eps_BLD: Tensor, tau: Tensor, noise_scale: float | Tensor) -> Tensor:
    """z_tau [B, L, D] for tau [B] or, one for each position, [B, L]; coefficients are rounded once to float32."""
    data, noise = interpolation(tau, noise_scale)
    axes = (...,) + (None,) * (x_BLD.ndim - tau.ndim)
    return data.float()[axes] * x_BLD + noise.float()[axes] * eps_BLD


def velocity(x_BLD: Tensor, z_BLD: Tensor, tau_B: Tensor, floor: float) -> Tensor:
    """(x - z) / max(1 - tau, floor), the prediction's velocity and the target's alike (paper's t_eps = 0.05)."""
    return (x_BLD - z_BLD) / (1 - tau_B.double()).clamp(min=floor).float()[:, None, None]


def velocity_weight(tau: Tensor, floor: float) -> Tensor:
    """1 / max(1 - tau, floor)^2: what a squared error of x weighs as one of the velocity. float64, shape of tau."""
    return 1 / (1 - tau.double()).clamp(min=floor).square()


def guidance_scales(u: Tensor, smallest: float, largest: float) -> Tensor:
    """Scales w of training-time guidance, log-uniform in 1 + w between the two ends, so biased to small ones. float64.

    w = (1 + smallest) ((1 + largest) / (1 + smallest))^u - 1
    """
    return (1 + smallest) * ((1 + largest) / (1 + smallest)) ** u.double() - 1


def guided_target(x: Tensor, x_unconditional: Tensor, x_conditional: Tensor, strength: Tensor) -> Tensor:
    """x + strength (x_c - x_u), the target of training-time guidance, where strength = m (1 - 1/w).

    ELF adds m (1 - 1/w) (v_c - v_u) to the target velocity; at one (z, tau) that is the same thing said of x.
    """
    return x + strength * (x_conditional - x_unconditional)


def flow_grid(kind: str, steps: int, mean: float, std: float, uniforms: Tensor | None = None) -> list[float]:
    """Flow times 0 = tau_0 < ... < tau_steps = 1.

    `quantiles`: of the logit-normal law of the training times, at i / steps; `random`: steps - 1 sorted draws of it, as
    in the released code, from `uniforms` [steps - 1] in (0, 1); `uniform`: evenly spaced (worse at few steps, by the
    paper). Of the first two few lie near the data: the last interval of 256 quantiles begins at 0.65.
    """
    assert kind in GRIDS, kind
    if kind == "random":
        assert uniforms is not None and len(uniforms) == steps - 1, "a random grid needs a draw for each inner time"
        inner = logit_normal(uniforms, mean, std).sort().values
    else:
        inner = torch.arange(1, steps, dtype=torch.float64) / steps
        inner = logit_normal(inner, mean, std) if kind == "quantiles" else inner
    return [0.0, *inner.tolist(), 1.0]


def euler(z: Tensor, x: Tensor, tau: float, tau_next: float, floor: float) -> Tensor:
    """One step of the probability-flow ODE from tau to tau_next along the velocity towards x."""
    return z + (tau_next - tau) / max(1 - tau, floor) * (x - z)


def stepped_back(
    z: Tensor, eps: Tensor, tau: float, tau_next: float, gamma: float, noise_scale: float, *, marginal: bool
) -> tuple[Tensor, float]:
    """The SDE's perturbation before a step of length h = tau_next - tau: (z_b, tau_b), tau_b = a tau <= tau.

    a = clip(1 - gamma h, 0, 1), and
        released code  z_b = a z + (1 - a) s eps
        marginal       z_b = a z + s sqrt((1 - a tau)^2 - a^2 (1 - tau)^2) eps
    Only the second has the law of z at flow time a tau: variances add, standard deviations do not, so the code's step
    leaves too little noise and its samples come out too narrow (on N(0, 1) data with the exact denoiser, gamma = 1 and
    64 steps: standard deviation 0.32). The published numbers are the code's. gamma = 0 changes nothing in either.
    """
    a = min(max(1 - gamma * (tau_next - tau), 0.0), 1.0)
    if marginal:
        # (1 - a tau)^2 - a^2 (1 - tau)^2, factorised: it is exactly 0 at a = 1.
        spread = ((1 - a) * (1 + a - 2 * a * tau)) ** 0.5
    else:
        spread = 1 - a
    return a * z + noise_scale * spread * eps, a * tau
