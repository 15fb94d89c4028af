"""RePlaid's samplers: the law of the Bayes denoiser, calls, what the network is shown, prompts, temperatures."""

import argparse
import math
from dataclasses import replace

import pytest
import torch

from braid.pretrain.config.objectives.replaid import RePlaidConfig
from braid.pretrain.config.schema import SamplingConfig
from braid.pretrain.diffusion import gamma as process
from braid.pretrain.sampling import command
from braid.pretrain.sampling.prompts import no_prompt
from braid.pretrain.sampling.sampler import draw_samples

from ..objectives.conftest import MASK
from ..objectives.replaid_reference import DIM, build_replaid
from ..objectives.test_replaid_bound import NUM_TOKENS, bayes, dirichlet_law

STEPS = SamplingConfig(steps=6)
SAMPLERS = ["ddpm", "ddim", "dpm2m", "heun"]


def prompt_of(num: int = 3, length: int = 10):
    prompt = no_prompt(num, length)
    prompt.tokens[:, 2:5], prompt.known[:, 2:5] = torch.tensor([1, 2, 3]), True
    return prompt


def recorded(objective) -> list[dict]:
    """What the network is called with from now on."""
    seen = []
    objective.network.register_forward_pre_hook(
        lambda _, args: seen.append({"inputs": args[0], "estimates": args[1], "level": args[2]})
    )
    return seen


@pytest.mark.parametrize("sampler, calls", [("ddpm", 7), ("ddim", 7), ("dpm2m", 7), ("heun", 13)])
def test_network_calls_are_counted(sampler, calls):
    """One a step, two for Heun, and one at t = 0 for the tokens."""
    objective = build_replaid()
    seen = recorded(objective)
    samples = draw_samples(objective, replace(STEPS, sampler=sampler), no_prompt(3, 10), key=1, record=True)
    assert samples.network_calls == [calls] * 3 and len(seen) == calls
    assert samples.tokens.shape == (3, 10) and not (samples.tokens == MASK).any()
    assert [frame["time"] for frame in samples.frames] == pytest.approx([1 - (i + 1) / 6 for i in range(6)], abs=1e-12)
    assert samples.frames[-1]["tokens"] == samples.tokens[0].tolist()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_bayes_denoiser_samples_its_law(sampler):
    """Frequencies of 12 tokens, by chi-square; the same test refuses the uniform law."""
    law, num = dirichlet_law(2.0, seed=1), 1500
    objective = bayes(law, gamma_schedule="linear")
    tokens = draw_samples(objective, SamplingConfig(steps=64, sampler=sampler), no_prompt(num, 1), key=3).tokens
    observed = torch.bincount(tokens[:, 0], minlength=NUM_TOKENS)[:NUM_TOKENS].double() / num

    def chi_square(expected):
        return float((num * (observed - expected) ** 2 / expected).sum())

    limit = 11 + 4 * math.sqrt(2 * 11) + num * 0.001
    assert float(observed.sum()) == 1
    assert chi_square(law) < limit < chi_square(torch.full_like(law, 1 / NUM_TOKENS))


def test_every_call_is_shown_the_estimate_before_it():
    objective = build_replaid()
    seen, said = recorded(objective), []
    logits = objective.logits
    objective.logits = lambda *args, **kwargs: (said.append(logits(*args, **kwargs)), said[-1])[1]
    settings = SamplingConfig(steps=4, sampler="heun", score_temperature=0.7, temperature=0.5)
    draw_samples(objective, settings, no_prompt(2, 10), key=1)
    table = objective.network.embedding().detach()
    assert torch.equal(seen[0]["estimates"], torch.zeros(2, 10, DIM))
    for before, call in zip(said, seen[1:], strict=False):  # the plain estimate, before temperatures
        assert torch.allclose(call["estimates"], before.softmax(-1) @ table, atol=1e-6)
    plain = build_replaid(self_conditioning=False)
    seen = recorded(plain)
    draw_samples(plain, settings, no_prompt(2, 10), key=1)
    assert all((call["estimates"] == 0).all() for call in seen)


def test_the_last_call_is_at_the_clean_end_and_decides():
    """gamma_0 of the schedule, not 0; the most probable tokens of that call."""
    objective = build_replaid()
    with torch.no_grad():
        objective.schedule.gamma_0.fill_(-2.5)
    seen, said = recorded(objective), []
    logits = objective.logits
    objective.logits = lambda *args, **kwargs: (said.append(logits(*args, **kwargs)), said[-1])[1]
    tokens = draw_samples(objective, STEPS, no_prompt(2, 10), key=1).tokens
    levels = torch.stack([call["level"][0] for call in seen])
    grid = objective.schedule(torch.linspace(1, 0, 7, dtype=torch.float64)).detach()
    assert torch.allclose(levels, grid, rtol=1e-12) and float(levels[-1]) == -2.5
    assert torch.equal(tokens, said[-1].argmax(-1))


def test_an_ancestral_step_is_a_draw_from_the_posterior():
    """Follow the state from call to call: z_s - mean is d times the step's own noise."""
    objective = build_replaid()
    states, said = [], []
    logits = objective.logits

    def follow(z, *args, **kwargs):
        states.append(z.double())
        said.append(logits(z, *args, **kwargs))
        return said[-1]

    objective.logits = follow
    draw_samples(objective, STEPS, no_prompt(500, 10), key=1)
    gammas = objective.schedule(torch.linspace(1, 0, 7, dtype=torch.float64)).detach()
    table = objective.network.embedding().detach()
    noise = []
    for step in range(6):
        a, b, d = process.posterior(gammas[step], gammas[step + 1])
        noise.append((states[step + 1] - a * states[step] - b * (said[step].softmax(-1) @ table)) / d)
    noise = torch.stack(noise)
    assert float(noise.mean()) == pytest.approx(0, abs=0.01) and float(noise.std()) == pytest.approx(1, abs=0.01)
    assert float((noise[1:] * noise[:-1]).mean()) == pytest.approx(0, abs=0.01)  # fresh at every step
    assert float(states[0].mean()) == pytest.approx(0, abs=0.01) and float(states[0].std()) == pytest.approx(
        1, abs=0.01
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch(sampler):
    objective, settings = build_replaid(), replace(STEPS, sampler=sampler)
    together = draw_samples(objective, settings, no_prompt(6, 10), key=1).tokens
    alone = draw_samples(objective, settings, no_prompt(2, 10), key=1, first_ordinal=4).tokens
    assert torch.equal(together[4:], alone)
    assert not torch.equal(together, draw_samples(objective, settings, no_prompt(6, 10), key=2).tokens)


def test_samplers_differ():
    objective = build_replaid()
    states = set()
    for sampler in SAMPLERS:
        samples = draw_samples(objective, replace(STEPS, sampler=sampler), no_prompt(1, 10), key=1, record=True)
        states.add(samples.frames[-1]["latent_norm"])
    assert len(states) == 4


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_known_positions_follow_the_forward_process_with_one_noise(sampler):
    """Every call sees alpha e + sigma eps there, scaled as in training, eps being where the chain began."""
    objective, prompt = build_replaid(), prompt_of()
    seen = recorded(objective)
    samples = draw_samples(objective, replace(STEPS, sampler=sampler), prompt, key=1, record=True)
    clean = objective.network.embedding().detach()[torch.tensor([1, 2, 3])].double()
    eps = None
    for call in seen:
        gamma = call["level"][0]
        z = call["inputs"][:, 2:5].double() / process.unit_scale(gamma, DIM)
        found = (z - process.alpha(gamma) * clean) / process.sigma(gamma)
        eps = found if eps is None else eps
        assert torch.allclose(found, eps, atol=1e-4)
    assert float(eps.std()) == pytest.approx(1, abs=0.2)
    assert torch.equal(samples.tokens[:, 2:5], prompt.tokens[:, 2:5])
    assert all(frame["tokens"][2:5] == [1, 2, 3] for frame in samples.frames)


def test_a_model_of_pairs_is_shown_the_source_clean():
    objective, prompt = build_replaid(), prompt_of()
    objective.given_clean = True
    seen = recorded(objective)
    draw_samples(objective, STEPS, prompt, key=1)
    clean = objective.network.embedding().detach()[torch.tensor([1, 2, 3])]
    assert all(torch.allclose(call["inputs"][:, 2:5], 4 * clean.expand(3, 3, DIM), atol=1e-5) for call in seen)


def test_token_guidance_adds_the_gradient_of_the_known_tokens():
    """x + w (sigma^2 / alpha) d/dz log p(known | z), with the gradient by finite differences."""
    objective, prompt, weight = build_replaid(), prompt_of(1), 3.0
    states, known = [], prompt.tokens[0, 2:5]
    logits = objective.logits

    def follow(z, *args, **kwargs):
        states.append((z.detach().double(), args, kwargs))
        return logits(z, *args, **kwargs)

    objective.logits = follow
    settings = SamplingConfig(steps=3, sampler="ddim", token_guidance=weight)
    samples = draw_samples(objective, settings, prompt, key=1)
    assert torch.equal(samples.tokens[:, 2:5], prompt.tokens[:, 2:5])
    (z, args, kwargs), (z_next, *_) = states[:2]
    gammas = objective.schedule(torch.linspace(1, 0, 4, dtype=torch.float64)).detach()
    x = (z_next - process.sigma(gammas[1]) / process.sigma(gammas[0]) * z) / (
        process.alpha(gammas[1]) - process.sigma(gammas[1]) / process.sigma(gammas[0]) * process.alpha(gammas[0])
    )  # what the DDIM step was made with

    @torch.no_grad()
    def log_probability(z) -> float:
        said = logits(z.float(), *args, **kwargs).double().log_softmax(-1)
        return float(said[0, 2:5].gather(1, known[:, None]).sum())

    with torch.no_grad():
        plain = logits(z.float(), *args, **kwargs).softmax(-1) @ objective.network.embedding()
    factor = weight * float(process.sigma(gammas[0]) ** 2 / process.alpha(gammas[0]))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = torch.randn(z.shape, generator=generator, dtype=torch.float64)
        slope = (log_probability(z + 1e-2 * direction) - log_probability(z - 1e-2 * direction)) / 2e-2
        assert float(((x - plain) * direction).sum()) == pytest.approx(factor * slope, rel=2e-2, abs=2e-3)


def test_token_guidance_without_a_prompt_costs_no_backward_pass():
    objective, differentiated = build_replaid(), []
    logits = objective.logits
    objective.logits = lambda z, *args, **kw: (differentiated.append(torch.is_grad_enabled()), logits(z, *args, **kw))[
        1
    ]
    guided, plain = (
        draw_samples(objective, replace(STEPS, token_guidance=weight), no_prompt(2, 10), key=1).tokens
        for weight in (2.0, 0.0)
    )
    assert torch.equal(guided, plain) and not any(differentiated)


def test_token_guidance_is_refused_where_no_token_is_known():
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)

    def whats(*words):
        args = parser.parse_args(["run", *words])
        return [problem.what for problem in command._problems(args, SamplingConfig(), RePlaidConfig())]

    (what,) = whats("--token-guidance", "2")
    assert "would do nothing" in what
    assert whats("--token-guidance", "2", "--prompt", "a") == whats("--token-guidance", "0") == []


def test_token_guidance_pulls_the_free_estimate_towards_the_prompt():
    """Nothing is pinned, and yet the network's own words at the known positions become those of the prompt."""
    law = dirichlet_law(2.0, seed=1)
    objective, prompt = bayes(law, gamma_schedule="linear"), no_prompt(200, 2)
    prompt.tokens[:, 0], prompt.known[:, 0] = 5, True
    shares = []
    for weight in (1e-9, 2.0):
        said = []
        logits = objective.logits
        objective.logits = lambda *args, logits=logits, said=said, **kw: (said.append(logits(*args, **kw)), said[-1])[1]
        draw_samples(objective, SamplingConfig(steps=32, token_guidance=weight), prompt, key=1)
        shares.append(float((said[-1][:, 0].argmax(-1) == 5).double().mean()))
        objective.logits = logits
    assert shares[0] < 0.5 and shares[1] > 0.9


def test_temperatures_and_nucleus_sharpen_the_estimates():
    """Cold tokens make every estimate one embedding; a score temperature of 1 changes nothing, below 1 it does."""
    objective = build_replaid()
    plain, *others = (
        draw_samples(objective, replace(STEPS, **change), no_prompt(4, 10), key=1, record=True).frames[-1][
            "latent_norm"
        ]
        for change in ({}, {"score_temperature": 0.9}, {"temperature": 0.3}, {"top_p": 0.3})
    )
    assert len({plain, *others}) == 4
    cold, greedy = (
        draw_samples(objective, replace(STEPS, **change), no_prompt(4, 10), key=1).tokens
        for change in ({"temperature": 1e-4}, {"top_p": 1e-9})
    )
    assert torch.equal(cold, greedy)
