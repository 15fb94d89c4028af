"""Cross-entropy of a linear layer's logits, over the rows that count, without the logits of all rows.

    total = sum_i w_i (nll_i + z lse_i^2),   nll_i = lse_i - logit_i[target_i],   lse_i = log sum_j exp(logit_ij)

z is the z-loss (PaLM, arXiv 2204.02311), which keeps the logits from drifting. See linear_loss.py for how rows are
taken, cross_entropy.py for a chunk's loss and gradient. Shape suffixes: N rows, M rows of a chunk, W width, V tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from braid.kernels.cross_entropy import Join, cross_entropy_
from braid.kernels.linear_loss import Rows, linear_loss


@dataclass(frozen=True)
class CrossEntropy:
    """The loss of each row, a `RowLoss`; what is known of a row is its nll."""

    targets_N: Tensor
    """int64; among the tokens of this process, or negative where another has it."""
    weights_N: Tensor
    """w, float32."""
    z_loss: float = 0.0
    without: int | None = None
    """Token, among those of this process, that has no probability."""
    num_tokens: int | None = None
    """Columns of this process from here on are padding."""
    join: Join | None = None
    """Where the tokens are divided among processes."""

    def __call__(self, logits_MV: Tensor, rows_M: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        targets_M, weights_M = self.targets_N[rows_M], self.weights_N[rows_M]
        if self.num_tokens is not None:
            logits_MV[:, self.num_tokens :].fill_(-torch.inf)
        nll_M, lse_M = cross_entropy_(logits_MV, targets_M, weights_M, self.z_loss, gradient, self.join, self.without)
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
    return linear_loss(hidden_NW, weight_VW, bias_V, rows, CrossEntropy(targets_N, weights_N, z_loss, without))
