"""The numbers of a run and of the runs beside it: what each one is, how sure it is, and whether two may be compared."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from markupsafe import Markup

from .figures import Axis, interval, scale, span
from .formatting import NOTHING, count, error_digits, fixed, known, plus_minus, significant
from .reading import Run
from .tables import Line, Table, short_names

KINDS = {"bound": "upper bound", "exact": "exact", "neither": "not a bound", "value": "no likelihood"}
SENTENCES = {
    "bound": "an upper bound on the model's negative log-likelihood of the text, so the model is at least this good",
    "exact": "the model's exact negative log-likelihood of the text",
    "neither": "not a bound on the likelihood, so not to be compared with numbers that are",
    "value": "a mean over tokens on a scale of its own and says nothing of the likelihood of the text: it has no "
    "perplexity and no bits per byte",
}
UNIGRAM = "the best a model can do that ignores context: what lies below it was learnt from context"
# What two numbers must agree on before they are compared.
SHARED_CONDITIONS = ("tokenizer", "split", "sequence_length", "packing", "num_sequences")


@dataclass(frozen=True)
class Row:
    """One line of the results table."""

    run: str
    label: str
    kind: str
    note: str
    value: float | None
    error: float | None
    bits_per_byte: str
    perplexity: str
    colour: int
    first: bool
    """The run's own headline figure, the first of its evaluation."""
    number: str
    """Value and standard error, to the decimals of the table."""
    track: Markup = Markup("")

    @property
    def kind_label(self) -> str:
        return KINDS[self.kind]

    @property
    def sentence(self) -> str:
        return SENTENCES[self.kind]


@dataclass(frozen=True)
class Results:
    """The results section; `rows`, the figures in nats, and `tables` are empty when nothing was evaluated."""

    rows: list[Row]
    headline: Row | None
    """The first figure of the run itself, in nats or not."""
    tables: list[Table]
    """Figures that are not in nats, and several corpora."""
    scale: Markup
    unigram: dict[str, str] | None
    conditions: list[tuple[str, str]]
    findings: list[str]
    warnings: list[str]
    summary: list[tuple[str, str]]


def kind_of(figure: dict[str, Any]) -> str:
    """`exact`, `bound` or `neither`; `value` for what is not in nats. An exact likelihood is marked as a bound (it is
    one) whose text begins so."""
    if figure.get("unit", "nats") != "nats":
        return "value"
    if not figure.get("is_bound"):
        return "neither"
    texts = (str(figure.get(key) or "") for key in ("note", "label"))
    return "exact" if any(text.lower().startswith("exact") for text in texts) else "bound"


def results_of(run: Run, beside: Sequence[Run], names: Sequence[str]) -> Results:
    """Results of `run` with those of the runs `beside` it; `names` are the names of all of them, `run` first."""
    everyone = (run, *beside)
    digits = _table_digits(everyone)
    every_row = [
        row for number, each in enumerate(everyone) for row in _rows(_figures(each), names[number], number, digits)
    ]
    rows = [row for row in every_row if row.kind != "value"]
    tables = [_values_table(every_row), _corpora_table(everyone, names)]
    unigram_nats, unigram = _unigram(run, digits)
    axis = _axis(rows, unigram_nats)
    if axis is not None:
        rows = [_with_track(row, axis, unigram_nats) for row in rows]
    return Results(
        rows=rows,
        headline=next((row for row in every_row if row.colour == 0 and row.first and known(row.value)), None),
        tables=[table for table in tables if table.lines],
        scale=scale(axis) if axis is not None else Markup(""),
        unigram=unigram,
        conditions=conditions_of(run),
        findings=[text for number, each in enumerate(beside, 1) for text in _finding(rows, run, each, number)],
        warnings=[text for number, each in enumerate(beside, 1) for text in _mismatches(run, each, names[number])],
        summary=list(_flat(run.summary or {})),
    )


def _figures(run: Run) -> list[dict[str, Any]]:
    return (run.evaluation or {}).get("figures") or []


def _table_digits(runs: Sequence[Run]) -> int:
    """Decimals of the whole table: two significant digits of the largest standard error among the headline figures."""
    headlines = [figures[0] for figures in map(_figures, runs) if figures and kind_of(figures[0]) != "value"]
    errors = [figure.get("standard_error") for figure in headlines]
    return min((error_digits(error) for error in errors if known(error) and error > 0), default=3)


def _rows(figures: Sequence[dict[str, Any]], name: str, number: int, digits: int) -> Iterator[Row]:
    for index, figure in enumerate(figures):
        value, error = (figure[key] if known(figure.get(key)) else None for key in ("value", "standard_error"))
        kind = kind_of(figure)
        own_digits = max(digits, error_digits(error, digits + 1) - 1)  # at least one digit of the row's own error
        if kind == "value":
            own_digits = error_digits(error)
        yield Row(
            run=name,
            label=str(figure.get("label") or figure.get("name")),
            kind=kind,
            note=re.sub(r"^exact[:;,]?\s*", "", str(figure.get("note") or "")),  # the kind says it already
            value=value,
            error=error,
            number=plus_minus(value, error, own_digits),
            bits_per_byte=plus_minus(
                figure.get("bits_per_byte"), figure.get("bits_per_byte_standard_error"), own_digits
            ),
            perplexity=significant(figure.get("perplexity"), 4),
            colour=number,
            first=index == 0,
        )


def _values_table(rows: Sequence[Row]) -> Table:
    """Figures that are no nats, apart from those that are."""
    lines = [
        Line(row.run, row.colour, row.label, [row.number], row.kind_label, row.note)
        for row in rows
        if row.kind == "value"
    ]
    note = "Each is a mean over tokens, on a scale of its own: no perplexity, no bits per byte, no bound."
    return Table("Figures without a likelihood", "Figure", ["Mean per token"], lines, "What it is", note)


def _corpora_table(runs: Sequence[Run], names: Sequence[str]) -> Table:
    """The headline figure of each run on each of its corpora, where there are several."""
    lines = []
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        corpora = (run.evaluation or {}).get("corpora") or []
        if len(corpora) < 2:
            continue
        for corpus, label in zip(corpora, short_names([str(each.get("data")) for each in corpora]), strict=True):
            figures = corpus.get("figures") or []
            row = next(_rows(figures[:1], name, number, 3), None)
            unigram = (corpus.get("unigram_entropy") or {}).get("value")
            numbers = [NOTHING] * 3 if row is None else [row.number, row.bits_per_byte, row.perplexity]
            cells = [*numbers, fixed(unigram, 3), count(corpus.get("num_tokens"))]
            kind, note = ("", "not scored") if row is None else (row.kind_label, row.label)
            if row is not None and row.kind != "value" and not corpus.get("bytes_are_exact"):
                note += "; bytes by the split's mean"
            lines.append(Line(name, number, f"{label}, {corpus.get('split')}", cells, kind, note))
    columns = ["Per token", "Bits per byte", "Perplexity", "Unigram entropy", "Tokens scored"]
    note = "The headline figure; on a corpus that the run was not trained on it is zero-shot."
    return Table("Several corpora", "Corpus", columns, lines, "What it is", note)


def _unigram(run: Run, digits: int) -> tuple[float | None, dict[str, str] | None]:
    entry = (run.evaluation or {}).get("unigram_entropy")
    if not isinstance(entry, dict) or not known(entry.get("value")):
        return None, None
    text = {
        "number": plus_minus(entry["value"], entry.get("standard_error"), digits),
        "bits_per_byte": plus_minus(entry.get("bits_per_byte"), entry.get("bits_per_byte_standard_error"), digits),
        "perplexity": significant(entry.get("perplexity", math.exp(min(entry["value"], 700.0))), 4),
        "sentence": "; ".join(text for text in (str(entry.get("note") or ""), UNIGRAM) if text),
    }
    return entry["value"], text


def _axis(rows: Sequence[Row], unigram: float | None) -> Axis | None:
    """One axis for all tracks, chosen by each run's first figure and the unigram entropy: a figure of another nature
    (a joint bound that also pays for latents) may lie beyond it and is drawn as an arrow."""
    ends = [row.value + side * (row.error or 0) for row in rows if row.first and known(row.value) for side in (-1, 1)]
    if not ends:
        return None
    return span([np.array(ends), np.array([] if unigram is None else [unigram])], pad=0.12)


def _with_track(row: Row, axis: Axis, unigram: float | None) -> Row:
    if row.value is None:
        return row
    track = interval(axis, row.value, row.error, colour=row.colour, kind=row.kind, reference=unigram)
    return replace(row, track=track)


def conditions_of(run: Run) -> list[tuple[str, str]]:
    """What was scored and how: nothing is comparable without it. Empty when nothing was evaluated."""
    found = run.evaluation
    if found is None:
        return []
    exact = found.get("bytes_are_exact")
    how = "" if exact is None else " (exact)" if exact else " (from the split's mean bytes per token)"
    entries = [
        ("Tokenizer", _tokenizer(found.get("tokenizer"))),
        ("Split", found.get("split")),
        ("Sequence length", found.get("sequence_length")),
        ("Packing", found.get("packing")),
        ("Draws per sequence", found.get("draws")),
        ("Precision", found.get("dtype")),
        ("Weights", found.get("weights")),
        ("Checkpoint", f"step {found['checkpoint_step']:,}" if known(found.get("checkpoint_step")) else None),
        ("Sequences scored", count(found.get("num_sequences"))),
        ("Tokens scored", count(found.get("num_tokens"))),
        ("Original bytes", count(found.get("num_bytes")) + how),
    ]
    return [(label, NOTHING if value is None else str(value)) for label, value in entries]


def _tokenizer(tokenizer: Any) -> str | None:
    if not isinstance(tokenizer, dict):
        return None if tokenizer is None else str(tokenizer)
    parts = [str(tokenizer.get("name") or tokenizer.get("kind") or "")]
    if known(tokenizer.get("vocab_size")):
        parts.append(f"{tokenizer['vocab_size']:,} entries")
    if tokenizer.get("hash"):
        parts.append(f"hash {str(tokenizer['hash'])[:8]}")
    return ", ".join(part for part in parts if part)


def _condition(run: Run, key: str) -> Any:
    value = (run.evaluation or {}).get(key)
    return value.get("hash") or value if key == "tokenizer" and isinstance(value, dict) else value


def _mismatches(run: Run, other: Run, name: str) -> Iterator[str]:
    if run.evaluation is None or other.evaluation is None:
        return
    for key in SHARED_CONDITIONS:
        ours, theirs = _condition(run, key), _condition(other, key)
        if ours != theirs:
            what = key.replace("num_", "number of ").replace("_", " ")
            yield f"{name} was scored with another {what} ({theirs}, here {ours}): the numbers are not comparable."


def _finding(rows: Sequence[Row], run: Run, other: Run, number: int) -> Iterator[str]:
    """One sentence on two headline figures, if both exist and were measured under the same conditions."""
    ours = next((row for row in rows if row.colour == 0 and row.first), None)
    theirs = next((row for row in rows if row.colour == number and row.first), None)
    if ours is None or theirs is None or "neither" in (ours.kind, theirs.kind):
        return
    if not all(known(value) for value in (ours.value, ours.error, theirs.value, theirs.error)):
        return
    if any(_condition(run, key) != _condition(other, key) for key in SHARED_CONDITIONS):
        return
    difference, error = ours.value - theirs.value, math.hypot(ours.error, theirs.error)
    size = plus_minus(abs(difference), error)
    if abs(difference) <= 2 * error:
        text = f"Against {theirs.run} no difference can be told: {size} nats per token, within two standard errors."
    else:
        side = "lower (better)" if difference < 0 else "higher (worse)"
        text = f"{ours.run} scores {size} nats per token {side} than {theirs.run}."
    if ours.kind != theirs.kind:
        exact, bound = (ours, theirs) if ours.kind == "exact" else (theirs, ours)
        text += f" The number of {exact.run} is exact, that of {bound.run} a bound: part of the gap may be its slack."
    yield text


def _flat(value: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, entry in value.items():
        name = prefix + str(key).replace("_", " ")
        if isinstance(entry, dict):
            yield from _flat(entry, name + " · ")
        elif known(entry):
            yield name, f"{entry:,}" if isinstance(entry, int) else significant(entry, 5)
        elif isinstance(entry, bool):
            yield name, "yes" if entry else "no"
        elif entry is not None and not isinstance(entry, list):
            yield name, str(entry)
