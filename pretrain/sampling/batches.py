"""Any number of samples, as many at a time as the device holds."""

from __future__ import annotations

from collections.abc import Callable

import torch

from braid.pretrain.config.schema import SamplingConfig
from braid.pretrain.objectives.base import Objective
from braid.pretrain.training.precision import autocast

from .prompts import Prompt
from .sampler import Samples, draw_samples

ROWS_ON_CPU = 16
LIVE_LOGITS = 8
"""Tensors of a row's logits, in float32, that a step of the hungriest sampler holds at a time."""


def fitting_batch_size(objective: Objective, length: int, device: torch.device) -> int:
    """Rows of `length` tokens at a time: on a GPU what half of its free memory holds of their logits, which outweigh
    everything else a sampler keeps; on a CPU, where more at a time is no faster, a fixed number."""
    if device.type != "cuda":
        return ROWS_ON_CPU
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, free // 2 // (4 * LIVE_LOGITS * length * objective.network.vocab_size))


def draw_in_batches(
    objective: Objective,
    settings: SamplingConfig,
    prompt: Prompt,
    *,
    key: int,
    precision: str,
    batch_size: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Samples:
    """One sample for every row of `prompt`, on the CPU. The batch size does not change them.

    precision: of the network, as `run.precision`. batch_size: rows at a time; 0 takes what fits the device. A batch
    that turns out too large for the memory is drawn again in halves. progress: samples done, in proportion to the steps
    made, and their total.
    """
    device = next(objective.parameters()).device
    total = len(prompt.tokens)
    size = min(total, batch_size or fitting_batch_size(objective, prompt.tokens.shape[1], device))
    tokens, network_calls = [], []
    while len(network_calls) < total:
        start = len(network_calls)
        part = prompt.rows(start, start + size)

        def report(step: int, steps: int, start: int = start, rows: int = len(part.tokens)) -> None:
            progress(start + rows * step // steps, total)

        try:
            with autocast(precision, device):
                samples = draw_samples(objective, settings, part, key=key, first_ordinal=start, progress=report)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = -(-size // 2)
            torch.cuda.empty_cache()
            continue
        tokens.append(samples.tokens.cpu())
        network_calls += samples.network_calls
    return Samples(torch.cat(tokens), network_calls)
