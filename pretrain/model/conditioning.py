"""Time conditioning: the embedding of the diffusion time and the adaLN modulation it drives (DiT, arXiv 2212.09748).

Shape suffixes of this package: B sequences, L positions, W model width, C conditioning width, H heads, K head
dimension, V vocabulary, D latent dimension. x_BLW is a tensor of shape [B, L, W].
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from braid.kernels.norms import layer_norm
from braid.parallel.accumulation import autocast_dtype
from braid.parallel.layers import OutputLinear

SINUSOID_DIM = 256
MAX_PERIOD = 10000.0


def sinusoid(times_B: Tensor, dim: int = SINUSOID_DIM) -> Tensor:
    """Sinusoidal features [B, dim] in float32: dim/2 cosines, then dim/2 sines, of t / MAX_PERIOD^(2i/dim).

    `times_B` is the raw time in [0, 1], not scaled, as in the MDLM, Duo, GIDD and CCDD lines.
    """
    half = dim // 2
    exponents = torch.arange(half, device=times_B.device, dtype=torch.float32) / half
    angles = times_B.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """c = SiLU(MLP(sinusoid(t))), [B] -> [B, C]. In float32 even under autocast: bfloat16 cannot tell 0.998 from 1."""

    in_float32: ClassVar = ("input", "output")

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.input = nn.Linear(SINUSOID_DIM, cond_dim)
        self.output = nn.Linear(cond_dim, cond_dim)

    def forward(self, times_B: Tensor) -> Tensor:
        with torch.autocast(times_B.device.type, enabled=False):
            return F.silu(self.output(F.silu(self.input(sinusoid(times_B)))))


class LayerNorm(nn.Module):
    """LayerNorm with a weight and no bias, computed in and returned as float32 whatever autocast says."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight)


class Modulation(nn.Linear):
    """adaLN: [B, C] -> `count` vectors [B, 1, width], from one linear layer that starts at zero (adaLN-Zero).

    Shifts, scales and gates all start at 0, so a block starts as the identity.
    """

    def __init__(self, cond_dim: int, width: int, count: int) -> None:
        super().__init__(cond_dim, count * width)
        self.count = count

    def forward(self, c_BC: Tensor) -> tuple[Tensor, ...]:
        return super().forward(c_BC)[:, None, :].chunk(self.count, dim=-1)


def modulate(x_BLW: Tensor, shift_B1W: Tensor, scale_B1W: Tensor) -> Tensor:
    """x (1 + scale) + shift."""
    return x_BLW * (1 + scale_B1W) + shift_B1W


class ModulatedLinear(nn.Module):
    """LayerNorm, adaLN shift and scale, linear layer: the output heads and CCDD's latent input. All but the norm start
    at zero where the network has no rule of its own. At the latent input the norm discards the length of the noisy
    vector, as in the published model."""

    def __init__(self, in_features: int, out_features: int, cond_dim: int) -> None:
        super().__init__()
        self.norm = LayerNorm(in_features)
        self.adaln = Modulation(cond_dim, in_features, 2)
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, x: Tensor, c_BC: Tensor) -> Tensor:
        return self.linear(modulate(self.norm(x), *self.adaln(c_BC)))


class TokenHead(ModulatedLinear):
    """The output head of tokens, in two steps: what its linear layer reads, in the dtype of products, and that layer,
    which whoever needs logits calls (`TokenLogits`)."""

    def __init__(self, width: int, vocab_size: int, cond_dim: int) -> None:
        super().__init__(width, vocab_size, cond_dim)
        self.linear = OutputLinear(width, vocab_size)

    def forward(self, x_BLW: Tensor, c_BC: Tensor) -> Tensor:
        return modulate(self.norm(x_BLW), *self.adaln(c_BC)).to(autocast_dtype(x_BLW))
