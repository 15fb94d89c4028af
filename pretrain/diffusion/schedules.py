"""Noise schedules: pure functions of time, computed in float64 and rounded once by whoever uses them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogLinear:
    """Token survival alpha_t = 1 - (1 - eps) t (MDLM, arXiv 2406.07524).

    With eps > 0 the process does not end fully masked, so its loss is not quite a bound; eps = 0 is one.
    """

    eps: float = 0.0

    def alpha(self, t: Tensor) -> Tensor:
        """Probability that a token is still itself at time t."""
        return 1 - (1 - self.eps) * t

    def elbo_weight(self, t: Tensor) -> Tensor:
        """-alpha'_t / (1 - alpha_t): the weight of a masked token's cross-entropy in the NELBO; here 1/t."""
        return (1 - self.eps) / (1 - self.alpha(t))


@dataclass(frozen=True)
class GaussianSchedule:
    """z_t = alpha_t z_0 + sigma_t eps. `vp_linear`: (sqrt(1-t), sqrt(t)); `flow_linear`: (1-t, t) (CCDD, A3)."""

    name: str

    def __post_init__(self) -> None:
        assert self.name in ("vp_linear", "flow_linear"), self.name

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sqrt(1 - t) if self.name == "vp_linear" else 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(t) if self.name == "vp_linear" else t

    def snr(self, t: Tensor) -> Tensor:
        """alpha_t^2 / sigma_t^2."""
        ratio = (1 - t) / t
        return ratio if self.name == "vp_linear" else ratio**2

    def snr_rate(self, t: Tensor) -> Tensor:
        """-dSNR/dt >= 0: twice the weight of ||zhat - z_0||^2 in the Gaussian NELBO."""
        return 1 / t**2 if self.name == "vp_linear" else 2 * (1 - t) / t**3

    def time_of_snr(self, snr: float) -> float:
        """The time at which the signal-to-noise ratio is `snr`."""
        root = snr if self.name == "vp_linear" else snr**0.5
        return 1 / (1 + root)


def continuous_weight(name: str, t: Tensor, schedule: GaussianSchedule) -> Tensor:
    """Training weight of the latent error at time t (CCDD, A6; the clips are the published ones). Same shape as t.

    `elbo` is the bound's own weight, half of -dSNR/dt, clipped at 100 (it grows without limit towards t = 0).
    """
    match name:
        case "uniform":
            return torch.ones_like(t)
        case "snr":
            return ((1 - t) / t).clamp(max=10)
        case "min_snr":
            return ((1 - t) / t).clamp(max=5)
        case "inv_snr":
            return (t / (1 - t)).clamp(max=10)
        case "sqrt_snr":
            return torch.sqrt((1 - t) / t).clamp(max=10)
        case "ddpm_x":
            return (1 / (1 - t)).clamp(max=10)
        case "karras":
            return 1 / (t + 0.1)
        case "elbo":
            return (schedule.snr_rate(t) / 2).clamp(max=100)
    raise AssertionError(f"unknown continuous weight {name}")
