"""The order visits every row once per epoch, is a pure function of seed and position, and needs little memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from braid.data_pipeline.order import ShuffledOrder
from braid.kernels.reference import permutation

SHAPES = {
    "one row": [1],
    "one shard": [37],
    "one row each": [1] * 23,
    "equal": [50] * 8,
    "uneven": [3, 100, 1, 77, 20, 1, 64],
    "with empty shards": [0, 5, 0, 0, 9, 1, 0],
    "only the last has rows": [0, 0, 0, 0, 12],
    "large": np.random.default_rng(0).integers(0, 900, 40).tolist(),
}


GOLDEN = [[9, 3, 0, 11, 1, 10, 4, 2, 8, 6, 7, 5], [8, 10, 2, 9, 11, 4, 1, 0, 3, 7, 5, 6]]


def epoch(order: ShuffledOrder, number: int) -> list[int]:
    return [order[number * len(order) + k] for k in range(len(order))]


@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES.keys())
def test_spans_are_the_rows_one_by_one(sizes):
    order = ShuffledOrder(sizes, seed=3, window=2)
    for start in (0, 1, len(order) - 1, 2 * len(order), 5 * len(order) + 3):
        for length in (0, 1, 7, len(order) + 5):  # over the edges of windows and epochs
            rows = order.span(start, start + length)
            assert rows.dtype == np.int64 and rows.tolist() == [order[start + k] for k in range(length)]


@pytest.mark.parametrize("window", [1, 2, 3, 100])
@pytest.mark.parametrize("sizes", SHAPES.values(), ids=SHAPES.keys())
def test_every_row_once_per_epoch(sizes, window):
    order = ShuffledOrder(sizes, seed=7, window=window)
    assert len(order) == sum(sizes)
    for number in (0, 1, 5):
        assert sorted(epoch(order, number)) == list(range(sum(sizes)))


@pytest.mark.parametrize("window", [1, 3, 6])
def test_epochs_seeds_and_windows_differ(window):
    order = ShuffledOrder([50] * 8, seed=7, window=window)
    epochs = [epoch(order, number) for number in range(3)]
    others = [epoch(ShuffledOrder([50] * 8, seed, w), 0) for seed, w in ((8, window), (7, window + 1))]
    # Unrelated orders of 400 rows agree in one place on average.
    orders = [list(range(400)), *epochs, *others]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert sum(a == b for a, b in zip(one, other, strict=True)) < 30


def test_it_is_the_stated_construction():
    """Shards permuted by Philox, cut into windows, rows permuted within each: written out without any cache."""
    sizes, window, seed = [3, 100, 1, 77, 20, 0, 64], 2, 12345
    first = np.cumsum([0, *sizes])
    for number in (0, 3):
        expected: list[int] = []
        shards = permutation(seed, "shards", number, n=len(sizes))
        for w in range(4):
            rows = [row for s in shards[2 * w : 2 * w + 2] for row in range(first[s], first[s + 1])]
            expected += [rows[k] for k in permutation(seed, "rows", number, w, n=len(rows))]
        assert epoch(ShuffledOrder(sizes, seed, window), number) == expected


def test_a_window_holds_the_rows_of_its_shards_only():
    order = ShuffledOrder([50] * 12, seed=1, window=3)
    for number in range(2):
        shards = [row // 50 for row in epoch(order, number)]
        for start in range(0, 600, 150):
            inside = shards[start : start + 150]
            assert len(set(inside)) == 3
            assert len(set(inside[:20])) > 1, "rows should be mixed across the shards of a window"


def test_any_position_at_any_time():
    sizes = [40, 3, 60, 25, 9]
    order = ShuffledOrder(sizes, seed=3, window=2)
    sequence = [order[k] for k in range(3 * len(order))]
    jumping = ShuffledOrder(sizes, seed=3, window=2)
    for position in np.random.default_rng(0).integers(0, len(sequence), 500).tolist():
        assert jumping[position] == sequence[position]
    far = 10**15
    assert ShuffledOrder(sizes, seed=3, window=2)[far] == ShuffledOrder(sizes, seed=3, window=2)[far] < len(order)


def test_the_order_does_not_change_between_versions():
    """Golden values: a checkpoint written today must go on in the same order tomorrow."""
    order = ShuffledOrder([5, 3, 4], seed=42, window=2)
    assert epoch(order, 0) == GOLDEN[0] and epoch(order, 1) == GOLDEN[1]


def test_memory_is_that_of_two_windows():
    order = ShuffledOrder([2000] * 200, seed=0, window=2)  # 400,000 rows: 3.2 MB if it were all held
    order[0]
    tracemalloc.start()
    for position in range(0, 2 * len(order), 500):
        order[position]
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 200_000 and peak < 1_500_000


def test_a_negative_position_and_no_rows_are_bugs():
    with pytest.raises(AssertionError):
        ShuffledOrder([3], 0, 1)[-1]
    with pytest.raises(AssertionError):
        ShuffledOrder([0, 0], 0, 1)
