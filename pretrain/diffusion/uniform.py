"""The uniform-state process on tokens: a noised token becomes any other with equal probability. UDLM, Duo (2506.10892).

q(x_t | x_0) = alpha_t [x_t = x_0] + (1 - alpha_t) / K over the K real tokens. The mask id, which every vocabulary has,
is outside the process: nothing becomes it, and its predicted probability is 0. Everything here takes tokens as indices;
no one-hot tensors are made.

What a denoiser must predict is the leave-one-out posterior p(x_0^l | x_t without position l): the reverse kernels
below weigh it with x_t^l themselves, so p(x_0^l | x_t) would count that evidence twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from braid.kernels.sampling import ReverseStep
from braid.parallel.vocabulary import Vocabulary

FLOAT64_CHUNK = 1 << 25
"""Logits looked at in float64 at a time: a quarter of a GB for each of the few tensors made of them."""


def skip_mask(integers: Tensor, mask_id: int) -> Tensor:
    """Integers in [0, K) to the K real token ids, in order; the mask's id may lie anywhere among them."""
    return integers + (integers >= mask_id)


def marginal_divergences(
    probabilities_BLV: Tensor,
    tokens_BL: Tensor,
    targets_BL: Tensor,
    survival_B: Tensor,
    noise_B: Tensor,
    vocabulary: Vocabulary | None = None,
) -> tuple[Tensor, Tensor]:
    """KL(q || p) in nats and the Itakura-Saito divergence q(x_t)/p(x_t) - log - 1, for the marginals of true and
    predicted clean tokens: q_j = survival [j = x_0] + noise, p_j = survival probabilities_j + noise. float64 [B, L].

    Up to a rate they are, added, the density of any interpolating process's NELBO (GIDD, arXiv 2503.04482): of the
    uniform process below and of the hybrid one. There the mask adds nothing to either: its probability is the same
    under q and p.

    With kappa = survival / noise everything is a function of log1p(kappa probabilities): the sum of it over the
    vocabulary, which has the precision of the probabilities, and its values at x_0 and x_t; the rest is float64. The
    probabilities of the mask must be 0, `survival` and `noise` above 0. `vocabulary` is given where the probabilities
    may be divided among processes.
    """
    vocabulary = vocabulary or Vocabulary(probabilities_BLV.shape[-1])
    kappa_B = survival_B / noise_B
    scaled_BLV = probabilities_BLV * kappa_B.to(probabilities_BLV.dtype)[:, None, None]
    places_BL2 = torch.stack([tokens_BL, targets_BL], -1)
    at_token_BL, at_target_BL = vocabulary.take(scaled_BLV, places_BL2).double().log1p().unbind(-1)
    total_BL = vocabulary.sum(scaled_BLV.log1p().sum(-1)).double()

    clean_B1, survival_B1, noise_B1 = kappa_B.log1p()[:, None], survival_B[:, None], noise_B[:, None]
    kl_BL = (survival_B1 + noise_B1) * clean_B1 - survival_B1 * at_target_BL - noise_B1 * total_BL
    log_ratio_BL = torch.where(tokens_BL == targets_BL, clean_B1, 0.0) - at_token_BL
    return kl_BL, log_ratio_BL.expm1() - log_ratio_BL


@dataclass(frozen=True)
class MarginalDivergence:
    """A `RowLoss` of logits: both marginal divergences, added and weighted; what is known of a row is their sum. All
    tensors have the N rows as their one dimension; `survival`, `noise` and `weights` are float64."""

    tokens: Tensor
    targets: Tensor
    survival: Tensor
    noise: Tensor
    weights: Tensor
    mask_id: int
    vocabulary: Vocabulary
    precise: bool = False
    """The vocabulary-wide part is float64 too, a few rows at a time."""

    def __call__(self, logits_MV: Tensor, rows_M: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
        some = max(1, FLOAT64_CHUNK // logits_MV.shape[1]) if self.precise else len(logits_MV)
        pieces = zip(logits_MV.split(some), rows_M.split(some), strict=True)
        nats = torch.cat([self._exactly(logits, rows, gradient) for logits, rows in pieces])
        return self.weights[rows_M] * nats, nats

    def _exactly(self, logits_MV: Tensor, rows_M: Tensor, gradient: bool) -> Tensor:
        exact = logits_MV.to(torch.float64 if self.precise else torch.promote_types(logits_MV.dtype, torch.float32))
        nats = self._nats(exact, rows_M, gradient)
        if exact.dtype != logits_MV.dtype:
            logits_MV.copy_(exact)
        return nats

    def _nats(self, logits_MV: Tensor, rows_M: Tensor, gradient: bool) -> Tensor:
        vocabulary = self.vocabulary
        p_MV = vocabulary.softmax_(vocabulary.without_(vocabulary.logits(logits_MV), self.mask_id))
        tokens, targets = self.tokens[rows_M][:, None], self.targets[rows_M][:, None]
        law = self.survival[rows_M], self.noise[rows_M]
        kl, ratio = marginal_divergences(p_MV[:, None], tokens, targets, *law, vocabulary)
        if gradient:
            self._to_gradient(p_MV, rows_M)
        return (kl + ratio).squeeze(1)

    def _to_gradient(self, p_MV: Tensor, rows_M: Tensor) -> None:
        """Overwrite the probabilities by the gradient of the weighted sum with respect to the logits.

        With s = kappa p and u_j = s_j df/ds_j it is u - p sum(u), and u is -noise s_j / (1 + s_j), with more of the
        kind at x_0 (from the true marginal there) and at x_t (from the ratio).
        """
        each = (self.tokens, self.targets, self.survival, self.noise, self.weights)
        tokens, targets, survival, noise, weights = (values[rows_M] for values in each)
        vocabulary, kappa = self.vocabulary, survival / noise
        places_M2 = torch.stack([tokens, targets], -1)
        scaled_M2 = kappa[:, None] * vocabulary.take(p_MV, places_M2).double()
        true = torch.where(tokens == targets, kappa, 0.0)
        excess = (true - scaled_M2[:, 0]) / (1 + scaled_M2[:, 0])  # q(x_t) / p(x_t) - 1
        extra_M2 = -torch.stack([excess, survival], -1) * scaled_M2 / (1 + scaled_M2)
        scaled_MV = p_MV * kappa.to(p_MV.dtype)[:, None]
        share_MV = scaled_MV.div_(1 + scaled_MV)
        total = extra_M2.sum(1) - noise * vocabulary.sum(share_MV.sum(1)).double()
        p_MV.mul_((-weights * total).to(p_MV.dtype)[:, None])
        p_MV.addcmul_(share_MV, (-weights * noise).to(p_MV.dtype)[:, None])
        vocabulary.add_(p_MV, places_M2, (weights[:, None] * extra_M2).to(p_MV.dtype))


def jump_weight(tokens_BL: Tensor, targets_BL: Tensor, survival_B: Tensor, num_tokens: int) -> Tensor:
    """What both marginal divergences are multiplied by in the NELBO density, in nats per unit of survival lost: times
    -alpha'_t it is per unit of time. float64 [B, L].

    The density is the rate of KL between the true reverse jumps and those of the predicted x_0 (UDLM; Duo, equation of
    the NELBO): R(x_t) / q(x_t), R = 1 / (alpha K) being the rate of jumps to x_t.
    """
    noise_B = (1 - survival_B) / num_tokens
    q_BL = torch.where(tokens_BL == targets_BL, (survival_B + noise_B)[:, None], noise_B[:, None])
    return 1 / (num_tokens * survival_B[:, None] * q_BL)


def decoding_nats(survival: float, noise: float, num_tokens: int, mask_probability: float = 0.0) -> float:
    """E[-log p(x_0 | x_t)] per token when x_t is decoded without a network: by Bayes' rule from equally likely tokens.

    Ends a bound at the smallest time. `noise` is the probability of each of the K tokens, `survival` comes on top at
    x_0, and a masked token says nothing. No more than 0.0003 nats at t = 1e-5 and K = 50257.
    """
    visible = survival + num_tokens * noise
    same = survival + noise
    nats = mask_probability * math.log(num_tokens) - same * math.log(same / visible)
    return nats - (num_tokens - 1) * noise * math.log(noise / visible) if noise > 0 else nats


def reverse_step(survival_t: float, survival_s: float, num_tokens: int) -> ReverseStep:
    """p(x_s | x_t) for a step from t to an earlier s, the mask outside.

    q(x_t | x_s) times the predicted marginal alpha_s p + (1 - alpha_s) / K: Bayes' rule for x_s, exact where the
    denoiser is the leave-one-out posterior.
    """
    ratio = survival_t / survival_s
    arrives = (1 - ratio) / num_tokens
    return ReverseStep(survival_s, (1 - survival_s) / num_tokens, 0.0, ratio, arrives, arrives)
