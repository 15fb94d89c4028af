"""The NumPy reference against what is known from elsewhere: SciPy's quantiles, exact arithmetic, its own pieces."""

import hashlib
import math

import numpy as np
import pytest
from scipy.special import ndtri

from braid.kernels import normal_table, reference

ONES = 0xFFFFFFFF


def test_folding_a_key_is_philox_of_the_word():
    low, high = (int(word) for word in reference.philox(5, 7, 0, reference.FOLD_TAG, 11)[:2])
    assert reference.fold_key(11, 7 << 32 | 5) == high << 32 | low


def test_folding_composes_and_separates():
    fold = reference.fold_key
    assert fold(3) == 3
    assert fold(3, "layer", 2) == fold(fold(3, "layer"), 2)
    keys = [fold(3, *words) for words in [(1,), ("1",), (2,), (1, 2), (2, 1), ("",), (0,), (0, 0), (1 << 63,)]]
    keys += [fold(key, step) for key in (0, 1, 2**64 - 1) for step in range(200)]
    assert len(set(keys)) == len(keys) and all(0 <= key < 1 << 64 for key in keys)
    with pytest.raises(AssertionError):
        fold(3, -1)


def test_the_committed_table_is_the_generated_one():
    assert normal_table.render(normal_table.generate()) == normal_table.FILE.read_text()


def test_the_table_is_frozen():
    digest = hashlib.sha256(normal_table.load().astype("<f4").tobytes()).hexdigest()
    assert digest == "3ea27c52ef51b2ed535fe90efc4f38641ada9a24f53550ba0f45cf635ca0cbaa"


def test_normals_are_the_quantiles_of_their_words():
    rng = np.random.default_rng(0)
    tail, edge = np.arange(1 << 20, dtype=np.uint32), np.uint32(2**31 - 1) - np.arange(1 << 12, dtype=np.uint32)
    body = rng.integers(0, 1 << 31, 1 << 21, dtype=np.uint32)
    for r in (tail, edge, body):
        exact = -ndtri((2.0 * r + 1) * 2.0**-33)
        assert np.abs(reference.to_normal(r) - exact).max() < 7e-6
        negative = reference.to_normal(r | np.uint32(1 << 31))
        assert np.array_equal(negative.view(np.uint32), reference.to_normal(r).view(np.uint32) ^ np.uint32(1 << 31))
    assert np.all(np.diff(reference.to_normal(tail[:4096])) < 0), "the far tail is one value per word"


def test_uniforms_stay_below_one():
    ends = reference.to_uniform(np.array([0, 255, 256, ONES], np.uint32))
    assert ends.tolist() == [0.0, 0.0, 2.0**-24, 1 - 2.0**-24]


def test_exponentials_keep_their_digits_at_both_ends():
    high = np.array([0, 0, 0, 2**31 - 1, 2**31, ONES, ONES], np.uint32)
    low = np.array([0, 1, ONES, ONES, 0, 0, ONES], np.uint32)
    values = reference.exponential(high, low)
    assert values[:3] == pytest.approx([2.0**-65, 3 * 2.0**-65, 2.0**-32], rel=1e-9)
    assert values[3:5] == pytest.approx([math.log(2)] * 2, rel=1e-15)
    assert values[5:] == pytest.approx([32 * math.log(2), 65 * math.log(2)], rel=1e-9)
    assert np.all(np.diff(values) >= 0)


def test_permutations():
    order = reference.permutation(5, "epoch", 3, n=1001)
    assert sorted(order.tolist()) == list(range(1001))
    assert order.tolist() != reference.permutation(5, "epoch", 4, n=1001).tolist()
    assert reference.permutation(5, n=1).tolist() == [0] and reference.permutation(5, n=0).tolist() == []
