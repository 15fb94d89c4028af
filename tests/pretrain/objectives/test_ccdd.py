"""CCDD's training loss, step by step in float64; its times, dropouts, given tokens, experts and figures."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from braid.pretrain.config.objectives.ccdd import ExpertsConfig
from braid.pretrain.model.token_logits import TokenLogits

from ..model.joint_reference import AddedReference, MixtureReference, TwoStreamReference
from .ccdd_cases import ARCHITECTURES, CONTEXTUAL, make, recorded_calls, rows, with_condition
from .conftest import LATENT_DIM, LENGTH, MASK, VOCAB, batch_and_noise
from .references import float64_nats

REFERENCES = {"mdit": AddedReference, "mmdit": TwoStreamReference}
GIVEN = 2


def standardised(x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def reference_loss(ccdd, batch, noise):
    """The training step of the paper's algorithm in float64 numpy, with the network's reference: sums by term."""
    config = ccdd.config
    tokens, condition = batch.tokens.numpy(), batch.condition.numpy()
    counted = batch.loss_mask.numpy().astype(float)
    eps = config.time_eps
    t = (noise.index.double().numpy() + noise.shift.numpy()) / noise.batch_size * (1 - 2 * eps) + eps
    t_z = t
    if config.latent_times == "independent":
        second = noise.index.numpy() * (math.sqrt(5) - 1) / 2 + noise.shift.numpy() * 2**16
        t_z = second % 1 * (1 - 2 * eps) + eps
    if config.latent_times == "clean" or config.latent_mode == "features":
        t_z = np.zeros_like(t)
    masked = (noise.uniforms(LENGTH).numpy() < t.astype(np.float32)[:, None]) & ~condition
    p_r = np.where(noise.coins(1).numpy() < config.full_visibility_probability, 1.0, noise.coins(2).numpy())
    if config.latent_mode == "features":
        p_r = np.ones_like(p_r)
    hidden = masked & (noise.uniforms(LENGTH, word=2).numpy() < p_r.astype(np.float32)[:, None])
    z_0 = standardised(ccdd.encoder.table.double().numpy()[tokens])
    alpha, sigma = (np.sqrt(1 - t_z), np.sqrt(t_z)) if config.schedule == "vp_linear" else (1 - t_z, t_z)
    normals = noise.normals(LENGTH, LATENT_DIM).double().numpy()
    z_t = alpha[:, None, None] * np.where(hidden[..., None], 0, z_0) + sigma[:, None, None] * normals
    kept = noise.coins(3).numpy() >= config.latent_dropout
    z_t = z_t * kept[:, None, None]
    shown = noise.coins(5).numpy() >= config.token_dropout
    x_t = np.where(masked | ~(shown[:, None] | condition), MASK, tokens)

    network = REFERENCES.get(config.architecture, MixtureReference)(ccdd.network)
    own = {"latent_times": torch.from_numpy(t_z)} if config.latent_times != "shared" else {}
    logits, zhat = network(torch.from_numpy(x_t), torch.from_numpy(t), torch.from_numpy(z_t), **own)
    logits = np.delete(logits, MASK, -1)  # the mask is the last token
    surprise = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    token_weight = {"dynamic": 2 * (1 - t), "elbo": 1 / t, "uniform": np.ones_like(t)}[config.token_weight]
    terms = {"token_loss": (token_weight[:, None] * surprise * masked * counted).sum()}
    if config.latent_mode == "diffused":
        error = np.minimum((zhat - z_0) ** 2, 10).mean(-1)
        with np.errstate(divide="ignore"):
            weight = {
                "ddpm_x": np.minimum(1 / (1 - t_z), 10),
                "inv_snr": np.minimum(t_z / (1 - t_z), 10),
                "uniform": np.ones_like(t_z),
            }[config.continuous_weight]
        terms["latent_loss"] = (config.continuous_scale * (weight * kept)[:, None] * error * counted).sum()
    if config.experts.balance:
        each = counted / counted.sum(1, keepdims=True)
        balance = 0.0
        for probabilities, chosen in network.routing:
            p, f = (
                sum(np.einsum("bl,ble->be", each, strand) for strand in np.split(values, 2, 1)) / 2
                for values in (probabilities, chosen.astype(float))
            )
            balance = balance + config.experts.num * (f * p).sum(-1) / len(network.routing)
        terms["balance_loss"] = (config.experts.balance * balance[:, None] * counted).sum()
    return terms


CASES = {
    "published": {},
    "flow": {"schedule": "flow_linear", "continuous_weight": "inv_snr", "continuous_scale": 0.5},
    "independent": {"latent_times": "independent", "token_dropout": 0.3, "token_weight": "uniform"},
    "clean": {"latent_times": "clean", "continuous_weight": "uniform", "full_visibility_probability": 0.2},
    "features": {"latent_mode": "features", "token_weight": "elbo", "time_eps": 0.05},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_against_a_float64_reference(architecture, case):
    ccdd = make(architecture, latent_dropout=0.2, **CASES[case])
    batch, noise = batch_and_noise(24, padding=1)
    batch = with_condition(batch, GIVEN)
    corrupted = ccdd.corrupt(batch, noise)
    loss = ccdd.loss(ccdd.predict(corrupted), corrupted)
    expected = reference_loss(ccdd, batch, noise)
    assert [name for name in loss.terms if name.endswith("_loss")] == list(expected)
    for name, value in expected.items():
        assert float(loss.terms[name]) == pytest.approx(value, rel=1e-6), name
    assert float(loss.total.detach()) == pytest.approx(sum(expected.values()), rel=1e-6)
    assert int(loss.count) == 24 * (LENGTH - 1 - GIVEN)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_first_loss_is_log_v_on_masked_tokens(architecture):
    """Zero heads: every real token is equally likely, and the latents are predicted to be 0."""
    ccdd = make(architecture, randomise=False)
    batch, noise = batch_and_noise(32)
    corrupted = ccdd.corrupt(batch, noise)
    terms = ccdd.loss(ccdd.predict(corrupted), corrupted).terms
    weights = (2 * (1 - corrupted.times)[:, None] * corrupted.masked).sum()
    assert float(terms["token_loss"]) == pytest.approx(math.log(VOCAB - 1) * float(weights), rel=1e-6)
    targets = corrupted.latent_targets.double().square().clamp(max=10).mean(-1).sum(1)
    weights = (1 / (1 - corrupted.times)).clamp(max=10) * corrupted.latent_weight
    assert float(terms["latent_loss"]) == pytest.approx(float((weights * targets).sum()), rel=1e-6)


@pytest.mark.parametrize("architecture", ["mmdit", "moedit-1"])
def test_a_sample_is_noised_and_scored_alike_in_any_micro_batch(architecture):
    ccdd = make(architecture, "bert", latent_times="independent", token_dropout=0.3)
    batch, noise = batch_and_noise(8)
    batch = with_condition(batch, GIVEN)
    whole = ccdd.corrupt(batch, noise)
    parts = []
    for chosen in (torch.arange(3), torch.arange(3, 8)):
        part = ccdd.corrupt(*rows(batch, noise, chosen))
        for name in ("tokens", "masked", "times", "latent_times", "latent_weight"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[chosen]), name
        for name in ("latents", "latent_targets"):  # the encoder's products may be summed in another order
            torch.testing.assert_close(getattr(part, name), getattr(whole, name)[chosen], rtol=1e-4, atol=1e-5)
        parts.append(ccdd.loss(ccdd.predict(part), part).terms)
    for name, value in ccdd.loss(ccdd.predict(whole), whole).terms.items():
        assert float(value) == pytest.approx(sum(float(part[name]) for part in parts), rel=1e-5)


# Times of the two strands.


def test_shared_times_are_one_time():
    ccdd = make(time_eps=0.1)
    batch, noise = batch_and_noise(64)
    corrupted = ccdd.corrupt(batch, noise)
    assert torch.equal(corrupted.latent_times, corrupted.times)
    assert torch.allclose(corrupted.times, 0.1 + 0.8 * noise.strata, rtol=1e-12)
    assert 0.1 <= float(corrupted.times.min()) < 0.12 and 0.88 < float(corrupted.times.max()) <= 0.9
    calls = recorded_calls(ccdd)
    ccdd.predict(corrupted)
    assert "latent_times" not in calls[0]


def test_independent_times_cover_the_square():
    ccdd = make(latent_times="independent", time_eps=0.1)
    batch, noise = batch_and_noise(4000)
    corrupted = ccdd.corrupt(batch, noise)
    t, u = corrupted.times, corrupted.latent_times
    assert abs(float(torch.corrcoef(torch.stack([t, u]))[0, 1])) < 0.05
    assert 0.1 <= float(u.min()) < 0.11 and 0.89 < float(u.max()) <= 0.9 and abs(float(u.mean()) - 0.5) < 0.015
    quadrants = [float(((t < 0.5) == a).logical_and((u < 0.5) == b).double().mean()) for a in (0, 1) for b in (0, 1)]
    assert quadrants == pytest.approx([0.25] * 4, abs=0.03)
    calls = recorded_calls(ccdd)
    ccdd.predict(corrupted)
    assert torch.equal(calls[0]["times"], t) and torch.equal(calls[0]["latent_times"], u)


@pytest.mark.parametrize("mode", ["shared", "independent"])
def test_bounds_are_taken_along_the_samplers_path(mode):
    ccdd = make("mmdit", latent_times=mode)
    calls = recorded_calls(ccdd)
    ccdd.evaluate(*batch_and_noise(8, purpose="validation"))
    assert len(calls) == 5, "token bound with and without latents, the joint bound at t and at tau, the published range"
    for call in calls:
        assert torch.equal(call.get("latent_times", call["times"]), call["times"])
    notes = [figure.note for figure in ccdd.figures]
    assert all(("both strands at one time" in notes[index]) == (mode == "independent") for index in (0, 2))


@pytest.mark.parametrize("kind", ["table", *CONTEXTUAL])
@pytest.mark.parametrize("options", [{"latent_times": "clean"}, {"latent_mode": "features"}], ids=["clean", "features"])
def test_undiffused_latents_are_what_the_encoder_says_of_the_visible_tokens(kind, options):
    ccdd = make("mdit", kind, full_visibility_probability=1.0, latent_dropout=0.0, **options)
    batch, noise = batch_and_noise(8)
    corrupted = ccdd.corrupt(batch, noise)
    assert torch.equal(corrupted.latents, ccdd.encoder.encode(batch.tokens, corrupted.masked))
    assert not corrupted.latent_times.any() and corrupted.times.all()
    calls = recorded_calls(ccdd)
    figures = ccdd.evaluate(batch, noise)
    visible = ccdd.encoder.encode(batch.tokens, calls[0]["tokens"] == MASK)
    assert torch.equal(calls[0]["latents"], visible) and len(calls) == 3
    assert list(figures) == ["token_bound", "token_bound_latents_off", "published"]
    assert "no joint bound" in ccdd.figures[0].note
    assert set(ccdd.schedule_curves(torch.linspace(0, 1, 5).double())) == {"token survival", "token loss weight"}


@pytest.mark.parametrize("latent_times", ["shared", "clean"])
def test_the_published_figure_is_the_token_term_on_its_range_of_times(latent_times):
    """1/t-weighted cross-entropy at p_r = 1, t in [1e-4, 1 - 1e-4] without the factor of its length, draw by draw."""
    ccdd = make("mdit", latent_times=latent_times)
    batch, noise = batch_and_noise(16, purpose="validation", padding=2)
    calls = recorded_calls(ccdd)
    found = ccdd.evaluate(batch, noise)["published"]
    assert not next(figure for figure in ccdd.figures if figure.name == "published").is_bound
    t, call = 1e-4 + (1 - 2e-4) * noise.strata, calls[-1]
    masked = noise.uniforms(LENGTH) < t.float()[:, None]
    assert torch.allclose(call["times"], t, rtol=1e-12)
    assert torch.equal(call["tokens"], torch.where(masked, MASK, batch.tokens))
    t_z = t if latent_times == "shared" else torch.zeros_like(t)
    latents = ccdd._noised(ccdd.encoder.encode(batch.tokens, masked), noise, t_z)
    assert torch.equal(call["latents"], latents)
    own = {} if latent_times == "shared" else {"latent_times": t_z}
    nats = float64_nats(ccdd.network(call["tokens"], t, latents, None, **own).logits, batch.tokens)
    assert torch.allclose(found, (nats * masked * batch.loss_mask).sum(1) / t, rtol=1e-6)


def test_features_learn_tokens_and_nothing_else():
    ccdd = make("mmdit", latent_mode="features")
    batch, noise = batch_and_noise(8)
    corrupted = ccdd.corrupt(batch, noise)
    loss = ccdd.loss(ccdd.predict(corrupted), corrupted)
    assert set(loss.terms) == {"token_loss"}
    loss.total.backward()
    without = {n for n, p in ccdd.network.named_parameters() if p.grad is None or not p.grad.any()}
    assert {name for name in without if not name.startswith("blocks.")} == {
        name for name, _ in ccdd.network.named_parameters() if name.startswith("latent_head.")
    }
    assert not any(".tokens." in name for name in without)


# What is hidden from the network, and what is given.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_token_dropout_shows_masks_and_changes_no_target(architecture):
    ccdd = make(architecture, token_dropout=0.3)
    batch, noise = batch_and_noise(1000)
    batch = with_condition(batch, GIVEN)
    corrupted, plain = ccdd.corrupt(batch, noise), make(architecture).corrupt(batch, noise)
    dropped = (corrupted.tokens[:, GIVEN:] == MASK).all(1) & ~plain.masked[:, GIVEN:].all(1)
    assert abs(float(dropped.double().mean()) - 0.3) < 0.05
    assert torch.equal(corrupted.tokens[~dropped], plain.tokens[~dropped])
    assert torch.equal(corrupted.tokens[:, :GIVEN], batch.tokens[:, :GIVEN])
    assert torch.equal(corrupted.masked, plain.masked) and torch.equal(corrupted.latents, plain.latents)
    assert torch.equal(corrupted.latent_weight, plain.latent_weight)


@pytest.mark.parametrize("mode", [{}, {"latent_times": "independent"}, {"latent_mode": "features"}])
@pytest.mark.parametrize("kind", ["table", *CONTEXTUAL])
def test_given_tokens_hold_and_their_latents_say_nothing_of_the_rest(kind, mode):
    """Never masked; noised representations of the given tokens alone, as a sampler has them; neither learnt nor
    scored, in training and in every bound."""
    ccdd = make("mdit", kind, latent_dropout=0.0, **mode)
    batch, noise = batch_and_noise(16)
    batch = with_condition(batch, 5)
    corrupted = ccdd.corrupt(batch, noise)
    assert torch.equal(corrupted.tokens[:, :5], batch.tokens[:, :5]) and not corrupted.masked[:, :5].any()
    alone = ccdd.encoder.encode(batch.tokens, ~batch.condition)
    alpha, sigma = (f(corrupted.latent_times)[:, None, None] for f in (ccdd.schedule.alpha, ccdd.schedule.sigma))
    expected = alpha * alone + sigma * noise.normals(LENGTH, LATENT_DIM)
    torch.testing.assert_close(corrupted.latents[:, :5].double(), expected[:, :5], atol=1e-6, rtol=1e-6)

    rest = torch.where(batch.condition, batch.tokens, (batch.tokens + 1) % (VOCAB - 1))
    other = ccdd.corrupt(replace(batch, tokens=rest), noise)
    assert torch.equal(other.latents[:, :5], corrupted.latents[:, :5])
    if kind in ("bert", "roberta", "trained"):  # and the rest does hear what is given
        given = torch.where(batch.condition, (batch.tokens + 1) % (VOCAB - 1), batch.tokens)
        assert not torch.equal(
            ccdd.corrupt(replace(batch, tokens=given), noise).latents[:, 5:], corrupted.latents[:, 5:]
        )

    prediction = ccdd.predict(corrupted)
    total = ccdd.loss(prediction, corrupted).total
    far = prediction.logits.clone(), prediction.latents.clone()
    far[0][:, :5] += torch.randn(16, 5, VOCAB, generator=torch.Generator().manual_seed(0))
    far[1][:, :5] += 3
    far = prediction._replace(tokens=TokenLogits.known(far[0]), latents=far[1])
    assert torch.equal(ccdd.loss(far, corrupted).total, total)


@pytest.mark.parametrize("kind", ["table", "bert"])
def test_bounds_of_given_tokens(kind):
    """The joint bound gives the network the same latents at given positions as training does, and counts no cost."""
    ccdd = make("mdit", kind)
    batch, noise = batch_and_noise(16, purpose="validation")
    batch = with_condition(batch, 5)
    calls = recorded_calls(ccdd)
    ccdd.evaluate(batch, noise)
    alone = ccdd.encoder.encode(batch.tokens, ~batch.condition)
    for index in (0, 2, 3):
        call = calls[index]
        assert torch.equal(call["tokens"][:, :5], batch.tokens[:, :5])
        alpha, sigma = (f(call["times"])[:, None, None] for f in (ccdd.schedule.alpha, ccdd.schedule.sigma))
        expected = alpha * alone + sigma * noise.normals(LENGTH, LATENT_DIM)
        torch.testing.assert_close(call["latents"][:, :5].double(), expected[:, :5], atol=1e-6, rtol=1e-6)
    everything = replace(batch, loss_mask=torch.zeros_like(batch.loss_mask), condition=torch.ones_like(batch.condition))
    assert all(not value.any() for value in ccdd.evaluate(everything, noise).values())


def test_without_given_tokens_the_promise_changes_nothing_but_the_encoders_work():
    batch, noise = batch_and_noise(8)
    calls = []
    for conditional in (True, False):
        ccdd = make("mdit", "bert", conditional=conditional)
        encode = ccdd.encoder.encode
        ccdd.encoder.encode = lambda *args, encode=encode: (calls.append(1), encode(*args))[1]
        latents = ccdd.corrupt(batch, noise).latents
        calls.append(latents)
    assert torch.equal(calls[3], calls[-1]) and calls[:3] == [1, 1, 1] and calls[4:-1] == [1, 1]


# Experts.


def test_balance_loss_is_1_for_an_even_load_and_e_for_one_expert():
    ccdd = make("moedit-1", experts=ExpertsConfig(num=4, per_token=1, balance=1.0))
    batch, noise = batch_and_noise(8)
    corrupted = ccdd.corrupt(batch, noise)
    prediction = ccdd.predict(corrupted)
    probabilities, chosen, *_ = prediction.routing

    def balance(probabilities, chosen):
        routing = prediction.routing._replace(probabilities=probabilities, chosen=chosen)
        loss = ccdd.loss(prediction._replace(routing=routing), corrupted)
        return float(loss.terms["balance_loss"]) / int(loss.count)

    in_turn = torch.arange(LENGTH)[None, :, None, None, None] % 4 == torch.arange(4)
    even = torch.full_like(probabilities, 0.25)
    assert balance(even, in_turn.expand_as(chosen)) == pytest.approx(1)
    first = (torch.arange(4) == 0).expand_as(chosen)
    assert balance(first.float(), first) == pytest.approx(4)
    assert balance(even, first) == pytest.approx(1)
    # An expert for each strand is an even load, too.
    by_strand = (torch.arange(4) == torch.tensor([[0], [1]])).view(1, 1, 2, 1, 4).expand_as(chosen)
    assert balance(by_strand.float(), by_strand) == pytest.approx(2)  # two of four experts


@pytest.mark.parametrize("gate", ["auto", "renormalised"])
def test_the_router_of_one_expert_learns_from_the_loss(gate):
    ccdd = make("moedit-1", experts=ExpertsConfig(per_token=1, gate=gate))
    batch, noise = batch_and_noise(8)
    corrupted = ccdd.corrupt(batch, noise)
    ccdd.loss(ccdd.predict(corrupted), corrupted).total.backward()
    learns = [float(block.experts.router.weight.grad.abs().max()) > 1e-3 for block in ccdd.network.blocks]
    assert learns == [gate == "auto"] * 2


def test_use_of_the_experts_is_reported_beside_the_loss():
    """Shares by layer and expert, over both strands and the positions that count; the router's mean entropy."""
    ccdd = make("moedit-1", experts=ExpertsConfig(num=3, per_token=2))
    batch, noise = batch_and_noise(8, padding=3)
    corrupted = ccdd.corrupt(batch, noise)
    prediction = ccdd.predict(corrupted)
    loss = ccdd.loss(prediction, corrupted)
    shares = [f"layer{n}_expert{e}_share" for n in range(2) for e in range(3)]
    assert list(loss.terms) == ["token_loss", "latent_loss", *shares, "router_entropy"]
    assert float(loss.total.detach()) == pytest.approx(float(loss.terms["token_loss"] + loss.terms["latent_loss"]))
    assert not any(value.requires_grad for value in loss.terms.values())
    probabilities, chosen = (part[:, :-3].detach().double() for part in prediction.routing[:2])
    count = int(loss.count)
    for name in shares:
        share = float(chosen[:, :, :, int(name[5]), int(name[13])].mean()) / 2
        assert float(loss.terms[name]) / count == pytest.approx(share, rel=1e-5)
    entropy = -(probabilities * probabilities.log()).sum(-1).mean()
    assert float(loss.terms["router_entropy"]) / count == pytest.approx(float(entropy), rel=1e-5)


def test_evaluation_scores_the_counted_positions_only():
    ccdd = make("mmdit")
    batch, noise = batch_and_noise(8, purpose="validation", padding=4)
    values = ccdd.evaluate(batch, noise)
    nothing = replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))
    assert all(not value.any() for value in ccdd.evaluate(nothing, noise).values())
    assert all(bool((value > 0).all()) for value in values.values())
