"""Cross-entropy of a linear layer's logits, over the rows that count, without the logits of all rows.

    total = sum_i w_i (nll_i + z lse_i^2),   nll_i = lse_i - logit_i[target_i],   lse_i = log sum_j exp(logit_ij)

z is the z-loss (PaLM, arXiv 2204.02311), which keeps the logits from drifting. The gradient of the total with respect
to a row's logits is w (1 + 2 z lse) softmax(logits) - w [j = target]. See linear_loss.py for how rows are taken.

Shape suffixes: N rows, M rows of a chunk, W width, V tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .linear_loss import Rows, linear_loss

Join = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""Of each row: the largest logit, the sum of the exponentials of all logits less that, and the target's logit (0 where
another process has it). From those of this process's tokens to those of all tokens, float32 [M] each."""


@dataclass(frozen=True)
class CrossEntropy:
    """The loss of each row, a `RowLoss`; what is known of a row is its nll."""

    targets_N: Tensor
    """int64; among the tokens of this process, or negative where another has it."""
    weights_N: Tensor
    """w, float32."""
    z_loss: float = 0.0
    without: Sequence[slice] = ()
    """Columns that are no tokens, or not to be predicted: their logits count as -inf."""
    join: Join | None = None
    """Where the tokens are divided among processes."""

    def __call__(self, logits_MV: Tensor, rows_M: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        weights_M = self.weights_N[rows_M].to(logits_MV.dtype)
        for columns in self.without:
            logits_MV[:, columns].fill_(-torch.inf)
        nll_M, lse_M = cross_entropy_(logits_MV, self.targets_N[rows_M], weights_M, self.z_loss, gradient, self.join)
        loss_M = nll_M + self.z_loss * lse_M.square() if self.z_loss else nll_M
        return weights_M * loss_M, nll_M


def linear_cross_entropy(
    hidden_NW: Tensor,
    weight_VW: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    weights_N: Tensor,
    *,
    rows: Rows | None = None,
    z_loss: float = 0.0,
    without: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The total above over `rows` (None: all), a float64 scalar that can be differentiated once, and the nll of each
    row, float64 [N] without gradient, 0 at rows that do not count. Token `without` has no probability."""
    rows = rows or Rows(torch.ones_like(targets_N, dtype=torch.bool))
    columns = () if without is None else (slice(without, without + 1),)
    return linear_loss(hidden_NW, weight_VW, bias_V, rows, CrossEntropy(targets_N, weights_N, z_loss, columns))


def cross_entropy_(
    logits_MV: Tensor, targets_M: Tensor, weights_M: Tensor, z_loss: float, gradient: bool, join: Join | None = None
) -> tuple[Tensor, Tensor]:
    """nll and lse of each row. The logits are used up: with `gradient`, they become that of sum w (nll + z lse^2)."""
    place_M1 = targets_M.clamp(min=0)[:, None]
    at_target_M = logits_MV.gather(1, place_M1).squeeze(1)
    # Never -inf: where a process has no token at all, the exponentials of what it has are to be 0 and not NaN.
    largest_M = logits_MV.amax(1).clamp_(min=torch.finfo(logits_MV.dtype).min)
    sum_M = logits_MV.sub_(largest_M[:, None]).exp_().sum(1)
    largest, total = largest_M, sum_M
    if join is not None:
        at_target_M = at_target_M.masked_fill(targets_M < 0, 0)
        largest, total, at_target_M = join(largest_M, sum_M, at_target_M)
    log_total = total.log()
    nll_M, lse_M = log_total - (at_target_M - largest), log_total + largest
    if gradient:
        scale_M = weights_M * (1 + 2 * z_loss * lse_M) / total
        logits_MV.mul_((scale_M * (largest_M - largest).exp())[:, None])
        at_target_M1 = logits_MV.gather(1, place_M1) - weights_M.masked_fill(targets_M < 0, 0)[:, None]
        logits_MV.scatter_(1, place_M1, at_target_M1)
    return nll_M, lse_M
