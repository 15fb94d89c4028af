"""Gumbel variables, the temperature's fall, and the straight-through estimate."""

import math

import pytest
import torch

from braid.pretrain.diffusion.gumbel import gumbels, straight_through, temperature

EULER = 0.5772156649015329


def test_gumbels_have_their_law():
    """By inversion: the k-th of n even quantiles of the words."""
    n = 1 << 16
    found = gumbels((torch.arange(n, dtype=torch.float64) + 0.5) * (2.0**32 / n))
    assert float(found.mean()) == pytest.approx(EULER, abs=1e-3)
    assert float(found.var()) == pytest.approx(math.pi**2 / 6, rel=1e-3)
    ends = gumbels(torch.tensor([0, 2**32 - 1]))
    assert ends.isfinite().all() and float(ends[0]) == pytest.approx(-math.log(33 * math.log(2)))


def test_the_temperature_falls_evenly_on_a_logarithmic_scale():
    """The published fall: from 1 to 1e-5 in 200,000 steps."""
    steps = [temperature(step, 1.0, 1e-5, 200_000) for step in (0, 40_000, 100_000, 200_000, 10**6)]
    assert steps == pytest.approx([1.0, 1e-1, 10**-2.5, 1e-5, 1e-5])


@pytest.mark.parametrize("tau", [1.0, 0.3, 1e-5])
def test_draws_are_exact_whatever_the_temperature_and_weights_are_zero(tau):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, generator=generator).expand(20_000, 4).clone().requires_grad_()
    words = torch.randint(0, 2**32, (20_000, 4), generator=generator)
    index, weights = straight_through(logits, gumbels(words), tau)
    assert weights.dtype == torch.float32 and not weights.any()
    law = logits[0].detach().double().softmax(0)
    counts = torch.bincount(index, minlength=4)
    assert (
        float(((counts - 20_000 * law) ** 2 / (20_000 * law)).sum()) < 16.3
    )  # 3 degrees of freedom, one in a thousand
    (weights * torch.arange(4.0)).sum().backward()
    assert logits.grad.isfinite().all() and (tau < 1e-3 or logits.grad.any())
