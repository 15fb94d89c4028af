"""Sampling of the uniform process (Duo): laws with the Bayes denoiser, calls, prompts, the last step, temperatures."""

import math

import pytest
import torch

from braid.kernels import sampling_eager
from braid.kernels.random import fold_key
from braid.pretrain.config.schema import SamplingConfig
from braid.pretrain.sampling.prompts import no_prompt
from braid.pretrain.sampling.sampler import draw_samples

from ..diffusion.chains import Chain
from ..objectives.noisy_oracles import Bayes, SoftTable, build, law_of_samples
from ..objectives.references import toy_law

CHAIN = Chain(vocab_size=4, mask_id=1)
STEPS = SamplingConfig(steps=6)


def toy(seed: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    sequences, law = toy_law(length=2, vocabulary=3, seed=seed)
    return torch.tensor(CHAIN.real)[sequences], law


def chi_square(tokens: torch.Tensor, sequences: torch.Tensor, law: torch.Tensor) -> float:
    index = {tuple(row): i for i, row in enumerate(sequences.tolist())}
    counts = torch.zeros(len(sequences), dtype=torch.float64)
    for row in tokens.tolist():
        counts[index[tuple(row)]] += 1
    return float(((counts - len(tokens) * law) ** 2 / (len(tokens) * law)).sum())


LIMIT = 8 + 5 * math.sqrt(2 * 8)  # mean and five standard deviations of chi-square with 8 degrees of freedom


def test_samples_follow_the_law_of_the_chain():
    """In a few steps: by chi-square the law that enumeration of the reverse kernels gives, which is not yet the
    data's."""
    sequences, law = toy()
    network = Bayes(CHAIN, sequences, law)
    tokens = draw_samples(build("duo", CHAIN, network), STEPS, no_prompt(4000, 2), key=3).tokens
    assert chi_square(tokens, sequences, law_of_samples(CHAIN, network, sequences, 6)) < LIMIT
    assert chi_square(tokens, sequences, law) > 2 * LIMIT


def test_the_law_of_the_chain_tends_to_the_data():
    """Total variation after 25 and 50 steps of the Bayes denoiser. The posterior p(x_0 | x_t), which counts the
    evidence of a token twice, leads elsewhere."""
    sequences, law = toy()

    def distance(steps, **options):
        network = Bayes(CHAIN, sequences, law, **options)
        return float((law_of_samples(CHAIN, network, sequences, steps) - law).abs().sum()) / 2

    few, many = distance(25), distance(50)
    assert many < 0.01 and many < 0.65 * few
    assert distance(50, leave_one_out=False) > 0.2


def test_samples_start_uniform():
    """What the network first sees, at t = 1: every real token alike, by chi-square; never the mask."""
    duo = build("duo", CHAIN, SoftTable(CHAIN))
    seen = []
    duo.network.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0].clone(), inputs[1].clone())))
    draw_samples(duo, STEPS, no_prompt(300, 20), key=1)
    tokens, times = seen[0]
    counts = torch.bincount(tokens.flatten(), minlength=4).double()
    assert torch.all(times == 1) and counts[CHAIN.mask_id] == 0
    assert float(((counts[CHAIN.real] - 2000) ** 2 / 2000).sum()) < 2 + 5 * 2
    assert [float(t[0]) for _, t in seen] == torch.linspace(1, 0, 7, dtype=torch.float64)[:-1].tolist()


def test_calls_frames_and_prompts():
    duo = build("duo", CHAIN)
    made = []
    duo.network.register_forward_hook(lambda *_: made.append(1))
    prompt = no_prompt(3, 10)
    prompt.tokens[:, 2:5], prompt.known[:, 2:5] = torch.tensor([3, 0, 2]), True
    samples = draw_samples(duo, STEPS, prompt, key=1, record=True)
    assert samples.network_calls == [6, 6, 6] and len(made) == 6
    assert torch.equal(samples.tokens[:, 2:5], prompt.tokens[:, 2:5])
    assert [round(frame["time"] * 6) for frame in samples.frames] == [5, 4, 3, 2, 1, 0]
    for frame in samples.frames:
        assert frame["tokens"][2:5] == [3, 0, 2] and CHAIN.mask_id not in frame["tokens"]
    assert not (samples.tokens == CHAIN.mask_id).any()


def test_known_tokens_are_seen_at_every_step():
    duo = build("duo", CHAIN)
    seen = []
    duo.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    prompt = no_prompt(3, 10)
    prompt.tokens[:, 2:5], prompt.known[:, 2:5] = torch.tensor([3, 0, 2]), True
    draw_samples(duo, STEPS, prompt, key=1)
    assert len(seen) == 6 and all(torch.equal(tokens[:, 2:5], prompt.tokens[:, 2:5]) for tokens in seen)


def test_a_sample_does_not_depend_on_its_batch(monkeypatch):
    duo = build("duo", CHAIN)
    together = draw_samples(duo, STEPS, no_prompt(6, 10), key=1).tokens
    alone = draw_samples(duo, STEPS, no_prompt(2, 10), key=1, first_ordinal=4).tokens
    assert torch.equal(together[4:], alone)
    assert not torch.equal(together, draw_samples(duo, STEPS, no_prompt(6, 10), key=2).tokens)
    monkeypatch.setattr(sampling_eager, "CHUNK", 7 * CHAIN.vocab_size)  # seven places at a time
    assert torch.equal(together, draw_samples(duo, STEPS, no_prompt(6, 10), key=1).tokens)


def test_greedy_final_takes_the_most_probable_token():
    """After one step from t = 1 x_t says nothing, so it is the argmax of the prediction at each place."""
    duo = build("duo", CHAIN)
    seen = []
    duo.network.register_forward_hook(lambda network, _, output: seen.append(network.say(output).logits))
    greedy = SamplingConfig(steps=1, greedy_final=True)
    tokens = draw_samples(duo, greedy, no_prompt(5, 10), key=1).tokens
    best = torch.where(torch.arange(4) == CHAIN.mask_id, -torch.inf, seen[0]).argmax(-1)
    assert torch.equal(tokens, best)
    several = SamplingConfig(steps=6, greedy_final=True)
    kept = draw_samples(duo, several, no_prompt(5, 10), key=1, record=True)
    plain = draw_samples(duo, STEPS, no_prompt(5, 10), key=1, record=True)
    assert [f["tokens"] for f in kept.frames[:-1]] == [f["tokens"] for f in plain.frames[:-1]]
    assert not torch.equal(kept.tokens, plain.tokens)


@pytest.mark.parametrize("settings", [SamplingConfig(steps=1, temperature=1e-3), SamplingConfig(steps=1, top_p=1e-6)])
def test_temperature_and_nucleus_act_on_the_prediction(settings):
    """Cold: the prediction's best token. At many steps they do not freeze the start, as they would if they sharpened
    the posterior, in which staying is most probable."""
    duo = build("duo", CHAIN, SoftTable(CHAIN, seed=1))
    greedy = SamplingConfig(steps=1, greedy_final=True)
    expected = draw_samples(duo, greedy, no_prompt(5, 10), key=1).tokens
    assert torch.equal(draw_samples(duo, settings, no_prompt(5, 10), key=1).tokens, expected)
    law = torch.tensor([[0.5, 0.0, 0.3, 0.2]])
    cold = sampling_eager.tempered(law.log(), 0.5, 1.0, CHAIN.mask_id).softmax(-1)
    assert torch.allclose(cold, (law**2 / (law**2).sum()).double(), atol=1e-7)
    cut = sampling_eager.tempered(law.log(), 1.0, 0.7, CHAIN.mask_id).softmax(-1)
    assert torch.allclose(cut, torch.tensor([[0.625, 0.0, 0.375, 0.0]], dtype=torch.float64), atol=1e-7)


def test_draws_are_keyed_by_step():
    """Two steps of one run must not share their uniforms: a flat posterior is drawn anew at each."""
    duo = build("duo", CHAIN, randomise=False)  # a flat prediction
    frames = draw_samples(duo, SamplingConfig(steps=2), no_prompt(1, 200), key=fold_key(1, "x"), record=True).frames
    first, second = (torch.tensor(frame["tokens"]) for frame in frames)
    # At t = 1/2 a token stays with probability (1/2 + 1/6) and else is one of two others.
    assert abs(float((first == second).double().mean()) - 2 / 3) < 5 * math.sqrt(2 / 9 / 200)
