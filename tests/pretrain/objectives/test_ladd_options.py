"""What LADD has beside its text runs: a learned encoder of Co-LADD, Gumbel codes, the latents' own denoiser, warm-ups,
and the optional losses; closed forms in float64."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from braid.kernels import linear_loss
from braid.kernels.linear_loss import Rows
from braid.pretrain.config.load import load_config
from braid.pretrain.diffusion.ladd import Independence, warmup_factor
from braid.pretrain.model.blocks import DropoutKey
from braid.pretrain.model.token_logits import TokenLogits
from braid.pretrain.objectives import co_ladd, di_ladd

from ...parallel.tensor_cases import TOKENIZER
from .conftest import LENGTH, MASK, MODEL, VOCAB, batch_and_noise
from .ladd_cases import CODEBOOK_SIZE, LATENT_DIM, NUM_SLOTS, build
from .references import float64_nats

E = 1e-4
GUMBEL = {"learned": True, "quantiser": "gumbel"}


def terms_of(objective, corrupted, prediction) -> dict[str, float]:
    """Per position that counts."""
    loss = objective.loss(prediction, corrupted)
    return {name: float(value) / int(loss.count) for name, value in loss.terms.items()}


# -- a learned encoder of continuous latents ------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["unit", "none"])
def test_co_latents_of_a_learned_encoder(norm):
    """Target and noised latents are what the encoder says of the text but for what is hidden, on unit length or as it
    is; the encoder learns from the tokens, and from the latents' loss through both of its arguments."""
    options = {"latent_norm": norm} | ({"latent_prior_scale": 0.3} if norm == "none" else {})
    objective = build("co_ladd", learned=True, latent_dropout=0.0, **options)
    batch, noise = batch_and_noise(16, padding=2)
    corrupted = objective.corrupt(batch, noise)
    hidden = objective.hidden_tokens(corrupted.masked, noise)
    raw = objective.latent_encoder(batch.tokens, hidden)
    expected = raw / raw.norm(dim=-1, keepdim=True) if norm == "unit" else raw
    assert torch.allclose(corrupted.latent_targets, expected, atol=1e-6)
    signal = ((1 - 2 * E) * torch.sqrt(1 - corrupted.times) + E)[:, None, None]
    y_t = signal.sqrt() * expected + (1 - signal).sqrt() * noise.normals(NUM_SLOTS, LATENT_DIM)
    assert torch.allclose(corrupted.latents, y_t.float(), atol=1e-5)

    prediction = objective.predict(corrupted)
    terms = terms_of(objective, corrupted, prediction)
    error = float((prediction.latents.double() - expected.double()).square().mean().detach())
    assert terms["latent_loss"] == pytest.approx(error, rel=1e-6)
    if norm == "none":
        assert terms["prior_loss"] == pytest.approx(0.3 * float(expected.double().square().mean()) / 2, rel=1e-6)
    else:
        assert "prior_loss" not in terms

    parameters = list(objective.latent_encoder.parameters())
    errors = (prediction.latents - corrupted.latent_targets).square().mean((1, 2))
    wholly = torch.autograd.grad(errors.sum(), parameters, retain_graph=True)
    constant = (prediction.latents - corrupted.latent_targets.detach()).square().mean((1, 2))
    in_part = torch.autograd.grad(constant.sum(), parameters, retain_graph=True)
    assert any(not torch.allclose(a, b) for a, b in zip(wholly, in_part, strict=True))
    objective.loss(prediction, corrupted).total.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in parameters)


def test_the_encoder_may_be_shown_less_than_is_visible():
    """Every token is hidden from it with the same probability, masked or not; nothing else changes."""
    masking, plain = build("co_ladd", hidden_max=0.0, encoder_masking=0.3), build("co_ladd", hidden_max=0.0)
    batch, noise = batch_and_noise(2000)
    corrupted = plain.corrupt(batch, noise)
    hidden = masking.hidden_tokens(corrupted.masked, noise)
    assert float(hidden.double().mean()) == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / hidden.numel()))
    together = torch.stack([hidden.flatten(), corrupted.masked.flatten()]).double()
    assert abs(float(torch.corrcoef(together)[0, 1])) < 5 / math.sqrt(hidden.numel())
    assert not plain.hidden_tokens(corrupted.masked, noise).any()
    assert torch.equal(masking.corrupt(batch, noise).tokens, corrupted.tokens)
    both = build("co_ladd", hidden_max=1.0, encoder_masking=0.3).hidden_tokens(corrupted.masked, noise)
    alone = build("co_ladd", hidden_max=1.0).hidden_tokens(corrupted.masked, noise)
    assert torch.equal(both, alone | hidden)


# -- Gumbel codes ---------------------------------------------------------------------------------------------------


def test_gumbel_codes_are_drawn_in_training_and_the_most_probable_elsewhere():
    objective = build("di_ladd", **GUMBEL)
    batch, noise = batch_and_noise(400)
    corrupted = objective.corrupt(batch, noise)
    nothing = torch.zeros_like(batch.loss_mask)
    logits = objective.latent_encoder(batch.tokens, nothing)
    assert logits.shape == (400, NUM_SLOTS, CODEBOOK_SIZE - 1)
    drawn = (logits + noise.gumbels(NUM_SLOTS, CODEBOOK_SIZE - 1).float()).argmax(-1)
    assert torch.equal(corrupted.latent_targets, drawn)
    vectors, codes = objective.codes(batch, nothing)
    assert torch.equal(codes, logits.argmax(-1)) and torch.equal(vectors, objective.codebook.vectors[codes])
    # The law of the draws is softmax(logits): the mean log-probability of a draw is minus the entropy.
    law = logits.double().log_softmax(-1)
    surprise = -law.gather(-1, drawn[..., None])[..., 0]
    entropy = -(law.exp() * law).sum(-1)
    assert float((surprise - entropy).mean()) == pytest.approx(0, abs=4 * float(surprise.std()) / math.sqrt(2000))
    assert float((drawn != codes).double().mean()) > 0.05
    shown = torch.where(
        corrupted.masked_codes[..., None], objective.network.latent_mask, objective.codebook.vectors[drawn]
    )
    assert torch.equal(corrupted.latents, shown)


def test_gumbel_gradients_are_straight_through():
    """d/d logits of what the slots' vectors are multiplied with is softmax's at the step's temperature; the vectors
    learn as a table does."""
    objective = build("di_ladd", **GUMBEL, gumbel_start=1.0, gumbel_end=0.01, gumbel_steps=100)
    objective.begin_step(50, 1000)
    tau = 0.1
    batch, noise = batch_and_noise(6)
    logits = objective.latent_encoder(batch.tokens, torch.zeros_like(batch.loss_mask)).detach().requires_grad_()
    vectors, codes, commitment, _ = objective.drawn_codes(logits, noise)
    assert torch.equal(vectors, objective.codebook.vectors[codes]) and not commitment.any()
    weights = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(3))
    (vectors * weights).sum().backward()

    scores = ((logits.detach().double() + noise.gumbels(NUM_SLOTS, CODEBOOK_SIZE - 1)) / tau).requires_grad_()
    table = objective.codebook.vectors.detach().double()
    ((scores.softmax(-1) @ table) * weights).sum().backward()
    assert torch.allclose(logits.grad.double(), scores.grad / tau, atol=1e-4, rtol=1e-4)
    expected = torch.zeros_like(table).index_add(0, codes.flatten(), weights.double().flatten(0, 1))
    assert torch.allclose(objective.codebook.vectors.grad.double(), expected, atol=1e-5)


def test_gumbel_usage_is_that_of_the_last_global_batch():
    objective = build("di_ladd", **GUMBEL)
    corrupted = objective.corrupt(*batch_and_noise(8))
    loss = objective.loss(objective.predict(corrupted), corrupted)
    assert float(loss.terms["code_perplexity"]) == 0 and "commitment_loss" not in loss.terms
    objective.update_state(loss.statistics)
    share = torch.bincount(corrupted.latent_targets.flatten(), minlength=CODEBOOK_SIZE - 1).double() / (8 * NUM_SLOTS)
    perplexity = float(torch.exp(-(share[share > 0] * share[share > 0].log()).sum()))
    after = objective.loss(objective.predict(corrupted), corrupted)
    assert float(after.terms["code_perplexity"]) / int(after.count) == pytest.approx(perplexity)


# -- the latents' own denoiser --------------------------------------------------------------------------------------


def test_each_network_sees_its_own_strand():
    """The joint one x_t and clean latents at their time 0; the latents' own y_t, and no token: changing the text at
    equal latents changes nothing it says. The losses are the plain ones."""
    objective = build("co_ladd", latent_denoiser=True, latent_dropout=0.3, hidden_max=0.0)
    batch, noise = batch_and_noise(16)
    corrupted = objective.corrupt(batch, noise)
    clean = corrupted.latent_targets
    kept = corrupted.latent_weight == 1
    assert not corrupted.latent_times.any() and torch.equal(corrupted.noised_latent_times, corrupted.times)
    near = math.sqrt(1 - E) * clean + math.sqrt(E) * noise.normals(NUM_SLOTS, LATENT_DIM)
    assert torch.allclose(corrupted.latents[kept], near[kept], atol=1e-6) and not corrupted.latents[~kept].any()
    signal = ((1 - 2 * E) * torch.sqrt(1 - corrupted.times) + E)[:, None, None]
    eps = noise.normals(NUM_SLOTS, LATENT_DIM, purpose="latent_denoiser")
    y_t = signal.sqrt() * clean + (1 - signal).sqrt() * eps
    assert torch.allclose(corrupted.noised_latents, y_t.float(), atol=1e-5)

    prediction = objective.predict(corrupted)
    assert torch.equal(prediction.latents, objective.latent_denoiser(corrupted.noised_latents, corrupted.times))
    other = objective.predict(replace(corrupted, tokens=(corrupted.tokens + 1) % (VOCAB - 1)))
    assert torch.equal(other.latents, prediction.latents) and not torch.equal(other.logits, prediction.logits)
    terms = terms_of(objective, corrupted, prediction)
    error = (prediction.latents.double() - clean.double()).square().mean((1, 2)) * kept
    assert terms["latent_loss"] == pytest.approx(float(error.mean()), rel=1e-6)
    nats = float64_nats(prediction.logits, batch.tokens) * corrupted.masked
    assert terms["token_loss"] == pytest.approx(float(nats.mean()), rel=1e-6)


def test_its_dropout_is_its_own_and_counted():
    model = replace(MODEL, dropout=0.3)
    objective = build("co_ladd", model=model, latent_denoiser=True).train()
    corrupted = objective.corrupt(*batch_and_noise(4))
    first, again = objective.predict(corrupted), objective.predict(corrupted)
    assert torch.equal(first.latents, again.latents)
    assert not torch.allclose(first.latents, objective.eval().predict(corrupted).latents, atol=1e-3)
    joint = DropoutKey(corrupted.dropout.key, corrupted.dropout.ordinals, torch.arange(NUM_SLOTS))
    objective.train()
    shared = objective.latent_denoiser(corrupted.noised_latents, corrupted.noised_latent_times, joint)
    assert not torch.equal(first.latents, shared)


# -- warm-up and independence ---------------------------------------------------------------------------------------


def test_warm_ups():
    for step, linear, delayed in ((0, 0, 0), (20, 0.2, 0), (60, 0.6, 0.5), (100, 1, 1), (500, 1, 1)):
        assert warmup_factor("linear", step, 100) == pytest.approx(linear)
        assert warmup_factor("delayed", step, 100) == pytest.approx(delayed)
        assert warmup_factor("none", step, 100) == 1


@pytest.mark.parametrize("name", ["co_ladd", "di_ladd"])
def test_the_latent_loss_warms_up_after_stage_one(name):
    options = {"latent_warmup": "linear", "latent_warmup_steps": 10}
    objective = build(name, stage_one_steps=5, latent_scale=2.0, **options)
    corrupted = objective.corrupt(*batch_and_noise(8))
    prediction = objective.predict(corrupted)
    measured = {}
    for step in (0, 4, 5, 10, 15, 40):
        objective.begin_step(step, 100)
        measured[step] = terms_of(objective, corrupted, prediction)["latent_loss"]
    assert measured[0] == measured[4] == measured[5] == 0
    assert measured[10] == pytest.approx(measured[40] / 2, rel=1e-6) and measured[15] == measured[40] > 0
    without = terms_of(build(name, latent_scale=2.0), corrupted, prediction)["latent_loss"]
    assert measured[40] == pytest.approx(without, rel=1e-6)


@pytest.mark.parametrize("chunk", [1 << 26, 3 * 64])
def test_independence_nats_by_hand(monkeypatch, chunk):
    """KL(p || q) in float64 at the rows that count, the mask in neither law; only q learns, and by q - p."""
    monkeypatch.setattr(linear_loss, "CHUNK_LOGITS", chunk)
    generator = torch.Generator().manual_seed(0)
    logits, blind = torch.randn(2, 5, 7, VOCAB, generator=generator)
    logits[0, 0, 3] = -1000.0  # a probability that is 0 in float32
    counts = torch.rand(5, 7, generator=generator) < 0.7
    logits.requires_grad_()
    blind.requires_grad_()
    row_loss = partial(Independence, scale=0.3, mask_id=MASK, vocabulary=build("co_ladd").vocabulary)
    total, nats = TokenLogits.known(blind).loss_beside(TokenLogits.known(logits), row_loss, Rows(counts), counts.shape)
    p, q = (x.detach().double()[..., :MASK].log_softmax(-1) for x in (logits, blind))
    expected = (p.exp() * (p - q)).sum(-1) * counts
    assert torch.allclose(nats, expected, rtol=1e-5, atol=1e-6)
    assert float(total.detach()) == pytest.approx(0.3 * float(expected.sum()), rel=1e-6)
    total.backward()
    assert logits.grad is None
    gradient = F.pad(0.3 * (q.exp() - p.exp()), (0, VOCAB - MASK)) * counts[..., None]
    assert torch.allclose(blind.grad.double(), gradient, atol=1e-6)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_gradients_of_the_independence_loss_are_autograds(precision):
    """Of the head and of what it reads, in chunks, beside all logits at once."""
    objective = build("di_ladd", independence_scale=1.0)
    head, generator = objective.network.token_head.linear, torch.Generator().manual_seed(1)
    hidden, other = (torch.randn(2, 9, head.in_features, generator=generator).to(precision) for _ in range(2))
    counts, vocabulary = torch.rand(2, 9, generator=generator) < 0.6, objective.vocabulary
    found = []
    for at_once in (True, False):
        seen = hidden.clone().requires_grad_()
        mine, constant = (TokenLogits(each, head, vocabulary) for each in (seen, other))
        if at_once:
            p, q = (vocabulary.without(each.whole, MASK)[..., :MASK].log_softmax(-1) for each in (constant, mine))
            total = (p.detach().exp() * (p.detach() - q)).sum(-1)[counts].sum()
        else:
            row_loss = partial(Independence, scale=1.0, mask_id=MASK, vocabulary=vocabulary)
            total = mine.loss_beside(constant, row_loss, Rows(counts), counts.shape).total
        head.zero_grad()
        total.backward()
        found.append([total.detach().float(), seen.grad, head.weight.grad.clone(), head.bias.grad.clone()])
    exact = 1e-5 if precision == torch.float32 else 2e-2
    for expected, ours in zip(*found, strict=True):
        assert (ours - expected).abs().max() <= exact * expected.abs().max()


@pytest.mark.parametrize("name, options", [("co_ladd", {}), ("di_ladd", {}), ("co_ladd", {"latent_denoiser": True})])
def test_the_independence_loss_compares_with_a_call_that_sees_the_slots_alone(name, options):
    objective = build(name, independence_scale=0.7, **options)
    batch, noise = batch_and_noise(8, padding=2)
    corrupted = objective.corrupt(batch, noise)
    calls, forward = [], objective.network.forward
    objective.network.forward = lambda *given: (calls.append(given), forward(*given))[1]
    prediction = objective.predict(corrupted)
    (_, slots, _, slot_times, _), (tokens, same_slots, ones, same_times, _) = calls
    assert (tokens == MASK).all() and (ones == 1).all()
    assert torch.equal(slots, same_slots) and torch.equal(slot_times, same_times)
    both = (prediction.tokens.whole, prediction.without_tokens.whole)
    p, q = (x.detach().double()[..., :MASK].log_softmax(-1) for x in both)
    nats = ((p.exp() * (p - q)).sum(-1) * corrupted.masked * batch.loss_mask).sum() / batch.loss_mask.sum()
    assert terms_of(objective, corrupted, prediction)["independence_loss"] == pytest.approx(0.7 * float(nats), rel=1e-6)
    plain = build(name, **options)
    assert plain.predict(plain.corrupt(batch, noise)).without_tokens is None


def test_given_tokens_stay_in_the_blind_call():
    objective = build("co_ladd", independence_scale=1.0)
    batch, noise = batch_and_noise(4)
    condition = torch.zeros_like(batch.loss_mask)
    condition[:, :3] = True
    given = replace(batch, loss_mask=~condition, condition=condition)
    tokens = objective.corrupt(given, noise).without_tokens
    assert torch.equal(tokens[:, :3], batch.tokens[:, :3]) and (tokens[:, 3:] == MASK).all()


# -- built from a configuration -------------------------------------------------------------------------------------


def test_what_a_configuration_builds():
    def co(*overrides: str):
        return co_ladd.build(load_config("tiny_co_ladd", [f"objective.{each}" for each in overrides]), TOKENIZER, None)

    learned = co("encoder.kind=learned", "encoder_layers=1")
    assert len(learned.latent_encoder.blocks) == 1 and learned.encoder is None and learned.latent_denoiser is None
    both = co("encoder.kind=learned", "latent_denoiser=true", "latent_denoiser_layers=3")
    assert len(both.latent_denoiser.blocks) == 3 and both.latent_denoiser.num_slots == 8
    networks = (both.latent_encoder, both.latent_denoiser, both.network)
    encoder, denoiser, network = (each.training_flops(32).total for each in networks)
    assert both.extra_forward_passes == pytest.approx(3 * (encoder + denoiser) / network)
    assert co("encoder.kind=learned", "independence_scale=0.1").extra_forward_passes > 3
    assert {figure.name for figure in both.figures} == {
        "token_bound", "token_bound_latents_off", "sequential_nelbo", "token_nats_given_latents"
    }  # fmt: skip
    keys = [f"objective.{each}" for each in ("encoder.kind=learned", "quantiser=gumbel", "codebook_size=40")]
    gumbel = di_ladd.build(load_config("tiny_di_ladd", keys), TOKENIZER, None)
    assert gumbel.latent_encoder.latent_dim == 39 and gumbel.codebook.vectors.shape == (39, 8)
    assert gumbel.network.latent_outputs == 40 and gumbel.network.latent_dim == 8


@pytest.mark.parametrize("name", ["co_ladd", "di_ladd"])
def test_every_figure_has_a_value(name):
    for options in ({"learned": True}, {"latent_denoiser": True}, GUMBEL):
        if not (name == "di_ladd" and "latent_denoiser" in options) and not (name == "co_ladd" and options is GUMBEL):
            objective = build(name, **options)
            values = objective.evaluate(*batch_and_noise(4, LENGTH))
            assert values.keys() == {figure.name for figure in objective.figures}
            assert all(value.isfinite().all() for value in values.values())
