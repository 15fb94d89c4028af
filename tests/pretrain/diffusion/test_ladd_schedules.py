"""LADD's schedules and times: closed forms, derivatives, coverage of the square, densities that integrate."""

import math

import numpy as np
import pytest
import torch

from braid.pretrain.diffusion.ladd import (
    LatentSchedule,
    Survival,
    bound_times,
    shifted_times,
)

T = torch.linspace(0.001, 0.999, 97, dtype=torch.float64)
E = 1e-4
SIGNALS = {
    "sqrt": lambda t: math.sqrt(1 - t),
    "cosine": lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2,
    "linear": lambda t: 1 - t,
    "poly": lambda t: 1 - t**3,
}


@pytest.mark.parametrize("name", SIGNALS)
def test_squared_signals_are_the_published_ones(name):
    schedule = LatentSchedule(name, power=3.0, eps=E)
    squared = torch.tensor([(1 - 2 * E) * SIGNALS[name](t) + E for t in T.tolist()], dtype=torch.float64)
    assert torch.allclose(schedule.alpha(T), squared.sqrt(), rtol=1e-12)
    assert torch.allclose(schedule.sigma(T), (1 - squared).sqrt(), rtol=1e-12)
    assert torch.allclose(schedule.snr(T), squared / (1 - squared), rtol=1e-12)


@pytest.mark.parametrize("name", SIGNALS)
def test_both_ends_keep_the_published_remainder(name):
    schedule, ends = LatentSchedule(name, eps=E), torch.tensor([0.0, 1.0], dtype=torch.float64)
    start = 1.0 if name != "cosine" else math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert schedule.alpha_squared(ends).tolist() == pytest.approx([(1 - 2 * E) * start + E, E], rel=1e-9)


@pytest.mark.parametrize("name", SIGNALS)
def test_snr_rate_is_the_derivative(name):
    schedule, step = LatentSchedule(name, power=3.0), 1e-6
    slope = (schedule.snr(T - step) - schedule.snr(T + step)) / (2 * step)
    assert torch.allclose(schedule.snr_rate(T), slope, rtol=3e-5)


@pytest.mark.parametrize("name", SIGNALS)
def test_a_step_costs_half_the_fall_of_the_snr(name):
    """abar_s^2 k / (2 sbar_s^2 sbar_t^2) = (SNR_s - SNR_t) / 2 with k the variance added between s and t: the weight of
    a discrete step, whose limit is the rate."""
    schedule = LatentSchedule(name, power=3.0)
    s, t = T[:-1], T[1:]
    a, b = schedule.alpha(s), schedule.alpha(t)
    added = schedule.sigma(t) ** 2 - (b / a) ** 2 * schedule.sigma(s) ** 2
    weight = a**2 * added / (2 * schedule.sigma(s) ** 2 * schedule.sigma(t) ** 2)
    assert torch.allclose(weight, (schedule.snr(s) - schedule.snr(t)) / 2, rtol=1e-9)


def test_the_default_keeps_latents_cleaner_than_tokens():
    assert (LatentSchedule("sqrt").alpha_squared(T[1:]) > Survival(eps=E).alpha(T[1:])).all()


@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("eps", [0.0, E])
def test_survival_and_its_rate(power, eps):
    survival, step = Survival(power, eps), 1e-7
    assert torch.allclose(survival.alpha(T), (1 - 2 * eps) * (1 - T**power) + eps, rtol=1e-12)
    assert torch.allclose(survival.masked(T), 1 - survival.alpha(T), rtol=1e-12)
    rate = (survival.alpha(T - step) - survival.alpha(T + step)) / (2 * step) / (1 - survival.alpha(T))
    assert torch.allclose(survival.elbo_weight(T), rate, rtol=1e-6)
    if eps == 0:
        assert torch.allclose(survival.elbo_weight(T), power / T, rtol=1e-12)
        tiny = torch.tensor([1e-12], dtype=torch.float64)
        assert survival.masked(tiny).item() == pytest.approx(1e-12**power, rel=1e-12)


@pytest.mark.parametrize("factor", [0.5, math.sqrt(0.5), 3.0])
def test_time_shift_and_its_correction(factor):
    """Shifted times lie in [0, 1], and the derivative makes a mean over them one over even times again."""
    times, rate = shifted_times(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), factor)
    assert times.tolist() == pytest.approx([0, factor / (1 + factor), 1])
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(40))
    times, rate = shifted_times((nodes + 1) / 2, factor)
    for f, integral in ((lambda t: torch.exp(-3 * t), (1 - math.exp(-3)) / 3), (lambda t: t**2, 1 / 3)):
        assert float((weights / 2 * rate * f(times)).sum()) == pytest.approx(integral, rel=1e-9)
        assert abs(float((weights / 2 * f(times)).sum()) - integral) > 0.01


def test_bound_times_invert_their_distribution():
    """A mean of f(t) / density over even strata is the integral of f, singular at both ends or not."""
    smallest, num = 1e-5, 20_000
    strata = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    times, density = bound_times(strata, smallest)
    assert smallest <= float(times.min()) and float(times.max()) < 1
    assert (torch.diff(times) > 0).all()
    for f, integral in (
        (torch.ones_like, 1 - smallest),
        (lambda t: 1 / t, -math.log(smallest)),
        (lambda t: 0.5 / torch.sqrt(1 - t), math.sqrt(1 - smallest)),
    ):
        assert float((f(times) / density).mean()) == pytest.approx(integral, rel=1e-5)
    assert float((0.5 / torch.sqrt(1 - times) / density).max()) < 2.01, "the rate at t = 1 has finite variance"
    last, _ = bound_times(torch.tensor([1 - 1e-15], dtype=torch.float64), smallest)
    assert torch.isfinite(LatentSchedule("sqrt").snr_rate(last)).all()
