"""Stratified times: evenly spread over the global batch, the same on every split, unbiased."""

import math

import pytest
import torch

from braid.kernels.random import fold_key
from braid.pretrain.diffusion.times import (
    evaluation_strata,
    log_uniform_mixture,
    second_strata,
    time_buckets,
    to_range,
    training_strata,
)

KEY = fold_key(7, "train")


def strata_of(first: int, size: int, ordinals: torch.Tensor) -> torch.Tensor:
    index, shift = training_strata(KEY, first, size, ordinals)
    assert index.dtype == torch.int64 and shift.dtype == torch.float64 and len(shift.unique()) == 1
    return (index + shift) / size


def test_each_stratum_of_the_global_batch_is_hit_once():
    ordinals = torch.arange(640, 640 + 64)
    strata = strata_of(640, 64, ordinals)
    assert strata.dtype == torch.float64
    assert torch.equal((strata * 64).floor().sort().values, torch.arange(64.0, dtype=torch.float64))


@pytest.mark.parametrize("size", [64, 30, 3])
def test_groups_have_every_fourth_stratum(size):
    """So a group's times are an even grid; all together they are still a permutation, drawn anew for each batch."""
    ordinals = torch.arange(640, 640 + size)
    places = {}
    for first in (640, 704, 768):
        index, shift = training_strata(KEY, first, size, ordinals - 640 + first, groups=4)
        assert torch.equal(index.sort().values, torch.arange(size)) and len(shift.unique()) == 1
        assert torch.equal(index % 4, torch.arange(size) % 4)
        places[first] = index.tolist()
        part, _ = training_strata(KEY, first, size, ordinals[1:3] - 640 + first, groups=4)
        assert torch.equal(part, index[1:3])
    assert size == 3 or len(set(map(tuple, places.values()))) == 3


def test_the_place_within_a_group_is_uniform():
    found = [training_strata(KEY, k * 20, 20, torch.tensor([k * 20 + 6]), groups=4)[0] for k in range(2000)]
    counts = torch.cat(found).bincount(minlength=20)
    assert counts[2::4].sum() == 2000 and (counts[2::4] - 400).abs().max() < 5 * math.sqrt(2000 * 0.2 * 0.8)


def test_a_rank_and_micro_batch_sees_its_part_of_the_same_times():
    whole = strata_of(640, 64, torch.arange(640, 704))
    part = strata_of(640, 64, torch.arange(656, 664))
    assert torch.equal(whole[16:24], part)


def test_every_rank_sees_the_whole_range_of_times():
    """Unpermuted strata would give rank 0 of 4 only times below 1/4."""
    means = [strata_of(k * 64, 64, torch.arange(k * 64, k * 64 + 16)).mean() for k in range(400)]
    average = torch.stack(means).mean()
    assert abs(average - 0.5) < 5 * math.sqrt(1 / 12 / 16 / 400)


def test_steps_differ_and_are_uniform():
    draws = torch.cat([strata_of(k * 8, 8, torch.arange(k * 8, k * 8 + 8))[:1] for k in range(2000)])
    assert len(draws.unique()) == len(draws)
    assert abs(draws.mean() - 0.5) < 5 * math.sqrt(1 / 12 / 2000)


def test_evaluation_strata_cover_the_draws_of_each_sequence():
    ordinals = torch.arange(100)
    pairs = [evaluation_strata(KEY, ordinals, k) for k in range(4)]
    strata = torch.stack([(index + shift) / 4 for index, shift in pairs])
    assert torch.equal((strata * 4).floor().long(), torch.arange(4)[:, None].expand(4, 100))
    shifts = strata[0] * 4
    assert len(shifts.unique()) == 100 and abs(shifts.mean() - 0.5) < 5 * math.sqrt(1 / 12 / 100)


def test_buckets():
    assert time_buckets(torch.tensor([0.0, 0.0999, 0.1, 0.95, 1.0])).tolist() == [0, 0, 1, 9, 9]


@pytest.mark.parametrize("smallest", [1e-5, 0.0099])
def test_importance_sampled_integral_of_a_steep_function(smallest):
    """E[f(t) / density] is the integral of f; here of 1/t^2 on [smallest, 1], known in closed form."""
    strata = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    times, density = log_uniform_mixture(strata, smallest)
    assert times.min() >= smallest and times.max() <= 1
    assert torch.all(times.diff() > 0)
    assert torch.allclose((1 / density).mean(), torch.tensor(1 - smallest, dtype=torch.float64), rtol=1e-6)
    exact = 1 / smallest - 1
    assert abs((1 / times**2 / density).mean() / exact - 1) < 1e-4


def test_range():
    assert to_range(torch.tensor([0.0, 1.0], dtype=torch.float64), 0.25, 0.75).tolist() == [0.25, 0.75]


def strata_pairs(num: int, shift: float) -> tuple[torch.Tensor, torch.Tensor]:
    index, shift = torch.arange(num), torch.full((num,), shift, dtype=torch.float64)
    return (index + shift) / num, second_strata(index, shift)


def test_second_strata_cover_the_interval_and_the_square():
    """Each of them evenly, for every shift; and the pairs together: every cell of an 8 x 8 grid gets its share."""
    for shift in (0.1, 0.5, 0.777):
        first, second = strata_pairs(512, shift)
        assert 0 <= float(second.min()) and float(second.max()) < 1
        gaps = torch.diff(second.sort().values)
        assert float(gaps.max()) < 3 / 512
        cells = torch.bincount((first * 8).long() * 8 + (second * 8).long(), minlength=64)
        assert int(cells.min()) >= 6 and int(cells.max()) <= 10  # 8 on average


def test_second_strata_are_independent_of_the_first_and_unbiased():
    """Over the 32-bit shifts that can be drawn, a sample's pair of strata has independent uniform parts."""
    words = torch.randint(0, 1 << 32, (200_000,), generator=torch.Generator().manual_seed(0))
    shift = (words.double() + 0.5) * 2.0**-32
    for number in (0, 3, 500):
        second = second_strata(torch.full_like(words, number), shift)
        assert abs(float(second.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / len(words))
        assert abs(float(torch.corrcoef(torch.stack([shift, second]))[0, 1])) < 5 / math.sqrt(len(words))
        cells = torch.bincount((shift * 10).long() * 10 + (second * 10).long(), minlength=100).double()
        chi_square = float(((cells - len(words) / 100).square() / (len(words) / 100)).sum())
        assert chi_square < 99 + 5 * math.sqrt(2 * 99)
