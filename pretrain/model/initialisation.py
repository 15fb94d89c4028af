"""Initial values of the parameters: a pure function of (seed, parameter name, element), the same on every layout.

- adaLN, the output heads and the latent input start at zero: every block starts as the identity, the first logits
  are uniform and the latents are ignored.
- every other matrix is normal with variance 1 / (3 fan_in), fan_in being its last dimension. That is the variance of
  torch's default (kaiming-uniform with a = sqrt 5) which the published models use, and 0.021, the usual 0.02, at width
  768; unlike a fixed 0.02 it also suits the small widths of laptop runs. The gates start at zero, so no residual branch
  needs a factor for depth. The embedding table follows the same rule: every block normalises its input, so the scale
  only sets how fast Adam's steps of fixed size turn the embeddings.
- LayerNorm weights are 1 and biases 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from braid.kernels.random import initial_normal

ZERO_MODULES = ("adaln", "token_head.linear", "latent_head.linear", "latent_input.linear")


def starts_at_zero(name: str) -> bool:
    """Whether the parameter of this name is zero at the start of training."""
    module = name.rpartition(".")[0]
    return name.endswith("bias") or module.endswith(ZERO_MODULES)


def initial_values(seed: int, name: str, shape: torch.Size, std: float | None = None) -> Tensor:
    """Of the parameter of this fully qualified name, whole, float32 on the CPU. `std` is a standard deviation of its
    own (0 for zeros); without one the rules above hold."""
    if std is None and not starts_at_zero(name) and len(shape) == 1:
        return torch.ones(shape)
    if std is None:
        std = 0.0 if starts_at_zero(name) else 1 / math.sqrt(3 * shape[-1])
    return torch.zeros(shape) if std == 0 else initial_normal(seed, name, shape) * std
