"""Schedules against automatic differentiation in float64."""

import pytest
import torch

from braid.pretrain.diffusion.schedules import GaussianSchedule, LogLinear, continuous_weight

TIMES = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)


def derivative(function, times):
    times = times.clone().requires_grad_()
    (slope,) = torch.autograd.grad(function(times).sum(), times)
    return slope


@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_token_weight_is_the_hazard_rate(eps):
    schedule = LogLinear(eps)
    expected = -derivative(schedule.alpha, TIMES) / (1 - schedule.alpha(TIMES))
    assert torch.allclose(schedule.elbo_weight(TIMES), expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["vp_linear", "flow_linear"])
def test_gaussian_schedule(name):
    schedule = GaussianSchedule(name)
    snr = schedule.alpha(TIMES) ** 2 / schedule.sigma(TIMES) ** 2
    assert torch.allclose(schedule.snr(TIMES), snr, rtol=1e-12)
    assert torch.allclose(schedule.snr_rate(TIMES), -derivative(schedule.snr, TIMES), rtol=1e-10)
    for value in (0.1, 1.0, 100.0):
        time = torch.tensor(schedule.time_of_snr(value), dtype=torch.float64)
        assert abs(schedule.snr(time) / value - 1) < 1e-12


def test_variance_preserving():
    schedule = GaussianSchedule("vp_linear")
    assert torch.allclose(schedule.alpha(TIMES) ** 2 + schedule.sigma(TIMES) ** 2, torch.ones_like(TIMES))


def test_discrete_steps_of_the_gaussian_weight_sum_to_the_snr_difference():
    """abar_s^2 sigma_{t|s}^2 / (2 sigma_s^2 sigma_t^2) = (SNR(s) - SNR(t)) / 2, behind the bound's weight."""
    for name in ("vp_linear", "flow_linear"):
        schedule = GaussianSchedule(name)
        s, t = TIMES[:-1], TIMES[1:]
        ratio = schedule.alpha(t) / schedule.alpha(s)
        conditional_variance = schedule.sigma(t) ** 2 - ratio**2 * schedule.sigma(s) ** 2
        left = schedule.alpha(s) ** 2 * conditional_variance / (2 * schedule.sigma(s) ** 2 * schedule.sigma(t) ** 2)
        assert torch.allclose(left, (schedule.snr(s) - schedule.snr(t)) / 2, rtol=1e-9)


def test_published_continuous_weights():
    schedule = GaussianSchedule("vp_linear")
    t = torch.tensor([0.001, 0.5, 0.999], dtype=torch.float64)
    expected = {
        "uniform": [1, 1, 1],
        "snr": [10, 1, 0.001 / 0.999],
        "min_snr": [5, 1, 0.001 / 0.999],
        "inv_snr": [0.001 / 0.999, 1, 10],
        "sqrt_snr": [10, 1, (0.001 / 0.999) ** 0.5],
        "ddpm_x": [1 / 0.999, 2, 10],
        "karras": [1 / 0.101, 1 / 0.6, 1 / 1.099],
        "elbo": [100, 2, 0.5 / 0.999**2],
    }
    for name, values in expected.items():
        assert continuous_weight(name, t, schedule).tolist() == pytest.approx(values, rel=1e-12), name
