"""An evaluation for people: every number with what it is and the conventions it depends on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NOTHING = "-"

LEGEND = (
    "  calls: of the network, a sample. tokens: scored. perplexity: of all scored tokens together. In the judge's own",
    "  tokens: its entropy, different n-grams over all, share of 4-grams the text had before. In the model's tokens,",
    "  whole rows: entropy, and KL of the token frequencies from the corpus to the texts. Entropies and KL in nats.",
    "  frontier: area under the divergence frontier to the corpus, 1 is no difference (n/a below 50 texts). The row",
    "  `data` is real text: compare with it, and only equal numbers of texts before one judge.",
)
"""Under the table of samples: its columns."""


def format_table(result: dict[str, Any]) -> str:
    """The result of `braid evaluate`, see command.py, as lines of text."""
    lines = [
        f"{result['objective']}, step {result['checkpoint_step']}, {result['weights']} weights, "
        f"{result['draws']} draws, {result['dtype']}"
    ]
    for corpus in [*([result] if "shares" in result else []), *result["corpora"]]:
        lines += _corpus(corpus, result)
    if "samples" in result:
        samples = result["samples"]
        lines.append(
            f"entropy of {samples['num']} samples: {samples['entropy']:.4f} nats "
            f"({samples['network_calls']:g} network calls a sample)"
        )
        lines += _drawn_by({"samples": samples})
    if "generative" in result:
        lines += _generative(result)
    if "conditional" in result:
        lines += _conditional(result)
    return "\n".join(lines)


def _corpus(corpus: dict[str, Any], result: dict[str, Any]) -> list[str]:
    lines = [
        f"{corpus['data']}, {corpus['split']} split: {corpus['num_sequences']} rows of {result['sequence_length']} "
        f"tokens ({result['packing']})"
    ]
    for figure in [*corpus["figures"], *([corpus["unigram_entropy"]] if "unigram_entropy" in corpus else [])]:
        error = figure["standard_error"]
        line = f"  {figure['label']}: {figure['value']:.4f}"
        line += f" +- {error:.4f}" if error is not None else " (one row: no standard error)"
        if figure["unit"] == "nats":
            perplexity = figure["perplexity"]
            line += " nats per token, perplexity "
            line += "beyond floating point" if perplexity is None else f"{perplexity:.4g}"
            line += f", {figure['bits_per_byte']:.4f} bits per byte"
            line += "" if corpus["bytes_are_exact"] else " (bytes by the split's mean)"
            kind = "bound" if figure["is_bound"] else "not a bound"
        else:
            kind = "mean per token, not a likelihood"
        lines += [line, f"      {kind}: {figure['note']}"]
    return lines


def _generative(result: dict[str, Any]) -> list[str]:
    judge = result["judge"]
    rows = [
        {
            "texts": entry["name"],
            "calls": _number(entry["network_calls"], "{:g}"),
            "number": str(entry["num"]),
            "empty": str(entry["num_empty"]),
            "cut": str(entry["num_truncated"]),
            "tokens": str(entry["num_tokens"]),
            "perplexity": _with_error(entry["perplexity"], _product(entry["perplexity"], entry["standard_error"]), 2),
            "entropy": _with_error(entry["entropy"], entry["entropy_standard_error"], 3),
            "judge's": _with_error(entry["judge_entropy"], entry["judge_entropy_standard_error"], 3),
            "distinct-1/2/3": "/".join(_number(entry[f"distinct_{n}"], "{:.3f}") for n in (1, 2, 3)),
            "repeated": _number(entry["repetition_4"], "{:.3f}"),
            "KL": _number(entry["frequency_kl"], "{:.3f}"),
            "frontier": _number(entry["divergence"], "{:.3f}"),
        }
        for entry in result["generative"]
    ]
    return [
        f"samples before the judge {judge['path']} ({judge['kind']}, {judge['precision']})",
        *_columns(rows),
        *_drawn_by({entry["name"]: entry for entry in result["generative"]}),
        f"  A text is read after BOS up to its first EOS; cut: longer than {judge['max_length']} tokens with BOS, the "
        "rest not scored.",
        *LEGEND,
    ]


def _conditional(result: dict[str, Any]) -> list[str]:
    with_errors = ("rouge_1", "rouge_2", "rouge_l", "exact_match")
    rows = [
        {
            "steps": _number(entry["steps"], "{:d}"),
            "calls": _number(entry["network_calls"], "{:g}"),
            "pairs": str(entry["num"]),
            "BLEU": f"{entry['bleu']:.2f}",
            "cased": f"{entry['bleu_cased']:.2f}",
            **{
                name.replace("rouge_", "ROUGE-").replace("_", " "): _with_error(
                    entry[name], entry[f"{name}_standard_error"], 2
                )
                for name in with_errors
            },
            "token accuracy": f"{entry['token_accuracy']:.2f}",
        }
        for entry in result["conditional"]
    ]
    signature = result["conditional"][0]["bleu_signature"]
    return [
        f"answers to given sources, in percent (sacrebleu {signature}; ROUGE: stemmed F1)",
        *_columns(rows),
        *_drawn_by({f"{row['steps']} steps": entry for row, entry in zip(rows, result["conditional"], strict=True)}),
    ]


def _drawn_by(entries: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each way in which texts were made, with the names of the entries made so."""
    ways: dict[str, list[str]] = {}
    for name, entry in entries.items():
        if entry["sampler"] is not None:
            settings = {key: value for key, value in entry["sampler"].items() if key != "steps"}
            ways.setdefault(", ".join(f"{key} {value}" for key, value in settings.items()), []).append(name)
    return [f"  {'; '.join(names)}: {way}" for way, names in ways.items()]


def _columns(rows: Sequence[dict[str, str]]) -> list[str]:
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    first = next(iter(widths))
    return [
        "  "
        + "  ".join(
            row[name].ljust(width) if name == first else row[name].rjust(width) for name, width in widths.items()
        )
        for row in ({name: name for name in widths}, *rows)
    ]


def _number(value: float | None, form: str) -> str:
    return NOTHING if value is None else form.format(value)


def _product(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a * b


def _with_error(value: float | None, error: float | None, digits: int) -> str:
    shown = _number(value, f"{{:.{digits}f}}")
    return shown if error is None or value is None else f"{shown}+-{error:.{digits}f}"
