"""Samples are dealt to the sources in exact shares, and each source goes through its rows in epochs of its own."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from braid.data_pipeline.mixture import BLOCK, MAX_BLOCK, MixedOrder, Stage
from braid.data_pipeline.order import ShuffledOrder
from braid.kernels.errors import ConfigError

SEED = 5
WEIGHTS = {"web": 0.6, "code": 0.3, "math": 0.1}
GOLDEN = "a b c b c b c b b c b c b b c c b b b a b b b c".split()
CURRICULUM = (
    Stage.weighted(0, WEIGHTS),
    Stage.weighted(100, {"web": 0, "code": 1, "math": 1}),
    Stage.weighted(1000, {"web": 0.001, "code": 0.999, "math": 0}),
    Stage.weighted(1003, {"web": 1, "code": 1, "math": 1}),
)


def plain_orders(sizes: dict[str, int]) -> dict[str, ShuffledOrder]:
    return {name: ShuffledOrder([size], SEED, 1) for name, size in sizes.items()}


@pytest.mark.parametrize(
    ("weights", "temperature", "shares"),
    [
        ({"web": 0.7, "code": 0.3}, 1.0, {"code": 3, "web": 7}),
        ({"web": 7, "code": 3.0}, 1.0, {"code": 3, "web": 7}),
        ({"web": 100, "code": 0, "math": 300}, 1.0, {"math": 3, "web": 1}),
        ({"web": 1e-3, "code": 0.25}, 1.0, {"code": 250, "web": 1}),
        ({"web": 90000, "code": 10000}, 2.0, {"code": 1, "web": 3}),  # square roots
        ({"web": 0.2}, 0.5, {"web": 1}),
    ],
)
def test_shares_are_the_weights_as_they_are_written(weights, temperature, shares):
    stage = Stage.weighted(8, weights, temperature)
    found = {name: stage.fraction(name) for name in weights}
    for name in weights:
        exact = Fraction(shares.get(name, 0), sum(shares.values()))
        assert found[name] == exact or (temperature != 1 and abs(found[name] - exact) < 1e-15)
    assert list(stage.shares) == list(shares) and sum(found.values()) == 1 and stage.first == 8


def test_a_high_temperature_makes_shares_equal():
    shares = [Stage.weighted(0, {"a": 1000, "b": 10}, t).fractions["b"] for t in (0.5, 1, 2, 5, 1e6)]
    assert (
        shares == sorted(shares)
        and shares[1] == pytest.approx(10 / 1010)
        and shares[-1] == pytest.approx(0.5, abs=1e-5)
    )
    np.testing.assert_allclose(shares[3], 10**0.2 / (10**0.2 + 1000**0.2), rtol=1e-14)


def test_a_share_too_small_to_deal_is_refused():
    assert Stage.weighted(0, {"a": MAX_BLOCK - 1, "b": 1}).block == MAX_BLOCK
    with pytest.raises(ConfigError, match="source b is too small"):
        Stage.weighted(0, {"a": MAX_BLOCK, "b": 1})


MIXTURES = {
    "one": {"a": 1},
    "halves": {"a": 1, "b": 1},
    "thirds": {"a": 1, "b": 1, "c": 1},
    "decimals": {"a": 0.123, "b": 0.456, "c": 0.421},
    "rare": {"a": 0.002, "b": 0.5, "c": 0.497, "d": 0.001},
    "many": {f"s{number:02}": number + 1 for number in range(20)},
}


@pytest.mark.parametrize("weights", MIXTURES.values(), ids=MIXTURES.keys())
def test_counts_are_the_exact_quotas(weights):
    """Within one of n p at the end of every block, and found without counting what came before."""
    stage = Stage.weighted(0, weights)
    order = MixedOrder(plain_orders(dict.fromkeys(weights, 50)), [stage], SEED)
    assert stage.block >= BLOCK and min(stage.fractions.values()) * stage.block >= 1
    num = 8 * stage.block + 17
    one_hot = order.sources(0, num)[:, None] == np.arange(len(weights))
    counted = np.concatenate([np.zeros((1, len(weights)), np.int64), one_hot.cumsum(0)])
    shares = [stage.fraction(name) for name in order.names]
    for n in range(0, num, stage.block):
        assert all(abs(count - n * share) < 1 for count, share in zip(counted[n].tolist(), shares, strict=True))
    for n in (*range(0, num, 37), num):
        np.testing.assert_array_equal(order.given(n), counted[n])


def test_blocks_are_shuffled_and_differ():
    order = MixedOrder(plain_orders({"a": 9, "b": 9}), [Stage.weighted(0, {"a": 1, "b": 1})], SEED)
    blocks = order.sources(0, 20 * BLOCK).reshape(20, BLOCK)
    assert len({block.tobytes() for block in blocks}) == 20
    changes = (np.diff(blocks) != 0).mean()
    assert 0.4 < changes < 0.6, "in a random order half of the neighbours differ"
    other = MixedOrder(plain_orders({"a": 9, "b": 9}), order.stages, SEED + 1)
    assert (other.sources(0, BLOCK) != blocks[0]).mean() > 0.3


def test_each_source_gives_every_row_once_per_epoch_in_its_own_order():
    sizes = {"a": 7, "b": 40, "c": 23}
    order = MixedOrder(plain_orders(sizes), [Stage.weighted(0, {"a": 2, "b": 5, "c": 3})], SEED)
    none = np.zeros(3, np.int64)
    sources, positions = order.places(0, 1000, none)
    rows = order.rows(sources, positions)
    np.testing.assert_array_equal(sources, order.sources(0, 1000))
    for number, (name, size) in enumerate(sizes.items()):
        of_source = rows[sources == number] - order.first_rows[number]
        np.testing.assert_array_equal(of_source, plain_orders(sizes)[name].span(0, len(of_source)))
        for epoch in range(len(of_source) // size):
            assert sorted(of_source[epoch * size : (epoch + 1) * size].tolist()) == list(range(size))
    for start, stop in ((0, 1), (3, 700), (256, 512), (999, 1000), (500, 500)):
        fresh = MixedOrder(plain_orders(sizes), order.stages, SEED)
        np.testing.assert_array_equal(fresh.rows(*fresh.places(start, stop, none)), rows[start:stop])


def test_the_order_does_not_change_between_versions():
    """Golden values: a checkpoint written today must go on in the same order tomorrow."""
    order = MixedOrder(plain_orders({"a": 9, "b": 9, "c": 9}), [Stage.weighted(0, {"a": 1, "b": 3, "c": 4})], 42)
    assert [order.names[source] for source in order.sources(0, 24)] == GOLDEN


def test_stages_begin_where_they_are_said_to():
    names = sorted(WEIGHTS)
    order = MixedOrder(plain_orders(dict.fromkeys(names, 30)), CURRICULUM, SEED)
    sources = order.sources(0, 3000)
    edges = [0, 100, 1000, 1003, 3000]
    for stage, start, stop in zip(CURRICULUM, edges, edges[1:], strict=False):
        alone = MixedOrder(plain_orders(dict.fromkeys(names, 30)), [Stage(0, stage.shares)], SEED)
        assert set(sources[start:stop]) <= {names.index(name) for name in stage.shares}
        whole = (stop - start) // stage.block * stage.block
        counts = np.bincount(sources[start : start + whole], minlength=3)
        np.testing.assert_array_equal(counts, alone.given(whole))
    counted = np.cumsum(sources[:, None] == np.arange(3), 0)
    for n in (1, 99, 100, 101, 999, 1000, 1002, 1003, 1004, 2500, 3000):
        np.testing.assert_array_equal(order.given(n), counted[n - 1])
        assert order.stage(n - 1) == [stage for stage in CURRICULUM if stage.first < n][-1]


def test_a_stage_that_changes_nothing_is_none():
    stages = [Stage.weighted(0, {"a": 1, "b": 2}), Stage.weighted(50, {"a": 0.5, "b": 1}), Stage.weighted(90, {"b": 1})]
    order = MixedOrder(plain_orders({"a": 9, "b": 9}), stages, SEED)
    assert order.stages == [stages[0], stages[2]]
