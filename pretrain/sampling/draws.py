"""What a sampler draws from and reports to: keyed noise, exact token draws, the count of network calls, the record.

Every draw is keyed by (seed, sample ordinal, position, step), so a sample does not depend on how samples are batched.
Tokens are drawn exactly (braid.kernels.sampling), after temperature and nucleus.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from braid.kernels import random
from braid.kernels.random import Stream, fold_key
from braid.kernels.sampling import ReverseStep, draw_tokens
from braid.parallel.vocabulary import Vocabulary
from braid.pretrain.config.schema import SamplingConfig


@dataclass
class Draws:
    """One batch of N samples of L tokens while it is drawn."""

    key: int
    ordinals: Tensor
    """int64 [N] on the device of the samples."""
    length: int
    settings: SamplingConfig
    sampler: str
    """The sampler in use: `settings.sampler`, or the objective's default."""
    vocabulary: Vocabulary | None = None
    """Given where the network's logits may be divided among processes, which then all draw the same samples."""
    record: bool = False
    progress: Callable[[int, int], None] = lambda done, total: None
    """Told the steps done and their total."""
    frames: list[dict] = field(default_factory=list)
    """State of the first sample after each step, where recording was asked for: time, tokens, latent_norm."""

    def __post_init__(self) -> None:
        self.device = self.ordinals.device
        self.positions = torch.arange(self.length, device=self.device)
        self.num_calls = torch.zeros(len(self.ordinals), dtype=torch.int64, device=self.device)

    def times(self, num_steps: int, last: float = 0.0) -> list[float]:
        """The grid 1 = t_0 > ... > t_steps = 0, evenly spaced: `num_steps` + 1 times. Or evenly down to `last`, the
        time of the last call, and from there to 0."""
        if last > 0:
            return [*torch.linspace(1, last, num_steps, dtype=torch.float64).tolist(), 0.0]
        return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64).tolist()

    def batch_times(self, t: float) -> Tensor:
        """The time t for every sample, float64 [N]."""
        return torch.full((len(self.ordinals),), t, dtype=torch.float64, device=self.device)

    def call(self, rows: Tensor | None = None) -> None:
        """Count one call of the network for all samples, or for those of `rows` (bool [N])."""
        self.num_calls += 1 if rows is None else rows.long()

    def step_key(self, step: int) -> int:
        """The key of everything drawn in a step."""
        return fold_key(self.key, "step", step)

    def uniforms(self, step: int, *, word: int = 0) -> Tensor:
        """float32 [N, L] in [0, 1)."""
        return random.uniform(self.step_key(step), Stream.TOKEN, self.ordinals, self.positions, word=word)

    def normals(self, step: int, num_positions: int, num_channels: int, *, purpose: str = "latent") -> Tensor:
        """Standard normals, float32 [N, num_positions, num_channels]; another `purpose` gives independent ones."""
        key = self.step_key(step) if purpose == "latent" else fold_key(self.step_key(step), purpose)
        positions = torch.arange(num_positions, device=self.device)
        return random.normal(key, self.ordinals, positions, num_channels)

    def fixed_normals(self, num_positions: int, num_channels: int, *, purpose: str = "latents") -> Tensor:
        """Normals that belong to the sample and to no step: where a chain starts, what known positions keep."""
        positions = torch.arange(num_positions, device=self.device)
        return random.normal(fold_key(self.key, purpose), self.ordinals, positions, num_channels)

    def tokens(
        self,
        logits_RV: Tensor,
        step: int,
        rows_M: Tensor,
        columns_M: Tensor,
        *,
        forbidden: int,
        places_M: Tensor | None = None,
        unguided_RV: Tensor | None = None,
        reverse: ReverseStep | None = None,
        noisy_M: Tensor | None = None,
        greedy: bool = False,
    ) -> Tensor:
        """Token ids int64 [M] for the places (row, column) of the batch, from the network's logits: their rows
        `places_M`, or all in order. Guidance where there are `unguided_RV` logits, temperature, nucleus, then an exact
        draw, or one from the `reverse` step of a process whose x_t is `noisy_M`; or, if `greedy`, the most probable
        token. The token `forbidden` (the mask) is never predicted."""
        if self.vocabulary is not None and self.vocabulary.divided:
            logits_RV, unguided_RV = (
                each if each is None else self.whole(each if places_M is None else each[places_M])
                for each in (logits_RV, unguided_RV)
            )
            places_M = None
        return draw_tokens(
            self.step_key(step),
            logits_RV,
            self.ordinals[rows_M],
            columns_M,
            rows=places_M,
            other=unguided_RV,
            guidance=self.settings.guidance,
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
            left_out=forbidden,
            step=reverse,
            noisy=noisy_M,
            greedy=greedy,
        )

    def whole(self, logits: Tensor) -> Tensor:
        """The network's logits of all tokens, [..., V]."""
        return logits if self.vocabulary is None else self.vocabulary.gather(logits)

    def frame(self, time: float, tokens_NL: Tensor, latents: Tensor | None = None) -> None:
        """Record the first sample: its tokens, and the mean norm of its latents [N, ..., D]."""
        if self.record:
            norm = None if latents is None else float(latents[0].norm(dim=-1).mean())
            self.frames.append({"time": time, "tokens": tokens_NL[0].tolist(), "latent_norm": norm})
