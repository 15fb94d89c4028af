"""Estimates and their standard errors; independence of batching and ranks; unigram entropy."""

import math

import numpy as np
import pytest
import torch

from braid.data_pipeline.packing import Packed
from braid.parallel.data_parallel import World
from braid.pretrain.evaluation.bound import estimate, evaluate_rows, paired_difference, unigram_entropy
from braid.pretrain.objectives.base import Figure

from ..objectives.conftest import LENGTH, VOCAB, build

FIGURE = Figure("x", "x", True)


class FixedRows:
    """Random rows in memory, with what `evaluate_rows` asks of data_pipeline.packing.Rows."""

    def __init__(self, num: int) -> None:
        self.tokens = np.random.default_rng(0).integers(0, VOCAB - 1, (num, LENGTH))

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return self.tokens[index]

    def load(self, indices):
        return Packed(self.tokens[np.asarray(indices)], None)

    def condition(self, tokens):
        return np.zeros(tokens.shape, dtype=bool)

    def is_left_out(self, index):
        return False

    def num_bytes(self, index):
        return 2.0 * LENGTH


def figures(estimates):
    return {e.name: (e.value, e.standard_error, e.bits_per_byte) for e in estimates}


@pytest.mark.parametrize("name", ["ar", "mdlm", "ccdd"])
def test_batch_size_does_not_change_the_numbers(name):
    objective, rows = build(name), FixedRows(10)
    common = dict(num_sequences=10, draws=2, seed=0, peers=World.single("cpu"))
    a = figures(evaluate_rows(objective, rows, micro_batch_size=10, **common))
    b = figures(evaluate_rows(objective, rows, micro_batch_size=3, **common))
    for key in a:
        assert a[key] == pytest.approx(b[key], rel=1e-5), key


def test_ranks_split_the_rows_and_sum():
    """Two ranks' halves, added up as all_reduce_sum would, are the one-rank figures."""
    objective, rows = build("mdlm"), FixedRows(10)
    whole = figures(
        evaluate_rows(objective, rows, num_sequences=10, draws=2, seed=0, micro_batch_size=3, peers=World.single("cpu"))
    )
    collected: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    class Half:
        size = 2

        def __init__(self, rank):
            self.rank = rank

        def all_reduce_sum(self, tensor):
            collected[self.rank].append(tensor)
            if self.rank == 1:
                tensor += collected[0][len(collected[1]) - 1]
            return tensor

    common = dict(num_sequences=10, draws=2, seed=0, micro_batch_size=3)
    evaluate_rows(objective, rows, peers=Half(0), **common)
    both = figures(evaluate_rows(objective, rows, peers=Half(1), **common))
    for key in whole:
        assert whole[key] == pytest.approx(both[key], rel=1e-6)


def test_the_standard_error_is_that_of_repeated_evaluations():
    """Spread of the estimate over many seeds on fresh rows against the standard error it reports."""
    objective = build("mdlm")
    values, errors = [], []
    for seed in range(60):
        rows = FixedRows(16)
        rows.tokens = np.random.default_rng(seed).integers(0, VOCAB - 1, (16, LENGTH))
        first = evaluate_rows(
            objective, rows, num_sequences=16, draws=1, seed=seed, micro_batch_size=16, peers=World.single("cpu")
        )[0]
        values.append(first.value)
        errors.append(first.standard_error)
    assert np.std(values) == pytest.approx(np.mean(errors), rel=0.35)


def test_ratio_estimator():
    """Rows of unequal length: value is the ratio of sums, its error the delta method's; checked by the bootstrap."""
    generator = np.random.default_rng(1)
    tokens = generator.integers(5, 20, 400).astype(float)
    nats = 2.0 * tokens + generator.normal(size=400) * tokens
    num_bytes = generator.integers(10, 60, 400).astype(float)
    result = estimate(nats, tokens, num_bytes, FIGURE)
    assert result.value == pytest.approx(nats.sum() / tokens.sum())
    assert result.bits_per_byte == pytest.approx(nats.sum() / num_bytes.sum() / math.log(2))
    assert result.perplexity == pytest.approx(math.exp(result.value))
    picks = generator.integers(0, 400, (2000, 400))
    bootstrap = (nats[picks].sum(1) / tokens[picks].sum(1)).std()
    assert result.standard_error == pytest.approx(bootstrap, rel=0.1)
    bits_bootstrap = (nats[picks].sum(1) / num_bytes[picks].sum(1) / math.log(2)).std()
    assert result.bits_per_byte_standard_error == pytest.approx(bits_bootstrap, rel=0.1)
    single = estimate(nats[:1], tokens[:1], num_bytes[:1], FIGURE)
    assert math.isnan(single.standard_error) and single.as_dict()["standard_error"] is None


def test_paired_difference():
    """Two noisy figures that share most of their noise: the difference is known far better than either."""
    generator = np.random.default_rng(2)
    tokens, shared = np.full(300, 10.0), generator.normal(size=300)
    a, b = (estimate(10 * (mean + shared) + generator.normal(size=300), tokens, tokens, FIGURE) for mean in (5.0, 4.5))
    difference, error = paired_difference(a, b)
    assert abs(difference - 0.5) < 4 * error and error < 0.2 * a.standard_error
    assert difference == pytest.approx(a.value - b.value)


def test_scored_rows_are_spread_over_the_split():
    """Neighbouring rows share a document: 5 of 50 rows are 0, 10, 20, 30, 40, and their noise is keyed by the row."""
    objective, rows = build("mdlm"), FixedRows(50)
    seen = []
    read = rows.load
    rows.load = lambda indices: (seen.extend(indices), read(indices))[1]
    common = dict(draws=1, seed=0, micro_batch_size=50, peers=World.single("cpu"))
    some = evaluate_rows(objective, rows, num_sequences=5, **common)[0]
    assert seen == [0, 10, 20, 30, 40]
    everything = evaluate_rows(objective, rows, num_sequences=50, **common)[0]
    assert some.sums == pytest.approx(everything.sums[::10], rel=1e-5)


def test_unigram_entropy_is_the_entropy_of_the_counts(monkeypatch):
    rows = FixedRows(30)
    monkeypatch.setattr("braid.pretrain.evaluation.bound.ROWS_AT_A_TIME", 7)  # the last part is short
    result = unigram_entropy(rows, VOCAB)
    counts = np.bincount(rows.tokens.ravel(), minlength=VOCAB)
    p = counts[counts > 0] / counts.sum()
    assert result.value == pytest.approx(-(p * np.log(p)).sum(), rel=1e-12)
    assert not result.is_bound


def test_what_is_given_does_not_count_in_the_unigram_entropy():
    """Only the targets of pairs: the first tokens of each row, of which there are many, are neither counted nor
    scored."""
    rows = FixedRows(30)
    rows.tokens[:, :5] = 3
    rows.condition = lambda tokens: np.tile(np.arange(LENGTH) < 5, (len(tokens), 1))
    result = unigram_entropy(rows, VOCAB)
    counts = np.bincount(rows.tokens[:, 5:].ravel(), minlength=VOCAB)
    p = counts[counts > 0] / counts.sum()
    assert result.value == pytest.approx(-(p * np.log(p)).sum(), rel=1e-12)
    assert result.tokens.tolist() == [LENGTH - 5] * 30
    assert result.bits_per_byte == pytest.approx(result.value / math.log(2) * (LENGTH - 5) / (2 * LENGTH))


def test_a_figure_that_is_no_likelihood_is_a_plain_mean():
    """Neither perplexity nor bits per byte, and never called a bound."""
    sums, tokens = np.array([1.0, 4.0, 2.0]), np.array([2.0, 4.0, 4.0])
    result = estimate(sums, tokens, np.ones(3), Figure("error", "latent error", False, unit="value"))
    assert result.value == pytest.approx(0.7) and result.standard_error > 0
    told = result.as_dict()
    assert told["unit"] == "value" and told["value"] == pytest.approx(0.7)
    assert [told[name] for name in ("perplexity", "bits_per_byte", "bits_per_byte_standard_error")] == [None] * 3
    with pytest.raises(AssertionError):
        estimate(sums, tokens, np.ones(3), Figure("error", "latent error", True, unit="value"))


def test_evaluation_leaves_the_training_mode_as_it_was():
    objective = build("mdlm")
    objective.train()
    rows = FixedRows(4)
    evaluate_rows(objective, rows, num_sequences=4, draws=1, seed=0, micro_batch_size=4, peers=World.single("cpu"))
    assert objective.training
