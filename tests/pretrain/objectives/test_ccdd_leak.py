"""The leak test: what the network sees at p_r = 1 must not depend on the identity of masked tokens."""

from dataclasses import replace

import pytest
import torch

from braid.pretrain.objectives.base import Noise

from .ccdd_cases import ARCHITECTURES, CONTEXTUAL, make, recorded_calls, rows, with_condition
from .conftest import VOCAB, batch_and_noise

ENCODERS = ("table", *CONTEXTUAL)
MODES = {
    "shared": {},
    "independent": {"latent_times": "independent"},
    "clean": {"latent_times": "clean"},
    "features": {"latent_mode": "features"},
}


def other_tokens(tokens, where):
    return torch.where(where, (tokens + 1) % (VOCAB - 1), tokens)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "architecture, kind",
    [("mdit", kind) for kind in ENCODERS] + [(name, "qwen3") for name in ARCHITECTURES if name != "mdit"],
)
def test_masked_tokens_do_not_reach_the_network(architecture, kind, mode):
    """Change every masked token, keep all randomness: the network's whole input and output stay bit for bit."""
    ccdd = make(architecture, kind, full_visibility_probability=1.0, latent_dropout=0.0, **MODES[mode])
    batch, noise = batch_and_noise(12)
    batch = with_condition(batch, 3)
    corrupted = ccdd.corrupt(batch, noise)
    changed = replace(batch, tokens=other_tokens(batch.tokens, corrupted.masked))
    assert not torch.equal(changed.tokens, batch.tokens)
    other = ccdd.corrupt(changed, noise)
    assert torch.equal(corrupted.masked, other.masked)
    assert torch.equal(corrupted.tokens, other.tokens)
    assert torch.equal(corrupted.latents, other.latents)
    here, there = ccdd.predict(corrupted), ccdd.predict(other)
    assert torch.equal(here.logits, there.logits) and torch.equal(here.latents, there.latents)


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("mode", MODES)
def test_the_bounds_see_no_masked_token_either(mode, kind):
    """The same through `evaluate`: record what the network is given while the token bounds are computed."""
    ccdd = make("mdit", kind, **MODES[mode])
    batch, noise = batch_and_noise(8, purpose="validation")
    calls = recorded_calls(ccdd)
    ccdd._token_bounds(batch, noise)
    masked = calls[0]["tokens"] != batch.tokens
    ccdd._token_bounds(replace(batch, tokens=other_tokens(batch.tokens, masked)), noise)
    assert len(calls) == 4
    for here, there in zip(calls[:2], calls[2:], strict=True):
        assert here.keys() == there.keys()
        seen = [name for name, value in here.items() if value is not None]
        assert "latents" in seen and all(torch.equal(here[name], there[name]) for name in seen)
    assert calls[0]["latents"].any() and not calls[1]["latents"].any(), "with latents, then without"


@pytest.mark.parametrize("kind", ENCODERS)
def test_latents_of_masked_tokens_would_leak(kind):
    """Guards the tests above: at p_r = 0 the encoder sees everything and the latents do change."""
    ccdd = make("mdit", kind)
    batch, noise = batch_and_noise(32)
    times, nothing = torch.full((32,), 0.5, dtype=torch.float64), torch.zeros(32)
    corrupted = ccdd._corrupt(batch, noise, times, times, nothing)
    changed = replace(batch, tokens=other_tokens(batch.tokens, corrupted.masked))
    assert not torch.equal(corrupted.latents, ccdd._corrupt(changed, noise, times, times, nothing).latents)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_the_released_encoding_leaks_at_visible_positions(kind):
    """And the leak-free one differs from it there: the switch does what it says."""
    ccdd = make("mdit", kind, leaky=True)
    batch, noise = batch_and_noise(32)
    times, all_hidden = torch.full((32,), 0.5, dtype=torch.float64), torch.ones(32)
    corrupted = ccdd._corrupt(batch, noise, times, times, all_hidden)
    changed = replace(batch, tokens=other_tokens(batch.tokens, corrupted.masked))
    moved = (corrupted.latents != ccdd._corrupt(changed, noise, times, times, all_hidden).latents).any(-1)
    after_a_masked_one = (corrupted.masked.cumsum(1) > 0) & ~corrupted.masked
    assert moved[after_a_masked_one].double().mean() > 0.9 and not moved[corrupted.masked].any()


def hidden_shares(ccdd, batch, noise):
    """The corrupted batch, and per sequence the share of its masked tokens that was hidden from the encoder; NaN where
    fewer than 8 are masked."""
    encode, calls = ccdd.encoder.encode, []
    ccdd.encoder.encode = lambda tokens, hidden, segments=None: (
        calls.append(hidden),
        encode(tokens, hidden, segments),
    )[1]
    corrupted = ccdd.corrupt(batch, noise)
    hidden = calls[0]
    assert not (hidden & ~corrupted.masked).any()
    num_masked = corrupted.masked.sum(1)
    return corrupted, torch.where(num_masked >= 8, hidden.sum(1) / num_masked, torch.nan)


def test_p_r_is_drawn_per_sequence():
    """Half the sequences see visible tokens only; in the others a share of the masked tokens is shown."""
    _, shares = hidden_shares(make(latent_dropout=0.0), *batch_and_noise(4000))
    shares = shares[~shares.isnan()]
    full = float((shares == 1).double().mean())
    assert 0.5 <= full < 0.62  # half by the coin, a few more where p_r is near 1
    assert abs(float(shares[shares < 1].mean()) - 0.45) < 0.05


def drawn_p_r(num: int, batches: int = 1, **options) -> torch.Tensor:
    """p_r of `batches` global batches of `num`, [batches, num]."""
    ccdd = make(**options)
    firsts = range(0, num * batches, num)
    return torch.stack([
        ccdd._p_r(Noise.training(5, first, num, torch.arange(first, first + num))) for first in firsts
    ])  # fmt: skip


def distance(sample: torch.Tensor, largest: float) -> float:
    """Kolmogorov-Smirnov distance from U[0, largest], times the root of the sample's size: above 1.95 once in 1000."""
    ordered = sample.flatten().sort().values / largest
    steps = torch.arange(len(ordered) + 1) / len(ordered)
    return float(torch.maximum(steps[1:] - ordered, ordered - steps[:-1]).max()) * len(ordered) ** 0.5


RELEASED = {"full_visibility_probability": 0.0, "p_r_per": "batch"}


@pytest.mark.parametrize("largest", [1.0, 0.9])
def test_the_released_law_of_p_r_is_one_for_a_batch(largest):
    """p_r ~ U[0, p_r_max], the same for all sequences of a global batch whoever has them, another in the next."""
    values = drawn_p_r(3, 300, p_r_max=largest, **RELEASED)
    assert (values == values[:, :1]).all() and distance(values[:, 0], largest) < 1.95
    half = Noise.training(5, 300, 3, torch.tensor([301, 302]))
    assert torch.equal(make(p_r_max=largest, **RELEASED)._p_r(half), values[100, 1:])
    strata = torch.stack([Noise.training(5, first, 3, torch.tensor([first])).shift for first in range(0, 900, 3)])
    assert abs(float(torch.corrcoef(torch.stack([strata[:, 0], values[:, 0]]))[0, 1])) < 0.2


def test_p_r_has_the_law_of_its_fields():
    sequences = drawn_p_r(4000, full_visibility_probability=0.0, p_r_max=0.9)
    assert distance(sequences, 0.9) < 1.95
    half = drawn_p_r(4000, p_r_max=0.6)
    assert float((half == 1).double().mean()) == pytest.approx(0.5, abs=0.04) and distance(half[half < 1], 0.6) < 1.95
    batches = drawn_p_r(2, 300, full_visibility_probability=0.25, p_r_per="batch")[:, 0]
    assert float((batches == 1).double().mean()) == pytest.approx(0.25, abs=0.1)
    assert distance(batches[batches < 1], 1.0) < 1.95


def test_the_encoder_reads_the_whole_text_where_p_r_is_0():
    """As the release does with no likelihood in view."""
    _, shares = hidden_shares(make(p_r_max=0.0, **RELEASED), *batch_and_noise(200))
    assert (shares[~shares.isnan()] == 0).all()


def test_features_are_always_of_visible_tokens_only():
    _, shares = hidden_shares(make(latent_mode="features", full_visibility_probability=0.0), *batch_and_noise(400))
    assert (shares[~shares.isnan()] == 1).all()


def test_full_visibility_p_r_and_latent_dropout_are_independent():
    """What is hidden from the encoder has the same law in sequences with latents and without."""
    corrupted, shares = hidden_shares(make(latent_dropout=0.5), *batch_and_noise(8000))
    kept, enough = corrupted.latent_weight == 1, ~shares.isnan()
    with_latents, without = shares[kept & enough], shares[~kept & enough]
    assert min(len(with_latents), len(without)) > 1000
    full = [float((part == 1).double().mean()) for part in (with_latents, without)]
    partial = [float(part[part < 1].mean()) for part in (with_latents, without)]
    assert full[0] == pytest.approx(full[1], abs=0.08)  # some 5 standard errors
    assert partial[0] == pytest.approx(partial[1], abs=0.08)


def test_the_network_learns_the_representation_of_the_whole_text():
    """The latent target is E(x_0) at every position, hidden or not: standardised rows of the table, in float64."""
    ccdd = make(full_visibility_probability=1.0)
    batch, noise = batch_and_noise(32)
    corrupted = ccdd.corrupt(batch, noise)
    assert corrupted.masked.any()  # and at p_r = 1 all of these are hidden
    table = ccdd.encoder.table.double()[batch.tokens]
    table = table - table.mean(-1, keepdim=True)
    expected = table / (table.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(corrupted.latent_targets.double(), expected, atol=1e-5)


def test_latent_dropout_hides_the_latents_and_drops_their_loss():
    ccdd = make(latent_dropout=0.3)
    batch, noise = batch_and_noise(2000)
    corrupted = ccdd.corrupt(batch, noise)
    dropped = corrupted.latent_weight == 0
    assert abs(float(dropped.double().mean()) - 0.3) < 0.05
    assert torch.all(corrupted.latents[dropped] == 0) and not torch.any(
        (corrupted.latents[~dropped] == 0).all(-1).all(-1)
    )
    some = ccdd.corrupt(*rows(batch, noise, dropped))
    assert float(ccdd.loss(ccdd.predict(some), some).terms["latent_loss"]) == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_of_a_run_with_a_leaky_encoder_is_called_a_bound(architecture, mode):
    """Neither the names, nor the labels, nor the flags of its figures say bound; the notes say that there is none."""
    ccdd = make(architecture, leaky=True, **MODES[mode])
    for figure in ccdd.figures:
        text = (figure.name + figure.label).lower()
        assert not figure.is_bound and "bound" not in text and "nelbo" not in text
        assert "no bound" in figure.note
    batch, noise = batch_and_noise(4, purpose="validation")
    assert list(ccdd.evaluate(batch, noise)) == [figure.name for figure in ccdd.figures]
    honest = make(architecture, **MODES[mode]).figures
    names = ["token_bound", "token_bound_latents_off", "joint_nelbo"]
    assert [figure.name for figure in honest[:-1]] == names[: 3 if mode in ("shared", "independent") else 2]
    assert all(figure.is_bound for figure in honest[:-1]) and not honest[-1].is_bound
