"""ELF's samplers with networks whose answers are known: laws, times, calls, guidance, what is given, decoding."""

from __future__ import annotations

import math

import pytest
import torch

from braid.kernels.errors import ConfigError
from braid.pretrain.config.schema import SamplingConfig
from braid.pretrain.diffusion.flow import flow_grid, interpolate, stepped_back
from braid.pretrain.model.elf_network import ELFPrediction
from braid.pretrain.model.token_logits import TokenLogits
from braid.pretrain.sampling.prompts import Prompt, no_prompt
from braid.pretrain.sampling.sampler import draw_samples

from ..diffusion.test_flow import exact_denoiser, sampled_std
from ..objectives.conftest import MASK, VOCAB
from ..objectives.elf_cases import DIM, LENGTH, SOURCE, Recorder, Says, build_elf
from ..objectives.references import Network

SAMPLERS = ("sde", "sde_paper", "sde_marginal", "ode")


def recorded(**options):
    elf = build_elf(**options)
    elf.network = Recorder(elf.network)
    return elf, elf.network.calls


def draw(elf, prompt=None, num: int = 3, *, key: int = 1, first: int = 0, **settings):
    prompt = no_prompt(num, LENGTH) if prompt is None else prompt
    return draw_samples(elf, SamplingConfig(**settings), prompt, key=key, first_ordinal=first, record=True)


def given(num: int = 3, known: slice = SOURCE) -> Prompt:
    prompt = no_prompt(num, LENGTH)
    prompt.tokens[:] = torch.randint(0, MASK, (num, LENGTH), generator=torch.Generator().manual_seed(5))
    prompt.known[:, known] = True
    return prompt


class Fixed(Network):
    """Predicts the same clean latents x [N, L, D] whatever it sees, and decodes to the dimension that is largest."""

    latent_dim = DIM

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.x, self.decoded = x, None

    def forward(self, z, estimate, tau, guidance, decode, valid, *, heads) -> ELFPrediction:
        if heads == ("decode",):
            self.decoded = z
            return ELFPrediction(None, TokenLogits.known(torch.nn.functional.pad(z, (0, VOCAB - DIM), value=-100.0)))
        return ELFPrediction(self.x, None)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("grid", ["quantiles", "random", "uniform"])
@pytest.mark.parametrize("steps", [1, 2, 12])
def test_a_denoiser_that_knows_the_text_ends_there(sampler, grid, steps):
    """x^ = x gives z = x after the last step, whatever was before it, when that step begins at 0.95 or earlier."""
    x = 3 * torch.randn(3, LENGTH, DIM, generator=torch.Generator().manual_seed(0))
    elf = build_elf()
    elf.network = Fixed(x)
    samples = draw(elf, steps=steps, sampler=sampler, grid=grid)
    assert torch.allclose(elf.network.decoded, x, atol=1e-5)
    assert torch.equal(samples.tokens, x.argmax(-1))


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_calls_are_steps_and_one_that_decodes(sampler, steps):
    elf, calls = recorded()
    samples = draw(elf, steps=steps, sampler=sampler)
    assert samples.network_calls == [steps + 1] * 3 and len(calls) == steps + 1
    assert [frame["time"] for frame in samples.frames] == sorted((f["time"] for f in samples.frames), reverse=True)
    assert len(samples.frames) == steps and samples.frames[-1]["time"] == 0
    assert samples.frames[-1]["tokens"] == samples.tokens[0].tolist()
    assert all(frame["tokens"] == [MASK] * LENGTH for frame in samples.frames[:-1])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_the_network_is_told(sampler):
    """Flow times of the grid (stepped back, but for the last interval), the scale, the mode; the last estimate, and
    nothing in decode mode."""
    steps, gamma = 6, 1.5
    elf, calls = recorded()
    draw(elf, steps=steps, sampler=sampler, guidance=3.0, noise_scale=1.0 if sampler == "ode" else gamma)
    grid = flow_grid("quantiles", steps, -1.5, 0.8)
    back = [tau * (1 - gamma * (after - tau)) for tau, after in zip(grid[:-2], grid[1:-1], strict=True)]
    expected = [*(grid[:-2] if sampler == "ode" else back), grid[-2], 1.0]
    told = [float(call["tau"][0]) for call in calls]
    assert told == pytest.approx(expected, rel=1e-12)
    for call in calls:
        assert (
            torch.all(call["tau"] == call["tau"][0]) and torch.all(call["guidance"] == 3) and bool(call["valid"].all())
        )
    *denoise, decode = calls
    assert torch.all(denoise[0]["shown"] == 0) and torch.all(decode["shown"] == 0)
    for before, call in zip(denoise[:-1], denoise[1:], strict=True):
        assert torch.equal(call["shown"], before["latents"])
    assert [call["heads"] for call in calls] == [("denoise",)] * steps + [("decode",)]
    assert bool(decode["decode"].all()) and not any(bool(call["decode"].any()) for call in denoise)


@pytest.mark.parametrize("sampler", SAMPLERS[:-1])
def test_an_sde_that_puts_no_noise_back_is_the_ode_bit_for_bit(sampler):
    ode, calls = recorded()
    first = draw(ode, steps=5, sampler="ode")
    sde, others = recorded()
    second = draw(sde, steps=5, sampler=sampler, noise_scale=0.0)
    for call, other in zip(calls, others, strict=True):
        assert torch.equal(call["z"], other["z"]) and torch.equal(call["tau"], other["tau"])
    assert torch.equal(first.tokens, second.tokens)
    noisy, others = recorded()
    draw(noisy, steps=5, sampler=sampler, noise_scale=1.0)
    assert not torch.equal(calls[2]["z"], others[2]["z"])


@pytest.mark.parametrize(
    ("sampler", "gamma", "grid"),
    [
        ("ode", 1.0, "uniform"),
        ("sde", 1.0, "uniform"),
        ("sde", 2.0, "uniform"),
        ("sde_marginal", 1.0, "uniform"),
        ("sde_paper", 1.0, "uniform"),
        ("ode", 1.0, "quantiles"),
    ],
)
def test_the_law_of_the_latents_with_the_exact_denoiser(sampler, gamma, grid):
    """Latents N(0, 1): the standard deviation after 64 steps is the one that follows for the formulas without drawing
    (test_flow.py): near 1 for the ODE and the marginal SDE, 0.32 and 0.27 for the released code's, on an even grid."""
    elf = build_elf()
    elf.network = Recorder(Says(exact_denoiser))
    draw(elf, no_prompt(400, LENGTH), steps=64, sampler=sampler, noise_scale=gamma, grid=grid)
    z = elf.network.calls[-1]["z"]
    variant = {"sde": "code"}.get(sampler, sampler.removeprefix("sde_"))
    expected = sampled_std(variant, gamma, 64, floor=0.05, kind=grid)
    assert float(z.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * z.numel()))
    assert abs(float(z.mean())) < 5 * expected / math.sqrt(z.numel())
    if sampler == "sde":
        assert float(z.std()) == pytest.approx({1.0: 0.32, 2.0: 0.27}[gamma], abs=0.01)
    elif grid == "quantiles":
        assert float(z.std()) == pytest.approx(0.525, abs=0.02)
    else:
        assert float(z.std()) > 0.88


def test_the_noise_of_a_step_is_fresh_and_its_own():
    """Every position, channel, step and sample gets its own; the chain starts at the noise's scale."""
    elf = build_elf()
    elf.network = Recorder(Says(lambda z, tau: torch.zeros_like(z)))
    draw(elf, no_prompt(200, LENGTH), steps=4, sampler="sde", noise_scale=1.0, grid="uniform")
    start, *later = [call["z"] for call in elf.network.calls[:-1]]
    grid, z, noises = flow_grid("uniform", 4, -1.5, 0.8), None, []
    assert float(start.std()) < 2
    for step, seen in enumerate([start, *later][:3]):
        # invert the code's step: z_b = a z + (1 - a) 2 eps with z known from the step before
        tau, after = grid[step], grid[step + 1]
        z = 2.0 * _fixed(elf, 200) if step == 0 else z
        (a_z, tau_back), (spread, _) = (
            stepped_back(*pair, tau, after, 1.0, 2.0, marginal=False)
            for pair in ((z, torch.zeros(())), (torch.zeros(()), torch.ones(())))
        )
        noises.append((seen - a_z) / spread)
        z = seen + (after - tau_back) / (1 - tau_back) * (0 - seen)
    for noise in noises:
        assert float(noise.std()) == pytest.approx(1, abs=0.05) and abs(float(noise.mean())) < 0.05
    stacked = torch.stack([_fixed(elf, 200).flatten(), *(noise.flatten() for noise in noises)])
    off = torch.corrcoef(stacked)[~torch.eye(4, dtype=torch.bool)]
    assert float(off.abs().max()) < 5 / math.sqrt(stacked.shape[1])


def _fixed(elf, num):
    from braid.kernels.random import fold_key, normal

    return normal(fold_key(fold_key(1, "sampler"), "latents"), torch.arange(num), torch.arange(LENGTH), DIM)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_known_positions_follow_the_forward_process(sampler):
    """One fixed noise, at the very flow time the network is told; their tokens stay."""
    elf, calls = recorded()
    prompt = given(known=slice(2, 6))
    samples = draw(elf, prompt, steps=5, sampler=sampler)
    assert torch.equal(samples.tokens[:, 2:6], prompt.tokens[:, 2:6])
    assert int((samples.tokens[:, 6:] == prompt.tokens[:, 6:]).sum()) < samples.tokens[:, 6:].numel()
    clean, noise = elf.text.encode(prompt.tokens, prompt.known), _fixed(elf, 3)
    for call in calls:
        expected = interpolate(clean, noise, call["tau"], 2.0)
        assert torch.equal(call["z"][:, 2:6], expected[:, 2:6])
        assert not torch.allclose(call["z"][:, 6:], expected[:, 6:], atol=1e-2) or float(call["tau"][0]) == 0
    assert torch.equal(calls[1]["shown"], calls[0]["latents"])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_source_is_clean_at_every_call(sampler):
    elf, calls = recorded(paired=True)
    prompt = given()
    samples = draw(elf, prompt, steps=4, sampler=sampler)
    clean = elf.text.encode(prompt.tokens, prompt.known, prompt.known)
    for call in calls:
        assert torch.equal(call["z"][:, SOURCE], clean[:, SOURCE])
    *denoise, decode = calls
    for call in denoise:
        assert torch.equal(call["shown"][:, SOURCE], clean[:, SOURCE])
    assert torch.all(decode["shown"] == 0)
    assert torch.equal(samples.tokens[:, SOURCE], prompt.tokens[:, SOURCE])


def test_guidance_by_the_source():
    """x_u + s (x_c - x_u) from two calls a step; the one without sees zeros where the source was."""
    steps, s = 3, 2.0
    elf, calls = recorded(paired=True)
    samples = draw(elf, given(), steps=steps, sampler="ode", input_guidance=s)
    assert samples.network_calls == [2 * steps + 1] * 3 and len(calls) == 2 * steps + 1
    grid, target = flow_grid("quantiles", steps, -1.5, 0.8), slice(SOURCE.stop, None)
    for step in range(steps):
        with_source, without = calls[2 * step : 2 * step + 2]
        for name in ("z", "shown"):
            assert torch.all(without[name][:, SOURCE] == 0)
            assert torch.equal(without[name][:, target], with_source[name][:, target])
        x = (without["latents"] + s * (with_source["latents"] - without["latents"]))[:, target]
        z, after = with_source["z"][:, target], calls[2 * step + 2]["z"][:, target]
        expected = z + (grid[step + 1] - grid[step]) / (1 - grid[step]) * (x - z)
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)
        if step < steps - 1:
            assert torch.equal(calls[2 * step + 2]["shown"][:, target], x)


def test_samples_do_not_depend_on_their_batch():
    elf, settings = build_elf(), {"steps": 4, "grid": "random"}
    together = draw(elf, num=6, **settings).tokens
    apart = torch.cat([draw(elf, num=2, first=first, **settings).tokens for first in (0, 2, 4)])
    assert torch.equal(together, apart)
    assert not torch.equal(together, draw(elf, num=6, key=2, **settings).tokens)


def test_random_grids_belong_to_the_key():
    taus = []
    for key, num in ((1, 2), (1, 5), (2, 2)):
        elf, calls = recorded()
        draw(elf, num=num, steps=6, key=key, sampler="ode", grid="random")
        taus.append([float(call["tau"][0]) for call in calls])
    assert taus[0] == taus[1] != taus[2]
    assert taus[0] == sorted(taus[0]) and taus[0][0] == 0 and taus[0][-1] == 1


def test_decoding_is_greedy_unless_a_temperature_or_nucleus_asks_for_draws():
    elf, calls = recorded()
    greedy = draw(elf, num=40, steps=2)
    logits = calls[-1]["logits"].clone()
    logits[..., MASK] = -torch.inf
    assert torch.equal(greedy.tokens, logits.argmax(-1))
    hot = draw(elf, num=40, steps=2, temperature=1.5).tokens
    assert not torch.equal(greedy.tokens, hot) and not bool((hot == MASK).any())
    assert torch.equal(hot, draw(elf, num=40, steps=2, temperature=1.5).tokens)
    small = draw(elf, num=40, steps=2, top_p=1e-6).tokens
    assert torch.equal(small, greedy.tokens)


def test_the_decoder_can_be_drawn_from_at_temperature_one():
    """Frequencies of the tokens at one place against its softmax without the mask, by a chi-square statistic."""
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    class Certain(Says):
        def forward(self, z, *given, heads) -> ELFPrediction:
            return ELFPrediction(torch.zeros_like(z), TokenLogits.known(logits.expand(*z.shape[:2], -1).clone()))

    elf = build_elf()
    elf.network = Certain(None)
    tokens = draw(elf, num=400, steps=1, draw_final=True).tokens
    law = logits[:MASK].softmax(0)
    counts = torch.bincount(tokens.flatten(), minlength=VOCAB)
    assert counts[MASK] == 0
    expected = tokens.numel() * law
    assert float(((counts[:MASK] - expected).square() / expected).sum()) < 37.7, "15 degrees of freedom, once in 1000"
    assert (draw(elf, num=4, steps=1).tokens == law.argmax()).all()


def test_the_mask_is_never_decoded():
    elf = build_elf()
    with torch.no_grad():
        elf.network.decode_head.unembedding.bias[MASK] = 1e4
    for settings in ({}, {"temperature": 0.7}):
        assert not bool((draw(elf, steps=2, **settings).tokens == MASK).any())


@pytest.mark.parametrize(
    ("settings", "options", "what"),
    [
        ({"guidance": 0.4}, {}, "0.5 to 5.0"),
        ({"guidance": 5.5}, {}, "0.5 to 5.0"),
        ({"input_guidance": 2.0}, {}, "no source to guide by"),
        ({"input_guidance": 2.0}, {"paired": True, "condition_dropout": 0.0}, "no source to guide by"),
    ],
)
def test_guidance_that_was_not_trained_is_refused(settings, options, what):
    with pytest.raises(ConfigError, match=what):
        draw(build_elf(**options), steps=2, **settings)
