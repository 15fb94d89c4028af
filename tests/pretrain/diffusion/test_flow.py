"""ELF's flow against closed forms, and its sampler steps against the exact denoiser of Gaussian data."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from braid.pretrain.config.objectives.elf import GRIDS
from braid.pretrain.diffusion.flow import (
    euler,
    flow_grid,
    guidance_scales,
    guided_target,
    interpolate,
    logit_normal,
    stepped_back,
    velocity,
    velocity_weight,
)

MEAN, STD, SCALE, FLOOR = -1.5, 0.8, 2.0, 0.05


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_logit_normal_times_are_quantiles_of_the_law():
    u = torch.tensor([0.0, 0.01, 0.5, 0.93])
    expected = 1 / (1 + np.exp(-(MEAN + STD * norm.ppf(u.double().numpy()))))
    np.testing.assert_allclose(logit_normal(u, MEAN, STD).numpy(), expected, rtol=1e-12)
    assert logit_normal(u, MEAN, STD).dtype == torch.float64
    strata = logit_normal((torch.arange(10_000) + 0.3) / 10_000, MEAN, STD)
    logits = torch.logit(strata)
    assert abs(logits.mean() - MEAN) < 1e-3 and abs(logits.std() - STD) < 1e-3


@pytest.mark.parametrize("shape", [(3,), (3, 5)], ids=["a time a sequence", "a time a position"])
def test_interpolation_and_velocity(shape):
    x, eps = randn(3, 5, 4, seed=1, dtype=torch.float32), randn(3, 5, 4, seed=2, dtype=torch.float32)
    tau = torch.rand(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    z = interpolate(x, eps, tau, SCALE)
    t = tau.numpy().reshape(*shape, *[1] * (3 - len(shape)))
    expected = t * x.double().numpy() + (1 - t) * SCALE * eps.double().numpy()
    assert z.dtype == torch.float32
    np.testing.assert_allclose(z.numpy(), expected, atol=1e-6)
    if len(shape) == 1:  # below the floor the velocity of the truth is x - s eps whatever the time
        np.testing.assert_allclose(velocity(x, z, tau, FLOOR), x.double() - SCALE * eps.double(), atol=2e-5)


def test_the_velocity_is_clamped_near_the_data():
    x, z = torch.ones(3, 1, 1), torch.zeros(3, 1, 1)
    tau = torch.tensor([0.5, 0.95, 0.99])
    assert velocity(x, z, tau, FLOOR).flatten().tolist() == pytest.approx([2, 20, 20])
    assert velocity_weight(tau, FLOOR).tolist() == pytest.approx([4, 400, 400], rel=1e-5)
    assert euler(z, x, 0.99, 1.0, FLOOR).flatten().tolist() == pytest.approx([0.2] * 3)


def test_velocity_errors_are_weighted_errors_of_x():
    x, other, z, tau = randn(4, 3, 2), randn(4, 3, 2, seed=1), randn(4, 3, 2, seed=2), torch.tensor([0.0, 0.3, 0.9, 1])
    error = (velocity(x, z, tau, FLOOR) - velocity(other, z, tau, FLOOR)).square()
    assert torch.allclose(error, velocity_weight(tau, FLOOR)[:, None, None] * (x - other).square(), rtol=1e-5)


def test_guidance_scales_are_log_uniform_in_one_plus_w():
    w = guidance_scales(torch.tensor([0.0, 0.5, 1.0]), 0.5, 5.0)
    assert w.tolist() == pytest.approx([0.5, math.sqrt(1.5 * 6) - 1, 5.0], rel=1e-12)
    spread = torch.log1p(guidance_scales((torch.arange(1000).double() + 0.5) / 1000, 0.5, 5.0)).diff()
    assert torch.allclose(spread, spread[0].expand(999), rtol=1e-9)


def test_guided_target_is_the_papers_velocity_target():
    """v* = v + m (1 - 1/w) (v_c - v_u), written out; no guidance at w = 1 or m = 0, exactly."""
    x, x_u, x_c, z = (randn(4, 3, 2, seed=seed) for seed in range(4))
    tau, w, m = torch.tensor([0.1, 0.4, 0.7, 0.99]), torch.tensor([0.5, 1.0, 3.0, 2.0]), torch.tensor([1.0, 1, 1, 0])
    strength = (m * (1 - 1 / w))[:, None, None]
    target = guided_target(x, x_u, x_c, strength)
    v, v_u, v_c = (velocity(each, z, tau, FLOOR) for each in (x, x_u, x_c))
    assert torch.allclose(velocity(target, z, tau, FLOOR), v + strength * (v_c - v_u), rtol=1e-5, atol=1e-5)
    assert torch.equal(target[1], x[1]) and torch.equal(target[3], x[3])
    assert torch.equal(velocity(target, z, tau, FLOOR)[1], v[1])
    assert not torch.allclose(target[0], x[0]) and not torch.allclose(target[2], x[2])


@pytest.mark.parametrize("steps", [1, 2, 8, 33])
@pytest.mark.parametrize("kind", GRIDS)
def test_grids_run_from_noise_to_data(kind, steps):
    uniforms = torch.rand(steps - 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grid = flow_grid(kind, steps, MEAN, STD, uniforms if kind == "random" else None)
    assert len(grid) == steps + 1 and grid[0] == 0.0 and grid[-1] == 1.0
    assert all(a < b for a, b in zip(grid[:-1], grid[1:], strict=True))
    inner = {
        "uniform": np.arange(1, steps) / steps,
        "quantiles": 1 / (1 + np.exp(-(MEAN + STD * norm.ppf(np.arange(1, steps) / steps)))),
        "random": np.sort(1 / (1 + np.exp(-(MEAN + STD * norm.ppf(uniforms.numpy()))))),
    }[kind]
    np.testing.assert_allclose(grid[1:-1], inner, rtol=1e-12)


# -- sampler steps ---------------------------------------------------------------------------------------------------


def exact_denoiser(z: torch.Tensor, tau: float) -> torch.Tensor:
    """E[x | z_tau] for x ~ N(0, 1)."""
    return tau * z / (tau**2 + SCALE**2 * (1 - tau) ** 2)


def sampled_std(variant: str, gamma: float, steps: int, floor: float, kind: str = "uniform") -> float:
    """Standard deviation of the samples, without drawing any: a step is z <- c z + d eps."""
    z, eps = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    variance, grid = SCALE**2, flow_grid(kind, steps, MEAN, STD)
    for step, (tau, after) in enumerate(zip(grid[:-1], grid[1:], strict=True)):
        if variant == "ode" or step == steps - 1:
            c, d = euler(z, exact_denoiser(z, tau), tau, after, floor).tolist()
        else:
            back, tau_back = stepped_back(z, eps, tau, after, gamma, SCALE, marginal=variant == "marginal")
            x = exact_denoiser(back, tau_back)
            moved = euler(z, x, tau, after, floor) if variant == "paper" else euler(back, x, tau_back, after, floor)
            c, d = moved.tolist()
        variance = c**2 * variance + d**2
    return math.sqrt(variance)


@pytest.mark.parametrize(("variant", "gamma"), [("ode", 0.0), ("marginal", 1.0), ("marginal", 2.0), ("paper", 1.0)])
def test_exact_denoiser_keeps_the_standard_deviation(variant, gamma):
    """On an even grid within 3 % at 256 steps, and nearer than at 32, with a floor that is small beside a step's
    distance to 1."""
    coarse, fine = (sampled_std(variant, gamma, steps, floor=0.01) for steps in (32, 256))
    assert abs(fine - 1) < 0.03
    assert abs(fine - 1) < abs(coarse - 1)


@pytest.mark.parametrize(("kind", "std"), [("quantiles", 0.677), ("uniform", 0.991)])
def test_the_published_grid_does_not_keep_the_standard_deviation(kind, std):
    """A named fact: its last interval is long and ends at a mean. The ODE's spread is a product, written out here."""
    i = np.arange(1, 256) / 256
    tau = np.concatenate([[0], {"quantiles": 1 / (1 + np.exp(1.5 - 0.8 * norm.ppf(i))), "uniform": i}[kind], [1]])
    exact = tau[:-1] / (tau[:-1] ** 2 + 4 * (1 - tau[:-1]) ** 2)
    product = 2 * np.prod(1 + np.diff(tau) / np.maximum(1 - tau[:-1], 0.01) * (exact - 1))
    assert sampled_std("ode", 0.0, 256, 0.01, kind) == pytest.approx(product, rel=1e-9)
    assert product == pytest.approx(std, abs=0.001)
    for variant in ("marginal", "paper"):  # noise that is put back does not help
        assert (sampled_std(variant, 1.0, 256, 0.01, kind) < 0.7) == (kind == "quantiles")
    assert (tau[-2] < 0.66) == (kind == "quantiles")


def test_the_published_floor_costs_some_percent_however_many_steps():
    """max(1 - tau, 0.05) slows the last twentieth of the way: the ODE's samples stay 2 to 3 % too narrow."""
    assert sampled_std("ode", 0.0, 64, FLOOR) == pytest.approx(0.960, abs=0.005)
    assert sampled_std("ode", 0.0, 4096, FLOOR) == pytest.approx(0.975, abs=0.005)
    assert sampled_std("marginal", 1.0, 256, FLOOR) == pytest.approx(0.956, abs=0.005)


@pytest.mark.parametrize(("gamma", "std"), [(1.0, 0.32), (2.0, 0.27)])
def test_the_released_sde_step_under_noises(gamma, std):
    """A named fact, not a wish: on N(0, 1) its samples are three times too narrow, and more steps do not help."""
    assert sampled_std("code", gamma, 64, FLOOR) == pytest.approx(std, abs=0.005)
    assert sampled_std("code", gamma, 256, FLOOR) < 0.35


def test_the_papers_sde_step_moves_the_unperturbed_state():
    """Its noise enters through the prediction alone, so it narrows the samples a little only."""
    assert 0.88 < sampled_std("paper", 1.0, 64, FLOOR) < sampled_std("ode", 0.0, 64, FLOOR)


@pytest.mark.parametrize(
    ("tau", "after", "gamma"), [(0.3, 0.4, 1.0), (0.0, 0.2, 2.0), (0.6, 0.9, 0.5), (0.2, 0.9, 3.0)]
)
def test_variance_after_stepping_back(tau, after, gamma):
    """The marginal variant has the variance of the flow at a tau; the code's has less, unless all is thrown away."""
    a = max(1 - gamma * (after - tau), 0)
    one, zero = torch.ones(()), torch.zeros(())
    for marginal in (False, True):
        kept, tau_back = stepped_back(one, zero, tau, after, gamma, SCALE, marginal=marginal)
        added, _ = stepped_back(zero, one, tau, after, gamma, SCALE, marginal=marginal)
        noise = float(kept) ** 2 * (SCALE * (1 - tau)) ** 2 + float(added) ** 2
        assert tau_back == pytest.approx(a * tau) and float(kept) == pytest.approx(a)
        wanted = (SCALE * (1 - tau_back)) ** 2
        if marginal or a == 0:
            assert noise == pytest.approx(wanted, rel=1e-6)
        else:
            assert noise < 0.99 * wanted


@pytest.mark.parametrize("marginal", [False, True])
def test_no_noise_put_back_is_the_ode_bit_for_bit(marginal):
    z, eps = randn(1000, dtype=torch.float32), randn(1000, seed=1, dtype=torch.float32)
    for tau, after in ((0.0, 0.1), (0.37, 0.52), (0.9, 1.0)):
        back, tau_back = stepped_back(z, eps, tau, after, 0.0, SCALE, marginal=marginal)
        assert torch.equal(back, z) and tau_back == tau


@pytest.mark.parametrize("last", [0.0, 0.5, 0.95])
def test_the_last_step_ends_at_the_prediction(last):
    z, x = randn(1000, dtype=torch.float32), randn(1000, seed=1, dtype=torch.float32)
    assert torch.allclose(euler(z, x, last, 1.0, FLOOR), x, atol=1e-6)
    assert not torch.allclose(euler(z, x, 0.96, 1.0, FLOOR), x, atol=1e-2)
