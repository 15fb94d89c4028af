"""Draws of tokens on this machine's CPU, by the compiled and the eager implementation."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from braid.kernels import dispatch, random, reference, sampling_eager
from braid.kernels.errors import BraidError
from braid.kernels.random import Stream
from braid.kernels.sampling import draw_tokens

from .sampling_cases import KEY, drawn, hybrid_step, law, random_case, uniform_step

PLACES_OF_SMALL_WORDS = [  # ordinals below 2^32 where an upper word of tokens 0 to 3 at position 0 is below 20
    5426311, 62227740, 206338341, 231610096, 290570037, 446424867, 476670012, 529492482, 543392627, 659583023,
    717181613, 1056398202, 1071539346, 1083730060, 1096335262, 1175423640, 1175810849, 1206806042, 1328300470,
    1334533218, 1346837686, 1395991008, 1500354379, 1556616913, 1579952825, 1650255141, 1661961742, 1674477475,
    1679299271, 1708499832, 1731961129, 1749515976, 1757812275, 1871510759, 1889546353, 2024564160, 2091090826,
    2142414817, 2183219100, 2194064408, 2277970329, 2437053149, 2474365811, 2528257510, 2534723219, 2596467458,
    2622038536, 2668308807, 2694593552, 2758447537, 2788632168, 2792995517, 2805470288, 2816696036, 2842355550,
    2966553664, 2980668869, 3041129112, 3042262372, 3113762221, 3149273237, 3183160660, 3224186239, 3245980457,
    3329959684, 3358284045, 3391277776, 3424888599, 3427980692, 3496121361, 3787546472, 3938755770, 3957914340,
    3969057320, 3977932931, 4051797338, 4088355025, 4143120986, 4158501566, 4193233352, 4244242879,
]  # fmt: skip
STEPS = ("none", "uniform", "hybrid", "masked")


@pytest.fixture(params=["compiled", "eager"])
def implementation(request, monkeypatch) -> Iterator[str]:
    """Each of them in turn."""
    found = dispatch.choose("cpu")
    if request.param == "compiled" and found.name != "compiled":
        pytest.skip(f"there is no compiled library: {found.reason}")
    monkeypatch.setattr(dispatch, "choose", lambda device_type: dispatch.Choice(request.param, "a test"))
    dispatch._functions.cache_clear()
    yield request.param
    dispatch._functions.cache_clear()


def numbers(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ordinals on both sides of 2^32, positions up to 2^32 - 1."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 1 << 40, count)), torch.from_numpy(rng.integers(0, 1 << 32, count))


@pytest.mark.parametrize("vocab_size", [2, 5, 127, 128, 130, 3001])
@pytest.mark.parametrize("step", STEPS)
def test_tokens_are_those_of_the_reference_race(implementation, step, vocab_size):
    """Token for token, but where two finish closer than rounding."""
    ordinals, positions = numbers(60, vocab_size)
    for seed in range(6):
        logits, options = random_case(seed, vocab_size, 60, step=step)
        before = logits.clone()
        p = law(logits, **options)
        possible = p.sum(1) > 0  # the nucleus may have left no way to x_t
        tokens = draw_tokens(KEY, logits, ordinals, positions, **options, draw=seed)
        assert torch.equal(tokens[possible], drawn(p[possible], ordinals[possible], positions[possible], seed))
        assert torch.equal(logits, before)


def test_a_wide_vocabulary_and_steep_logits(implementation):
    ordinals, positions = numbers(4)
    generator = torch.Generator().manual_seed(1)
    for scale in (0.0, 3.0, 100.0, 1e30):
        logits = torch.randn(4, 50_257, generator=generator) * scale
        tokens = draw_tokens(KEY, logits, ordinals, positions)
        assert torch.equal(
            tokens, drawn(np.exp(logits.double() - logits.double().amax(1, True)).numpy(), ordinals, positions)
        )
    for logits in (torch.linspace(-300, 300, 5000), torch.linspace(300, -300, 5000)):
        tokens = draw_tokens(KEY, logits.expand(4, -1), ordinals, positions)
        expected = reference.categorical(KEY, logits.double().expand(4, -1), ordinals.numpy(), positions.numpy())
        assert torch.equal(tokens, torch.from_numpy(expected))


@pytest.mark.parametrize("step", STEPS)
def test_greedy_takes_the_most_probable_token(implementation, step):
    for seed in range(8):
        logits, options = random_case(seed, 301, 40, step=step)
        p = law(logits, **options)
        tokens = draw_tokens(KEY, logits, *numbers(40), **options, greedy=True).numpy()
        possible = p.sum(1) > 0
        assert np.all(p[possible, tokens[possible]] >= p[possible].max(1) * (1 - 1e-12))


@pytest.mark.parametrize("step", STEPS)
def test_frequencies_are_the_exact_probabilities(implementation, step):
    """40,000 draws of one law by chi-square; tokens without probability never come."""
    count, vocab_size, mask = 40_000, 9, 4
    logits = torch.tensor([[1.0, -torch.inf, 0.3, -2.0, 5.0, 0.0, 1.5, -1.0, 0.8]])
    options = {"left_out": mask, "temperature": 1.2, "top_p": 0.93}
    if step != "none":
        made = {"uniform": uniform_step, "hybrid": hybrid_step, "masked": lambda *a: hybrid_step(*a, 0.0)}[step]
        noisy = torch.tensor([2 if step == "uniform" else mask])
        options |= {"step": made(0.7, 0.5, vocab_size - 1), "noisy": noisy}
    p = law(logits, **options)[0]
    if step != "none":
        options["noisy"] = options["noisy"].expand(count)
    rows = torch.zeros(count, dtype=torch.int64)
    tokens = draw_tokens(KEY, logits, torch.arange(count), rows + 3, rows=rows, **options)
    counts = np.bincount(tokens.numpy(), minlength=vocab_size)
    assert np.all(counts[p == 0] == 0)
    expected = count * p[p > 0]
    degrees = len(expected) - 1
    assert ((counts[p > 0] - expected) ** 2 / expected).sum() < degrees + 5 * math.sqrt(2 * degrees)


def test_rare_tokens_win_as_often_as_they_should(implementation):
    """Four tokens of probability 1e-9 each, among the first 2^32 ordinals: 17.2 wins are to be expected, almost all of
    them where one of the four upper words is below 20. These places are listed; with 24-bit uniforms all of them would
    look alike."""
    ordinals, rare = torch.tensor(PLACES_OF_SMALL_WORDS), 1e-9
    rows = torch.zeros_like(ordinals)
    high = random.words(KEY, Stream.CATEGORICAL, ordinals, rows[:, None])[:, 0, 0]
    assert (high.amin(1) < 20).all()
    logits = torch.tensor([[math.log(rare)] * 4 + [math.log(0.5)] * 2], dtype=torch.float32)
    tokens = draw_tokens(KEY, logits, ordinals, rows, rows=rows)
    wins = int((tokens < 4).sum())
    missed = math.exp(-20 / 2**32 / rare)  # the others finish even later than such a word
    assert abs(wins - 2**32 * 4 * rare * (1 - missed)) < 3 * math.sqrt(17.2)
    p = np.exp(logits.double().numpy()).repeat(len(ordinals), 0)
    assert torch.equal(tokens, drawn(p, ordinals, rows))


def test_draws_do_not_depend_on_batching_threads_or_layout(implementation):
    logits, options = random_case(3, 1003, 50, step="hybrid")
    ordinals, positions = numbers(50)
    together = draw_tokens(KEY, logits, ordinals, positions, **options)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = draw_tokens(KEY, logits, ordinals, positions, **options)
    torch.set_num_threads(threads)
    assert torch.equal(together, alone)

    chosen = torch.tensor([7, 3, 3, 49])
    part = {name: value[chosen] if name == "noisy" else value for name, value in options.items()}
    tokens = draw_tokens(KEY, logits, ordinals[chosen], positions[chosen], rows=chosen, **part)
    assert torch.equal(tokens, together[chosen])
    wide = torch.zeros(50, 1010, dtype=logits.dtype)
    wide[:, :1003] = logits
    assert torch.equal(draw_tokens(KEY, wide[:, :1003], ordinals, positions, **options), together)
    assert torch.equal(draw_tokens(KEY, logits.t().contiguous().t(), ordinals, positions, **options), together)
    assert not torch.equal(draw_tokens(KEY + 1, logits, ordinals, positions, **options), together)
    assert not torch.equal(draw_tokens(KEY, logits, ordinals, positions, draw=1, **options), together)
    assert draw_tokens(KEY, logits, ordinals[:0], positions[:0]).tolist() == []


def test_what_cannot_change_stays(implementation):
    """Without uniform noise a token that is seen is final; its logits are not even read."""
    step = hybrid_step(0.5, 0.25, 4, 0.0)
    logits = torch.full((3, 5), torch.nan)
    logits[1] = 0
    tokens = draw_tokens(KEY, logits, *numbers(3), left_out=2, step=step, noisy=torch.tensor([4, 2, 0]))
    assert tokens[0] == 4 and tokens[2] == 0


@pytest.mark.parametrize("step", ["none", "uniform"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_without_a_distribution_are_refused(implementation, bad, step):
    logits = torch.zeros(3, 5)
    logits[1] = bad
    options = {} if step == "none" else {"step": uniform_step(0.5, 0.2, 4), "noisy": torch.tensor([0, 1, 2])}
    with pytest.raises(BraidError, match="cannot draw a token"):
        draw_tokens(KEY, logits, *numbers(3), left_out=4, **options)
    logits[1] = 0
    logits[1, 3] = bad
    if bad != -torch.inf:
        with pytest.raises(BraidError, match="a row whose largest is"):
            draw_tokens(KEY, logits, *numbers(3), left_out=4, **options)
    with pytest.raises(BraidError, match="too large"):
        draw_tokens(KEY, torch.zeros(1, 262_145), *numbers(1))


def test_a_nucleus_is_the_smallest_set(implementation):
    """Ties at its end go to the first tokens."""
    logits = torch.tensor([[0.0, 1.0, 0.0, -9.0, 0.0, 1.0]])
    rows = torch.zeros(300, dtype=torch.int64)
    p = law(logits)[0]
    for top_p, kept in [
        (1e-6, {1}),
        (2 * p[1] - 1e-6, {1, 5}),
        (2 * p[1] + 1.5 * p[0], {0, 1, 2, 5}),
        (1 - 1e-7, set(range(6))),
    ]:
        tokens = draw_tokens(KEY, logits, torch.arange(300), rows, rows=rows, top_p=float(top_p))
        assert set(tokens.tolist()) - kept == set() and len(set(tokens.tolist())) >= min(4, len(kept))
        finite = torch.isfinite(sampling_eager.nucleus(logits, float(top_p)))[0].nonzero().flatten()
        assert set(finite.tolist()) == kept
