"""The masked (absorbing) process on tokens: MDLM, arXiv 2406.07524, with the SUBS parametrisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from braid.parallel.vocabulary import Vocabulary


def without_mask(logits: Tensor, mask_id: int) -> Tensor:
    """Logits with the mask's set to -inf: the clean text never contains it (SUBS, before any normalisation)."""
    return Vocabulary(logits.shape[-1]).without(logits, mask_id)


def masked_cross_entropy(logits_BLV: Tensor, targets_BL: Tensor, masked_BL: Tensor, mask_id: int) -> Tensor:
    """-log p(x_0 | x_t) in nats at masked positions, exactly 0 elsewhere (SUBS: a visible token is known). [B, L]

    Of logits that are there; see `TokenLogits.cross_entropy` for those of a wide vocabulary.
    """
    logits = without_mask(logits_BLV, mask_id).flatten(0, -2)
    nats_BL = F.cross_entropy(logits, targets_BL.flatten(), reduction="none").view_as(targets_BL)
    return torch.where(masked_BL, nats_BL, 0.0)


def unmask_probability(alpha_t: float, alpha_s: float) -> float:
    """Probability that a masked token is revealed between times t and s < t: (alpha_s - alpha_t) / (1 - alpha_t)."""
    return (alpha_s - alpha_t) / (1 - alpha_t)
