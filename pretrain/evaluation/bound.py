"""Likelihood figures of a model on a corpus: nats per token with standard errors, bits per byte, perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch

from braid.data_pipeline.loader import validation_batches
from braid.data_pipeline.packing import Rows
from braid.kernels.random import fold_key
from braid.parallel.data_parallel import World
from braid.pretrain.diffusion.times import evaluation_strata
from braid.pretrain.objectives.base import Noise, Objective


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

    def as_dict(self) -> dict:
        return asdict(self)


def estimate(
    nats: np.ndarray, tokens: np.ndarray, num_bytes: float, *, name: str, label: str, is_bound: bool, note: str
) -> Estimate:
    """From nats and token counts per sequence [n] and the bytes of all of them.

    The value is the ratio of the sums; its standard error is the ratio estimator's (for rows of equal length, the
    standard deviation of the rows over sqrt(n)). With one sequence there is none: NaN.
    """
    value = nats.sum() / tokens.sum()
    n = len(nats)
    residual = nats - value * tokens
    error = math.sqrt(n / (n - 1) * (residual**2).sum()) / tokens.sum() if n > 1 else math.nan
    per_byte = tokens.sum() / (num_bytes * math.log(2))
    return Estimate(
        name, label, float(value), float(error), float(value * per_byte), float(error * per_byte),
        _exp(value), is_bound, note,
    )  # fmt: skip


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf  # beyond, float64 overflows


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
    """Every figure of `objective` on the first `num_sequences` rows, `draws` Monte-Carlo draws each.

    Draws are keyed by (seed, row, draw): the same on any number of ranks and at any time of training.
    """
    device = next(objective.parameters()).device
    key = fold_key(seed, "validation")
    training = objective.training
    objective.eval()
    nats = {figure.name: torch.zeros(num_sequences, dtype=torch.float64, device=device) for figure in objective.figures}
    counts = torch.zeros(num_sequences, dtype=torch.float64, device=device)
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
    scored = counts.nonzero()[0]  # all of them, unless rows of damaged shards are skipped
    num_bytes = sum(rows.num_bytes(int(i)) for i in scored)
    estimates = []
    for figure in objective.figures:
        values = world.all_reduce_sum(nats[figure.name]).cpu().numpy()
        estimates.append(
            estimate(
                values[scored],
                counts[scored],
                num_bytes,
                name=figure.name,
                label=figure.label,
                is_bound=figure.is_bound,
                note=figure.note,
            )  # fmt: skip
        )
    return estimates


def unigram_entropy(rows: Rows, num_sequences: int, vocab_size: int) -> Estimate:
    """Entropy of the token frequencies of the same rows: what a model without any context would reach at best.

    The frequencies are those of the scored rows themselves (the most favourable unigram model). Every token of a row
    counts, BOS and EOS of wrapped rows included, as in the models' figures.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for index in range(num_sequences):
        counts += np.bincount(rows[index], minlength=vocab_size)
    surprise = -np.log(np.maximum(counts, 1) / counts.sum())
    nats = np.array([surprise[rows[index]].sum() for index in range(num_sequences)])
    tokens = np.array([len(rows[index]) for index in range(num_sequences)], dtype=np.float64)
    num_bytes = sum(rows.num_bytes(index) for index in range(num_sequences))
    return estimate(
        nats, tokens, num_bytes,
        name="unigram_entropy", label="unigram entropy", is_bound=False, note="frequencies of the scored rows",
    )  # fmt: skip
