"""What the tests of likelihoods compare with: closed forms in float64, a toy law, its Bayes denoiser, given noise."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from braid.kernels import random
from braid.kernels.random import Stream
from braid.parallel.layers import ALONE
from braid.parallel.vocabulary import Vocabulary
from braid.pretrain.diffusion.gaussian import noised
from braid.pretrain.model.backbone import Prediction
from braid.pretrain.model.joint import JointPrediction
from braid.pretrain.model.token_logits import TokenLogits
from braid.pretrain.objectives.base import Noise

from .conftest import MASK, VOCAB


def float64_nats(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log softmax over the vocabulary without the mask, written out in float64."""
    logits = logits.double()
    clean = torch.cat([logits[..., :MASK], logits[..., MASK + 1 :]], -1)
    assert targets.max() < MASK
    return torch.logsumexp(clean, -1) - logits.gather(-1, targets[..., None]).squeeze(-1)


def replacements(noise: Noise, num_positions: int, n: int) -> torch.Tensor:
    """The draws in [0, n) that replace corrupted tokens, int64 [B, L]."""
    positions = torch.arange(num_positions)
    return random.integers(noise.key, Stream.TOKEN, noise.ordinals, positions, n, draw=noise.draw)


def toy_law(length: int, vocabulary: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All sequences, int64 [S, length], and their probabilities, float64 [S]; tokens are dependent."""
    sequences = torch.tensor(list(itertools.product(range(vocabulary), repeat=length)))
    logits = torch.randn(len(sequences), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 1.5
    return sequences, logits.softmax(0)


class Network(torch.nn.Module):
    """Base of networks without weights: objectives and samplers ask a parameter for the device."""

    vocabulary, region, stage = Vocabulary(VOCAB), ALONE, ALONE.stage

    def __init__(self) -> None:
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))


class Oracle(Network):
    """The Bayes denoiser of a known law over short sequences: exact posteriors p(x_0^l | visible tokens)."""

    def __init__(self, sequences: torch.Tensor, probabilities: torch.Tensor) -> None:
        super().__init__()
        self.sequences, self.probabilities = sequences, probabilities
        self.indicators = F.one_hot(sequences, VOCAB).double()  # [S, L, V]

    def forward(self, tokens, times=None, dropout=None, segments=None) -> Prediction:
        fits = ((tokens[:, None] == MASK) | (tokens[:, None] == self.sequences)).all(-1)  # [B, S]
        mass = torch.einsum("bs,slv->blv", self.probabilities * fits, self.indicators)
        return Prediction(TokenLogits.known((mass / mass.sum(-1, keepdim=True)).clamp(min=1e-300).log()))


class SameAnswer(Network):
    """Predicts one law for every position, whatever it sees, and latents of zero, whether given any or not; the mask's
    logit, which must not count, is large."""

    def __init__(self, law: torch.Tensor, latent_dim: int) -> None:
        super().__init__()
        self.logits = torch.cat([law.log(), torch.tensor([7.0], dtype=torch.float64)])
        self.latent_dim = latent_dim

    def forward(self, tokens, times, latents=None, dropout=None, segments=None) -> JointPrediction:
        logits = TokenLogits.known(self.logits.expand(*tokens.shape, -1))
        return JointPrediction(logits, torch.zeros(*tokens.shape, self.latent_dim))


class GivenDraws(Noise):
    """Noise whose `uniforms`, `integers` or `normals` a subclass gives: corruption written out with them."""

    def integers(self, num_positions: int, n: int) -> torch.Tensor:
        return replacements(self, num_positions, n)

    def noised_tokens(
        self, tokens, mask_id, *, mask_probability=0.0, uniform_probability=0.0, num_tokens=0, keep=None, word=0
    ):
        u = self.uniforms(tokens.shape[1], word=word)
        p, q = (torch.as_tensor(x, dtype=torch.float64).expand(len(u)) for x in (mask_probability, uniform_probability))
        free = torch.ones_like(tokens, dtype=torch.bool) if keep is None else ~keep
        masked = (u < p.float()[:, None]) & free
        noised = tokens
        if num_tokens:
            drawn = self.integers(tokens.shape[1], num_tokens)
            noised = torch.where((u < (p + q).float()[:, None]) & free, drawn + (drawn >= mask_id), tokens)
        return torch.where(masked, mask_id, noised), masked

    def noised_latents(self, clean, alpha, sigma, *, purpose="latent"):
        return noised(clean, self.normals(*clean.shape[1:], purpose=purpose), alpha, sigma)


@dataclass(frozen=True)
class GivenNoise(GivenDraws):
    """Noise whose token uniforms are `given` [B, L]."""

    given: torch.Tensor = None

    def uniforms(self, num_positions, *, word=0):
        return self.given


def given_noise(ordinals: torch.Tensor, strata: torch.Tensor, uniforms: torch.Tensor) -> GivenNoise:
    """Noise at `strata` [B] whose token uniforms are `uniforms` [B, L]."""
    return GivenNoise(0, ordinals, torch.zeros_like(ordinals), strata.double(), 1, given=uniforms)


def given_mask(strata: torch.Tensor, mask: torch.Tensor) -> GivenNoise:
    """Noise at `strata` [B] that masks exactly the positions of `mask` [B, L], whatever the time."""
    return given_noise(torch.arange(len(strata)), strata, torch.where(mask, 0.0, 1.0))
