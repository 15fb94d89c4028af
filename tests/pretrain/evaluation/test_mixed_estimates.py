"""Figures of a mixture from those of its sources, against samples that were drawn from the mixture."""

from __future__ import annotations

import numpy as np
import pytest

from braid.pretrain.evaluation.bound import estimate
from braid.pretrain.evaluation.mixture import mixed_estimates, of_sources, sequences_of
from braid.pretrain.objectives.base import Figure

FIGURE = Figure("bound", "token bound", True, "a note")
SHARES = {"web": 0.7, "code": 0.25, "math": 0.05}
MEANS = {"web": 4.0, "code": 2.0, "math": 6.0}  # nats per token
BYTES = {"web": 4.5, "code": 3.0, "math": 2.0}  # per token


def rows_of(name: str, num: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Sums, tokens and bytes of rows of a source; some have half of the tokens."""
    tokens = rng.choice([16.0, 32.0], num)
    return tokens * (MEANS[name] + rng.normal(0, 0.5, num)), tokens, tokens * BYTES[name]


def test_value_and_error_are_those_of_repeated_sampling():
    """The error is the spread over many evaluations of that size, with whatever number of rows for each source."""
    rng, sizes = np.random.default_rng(0), {"web": 20, "code": 40, "math": 9}
    values, errors, bits = [], [], []
    for _ in range(1500):
        parts = {name: [estimate(*rows_of(name, num, rng), FIGURE)] for name, num in sizes.items()}
        (mixed,) = mixed_estimates(parts, SHARES)
        values.append(mixed.value)
        errors.append(mixed.standard_error)
        bits.append(mixed.bits_per_byte)
    mean = sum(SHARES[name] * MEANS[name] for name in SHARES)
    assert np.mean(values) == pytest.approx(mean, abs=0.01)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.08)
    per_byte = mean / np.log(2) / sum(SHARES[name] * BYTES[name] for name in SHARES)
    assert np.mean(bits) == pytest.approx(per_byte, rel=0.01)
    assert (mixed.name, mixed.label, mixed.is_bound, mixed.note) == ("bound", "token bound", True, "a note")


def test_a_single_source_stays_as_it_is():
    parts = {"web": [estimate(*rows_of("web", 8, np.random.default_rng(1)), FIGURE)]}
    assert mixed_estimates(parts, {"web": 1.0, "code": 0.0}) == parts["web"]
    (source,) = of_sources(parts).items()
    assert source[0] == "web" and source[1]["loss"] == parts["web"][0].value


def test_a_source_of_one_row_has_no_error():
    rng = np.random.default_rng(2)
    parts = {name: [estimate(*rows_of(name, num, rng), FIGURE)] for name, num in (("web", 5), ("code", 1))}
    (mixed,) = mixed_estimates(parts, {"web": 0.5, "code": 0.5})
    assert np.isnan(mixed.standard_error) and np.isfinite(mixed.value)
    assert mixed.as_dict()["standard_error"] is None


def test_sequences_are_shared_by_weight_and_two_at_least():
    rows = range(50)
    assert [sequences_of(rows, share, 64) for share in (0.5, 0.25, 0.01, 1.0)] == [32, 16, 2, 50]
    assert sequences_of(rows, 0.01, 1) == 1 and sequences_of(range(1), 0.5, 64) == 1
