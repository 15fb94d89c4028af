"""Figures of a mixture from those of its sources: each counts with its share of the samples that are trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from braid.data_pipeline.packing import Rows
from braid.pretrain.objectives.base import Figure

from .bound import Estimate, estimate


def sequences_of(rows: Rows, share: float, num_sequences: int) -> int:
    """How many of `num_sequences` a source gets: its share of them, two at least, for their deviation, and at most all
    of its rows."""
    return min(max(round(share * num_sequences), min(2, num_sequences)), len(rows))


def mixed_estimates(by_source: Mapping[str, Sequence[Estimate]], shares: Mapping[str, float]) -> list[Estimate]:
    """Each figure on rows drawn from the sources with the probabilities `shares` (those of `by_source` add up to 1).

    Whatever the number of rows a source was scored on, it counts with its share. Standard errors are those of a
    stratified sample. The figures of a single source are returned as they are.
    """
    if len(by_source) == 1:
        [estimates] = by_source.values()
        return list(estimates)
    weights = [shares[name] for name in by_source]
    return [_mixed(estimates, weights) for estimates in zip(*by_source.values(), strict=True)]


def _mixed(estimates: Sequence[Estimate], shares: Sequence[float]) -> Estimate:
    first, sizes = estimates[0], [len(each.sums) for each in estimates]
    num = sum(sizes)

    def weighted(field: str) -> np.ndarray:
        """A mean over these rows is one over the mixture."""
        parts = [
            getattr(each, field) * (share * num / size)
            for each, share, size in zip(estimates, shares, sizes, strict=True)
        ]
        return np.concatenate(parts)

    figure = Figure(first.name, first.label, first.is_bound, first.note, first.unit)
    return estimate(weighted("sums"), weighted("tokens"), weighted("num_bytes"), figure, sizes)


def mixture_of(
    corpora: Mapping[str, Mapping[str, Any]], by_source: Mapping[str, Sequence[Estimate]], shares: Mapping[str, float]
) -> tuple[dict[str, Any], list[Estimate]]:
    """The entry of evaluation.json that stands for all sources together, and its figures; `corpora` are their own. A
    source that gives no samples does not count."""
    counted = [name for name in corpora if shares.get(name)]
    estimates: list[Estimate] = []
    if all(by_source[name] for name in counted):
        estimates = mixed_estimates({name: by_source[name] for name in counted}, shares)
    entries = [corpora[name] for name in counted]
    result = {
        "data": "mixture of " + ", ".join(f"{name} {100 * shares[name]:.4g} %" for name in counted),
        "split": entries[0]["split"],
        **{key: sum(entry[key] for entry in entries) for key in ("num_sequences", "num_tokens", "num_bytes")},
        "bytes_are_exact": all(entry["bytes_are_exact"] for entry in entries),
        "figures": [each.as_dict() for each in estimates],
        "shares": {name: shares[name] for name in counted},
    }
    return result, estimates


def of_sources(by_source: Mapping[str, Sequence[Estimate]]) -> dict[str, Any]:
    """The headline figure of each source, as it stands in metrics.jsonl."""
    return {
        name: {"loss": first.value, "standard_error": first.standard_error, "bits_per_byte": first.bits_per_byte}
        for name, (first, *_) in by_source.items()
    }
