"""A learned noise schedule: gamma(t) = gamma_0 + (gamma_1 - gamma_0) g(t), g monotone from g(0) = 0 to g(1) = 1.

The endpoints are two free numbers, the interior is a monotone network (VDM, arXiv 2107.00630; Plaid, 2305.18619;
RePlaid, 2605.18530). What the endpoints and the interior are trained for differs: see objectives/replaid.py. Values of
parameters are float32, everything computed from them is float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from braid.kernels.random import initial_normal

NUM_HIDDEN = 1024
OUTPUT_SCALE = 0.01


class MonotoneNetwork(nn.Module):
    """raw(t) = sum_j w2_j tanh(w1_j (t - 1/2) + b_j) with positive w1 and w2, normalised to [0, 1]."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        for name in ("input", "bias", "output"):
            self.register_parameter(name, nn.Parameter(initial_normal(seed, f"schedule.{name}", (NUM_HIDDEN,))))

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """g(t) and g'(t), float64, for float64 t of any shape in [0, 1]."""
        w1 = F.softplus(self.input.double())
        w2 = OUTPUT_SCALE * F.softplus(self.output.double())
        times = torch.cat([t.new_tensor([0.0, 1.0]), t.flatten()])
        hidden = torch.tanh(w1 * (times[:, None] - 0.5) + self.bias.double())
        raw = (w2 * hidden).sum(-1)
        span = raw[1] - raw[0]
        # The derivative in closed form: no second differentiation in the backward pass.
        slope = (w1 * w2 * (1 - hidden[2:].square())).sum(-1) / span
        return ((raw[2:] - raw[0]) / span).view_as(t), slope.view_as(t)


class Schedule(nn.Module):
    """gamma(t), one of three kinds: `learned`; `frozen`, the network at its random initial values and fixed endpoints;
    `linear`, gamma linear in t with fixed endpoints."""

    def __init__(self, kind: str, *, gamma_0: float, gamma_1: float, seed: int) -> None:
        super().__init__()
        assert kind in ("learned", "frozen", "linear"), kind
        assert gamma_0 < gamma_1, "noise grows with time"
        # One element each: DeepSpeed cannot divide what has no dimension.
        self.gamma_0 = nn.Parameter(torch.tensor([gamma_0], dtype=torch.float32))
        self.gamma_1 = nn.Parameter(torch.tensor([gamma_1], dtype=torch.float32))
        self.interior = None if kind == "linear" else MonotoneNetwork(seed)
        self.requires_grad_(kind == "learned")

    def normalised(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """g(t) and g'(t) for float64 t in [0, 1]."""
        return (t, torch.ones_like(t)) if self.interior is None else self.interior(t)

    @property
    def span(self) -> Tensor:
        """gamma_1 - gamma_0, float64: gamma'(t) = span g'(t)."""
        return (self.gamma_1.double() - self.gamma_0.double())[0]

    def gamma(self, g: Tensor) -> Tensor:
        """gamma for a normalised g in [0, 1]; float64."""
        return self.gamma_0.double()[0] + self.span * g

    def forward(self, t: Tensor) -> Tensor:
        """gamma(t), float64."""
        return self.gamma(self.normalised(t)[0])
