"""What is measured on samples: generative perplexity, and beside it always what it can be bought with.

A low generative perplexity is easy to reach with dull or repeated text, so no entry comes without the entropies, the
shares of different and of repeated n-grams, the distance from the corpus, and the network calls spent. The same numbers
for rows of the corpus itself say what real text gets: most of them depend on the number and the length of the texts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from braid.data_pipeline.loader import validation_batches
from braid.data_pipeline.packing import Rows
from braid.data_pipeline.tokenizers import Tokenizer
from braid.kernels.errors import ConfigError, InputError

from .bound import ROWS_AT_A_TIME, finite, mean_and_error, ratio, token_counts
from .divergence import divergence
from .diversity import distinct, frequency_divergence, repetition, token_entropy
from .judge import Judged

DISTINCT = (1, 2, 3)
REPEATED = 4


@dataclass(frozen=True)
class Texts:
    """n texts: samples of a model, or rows of a corpus."""

    texts: list[str]
    """Decoded, up to the first EOS."""
    ended: list[bool]
    """Whether there was an EOS."""
    tokens: list[np.ndarray]
    """The whole rows in the model's own tokens, special ones and what follows the EOS included, int64."""
    network_calls: float | None = None
    """Mean over the samples; None where nobody counted."""
    sampler: dict[str, Any] | None = None
    """What made them, as `sampling.output.sampler_settings` says it; None where that is not known, or nothing did."""


@dataclass(frozen=True)
class Reference:
    """Real text to compare with."""

    features: np.ndarray
    """The judge's features of rows of the corpus, float32 [n, W]."""
    token_counts: np.ndarray
    """How often each id of the model's vocabulary is in the corpus, int64 [V]."""


def corpus_texts(rows: Rows, num: int, tokenizer: Tokenizer) -> tuple[Texts, Texts, np.ndarray]:
    """Two sets of `num` rows each (fewer where the split has not twice as many), spread over the split and without a
    row in common: what samples are compared with, and the control. And the counts of every id in all rows but the
    control's, int64 [V]."""
    batches = list(validation_batches(rows, 2 * num, ROWS_AT_A_TIME, 0, 1))
    chosen = [
        row[is_text]  # without padding
        for batch in batches
        for row, is_text in zip(batch.tokens.numpy(), (batch.loss_mask | batch.condition).numpy(), strict=True)
    ]
    if len(chosen) < 2:
        raise ConfigError(
            "generative metrics compare with at least two rows of the corpus",
            found=f"{len(chosen)} rows of {rows.sequence_length} tokens",
            change="evaluate on a larger split",
        )
    control = chosen[1::2]
    counts = token_counts(rows, tokenizer.vocab_size)
    counts -= np.bincount(np.concatenate(control), minlength=tokenizer.vocab_size)
    wrapped = rows.packing == "wrap"
    return (
        texts_of_rows(chosen[0::2], tokenizer, wrapped=wrapped),
        texts_of_rows(control, tokenizer, wrapped=wrapped),
        counts,
    )


def texts_of_rows(rows: Sequence[np.ndarray], tokenizer: Tokenizer, *, wrapped: bool, **about: Any) -> Texts:
    """The text of each row of ids: without a BOS in front, up to the first EOS. The EOS that closes a wrapped row
    frames it and ends no text. `about`: the other fields of `Texts`."""
    texts, ended = [], []
    for row in rows:
        begin = int(row[0] == tokenizer.bos_id)
        ends = np.flatnonzero(row[begin:] == tokenizer.eos_id)
        end = begin + int(ends[0]) if len(ends) else len(row)
        texts.append(tokenizer.decode(row[begin:end]))
        ended.append(end < len(row) - int(wrapped))
    return Texts(texts, ended, list(rows), **about)


def read_samples(path: Path, tokenizer: Tokenizer, *, wrapped: bool) -> Texts:
    """The texts of a file of JSON lines as `braid sample` writes them, or with nothing but a "text" each.

    Raises InputError for what is not such a file, or holds tokens that are not the tokenizer's.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON texts may hold what splitlines would split at
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the samples {path}", found=str(error), change="give a .jsonl file") from error
    records = [_record(line, f"{path}, line {n}", tokenizer) for n, line in enumerate(lines, 1) if line.strip()]
    if not records:
        raise InputError(f"there are no samples in {path}", change='write {"text": "..."} lines')
    texts = [record["text"] for record in records]
    tokens = [ids.astype(np.int64) for ids in tokenizer.encode_batch(texts)]
    ended = [False] * len(records)
    for index, record in enumerate(records):
        if "tokens" in record:
            tokens[index] = np.array(record["tokens"])
            one = texts_of_rows(tokens[index : index + 1], tokenizer, wrapped=wrapped)
            texts[index], ended[index] = one.texts[0], one.ended[0]
    calls = [record.get("network_calls") for record in records]
    samplers = [record.get("sampler") for record in records]
    return Texts(
        texts,
        ended,
        tokens,
        network_calls=float(np.mean(calls)) if all(isinstance(each, int) for each in calls) else None,
        sampler=samplers[0] if isinstance(samplers[0], dict) and samplers.count(samplers[0]) == len(samplers) else None,
    )


def _record(line: str, where: str, tokenizer: Tokenizer) -> dict[str, Any]:
    try:
        record = json.loads(line)
        if not isinstance(record["text"], str):
            raise TypeError
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(
            f"{where}: not a JSON object with a text", found=line[:80], change='write {"text": "..."}'
        ) from error
    if "tokens" in record:
        ids = record["tokens"]
        known = isinstance(ids, list) and all(isinstance(i, int) and 0 <= i < tokenizer.vocab_size for i in ids)
        if not known or not ids or tokenizer.decode(ids) != record["text"]:
            raise InputError(
                f"{where}: the tokens are not those of the text in the checkpoint's tokenizer",
                found=f"{str(ids)[:60]} for {record['text'][:40]!r}",
                change='give the checkpoint that drew them, or leave out "tokens" to judge the text alone',
            )
    return record


def measure(texts: Texts, judged: Judged, reference: Reference) -> dict[str, Any]:
    """Everything about one set of texts, JSON-able; null where there is nothing to measure.

    Of the text as the judge reads it (its tokens, up to the first EOS, truncated): perplexity, `judge_entropy`,
    distinct and repeated n-grams, divergence. Of the whole rows in the model's own tokens: `entropy`, `frequency_kl`.
    """
    scored = judged.num_tokens > 0
    nats, error = ratio(judged.nats[scored], judged.num_tokens[scored]) if scored.any() else (math.nan, math.nan)
    own, read = ([ids for ids in rows if len(ids)] for rows in (texts.tokens, judged.ids))
    entropy, entropy_error = mean_and_error([token_entropy(ids) for ids in own])
    judge_entropy, judge_entropy_error = mean_and_error([token_entropy(ids) for ids in read])
    counts = np.bincount(np.concatenate([np.zeros(0, np.int64), *own]), minlength=len(reference.token_counts))
    repeated = [repetition(ids, REPEATED) for ids in read if len(ids) >= REPEATED]
    return finite(
        {
            "steps": (texts.sampler or {}).get("steps"),
            "sampler": texts.sampler,
            "network_calls": texts.network_calls,
            "num": len(texts.texts),
            "num_empty": judged.num_empty,
            "num_truncated": judged.num_truncated,
            "num_tokens": int(judged.num_tokens.sum()),
            "nats_per_token": nats,
            "standard_error": error,
            "perplexity": math.exp(nats) if nats < 700 else math.inf,
            "entropy": entropy,
            "entropy_standard_error": entropy_error,
            "judge_entropy": judge_entropy,
            "judge_entropy_standard_error": judge_entropy_error,
            **{f"distinct_{n}": distinct(read, n) for n in DISTINCT},
            f"repetition_{REPEATED}": mean_and_error(repeated)[0],
            "frequency_kl": frequency_divergence(reference.token_counts, counts),
            "divergence": divergence(reference.features, judged.features),
        }
    )
