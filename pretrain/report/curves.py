"""The curves of a run as charts: loss, loss over diffusion time, noise schedule, speed. What is missing is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from .figures import POINTS, Axis, Reference, Series, legend, line_chart, smoothed, span, thinned
from .formatting import known, significant
from .reading import NUM_TIME_BUCKETS, Columns, Run

MAX_TERMS = 6
NUM_TIME_CURVES = 5
NARROW, SMALL = {"width": 340, "height": 230}, {"width": 260, "height": 170}  # charts three and four to a row


@dataclass(frozen=True)
class Chart:
    title: str
    svg: Markup
    legend: Markup = Markup("")
    caption: str = ""


def _smooth(values: np.ndarray) -> np.ndarray:
    """Means over a fortieth of the run."""
    return smoothed(values, _window(len(values)))


def _window(num_lines: int) -> int:
    return max(1, num_lines // 40)


def _x(columns: Columns) -> np.ndarray:
    return columns["tokens_seen"]


def training_charts(runs: Sequence[Run], names: Sequence[str]) -> list[Chart]:
    """Training loss and validation of all runs, the first of which the report is about."""
    run, x_axis = runs[0], _tokens_axis(runs)
    train = [
        Series(name, _x(each.train), _smooth(each.train["loss"]), number)
        for number, (each, name) in enumerate(zip(runs, names, strict=True))
        if each.train.has("loss")
    ]
    validation = [
        Series(name, _x(each.validation), each.validation["loss"], number, dots=True)
        for number, (each, name) in enumerate(zip(runs, names, strict=True))
        if each.validation.has("loss")
    ]
    charts = []
    if train:
        raw = [Series("raw", _x(run.train), run.train["loss"], faint=True)] if run.train.has("loss") else []
        caption = "Smoothed over a fortieth of the run."
        charts.append(_loss_chart("Training loss", train, x_axis, "loss per token", caption, raw=raw))
    if validation:
        caption = "The headline figure, on a part of the validation text; one draw."
        unigram = ((run.evaluation or {}).get("unigram_entropy") or {}).get("value")
        references = [Reference("unigram entropy", unigram)] if known(unigram) else []
        charts.append(_loss_chart("Validation", validation, x_axis, "nats per token", caption, references=references))
    return charts


def term_charts(run: Run) -> list[Chart]:
    """Terms of the training loss where it has several; validation figures beside the headline one."""
    x_axis = _tokens_axis([run])
    charts = []
    for name in run.train.terms[:MAX_TERMS] if len(run.train.terms) > 1 else []:
        if run.train.has(f"terms.{name}"):
            curve = Series(name, _x(run.train), _smooth(run.train[f"terms.{name}"]))
            charts.append(_loss_chart(f"Training term: {_words(name)}", [curve], x_axis, "loss per token", **NARROW))
    for name in run.validation.terms[1 : 1 + MAX_TERMS]:
        if run.validation.has(f"terms.{name}"):
            curve = Series(name, _x(run.validation), run.validation[f"terms.{name}"], dots=True)
            charts.append(_loss_chart(f"Validation: {_words(name)}", [curve], x_axis, "nats per token", **NARROW))
    return charts


def _words(name: str) -> str:
    return name.replace("_", " ")


def _tokens_axis(runs: Sequence[Run]) -> Axis:
    everything = [_x(columns) for run in runs for columns in (run.train, run.validation)]
    return span([*everything, np.zeros(1)], pad=0)


def _loss_chart(
    title: str,
    curves: list[Series],
    x_axis: Axis,
    unit: str,
    caption: str = "",
    *,
    raw: Sequence[Series] = (),
    references: Sequence[Reference] = (),
    **size: int,
) -> Chart:
    """Loss over tokens seen; the steep beginning may be cut off so that the rest can be read."""
    y_axis = _loss_axis(curves, raw)
    highest = max(float(np.nanmax(curve.y)) for curve in curves)
    if highest > y_axis.high:
        caption += f" The first values, up to {significant(highest)}, are above the frame."
    inside = [reference for reference in references if y_axis.low < reference.y < y_axis.high]
    axes = {"x_label": "tokens seen", "y_label": unit, "x_axis": x_axis, "y_axis": y_axis}
    svg = line_chart([*raw, *curves], name=title, references=inside, **axes, **size)
    return Chart(title, svg, legend(curves), caption.strip())


def _loss_axis(curves: Sequence[Series], raw: Sequence[Series] = ()) -> Axis:
    """All of the curves, and most of the raw values; where the first 4 % of a curve would take up half of the frame,
    they are left to run out of it."""
    low = min(float(np.nanmin(curve.y)) for curve in curves)
    high, top = (max(float(np.nanquantile(curve.y, share)) for curve in curves) for share in (0.96, 1.0))
    if top - low < 2 * (high - low):
        high = top
    for curve in raw:
        low = min(low, float(np.nanquantile(curve.y, 0.01)))
        high = max(high, float(np.nanquantile(curve.y, 0.97)))
    return span([np.array([low, high])])


def time_chart(run: Run) -> Chart | None:
    """Loss over diffusion time at a few steps, from validation where it has buckets, else from training averages."""
    for columns, split in ((run.validation, "validation"), (run.train, "training")):
        by_time = columns.by_time
        lines = np.flatnonzero(np.isfinite(by_time).any(axis=1))
        if not lines.size:
            continue
        share = np.linspace(0, 1, min(NUM_TIME_CURVES, lines.size)) ** 1.5  # more of the beginning, where most happens
        chosen = [lines[index] for index in dict.fromkeys(np.round(share * (lines.size - 1)).astype(int))]
        middles = (np.arange(NUM_TIME_BUCKETS) + 0.5) / NUM_TIME_BUCKETS
        curves = [
            Series(
                f"step {columns['step'][line]:,.0f}",
                middles,
                _around(by_time, line) if split == "training" else by_time[line],
                opacity=0.25 + 0.75 * (number + 1) / len(chosen),
                dots=number == len(chosen) - 1,
            )
            for number, line in enumerate(chosen)
        ]
        title = "Loss by diffusion time"
        svg = line_chart(
            curves,
            name=title,
            x_label="t (0 clean, 1 noise)",
            y_label="loss per token",
            x_axis=Axis(0.0, 1.0),
            y_axis=span([curve.y for curve in curves], zero=True),
            **NARROW,
        )
        return Chart(title, svg, legend(curves), f"Ten buckets of t, {split} data; stronger is later in training.")
    return None


def _around(by_time: np.ndarray, line: int) -> np.ndarray:
    """Means by bucket over the lines around one, a fortieth of all; NaN where there are none. [lines, 10] -> [10]."""
    reach = _window(len(by_time)) // 2
    near = by_time[max(0, line - reach) : line + reach + 1]
    finite = np.isfinite(near)
    return np.where(finite.any(0), np.where(finite, near, 0).sum(0) / np.maximum(finite.sum(0), 1), np.nan)


def schedule_charts(schedule: dict[str, Any] | None) -> list[Chart]:
    """Coefficients in one chart, loss weights in another."""
    if not schedule or not schedule.get("series"):
        return []
    times = np.array(schedule["times"], dtype=float)
    groups: dict[bool, list[tuple[str, np.ndarray]]] = {False: [], True: []}
    for name, values in schedule["series"].items():
        groups["weight" in name].append((name, np.array(values, dtype=float)))
    charts = []
    for is_weight, members in groups.items():
        if not members:
            continue
        curves = [Series(name, times, values, number) for number, (name, values) in enumerate(members)]
        title = "Loss weights" if is_weight else "Noise schedule"
        everything = np.concatenate([curve.y for curve in curves])
        positive = everything[np.isfinite(everything) & (everything > 0)]
        log = is_weight and bool(positive.size) and positive.max() > 30 * np.median(positive)
        svg = line_chart(
            curves,
            name=title,
            x_label="t (0 clean, 1 noise)",
            x_axis=Axis(0.0, 1.0),
            y_axis=span([everything], log=log, zero=not log),
            **NARROW,
        )
        caption = "Weight of each term at time t." if is_weight else "What is left of the signal at time t."
        charts.append(Chart(title, svg, legend(curves), caption + (" Logarithmic scale." if log else "")))
    return charts


def speed_charts(run: Run) -> list[Chart]:
    """Small charts of the machine and the optimizer, one for each value that was recorded."""
    train = run.train
    wanted = [
        ("Throughput", "tokens_per_second", "tokens per second", 1.0, True),
        ("Waiting for data", "data_wait", "% of step time", 100.0, True),
        ("Model FLOPs utilisation", "mfu", "%", 100.0, True),
        ("Gradient norm", "grad_norm", "before clipping", 1.0, False),
        ("Learning rate", "lr", "", 1.0, True),
    ]
    charts = []
    for title, name, unit, factor, from_zero in wanted:
        if not train.has(name):
            continue
        values = factor * train[name]
        finite = values[np.isfinite(values)]
        log = name == "grad_norm" and finite.min() > 0 and finite.max() > 10 * np.median(finite)
        curves = [Series(title, _x(train), values)]
        caption = ""
        if name == "grad_norm" and len(train) > POINTS:  # a mean would hide the spikes one looks for here
            curves.append(Series("highest", *thinned(_x(train), values, peaks=True), faint=True))
            caption = f"Means over {len(train) / POINTS:.0f} lines; pale: the highest."
        clip = run.setting("optimizer", "clip_norm") if name == "grad_norm" else None
        clipped = [Reference("clipped to", float(clip))] if known(clip) and clip > 0 else []
        axes = {"x_axis": span([_x(train), np.zeros(1)], pad=0), "y_axis": span([values], log=log, zero=from_zero)}
        svg = line_chart(curves, name=title, x_label="tokens seen", y_label=unit, references=clipped, **axes, **SMALL)
        charts.append(Chart(title, svg, caption=caption))
    return charts
