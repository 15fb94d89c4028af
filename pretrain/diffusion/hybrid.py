"""The hybrid process on tokens: masks and uniform noise mixed (GIDD, arXiv 2503.04482).

q(x_t | x_0) = [(1 - t) [x_t = x_0] + t [x_t = mask] + c_t u(x_t)] / C_t, C_t = 1 + c_t, u uniform over the K real
tokens, c_t = B t^(g/2) (1-t)^(g/2), B = 2^g p_u / (1 - p_u): at t = 1/2 a share p_u of all tokens is uniform noise. At
both ends there is none: the process starts clean and ends all masked. p_u = 0 is masked diffusion with survival 1 - t.
With p_u > 0 the denoiser's target is the leave-one-out posterior, as in `uniform.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from braid.kernels.sampling import ReverseStep
from braid.parallel.vocabulary import Vocabulary

from .uniform import MarginalDivergence, decoding_nats

TIME_MIN = 1e-5


@dataclass(frozen=True)
class Hybrid:
    """The process over `num_tokens` real tokens (K). All functions of time take and give float64."""

    p_uniform: float
    gamma: float
    num_tokens: int

    def __post_init__(self) -> None:
        # Above 2, c_t falls faster towards t = 1 than tokens are masked: a negative rate of uniform jumps.
        assert 0 <= self.p_uniform < 1 and 0 < self.gamma <= 2

    @property
    def scale(self) -> float:
        """B."""
        return 2**self.gamma * self.p_uniform / (1 - self.p_uniform)

    def uniform_part(self, t: Tensor) -> Tensor:
        """c_t."""
        return self.scale * (t * (1 - t)) ** (self.gamma / 2)

    def survival(self, t: Tensor) -> Tensor:
        """alpha_t: probability that a token is itself for another reason than chance."""
        return (1 - t) / (1 + self.uniform_part(t))

    def mask_probability(self, t: Tensor) -> Tensor:
        """Probability of the mask."""
        return t / (1 + self.uniform_part(t))

    def noise(self, t: Tensor) -> Tensor:
        """Probability of each real token by uniform noise: c_t / (C_t K)."""
        c = self.uniform_part(t)
        return c / ((1 + c) * self.num_tokens)

    def elbo_weight(self, tokens_BL: Tensor, targets_BL: Tensor, times_B: Tensor, mask_id: int) -> Tensor:
        """R_t(x_t) / q_t(x_t | x_0): rate of jumps to x_t over its probability; what the divergences of the marginals
        are multiplied by in the NELBO per unit of time. float64 [B, L]."""
        t, c = times_B[:, None], self.uniform_part(times_B)[:, None]
        spread = (t + self.gamma / 2 * (1 - 2 * t)) / t  # 1 + (1 - t) c'/c
        other = spread / (1 - t)
        same = spread * c / (self.num_tokens * (1 - t) * (1 - t + c / self.num_tokens))
        visible = torch.where(tokens_BL == targets_BL, same, other)
        return torch.where(tokens_BL == mask_id, 1 / (t * (1 - t)), visible)

    def dynamic_weight(self, tokens_BL: Tensor, targets_BL: Tensor, times_B: Tensor, mask_id: int) -> Tensor:
        """Training weight "dynamic": 2 at masks, 1 at wrong tokens, (B / K) (t / (1-t))^(g/2) at right ones, at most 2.
        float64 [B, L].

        The NELBO's weights up to a factor of time, exactly so at g = 1 and a large vocabulary. (The released code has
        exp(g/2 sigmoid(-t)) for the last power; at K = 50257 either is below 1e-3 where it counts.)
        """
        odds = (times_B / (1 - times_B))[:, None]
        same = (self.scale / self.num_tokens * odds ** (self.gamma / 2)).clamp(max=2)
        visible = torch.where(tokens_BL == targets_BL, same, 1.0)
        return torch.where(tokens_BL == mask_id, 2.0, visible)

    def divergence(
        self,
        tokens_BL: Tensor,
        targets_BL: Tensor,
        times_B: Tensor,
        weights_BL: Tensor,
        *,
        mask_id: int,
        vocabulary: Vocabulary,
        precise: bool = False,
    ) -> MarginalDivergence:
        """KL plus Itakura-Saito divergence of the marginals q_t(. | x_0) and q_t(. | softmax(logits)) at x_t in nats,
        as a loss of the logits of each position, times weights float64. With uniform noise only: without, it is (1 - t)
        times the cross-entropy of a masked token; a visible one's is infinite but has weight 0.
        """
        assert self.p_uniform > 0
        survival, noise = (of(times_B)[:, None].expand(tokens_BL.shape) for of in (self.survival, self.noise))
        each = (tokens_BL, targets_BL, survival, noise, weights_BL)
        return MarginalDivergence(*(values.flatten() for values in each), mask_id, vocabulary, precise)

    def bound_times(self, strata_B: Tensor) -> tuple[Tensor, Tensor]:
        """Times in [time_min, 1) for u in [0, 1), and dt/du: a mean of dt/du times the density estimates its integral.

        Uniform noise makes the density grow like t^(g/2 - 1) towards t = 0, so there t^(g/2) is spread evenly.
        """
        power = 2 / self.gamma if self.p_uniform > 0 else 1.0
        root_B = TIME_MIN + (1 - TIME_MIN) * strata_B
        return root_B**power, (1 - TIME_MIN) * power * root_B ** (power - 1)

    def end_nats(self) -> float:
        """What the bound pays per token outside those times. Decoding x_0 at the smallest time, where c_t is B * 1e-5;
        at t = 1 all tokens are masked in the process and in the model alike, so there is no prior term."""
        t = self.bound_times(torch.zeros(1, dtype=torch.float64))[0]
        noise = float(self.noise(t))
        return decoding_nats(float(self.survival(t)), noise, self.num_tokens, float(self.mask_probability(t)))

    def posterior_nats(
        self, clean_BL: Tensor, shown_BL: Tensor, same_BL: Tensor, masked_BL: Tensor, times_B: Tensor
    ) -> Tensor:
        """-log p(x_0 | x_t) of each token by Bayes' rule, float64 [B, L], for a prediction p of which -log p(x_0)
        (`clean`) and -log p(x_t) (`shown`; not looked at where x_t is masked) are given: the reverse step from t to 0.
        """
        survival, noise = self.survival(times_B)[:, None], self.noise(times_B)[:, None]
        likelihood = torch.where(same_BL, survival, 0.0) + noise
        evidence = survival * torch.exp(-shown_BL.double()) + noise
        return clean_BL.double() + torch.where(masked_BL, 0.0, evidence.log() - likelihood.log())

    def reverse_step(self, t: float, s: float) -> ReverseStep:
        """p(x_s | x_t) for a step from t to an earlier s: q(x_t | x_s) times the marginal at s of the predicted clean
        tokens (CCDD's spec calls it the GIDD posterior)."""
        at = torch.tensor([s, t], dtype=torch.float64)
        survival_s, survival_t = self.survival(at).tolist()
        mask_s, mask_t = self.mask_probability(at).tolist()
        noise_s, noise_t = self.noise(at).tolist()
        ratio = survival_t / survival_s
        return ReverseStep(
            survival_s,
            noise_s,
            mask_s,
            ratio,
            arrives_at_mask=mask_t - ratio * mask_s,
            arrives=noise_t - ratio * noise_s,
        )
