"""ELF's losses and figures against float64 references, what each pass is shown, and what must not matter."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import norm

from braid.data_pipeline.loader import Batch
from braid.pretrain.config.load import load_config
from braid.pretrain.diffusion.flow import velocity
from braid.pretrain.model.encoders import TableEncoder
from braid.pretrain.objectives.base import Noise
from braid.pretrain.objectives.elf import build

from .conftest import BOS, EOS, MASK, VOCAB
from .elf_cases import DIM, LENGTH, PADDING, SOURCE, Recorder, build_elf, rows, training_noise


@pytest.mark.parametrize(("packing", "paired"), [("stream", False), ("pairs", True)])
def test_what_a_configuration_builds(packing, paired):
    recipe = load_config("tiny_elf", [f"data.packing={packing}", "objective.encoder.latent_dim=6"])
    tokenizer = SimpleNamespace(vocab_size=VOCAB, mask_id=MASK, bos_id=BOS, eos_id=EOS)
    encoder = TableEncoder(torch.randn(VOCAB, DIM), mask_id=MASK, variance_floor=1e-6)
    objective = build(recipe, tokenizer, encoder)
    assert objective.paired == paired and objective.encoder is encoder and objective.config is recipe.objective
    network = objective.network
    sizes = (network.vocab_size, network.latent_dim, network.bottleneck_dim, network.config.width)
    assert sizes == (VOCAB, DIM, recipe.objective.bottleneck, recipe.model.width)
    assert (objective.mask_id, objective.bos_id, objective.eos_id) == (MASK, BOS, EOS)


def quantile(u: torch.Tensor, mean: float, std: float) -> np.ndarray:
    return 1 / (1 + np.exp(-(mean + std * norm.ppf(u.double().numpy()))))


def part(batch: Batch, noise: Noise, which: torch.Tensor) -> tuple[Batch, Noise]:
    fields = (batch.tokens, batch.loss_mask, batch.ordinals, batch.condition)
    moved = {name: getattr(noise, name)[which] for name in ("ordinals", "index", "shift")}
    return Batch(*(field[which] for field in fields)), replace(noise, **moved)


@pytest.mark.parametrize("source", [False, True], ids=["text", "pairs"])
def test_the_loss_is_the_papers_formula(source):
    """B3 and B4 written out in float64 from the noise's numbers; the network is called on what they give."""
    num = 48
    objective, batch, noise = build_elf(), rows(num, source=source, padding=True), training_noise(num)
    corrupted = objective.corrupt(batch, noise)
    prediction = objective.predict(corrupted)
    loss = objective.loss(prediction, corrupted)

    decode = (noise.coins(1) < 0.2).numpy()
    u = noise.coins(2).numpy()
    w = 1.5 * (6 / 1.5) ** u - 1
    m = (noise.coins(3) < 0.5).numpy()
    dropped = ((noise.coins(4) < 0.1) & source).numpy()
    assert 0 < decode.sum() < num and 0 < m.sum() < num and 0.5 <= w.min() and w.max() <= 5
    if source:
        assert 0 < dropped.sum() < num
    tau = quantile(noise.strata, -1.5, 0.8)
    p = quantile(noise.uniforms(LENGTH), 0.8, 0.8)
    table = objective.encoder.table.double().numpy()
    table = (table - table.mean(0)) / table.std(0)
    given, scored = batch.condition.numpy(), batch.loss_mask.numpy()
    x = table[batch.tokens.numpy()] * (given | scored)[..., None] * ~(given & dropped[:, None])[..., None]
    eps = noise.normals(LENGTH, DIM).double().numpy()
    share = np.where(decode[:, None], p, tau[:, None])[..., None]
    z = share * x + (1 - share) * np.where(decode, 5.0, 2.0)[:, None, None] * eps
    z = np.where(given[..., None], x, z)

    def call(shown):
        to = torch.from_numpy
        told = to(np.where(decode, 1, tau)), to(w), to(decode), batch.loss_mask | batch.condition
        with torch.no_grad():
            says = objective.network(to(z).float(), to(shown).float(), *told)
        return says.latents.double().numpy(), says.logits.detach().double().numpy()

    nothing = np.where(given[..., None], x, 0.0)
    x_u = np.where(given[..., None], x, call(nothing)[0])
    x_c = call(x_u)[0]
    shown = np.where(m[:, None, None], x_u, nothing) * ~decode[:, None, None]
    latents, logits = call(shown)
    c = np.maximum(1 - tau, 0.05)[:, None, None]
    v, v_u, v_c, v_target = ((each - z) / c for each in (latents, x_u, x_c, x))
    target = v_target + (m * (1 - 1 / w))[:, None, None] * (v_c - v_u)
    denoise = ((v - target) ** 2).mean(-1) * ~decode[:, None]
    right = np.take_along_axis(logits, batch.tokens.numpy()[..., None], -1)[..., 0]
    nats = (np.log(np.exp(logits).sum(-1)) - right) * decode[:, None]

    assert int(loss.count) == scored.sum()
    assert float(loss.terms["denoise_loss"]) == pytest.approx((denoise * scored).sum(), rel=1e-6)
    assert float(loss.terms["decode_loss"]) == pytest.approx((nats * scored).sum(), rel=1e-6)
    assert float(loss.total.detach()) == pytest.approx(((denoise + nats) * scored).sum(), rel=1e-6)
    # Braid's time: 0 is clean, and that is where decoding happens
    np.testing.assert_allclose(corrupted.times.numpy(), np.where(decode, 0, 1 - tau), rtol=1e-12)
    assert float(loss.bucket_sums.sum()) == pytest.approx(float(loss.total.detach()), rel=1e-6)


def test_the_branch_is_drawn_for_each_sequence():
    """Keyed by ordinal: no two ranks go in lockstep, and a fifth decodes."""
    objective, num = build_elf(), 4000
    noise = training_noise(num)
    decode = objective.corrupt(rows(num), noise).decode
    assert abs(float(decode.double().mean()) - 0.2) < 5 * math.sqrt(0.16 / num)
    ranks = decode.view(4, -1).T.double()
    correlations = torch.corrcoef(ranks.T)[~torch.eye(4, dtype=torch.bool)]
    assert float(correlations.abs().max()) < 5 / math.sqrt(num / 4)


@pytest.mark.parametrize("source", [False, True], ids=["text", "pairs"])
def test_corrupt_is_a_pure_function_of_the_key(source):
    objective, batch, noise = build_elf(), rows(source=source, padding=True), training_noise()
    whole = objective.corrupt(batch, noise)
    for which in ([3], [6, 1], [7, 6, 5, 4, 3, 2, 1, 0]):
        some = objective.corrupt(*part(batch, noise, torch.tensor(which)))
        for name in vars(whole):
            if name not in ("dropout", "estimates", "segments"):
                assert torch.equal(getattr(whole, name)[which], getattr(some, name)), name


def test_micro_batches_add_up():
    objective, batch, noise = build_elf(), rows(16, padding=True), training_noise(16)

    def gradients(pieces):
        objective.zero_grad()
        losses = []
        for piece in pieces:
            corrupted = objective.corrupt(*piece)
            losses.append(objective.loss(objective.predict(corrupted), corrupted))
            losses[-1].total.backward()
        return losses, {name: p.grad.clone() for name, p in objective.named_parameters()}

    (whole,), one = gradients([(batch, noise)])
    split, many = gradients([part(batch, noise, torch.arange(k, k + 2)) for k in range(0, 16, 2)])
    assert sum(int(loss.count) for loss in split) == int(whole.count) == 16 * (LENGTH - 2)
    for name, value in whole.terms.items():
        assert sum(float(loss.terms[name]) for loss in split) == pytest.approx(float(value), rel=1e-5)
    for name in one:
        assert torch.allclose(one[name], many[name], rtol=1e-3, atol=1e-4), name


def test_three_calls_of_which_one_has_a_gradient():
    """What each pass is shown: nothing, the first estimate, and that or nothing; a source always; a decoder nothing."""
    objective, batch, noise = build_elf(paired=True), rows(32, source=True), training_noise(32)
    objective.network = Recorder(objective.network)
    corrupted = objective.corrupt(batch, noise)
    prediction = objective.predict(corrupted)
    first, second, main = objective.network.calls
    assert objective.extra_forward_passes == 2
    assert [call["gradient"] for call in (first, second, main)] == [False, False, True]
    assert [call["heads"] for call in (first, second, main)] == [("denoise",)] * 2 + [("denoise", "decode")]
    for call in (first, second, main):
        for name, value in (("z", corrupted.latents), ("tau", corrupted.flow_times), ("decode", corrupted.decode)):
            assert torch.equal(call[name], value)
        assert torch.equal(call["guidance"], corrupted.guidance) and bool(call["valid"].all())
    assert torch.all(corrupted.flow_times[corrupted.decode] == 1) and torch.all(corrupted.times[corrupted.decode] == 0)

    target = slice(SOURCE.stop, None)
    source = corrupted.clean[:, SOURCE]
    assert torch.all(first["shown"][:, target] == 0)
    assert torch.equal(second["shown"][:, target], first["latents"][:, target])
    for call in (first, second):
        assert torch.equal(call["shown"][:, SOURCE], source) and torch.equal(call["z"][:, SOURCE], source)
    decode, shown = corrupted.decode, corrupted.self_conditioned & ~corrupted.decode
    assert torch.all(main["shown"][decode] == 0)
    assert torch.equal(main["shown"][shown], second["shown"][shown])
    assert torch.equal(main["shown"][~shown & ~decode], first["shown"][~shown & ~decode])
    assert not prediction.target.requires_grad
    assert prediction.latents.requires_grad and prediction.tokens.whole.requires_grad


def test_no_guidance_at_scale_one():
    """With w = 1 the target is the clean latent, and its velocity the true one, exactly; with others it is not."""
    batch, noise = rows(32), training_noise(32)
    plain = build_elf(guidance_min=1.0, guidance_max=1.0)
    corrupted = plain.corrupt(batch, noise)
    target = plain.predict(corrupted).target
    assert torch.all(corrupted.guidance == 1) and bool(corrupted.self_conditioned.any())
    assert torch.equal(target, corrupted.clean)
    moved = (velocity(each, corrupted.latents, corrupted.flow_times, 0.05) for each in (target, corrupted.clean))
    assert torch.equal(*moved)
    guided = build_elf()
    corrupted = guided.corrupt(batch, noise)
    differs = (guided.predict(corrupted).target != corrupted.clean).any(-1).any(-1)
    assert torch.equal(differs, corrupted.self_conditioned)


def test_a_dropped_source_leaves_nothing_behind():
    objective = build_elf(paired=True, condition_dropout=0.5)
    batch, noise = rows(32, source=True), training_noise(32)
    objective.network = Recorder(objective.network)
    corrupted = objective.corrupt(batch, noise)
    objective.predict(corrupted)
    dropped = noise.coins(4) < 0.5
    assert 0 < int(dropped.sum()) < 32
    for call in objective.network.calls:
        for name in ("z", "shown"):
            assert torch.all(call[name][dropped][:, SOURCE] == 0)
    assert torch.all(corrupted.latents[~dropped][:, SOURCE].abs().sum(-1) > 0)


@pytest.mark.parametrize("source", [False, True], ids=["text", "pairs"])
def test_padding_does_not_matter(source):
    """Neither its tokens nor its latents change a loss, a gradient or a figure."""
    objective, batch, noise = build_elf(), rows(16, source=source, padding=True), training_noise(16)
    other = batch.tokens.clone()
    other[:, PADDING] = (other[:, PADDING] + 5) % MASK
    values = []
    for tokens, filling in ((batch.tokens, 0.0), (other, 50.0)):
        objective.zero_grad()
        given = replace(batch, tokens=tokens)
        corrupted = objective.corrupt(given, noise)
        corrupted = replace(corrupted, latents=corrupted.latents.masked_fill(~corrupted.valid[..., None], filling))
        loss = objective.loss(objective.predict(corrupted), corrupted)
        loss.total.backward()
        gradient = torch.cat([p.grad.flatten() for p in objective.parameters()])
        with torch.no_grad():
            values.append((loss.total.detach(), gradient, *objective.evaluate(given, noise).values()))
    for one, two in zip(*values, strict=True):
        assert torch.equal(one, two)


def test_the_first_loss_of_a_new_network():
    """The denoise head starts at 0: the error is the clean latent itself, with no direction of guidance yet."""
    objective, batch, noise = build_elf(randomise=False), rows(64), training_noise(64)
    corrupted = objective.corrupt(batch, noise)
    loss = objective.loss(objective.predict(corrupted), corrupted)
    weight = 1 / (1 - corrupted.flow_times.double()).clamp(min=0.05) ** 2 * ~corrupted.decode
    expected = (weight[:, None] * corrupted.clean.double().square().mean(-1)).sum()
    assert float(loss.terms["denoise_loss"]) == pytest.approx(float(expected), rel=1e-6)


# -- figures -------------------------------------------------------------------------------------------------------


def evaluation_noise(num: int) -> Noise:
    return Noise.evaluation(7, torch.arange(num), 0, 1)


def test_no_figure_is_called_a_bound():
    figures = build_elf().figures
    assert {figure.unit for figure in figures} == {"value"} and not any(figure.is_bound for figure in figures)
    assert all("has no likelihood" in figure.note for figure in figures if "accuracy" not in figure.name)


@pytest.mark.parametrize("source", [False, True], ids=["text", "pairs"])
def test_figures_are_what_they_say(source):
    """Recomputed in float64 from what the network was asked and said."""
    objective, batch, noise = build_elf(paired=source), rows(16, source=source, padding=True), evaluation_noise(16)
    objective.network = Recorder(objective.network)
    with torch.no_grad():
        figures = objective.evaluate(batch, noise)
    assert list(figures) == [figure.name for figure in objective.figures]
    first, second, noisy, clean = objective.network.calls
    x, scored = objective.text.encode(batch.tokens, batch.loss_mask | batch.condition), batch.loss_mask
    for call in objective.network.calls:
        assert torch.all(call["guidance"] == 1)
        if source:  # a source is never noised, and never left out
            assert torch.equal(call["z"][:, SOURCE], x[:, SOURCE])
    target = slice(SOURCE.stop if source else 0, None)
    assert torch.all(first["shown"][:, target] == 0)
    assert torch.equal(second["shown"][:, target], first["latents"][:, target])
    tau = torch.from_numpy(quantile(noise.strata, -1.5, 0.8))
    assert torch.allclose(second["tau"], tau, rtol=1e-12) and not second["decode"].any()
    error = (second["latents"].double() - x).square().mean(-1) * scored
    assert torch.allclose(figures["latent_mse"], error.sum(1), rtol=1e-6)
    assert torch.allclose(figures["velocity_mse"], (error / (1 - tau).clamp(min=0.05)[:, None] ** 2).sum(1), rtol=1e-6)

    share = torch.from_numpy(quantile(noise.uniforms(LENGTH), 0.8, 0.8))[..., None]
    eps = noise.normals(LENGTH, DIM)
    expected = {"": (share * x + (1 - share) * 5 * eps).float(), "_clean": x}
    for call, name in ((noisy, ""), (clean, "_clean")):
        assert bool(call["decode"].all()) and torch.all(call["tau"] == 1) and torch.all(call["shown"] == 0)
        torch.testing.assert_close(call["z"][scored], expected[name][scored], rtol=1e-5, atol=1e-5)
        nats = -call["logits"].double().log_softmax(-1).gather(-1, batch.tokens[..., None])[..., 0] * scored
        right = (call["logits"].argmax(-1) == batch.tokens) & scored
        assert torch.allclose(figures[f"decode_loss{name}"], nats.sum(1), rtol=1e-6)
        assert torch.equal(figures[f"decode_accuracy{name}"], right.double().sum(1))
    assert set(figures["decode_accuracy"].tolist()) != {0.0}


def test_schedule_curves_are_braids_times():
    """t = 1 is noise; the density of the training times integrates to 1 and peaks where they lie."""
    times = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    curves = build_elf().schedule_curves(times)
    assert float(curves["noise"][-1]) == 2 and float(curves["share of clean latent"][-1]) == 0
    density = curves["density of training times"]
    assert bool(density.isfinite().all()) and max(float(density[0]), float(density[-1])) < 1e-12
    assert float(torch.trapezoid(density, times)) == pytest.approx(1, abs=1e-6)
    drawn = 1 - torch.from_numpy(quantile((torch.arange(1000) + 0.5) / 1000, -1.5, 0.8))
    assert float(torch.trapezoid(density * times, times)) == pytest.approx(float(drawn.mean()), abs=1e-3)
    assert float(curves["weight of the latent error"].max()) == pytest.approx(400)


@pytest.mark.slow
def test_the_decode_head_learns_the_clean_latents():
    """Training as it is, on random text: cross-entropy on clean latents goes to 0, accuracy to 1."""
    objective = build_elf(randomise=False, decode_probability=0.8, decode_noise_scale=0.3)
    optimizer, num_steps = torch.optim.AdamW(objective.parameters()), 250
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / num_steps)
        batch = rows(32, seed=step)
        noise = Noise.training(3, 32 * step, 32, batch.ordinals + 32 * step)
        corrupted = objective.corrupt(batch, noise)
        loss = objective.loss(objective.predict(corrupted), corrupted)
        optimizer.zero_grad()
        (loss.total / loss.count).backward()
        optimizer.step()
    with torch.no_grad():
        batch = rows(64, seed=-1)
        figures = objective.evaluate(batch, evaluation_noise(64))
    per_token = {name: float(value.sum()) / (64 * LENGTH) for name, value in figures.items()}
    assert per_token["decode_loss_clean"] < 0.01 < math.log(VOCAB)
    assert per_token["decode_accuracy_clean"] > 0.99
    assert per_token["decode_accuracy_clean"] >= per_token["decode_accuracy"] > 2 / VOCAB
    assert per_token["latent_mse"] < 1  # better than saying nothing
