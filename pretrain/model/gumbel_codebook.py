"""Di-LADD's other quantiser, for an encoder that is learnt: it says logits of the codes, whose vectors are learnt too.

LADD (arXiv 2510.18114) by straight-through Gumbel-softmax. In training a code is drawn from its law; everywhere else it
is the most probable one, a function of the text, so that bounds need no entropy term. Shapes: B sequences, S slots, K
codes, D dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from braid.kernels.random import initial_normal
from braid.pretrain.diffusion.gumbel import straight_through


class GumbelCodebook(nn.Module):
    """K learnt vectors, and how often the last global batch used them."""

    def __init__(self, num_codes: int, dim: int, *, seed: int) -> None:
        super().__init__()
        start_KD = F.normalize(initial_normal(seed, "codebook", (num_codes, dim)), dim=-1)
        self.vectors = nn.Parameter(start_KD)
        self.register_buffer("members", torch.zeros(num_codes, dtype=torch.float64, device="cpu"))

    def quantise(self, logits_BSK: Tensor) -> tuple[Tensor, Tensor]:
        """(code vectors [B, S, D], codes int64 [B, S]) of the most probable codes."""
        codes_BS = logits_BSK.argmax(-1)
        return self.vectors[codes_BS], codes_BS

    def draw(self, logits_BSK: Tensor, gumbel_BSK: Tensor, tau: float) -> tuple[Tensor, Tensor]:
        """The same of codes drawn from softmax(logits), with straight-through gradients for the logits."""
        codes_BS, weights_BSK = straight_through(logits_BSK, gumbel_BSK, tau)
        return self.vectors[codes_BS] + weights_BSK @ self.vectors.detach(), codes_BS

    @torch.no_grad()
    def statistics(self, codes_BS: Tensor) -> dict[str, Tensor]:
        """What `update` needs of these sequences, to be summed over the global batch."""
        zeros_K = torch.zeros(len(self.vectors), dtype=torch.float64, device=codes_BS.device)
        codes = codes_BS.flatten()
        return {"code_members": zeros_K.index_add(0, codes, torch.ones_like(codes, dtype=torch.float64))}

    @torch.no_grad()
    def update(self, statistics: dict[str, Tensor]) -> None:
        self.members.copy_(statistics["code_members"])

    def usage(self) -> tuple[Tensor, Tensor]:
        """Perplexity of the codes in the last global batch (0 before the first), and 0: none is ever replaced."""
        share_K = self.members / self.members.sum().clamp(min=1)
        entropy = -(share_K * share_K.clamp(min=1e-300).log()).sum()
        return torch.where(self.members.sum() > 0, entropy.exp(), 0.0), torch.zeros_like(entropy)
