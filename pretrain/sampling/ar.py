"""Left to right, one call a token that is not known, keys and values of earlier positions kept. Only prefixes can be
known; they may differ in length. An answer to a source ends at its EOS: EOS fills its row, which takes no call."""

from __future__ import annotations

import torch
from torch import Tensor

from braid.pretrain.model.blocks import KeyValueCache
from braid.pretrain.objectives.ar import AR

from .draws import Draws
from .prompts import Prompt, prefix_lengths


def sample(objective: AR, prompt: Prompt, draws: Draws) -> Tensor:
    """Tokens int64 [N, L]."""
    tokens, prefixes = prompt.tokens.clone(), prefix_lengths(prompt)
    shortest, rows = int(prefixes.min()), torch.arange(len(tokens), device=draws.device)
    cache = KeyValueCache()
    bos = torch.full_like(tokens[:, :1], objective.bos_id)
    unseen = torch.cat([bos, tokens[:, :shortest]], 1)  # BOS in front, as in training
    ended = torch.zeros_like(prefixes, dtype=torch.bool)
    for position in range(shortest, draws.length):
        if objective.answers and ended.all():
            tokens[:, position:] = objective.eos_id
            draws.frame(0.0, tokens)
            draws.progress(draws.length, draws.length)
            break
        # Longer prefixes and what follows an end are read while other rows are continued: that call is not theirs.
        free = position >= prefixes
        draws.call(free & ~ended)
        logits = objective.network(unseen, None, cache=cache).logits[:, -1]
        drawn = draws.tokens(logits, 0, rows, torch.full_like(rows, position), forbidden=objective.mask_id)
        drawn = torch.where(ended, objective.eos_id, drawn)
        tokens[:, position] = torch.where(free, drawn, tokens[:, position])
        if objective.answers:
            ended |= free & (drawn == objective.eos_id)
        unseen = tokens[:, position : position + 1]
        if draws.record:
            shown = torch.where(draws.positions > position, objective.mask_id, tokens)
            draws.frame(1 - (position + 1) / draws.length, shown)
        draws.progress(position + 1, draws.length)
    return tokens
