"""Drawing samples from any objective: one entry, one sampler module per system."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module

import torch
from torch import Tensor

from braid.kernels.random import fold_key
from braid.pretrain.config.sampling import sampler_name
from braid.pretrain.config.schema import SamplingConfig
from braid.pretrain.objectives.base import Objective

from .draws import Draws
from .prompts import Prompt


@dataclass
class Samples:
    """Finished samples and what they cost."""

    tokens: Tensor
    """int64 [N, L]."""
    network_calls: list[int]
    """Calls of the network that each sample took: guidance costs two a step, a step that changes nothing none."""
    frames: list[dict] = field(default_factory=list)
    """State of the first sample after each step, where recording was asked for: time, tokens, latent_norm."""


@torch.no_grad()
def draw_samples(
    objective: Objective,
    settings: SamplingConfig,
    prompt: Prompt,
    *,
    key: int,
    first_ordinal: int = 0,
    record: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Samples:
    """Draw one sample for every row of `prompt` (N x L) on the objective's device, in evaluation mode.

    Known tokens of the prompt hold at every step. The sampler of an objective is the function
    `sample(objective, prompt, draws) -> int64 [N, L]` of the module named as the objective in this package.
    """
    device = next(objective.parameters()).device
    prompt = prompt.to(device)
    draws = Draws(
        key=fold_key(key, "sampler"),
        ordinals=torch.arange(first_ordinal, first_ordinal + len(prompt.tokens), device=device),
        length=prompt.tokens.shape[1],
        settings=settings,
        sampler=sampler_name(settings, objective.config),
        vocabulary=objective.vocabulary,
        record=record,
        progress=progress,
    )
    sample = import_module(f"braid.pretrain.sampling.{objective.name}").sample
    training = objective.training
    objective.eval()
    tokens = sample(objective, prompt, draws)
    objective.train(training)
    return Samples(tokens, draws.num_calls.tolist(), draws.frames)


def sample_entropy(tokens_NL: Tensor) -> list[float]:
    """Unigram entropy of each sample in nats: low values betray repetition."""
    entropies = []
    for row in tokens_NL:
        counts = torch.unique(row, return_counts=True)[1].double()
        p = counts / counts.sum()
        entropies.append(float(-(p * p.log()).sum()))
    return entropies
