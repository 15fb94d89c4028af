"""What the numbers are for: distributions, independence, and categorical draws down to the rare tail.

Every test is deterministic (fixed keys). Bounds are 4.5 standard errors, or a probability of 1e-5 for a whole test.
"""

import math
from itertools import permutations, product

import numpy as np
import pytest
import torch
from scipy import stats

from braid.kernels import random, reference
from braid.kernels.random import Stream

LIMIT = 4.5
RARE = 1e-5


def assert_counts(counts, probabilities):
    """Pearson's chi-square of counts against probabilities (which sum to 1)."""
    counts = np.asarray(counts, float)
    assert stats.chisquare(counts, counts.sum() * np.asarray(probabilities)).pvalue > RARE


def assert_share(hits, trials, probability):
    error = (hits - trials * probability) / math.sqrt(trials * probability * (1 - probability))
    assert abs(error) < LIMIT, f"{hits} hits where {trials * probability:.1f} were due: {error:.1f} standard errors"


def assert_uncorrelated(a, b):
    a, b = (np.asarray(values, np.float64).ravel() for values in (a, b))
    assert abs(np.corrcoef(a, b)[0, 1]) * math.sqrt(a.size) < LIMIT


@pytest.fixture(scope="module")
def normals():
    """Four million: 64 samples, 256 positions, 256 channels."""
    return random.normal(2024, torch.arange(64), torch.arange(256), 256)


def test_moments_of_normals(normals):
    z, n = normals.double().flatten(), normals.numel()
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(float((z**power).mean()) - moment) < LIMIT * math.sqrt(variance / n), f"moment {power}"


def test_distribution_of_normals(normals):
    z = normals.flatten()
    assert stats.kstest(z[:: len(z) // 200_000].double().numpy(), "norm").pvalue > RARE
    edges = stats.norm.ppf(np.linspace(0, 1, 257))
    assert_counts(np.histogram(z.numpy(), edges)[0], np.full(256, 1 / 256))


@pytest.mark.parametrize("sigma", [2, 3, 4, 4.75])
def test_tails_of_normals(normals, sigma):
    for tail in (normals > sigma, normals < -sigma):
        assert_share(int(tail.sum()), tail.numel(), stats.norm.sf(sigma))


def test_normals_of_neighbours_are_uncorrelated(normals):
    z = normals[:, :64, :64]
    for dim in range(3):
        for lag in (1, 2, 4, 17):
            length = z.shape[dim] - lag
            assert_uncorrelated(z.narrow(dim, 0, length), z.narrow(dim, lag, length))


def test_keys_streams_draws_and_words_are_independent():
    o, p = torch.arange(64), torch.arange(128)

    def draw(key=1, stream=Stream.TOKEN, ordinals=o, draw=0, word=0):
        return random.uniform(key, stream, ordinals, p, draw=draw, word=word)

    variants = [draw()]
    variants += [
        draw(key=key) for key in (0, 2, 3, 1 << 32, 1 << 63, random.fold_key(1, 0), random.fold_key(1, "layer"))
    ]
    variants += [draw(stream=stream) for stream in Stream if stream != Stream.TOKEN]
    variants += [draw(ordinals=o + shift) for shift in (64, 1 << 20, 1 << 32, 1 << 40)]
    variants += [draw(draw=1), draw(draw=255), draw(word=1), draw(word=2), draw(word=3)]
    for index, one in enumerate(variants):
        for other in variants[:index]:
            assert_uncorrelated(one, other)


def test_bits_of_words_are_fair():
    r = random.words(7, Stream.TOKEN, torch.arange(128), torch.arange(256), num_blocks=4)
    for shift in range(32):
        assert_share(int((r >> shift & 1).sum()), r.numel(), 0.5)
    for shift in (0, 8, 16, 24):
        assert_counts(torch.bincount((r >> shift & 255).flatten(), minlength=256), np.full(256, 1 / 256))


def test_uniforms_are_uniform_and_their_pairs_too():
    u = random.uniform(7, Stream.TOKEN, torch.arange(512), torch.arange(512))
    assert u.min() >= 0 and u.max() < 1
    assert_counts(torch.bincount((u.flatten() * 1000).long(), minlength=1000), np.full(1000, 1 / 1000))
    pairs = (u[:, ::2] * 32).long() * 32 + (u[:, 1::2] * 32).long()
    assert_counts(torch.bincount(pairs.flatten(), minlength=1024), np.full(1024, 1 / 1024))


@pytest.mark.parametrize("rate", [1e-3, 0.15, 0.5, 0.999])
def test_masking_rates(rate):
    u = random.uniform(11, Stream.TOKEN, torch.arange(512), torch.arange(1024))
    assert_share(int((u < rate).sum()), u.numel(), rate)
    per_sequence = (u < rate).sum(dim=1).numpy()
    spread = per_sequence.var() / (1024 * rate * (1 - rate))
    assert abs(spread - 1) < LIMIT * math.sqrt(2 / 512 + 1 / (512 * 1024 * rate * (1 - rate))), "binomial per sequence"


@pytest.mark.parametrize("n", [1, 2, 1000])
def test_integers_are_uniform(n):
    drawn = random.integers(13, Stream.TOKEN, torch.arange(256), torch.arange(1024), n)
    counts = torch.bincount(drawn.flatten(), minlength=n)
    assert len(counts) == n
    if n > 1:
        assert_counts(counts, np.full(n, 1 / n))


def test_coins_are_uniform_and_independent():
    coins = [random.coins(17, torch.arange(50_000), which=which) for which in range(3)]
    for coin in coins:
        assert 0 < coin.min() and coin.max() < 1
        assert_counts(torch.bincount((coin * 100).long(), minlength=100), np.full(100, 1 / 100))
    assert_uncorrelated(coins[0], coins[1])
    assert_uncorrelated(coins[1], coins[2])


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
def test_dropout_rates(p):
    keep = random.dropout_keep(19, torch.arange(32), torch.arange(128), 256, p)
    if p == 0:
        assert keep.all()
    else:
        dropped = ~keep
        assert_share(int(dropped.sum()), dropped.numel(), round(p * 65536) / 65536)
        assert_uncorrelated(dropped[..., ::2], dropped[..., 1::2])
        assert_uncorrelated(dropped[..., :-2], dropped[..., 2:])


def test_initialisation_is_normal_and_named():
    a, b = (random.initial_normal(23, name, (512, 512)) for name in ("blocks.0.weight", "blocks.1.weight"))
    assert stats.kstest(a.flatten()[::2].double().numpy(), "norm").pvalue > RARE
    assert_uncorrelated(a, b)
    assert_uncorrelated(a[:-1], a[1:])
    u = random.initial_uniform(23, "blocks.0.weight", (512, 512))
    assert_counts(torch.bincount((u.flatten() * 100).long(), minlength=100), np.full(100, 1 / 100))
    assert_uncorrelated(a, u)


@pytest.mark.parametrize("permutation", [random.permutation, reference.permutation])
def test_permutations_are_uniform(permutation):
    index = {order: i for i, order in enumerate(permutations(range(4)))}
    counts = np.zeros(24)
    for key in range(2400):
        counts[index[tuple(permutation(29, "order", key, n=4).tolist())]] += 1
    assert_counts(counts, np.full(24, 1 / 24))


def test_permutations_of_many_leave_no_trace():
    order = random.permutation(31, n=100_000)
    assert_uncorrelated(order, np.arange(100_000))
    assert_uncorrelated(order[:-1], order[1:])


def draw_tokens(logits, count, key=37):
    """How often each token came in `count` draws."""
    rows = torch.arange(count)
    return torch.bincount(random.categorical(key, logits.expand(count, -1), rows, rows % 1024), minlength=len(logits))


def test_categorical_has_the_softmax_frequencies():
    probability = torch.tensor([0.6, 0.25, 0.1, 0.04, 9e-3, 9e-4, 9e-5, 1e-5], dtype=torch.float64)
    for logits in (probability.log(), probability.log() - 1000, probability.log().float() + 50):
        counts = draw_tokens(logits, 400_000)
        assert_counts(counts, logits.double().softmax(0).numpy())


def test_categorical_keeps_the_rare_tail_of_zipf():
    """V = 5000, p ~ rank^-2: ranks beyond 100 share a mass of 0.6 %, each of them a probability of 1e-5 to 2e-8."""
    probability = torch.arange(1, 5001, dtype=torch.float64) ** -2.0
    probability = probability / probability.sum()
    count = 20_000
    counts = draw_tokens(probability.log().float(), count)
    for first in (10, 100, 300):
        assert_share(int(counts[first:].sum()), count, float(probability[first:].sum()))
    head = 30
    expected = torch.cat([probability[:head], probability[head:].sum().view(1)])
    assert_counts([*counts[:head].tolist(), int(counts[head:].sum())], expected.numpy())


def test_small_exponentials_come_as_often_as_they_should():
    """A token of probability p wins by an exponential near p, so the law must hold far below 1 / V."""
    high = random.words(47, Stream.CATEGORICAL, torch.arange(64), torch.arange(256), num_blocks=64).flatten()
    low = high.roll(1)
    times = torch.from_numpy(reference.exponential(high.numpy().astype(np.uint32), low.numpy().astype(np.uint32)))
    for bound in (1e-5, 1e-4, 1e-2, 1.0):
        assert_share(int((times < bound).sum()), times.numel(), -math.expm1(-bound))
    halvings = torch.bincount((-torch.log2(times)).floor().clamp(-1, 16).long() + 1, minlength=18)
    edges = [math.inf, *(2.0**-k for k in range(17)), 0.0]
    assert_counts(
        halvings, [math.exp(-below) - math.exp(-above) for above, below in zip(edges, edges[1:], strict=False)]
    )


def test_categorical_favours_no_place_in_the_vocabulary():
    """Equal tokens, V not a multiple of four: each word of each block wins alike."""
    counts = draw_tokens(torch.zeros(4097), 8_000)
    assert_counts(np.add.reduceat(counts.numpy(), range(0, 4096, 64))[:63], np.full(63, 1 / 63))
    by_word = [int(counts[word:4096:4].sum()) for word in range(4)]
    assert_counts(by_word, np.full(4, 1 / 4))


def test_categorical_draws_of_neighbours_are_independent():
    rows = torch.arange(128).repeat_interleave(256)
    tokens = random.categorical(41, torch.zeros(len(rows), 8), rows, torch.arange(256).repeat(128)).view(128, 256)
    for a, b in [(tokens[:-1], tokens[1:]), (tokens[:, :-1], tokens[:, 1:])]:
        pairs = torch.bincount((a * 8 + b).flatten(), minlength=64)
        assert_counts(pairs, [1 / 64 for _ in product(range(8), range(8))])


def test_categorical_agrees_with_gumbel_argmax_in_exact_arithmetic():
    """The race and argmax(logit + Gumbel) are the same choice when fed the same exponentials."""
    logits = torch.randn(300, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    rows = torch.arange(300)
    high, low = (
        reference.words(key, Stream.CATEGORICAL, rows, rows[:, None], num_blocks=13).reshape(300, -1)[:, :50]
        for key in (43, reference.fold_key(43, reference.LOW_WORDS))
    )
    gumbel = -np.log(reference.exponential(high, low))
    assert np.array_equal(random.categorical(43, logits, rows, rows).numpy(), (logits.numpy() + gumbel).argmax(axis=1))
