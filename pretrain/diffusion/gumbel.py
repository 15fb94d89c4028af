"""Hard draws from a categorical law with a gradient: straight-through Gumbel-softmax (arXiv 1611.01144, 1611.00712)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gumbels(words: Tensor) -> Tensor:
    """Standard Gumbel variables -log(-log u), float64, from words in [0, 2^32) of any shape: u = (word + 1/2) / 2^32,
    so they lie in [-3.1, 22.9]."""
    return -torch.log(-torch.log((words.double() + 0.5) * 2.0**-32))


def temperature(step: int, start: float, end: float, num_steps: int) -> float:
    """From `start` at step 0 to `end` at step `num_steps` evenly on a logarithmic scale; `end` afterwards."""
    return start * (end / start) ** min(1.0, step / num_steps)


def straight_through(logits: Tensor, gumbel: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """(index int64 [...], weights [..., K]) for logits and Gumbel variables [..., K].

    The index is that of the largest logit plus its variable, an exact draw from softmax(logits) whatever tau. The
    weights are zeros, and their gradient is that of softmax((logits + gumbel) / tau): added to the one-hot vector of
    the index they are the straight-through estimate.
    """
    scores = logits + gumbel.to(logits.dtype)
    soft = F.softmax(scores / tau, dim=-1)
    return scores.detach().argmax(-1), soft - soft.detach()
