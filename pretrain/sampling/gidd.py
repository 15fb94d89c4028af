"""Ancestral sampling of GIDD, from all masks. With uniform noise, what is written may be masked or replaced again."""

from __future__ import annotations

import torch
from torch import Tensor

from braid.pretrain.objectives.gidd import GIDD

from .draws import Draws
from .duo import ancestral
from .prompts import Prompt


def sample(objective: GIDD, prompt: Prompt, draws: Draws) -> Tensor:
    """Tokens int64 [N, L]."""
    start = torch.full_like(prompt.tokens, objective.mask_id)
    return ancestral(objective, prompt, draws, start, objective.process.reverse_step)
