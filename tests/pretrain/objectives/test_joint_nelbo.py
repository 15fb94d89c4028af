"""CCDD's joint bound against exact costs: laws whose tokens and latents are known, denoisers right and wrong."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from braid.data_pipeline.loader import Batch
from braid.kernels.random import fold_key
from braid.pretrain.diffusion.times import log_uniform_mixture
from braid.pretrain.model.joint import JointPrediction
from braid.pretrain.model.token_logits import TokenLogits
from braid.pretrain.objectives.base import Noise

from .ccdd_cases import make
from .conftest import LATENT_DIM, VOCAB
from .references import GivenNoise, Network, Oracle, toy_law

SIGMA = 0.5  # of q(z_0|x): the bound decodes at tau = 0.2 (vp_linear), so that every one of its terms is large
TAU = {"vp_linear": 1 / (1 + 1 / SIGMA**2), "flow_linear": 1 / (1 + 1 / SIGMA)}
SEQUENCES, LAW = toy_law(length=2, vocabulary=3, seed=0)
ENTROPY = float(-(LAW * LAW.log()).sum())
WRONG_MEAN = torch.tensor([0.3, -0.1, 0.2, 0.0])


@dataclass(frozen=True)
class SignNoise(GivenNoise):
    """Given uniforms, and normals replaced by one sign a row. The latent error is quadratic in the two normals (of z_0
    and of z_t), so the mean over the four pairs of signs is its expectation, exactly."""

    signs: torch.Tensor = None  # [B, 2]

    def normals(self, num_positions, num_channels, *, purpose="latent"):
        which = {"latent": 0, "z_0": 1}[purpose]
        return self.signs[:, which, None, None].expand(-1, num_positions, num_channels)


class JointOracle(Network):
    """A token denoiser beside a fixed estimate of the clean latents. The last position is padding: it answers log V."""

    def __init__(self, tokens: Oracle, clean: torch.Tensor) -> None:
        super().__init__()
        self.token_network, self.clean = tokens, clean

    def forward(self, tokens, times, latents, dropout=None, latent_times=None, segments=None) -> JointPrediction:
        assert latent_times is None or torch.equal(latent_times, times), "the bound is that of the sampler's path"
        logits = F.pad(self.token_network(tokens[:, :-1]).logits, (0, 0, 0, 1))
        return JointPrediction(TokenLogits.known(logits), self.clean.expand(*tokens.shape, -1))


def expected_joint_nelbo(
    schedule: str, law: torch.Tensor, mean_error: torch.Tensor, *, given: int = 0, latent_times: str = "shared"
) -> float:
    """E over texts of LAW, times (Gauss-Legendre), masks (all of them) and latents, where every token is encoded alike.

    The denoiser is the Bayes one of `law` and takes the latents' mean wrong by `mean_error` [D]. Every text is followed
    by one position of padding, always masked, which must cost nothing; the first `given` tokens are a condition.
    """
    ccdd, tau = make(schedule=schedule, latent_sigma=SIGMA, latent_times=latent_times), TAU[schedule]
    ccdd.encoder.table = ccdd.encoder.table[:1].expand(VOCAB, -1)
    clean = ccdd.encoder.encode(torch.tensor([[0]]), torch.tensor([[False]]))[0, 0]
    ccdd.network = JointOracle(Oracle(SEQUENCES, law), clean + mean_error)

    nodes, weights = np.polynomial.legendre.leggauss(24)
    strata, length = torch.from_numpy((nodes + 1) / 2), SEQUENCES.shape[1]
    times, _ = log_uniform_mixture(strata, tau)
    rows = []  # (text, stratum, uniforms, signs, probability)
    for stratum, time, weight in zip(strata.tolist(), times.tolist(), (weights / 2).tolist(), strict=True):
        # A position is masked at tau and at t, at t alone, or at neither.
        cases = [(tau / 2, tau), ((tau + time) / 2, time - tau), ((time + 1) / 2, 1 - time)]
        for masks in itertools.product(cases, repeat=length):
            probability = weight * math.prod(p for _, p in masks) / 4
            for signs in itertools.product([-1.0, 1.0], repeat=2):
                for text in range(len(SEQUENCES)):
                    rows.append((text, stratum, [*(u for u, _ in masks), 0.0], signs, probability * float(LAW[text])))
    texts, strata, uniforms, signs, probabilities = map(torch.tensor, zip(*rows, strict=True))
    tokens, ordinals = F.pad(SEQUENCES[texts], (0, 1), value=5), torch.arange(len(rows))
    assert float(probabilities.double().sum()) == pytest.approx(1, abs=1e-6)
    noise = SignNoise(0, ordinals, torch.zeros_like(ordinals), strata.double(), 1, given=uniforms, signs=signs)
    place = torch.arange(3).expand(len(rows), -1)
    batch = Batch(tokens, (place >= given) & (place < 2), ordinals, place < given)
    return float((probabilities.double() * ccdd.evaluate(batch, noise)["joint_nelbo"]).sum())


def decoding_gap(tau: float) -> float:
    """What decoding both tokens at once at tau costs beyond their entropy: their mutual information, if both are
    masked (probability tau^2)."""
    joint = LAW.view(3, 3)
    product = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return tau**2 * float((joint * (joint / product).log()).sum())


@pytest.mark.parametrize("schedule", TAU)
def test_joint_nelbo_is_the_token_entropy_where_latents_say_nothing(schedule):
    """All tokens have one representation, which the network knows: the latents cost 0 and the bound is the text's
    entropy, but for the known price of decoding at tau."""
    cost = expected_joint_nelbo(schedule, LAW, torch.zeros(LATENT_DIM))
    assert decoding_gap(TAU[schedule]) > 1e-3
    assert cost == pytest.approx(ENTROPY + decoding_gap(TAU[schedule]), abs=2e-5)


@pytest.mark.parametrize("schedule", TAU)
def test_joint_nelbo_charges_a_wrong_mean_of_the_latents_its_exact_kl(schedule):
    """A network certain that z_0 ~ N(m + d, s^2 I) is a model of that law: KL |d|^2 / 2 s^2 at every position."""
    cost = expected_joint_nelbo(schedule, LAW, WRONG_MEAN)
    kl = SEQUENCES.shape[1] * float(WRONG_MEAN.double().square().sum()) / (2 * SIGMA**2)
    assert cost == pytest.approx(ENTROPY + decoding_gap(TAU[schedule]) + kl, abs=1e-4)


def test_joint_nelbo_of_independent_times_is_that_of_equal_times():
    equal, independent = (
        expected_joint_nelbo("vp_linear", LAW, WRONG_MEAN, latent_times=mode) for mode in ("shared", "independent")
    )
    assert equal == independent


@pytest.mark.parametrize("schedule", TAU)
def test_joint_nelbo_given_a_token_is_the_conditional_entropy(schedule):
    """The first token is known and costs nothing, nor do its latents; with one token left there is no decoding gap."""
    first = LAW.view(3, 3).sum(1)
    conditional = ENTROPY + float((first * first.log()).sum())
    cost = expected_joint_nelbo(schedule, LAW, WRONG_MEAN, given=1)
    kl = float(WRONG_MEAN.double().square().sum()) / (2 * SIGMA**2)
    assert cost == pytest.approx(conditional + kl, abs=1e-4)


def test_joint_nelbo_is_above_the_entropy_for_a_wrong_token_denoiser():
    _, other = toy_law(length=2, vocabulary=3, seed=1)
    assert expected_joint_nelbo("vp_linear", other, torch.zeros(LATENT_DIM)) > ENTROPY + 0.05


def test_joint_nelbo_of_a_network_that_knows_the_text_is_zero():
    """One fixed text and a network that knows it and its latents, with drawn noise: the exact cost is 0 nats.

    Two positions are padding and cost nothing either.
    """
    ccdd = make(latent_sigma=0.2)
    text = torch.randint(0, VOCAB - 1, (1, 8), generator=torch.Generator().manual_seed(3))
    clean = ccdd.encoder.encode(text, torch.zeros_like(text, dtype=torch.bool))

    class KnowsTheText(Network):
        def forward(self, tokens, times, latents, dropout=None, segments=None):
            logits = 60.0 * F.one_hot(text, VOCAB).double()
            logits = TokenLogits.known(logits.expand(len(tokens), -1, -1))
            return JointPrediction(logits, clean.expand(len(tokens), -1, -1))

    ccdd.network = KnowsTheText()
    num = 256
    ordinals = torch.arange(num)
    loss_mask = torch.ones(num, 8, dtype=torch.bool)
    loss_mask[:, -2:] = False
    batch = Batch(text.expand(num, -1), loss_mask, ordinals)
    key, draws = fold_key(0, "validation"), 16
    values = torch.stack([
        ccdd.evaluate(batch, Noise.evaluation(key, ordinals, d, draws))["joint_nelbo"]
        for d in range(draws)
    ]).mean(0)  # fmt: skip
    error = float(values.std() / math.sqrt(num))
    assert error < 0.5
    assert abs(float(values.mean())) < 4 * error
