"""Joint bounds and the samplers they are about: one token whose latent is one number, everything by quadrature.

The token is 0 or 1, its latent +1 or -1 in each dimension, so that of y only the mean over the dimensions matters.
`drawn` follows a sampler backwards from what it draws at the end; `cost` is the variational bound of T steps. The
denoiser is exact for the bound's process and for texts of the law it believes in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from braid.data_pipeline.loader import Batch
from braid.pretrain.config.schema import SamplingConfig
from braid.pretrain.diffusion.gaussian import ddpm_step
from braid.pretrain.model.joint import JointPrediction
from braid.pretrain.model.joint_attention import SlotPrediction
from braid.pretrain.model.token_logits import TokenLogits
from braid.pretrain.objectives.base import Noise
from braid.pretrain.sampling.draws import Draws
from braid.pretrain.sampling.prompts import no_prompt
from braid.pretrain.sampling.sampler import draw_samples

from ..objectives.ccdd_cases import make
from ..objectives.conftest import LATENT_DIM, MASK, VOCAB
from ..objectives.ladd_cases import build
from ..objectives.references import Network

LAW, OTHER = np.array([0.85, 0.15]), np.array([0.6, 0.4])
ENTROPY = float(-(LAW * np.log(LAW)).sum())
MEANS = np.array([1.0, -1.0])
GRID = np.linspace(-7, 7, 1001)
HERMITE, HERMITE_WEIGHTS = np.polynomial.hermite_e.hermegauss(16)
HERMITE_WEIGHTS = HERMITE_WEIGHTS / HERMITE_WEIGHTS.sum()
NORMALS = np.linspace(-7, 7, 201)
NORMAL_WEIGHTS = np.exp(-(NORMALS**2) / 2)
NORMAL_WEIGHTS = NORMAL_WEIGHTS / NORMAL_WEIGHTS.sum()
MANY = 400
"""Steps after which a bound of steps is within 2e-3 of its limit."""


class TokenDenoiser(Network):
    """`Case.answer` for an objective and its samplers. What it is told beside the tokens: latents and times."""

    num_slots = 1

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.latent_dim = case, case.dims

    def forward(self, tokens, *given, dropout=None, segments=None):
        slots = self.case.slots
        latents, times = (given[0], given[2]) if slots else (given[1], given[0])
        answers = torch.from_numpy(self.case.answer(latents.double().mean(-1)[:, 0].numpy(), times))
        answers = torch.where(tokens == MASK, answers, F.one_hot(tokens[:, 0].clamp(max=1), 2))
        logits = torch.full((len(tokens), 1, VOCAB), -1e3, dtype=torch.float64)
        logits[:, 0, :2] = answers.clamp(min=1e-300).log()
        estimate = (answers @ torch.from_numpy(MEANS))[:, None, None].expand_as(latents).float()
        return (SlotPrediction if slots else JointPrediction)(TokenLogits.known(logits), estimate)


@dataclass
class Case:
    """An objective over this token, and its latents' process as that of their mean over the dimensions."""

    objective: object
    believed: np.ndarray
    dims: int
    slots: bool

    def __post_init__(self) -> None:
        self.sigma = self.objective.config.latent_sigma
        self.objective.network = TokenDenoiser(self)

    def at(self, t: torch.Tensor | float) -> tuple[np.ndarray, np.ndarray]:
        """alpha_t, and the deviation of one dimension of y_t given the token in the bound's process."""
        schedule, time = self.objective.schedule, torch.as_tensor(t, dtype=torch.float64)
        alpha = schedule.alpha(time).numpy()
        return alpha, np.hypot(schedule.sigma(time).numpy(), alpha * self.sigma)

    def signal(self, t: float) -> float:
        alpha, deviation = self.at(t)
        return float(alpha / deviation) ** 2

    def answer(self, mean: np.ndarray, t: torch.Tensor | float) -> np.ndarray:
        """p(token | y_t), [..., 2], where the token is masked and `mean` is that of y_t over the dimensions."""
        alpha, deviation = self.at(t)
        log_odds = 2 * alpha * mean * self.dims / deviation**2 + math.log(self.believed[0] / self.believed[1])
        first = 1 / (1 + np.exp(-log_odds.clip(-600, 600)))
        return np.stack([first, 1 - first], -1)

    def times(self, sampler: str, steps: int) -> list[float]:
        draws = Draws(key=0, ordinals=torch.arange(1), length=1, settings=SamplingConfig(), sampler=sampler)
        return draws.times(steps, self.objective.tau if sampler == "joint_nelbo" and not self.slots else 0.0)


def co_ladd(sigma: float = 0.7, believed: np.ndarray = LAW) -> Case:
    table = torch.zeros(VOCAB, 1)
    table[:2, 0] = torch.from_numpy(MEANS)
    objective = build("co_ladd", table=table, num_slots=1, latent_sigma=sigma, independent_times=True)
    return Case(objective, believed, dims=1, slots=True)


def ccdd(sigma: float = 0.5, believed: np.ndarray = LAW, schedule: str = "vp_linear") -> Case:
    objective = make(latent_sigma=sigma, schedule=schedule)
    means = torch.from_numpy(MEANS).float()[:, None].expand(-1, LATENT_DIM)
    objective.encoder.encode = lambda tokens, hidden, segments=None: means[tokens.clamp(max=1)]
    return Case(objective, believed, dims=LATENT_DIM, slots=False)


def drawn(case: Case, sampler: str, steps: int) -> np.ndarray:
    """The law of what `sampler` draws in `steps` steps, [2]."""
    sigma, sequential = case.sigma * sampler.endswith("_nelbo"), sampler.startswith("sequential")
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    times, value = case.times(sampler, steps), case.answer(GRID, 0.0)
    for t, s in reversed(list(zip(times[:-1], times[1:], strict=True))):
        answer = case.answer(GRID, t)
        revealed = 0.0 if sequential else (t - s) / t
        given = torch.from_numpy(GRID), torch.from_numpy(answer @ MEANS)
        middle, shifted = (ddpm_step(*given, eps, t, s, case.objective.schedule, sigma) for eps in (zero, one))
        deviation = float((shifted - middle)[0]) / math.sqrt(case.dims)
        places = middle.numpy()[:, None] + deviation * HERMITE
        later = np.stack([np.interp(places, GRID, value[:, x]) @ HERMITE_WEIGHTS for x in (0, 1)], -1)
        value = revealed * answer + (1 - revealed) * later
    start = HERMITE / math.sqrt(case.dims)
    return np.array([np.interp(start, GRID, value[:, x]) @ HERMITE_WEIGHTS for x in (0, 1)])


def cross_entropy(case: Case, sampler: str, steps: int) -> float:
    return float(-(LAW * np.log(drawn(case, sampler, steps))).sum())


def cost(case: Case, sampler: str, steps: int) -> float:
    """The variational bound of `steps` steps in the mean over tokens of LAW, noise and masks: the divergence of two
    Gaussians whose means differ by the error about E(x), and the cross-entropy of what is revealed."""

    def expected(t: float) -> tuple[float, float]:
        """Cross-entropy of the token, and squared error about its latent, where it is masked."""
        alpha, deviation = case.at(t)
        nats = error = 0.0
        for x in (0, 1):
            answer = case.answer(alpha * MEANS[x] + deviation / math.sqrt(case.dims) * NORMALS, t)
            nats -= LAW[x] * float(NORMAL_WEIGHTS @ np.log(answer[:, x].clip(1e-300)))
            error += LAW[x] * case.dims * float(NORMAL_WEIGHTS @ (answer @ MEANS - MEANS[x]) ** 2)
        return nats, error

    sequential, times = sampler.startswith("sequential"), case.times(sampler, steps)
    alpha, deviation = case.at(1.0)
    total = case.dims / 2 * float(alpha**2 + deviation**2 - 1 - 2 * np.log(deviation))
    for t, s in zip(times[:-1], times[1:], strict=True):
        nats, error = expected(t)
        divergence = (case.signal(s) - case.signal(t)) / 2 * error
        total += divergence if sequential else (t - s) * nats + t * divergence
    return total + expected(0.0)[0] * sequential


def figure(case: Case, name: str, rows: int = 1000, draws: int = 16) -> tuple[float, float]:
    """Mean and standard error of what `evaluate` reports, over tokens in exact shares."""
    ordinals = torch.arange(rows)
    tokens = (ordinals >= round(rows * LAW[0])).long()[:, None]
    batch = Batch(tokens, torch.ones_like(tokens, dtype=torch.bool), ordinals)
    values = torch.stack([
        case.objective.evaluate(batch, Noise.evaluation(3, ordinals, draw, draws))[name] for draw in range(draws)
    ]).mean(0)  # fmt: skip
    return float(values.mean()), float(values.std() / math.sqrt(rows))


CASES = {
    "co_ladd-joint": (co_ladd, "joint_nelbo"),
    "co_ladd-sequential": (co_ladd, "sequential_nelbo"),
    "ccdd-vp": (ccdd, "joint_nelbo"),
    "ccdd-flow": (partial(ccdd, schedule="flow_linear"), "joint_nelbo"),
}
EVERY_CASE = pytest.mark.parametrize("make_case, name", CASES.values(), ids=list(CASES))


@EVERY_CASE
def test_a_bound_is_one_of_the_sampler_of_its_name(make_case, name):
    """What the sampler draws in T steps costs at most the bound of T steps, with a denoiser that is exact (the law is
    reached) or believes in another law, and the bound of many steps is the figure."""
    case, wrong = make_case(), make_case(believed=OTHER)
    for steps in (2, 32):
        assert ENTROPY <= cross_entropy(case, name, steps) <= cost(case, name, steps)
        assert ENTROPY + 0.05 < cross_entropy(wrong, name, steps) <= cost(wrong, name, steps)
    assert cross_entropy(case, name, 32) < ENTROPY + 3e-4
    # CCDD's also pays for decoding the latent at tau, from an estimate that is the mean of both tokens'.
    assert cost(case, name, MANY) == pytest.approx(ENTROPY, abs=2e-3 if case.slots else 1e-2)
    for each in (case, wrong):
        value, error = figure(each, name)
        assert error < 0.04 and value == pytest.approx(cost(each, name, MANY), abs=4 * error)


@pytest.mark.parametrize(
    "make_case, published, bound",
    [
        (co_ladd, "joint_ddpm", "joint_nelbo"),
        (co_ladd, "sequential_ddpm", "sequential_nelbo"),
        (partial(ccdd, 1.0), "ddpm", "joint_nelbo"),
    ],
    ids=["co_ladd-joint", "co_ladd-sequential", "ccdd"],
)
def test_a_sampler_of_another_process_does_not_reach_the_law(make_case, published, bound):
    """The latents of q(y_0|x) = N(E(x), 0) never spread as those the exact denoiser was made for. Co-LADD's bound is
    then below what the sampler's texts cost: it is no bound of that sampler."""
    case = make_case()
    assert cross_entropy(case, published, 32) > ENTROPY + 0.005
    assert cross_entropy(case, bound, 32) < ENTROPY + 3e-4
    if case.slots:
        assert cost(case, bound, MANY) < cross_entropy(case, published, 32) - 0.01


@EVERY_CASE
def test_samplers_draw_what_follows_for_their_steps(make_case, name):
    """The sampler itself, in few steps: as many zeros as `drawn` says, and not as the sampler of the other process."""
    case, num, steps = make_case(1.0), 3000, 12
    other = {"joint_nelbo": "joint_ddpm" if case.slots else "ddpm", "sequential_nelbo": "sequential_ddpm"}[name]
    expected = {sampler: float(drawn(case, sampler, steps)[0]) for sampler in (name, other)}
    deviation = math.sqrt(LAW.prod() / num)
    assert abs(expected[name] - expected[other]) > 5 * deviation
    for sampler, share in expected.items():
        settings = SamplingConfig(steps=steps, sampler=sampler)
        samples = draw_samples(case.objective, settings, no_prompt(num, 1), key=4)
        assert float((samples.tokens == 0).double().mean()) == pytest.approx(share, abs=4 * deviation)
        assert max(samples.network_calls) == (steps + 1 if sampler.startswith("sequential") else steps)


@pytest.mark.parametrize("path", ["joint", "sequential"])
def test_without_a_deviation_both_processes_are_one_bit_for_bit(path):
    objective = build("co_ladd", latent_sigma=0.0, independent_times=True)
    first, second = (
        draw_samples(objective, SamplingConfig(steps=5, sampler=f"{path}_{kind}"), no_prompt(3, 12), key=1, record=True)
        for kind in ("ddpm", "nelbo")
    )
    assert torch.equal(first.tokens, second.tokens) and first.frames == second.frames
    spread = build("co_ladd", latent_sigma=0.3, independent_times=True)
    settings = SamplingConfig(steps=5, sampler=f"{path}_nelbo")
    assert draw_samples(spread, settings, no_prompt(3, 12), key=1, record=True).frames != second.frames


def test_the_last_call_of_ccdd_decodes_at_the_bounds_smallest_time():
    """tau where SNR = 1 / s^2, even steps down to it; what is drawn does not depend on s in other samplers."""
    case, told = ccdd(), []
    forward = case.objective.network.forward
    case.objective.network.forward = lambda tokens, times, *rest, **own: (
        told.append(float(times[0])), forward(tokens, times, *rest, **own)
    )[1]  # fmt: skip
    samples = draw_samples(case.objective, SamplingConfig(steps=4, sampler="joint_nelbo"), no_prompt(5, 1), key=1)
    assert told == pytest.approx([1.0, 0.73333333, 0.46666667, 0.2]) and samples.network_calls == [4] * 5
    assert (samples.tokens != MASK).all()
