"""Figures of a model on a corpus with standard errors: nats per token, bits per byte, perplexity; and plain means."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch

from braid.data_pipeline.loader import Batch, validation_batches
from braid.data_pipeline.packing import Rows
from braid.kernels.random import fold_key
from braid.parallel.data_parallel import World
from braid.parallel.mesh import Axis
from braid.pretrain.objectives.base import Figure, Noise, Objective

ROWS_AT_A_TIME = 1024
"""When a whole split is read to count its tokens."""
ROW_BY_ROW = ("sums", "tokens", "num_bytes")
"""Fields of an estimate that are not reported."""


@dataclass(frozen=True)
class Estimate:
    """One evaluated figure."""

    name: str
    label: str
    unit: str
    """`nats` or `value`, see `Figure`."""
    value: float
    """Mean per token, in nats or as it is."""
    standard_error: float
    """Over sequences, Monte-Carlo draws of a sequence averaged first."""
    bits_per_byte: float | None
    """Total bits over the original bytes of the scored text; None for what is not nats, as the next two."""
    bits_per_byte_standard_error: float | None
    perplexity: float | None
    """exp(value)."""
    is_bound: bool
    """True: an upper bound on the negative log-likelihood (or exact). False: do not quote it as one."""
    note: str
    sums: np.ndarray = field(repr=False)
    """Sum over the scored tokens of each row, float64 [n]."""
    tokens: np.ndarray = field(repr=False)
    """Scored tokens of each row, float64 [n]."""
    num_bytes: np.ndarray = field(repr=False)
    """Original bytes of what is scored of each row, float64 [n]."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, without the rows; what does not exist (an error from one row, an overflow) is null."""
        return finite({f.name: getattr(self, f.name) for f in fields(self) if f.name not in ROW_BY_ROW})


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """The same with None for NaN and infinities, which JSON does not know."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }


def ratio(numerators: np.ndarray, denominators: np.ndarray, strata: Sequence[int] | None = None) -> tuple[float, float]:
    """Ratio of the sums and its standard error over the n rows (ratio estimator; NaN for one row).

    strata: sizes of groups, one after the other, of which each was sampled by itself (NaN where one has one row)."""
    value, n = numerators.sum() / denominators.sum(), len(numerators)
    residual = numerators - value * denominators
    if strata is not None:
        groups = np.split(residual, np.cumsum(strata)[:-1])
        variance = sum(len(group) * group.var(ddof=1) if len(group) > 1 else math.nan for group in groups)
        return float(value), math.sqrt(variance) / float(denominators.sum())
    error = math.sqrt(n / (n - 1) * (residual**2).sum()) / denominators.sum() if n > 1 else math.nan
    return float(value), float(error)


def mean_and_error(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Mean and its standard error; NaN for what so few values do not have."""
    values = np.asarray(values, dtype=np.float64)
    mean = float(values.mean()) if len(values) else math.nan
    return mean, float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def estimate(
    sums: np.ndarray, tokens: np.ndarray, num_bytes: np.ndarray, figure: Figure, strata: Sequence[int] | None = None
) -> Estimate:
    """From sums, token counts and original bytes of each scored row, float64 [n]; strata: see `ratio`."""
    assert figure.unit in ("nats", "value") and not (figure.unit == "value" and figure.is_bound), figure
    value, error = ratio(sums, tokens, strata)
    bits, bits_error, perplexity = None, None, None
    if figure.unit == "nats":
        bits, bits_error = ratio(sums / math.log(2), num_bytes, strata)
        perplexity = math.exp(value) if value < 700 else math.inf  # beyond, float64 overflows
    return Estimate(
        name=figure.name,
        label=figure.label,
        unit=figure.unit,
        value=value,
        standard_error=error,
        bits_per_byte=bits,
        bits_per_byte_standard_error=bits_error,
        perplexity=perplexity,
        is_bound=figure.is_bound,
        note=figure.note,
        sums=sums,
        tokens=tokens,
        num_bytes=num_bytes,
    )


def paired_difference(a: Estimate, b: Estimate) -> tuple[float, float]:
    """a - b per token and its standard error, for two figures on the same rows (and the same noise)."""
    assert len(a.sums) == len(b.sums) and (a.tokens == b.tokens).all(), "not the same rows"
    return ratio(a.sums - b.sums, a.tokens)


@torch.no_grad()
def evaluate_rows(
    objective: Objective,
    rows: Rows,
    *,
    num_sequences: int,
    draws: int,
    seed: int,
    micro_batch_size: int,
    peers: World | Axis,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Estimate]:
    """Every figure of `objective` on `num_sequences` rows spread over the split, `draws` Monte-Carlo draws each.

    Draws are keyed by (seed, row, draw): the same on any number of ranks and at any time of training.
    """
    device = next(objective.parameters()).device
    key = fold_key(seed, "validation")
    training = objective.training
    objective.eval()
    sums = {figure.name: torch.zeros(len(rows), dtype=torch.float64, device=device) for figure in objective.figures}
    counts = torch.zeros(len(rows), dtype=torch.float64, device=device)
    done = 0
    for batch in validation_batches(rows, num_sequences, micro_batch_size, peers.rank, peers.size):
        batch = batch.to(device)
        counts[batch.ordinals] += batch.loss_mask.sum(1).double()
        for draw in range(draws):
            noise = Noise.evaluation(key, batch.ordinals, draw, draws)
            for name, value in objective.evaluate(batch, noise).items():
                sums[name][batch.ordinals] += value / draws
        done += len(batch.tokens)
        progress(done)
    objective.train(training)
    counts = peers.all_reduce_sum(counts).cpu().numpy()
    scored = counts.nonzero()[0]
    num_bytes = np.array([rows.num_bytes(i) for i in scored.tolist()])
    return [
        estimate(peers.all_reduce_sum(sums[figure.name]).cpu().numpy()[scored], counts[scored], num_bytes, figure)
        for figure in objective.figures
    ]


UNIGRAM = Figure(
    "unigram_entropy", "unigram entropy", False, "token frequencies of the whole split, BOS and EOS included"
)


def unigram_entropy(rows: Rows, vocab_size: int) -> Estimate:
    """Entropy of the token frequencies of all rows of a split: what a model without any context would reach at best.

    The frequencies are the split's own (the most favourable unigram model). Every token that is scored counts, BOS and
    EOS of wrapped rows included, as in the models' figures; the sources of pairs do not.
    """
    counts = token_counts(rows, vocab_size)
    surprise = torch.from_numpy(-np.log(np.maximum(counts, 1) / counts.sum()))
    sums, tokens, num_bytes = [], [], []
    for batch in _all_rows(rows):
        sums.append((surprise[batch.tokens] * batch.loss_mask).sum(1).numpy())
        tokens.append(batch.loss_mask.sum(1).double().numpy())
        num_bytes += [rows.num_bytes(index) for index in batch.ordinals.tolist()]
    return estimate(np.concatenate(sums), np.concatenate(tokens), np.array(num_bytes), UNIGRAM)


def token_counts(rows: Rows, vocab_size: int) -> np.ndarray:
    """How often each id is scored in all rows of a split, int64 [V]."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for batch in _all_rows(rows):
        counts += np.bincount(batch.tokens[batch.loss_mask].numpy(), minlength=vocab_size)
    return counts


def _all_rows(rows: Rows) -> Iterator[Batch]:
    return validation_batches(rows, len(rows), ROWS_AT_A_TIME, 0, 1)
