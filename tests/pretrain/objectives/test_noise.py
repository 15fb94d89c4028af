"""What `Noise` makes of tokens and latents, against its own draws and against the laws of the processes."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from braid.pretrain.diffusion.gaussian import noised
from braid.pretrain.diffusion.hybrid import Hybrid
from braid.pretrain.objectives.base import Noise

from ..diffusion.chains import Chain
from .references import replacements

MASK, K = 2, 5
NOISE = dataclasses.replace(Noise.training(11, 1 << 40, 8, (1 << 40) + torch.arange(3)), draw=4)


def test_tokens_follow_their_uniforms():
    tokens = torch.tensor([0, 1, 3, 4, 5]).repeat(3, 200)
    keep = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.2
    p, q = torch.tensor([0.0, 0.3, 0.6], dtype=torch.float64), torch.tensor([0.5, 0.2, 0.4], dtype=torch.float64)
    u, free = NOISE.uniforms(1000, word=3), ~keep
    masked = (u < p.float()[:, None]) & free
    replaced = (u < (p + q).float()[:, None]) & free & ~masked
    real = torch.tensor([0, 1, 3, 4, 5])[replacements(NOISE, 1000, K)]
    expected = torch.where(masked, MASK, torch.where(replaced, real, tokens))
    options = {"mask_probability": p, "uniform_probability": q, "num_tokens": K, "word": 3}
    found, found_masked = NOISE.noised_tokens(tokens, MASK, keep=keep, **options)
    assert torch.equal(found, expected) and torch.equal(found_masked, masked)
    assert replaced.any() and not torch.equal(found, NOISE.noised_tokens(tokens, MASK, **options)[0])

    alone, _ = NOISE.noised_tokens(tokens, MASK, mask_probability=p, word=3)
    assert torch.equal(alone, torch.where(u < p.float()[:, None], MASK, tokens))


def test_latents_follow_their_normals():
    clean = torch.randn(3, 7, 10, generator=torch.Generator().manual_seed(1))
    alpha, sigma = torch.rand(2, 3, dtype=torch.float64).unbind()
    for purpose in ("latent", "another"):
        found = NOISE.noised_latents(clean, alpha, sigma, purpose=purpose)
        assert torch.equal(found, noised(clean, NOISE.normals(7, 10, purpose=purpose), alpha, sigma))


@pytest.mark.parametrize("p_uniform, gamma", [(0.0, 1.0), (0.1, 1.0), (0.2, 0.5), (0.3, 2.0)])
def test_tokens_have_the_marginals_of_the_process(p_uniform, gamma):
    """Shares of 60,000 draws, within five standard deviations."""
    process, chain, t = Hybrid(p_uniform, gamma, K), Chain(K + 1, MASK, p_uniform=p_uniform, gamma=gamma), 0.37
    times = torch.full((3,), t, dtype=torch.float64)
    found, _ = NOISE.noised_tokens(
        torch.full((3, 20_000), 4), MASK, mask_probability=process.mask_probability(times),
        uniform_probability=K * process.noise(times), num_tokens=K,
    )  # fmt: skip
    exact = chain.marginal(t)[4]
    share = found.flatten().bincount(minlength=K + 1).double() / found.numel()
    assert ((share - exact).abs() <= 5 * (exact * (1 - exact) / found.numel()).sqrt()).all()
