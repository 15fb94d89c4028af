"""Schedules and times of latent-augmented discrete diffusion (LADD, arXiv 2510.18114). Float64, rounded by the user."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from braid.parallel.vocabulary import Vocabulary

DELAYED_SHARE = 0.2
"""Of a delayed warm-up, what comes before the latents' loss does."""
COSINE_OFFSET = 0.008
LAST_TIME = 1 - 2.0**-40
"""Largest time of a bound: the rate of the `sqrt` schedule is infinite at 1, and the time left out costs 1e-6 nats."""


@dataclass(frozen=True)
class Survival:
    """Masking with alpha_t = (1 - 2 eps) (1 - t^power) + eps: the tokens (power 1) and Di-LADD's codes.

    With eps > 0 the process neither starts clean nor ends fully masked; a bound takes eps = 0.
    """

    power: float = 1.0
    eps: float = 0.0

    def alpha(self, t: Tensor) -> Tensor:
        """Probability that a token is still itself at time t."""
        return 1 - self.masked(t)

    def masked(self, t: Tensor) -> Tensor:
        """1 - alpha_t, to full precision near t = 0."""
        return (1 - 2 * self.eps) * t**self.power + self.eps

    def elbo_weight(self, t: Tensor) -> Tensor:
        """-alpha'_t / (1 - alpha_t): the weight of a masked token's cross-entropy; power / t where eps = 0."""
        return (1 - 2 * self.eps) * self.power * t ** (self.power - 1) / self.masked(t)


@dataclass(frozen=True)
class LatentSchedule:
    """y_t = alpha_t y_0 + sigma_t noise, alpha_t^2 = (1 - 2 eps) g(t) + eps, sigma_t^2 = 1 - alpha_t^2.

    g by `name`: `sqrt` sqrt(1 - t), which keeps latents cleaner than tokens of the same time; `cosine`
    cos^2(pi/2 (t + 0.008) / 1.008); `linear` 1 - t; `poly` 1 - t^power. With eps > 0 both ends have a finite
    signal-to-noise ratio: what is left of the signal at t = 1 is a prior term of a bound.
    """

    name: str = "sqrt"
    power: float = 2.0
    eps: float = 1e-4

    def alpha_squared(self, t: Tensor) -> Tensor:
        match self.name:
            case "sqrt":
                g = torch.sqrt(1 - t)
            case "cosine":
                g = torch.cos(_cosine_angle(t)).square()
            case "linear":
                g = 1 - t
            case "poly":
                g = 1 - t**self.power
            case name:
                raise AssertionError(f"no latent schedule {name}")
        return (1 - 2 * self.eps) * g + self.eps

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sqrt(self.alpha_squared(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(1 - self.alpha_squared(t))

    def snr(self, t: Tensor) -> Tensor:
        """alpha_t^2 / sigma_t^2."""
        return self.alpha_squared(t) / (1 - self.alpha_squared(t))

    def snr_rate(self, t: Tensor) -> Tensor:
        """-dSNR/dt >= 0: twice the weight of ||yhat - y_0||^2 in the Gaussian NELBO."""
        match self.name:
            case "sqrt":
                fall = 0.5 / torch.sqrt(1 - t)
            case "cosine":
                fall = torch.sin(2 * _cosine_angle(t)) * math.pi / (2 * (1 + COSINE_OFFSET))
            case "linear":
                fall = torch.ones_like(t)
            case "poly":
                fall = self.power * t ** (self.power - 1)
            case name:
                raise AssertionError(f"no latent schedule {name}")
        return (1 - 2 * self.eps) * fall / (1 - self.alpha_squared(t)).square()


def _cosine_angle(t: Tensor) -> Tensor:
    return (t + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2


def shifted_times(t: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """The time shift of SD3 (arXiv 2403.03206), a t / (1 + (a - 1) t), and its derivative at t.

    A mean over shifted uniform times is one over uniform times again when every term is multiplied by the derivative.
    """
    divisor = 1 + (factor - 1) * t
    return factor * t / divisor, factor / divisor.square()


def warmup_factor(name: str, step: int, num_steps: int) -> float:
    """Factor of the latents' loss `step` steps after its start: `none` 1; `linear` from 0 to 1 over `num_steps`;
    `delayed` 0 for a fifth of them, then linear to 1 at their end."""
    if name == "none":
        return 1.0
    start = {"linear": 0.0, "delayed": DELAYED_SHARE}[name]
    return min(1.0, max(0.0, (step / num_steps - start) / (1 - start)))


@dataclass(frozen=True)
class Independence:
    """A `RowLoss` of q's logits: KL(p || q) in nats of the clean token, times `scale`. p is what the network says that
    sees the tokens too, q what it says of the latents alone: what the visible tokens say beyond the latents (LADD, B4).
    What is known of a row is its nats."""

    logits: Callable[[Tensor], Tensor]
    """p's, constants: numbers of rows [M] -> [M, V], float32 at least."""
    scale: float
    mask_id: int
    vocabulary: Vocabulary

    def __call__(self, logits_MV: Tensor, rows_M: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        vocabulary = self.vocabulary
        q = vocabulary.logits(logits_MV.clone() if gradient else logits_MV)
        log_p, log_q = (
            vocabulary.log_softmax(vocabulary.without_(each, self.mask_id)) for each in (self.logits(rows_M), q)
        )
        p, possible = log_p.exp(), log_p.isfinite()
        terms = p * (log_p - log_q.masked_fill(~possible, 0.0)).masked_fill(~possible, 0.0)
        nats = vocabulary.sum(terms.sum(-1))
        if gradient:
            logits_MV.copy_(self.scale * (log_q.exp() - p))
        return self.scale * nats, nats


def bound_times(strata: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    """Times on [smallest, 1) and their density, for integrands that grow towards both ends.

    An even mixture of the log-uniform law (the Gaussian term falls like 1/t or faster) and of the law with density
    1 / (2 sqrt(1 - t)) (the rate of the `sqrt` schedule at t = 1). Divide by the density. The distribution function is
    inverted by bisection. Returns (times [B], density [B]), float64.
    """
    span, width = -math.log(smallest), math.sqrt(1 - smallest)

    def distribution(t: Tensor) -> Tensor:
        return 0.5 * (1 + torch.log(t) / span) + 0.5 * (1 - torch.sqrt(1 - t) / width)

    low, high = torch.full_like(strata, smallest), torch.full_like(strata, LAST_TIME)
    for _ in range(60):
        middle = (low + high) / 2
        below = distribution(middle) < strata
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    times = (low + high) / 2
    return times, 0.5 / (span * times) + 0.25 / (width * torch.sqrt(1 - times))
