"""What a run was trained on: tokens, repeated ones and epochs of each source, and the curves of the sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .curves import NARROW, Chart
from .figures import Series, legend, line_chart, span
from .formatting import NOTHING, count, fixed, plus_minus
from .reading import Run
from .tables import Line, Table

COLUMNS = ["Weight", "Tokens seen", "Unique", "Repeated", "Epochs", "Rows left out", "Validation"]
COUNTS = ("tokens_seen", "unique_tokens", "repeated_tokens")
NOTE = (
    "At the end of the log. Unique tokens came in the first epoch of their source, repeated ones in later epochs; "
    "rows left out lay in damaged shards. A source counts in the validation loss of the mixture with its weight."
)


@dataclass(frozen=True)
class Data:
    """A table, where the log says what it was trained on, and charts of the sources of a mixture."""

    tables: list[Table]
    charts: list[Chart]


def data_of(run: Run, beside: Sequence[Run], names: Sequence[str]) -> Data:
    """Of `run` with the table's lines of those `beside` it; `names` are the names of all of them, `run` first."""
    numbered = enumerate(zip((run, *beside), names, strict=True))
    lines = [line for number, (each, name) in numbered for line in _lines(each, name, number)]
    tables = [Table("Training data", "Source", COLUMNS, lines, note=NOTE)] if lines else []
    return Data(tables, _charts(run))


def _lines(run: Run, name: str, number: int) -> list[Line]:
    """One for each source, and one for all of them."""
    if not run.train.has("unique_tokens"):
        return []
    sources = [Line(name, number, source, _cells(run, f"sources.{source}.")) for source in run.train.sources]
    return [*sources, Line(name, number, "all of them" if sources else "", _cells(run, ""))]


def _cells(run: Run, prefix: str) -> list[str]:
    last = {what: run.train.last(prefix + what) for what in ("weight", *COUNTS, "epoch", "left_out")}
    counts = [count(last[what]) for what in COUNTS]
    return [fixed(last["weight"], 4), *counts, fixed(last["epoch"], 3), count(last["left_out"]), _loss(run, prefix)]


def _loss(run: Run, prefix: str) -> str:
    """The last validation loss with the error of the same line."""
    losses, errors = run.validation[f"{prefix}loss"], run.validation[f"{prefix}standard_error"]
    found = np.flatnonzero(np.isfinite(losses))
    if not found.size:
        return NOTHING
    return plus_minus(float(losses[found[-1]]), float(errors[found[-1]]))


def _charts(run: Run) -> list[Chart]:
    """Validation loss by source; the weights too, where they changed."""
    charts = []
    for title, columns, what, unit, zero in (
        ("Validation by source", run.validation, "loss", "per token", False),
        ("Weights of the sources", run.train, "weight", "share of the samples", True),
    ):
        curves = [
            Series(source, columns["tokens_seen"], columns[f"sources.{source}.{what}"], number, dots=what == "loss")
            for number, source in enumerate(run.train.sources)
            if columns.has(f"sources.{source}.{what}")
        ]
        if not curves or (what == "weight" and all(np.nanmin(curve.y) == np.nanmax(curve.y) for curve in curves)):
            continue
        axes = {"x_axis": span([columns["tokens_seen"], np.zeros(1)], pad=0)}
        axes["y_axis"] = span([curve.y for curve in curves], zero=zero)
        svg = line_chart(curves, name=title, x_label="tokens seen", y_label=unit, **axes, **NARROW)
        charts.append(Chart(title, svg, legend(curves)))
    return charts
