"""Pairs that do not fit a row: the run stops, they are left out, or they are cut."""

from __future__ import annotations

import numpy as np
import pytest
from test_pairs import all_rows, corpus, of_split, open_rows, pairs

from braid.data_pipeline.loader import Loader
from braid.data_pipeline.order import ShuffledOrder
from braid.kernels.errors import CheckpointError, ConfigError

__all__ = ["corpus", "pairs"]  # fixtures


def test_long_pairs_stop_the_run(corpus, pairs):
    rows = open_rows(corpus)
    sizes = sorted(3 + len(source.encode()) + len(target.encode()) for source, target in of_split(rows, pairs))
    assert open_rows(corpus, length=sizes[-1]).num_oversized == 0
    with pytest.raises(ConfigError) as caught:
        open_rows(corpus, length=30)
    number, most = sum(size > 30 for size in sizes), sizes[int(np.ceil(0.99 * (len(sizes) - 1)))]
    assert f"{number} of {len(sizes)} pairs of the train split do not fit" in caught.value.what
    assert f"the longest pair takes {sizes[-1]} tokens, and 99 of 100 take at most {most}" in caught.value.found
    with pytest.raises(ConfigError, match="oversized='truncate'"):
        open_rows(corpus, oversized="truncate")


def test_long_pairs_left_out(corpus, pairs):
    whole = open_rows(corpus)
    sizes = [3 + len(source.encode()) + len(target.encode()) for source, target in of_split(whole, pairs)]
    kept = [i for i, size in enumerate(sizes) if size <= 30]
    assert 100 < len(kept) < len(whole) - 20 and 30 in sizes and 31 in sizes
    rows = open_rows(corpus, length=30, oversized="skip")
    assert all_rows(rows) == [whole[i].tolist()[:30] for i in kept]
    assert rows.num_oversized == len(whole) - len(kept)
    owner = np.repeat(np.arange(len(whole.rows_per_shard)), whole.rows_per_shard)
    assert rows.rows_per_shard.tolist() == np.bincount(owner[kept], minlength=len(whole.rows_per_shard)).tolist()
    with pytest.raises(ConfigError, match="do not fit"):  # none does
        open_rows(corpus, length=2, oversized="skip")


@pytest.mark.parametrize("target_tokens", [0, 6])
def test_long_pairs_are_cut_at_the_ends_of_both_sides(corpus, pairs, target_tokens):
    length = 30
    rows, whole = open_rows(corpus, length=length, oversized="cut", target_tokens=target_tokens), open_rows(corpus)
    tokenizer, most = rows.corpus.tokenizer, target_tokens or length // 2
    written, num_cut = of_split(whole, pairs), 0
    assert len(rows) == len(whole) and rows.rows_per_shard.tolist() == whole.rows_per_shard.tolist()
    for i, (source, target) in enumerate(written):
        source, target = source.encode(), target.encode()
        assert rows.target(i) == list(target)
        if 3 + len(source) + len(target) > length:
            num_cut += 1
            # BOS and two EOS; the target has its share for sure, and more where the source is short
            target = target[: max(most - 1, length - 3 - len(source))]
            source = source[: length - 3 - len(target)]
            assert len(source) + len(target) + 3 == length
        eos = tokenizer.eos_id
        row = [tokenizer.bos_id, *source, eos, *target, eos]
        row += [eos] * (length - len(row))
        assert rows[i].tolist() == row
        assert rows.condition(rows[i][None])[0].tolist() == [j < len(source) + 2 for j in range(length)]
        assert rows.num_bytes(i) == len(target)
    assert (
        rows.num_oversized == num_cut > 20
        and f"{num_cut:,} pairs are longer than a row and cut" in rows.about_oversized
    )
    with pytest.raises(ConfigError, match="no place for its source"):
        open_rows(corpus, length=length, oversized="cut", target_tokens=29)


def test_a_run_that_cuts_pairs_is_not_continued_by_one_that_leaves_them_out(corpus):
    def opened(**options) -> Loader:
        rows = open_rows(corpus, length=30, **options)
        sizes = {"global_batch_size": 4, "micro_batch_size": 4, "data_rank": 0, "data_size": 1}
        return Loader(rows, ShuffledOrder(rows.rows_per_shard, 0, 2), **sizes)

    cutting, others = {"oversized": "cut"}, ({"oversized": "skip"}, {"oversized": "cut", "target_tokens": 6})
    assert opened(**cutting).load_state_dict(opened(**cutting).state_dict()) is False
    for other in others:
        for state, then in ((cutting, other), (other, cutting)):
            with pytest.raises(CheckpointError, match="target_tokens differs"):
                opened(**then).load_state_dict(opened(**state).state_dict())
    long = {name: open_rows(corpus, **options).target_tokens for name, options in (("cut", cutting), ("stop", {}))}
    assert long == {"cut": None, "stop": None}  # where all fit it makes no difference
