"""Likelihood figures of a model on a corpus: nats per token with standard errors, bits per byte, perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch

from braid.data_pipeline.loader import validation_batches
from braid.data_pipeline.packing import Rows
from braid.kernels.random import fold_key
from braid.parallel.data_parallel import World
from braid.pretrain.diffusion.times import evaluation_strata
from braid.pretrain.objectives.base import Figure, Noise, Objective


@dataclass(frozen=True)
class Estimate:
    """One evaluated figure."""

    name: str
    label: str
    value: float
    """Nats per token."""
    standard_error: float
    """Over sequences, Monte-Carlo draws of a sequence averaged first."""
    bits_per_byte: float
    """Total bits over the original bytes of the scored text."""
    bits_per_byte_standard_error: float
    perplexity: float
    """exp(value)."""
    is_bound: bool
    """True: an upper bound on the negative log-likelihood (or exact). False: do not quote it as one."""
    note: str
    nats: np.ndarray = field(repr=False)
    """Nats of each scored row, float64 [n]."""
    tokens: np.ndarray = field(repr=False)
    """Tokens of each scored row, float64 [n]."""

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, without the rows; what does not exist (an error from one row, an overflow) is null."""
        scalars = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("nats", "tokens")}
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in scalars.items()
        }


def ratio(numerators: np.ndarray, denominators: np.ndarray) -> tuple[float, float]:
    """Ratio of the sums and its standard error over the n rows (ratio estimator; NaN for one row)."""
    value, n = numerators.sum() / denominators.sum(), len(numerators)
    residual = numerators - value * denominators
    error = math.sqrt(n / (n - 1) * (residual**2).sum()) / denominators.sum() if n > 1 else math.nan
    return float(value), float(error)


def estimate(nats: np.ndarray, tokens: np.ndarray, num_bytes: np.ndarray, figure: Figure) -> Estimate:
    """From nats, token counts and original bytes of each scored row, float64 [n]."""
    value, error = ratio(nats, tokens)
    bits, bits_error = ratio(nats / math.log(2), num_bytes)
    perplexity = math.exp(value) if value < 700 else math.inf  # beyond, float64 overflows
    return Estimate(
        figure.name,
        figure.label,
        value,
        error,
        bits,
        bits_error,
        perplexity,
        figure.is_bound,
        figure.note,
        nats,
        tokens,
    )


def paired_difference(a: Estimate, b: Estimate) -> tuple[float, float]:
    """a - b in nats per token and its standard error, for two figures on the same rows (and the same noise)."""
    assert len(a.nats) == len(b.nats) and (a.tokens == b.tokens).all(), "not the same rows"
    return ratio(a.nats - b.nats, a.tokens)


@torch.no_grad()
def evaluate_rows(
    objective: Objective,
    rows: Rows,
    *,
    num_sequences: int,
    draws: int,
    seed: int,
    micro_batch_size: int,
    world: World,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Estimate]:
    """Every figure of `objective` on `num_sequences` rows spread over the split, `draws` Monte-Carlo draws each.

    Draws are keyed by (seed, row, draw): the same on any number of ranks and at any time of training.
    """
    device = next(objective.parameters()).device
    key = fold_key(seed, "validation")
    training = objective.training
    objective.eval()
    nats = {figure.name: torch.zeros(len(rows), dtype=torch.float64, device=device) for figure in objective.figures}
    counts = torch.zeros(len(rows), dtype=torch.float64, device=device)
    done = 0
    for batch in validation_batches(rows, num_sequences, micro_batch_size, world.rank, world.size):
        batch = batch.to(device)
        counts[batch.ordinals] = batch.loss_mask.sum(1).double()
        for draw in range(draws):
            noise = Noise(key, batch.ordinals, evaluation_strata(key, batch.ordinals, draw, draws), draw)
            for name, value in objective.evaluate(batch, noise).items():
                nats[name][batch.ordinals] += value / draws
        done += len(batch.tokens)
        progress(done)
    objective.train(training)
    counts = world.all_reduce_sum(counts).cpu().numpy()
    scored = counts.nonzero()[0]
    num_bytes = np.array([rows.num_bytes(i) for i in scored.tolist()])
    return [
        estimate(world.all_reduce_sum(nats[figure.name]).cpu().numpy()[scored], counts[scored], num_bytes, figure)
        for figure in objective.figures
    ]


UNIGRAM = Figure(
    "unigram_entropy", "unigram entropy", False, "token frequencies of the whole split, BOS and EOS included"
)


def unigram_entropy(rows: Rows, vocab_size: int) -> Estimate:
    """Entropy of the token frequencies of all rows of a split: what a model without any context would reach at best.

    The frequencies are the split's own (the most favourable unigram model). Every token of a row counts, BOS and EOS of
    wrapped rows included, as in the models' figures.
    """
    kept = [index for index in range(len(rows)) if not rows.is_left_out(index)]
    counts = np.zeros(vocab_size, dtype=np.int64)
    for index in kept:
        counts += np.bincount(rows[index], minlength=vocab_size)
    surprise = -np.log(np.maximum(counts, 1) / counts.sum())
    nats = np.array([surprise[rows[index]].sum() for index in kept])
    tokens = np.array([len(rows[index]) for index in kept], dtype=np.float64)
    return estimate(nats, tokens, np.array([rows.num_bytes(index) for index in kept]), UNIGRAM)
