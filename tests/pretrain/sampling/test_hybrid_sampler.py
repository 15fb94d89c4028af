"""Sampling of GIDD: laws with the Bayes denoiser, revision of what is written, calls, prompts, the last step."""

import math

import pytest
import torch

from braid.pretrain.config.schema import SamplingConfig
from braid.pretrain.sampling.prompts import no_prompt
from braid.pretrain.sampling.sampler import draw_samples

from ..diffusion.chains import Chain
from ..objectives.noisy_oracles import Bayes, build, law_of_samples
from ..objectives.references import toy_law

MASK = 1
STEPS = SamplingConfig(steps=6)
HYBRID, MASKED = Chain(4, MASK, p_uniform=0.3), Chain(4, MASK, p_uniform=0.0)


def toy(chain: Chain, seed: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    sequences, law = toy_law(length=2, vocabulary=3, seed=seed)
    return torch.tensor(chain.real)[sequences], law


def chi_square(tokens: torch.Tensor, sequences: torch.Tensor, law: torch.Tensor) -> float:
    index = {tuple(row): i for i, row in enumerate(sequences.tolist())}
    counts = torch.zeros(len(sequences), dtype=torch.float64)
    for row in tokens.tolist():
        counts[index[tuple(row)]] += 1
    return float(((counts - len(tokens) * law) ** 2 / (len(tokens) * law)).sum())


LIMIT = 8 + 5 * math.sqrt(2 * 8)  # mean and five standard deviations of chi-square with 8 degrees of freedom


@pytest.mark.parametrize("chain", [HYBRID, MASKED])
def test_samples_follow_the_law_of_the_chain(chain):
    """In a few steps: by chi-square the law that enumeration of the reverse kernels gives, which is not yet the
    data's."""
    sequences, law = toy(chain)
    network = Bayes(chain, sequences, law)
    tokens = draw_samples(build("gidd", chain, network), STEPS, no_prompt(4000, 2), key=3).tokens
    assert chi_square(tokens, sequences, law_of_samples(chain, network, sequences, 6)) < LIMIT
    assert chi_square(tokens, sequences, law) > 2 * LIMIT


@pytest.mark.parametrize("chain", [HYBRID, MASKED])
def test_the_law_of_the_chain_tends_to_the_data(chain):
    """Total variation after 25 and 50 steps of the Bayes denoiser. The posterior p(x_0 | x_t), which counts the
    evidence of a token twice, leads elsewhere."""
    sequences, law = toy(chain)

    def distance(steps, **options):
        network = Bayes(chain, sequences, law, **options)
        return float((law_of_samples(chain, network, sequences, steps) - law).abs().sum()) / 2

    few, many = distance(25), distance(50)
    assert many < 0.04 and many < 0.65 * few
    if chain is HYBRID:  # a mask is no evidence
        assert distance(50, leave_one_out=False) > 0.2


@pytest.mark.parametrize("chain, revises", [(HYBRID, True), (MASKED, False)])
def test_what_is_written_may_be_revised_where_noise_is_uniform(chain, revises):
    gidd = build("gidd", chain)
    seen = []
    gidd.network.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0].clone(), inputs[1].clone())))
    samples = draw_samples(gidd, SamplingConfig(steps=30), no_prompt(4, 30), key=1)
    assert torch.all(seen[0][0] == MASK) and torch.all(seen[0][1] == 1)
    states = [tokens for tokens, _ in seen] + [samples.tokens]
    assert not (samples.tokens == MASK).any()
    pairs = list(zip(states[:-1], states[1:], strict=True))
    changed = sum(int(((old != MASK) & (old != new)).sum()) for old, new in pairs)
    masked_again = sum(int(((old != MASK) & (new == MASK)).sum()) for old, new in pairs)
    assert (changed > masked_again > 0) if revises else (changed == masked_again == 0)


def test_without_uniform_noise_a_step_reveals_as_many_as_masked_diffusion():
    """Survival 1 - t: after the step to s a share s of the tokens is masked."""
    gidd = build("gidd", MASKED)
    frames = draw_samples(gidd, SamplingConfig(steps=4), no_prompt(1, 2000), key=1, record=True).frames
    for frame in frames:
        share = frame["tokens"].count(MASK) / 2000
        assert abs(share - frame["time"]) <= 5 * math.sqrt(frame["time"] * (1 - frame["time"]) / 2000)


@pytest.mark.parametrize("chain", [HYBRID, MASKED])
def test_calls_frames_and_prompts(chain):
    gidd = build("gidd", chain)
    seen = []
    gidd.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    prompt = no_prompt(3, 10)
    prompt.tokens[:, 2:5], prompt.known[:, 2:5] = torch.tensor([3, 0, 2]), True
    samples = draw_samples(gidd, STEPS, prompt, key=1, record=True)
    assert samples.network_calls == [6, 6, 6] and len(seen) == 6
    assert all(torch.equal(tokens[:, 2:5], prompt.tokens[:, 2:5]) for tokens in [*seen, samples.tokens])
    assert len(samples.frames) == 6 and samples.frames[-1]["time"] == 0
    assert not (samples.tokens == MASK).any()


def test_a_sample_does_not_depend_on_its_batch():
    gidd = build("gidd", HYBRID)
    together = draw_samples(gidd, STEPS, no_prompt(6, 10), key=1).tokens
    alone = draw_samples(gidd, STEPS, no_prompt(2, 10), key=1, first_ordinal=4).tokens
    assert torch.equal(together[4:], alone)


def test_greedy_final_takes_the_most_probable_token():
    gidd = build("gidd", HYBRID)
    seen = []
    gidd.network.register_forward_hook(lambda network, _, output: seen.append(network.say(output).logits))
    tokens = draw_samples(gidd, SamplingConfig(steps=1, greedy_final=True), no_prompt(5, 10), key=1).tokens
    best = torch.where(torch.arange(4) == MASK, -torch.inf, seen[0]).argmax(-1)
    assert torch.equal(tokens, best)
