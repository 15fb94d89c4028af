"""Cross-entropy of rows of logits together with its gradient, which overwrites them: one pass to read, one to write.

    nll_i = lse_i - logit_i[target_i],   lse_i = log sum_j exp(logit_ij)

The gradient of sum_i w_i (nll_i + z lse_i^2), z being the z-loss of PaLM (arXiv 2204.02311), with respect to row i is
w_i (1 + 2 z lse_i) softmax(logits_i) - w_i [j = target_i]. Where the tokens are divided among processes it takes two
halves, with what all rows of all processes have in common exchanged in between (`Join`).

Exponentials are float32 and sums float64: against float64 throughout, the probabilities in the gradient are right to
2e-6, relatively, down to e^-30 of the largest.

Shape suffixes: M rows, V tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from braid.kernels import cross_entropy_eager, dispatch

Join = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""Of each row: the largest logit, the sum of the exponentials of all logits less that, and the target's logit (0 where
another process has it). From those of this process's tokens to those of all tokens, [M] each."""


def cross_entropy_(
    logits_MV: Tensor,
    targets_M: Tensor,
    weights_M: Tensor,
    z_loss: float = 0.0,
    gradient: bool = True,
    join: Join | None = None,
    left_out: int | None = None,
) -> tuple[Tensor, Tensor]:
    """nll and lse of each row, [M], float32 (float64 for float64 logits).

    With `gradient` the logits, of any float type, become the one above; without, they may or may not be kept. Weights
    w are in the gradient, not in the nll; a row of weight 0 gets a gradient of 0. Targets are int64, negative where
    another process has them; token `left_out` has no probability. A target beyond the tokens is an error or NaN.
    """
    exact = torch.promote_types(logits_MV.dtype, torch.float32)
    sums = torch.float64
    largest_M, at_target_M = (torch.empty(len(logits_MV), dtype=exact, device=logits_MV.device) for _ in range(2))
    total_M = torch.empty(len(logits_MV), dtype=sums, device=logits_MV.device)
    functions = cross_entropy_eager
    if logits_MV.dtype in (torch.float32, torch.bfloat16) and logits_MV.stride(1) == 1:
        functions = dispatch.functions("cross_entropy", logits_MV.device)

    def run(statistics: bool, gradient: bool) -> None:
        functions.cross_entropy_into(
            logits_MV, targets_M.contiguous(), weights_M.to(exact).contiguous(), z_loss,
            -1 if left_out is None else left_out, statistics, gradient, largest_M, total_M, at_target_M,
        )  # fmt: skip

    if join is None:
        run(True, gradient)
    else:
        run(True, False)
        joined = join(largest_M, total_M, at_target_M)
        largest_M, total_M, at_target_M = (
            each.to(dtype).contiguous() for each, dtype in zip(joined, (exact, sums, exact), strict=True)
        )
        if gradient:
            run(False, True)
    log_total_M = total_M.log()
    nll_M = log_total_M - (at_target_M.double() - largest_M.double())
    return nll_M.to(exact), (log_total_M + largest_M.double()).to(exact)
