"""What a run was trained on: a line for each source and one for all, curves where there are several."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_page import chart_of, page_of
from synthetic_run import write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "mixed", "mdlm")


def record(run: Path, of_training, of_validation) -> None:
    """Add to every line of the log what a function of its tokens gives."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line |= (of_training if line["split"] == "train" else of_validation)(line["tokens_seen"])
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def source(weight: float, tokens: float, size: int) -> dict:
    unique = min(tokens, size)
    counts = {"tokens_seen": tokens, "unique_tokens": unique, "repeated_tokens": tokens - unique}
    return {"weight": weight, **counts, "epoch": tokens / size, "left_out": 3}


def test_a_mixture_has_a_line_for_each_source_and_curves(run):
    def training(tokens):
        late = tokens > 5e6
        sources = {
            "web": source(0.5 + 0.25 * late, 0.75 * tokens, 10**8),
            "code": source(0.5 - 0.25 * late, tokens / 4, 10**6),
        }
        counts = {name: sum(each[name] for each in sources.values()) for name in ("unique_tokens", "repeated_tokens")}
        return counts | {"sources": sources}

    def validation(tokens):
        losses = {"web": {"loss": 4.5, "standard_error": 0.02}, "code": {"loss": 3.25, "standard_error": 0.1}}
        return {"sources": {name: loss | {"bits_per_byte": 1.5} for name, loss in losses.items()}}

    record(run, training, validation)
    text, page = page_of(run)
    web, code, together = page.lines("Training data")
    assert web == {
        "Source": "mixed web", "Weight": "0.7500", "Tokens seen": "9.83 M", "Unique": "9.83 M", "Repeated": "0",
        "Epochs": "0.098", "Rows left out": "3", "Validation": "4.500 ± 0.020",
    }  # fmt: skip
    assert (code["Unique"], code["Repeated"], code["Epochs"]) == ("1.00 M", "2.28 M", "3.277")
    assert together["Source"] == "mixed all of them" and together["Tokens seen"] == "13.1 M"
    assert (together["Unique"], together["Repeated"], together["Weight"]) == ("10.8 M", "2.28 M", "–")
    for title in ("Validation by source", "Weights of the sources"):
        assert chart_of(text, title)


def test_a_single_corpus_has_one_line_and_no_curves(run):
    record(
        run,
        lambda n: {"unique_tokens": min(n, 10**7), "repeated_tokens": max(n - 10**7, 0), "epoch": n / 10**7},
        lambda n: {},
    )
    text, page = page_of(run)
    (line,) = page.lines("Training data")
    assert (line["Unique"], line["Repeated"], line["Epochs"]) == ("10.0 M", "3.11 M", "1.311")
    assert "Validation by source" not in text and "Weights of the sources" not in text


def test_a_log_that_does_not_say_has_no_table(run):
    _, page = page_of(run)
    assert "Training data" not in page.tables
