"""Cross-entropy and its gradient in plain torch operations. See `cross_entropy.py`."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy_into(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    z_loss: float,
    left_out: int,
    statistics: bool,
    gradient: bool,
    largest: Tensor,
    total: Tensor,
    at_target: Tensor,
) -> None:
    """`statistics` fills the last three, [M]; `gradient` reads them and overwrites the logits [M, V]."""
    if left_out >= 0 and logits.shape[1]:
        logits[:, left_out] = -torch.inf
    place = targets.clamp(min=0)[:, None]
    values = logits.to(largest.dtype)
    if statistics:
        at_target.copy_(values.gather(1, place).squeeze(1).masked_fill_(targets < 0, 0))
        # Never -inf: where a process has no token at all, the exponentials of what it has are to be 0 and not NaN.
        largest.copy_(values.amax(1).clamp_(min=torch.finfo(largest.dtype).min))
        total.copy_((values - largest[:, None]).exp_().sum(1, dtype=torch.float64))
    if gradient:
        scale = weights / total
        if z_loss:
            scale = scale * (1 + 2 * z_loss * (largest.double() + total.log()))
        found = (values - largest[:, None]).exp_().mul_(scale.to(largest.dtype)[:, None])
        found.scatter_add_(1, place, -weights.masked_fill(targets < 0, 0)[:, None])
        logits.copy_(found.masked_fill_((weights == 0)[:, None], 0))
