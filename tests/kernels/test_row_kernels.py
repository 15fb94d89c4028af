"""The CUDA kernels for rows of logits: in the emulator, and on a GPU where there is one, beside the host's."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from braid.kernels import dispatch
from braid.kernels.cross_entropy import cross_entropy_
from braid.kernels.errors import BraidError
from braid.kernels.sampling import draw_tokens

from .emulated import Emulated
from .sampling_cases import KEY, drawn, law, random_case
from .test_cross_entropy import case, reference
from .test_sampling import STEPS, numbers


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Emulated:
    if dispatch.choose("cpu").name != "compiled":
        pytest.skip("there is no compiler")
    return Emulated(tmp_path_factory.mktemp("emulator"))


@pytest.fixture
def emulated(library, monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "functions", lambda operation, device: library)


@pytest.mark.parametrize("vocab_size", [2, 130, 1030])
@pytest.mark.parametrize("step", STEPS)
def test_emulated_draws_are_those_of_the_reference_race(emulated, step, vocab_size):
    ordinals, positions = numbers(5)
    for seed in range(3):
        logits, options = random_case(seed, vocab_size, 5, step=step)
        p = law(logits, **options)
        possible = p.sum(1) > 0
        tokens = draw_tokens(KEY, logits, ordinals, positions, **options)
        assert torch.equal(tokens[possible], drawn(p[possible], ordinals[possible], positions[possible]))


def test_emulated_draws_from_ties_and_steep_rows(emulated):
    ordinals, positions = numbers(3)
    tied = torch.tensor([0.0, 1.0, 0.0, -9.0, 0.0, 1.0]).repeat(3, 50)
    for top_p in (0.2, 0.9):
        p = law(tied, top_p=top_p)
        tokens = draw_tokens(KEY, tied, ordinals, positions, top_p=top_p)
        assert torch.equal(tokens, drawn(p, ordinals, positions))
    for row in (torch.linspace(-300, 300, 3000), torch.linspace(300, -300, 3000), torch.randn(3000) * 1e30):
        p = np.exp(row.double() - row.double().max()).numpy()[None].repeat(3, 0)
        assert torch.equal(draw_tokens(KEY, row.expand(3, -1), ordinals, positions), drawn(p, ordinals, positions))
    greedy = draw_tokens(KEY, torch.linspace(0, 1, 999).roll(7).expand(3, -1), ordinals, positions, greedy=True)
    assert greedy.tolist() == [6, 6, 6]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_emulated_draws_refuse_rows_without_a_distribution(emulated, bad):
    logits = torch.zeros(3, 300)
    logits[1, slice(None) if bad == -torch.inf else 170] = bad
    for top_p in (1.0, 0.5):
        with pytest.raises(BraidError, match="cannot draw a token"):
            draw_tokens(KEY, logits, *numbers(3), top_p=top_p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [1, 30, 2000, 2063])
def test_emulated_cross_entropy_against_float64(emulated, vocab_size, dtype):
    """Whole, and in halves with nothing to exchange, for rows that are aligned and for others."""
    for padding in (0, 3, 8 - vocab_size % 8):
        logits, targets, weights = case(vocab_size, rows=4)
        left_out = vocab_size // 2 if vocab_size > 2 else None
        targets[targets == left_out] = 0
        logits = torch.cat([logits, torch.zeros(4, padding)], 1).to(dtype)[:, :vocab_size]
        nll, lse, _, gradient = reference(logits, targets, weights, 1e-3, left_out)
        halves = torch.empty(4, vocab_size + padding, dtype=dtype)[:, :vocab_size].copy_(logits)
        ours = cross_entropy_(logits, targets, weights, 1e-3, left_out=left_out)
        again = cross_entropy_(halves, targets, weights, 1e-3, True, lambda *each: each, left_out)
        assert torch.equal(logits, halves) and all(map(torch.equal, ours, again))
        assert np.allclose(ours[0], nll, rtol=2e-6, atol=1e-6) and np.allclose(ours[1], lse, rtol=2e-6)
        tolerance = 2e-6 if dtype == torch.float32 else 1.01 * 2**-8
        assert np.allclose(logits.double().numpy(), gradient, rtol=tolerance, atol=1e-6)


HASH = """
import hashlib, torch
from braid.kernels.cross_entropy import cross_entropy_
from braid.kernels.sampling import ReverseStep, draw_tokens
g = torch.Generator().manual_seed(0)
logits, rows = 3 * torch.randn(40, 2011, generator=g), torch.arange(40)
step = ReverseStep(0.5, 0.5 / 2010, 0.0, 0.9, 0.1 / 2010, 0.1 / 2010)
made = [draw_tokens(5, logits, rows, rows, left_out=7, top_p=p) for p in (1.0, 0.8)]
made += [draw_tokens(5, logits, rows, rows, left_out=7, step=step, noisy=rows + 8)]
made += [*cross_entropy_(logits, rows, torch.rand(40, generator=g), 1e-3), logits]
print(hashlib.sha256(b"".join(x.numpy().tobytes() for x in made)).hexdigest())
"""


def test_instruction_sets_change_no_bit():
    if dispatch.choose("cpu").name != "compiled":
        pytest.skip("there is no compiler")
    hashes = {
        subprocess.run(
            [sys.executable, "-c", HASH], env=os.environ | {"BRAID_KERNELS_ISA": name},
            check=True, capture_output=True, text=True,
        ).stdout
        for name in ("avx512", "avx2", "generic")
    }  # fmt: skip
    assert len(hashes) == 1 and len(hashes.pop()) == 65


@pytest.mark.gpu
@pytest.mark.parametrize("step", STEPS)
def test_a_gpu_draws_what_the_host_draws(on_gpu, step):
    for seed, vocab_size in enumerate((5, 130, 3001, 50_257)):
        rows = 2000 if vocab_size < 5000 else 200
        ordinals, positions = numbers(rows)
        logits, options = random_case(seed, vocab_size, rows, step=step)
        for greedy in (False, True):
            there = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
            tokens = draw_tokens(KEY, logits.cuda(), ordinals.cuda(), positions.cuda(), **there, greedy=greedy)
            assert torch.equal(tokens.cpu(), draw_tokens(KEY, logits, ordinals, positions, **options, greedy=greedy))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_finds_the_cross_entropy_of_the_host(on_gpu, dtype):
    for vocab_size in (30, 5003, 50_304):
        logits, targets, weights = case(vocab_size, rows=300)
        there = logits.to(dtype).cuda()
        host = logits.to(dtype)
        ours = cross_entropy_(there, targets.cuda(), weights.cuda(), 1e-3)
        expected = cross_entropy_(host, targets, weights, 1e-3)
        for x, y in zip(ours, expected, strict=True):
            torch.testing.assert_close(x.cpu(), y, rtol=4e-6, atol=2e-6)
        tolerance = 4e-6 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(there.cpu(), host, rtol=tolerance, atol=1e-6)
