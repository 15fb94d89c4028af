"""LADD's samplers with networks whose answers are known: laws of texts and latents, calls, prompts, paths."""

import math
from dataclasses import replace

import pytest
import torch
from scipy.stats import chi2

from braid.kernels.errors import ConfigError
from braid.pretrain.config.schema import SamplingConfig
from braid.pretrain.diffusion.ladd import LatentSchedule
from braid.pretrain.model.joint_attention import SlotPrediction
from braid.pretrain.model.token_logits import TokenLogits
from braid.pretrain.sampling.di_ladd import _fill_codes, _reveal_codes
from braid.pretrain.sampling.draws import Draws
from braid.pretrain.sampling.prompts import Prompt, no_prompt
from braid.pretrain.sampling.sampler import draw_samples

from ..objectives.conftest import MASK, VOCAB
from ..objectives.ladd_cases import CODES, LAW, SEQUENCES, BlindDenoiser, ToyNetwork, build, toy
from ..objectives.references import Network

MEAN, DEVIATION, NUM_SLOTS, DIM = 0.7, 0.4, 16, 4
CO_SAMPLERS = ("joint", "joint_ddpm", "sequential", "sequential_ddpm")


class GaussianOracle(Network):
    """E[y_0 | y_t] of latents N(MEAN, DEVIATION^2) that know nothing of the tokens; records all it sees."""

    def __init__(self, schedule: LatentSchedule) -> None:
        super().__init__()
        self.schedule, self.num_slots, self.latent_dim, self.calls = schedule, NUM_SLOTS, DIM, []

    def forward(self, tokens, latents, times, latent_times, dropout=None) -> SlotPrediction:
        self.calls.append((tokens, latents, float(times[0]), float(latent_times[0])))
        t = latent_times[0]
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        gain = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2)
        yhat = MEAN + gain * (latents.double() - alpha * MEAN)
        return SlotPrediction(TokenLogits.known(torch.zeros(*tokens.shape, VOCAB)), yhat.float())


@pytest.mark.parametrize("schedule", ["sqrt", "cosine"])
@pytest.mark.parametrize("sampler", CO_SAMPLERS)
def test_latents_follow_the_forward_process_backwards(sampler, schedule):
    """The Bayes estimate of a Gaussian: at every time y_t has the forward law N(alpha m, alpha^2 v + sigma^2), within
    3 % of its deviation at 256 steps; DDIM keeps the initial noise, ancestral steps forget it."""
    objective, steps = build("co_ladd", latent_schedule=schedule, independent_times=True), 256
    objective.network = network = GaussianOracle(objective.schedule)
    sequential = sampler.startswith("sequential")
    settings = SamplingConfig(steps=1 if sequential else steps, latent_steps=steps * sequential, sampler=sampler)
    samples = draw_samples(objective, settings, no_prompt(160, 16), key=1)
    moving = network.calls[:steps]
    grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1].tolist()
    assert [latent_t for *_, latent_t in moving] == grid
    assert [t for _, _, t, _ in moving] == ([1.0] * steps if sequential else grid)
    states = [(latent_t, y) for _, y, _, latent_t in moving]
    assert len(network.calls) == steps + sequential and samples.network_calls == [steps + sequential] * 160
    if sequential:  # the text is filled beside what the latents have become
        assert network.calls[-1][2:] == (1.0, 0.0)
        states.append((0.0, network.calls[-1][1]))
    for t, y in states[::16] + states[-1:]:
        time = torch.tensor(t, dtype=torch.float64)
        alpha, sigma = float(objective.schedule.alpha(time)), float(objective.schedule.sigma(time))
        deviation = math.sqrt(alpha**2 * DEVIATION**2 + sigma**2)
        assert float(y.mean()) == pytest.approx(alpha * MEAN, abs=5 * deviation / math.sqrt(y.numel()) + 0.01)
        assert float(y.std()) == pytest.approx(deviation, rel=0.03)
    first, last = states[0][1].flatten(), states[-1][1].flatten()
    correlation = float(torch.corrcoef(torch.stack([first, last]))[0, 1])
    assert abs(correlation) < 0.2 if sampler.endswith("ddpm") else correlation > 0.98
    assert (samples.tokens != MASK).all()


def chi_square(tokens: torch.Tensor, law: torch.Tensor = LAW, texts: torch.Tensor = SEQUENCES) -> float:
    """Of drawn texts against their law."""
    counts = (tokens[:, None] == texts).all(-1).double().sum(0)
    assert int(counts.sum()) == len(tokens), "only texts of the law"
    expected = len(tokens) * law
    return float(((counts - expected).square() / expected).sum())


LIMIT = 26.1
"""A chi-square variable of 8 degrees of freedom is above it once in a thousand times."""


@pytest.mark.parametrize("sampler", CO_SAMPLERS)
def test_co_samplers_draw_the_law_of_the_bayes_denoiser(sampler):
    objective = toy("co_ladd", independent_times=True)
    objective.network = ToyNetwork(schedule=objective.schedule)
    samples = draw_samples(objective, SamplingConfig(steps=128, sampler=sampler), no_prompt(3000, 2), key=5)
    assert chi_square(samples.tokens) < LIMIT


@pytest.mark.parametrize("sampler", ["", "sequential_ddpm"])
def test_a_denoiser_of_the_latents_own_draws_the_same_law(sampler):
    """Its calls are counted; the joint network is then shown what it left, at time 0."""
    objective = toy("co_ladd", latent_denoiser=True)
    objective.network = ToyNetwork(schedule=objective.schedule)
    objective.latent_denoiser = BlindDenoiser(ToyNetwork(schedule=objective.schedule))
    settings = SamplingConfig(steps=40, latent_steps=128, sampler=sampler)
    samples = draw_samples(objective, settings, no_prompt(3000, 2), key=5)
    assert chi_square(samples.tokens) < LIMIT
    assert objective.latent_denoiser.calls == 128
    assert all(128 < number <= 130 for number in samples.network_calls)
    assert all((times == 0).all() for *_, times in objective.network.calls)


def test_latents_that_know_no_text_take_no_prompt():
    prompt = Prompt(torch.ones(2, 12, dtype=torch.int64), torch.eye(2, 12, dtype=torch.bool))
    with pytest.raises(ConfigError, match="cannot fit a prompt"):
        draw_samples(build("co_ladd", latent_denoiser=True), SamplingConfig(steps=2), prompt, key=0)


@pytest.mark.parametrize("options", [{}, {"latent_schedule": "poly", "latent_power": 2.0}])
@pytest.mark.parametrize("sampler", ["joint", "sequential"])
def test_di_samplers_draw_the_law_of_the_bayes_denoiser(sampler, options):
    objective = toy("di_ladd", **options)
    objective.network = ToyNetwork()
    samples = draw_samples(objective, SamplingConfig(steps=128, sampler=sampler), no_prompt(3000, 2), key=5)
    assert chi_square(samples.tokens) < LIMIT


def test_sequential_sampling_in_one_step_each_keeps_what_the_code_says():
    """All tokens at once: independent given the code, and so not the law; but the code's law is right, and few codes
    are right for texts they do not belong to."""
    objective = toy("di_ladd")
    objective.network = ToyNetwork()
    settings = SamplingConfig(steps=1, sampler="sequential")
    tokens = draw_samples(objective, settings, no_prompt(3000, 2), key=5).tokens
    seen = objective.network.calls[-1][1]
    assert float((seen == -1).double().mean()) == pytest.approx(float(LAW[CODES == 1].sum()), abs=0.04)
    assert chi_square(tokens) > LIMIT


def test_prompts_hold_and_the_rest_has_the_conditional_law():
    for name, sampler in (("co_ladd", "joint"), ("co_ladd", "sequential_ddpm"), ("di_ladd", "joint"),
                          ("di_ladd", "sequential")):  # fmt: skip
        objective = toy(name, **({"independent_times": True} if name == "co_ladd" else {}))
        objective.network = ToyNetwork(schedule=getattr(objective, "schedule", None))
        known = torch.zeros(1500, 2, dtype=torch.bool)
        known[:, 0] = True
        prompt = Prompt(torch.full((1500, 2), 1), known)
        tokens = draw_samples(objective, SamplingConfig(steps=64, sampler=sampler), prompt, key=3).tokens
        assert (tokens[:, 0] == 1).all()
        assert all((seen[:, 0] == 1).all() for seen, *_ in objective.network.calls)
        fits = SEQUENCES[:, 0] == 1
        assert chi_square(tokens, LAW[fits] / LAW[fits].sum(), SEQUENCES[fits]) < 13.9  # 2 degrees of freedom


@pytest.mark.parametrize(
    ("name", "sampler"), [("co_ladd", "sequential"), ("co_ladd", "sequential_nelbo"), ("di_ladd", "sequential")]
)
def test_latents_of_a_given_text_are_shown_instead_of_sampled_ones(name, sampler):
    """The texts drawn are those with these latents, by the law; no call is spent on the latents."""
    objective = toy(name, **({"independent_times": True} if name == "co_ladd" else {}))
    objective.network = ToyNetwork(schedule=getattr(objective, "schedule", None))
    texts = SEQUENCES[torch.tensor([3, 7]).repeat(1500)]
    prompt = replace(no_prompt(3000, 2), described=texts)
    samples = draw_samples(objective, SamplingConfig(steps=2048, sampler=sampler), prompt, key=3)
    assert max(samples.network_calls) <= 2 and all((seen[3] == 0).all() for seen in objective.network.calls)
    for first in (0, 1):
        alike = CODES == first
        assert CODES[(3, 7)[first]] == first
        tokens, law = samples.tokens[first::2], LAW[alike] / LAW[alike].sum()
        assert chi_square(tokens, law, SEQUENCES[alike]) < chi2.isf(1e-3, int(alike.sum()) - 1)


# -- calls ---------------------------------------------------------------------------------------------------------


def counted(
    name: str, settings: SamplingConfig, num: int = 5, length: int = 12, prompt: Prompt | None = None, **options
):
    """(samples, what the network was given) of a random model."""
    objective = build(name, **options)
    calls, forward = [], objective.network.forward
    objective.network.forward = lambda *given: (calls.append(given), forward(*given))[1]
    return draw_samples(objective, settings, prompt or no_prompt(num, length), key=2), calls


@pytest.mark.parametrize("sampler", ["joint", "joint_ddpm"])
def test_co_joint_takes_one_call_a_step(sampler):
    samples, calls = counted("co_ladd", SamplingConfig(steps=7, sampler=sampler))
    assert samples.network_calls == [7] * 5 and len(calls) == 7
    assert (samples.tokens != MASK).all()


def test_co_sequential_takes_the_latents_steps_and_then_what_the_text_needs():
    settings = SamplingConfig(steps=40, latent_steps=6, sampler="sequential")
    samples, calls = counted("co_ladd", settings, independent_times=True)
    assert sum(samples.network_calls) == sum(len(tokens) for tokens, *_ in calls)
    assert all(torch.equal(latents, calls[6][1]) for _, latents, *_ in calls[6:] if len(latents) == 5)
    # Twelve tokens are revealed in at most twelve of forty steps.
    assert all(6 < number <= 6 + 12 for number in samples.network_calls)
    assert [float(times[0]) for _, _, times, _ in calls[:6]] == [1.0] * 6
    settings = SamplingConfig(steps=3, sampler="sequential")  # latent_steps = 0 takes as many
    assert all(3 < n <= 6 for n in counted("co_ladd", settings, independent_times=True)[0].network_calls)


@pytest.mark.parametrize("sampler, most", [("joint", 12 + 5), ("sequential", 12 + 5)])
def test_di_counts_only_steps_that_reveal_something(sampler, most):
    samples, calls = counted("di_ladd", SamplingConfig(steps=100, sampler=sampler))
    assert sum(samples.network_calls) == sum(len(tokens) for tokens, *_ in calls)
    assert all(8 < number <= most for number in samples.network_calls)
    if sampler == "joint":
        assert all(torch.equal(times, latent_times) for _, _, times, latent_times in calls)
        few, _ = counted("di_ladd", SamplingConfig(steps=1, sampler=sampler))
        assert few.network_calls == [1] * 5
    else:
        kinds = {(float(times[0]) == 1.0, float(latent_times[0]) == 0.0) for _, _, times, latent_times in calls}
        assert kinds == {(True, False), (False, True)}, "codes at t_x = 1, then the text at t_y = 0"
        assert all((tokens == MASK).all() for tokens, _, times, _ in calls if times[0] == 1)
        few, _ = counted("di_ladd", SamplingConfig(steps=1, latent_steps=1, sampler=sampler))
        assert few.network_calls == [2] * 5


def test_the_last_step_draws_every_code():
    """The grid of the codes ends at t = 0 exactly, where nothing is masked, however short the step is."""
    draws = Draws(key=3, ordinals=torch.arange(400), length=12, settings=SamplingConfig(), sampler="joint")
    objective = build("di_ladd", latent_schedule="poly", latent_power=2.0)
    masked = torch.full((400, 5), objective.mask_code)
    assert _reveal_codes(objective, masked, 1e-4, 0.0, 0, draws).all()
    halfway = _reveal_codes(objective, masked, 1.0, 0.5, 0, draws).double().mean()  # survival 3/4
    assert float(halfway) == pytest.approx(0.75, abs=5 * math.sqrt(0.19 / 2000))
    assert not _reveal_codes(objective, torch.zeros_like(masked), 1.0, 0.0, 0, draws).any()


def test_codes_and_tokens_of_a_step_are_drawn_apart():
    """The same place of the same sample, the same logits: they agree by chance alone."""
    draws = Draws(key=3, ordinals=torch.arange(400), length=12, settings=SamplingConfig(), sampler="joint")
    objective, everywhere = build("di_ladd", codebook_size=VOCAB), torch.ones(400, 5, dtype=torch.bool)
    rows, columns = everywhere.nonzero(as_tuple=True)
    logits = torch.zeros(len(rows), VOCAB)
    tokens = draws.tokens(logits, 0, rows, columns, forbidden=MASK)
    masked = torch.full((400, 5), objective.mask_code)
    codes = _fill_codes(masked, everywhere, logits.view(400, 5, VOCAB), everywhere.any(1), objective, 0, draws)
    assert (codes != objective.mask_code).all()
    agreement = float((codes.flatten() == tokens).double().mean())
    assert agreement == pytest.approx(1 / 16, abs=0.03)


def test_nothing_is_called_for_a_text_that_is_known():
    prompt = Prompt(torch.ones(2, 12, dtype=torch.int64), torch.ones(2, 12, dtype=torch.bool))
    settings = SamplingConfig(steps=9, latent_steps=4, sampler="sequential")
    samples, _ = counted("co_ladd", settings, prompt=prompt, independent_times=True)
    assert samples.network_calls == [4, 4] and (samples.tokens == 1).all()


@pytest.mark.parametrize("name", ["co_ladd", "di_ladd"])
def test_a_sample_does_not_depend_on_its_batch(name):
    objective = build(name)
    settings = SamplingConfig(steps=6)
    together = draw_samples(objective, settings, no_prompt(4, 12), key=2).tokens
    alone = draw_samples(objective, settings, no_prompt(1, 12), key=2, first_ordinal=2).tokens
    assert torch.equal(together[2:3], alone)
    other = draw_samples(objective, settings, no_prompt(4, 12), key=3).tokens
    assert not torch.equal(together, other)


@pytest.mark.parametrize("name, sampler", [("co_ladd", "sequential"), ("co_ladd", "sequential_ddpm"),
                                           ("di_ladd", "sequential")])  # fmt: skip
def test_sequential_sampling_needs_independent_times(name, sampler):
    objective = build(name, independent_times=False)
    with pytest.raises(ConfigError, match="never trained at"):
        draw_samples(objective, SamplingConfig(steps=2, sampler=sampler), no_prompt(1, 12), key=0)


def test_temperature_is_the_tokens_alone():
    """Cold: the most probable tokens given the codes, but codes of both kinds."""
    objective = toy("di_ladd")
    objective.network = ToyNetwork()
    settings = SamplingConfig(steps=1, latent_steps=1, sampler="sequential", temperature=1e-3)
    tokens = draw_samples(objective, settings, no_prompt(400, 2), key=1).tokens
    shown = objective.network.calls[-1][1][:, 0, 0]
    assert 0.1 < float((shown == 1).double().mean()) < 0.9
    for sign in (1, -1):
        assert len(tokens[shown == sign].unique(dim=0)) == 1


@pytest.mark.parametrize("name, sampler, num", [("co_ladd", "joint", 5), ("di_ladd", "sequential", 3 + 5)])
def test_frames_record_the_run(name, sampler, num):
    objective, done = build(name), []
    settings = SamplingConfig(steps=5, latent_steps=3 if sampler == "sequential" else 0, sampler=sampler)
    samples = draw_samples(objective, settings, no_prompt(2, 12), key=1, record=True,
                           progress=lambda step, total: done.append((step, total)))  # fmt: skip
    assert len(samples.frames) == num and samples.frames[-1]["time"] == 0
    assert samples.frames[-1]["tokens"] == samples.tokens[0].tolist()
    assert done == [(step + 1, num) for step in range(num)]
