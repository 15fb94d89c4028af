"""The page of a corpus: its numbers, its documents by length as pictures, and some of its rows."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from braid.data_pipeline.corpus import TokenCorpus
from braid.data_pipeline.inspection import spelt
from braid.data_pipeline.packing import Rows
from braid.kernels.errors import InputError
from braid.pretrain.report.curves import Chart
from braid.pretrain.report.figures import Axis, Series, legend, line_chart
from braid.pretrain.report.formatting import printable
from braid.pretrain.report.html import templates

from .description import about

NUM_ROWS, ROW_TOKENS = 3, 256


def write_page(folder: str, facts: dict[str, Any], output: Path) -> Path:
    """Write the page to `output`, whole or not at all, and return its path."""
    if not output.parent.is_dir():
        raise InputError("The folder of the report does not exist", found=str(output.parent), change="create it first")
    text = (
        templates()
        .get_template("corpus.html.jinja")
        .render(facts=facts, about=about, charts=_charts(facts["splits"]), rows=_rows(folder))
    )
    unfinished = output.with_name(output.name + ".tmp")
    unfinished.write_bytes(text.encode("utf-8", errors="replace"))
    os.replace(unfinished, output)
    return output


def _charts(splits: dict[str, dict[str, Any]]) -> list[Chart]:
    """Shares of the documents, and of the tokens, that documents of about each length have."""
    longest = max(split["lengths"]["histogram"]["edges"][-1] for split in splits.values())
    charts = []
    for what, title in (("documents", "Documents by length"), ("tokens", "Tokens by the length of their document")):
        series = [
            Series(name, *_shares(split["lengths"]["histogram"], what), colour)
            for colour, (name, split) in enumerate(splits.items())
            if sum(split["lengths"]["histogram"][what])
        ]
        if not series:
            continue
        highest = max(float(each.y.max()) for each in series)
        svg = line_chart(
            series,
            name=title,
            x_label="tokens of a document",
            y_label=f"% of {what}",
            x_axis=Axis(1.0, max(2.0, float(longest)), log=True),
            y_axis=Axis(0.0, 1.06 * highest),
        )
        charts.append(Chart(title, svg, legend(series), "each step is a quarter of an octave"))
    return charts


def _shares(histogram: dict[str, list], what: str) -> tuple[np.ndarray, np.ndarray]:
    """A staircase: per cent in each bin. Documents without a token have no place on a logarithmic axis."""
    counts = np.array(histogram[what], float)
    edges = np.array(histogram["edges"], float)
    shares = 100 * counts / counts.sum()
    return np.repeat(edges, 2)[3:-1], np.repeat(shares[1:], 2)


def _rows(folder: str) -> list[str]:
    """Some rows of the training split, evenly spread, as text; fewer where shards are damaged."""
    corpus = TokenCorpus.open(folder, "train")
    length = min(ROW_TOKENS, corpus.num_stream_tokens)
    rows, texts = Rows(corpus, length, "stream"), []
    for i in np.linspace(0, len(rows) - 1, min(NUM_ROWS, len(rows))).astype(int):
        try:
            texts.append(printable(spelt(corpus.tokenizer, rows[i])))
        except InputError:
            continue  # `braid data verify` names the shard
    return texts
