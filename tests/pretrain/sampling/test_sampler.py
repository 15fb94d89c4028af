"""Samplers against exact laws, call counters, prompts that stay, and draws that do not depend on batching."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from braid.kernels.errors import InputError
from braid.kernels.sampling_eager import nucleus
from braid.pretrain.config.schema import SamplingConfig
from braid.pretrain.model.blocks import KeyValueCache
from braid.pretrain.sampling.prompts import Prompt, no_prompt
from braid.pretrain.sampling.sampler import draw_samples, sample_entropy

from ..objectives.conftest import BOS, EOS, MASK, VOCAB, build
from ..objectives.references import Oracle, toy_law

STEPS = SamplingConfig(steps=6)


@pytest.mark.parametrize("name", ["ar", "mdlm", "ccdd"])
def test_every_position_is_a_clean_token(name):
    samples = draw_samples(build(name), STEPS, no_prompt(5, 10), key=1)
    assert samples.tokens.shape == (5, 10)
    assert not (samples.tokens == MASK).any()


@pytest.mark.parametrize(
    "name, settings, calls",
    [
        ("mdlm", SamplingConfig(steps=6), 6),
        ("ccdd", SamplingConfig(steps=6), 6),
        ("ccdd", SamplingConfig(steps=6, guidance=1.5), 12),
        ("ar", SamplingConfig(steps=6), 10),
    ],
)
def test_network_calls_are_counted(name, settings, calls):
    objective = build(name)
    rows = []
    objective.network.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    samples = draw_samples(objective, settings, no_prompt(3, 10), key=1)
    assert max(samples.network_calls) <= calls and sum(samples.network_calls) == sum(rows)
    if name != "mdlm":  # there a step that reveals nothing costs nothing
        assert samples.network_calls == [calls] * 3


def test_masked_sampling_calls_the_network_only_where_something_is_revealed():
    """Two positions cannot take more than two calls, whatever the number of steps; the draws are those of a sampler
    that calls at every step, for what is not used cannot matter."""
    objective = build("mdlm")
    samples = draw_samples(objective, SamplingConfig(steps=200), no_prompt(50, 2), key=1)
    assert set(samples.network_calls) <= {1, 2} and sum(samples.network_calls) > 90
    prompt = no_prompt(2, 6)
    prompt.known[:] = True
    assert draw_samples(objective, STEPS, prompt, key=1).network_calls == [0, 0]


def test_the_cache_changes_nothing():
    """AR with keys and values kept draws what the network says of the whole prefix at every position."""
    objective = build("ar")
    tokens = draw_samples(objective, SamplingConfig(temperature=1e-4), no_prompt(3, 10), key=1).tokens
    inputs = torch.cat([torch.full((3, 1), BOS), tokens[:, :-1]], 1)
    logits = objective.network(inputs, None).logits
    logits[..., MASK] = -torch.inf
    assert torch.equal(tokens, logits.argmax(-1))
    cache = KeyValueCache()
    parts = [objective.network(part, None, cache=cache).logits for part in (inputs[:, :4], *inputs[:, 4:].split(1, 1))]
    assert torch.allclose(torch.cat(parts, 1)[..., :MASK], logits[..., :MASK], atol=1e-5)


def test_guidance_of_one_is_no_guidance():
    """w logits + (1 - w) logits(z = 0) at w = 1; and w = 0 really ignores the latents."""
    objective = build("ccdd")
    plain = draw_samples(objective, STEPS, no_prompt(4, 10), key=1).tokens
    nearly = draw_samples(objective, SamplingConfig(steps=6, guidance=1.0 + 1e-9), no_prompt(4, 10), key=1).tokens
    ignored = draw_samples(objective, SamplingConfig(steps=6, guidance=0.0), no_prompt(4, 10), key=1).tokens
    assert torch.equal(plain, nearly)
    assert not torch.equal(plain, ignored)


@pytest.mark.parametrize("name", ["ar", "mdlm", "ccdd"])
def test_a_sample_does_not_depend_on_its_batch(name):
    objective = build(name)
    together = draw_samples(objective, STEPS, no_prompt(6, 10), key=1).tokens
    alone = draw_samples(objective, STEPS, no_prompt(2, 10), key=1, first_ordinal=4).tokens
    assert torch.equal(together[4:], alone)
    assert not torch.equal(together, draw_samples(objective, STEPS, no_prompt(6, 10), key=2).tokens)


@pytest.mark.parametrize("name, sampler", [("mdlm", "ancestral"), ("ccdd", "ddim"), ("ccdd", "ddpm")])
def test_known_tokens_stay(name, sampler):
    prompt = no_prompt(3, 10)
    prompt.tokens[:, 2:5], prompt.known[:, 2:5] = torch.tensor([1, 2, 3]), True
    settings = SamplingConfig(steps=6, sampler=sampler)
    samples = draw_samples(build(name), settings, prompt, key=1, record=True)
    assert torch.equal(samples.tokens[:, 2:5], prompt.tokens[:, 2:5])
    assert all(frame["tokens"][2:5] == [1, 2, 3] for frame in samples.frames)
    assert len(samples.frames) == 6 and samples.frames[-1]["time"] == 0


def test_the_prompt_steers_the_latents():
    """Known positions carry what the encoder says of them, at every step: another prompt, other latents elsewhere."""
    objective = build("ccdd")
    seen = []
    objective.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2].clone()))
    prompt = no_prompt(1, 10)
    prompt.tokens[:, 0], prompt.known[:, 0] = 4, True
    draw_samples(objective, STEPS, prompt, key=1)
    clean = objective.encoder.encode(torch.tensor([[4]]), torch.tensor([[False]]))[0, 0]
    eps = seen[0][0, 0]
    for step, latents in enumerate(seen):
        t = torch.tensor(1 - step / 6, dtype=torch.float64)
        expected = objective.schedule.alpha(t).float() * clean + objective.schedule.sigma(t).float() * eps
        assert torch.allclose(latents[0, 0], expected, atol=1e-5)


def test_ar_continues_a_prefix_and_refuses_to_infill():
    objective = build("ar")
    prompt = no_prompt(2, 8)
    prompt.tokens[:, :3], prompt.known[:, :3] = torch.tensor([BOS, 1, 2]), True
    samples = draw_samples(objective, STEPS, prompt, key=1)
    assert torch.equal(samples.tokens[:, :3], prompt.tokens[:, :3]) and samples.network_calls == [5, 5]
    gap = Prompt(prompt.tokens, prompt.known.roll(2, 1))
    with pytest.raises(InputError, match="infill"):
        draw_samples(objective, STEPS, gap, key=1)


def test_an_answer_of_ar_ends_at_its_eos():
    """Up to there it is what it would be anyway; then EOS fills the row, and no call of the network is counted."""
    objective = build("ar")
    prompt = no_prompt(6, 40)
    for row, length in enumerate([3, 1, 2, 3, 1, 2]):
        prompt.tokens[row, :length], prompt.known[row, :length] = EOS, True  # a source's own ends nothing
    running = draw_samples(objective, STEPS, prompt, key=1)
    assert running.network_calls == (~prompt.known).sum(1).tolist()
    objective.answers = True
    stops = (running.tokens == EOS) & ~prompt.known
    ends = torch.where(stops.any(1), stops.int().argmax(1), 40)
    after = torch.arange(40) > ends[:, None]
    assert sum(after.any(1).tolist()) >= 3 and not after.any(1).all()
    answers = draw_samples(objective, STEPS, prompt, key=1)
    assert torch.equal(answers.tokens, torch.where(after, EOS, running.tokens))
    assert answers.network_calls == (~prompt.known & ~after).sum(1).tolist()
    row, made = int(after.any(1).int().argmax()), []  # one that ends, by itself: nothing is computed after it
    objective.network.register_forward_hook(lambda *_: made.append(1))
    one = Prompt(prompt.tokens[row : row + 1], prompt.known[row : row + 1])
    alone = draw_samples(objective, STEPS, one, key=1, first_ordinal=row, record=True)
    assert torch.equal(alone.tokens[0], answers.tokens[row])
    assert alone.network_calls == [answers.network_calls[row]] == [len(made)]
    assert alone.frames[-1]["time"] == 0 and alone.frames[-1]["tokens"] == alone.tokens[0].tolist()


def frequencies(tokens: torch.Tensor, sequences: torch.Tensor) -> torch.Tensor:
    index = {tuple(row): i for i, row in enumerate(sequences.tolist())}
    counts = torch.zeros(len(sequences), dtype=torch.float64)
    for row in tokens.tolist():
        counts[index[tuple(row)]] += 1
    return counts / counts.sum()


def test_one_token_a_step_samples_the_exact_law():
    """With the Bayes denoiser and many steps, masked sampling draws from the law itself; with one step from the
    product of its marginals. Both by chi-square."""
    sequences, law = toy_law(length=2, vocabulary=3, seed=4)
    objective = build("mdlm")
    objective.network = Oracle(sequences, law)
    num = 3000

    def chi_square(steps, expected):
        tokens = draw_samples(objective, SamplingConfig(steps=steps), no_prompt(num, 2), key=3).tokens
        observed = frequencies(tokens, sequences)
        return float((num * (observed - expected) ** 2 / expected).sum())

    joint = law.view(3, 3)
    product = (joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)).view(-1)
    limit = 8 + 5 * math.sqrt(2 * 8)  # mean and five standard deviations of chi-square with 8 degrees of freedom
    assert chi_square(1, product) < limit
    assert chi_square(1, law) > limit  # the test tells them apart
    assert chi_square(48, law) < limit + num * 0.0005


def test_temperature_and_nucleus():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    kept = lambda p: torch.isfinite(nucleus(logits, p)).tolist()[0]  # noqa: E731
    assert kept(0.4) == [True, False, False, False]
    assert kept(0.6) == [True, True, False, False]
    assert kept(0.97) == [True, True, True, True]
    shuffled = logits[:, [2, 0, 3, 1]]
    assert torch.isfinite(nucleus(shuffled, 0.6)).tolist()[0] == [False, True, False, True]
    objective = build("mdlm")
    cold = SamplingConfig(steps=6, temperature=1e-4)
    greedy = SamplingConfig(steps=6, top_p=1e-9)
    a, b = (draw_samples(objective, settings, no_prompt(4, 10), key=1).tokens for settings in (cold, greedy))
    assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["mdlm", "ccdd"])
def test_greedy_final_takes_the_most_probable_token(name):
    """Of every token the last step reveals, and of no other: with one step all, with two those of the second."""
    objective = build(name)
    one = SamplingConfig(steps=1, greedy_final=True)
    samples = draw_samples(objective, one, no_prompt(4, 10), key=1)
    cold = draw_samples(objective, replace(one, greedy_final=False, temperature=1e-4), no_prompt(4, 10), key=1)
    assert torch.equal(samples.tokens, cold.tokens)
    drawn, greedy = (
        draw_samples(objective, SamplingConfig(steps=2, greedy_final=final), no_prompt(4, 10), key=1, record=True)
        for final in (False, True)
    )
    assert drawn.frames[0] == greedy.frames[0] and not torch.equal(drawn.tokens, greedy.tokens)


def test_sample_entropy():
    rows = torch.tensor([[1, 1, 1, 1], [0, 1, 2, 3], [0, 0, 1, 1]])
    assert sample_entropy(rows) == pytest.approx([0.0, math.log(4), math.log(2)])


def test_trajectory_only_reveals():
    samples = draw_samples(build("mdlm"), STEPS, no_prompt(2, 10), key=1, record=True)
    for before, after in itertools.pairwise(samples.frames):
        for old, new in zip(before["tokens"], after["tokens"], strict=True):
            assert old in (MASK, new)
    assert max(samples.frames[-1]["tokens"]) < VOCAB - 1


def test_ar_continues_prefixes_of_different_lengths():
    """Together as each alone: a longer prefix is read while shorter ones are continued."""
    objective = build("ar")
    prompt = no_prompt(3, 8)
    for row, length in enumerate([1, 4, 8]):
        prompt.tokens[row, :length], prompt.known[row, :length] = torch.arange(1, length + 1), True
    together = draw_samples(objective, STEPS, prompt, key=1)
    assert together.network_calls == [7, 4, 0]
    for row in range(3):
        one = Prompt(prompt.tokens[row : row + 1], prompt.known[row : row + 1])
        alone = draw_samples(objective, STEPS, one, key=1, first_ordinal=row)
        assert torch.equal(together.tokens[row : row + 1], alone.tokens)
