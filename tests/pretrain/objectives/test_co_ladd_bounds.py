"""Co-LADD's bounds in expectation, by quadrature over times and noise and enumeration of texts and masks."""

import math

import pytest
import torch

from braid.data_pipeline.loader import Batch
from braid.pretrain.diffusion.gaussian import posterior_mean, reconstruction_nats
from braid.pretrain.diffusion.ladd import LatentSchedule, bound_times
from braid.pretrain.model.joint_attention import SlotPrediction
from braid.pretrain.model.token_logits import TokenLogits

from .ladd_cases import (
    CODE_ENTROPY,
    ENTROPY,
    LAW,
    SEQUENCES,
    SIGNS,
    BlindDenoiser,
    ToyNetwork,
    ToyNoise,
    gauss_legendre,
    normal_grid,
    toy,
    toy_masks,
)
from .references import toy_law

T_MIN = 1e-5
POSITIVE = float(LAW[SIGNS > 0].sum())


def schedule_of(name: str = "sqrt") -> LatentSchedule:
    return LatentSchedule(name, 2.0, 1e-4)


JOINT = ("joint_nelbo", "token_nats_given_latents")
NELBOS = ("joint_nelbo", "sequential_nelbo")
EVEN = ("sequential_nelbo", "token_bound", "token_bound_latents_off")


def expected_figures(network: ToyNetwork, names: tuple[str, ...], num_nodes: int = 32, **options) -> dict[str, float]:
    """Figures of `evaluate` in expectation over texts of LAW, masks, times and the latent's noise.

    Tokens of the figures in JOINT have times of their own, those of the others even ones; a mask's probability is that
    of the time it belongs to.
    """
    objective = toy("co_ladd", **options)
    objective.network = network
    if objective.latent_denoiser is not None:
        objective.latent_denoiser = BlindDenoiser(network)
    normals, normal_weights = normal_grid()
    totals: dict[str, float] = {}
    for node, weight in gauss_legendre(num_nodes):
        strata = torch.tensor([node], dtype=torch.float64)
        own, even = float(bound_times(strata, T_MIN)[0]), T_MIN + (1 - T_MIN) * node
        for t, wanted in ((own, set(names) & set(JOINT)), (even, set(names) & set(EVEN))):
            if not wanted:
                continue
            masks = torch.tensor(toy_masks(2))
            mask_weights = torch.where(masks, t, 1 - t).double().prod(1)
            shape = (len(SEQUENCES), len(masks), len(normals))
            text, mask, normal = (index.flatten() for index in torch.meshgrid(*map(torch.arange, shape), indexing="ij"))
            probabilities = weight * LAW[text] * mask_weights[mask] * normal_weights[normal]
            ordinals = torch.arange(len(text))
            # A uniform of 0 is masked at every time and one of 1 at none.
            noise = ToyNoise(0, ordinals, torch.zeros_like(ordinals), strata.expand(len(text)), 1,
                             token_uniforms=torch.where(masks[mask], 0.0, 1.0),
                             normal=normals[normal])  # fmt: skip
            batch = Batch(SEQUENCES[text], torch.ones(len(text), 2, dtype=torch.bool), ordinals)
            values = objective.evaluate(batch, noise)
            for name in wanted:
                totals[name] = totals.get(name, 0.0) + float((probabilities * values[name]).sum())
    return totals


def prior_gap(schedule: LatentSchedule, sigma: float) -> float:
    """KL of the law of y_1 over all texts and N(0, 1): what starting from a standard normal costs beyond the
    entropy."""
    signal = float(schedule.alpha_squared(torch.tensor(1.0, dtype=torch.float64)))
    y = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    variance = signal * sigma**2 + 1 - signal
    law = sum(
        p * torch.exp(-(y - sign * math.sqrt(signal)).square() / (2 * variance)) / math.sqrt(2 * math.pi * variance)
        for p, sign in ((POSITIVE, 1), (1 - POSITIVE, -1))
    )
    standard = torch.exp(-y.square() / 2) / math.sqrt(2 * math.pi)
    return float((law * (law / standard).log()).sum() * (y[1] - y[0]))


@pytest.mark.parametrize("name, sigma", [("sqrt", 0.0), ("sqrt", 0.3), ("linear", 0.1), ("cosine", 0.1)])
def test_the_joint_nelbo_is_the_entropy_for_the_bayes_denoiser(name, sigma):
    """E[NELBO] = H(x) + what the prior does not know of y_1, whatever s: the latent is a function of the text."""
    schedule = schedule_of(name)
    network = ToyNetwork(schedule=schedule, sigma=sigma)
    figures = expected_figures(network, JOINT, latent_schedule=name, latent_sigma=sigma)
    assert figures["joint_nelbo"] == pytest.approx(ENTROPY + prior_gap(schedule, sigma), abs=2e-4)
    assert 0 <= prior_gap(schedule, sigma) < 1e-4
    assert ENTROPY - CODE_ENTROPY < figures["token_nats_given_latents"] < ENTROPY - 0.02, "cheaper, and no bound"


@pytest.mark.parametrize("sigma", [0.1, 0.7])
def test_the_sequential_nelbo_is_the_entropy_for_the_bayes_denoiser(sigma):
    """With s = 0.7 the latent that the text is read from often has the wrong sign: the text pays for it."""
    network = ToyNetwork(schedule=schedule_of(), sigma=sigma)
    figures = expected_figures(network, ("sequential_nelbo",), independent_times=True, latent_sigma=sigma)
    assert figures["sequential_nelbo"] == pytest.approx(ENTROPY, abs=2e-4)


@pytest.mark.parametrize("sigma", [0.1, 0.7])
def test_a_denoiser_of_the_latents_own_bounds_the_text_sequentially(sigma):
    """The same entropy from two networks, one of which never sees a token; and no bound of sampling jointly."""
    network = ToyNetwork(schedule=schedule_of(), sigma=sigma)
    names = ("sequential_nelbo", "token_bound", "token_bound_latents_off")
    figures = expected_figures(network, names, latent_denoiser=True, latent_sigma=sigma)
    assert figures["sequential_nelbo"] == pytest.approx(ENTROPY, abs=2e-4)
    assert figures["token_bound"] > ENTROPY + 0.01, "the network takes y for that of the whole text"

    _, other = toy_law(length=2, vocabulary=3, seed=1)
    wrong = expected_figures(ToyNetwork(other, schedule=schedule_of(), sigma=sigma), names[:1], num_nodes=16,
                             latent_denoiser=True, latent_sigma=sigma)  # fmt: skip
    assert wrong["sequential_nelbo"] > ENTROPY + 0.05


def test_nelbos_are_above_the_entropy_for_other_denoisers():
    _, other = toy_law(length=2, vocabulary=3, seed=1)
    network = ToyNetwork(other, schedule=schedule_of(), sigma=0.1)
    figures = expected_figures(network, NELBOS, num_nodes=16, independent_times=True, latent_sigma=0.1)
    cost = float(-(LAW * other.log()).sum())
    assert cost > ENTROPY + 0.05
    for name in NELBOS:
        assert figures[name] == pytest.approx(cost, abs=2e-3)


def test_token_bounds_are_the_entropy_without_the_latent_and_above_it_with_a_misread_one():
    plain = expected_figures(ToyNetwork(schedule=schedule_of(), latents_matter=False), EVEN[1:], num_nodes=12)
    assert plain["token_bound"] == pytest.approx(ENTROPY, abs=5e-5)
    assert plain["token_bound_latents_off"] == pytest.approx(ENTROPY, abs=5e-5)
    misread = expected_figures(ToyNetwork(schedule=schedule_of()), ("token_bound",), num_nodes=12)
    assert misread["token_bound"] > ENTROPY + 0.01


class WrongMean(ToyNetwork):
    """Knows everything but takes the latent's mean wrong by DELTA."""

    DELTA = 0.3

    def forward(self, tokens, latents, times, latent_times, dropout=None) -> SlotPrediction:
        prediction = super().forward(tokens, latents, times, latent_times)
        return prediction._replace(latents=prediction.latents + self.DELTA)


@pytest.mark.parametrize("sigma", [0.0, 0.2])
def test_a_wrong_mean_costs_its_kl_divergence(sigma):
    """By d^2/2 more at the signal-to-noise ratio y_0 has when the process ends, 1 / (s^2 + 1 / SNR); at t = 1 the error
    is the prior's. Exact for texts with one latent, as here."""
    schedule = schedule_of()
    objective = toy("co_ladd", latent_sigma=sigma, table=torch.cat([torch.ones(3, 1), torch.zeros(14, 1)]))
    ends = schedule.snr(torch.tensor([T_MIN, 1.0], dtype=torch.float64))
    effective = 1 / (sigma**2 + 1 / ends)
    expected = WrongMean.DELTA**2 / 2 * float(effective[0] - effective[1])
    parts = []
    for delta in (0.0, WrongMean.DELTA):
        total = 0.0
        for node, weight in gauss_legendre(64):
            one = torch.tensor([0])
            noise = ToyNoise(0, one, one, torch.tensor([node], dtype=torch.float64), 1,
                             token_uniforms=torch.ones(1, 2), normal=torch.zeros(1))  # fmt: skip
            objective.network = Constant(1 + delta)
            batch = Batch(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.bool), one)
            total += weight * float(objective.evaluate(batch, noise)["joint_nelbo"])
        parts.append(total)
    signal = float(schedule.alpha_squared(torch.tensor(1.0, dtype=torch.float64)))
    variance = signal * sigma**2 + 1 - signal
    assert parts[0] == pytest.approx((variance + signal - 1 - math.log(variance)) / 2, rel=1e-6), "the prior's KL"
    assert parts[1] - parts[0] == pytest.approx(expected, rel=1e-5)


class Constant(ToyNetwork):
    """Says the same of every latent; of the tokens too, but they are all visible where it is used."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, tokens, latents, times, latent_times, dropout=None) -> SlotPrediction:
        return SlotPrediction(TokenLogits.known(torch.zeros(*tokens.shape, 17)), torch.full(latents.shape, self.value))


def test_decoding_y_0_as_well_would_add_the_kl_of_that_step():
    """The bound without reconstruction against the one that samples y_0 at the end (LADD, B6): with s = 0.2 and a mean
    wrong by d, the latter is d^2 / 2 s^2 in all, and the difference is the last step's divergence."""
    schedule, s, d = schedule_of(), 0.2, 0.3
    t = torch.tensor([T_MIN], dtype=torch.float64)
    snr, end = float(schedule.snr(t)), float(schedule.snr(torch.ones(1, dtype=torch.float64)))

    # E over y_0 ~ N(1, s^2) and y_t of ||y_0 - estimate||^2 at every time, the estimate from a mean of 1 + d.
    nodes, weights = normal_grid(41)
    z, eps = (index.flatten() for index in torch.meshgrid(nodes, nodes, indexing="ij"))
    law = (weights[:, None] * weights[None]).flatten()

    def error(time: torch.Tensor) -> float:
        y_0 = 1 + s * z
        y_t = schedule.alpha(time) * y_0 + schedule.sigma(time) * eps
        estimate = posterior_mean(
            y_t[:, None, None], torch.full((len(z), 1, 1), 1 + d), time.expand(len(z)), s, schedule
        )
        return float((law * (y_0 - estimate[:, 0, 0]).square()).sum())

    diffusion = 0.0
    for node, weight in gauss_legendre(64):
        time, density = bound_times(torch.tensor([node], dtype=torch.float64), T_MIN)
        diffusion += weight * float(schedule.snr_rate(time) / 2 / density) * error(time)
    reconstruction = float(reconstruction_nats(torch.tensor(error(t)).double(), 1, s, snr))
    signal = float(schedule.alpha_squared(torch.ones(1, dtype=torch.float64)))
    # KL(q(y_1 | y_0) || N(0, 1)) in the mean over y_0, as y_0 is a latent variable here.
    prior = (signal * (1 + s**2) + (1 - signal) - 1 - math.log(1 - signal)) / 2
    with_y_0 = diffusion + reconstruction + prior

    effective = [1 / (s**2 + 1 / ratio) for ratio in (snr, end)]
    variance = signal * s**2 + 1 - signal
    ours = d**2 / 2 * (effective[0] - effective[1]) + (variance + signal - 1 - math.log(variance)) / 2
    v = 1 / (snr + 1 / s**2)
    last_step = (d * v / s**2) ** 2 / (2 * v)
    assert with_y_0 - ours == pytest.approx(last_step, abs=2e-4)
    assert last_step > 1e-3


def test_figures_say_what_they_are():
    objective = toy("co_ladd", latent_sigma=0.05)
    figures = {figure.name: figure for figure in objective.figures}
    assert {name: figure.is_bound for name, figure in figures.items()} == {
        "token_bound": True, "token_bound_latents_off": True, "joint_nelbo": True, "token_nats_given_latents": False,
    }  # fmt: skip
    assert "N(E(x), 0.05^2 I)" in figures["joint_nelbo"].label
    own = toy("co_ladd", latent_denoiser=True)
    assert [(figure.name, figure.is_bound) for figure in own.figures] == [
        ("token_bound", True), ("token_bound_latents_off", True), ("sequential_nelbo", True),
        ("token_nats_given_latents", False),
    ]  # fmt: skip
    assert "sequential_nelbo" in {figure.name for figure in toy("co_ladd", independent_times=True).figures}
