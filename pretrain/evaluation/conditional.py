"""Quality of answers to given sources against reference answers: BLEU, ROUGE, exact match.

The rows are (source, target) pairs: the source is given to the sampler, the answer is what it makes of the positions
after it, up to the first EOS, and the reference is the whole target of the pair, even where the row has only its begin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from braid.data_pipeline.loader import validation_batches
from braid.data_pipeline.packing import Rows
from braid.kernels.errors import ConfigError, InputError
from braid.pretrain.checkpoint.snapshot import LoadedModel
from braid.pretrain.config.schema import SamplingConfig
from braid.pretrain.sampling.batches import draw_in_batches
from braid.pretrain.sampling.prompts import Prompt

from .bound import ROWS_AT_A_TIME, finite, mean_and_error

ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
"""Our names and those of the rouge-score package."""


@dataclass(frozen=True)
class Answers:
    """Answers to n sources and their references, as ids without EOS."""

    answers: list[list[int]]
    references: list[list[int]]
    network_calls: float
    """Mean over the answers."""


def answer_rows(
    model: LoadedModel,
    settings: SamplingConfig,
    rows: Rows,
    num: int,
    *,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Answers:
    """Answers to the sources of `num` rows spread over the split (all, when there are fewer).

    Raises ConfigError for rows that are not pairs.
    """
    if rows.packing != "pairs":
        raise ConfigError(
            "conditional metrics need (source, target) pairs",
            found=f"the model was trained on data.packing={rows.packing}",
            change="--metrics generative, or a model trained with data.packing=pairs",
        )
    batches = list(validation_batches(rows, num, ROWS_AT_A_TIME, 0, 1))
    tokens, scored, given = (
        torch.cat([getattr(batch, name) for batch in batches]) for name in ("tokens", "loss_mask", "condition")
    )
    samples = draw_in_batches(
        model.objective, settings, Prompt(tokens, given), key=seed, precision=model.config.run.precision,
        progress=progress,
    )  # fmt: skip
    eos_id = model.tokenizer.eos_id
    begins = scored.long().argmax(1).tolist()
    return Answers(
        [_until_eos(row[begin:], eos_id) for row, begin in zip(samples.tokens.tolist(), begins, strict=True)],
        [rows.target(i) for batch in batches for i in batch.ordinals.tolist()],  # row i has ordinal i
        float(np.mean(samples.network_calls)),
    )


def measure_answers(found: Answers, decode: Callable[[list[int]], str]) -> dict[str, Any]:
    """Every metric, JSON-able: BLEU, ROUGE, `exact_match` and `token_accuracy` in percent."""
    answers, references = ([decode(ids) for ids in side] for side in (found.answers, found.references))
    score, signature = bleu(answers, references, lowercase=True)
    cased, _ = bleu(answers, references, lowercase=False)
    accuracy, error = share_and_error(token_matches(found.answers, found.references), [*map(len, found.references)])
    result: dict[str, Any] = {
        "network_calls": found.network_calls,
        "num": len(answers),
        "bleu": score,
        "bleu_cased": cased,
        "bleu_signature": signature,
        "token_accuracy": accuracy,
        "token_accuracy_standard_error": error,
    }
    exact = 100.0 * exact_match(found.answers, found.references)
    for name, values in {**rouge(answers, references), "exact_match": exact}.items():
        result[name], result[f"{name}_standard_error"] = mean_and_error(values)
    return finite(result)


def bleu(answers: Sequence[str], references: Sequence[str], *, lowercase: bool) -> tuple[float, str]:
    """Corpus BLEU in percent with effective order, by sacrebleu, one reference each; and sacrebleu's signature."""
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise _missing("sacrebleu", error) from error
    metric = BLEU(lowercase=lowercase, effective_order=True)
    score = metric.corpus_score(list(answers), [list(references)])
    return score.score, str(metric.get_signature())


def rouge(answers: Sequence[str], references: Sequence[str]) -> dict[str, np.ndarray]:
    """ROUGE-1, ROUGE-2 and ROUGE-L F1 in percent of each pair (rouge-score, Porter stemmer), float64 [n] by name."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise _missing("rouge-score", error) from error
    scorer = RougeScorer(list(ROUGE.values()), use_stemmer=True)
    scores = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    return {name: np.array([100 * score[theirs].fmeasure for score in scores]) for name, theirs in ROUGE.items()}


def exact_match(answers: Sequence[list[int]], references: Sequence[list[int]]) -> np.ndarray:
    """Whether each answer is its reference, token by token and of the same length: bool [n]."""
    return np.array([answer == reference for answer, reference in zip(answers, references, strict=True)])


def token_matches(answers: Sequence[list[int]], references: Sequence[list[int]]) -> np.ndarray:
    """How many tokens of each reference its answer has at the same place, int64 [n]. What an answer lacks is wrong;
    what it has beyond its reference is not counted."""
    return np.array(
        [
            sum(a == r for a, r in zip(answer, reference, strict=False))
            for answer, reference in zip(answers, references, strict=True)
        ]
    )


def share_and_error(matches: Sequence[int], lengths: Sequence[int]) -> tuple[float, float | None]:
    """Percent of all tokens that match, and its standard error over the texts: that of a ratio of two means (None for a
    single text)."""
    matches, lengths = np.asarray(matches, dtype=float), np.asarray(lengths, dtype=float)
    total = max(1.0, lengths.sum())
    share = matches.sum() / total
    if len(matches) < 2:
        return 100 * share, None
    return 100 * share, float(100 * np.std(matches - share * lengths, ddof=1) * len(matches) ** 0.5 / total)


def _until_eos(ids: list[int], eos_id: int) -> list[int]:
    return ids[: ids.index(eos_id)] if eos_id in ids else ids


def _missing(package: str, error: ImportError) -> InputError:
    return InputError(f"conditional metrics need {package}", found=str(error), change="pip install 'braid-lm[eval]'")
