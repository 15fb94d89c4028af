"""LADD's corruption and losses: leaks bit for bit, closed forms in float64, stages, splits, given tokens."""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from braid.data_pipeline.loader import Batch
from braid.kernels.random import initial_normal
from braid.pretrain.config.load import load_config
from braid.pretrain.diffusion.ladd import bound_times
from braid.pretrain.diffusion.times import second_strata
from braid.pretrain.model.encoders import TableEncoder
from braid.pretrain.objectives import co_ladd, di_ladd

from .conftest import BOS, EOS, LENGTH, MASK, MODEL, VOCAB, batch_and_noise
from .ladd_cases import CODEBOOK_SIZE, LATENT_DIM, NUM_SLOTS, build, part
from .references import float64_nats

E = 1e-4
BOTH = pytest.mark.parametrize("name", ["co_ladd", "di_ladd"])
CASES = pytest.mark.parametrize(
    "name, options",
    [("co_ladd", {}), ("di_ladd", {}), ("di_ladd", {"learned": True}), ("co_ladd", {"independent_times": True}),
     ("di_ladd", {"hidden_max": 0.9, "latent_dropout": 0.3, "independent_times": False}),
     ("co_ladd", {"learned": True, "latent_norm": "none", "latent_prior_scale": 0.3, "encoder_masking": 0.2}),
     ("co_ladd", {"latent_denoiser": True, "independence_scale": 0.5}),
     ("di_ladd", {"learned": True, "quantiser": "gumbel", "independence_scale": 0.5})],
    ids=["co", "di", "di-learned", "co-independent", "di-hidden", "co-learned", "co-denoiser", "di-gumbel"],
)  # fmt: skip


def pooled(objective, tokens: torch.Tensor) -> torch.Tensor:
    """Chunk means of the table's rows in float64, written out; LENGTH tokens into NUM_SLOTS slots."""
    rows = objective.encoder.table.double()[tokens]
    owner = torch.arange(LENGTH) * NUM_SLOTS // LENGTH
    return torch.stack([rows[:, owner == slot].mean(1) for slot in range(NUM_SLOTS)], 1)


def changed_where(batch: Batch, where: torch.Tensor) -> Batch:
    return Batch(torch.where(where, (batch.tokens + 1) % (VOCAB - 1), batch.tokens), batch.loss_mask, batch.ordinals)


# -- leaks ---------------------------------------------------------------------------------------------------------


@BOTH
def test_masked_tokens_do_not_reach_the_network_where_they_are_hidden(name):
    """Change every masked token, keep all randomness: in sequences whose masked tokens are hidden from the encoder, the
    network's whole input and what it says stay bit for bit; in the others the latents change."""
    objective = build(name, hidden_max=1.0, latent_dropout=0.0, latent_schedule="linear")
    batch, noise = batch_and_noise(64)
    corrupted = objective.corrupt(batch, noise)
    hidden = objective.hidden_tokens(corrupted.masked, noise)
    protected, open_ = hidden.any(1), corrupted.masked.any(1) & ~hidden.any(1)
    assert int(protected.sum()) > 10 and int(open_.sum()) > 10
    assert torch.equal(hidden[protected], corrupted.masked[protected]), "all masked tokens are, or none"
    other = objective.corrupt(changed_where(batch, corrupted.masked), noise)
    assert torch.equal(corrupted.tokens, other.tokens)
    assert torch.equal(corrupted.latents[protected], other.latents[protected])
    assert torch.equal(corrupted.latent_targets[protected], other.latent_targets[protected])
    ours, theirs = objective.predict(corrupted), objective.predict(other)
    assert torch.equal(ours.logits[protected], theirs.logits[protected])
    assert torch.equal(ours.latents[protected], theirs.latents[protected])
    if name == "co_ladd":
        assert (corrupted.latents[open_] != other.latents[open_]).any(-1).any(-1).all()


@CASES
def test_token_bounds_see_no_masked_token(name, options):
    """Through `evaluate`: record what the network is given. The two token bounds, and they alone, are the same when all
    masked tokens are changed."""
    objective = build(name, **options)
    batch, noise = batch_and_noise(8, purpose="validation")
    seen, forward = [], objective.network.forward
    objective.network.forward = lambda *given: (seen.append(given), forward(*given))[1]
    figures = [objective.evaluate(batch, noise)]
    masked = seen[0][0] == MASK
    num_calls = len(seen)
    joint = "latent_denoiser" not in options
    if name == "co_ladd" and joint:  # the token bounds have their own times, and masks with them
        masked = seen[1][0] == MASK
    figures.append(objective.evaluate(changed_where(batch, masked), noise))
    calls = list(zip(seen[:num_calls], seen[num_calls:], strict=True))
    same = [all(torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in calls]
    bounds = {"co_ladd": same[1:3] if joint else same[:2], "di_ladd": same[-2:]}[name]
    assert all(bounds) and not all(same)


def test_hiding_is_drawn_per_sequence():
    """r ~ U[0, 0.9] and then a coin: 45 in 100 sequences."""
    objective = build("co_ladd")
    batch, noise = batch_and_noise(4000)
    everything = torch.ones_like(batch.loss_mask)
    share = objective.hidden_tokens(everything, noise).double().mean(1)
    assert set(share.tolist()) == {0.0, 1.0}
    assert abs(float(share.mean()) - 0.45) < 5 * math.sqrt(0.25 / 4000)
    dropped = ~objective.latents_kept(noise)
    assert abs(float(dropped.double().mean()) - 0.15) < 5 * math.sqrt(0.13 / 4000)
    assert abs(float(torch.corrcoef(torch.stack([share, dropped.double()]))[0, 1])) < 5 / math.sqrt(4000)
    assert not build("di_ladd").hidden_tokens(everything, noise).any()


# -- corruption ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 0.7])
def test_co_corruption_is_the_published_one(shift):
    """Everything but the normals written out in float64."""
    objective = build("co_ladd", hidden_max=0.0, time_shift=shift, time_shift_correction=shift != 1)
    batch, noise = batch_and_noise(64)
    corrupted = objective.corrupt(batch, noise)
    even = E + (1 - E) * noise.strata
    t = shift * even / (1 + (shift - 1) * even)
    assert torch.allclose(corrupted.times, t, rtol=1e-12) and torch.equal(corrupted.times, corrupted.latent_times)
    assert torch.equal(corrupted.masked, noise.uniforms(LENGTH) < (1 - ((1 - 2 * E) * (1 - t) + E)).float()[:, None])
    assert torch.equal(corrupted.tokens, torch.where(corrupted.masked, MASK, batch.tokens))
    y_0 = pooled(objective, batch.tokens)
    y_0 = y_0 / y_0.norm(dim=-1, keepdim=True)
    assert torch.allclose(corrupted.latent_targets.double(), y_0, atol=1e-6)
    signal = ((1 - 2 * E) * torch.sqrt(1 - t) + E)[:, None, None]
    y_t = signal.sqrt() * y_0 + (1 - signal).sqrt() * noise.normals(NUM_SLOTS, LATENT_DIM).double()
    kept = corrupted.latent_weight == 1
    assert torch.allclose(corrupted.latents[kept].double(), y_t[kept], atol=1e-5)
    assert not corrupted.latents[~kept].any() and 0 < int(kept.sum()) < 64
    slope = shift / (1 + (shift - 1) * even) ** 2
    assert torch.allclose(corrupted.time_weight.double(), slope if shift != 1 else torch.ones_like(t), rtol=1e-6)


@pytest.mark.parametrize("schedule, power", [("linear", 1), ("poly", 3)])
def test_di_corruption_is_the_published_one(schedule, power):
    objective = build("di_ladd", latent_schedule=schedule, **({"latent_power": 3.0} if power == 3 else {}))
    batch, noise = batch_and_noise(64)
    corrupted = objective.corrupt(batch, noise)
    assert torch.allclose(corrupted.times, E + (1 - E) * noise.strata, rtol=1e-12)
    t_y = E + (1 - E) * second_strata(noise.index, noise.shift)
    assert torch.equal(corrupted.latent_times, t_y) and not torch.allclose(t_y, corrupted.times, atol=0.1)
    slots = pooled(objective, batch.tokens)
    cosines = slots / slots.norm(dim=-1, keepdim=True) @ objective.codebook.vectors.double().T
    assert torch.equal(corrupted.latent_targets, cosines.argmax(-1))
    masked = noise.uniforms(NUM_SLOTS, word=3) < (1 - ((1 - 2 * E) * (1 - t_y**power) + E)).float()[:, None]
    assert torch.equal(corrupted.masked_codes, masked) and 0 < int(masked.sum()) < masked.numel()
    vectors = objective.codebook.vectors[corrupted.latent_targets]
    expected = torch.where(masked[..., None], objective.network.latent_mask, vectors)
    assert torch.equal(corrupted.latents, expected)
    assert objective.network.latent_mask.abs().min() > 0


def test_co_latents_may_have_times_of_their_own():
    """Shifted as the tokens' are; the correction is then the product of both derivatives."""
    objective = build("co_ladd", independent_times=True, time_shift=0.5, time_shift_correction=True)
    batch, noise = batch_and_noise(64)
    corrupted = objective.corrupt(batch, noise)
    even = E + (1 - E) * torch.stack([noise.strata, second_strata(noise.index, noise.shift)])
    assert torch.allclose(torch.stack([corrupted.times, corrupted.latent_times]), 0.5 * even / (1 - 0.5 * even))
    assert torch.allclose(corrupted.time_weight.double(), (0.5 / (1 - 0.5 * even) ** 2).prod(0), rtol=1e-6)


def test_without_independent_times_codes_have_the_tokens_time():
    objective = build("di_ladd", independent_times=False)
    corrupted = objective.corrupt(*batch_and_noise(8))
    assert torch.equal(corrupted.times, corrupted.latent_times)


def test_dropped_codes_are_all_masked_and_cost_nothing():
    objective = build("di_ladd", latent_dropout=0.4)
    batch, noise = batch_and_noise(64)
    corrupted = objective.corrupt(batch, noise)
    dropped = corrupted.latent_weight == 0
    assert 10 < int(dropped.sum()) < 54
    assert corrupted.masked_codes[dropped].all() and not corrupted.masked_codes[~dropped].all()
    only = objective.corrupt(*part(batch, noise, dropped))
    assert float(objective.loss(objective.predict(only), only).terms["latent_loss"]) == 0


@CASES
def test_given_tokens_are_never_noised(name, options):
    """The source of a pair stays as it is, is not scored, and is read by the encoder."""
    objective = build(name, **options)
    batch, noise = batch_and_noise(32)
    condition = torch.zeros_like(batch.loss_mask)
    condition[:, :4] = True
    given = Batch(batch.tokens, ~condition, batch.ordinals, condition)
    corrupted = objective.corrupt(given, noise)
    assert torch.equal(corrupted.tokens[:, :4], batch.tokens[:, :4]) and not corrupted.masked[:, :4].any()
    assert corrupted.masked[:, 4:].any()
    seen, forward = [], objective.network.forward
    objective.network.forward = lambda *inputs: (seen.append(inputs), forward(*inputs))[1]
    objective.evaluate(given, noise)
    assert all(torch.equal(tokens[:, :4], batch.tokens[:, :4]) for tokens, *_ in seen)
    clean = torch.zeros_like(condition)
    other = Batch(torch.where(condition, (batch.tokens + 1) % (VOCAB - 1), batch.tokens), ~condition, batch.ordinals,
                  condition)  # fmt: skip
    slots = [objective.raw_slots(each, clean) for each in (given, other)]
    assert not torch.equal(*slots)


@CASES
def test_corrupt_is_a_pure_function_of_the_key(name, options):
    """The same sample is corrupted alike whatever batch it is in, and in whatever order."""
    objective = build(name, **options)
    batch, noise = batch_and_noise(8)
    whole = objective.corrupt(batch, noise)
    # A network's rounding may know its batch.
    close = partial(torch.allclose, rtol=1e-5, atol=1e-5) if options.get("learned") else torch.equal
    for which in ([3], [6, 1], [7, 6, 5, 4, 3, 2, 1, 0]):
        some = objective.corrupt(*part(batch, noise, torch.tensor(which)))
        for key, expected in vars(whole).items():
            value = getattr(some, key)
            if isinstance(expected, torch.Tensor):
                assert (close if expected.is_floating_point() else torch.equal)(expected[which], value), key


# -- losses --------------------------------------------------------------------------------------------------------


def expected_losses(objective, corrupted, prediction, slots=None) -> dict[str, torch.Tensor]:
    """The default losses of every sequence, to be averaged over sequences, in float64 [B]. `slots`: what a learned
    encoder says, raw."""
    nats = float64_nats(prediction.logits, corrupted.targets) * (corrupted.tokens == MASK)
    counted = corrupted.loss_mask.double()
    losses = {"token_loss": (nats * counted).sum(1) / counted.sum(1)}
    if objective.name == "co_ladd":
        kept = (corrupted.latents != 0).any(-1).any(-1)
        error = (prediction.latents.double() - corrupted.latent_targets.double()).square().flatten(1).mean(1)
        losses["latent_loss"] = error * kept
        return losses
    logits = prediction.latents.double()[..., :-1]
    code_nats = logits.logsumexp(-1) - logits.gather(-1, corrupted.latent_targets[..., None])[..., 0]
    losses["latent_loss"] = (code_nats * corrupted.masked_codes).sum(1) / NUM_SLOTS
    if objective.latent_encoder is not None:
        directions, vectors = slots.double() / slots.double().norm(dim=-1, keepdim=True), objective.codebook.vectors
        distances = (directions[:, :, None] - vectors.double()).square().sum(-1)  # of each slot to each unit vector
        losses["commitment_loss"] = 0.1 * distances.amin(-1).mean(1) / LATENT_DIM
    return losses


@pytest.mark.parametrize("name, options", [("co_ladd", {}), ("di_ladd", {}), ("di_ladd", {"learned": True})])
def test_losses_are_the_closed_forms(name, options):
    """Unweighted: CE / L, the mean squared error, CE / S'. Relative 1e-6 against float64, padding left out."""
    objective = build(name, **options)
    batch, noise = batch_and_noise(32, padding=2)
    corrupted = objective.corrupt(batch, noise)
    with torch.no_grad():
        prediction = objective.predict(corrupted)
        slots = objective.raw_slots(batch, objective.hidden_tokens(corrupted.masked, noise))
    loss = objective.loss(prediction, corrupted)
    assert int(loss.count) == 32 * (LENGTH - 2)
    losses = expected_losses(objective, corrupted, prediction, slots)
    expected = {key: float(value.mean()) for key, value in losses.items()}
    measured = {key: float(loss.terms[key]) / int(loss.count) for key in expected}
    assert set(loss.terms) - set(expected) <= {"code_perplexity", "codes_replaced"}
    assert measured == pytest.approx(expected, rel=1e-6)
    assert float(loss.total.detach()) / int(loss.count) == pytest.approx(sum(expected.values()), rel=1e-6)
    assert all(value > 1e-3 for value in expected.values())


def test_the_corrected_time_shift_leaves_the_mean_loss_as_it_was():
    """Over even strata, the corrected loss under a shift is the plain one without, for a loss that depends on time
    alone: here the share of masked tokens times log V of a network that has learnt nothing."""
    num = 4000
    batch, noise = batch_and_noise(num)
    means = {}
    for shift, correction in ((1.0, False), (0.5, True), (0.5, False)):
        objective = build("co_ladd", randomise=False, time_shift=shift, time_shift_correction=correction)
        corrupted = objective.corrupt(batch, noise)
        share = corrupted.time_weight.double() * corrupted.masked.double().mean(1)
        means[shift, correction] = float(share.mean())
    error = 5 * math.sqrt(0.25 / LENGTH / num)
    assert means[1.0, False] == pytest.approx(0.5, abs=error)
    assert means[0.5, True] == pytest.approx(0.5, abs=1.5 * error)
    assert means[0.5, False] < 0.45
    objective = build("co_ladd", time_shift=0.5, time_shift_correction=True)
    corrupted = objective.corrupt(*part(batch, noise, slice(0, 16)))
    plain = replace(corrupted, time_weight=torch.ones(16))
    heavy = replace(corrupted, time_weight=torch.full((16,), 2.0))
    with torch.no_grad():
        prediction = objective.predict(corrupted)
    for term in ("token_loss", "latent_loss"):
        light = float(objective.loss(prediction, plain).terms[term])
        assert float(objective.loss(prediction, heavy).terms[term]) == pytest.approx(2 * light, rel=1e-6)


@BOTH
def test_stage_one_trains_without_the_latent_loss(name):
    objective = build(name, stage_one_steps=10, latent_scale=2.0)
    corrupted = objective.corrupt(*batch_and_noise(16))
    prediction = objective.predict(corrupted)
    objective.begin_step(9, 100)
    assert float(objective.loss(prediction, corrupted).terms["latent_loss"]) == 0
    objective.begin_step(10, 100)
    loss = objective.loss(prediction, corrupted)
    once = expected_losses(objective, corrupted, prediction)["latent_loss"].mean().detach()
    assert float(loss.terms["latent_loss"]) / int(loss.count) == pytest.approx(2 * float(once), rel=1e-6)


@BOTH
def test_step_zero_loss_is_log_v(name):
    objective = build(name, randomise=False, hidden_max=0.0)
    corrupted = objective.corrupt(*batch_and_noise(64))
    prediction = objective.predict(corrupted)
    loss = objective.loss(prediction, corrupted)
    expected = float(corrupted.masked.sum()) * math.log(VOCAB - 1)
    assert float(loss.terms["token_loss"]) == pytest.approx(expected, rel=1e-5)
    if name == "di_ladd":
        codes = float(corrupted.masked_codes.double().mean(1).sum()) * LENGTH * math.log(CODEBOOK_SIZE - 1)
        assert float(loss.terms["latent_loss"]) == pytest.approx(codes, rel=1e-5)
    else:  # ||0 - y_0||^2 of unit vectors over D dimensions
        kept = float(corrupted.latent_weight.sum())
        assert float(loss.terms["latent_loss"]) == pytest.approx(kept * LENGTH / LATENT_DIM, rel=1e-5)


@CASES
def test_sums_gradients_and_statistics_of_micro_batches_add_up(name, options):
    objective = build(name, **options)
    batch, noise = batch_and_noise(8, padding=2)

    def gradients(pieces):
        objective.zero_grad()
        losses = []
        for piece in pieces:
            corrupted = objective.corrupt(*piece)
            losses.append(objective.loss(objective.predict(corrupted), corrupted))
            losses[-1].total.backward()
        return losses, [parameter.grad.clone() for parameter in objective.parameters() if parameter.grad is not None]

    (whole,), one = gradients([(batch, noise)])
    split, many = gradients([part(batch, noise, torch.arange(k, k + 2)) for k in range(0, 8, 2)])
    for key, value in whole.terms.items():
        assert sum(float(loss.terms[key]) for loss in split) == pytest.approx(float(value), rel=1e-5)
    for key, value in whole.statistics.items():
        assert torch.allclose(sum(loss.statistics[key] for loss in split), value, atol=1e-6), key
    for a, b in zip(one, many, strict=True):
        # Terms of weights up to 1000 cancel in a sum: float32's error is relative to the tensor, not to the entry.
        assert (a - b).abs().max() <= 1e-4 * a.abs().max() + 1e-7


def test_the_learned_encoder_learns_from_the_tokens_and_from_commitment():
    objective = build("di_ladd", learned=True, stage_one_steps=5)
    names = {name for name, _ in objective.named_parameters()}
    assert any(name.startswith("latent_encoder.blocks") for name in names)
    gradients = []
    for commitment in (0.1, 0.0):
        objective.config = replace(objective.config, commitment=commitment)
        objective.zero_grad()
        corrupted = objective.corrupt(*batch_and_noise(16))
        objective.loss(objective.predict(corrupted), corrupted).total.backward()
        gradients.append(objective.latent_encoder.output.weight.grad.clone())
    assert gradients[1].abs().max() > 1e-4, "straight through the codes, from the tokens' loss alone"
    assert not torch.allclose(*gradients, rtol=1e-2)


def test_dropout_of_the_learned_encoder_is_counter_based():
    objective = build("di_ladd", learned=True, model=replace(MODEL, dropout=0.3)).train()
    batch, noise = batch_and_noise(8)
    first, again = objective.corrupt(batch, noise), objective.corrupt(batch, noise)
    assert torch.equal(first.commitment, again.commitment)
    assert not torch.equal(first.commitment, objective.eval().corrupt(batch, noise).commitment)


def test_the_codebook_moves_after_a_step_and_is_saved():
    objective, other = build("di_ladd"), build("di_ladd")
    before = objective.codebook.vectors.clone()
    batch, noise = batch_and_noise(16)
    corrupted = objective.corrupt(batch, noise)
    loss = objective.loss(objective.predict(corrupted), corrupted)
    assert torch.equal(objective.codebook.vectors, before)
    with torch.no_grad():
        objective.update_state(loss.statistics)
    assert not torch.equal(objective.codebook.vectors, before)
    assert not any(name.startswith("codebook") for name, _ in objective.named_parameters())
    other.load_state_dict(objective.state_dict())
    assert torch.equal(other.codebook.vectors, objective.codebook.vectors)
    loss = objective.loss(objective.predict(corrupted), corrupted)
    usage = [float(loss.terms[name]) / int(loss.count) for name in ("code_perplexity", "codes_replaced")]
    assert usage == pytest.approx([float(value) for value in objective.codebook.usage()])
    assert 1 < usage[0] <= usage[1] == CODEBOOK_SIZE - 1
    assert float(loss.total.detach()) == pytest.approx(
        sum(float(loss.terms[name]) for name in ("token_loss", "latent_loss")), rel=1e-6
    )


@CASES
def test_evaluation_tells_the_network_the_times_of_its_paths(name, options):
    """(t_x, t_y) of every call: joint, the two parts of sequential, the two token bounds."""
    objective = build(name, **options)
    batch, noise = batch_and_noise(4, purpose="validation")
    pairs, forward = [], objective.network.forward
    objective.network.forward = lambda *given: (pairs.append(given[2:4]), forward(*given))[1]
    figures = objective.evaluate(batch, noise)
    assert set(figures) == {figure.name for figure in objective.figures}
    even, one, zero, first = (
        1e-5 + (1 - 1e-5) * noise.strata,
        torch.ones(4),
        torch.zeros(4),
        torch.full((4,), 1e-5, dtype=torch.float64),
    )
    own = bound_times(noise.strata, 1e-5)[0]
    if "latent_denoiser" in options:  # whose own calls are not the network's
        expected = [(even, zero), (even, zero), (even, first)]
    elif name == "co_ladd":
        expected = [(own, own), (even, even), (even, even)]
        expected += [(one, own), (even, first)] if objective.config.independent_times else []
    elif objective.config.independent_times:
        expected = [(even, even), (one, even), (even, zero), (even, zero), (even, one)]
    else:
        expected = [(even, even), (even, even), (even, one)]
    assert len(pairs) == len(expected)
    for pair, times in zip(pairs, expected, strict=True):
        assert all(torch.equal(ours, theirs.double()) for ours, theirs in zip(pair, times, strict=True))


@CASES
def test_padding_and_evaluation_in_bf16_change_no_code(name, options):
    """The latents are computed in float32 under autocast: the same codes, the same targets."""
    objective = build(name, **options)
    batch, _ = batch_and_noise(16)
    nothing = torch.zeros_like(batch.loss_mask)
    with torch.autocast("cpu", torch.bfloat16):
        inside = objective.codes(batch, nothing)[0] if name == "di_ladd" else objective.slots(batch, nothing)
    outside = objective.codes(batch, nothing)[0] if name == "di_ladd" else objective.slots(batch, nothing)
    assert torch.equal(inside, outside)


def test_objectives_are_built_as_their_recipes_say():
    tokenizer = SimpleNamespace(vocab_size=VOCAB, mask_id=MASK, bos_id=BOS, eos_id=EOS)
    encoder = TableEncoder(initial_normal(1, "table", (VOCAB, 8)), mask_id=MASK, variance_floor=1e-6)
    co = co_ladd.build(load_config("tiny_co_ladd"), tokenizer, encoder)
    assert co.encoder is encoder and not hasattr(co.network, "latent_mask")
    assert (co.network.num_slots, co.network.latent_dim, co.network.latent_outputs) == (8, 8, 8)
    assert co.network.times == "latents" and co.extra_forward_passes == 0
    di = di_ladd.build(load_config("tiny_di_ladd"), tokenizer, encoder)
    assert di.latent_encoder is None and di.codebook.vectors.shape == (15, 8)
    assert di.network.latent_outputs == 16 and di.network.times == "none" and not di.network.latent_mask.any()

    overrides = ["objective.encoder.kind=learned", "objective.encoder_layers=1"]
    learned = di_ladd.build(load_config("tiny_di_ladd", overrides), tokenizer, None)
    assert len(learned.latent_encoder.blocks) == 1 and len(learned.network.blocks) == 2
    ours, theirs = (part.training_flops(32).total for part in (learned.latent_encoder, learned.network))
    assert (1 + learned.extra_forward_passes / 3) * theirs == pytest.approx(ours + theirs)
    tables = [part.token_embedding.weight for part in (learned.latent_encoder, learned.network)]
    assert not torch.equal(*tables), "initial values of their own"
