"""The sampler of tokens and latents as a whole, with networks whose answers are known: laws, times and guidance."""

import math

import pytest
import torch

from braid.kernels.errors import ConfigError
from braid.pretrain.config.schema import SamplingConfig
from braid.pretrain.model.joint import JointPrediction
from braid.pretrain.model.token_logits import TokenLogits
from braid.pretrain.sampling.draws import Draws
from braid.pretrain.sampling.prompts import no_prompt
from braid.pretrain.sampling.sampler import draw_samples

from ..objectives.ccdd_cases import ARCHITECTURES, make, recorded_calls
from ..objectives.conftest import LATENT_DIM, MASK, VOCAB
from ..objectives.references import Network, Oracle, toy_law

MEAN, DEVIATION = 1.0, 0.5


def coefficients(schedule: str, t: float) -> tuple[float, float]:
    return (math.sqrt(1 - t), math.sqrt(t)) if schedule == "vp_linear" else (1 - t, t)


class GaussianOracle(Network):
    """E[z_0 | z_t] of latents N(MEAN, DEVIATION^2) that know nothing of the tokens; records all it sees and says."""

    def __init__(self, schedule: str) -> None:
        super().__init__()
        self.schedule, self.times, self.seen, self.said = schedule, [], [], []

    def forward(self, tokens, times, latents, dropout=None, latent_times=None, segments=None) -> JointPrediction:
        t = float(times[0])
        assert torch.all(times == t) and (latent_times is None or torch.equal(latent_times, times))
        alpha, sigma = coefficients(self.schedule, t)
        gain = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2)
        zhat = MEAN + gain * (latents - alpha * MEAN)
        self.times.append(t), self.seen.append(latents), self.said.append(zhat)
        return JointPrediction(TokenLogits.known(torch.zeros(*tokens.shape, VOCAB)), zhat)


@pytest.mark.parametrize("schedule", ["vp_linear", "flow_linear"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_latents_follow_the_forward_process_backwards(sampler, schedule):
    """The Bayes estimate of a Gaussian: z_t has the forward law N(alpha m, alpha^2 v + sigma^2) at every time.

    DDIM carries the initial noise to the end unchanged but for scale; DDPM forgets it.
    """
    ccdd, steps = make(schedule=schedule), 100
    ccdd.network = GaussianOracle(schedule)
    settings = SamplingConfig(steps=steps, sampler=sampler)
    samples = draw_samples(ccdd, settings, no_prompt(100, 16), key=1, record=True)
    times, seen, said = ccdd.network.times, ccdd.network.seen, ccdd.network.said

    # The time the network is told is the time of what it sees: the start of each step.
    assert times == torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1].tolist()
    assert samples.network_calls == [len(seen)] * 100 and len(seen) == steps
    num = seen[0].numel()
    for t, z in zip([*times, 0.0], [*seen, said[-1]], strict=True):  # the last step, to t = 0, ends at the estimate
        alpha, sigma = coefficients(schedule, t)
        deviation = math.sqrt(alpha**2 * DEVIATION**2 + sigma**2)
        # five standard errors, and what 100 steps leave of the deviation
        assert float(z.mean()) == pytest.approx(alpha * MEAN, abs=5 * deviation / math.sqrt(num))
        assert float(z.std()) == pytest.approx(deviation, rel=5 / math.sqrt(2 * num) + 0.05)
    assert samples.frames[-1]["latent_norm"] == pytest.approx(float(said[-1][0].norm(dim=-1).mean()), rel=1e-5)
    noise_left = float(torch.corrcoef(torch.stack([seen[0].flatten(), said[-1].flatten()]))[0, 1])
    assert noise_left > 0.999 if sampler == "ddim" else abs(noise_left) < 0.2


@pytest.mark.parametrize("schedule, mode", [("vp_linear", "shared"), ("flow_linear", "independent")])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_256_steps_keep_the_deviation_of_the_data(sampler, schedule, mode):
    """Within 3 % of what the forward process has at the last time that is seen. (The released DDPM step exchanges its
    two coefficients and collapses to the mean.) Networks of separate times are told one time for both strands."""
    ccdd = make(schedule=schedule, latent_times=mode)
    ccdd.network = GaussianOracle(schedule)
    draw_samples(ccdd, SamplingConfig(steps=256, sampler=sampler), no_prompt(200, 16), key=1)
    alpha, sigma = coefficients(schedule, ccdd.network.times[-1])
    last, deviation = ccdd.network.seen[-1], math.sqrt(alpha**2 * DEVIATION**2 + sigma**2)
    assert float(last.std()) == pytest.approx(deviation, rel=0.03)
    assert float(last.mean()) == pytest.approx(alpha * MEAN, abs=0.02)


class TwoAnswers(Network):
    """One table of logits [L, V] with latents, another without. What it says of the clean latents without any is NaN:
    nobody may use it."""

    def __init__(self, length: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.with_latents, self.without = torch.randn(2, length, VOCAB, generator=generator)
        self.calls = []

    def forward(self, tokens, times, latents, dropout=None, segments=None) -> JointPrediction:
        off = bool((latents == 0).all())
        self.calls.append((off, tokens.clone(), times.clone(), latents))
        logits = self.without if off else self.with_latents
        zhat = torch.full((*tokens.shape, LATENT_DIM), math.nan if off else 0.5)
        return JointPrediction(TokenLogits.known(logits.expand(len(tokens), -1, -1)), zhat)


def test_guidance_extrapolates_away_from_the_network_without_latents(monkeypatch):
    """At w = 2, tokens are drawn from 2 logits(x, z) - logits(x, 0) of the same tokens at the same time."""
    ccdd, length = make(), 12
    ccdd.network = network = TwoAnswers(length)
    drawn = []
    draw = Draws.tokens

    def recording(draws, logits, step, rows, columns, *, places_M, unguided_RV, **options):
        tokens = draw(draws, logits, step, rows, columns, places_M=places_M, unguided_RV=unguided_RV, **options)
        drawn.append((2 * logits[places_M] - unguided_RV[places_M], rows, columns, tokens))
        return tokens

    monkeypatch.setattr(Draws, "tokens", recording)
    samples = draw_samples(ccdd, SamplingConfig(steps=6, guidance=2.0), no_prompt(4, length), key=1)
    assert [call[0] for call in network.calls] == [False, True] * 6
    for conditional, unconditional in zip(network.calls[::2], network.calls[1::2], strict=True):
        assert torch.equal(conditional[1], unconditional[1]) and torch.equal(conditional[2], unconditional[2])
        assert torch.isfinite(conditional[3]).all()
    guided = 2 * network.with_latents - network.without
    assert sum(len(positions) for _, _, positions, _ in drawn) == 4 * length
    for logits, ordinals, positions, tokens in drawn:
        assert torch.allclose(logits, guided[positions], atol=1e-5)
        assert torch.equal(samples.tokens[ordinals, positions], tokens)


def test_guided_tokens_are_those_guidance_prefers():
    """Cold: the argmax of 2 logits(x, z) - logits(x, 0), which at many positions is neither network's own."""
    ccdd, length = make(), 40
    ccdd.network = network = TwoAnswers(length)
    settings = SamplingConfig(steps=4, guidance=2.0, temperature=1e-4)
    tokens = draw_samples(ccdd, settings, no_prompt(2, length), key=1).tokens

    def best(logits):
        return logits[:, :MASK].argmax(-1)

    expected = best(2 * network.with_latents - network.without)
    assert torch.equal(tokens, expected.expand(2, -1))
    for other in (network.with_latents, network.without, 2 * network.with_latents + network.without,
                  2 * network.without - network.with_latents):  # fmt: skip
        assert (best(other) != expected).sum() >= 5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_guidance_of_one_is_no_guidance_and_any_other_costs_two_calls(architecture):
    ccdd, prompt = make(architecture), no_prompt(4, 10)
    plain = draw_samples(ccdd, SamplingConfig(steps=6), prompt, key=1)
    nearly = draw_samples(ccdd, SamplingConfig(steps=6, guidance=1 + 1e-9), prompt, key=1)
    none = draw_samples(ccdd, SamplingConfig(steps=6, guidance=0.0), prompt, key=1)
    assert torch.equal(plain.tokens, nearly.tokens) and not torch.equal(plain.tokens, none.tokens)
    assert (plain.network_calls, nearly.network_calls, none.network_calls) == ([6] * 4, [12] * 4, [12] * 4)


def some_prompt(num: int, length: int):
    prompt = no_prompt(num, length)
    prompt.tokens[:, 2:5], prompt.known[:, 2:5] = torch.tensor([1, 2, 3]), True
    return prompt


@pytest.mark.parametrize("mode", ["shared", "independent"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_latents_of_the_prompt_follow_the_forward_process(sampler, mode):
    """What the encoder says of the prompt alone, with one noise, at the time the network is told; a contextual encoder
    hears its mask token elsewhere."""
    ccdd, prompt = make("mmdit", "bert", latent_times=mode), some_prompt(3, 10)
    calls = recorded_calls(ccdd)
    draw_samples(ccdd, SamplingConfig(steps=6, sampler=sampler), prompt, key=1)
    clean = ccdd.encoder.encode(prompt.tokens, ~prompt.known)[prompt.known]
    eps = calls[0]["latents"][prompt.known]
    assert 0.5 < float(eps.std()) < 1.5
    for call in calls:
        alpha, sigma = coefficients("vp_linear", float(call["times"][0]))
        assert torch.allclose(call["latents"][prompt.known], alpha * clean + sigma * eps, atol=1e-5)
        assert torch.equal(call["tokens"][prompt.known], prompt.tokens[prompt.known])


UNDIFFUSED = pytest.mark.parametrize(
    "options", [{"latent_times": "clean"}, {"latent_mode": "features"}], ids=["clean", "features"]
)


@UNDIFFUSED
@pytest.mark.parametrize("conditional", [True, False])
def test_undiffused_latents_are_read_off_the_visible_tokens_at_every_step(options, conditional):
    ccdd, prompt = make("mdit", "bert", conditional=conditional, **options), some_prompt(3, 10)
    calls = recorded_calls(ccdd)
    samples = draw_samples(ccdd, SamplingConfig(steps=40), prompt, key=1)
    assert sum(samples.network_calls) == sum(len(call["tokens"]) for call in calls)
    assert max(samples.network_calls) <= 7, "each call reveals at least one of seven tokens"
    assert not (samples.tokens == MASK).any() and torch.equal(samples.tokens[:, 2:5], prompt.tokens[:, 2:5])
    alone = ccdd.encoder.encode(prompt.tokens[:1], ~prompt.known[:1])
    for call in calls:
        visible = ccdd.encoder.encode(call["tokens"], call["tokens"] == MASK)
        if conditional:  # as in training on pairs, the given tokens are encoded alone
            visible[:, 2:5] = alone[:, 2:5]
        torch.testing.assert_close(call["latents"], visible, atol=1e-5, rtol=1e-5)
        if "latent_times" in options:
            assert not call["latent_times"].any() and call["times"].all()
    guided = draw_samples(ccdd, SamplingConfig(steps=40, guidance=2.0), prompt, key=1)
    assert all(number % 2 == 0 for number in guided.network_calls)


@UNDIFFUSED
def test_undiffused_latents_have_no_sampler(options):
    with pytest.raises(ConfigError, match="not diffused"):
        draw_samples(make(**options), SamplingConfig(steps=4, sampler="ddpm"), no_prompt(1, 4), key=1)


@pytest.mark.parametrize("options", [{}, {"latent_mode": "features"}], ids=["diffused", "features"])
def test_tokens_follow_the_law_of_the_bayes_denoiser(options):
    """Two dependent tokens, many steps: the frequencies of all nine texts, within 4.5 standard errors."""
    sequences, law = toy_law(length=2, vocabulary=3, seed=0)

    class Both(Oracle):
        def forward(self, tokens, times, latents, dropout=None, segments=None):
            return JointPrediction(TokenLogits.known(super().forward(tokens).logits), torch.zeros_like(latents))

    ccdd, num = make(**options), 3000
    ccdd.network = Both(sequences, law)
    tokens = draw_samples(ccdd, SamplingConfig(steps=100), no_prompt(num, 2), key=1).tokens
    counts = (tokens[:, None] == sequences).all(-1).sum(0)
    assert int(counts.sum()) == num
    deviation = (num * law * (1 - law)).sqrt()
    assert float(((counts - num * law) / deviation).abs().max()) < 4.5
