"""One denoising trajectory, made small enough for a page: what changes from frame to frame, and a few whole frames."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from braid.kernels.errors import InputError

from .figures import Axis, Series, line_chart, span
from .formatting import known, printable, significant

MAX_POSITIONS = 2048
MAX_FRAMES = 257
MAX_CHANGES = 30_000
SPECIAL = "\u00b7"  # stands for a token without text (beginning, end)
STILLS = (0.25, 0.5, 0.75, 1.0)  # shown where there is no JavaScript


@dataclass(frozen=True)
class Still:
    caption: str
    text: Markup


@dataclass(frozen=True)
class Trajectory:
    """What the page needs of a trajectory."""

    data: Markup
    """JSON for the viewer: {"blanks": [placeholder per position], "frames": [{caption, set: [[position, piece]]}]}."""
    num_frames: int
    start: int
    """The frame shown first."""
    stills: list[Still]
    has_special: bool
    """Whether a token without text is shown, as a raised dot."""
    cut: str
    """What was left out for size, empty when nothing was."""
    charts: list[tuple[str, Markup]]


def trajectory_of(recorded: dict[str, Any] | None) -> Trajectory | None:
    """The view of a trajectory.json; None where there is none. InputError when its frames do not fit together."""
    if not recorded or not recorded.get("frames"):
        return None
    frames = recorded["frames"]
    lengths = {len(frame["pieces"]) for frame in frames}
    if len(lengths) != 1:
        raise InputError("The frames of trajectory.json differ in length", found=f"{sorted(lengths)} positions")
    num_positions = min(lengths.pop(), MAX_POSITIONS)
    kept = _kept(frames, num_positions)
    shown = [_pieces(frames[index], num_positions) for index in kept]
    mask = str(recorded.get("decoded_mask") or "_")
    blanks = [_blank(piece, mask) for piece in shown[-1]]
    captions = [_caption(frames[index], index, len(frames)) for index in kept]
    data = {
        "blanks": blanks,
        "frames": [
            {"caption": caption, "set": _changes(before, pieces)}
            for caption, before, pieces in zip(captions, [None, *shown], shown, strict=False)
        ],
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":  # nothing in it may end the script element
        text = text.replace(character, f"\\u{ord(character):04x}")
    stills = [round(share * (len(shown) - 1)) for share in STILLS]
    return Trajectory(
        data=Markup(text),
        num_frames=len(shown),
        start=(len(shown) - 1) // 2,
        stills=[Still(captions[i], _still(shown[i], shown[max(0, i - 1)], blanks)) for i in dict.fromkeys(stills)],
        has_special=any(piece == "" for frame in frames for piece in frame["pieces"]),
        cut=_cut(len(frames), len(kept), len(frames[0]["pieces"]), num_positions),
        charts=_charts(frames),
    )


def _pieces(frame: dict[str, Any], num_positions: int) -> list[str | None]:
    pieces = frame["pieces"][:num_positions]
    return [None if piece is None else printable(piece) or SPECIAL for piece in pieces]


def _changes(before: Sequence[str | None] | None, pieces: Sequence[str | None]) -> list[tuple[int, str | None]]:
    before = before or [None] * len(pieces)
    return [(position, new) for position, (old, new) in enumerate(zip(before, pieces, strict=True)) if old != new]


def _kept(frames: Sequence[dict[str, Any]], num_positions: int) -> list[int]:
    """Indices of the frames to show: all, or evenly spread ones where all would make the page too heavy."""
    limit = min(len(frames), MAX_FRAMES)
    while True:
        kept = sorted({round(index) for index in np.linspace(0, len(frames) - 1, limit)})
        shown = [_pieces(frames[index], num_positions) for index in kept]
        changes = sum(len(_changes(before, after)) for before, after in zip([None, *shown], shown, strict=False))
        if changes <= MAX_CHANGES or limit <= 8:
            return kept
        limit = limit * 3 // 4


def _cut(num_frames: int, num_kept: int, length: int, num_positions: int) -> str:
    parts = []
    if num_kept < num_frames:
        parts.append(f"{num_kept} of {num_frames} steps")
    if num_positions < length:
        parts.append(f"the first {num_positions:,} of {length:,} positions")
    return " and ".join(parts)


def _caption(frame: dict[str, Any], index: int, num_frames: int) -> str:
    pieces = frame["pieces"]
    parts = [f"step {index} of {num_frames - 1}"]
    if known(frame.get("time")):
        parts.insert(0, f"t = {frame['time']:.3f}")
    parts.append(f"{sum(piece is not None for piece in pieces):,} of {len(pieces):,} tokens shown")
    if known(frame.get("latent_norm")):
        parts.append(f"latent norm {significant(frame['latent_norm'])}")
    return " · ".join(parts)


def _blank(piece: str | None, mask: str) -> str:
    """A placeholder as wide as the final text, so that the lines do not move while tokens appear."""
    if piece is None:
        return mask * 3
    return re.sub(r"\S", lambda _: mask, piece)


def _split(text: str) -> tuple[str, str]:
    """Leading white space and the rest (blocks do not cover the space before a word)."""
    body = text.lstrip()
    return (text[: len(text) - len(body)], body) if body else ("", text)


def _still(pieces: Sequence[str | None], before: Sequence[str | None], blanks: Sequence[str]) -> Markup:
    parts: list[Markup] = []
    for piece, old, blank in zip(pieces, before, blanks, strict=True):
        lead, body = _split(blank if piece is None else piece)
        if piece is None:
            parts.append(Markup("{}<i>{}</i>").format(lead, body))
        elif piece != old:
            parts.append(Markup("{}<mark>{}</mark>").format(lead, body))
        else:
            parts.append(escape(piece))
    return Markup("").join(parts)


def _charts(frames: Sequence[dict[str, Any]]) -> list[tuple[str, Markup]]:
    """Masked share and latent norm over the steps."""
    steps = np.arange(len(frames), dtype=float)
    if len(frames) < 2:
        return []
    axis = Axis(0.0, float(len(frames) - 1))
    masked = np.array([100 * np.mean([piece is None for piece in frame["pieces"]]) for frame in frames])
    norms = np.array([frame["latent_norm"] if known(frame.get("latent_norm")) else np.nan for frame in frames])
    size = {"width": 480, "height": 150, "x_label": "denoising step", "x_axis": axis}
    charts = [
        (
            "Tokens still masked",
            line_chart(
                [Series("masked", steps, masked)],
                name="Share of masked tokens over denoising steps",
                y_label="%",
                y_axis=Axis(0.0, 103.0),
                **size,
            ),
        )
    ]
    if np.isfinite(norms).any():
        chart = line_chart(
            [Series("latent norm", steps, norms)],
            name="Latent norm over denoising steps",
            y_label="norm",
            y_axis=span([norms]),
            **size,
        )
        charts.append(("Latents", chart))
    return charts
