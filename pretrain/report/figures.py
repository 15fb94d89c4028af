"""Line charts and one-line interval plots as small inline SVG: no library, no ids, colours from the page's CSS.

Colours are classes (`c0` is this run, `c1`, `c2`, ... the runs beside it), so a chart follows light and dark mode.
Widths and heights are SVG user units; the page scales a chart to its column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from .formatting import MINUS, fixed, significant

NUM_COLOURS = 5
POINTS = 320  # points a curve is thinned to; more cannot be told apart at this size


@dataclass(frozen=True)
class Series:
    """One curve: `x` and `y` of the same length; a NaN in `y` is a gap."""

    label: str
    x: np.ndarray
    y: np.ndarray
    colour: int = 0
    opacity: float = 1.0
    faint: bool = False
    """Drawn thin and pale, behind the others and without an entry in the legend: raw values behind smoothed ones."""
    dots: bool = False
    """Mark every point, with its value shown when the pointer rests on it."""


@dataclass(frozen=True)
class Reference:
    """A horizontal dashed line at `y`, named."""

    label: str
    y: float


@dataclass(frozen=True)
class Axis:
    """A range of values mapped onto [0, 1]."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        assert self.low < self.high and (self.low > 0 or not self.log), self

    def place(self, value: float | np.ndarray) -> float | np.ndarray:
        if self.log:
            value = np.log10(np.maximum(value, 1e-300))
            return (value - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (value - self.low) / (self.high - self.low)

    def ticks(self, about: int) -> list[tuple[float, str]]:
        """Round values inside the range with their labels: about so many, or decades for a logarithmic axis."""
        return _log_ticks(self.low, self.high, about) if self.log else _linear_ticks(self.low, self.high, about)


def _linear_ticks(low: float, high: float, about: int) -> list[tuple[float, str]]:
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(nice for nice in (1, 2, 5, 10) if raw <= 1.0001 * nice * power)
    values = [index * step for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    scale, unit = next(((s, u) for s, u in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")) if step * 2 >= s), (1, ""))
    if max(map(abs, values), default=0) < 1e-3:
        return [(value, significant(value, 1)) for value in values]
    digits = max(0, -math.floor(math.log10(step / scale) + 1e-9))
    return [(value, fixed(value / scale, digits) + (unit if value else "")) for value in values]


def _log_ticks(low: float, high: float, about: int) -> list[tuple[float, str]]:
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    multiples = (1,) if last - first >= 2 else (1, 2, 5)
    every = max(1, (last - first + 1) // (about + 1) + 1) if len(multiples) == 1 else 1
    values = [m * 10.0**p for p in range(first - 1, last + 1, every) for m in multiples]
    return [(value, _plain(value)) for value in values if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]


def _plain(value: float) -> str:
    if 1e-3 <= value < 1e4:
        return f"{value:g}"
    mantissa, power = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(power)}".replace("-", MINUS)


def span(values: Sequence[np.ndarray], *, log: bool = False, pad: float = 0.06, zero: bool = False) -> Axis:
    """The range of all finite `values` with a margin of `pad` of it; from 0 up where `zero` asks for it."""
    finite = np.concatenate([np.asarray(v, float)[np.isfinite(v)] for v in values] or [np.zeros(0)])
    if log:
        finite = finite[finite > 0]
    if not finite.size:
        return Axis(0.1, 1.0, log)
    low, high = float(finite.min()), float(finite.max())
    if log:
        margin = max((high / low) ** pad, 1.1)
        return Axis(low / margin, high * margin, True)
    if zero:
        low = min(low, 0.0)
    margin = pad * (high - low) if high > low else 0.05 * abs(high) or 0.5
    return Axis(low if zero and low == 0 else low - margin, high + margin)


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """Running mean over `width` lines, NaN where a window has no finite value. Shape [n] -> [n].

    Windows are centred, narrower at the beginning (where a loss is steep) and one-sided at the end (where it is flat).
    """
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    reach = np.minimum(index, width // 2)
    start, stop = index - reach, np.minimum(index + reach + 1, len(values))
    total = counts[stop] - counts[start]
    return np.where(total > 0, (sums[stop] - sums[start]) / np.maximum(total, 1), np.nan)


def thinned(x: np.ndarray, y: np.ndarray, limit: int = POINTS, *, peaks: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """At most `limit` points: means, or with `peaks` the highest, of equal groups of neighbours (NaN left out)."""
    if len(y) <= limit:
        return x, y
    edges = np.linspace(0, len(y), limit + 1).astype(int)
    middles = np.add.reduceat(x, edges[:-1]) / np.diff(edges)
    if peaks:
        return middles, np.fmax.reduceat(y, edges[:-1])
    finite = np.isfinite(y)
    counts = np.add.reduceat(finite, edges[:-1], dtype=int)
    means = np.add.reduceat(np.where(finite, y, 0.0), edges[:-1]) / np.maximum(counts, 1)
    return middles, np.where(counts > 0, means, np.nan)


def line_chart(
    series: Sequence[Series],
    *,
    name: str,
    x_label: str,
    y_label: str = "",
    x_axis: Axis | None = None,
    y_axis: Axis | None = None,
    references: Sequence[Reference] = (),
    width: int = 480,
    height: int = 270,
) -> Markup:
    """A chart of one or more curves. `name` is what a screen reader says. What lies outside `y_axis` is cut off."""
    x_axis = x_axis or span([s.x for s in series], pad=0)
    y_axis = y_axis or span([s.y for s in series] + [np.array([r.y]) for r in references])
    y_ticks = y_axis.ticks(max(4, height // 50))
    left, right, top, bottom = 12 + 7 * max((len(text) for _, text in y_ticks), default=1), 10, 22, 38
    plot_width, plot_height = width - left - right, height - top - bottom
    kind = "chart wide" if width > 400 else "chart"
    head = '<svg class="{}" viewBox="0 0 {} {}" role="img" aria-label="{}">'
    parts = [Markup(head).format(kind, width, height, name)]
    parts.append(Markup('<text class="unit" x="0" y="11">{}</text>').format(y_label))
    for value, text in y_ticks:
        y = top + plot_height * (1 - y_axis.place(value))
        parts.append(Markup('<path class="grid" d="M{} {:.1f}h{}"/>').format(left, y, plot_width))
        parts.append(Markup('<text class="tick end" x="{}" y="{:.1f}">{}</text>').format(left - 8, y + 4, text))
    for value, text in x_axis.ticks(max(3, width // 90)):
        x = left + plot_width * x_axis.place(value)
        parts.append(Markup('<path class="grid" d="M{:.1f} {}v4"/>').format(x, top + plot_height))
        parts.append(Markup('<text class="tick mid" x="{:.1f}" y="{}">{}</text>').format(x, height - 20, text))
    parts.append(
        Markup('<text class="unit end" x="{}" y="{}">{}</text>').format(left + plot_width, height - 4, x_label)
    )
    # A nested svg cuts off what lies outside it; 5 units of margin keep marks on the frame whole.
    parts.append(
        Markup('<svg x="{}" y="{}" width="{}" height="{}" viewBox="-5 -5 {} {}">').format(
            left - 5, top - 5, plot_width + 10, plot_height + 10, plot_width + 10, plot_height + 10
        )
    )
    for reference in references:
        y = plot_height * (1 - y_axis.place(reference.y))
        parts.append(Markup('<path class="reference" d="M0 {:.1f}H{}"/>').format(y, plot_width))
        parts.append(
            Markup('<text class="tick end" x="{}" y="{:.1f}">{}</text>').format(plot_width, y - 5, reference.label)
        )
    for s in sorted(series, key=lambda s: not s.faint):
        parts.append(_curve(s, x_axis, y_axis, plot_width, plot_height))
    parts.append(Markup("</svg></svg>"))
    return Markup("").join(parts)


def _curve(series: Series, x_axis: Axis, y_axis: Axis, width: int, height: int) -> Markup:
    keep = ~np.isnan(series.x)
    if x_axis.log:
        keep &= series.x > 0
    data_x, data_y = thinned(series.x[keep], series.y[keep])
    if y_axis.log:
        data_y = np.where(data_y > 0, data_y, np.nan)
    xs = width * x_axis.place(data_x)
    # A point far outside the frame only needs to leave it; the clamp keeps the text short and the numbers finite.
    ys = np.clip(height * (1 - y_axis.place(data_y)), -20 * height, 20 * height)
    commands, pen_down = [], False
    for x, y in zip(xs, ys, strict=True):
        if math.isfinite(y):
            commands.append(f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}")
        pen_down = math.isfinite(y)
    kind = f"line c{series.colour % NUM_COLOURS}" + (" faint" if series.faint else "")
    opacity = "" if series.opacity == 1 else Markup(' opacity="{:.2f}"').format(series.opacity)
    path = Markup('<path class="{}"{} d="{}"/>').format(kind, opacity, "".join(commands))
    if not series.dots:
        return path
    title = Markup('<circle class="dot c{}"{} cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}: {}</title></circle>')
    radius = 3 if len(data_y) <= 40 else 1.8
    return path + Markup("").join(
        title.format(series.colour % NUM_COLOURS, opacity, x, y, radius, series.label, significant(float(value), 4))
        for x, y, value in zip(xs, ys, data_y, strict=True)
        if math.isfinite(y)
    )


def legend(series: Sequence[Series]) -> Markup:
    """Names of the curves with a piece of their line, as a row of the page (each name once; nothing for one curve)."""
    named = {s.label: s for s in series if not s.faint}
    if len(named) < 2:
        return Markup("")
    entry = '<li><svg viewBox="0 0 22 8" aria-hidden="true"><path class="line c{}"{} d="M1 4H21"/></svg>{}</li>'
    items = [
        Markup(entry).format(
            s.colour % NUM_COLOURS, "" if s.opacity == 1 else Markup(' opacity="{:.2f}"').format(s.opacity), s.label
        )
        for s in named.values()
    ]
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))


def interval(
    axis: Axis, value: float, error: float | None, *, colour: int, kind: str, reference: float | None = None
) -> Markup:
    """One value and its standard error on a track, as wide as its cell; `reference` is a dashed mark across it.

    A filled mark is a bound, a diamond exact, a ring neither. A value beyond the axis is an arrow at its end.
    """
    parts = [Markup('<svg class="interval" role="img" aria-label="{}">').format(significant(value, 4))]
    parts.append(Markup('<path class="track" d="M0 14h2000"/>'))
    if reference is not None:
        at = 100 * axis.place(reference)
        parts.append(Markup('<line class="reference" x1="{0:.2f}%" x2="{0:.2f}%" y1="0" y2="28"/>').format(at))
    at = 100 * axis.place(value)
    if not 0 <= at <= 100:
        edge, arrow = ("100%", "M-11 -5L-3 0L-11 5") if at > 100 else ("0%", "M11 -5L3 0L11 5")
        parts.append(
            Markup('<svg x="{}" y="14" overflow="visible"><path class="line c{}" d="{}"/></svg>').format(
                edge, colour % NUM_COLOURS, arrow
            )
        )
    else:
        if error:
            low, high = (100 * axis.place(value + side * error) for side in (-1, 1))
            parts.append(
                Markup('<line class="line c{}" x1="{:.2f}%" x2="{:.2f}%" y1="14" y2="14"/>').format(
                    colour % NUM_COLOURS, low, high
                )
            )
        shape = {
            "bound": '<circle class="dot c{}" r="5"/>',
            "exact": '<path class="dot c{}" d="M0 -6.5L6.5 0L0 6.5L-6.5 0Z"/>',
        }.get(kind, '<circle class="ring c{}" r="4.5"/>')
        mark = Markup(shape).format(colour % NUM_COLOURS)
        parts.append(Markup('<svg x="{:.2f}%" y="14" overflow="visible">{}</svg>').format(at, mark))
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def scale(axis: Axis, about: int = 4) -> Markup:
    """The ticks of `interval`'s axis, as wide as its cell."""
    ticks = Markup("").join(
        Markup('<text class="tick mid" x="{:.2f}%" y="12">{}</text>').format(100 * axis.place(value), escape(text))
        for value, text in axis.ticks(about)
    )
    return Markup('<svg class="scale" aria-hidden="true">{}</svg>').format(ticks)
