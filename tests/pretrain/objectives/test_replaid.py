"""RePlaid's training loss and its gradients against a second implementation, and who learns from what."""

from dataclasses import replace

import pytest
import torch

from braid.data_pipeline.loader import Batch
from braid.kernels import linear_loss
from braid.parallel.vocabulary import Vocabulary
from braid.pretrain.config.schema import ModelConfig, OptimizerConfig
from braid.pretrain.objectives import replaid as module
from braid.pretrain.objectives.base import Noise
from braid.pretrain.training.optimizer import build_optimizer

from .conftest import LENGTH, MASK, VOCAB, batch_and_noise
from .replaid_reference import build_replaid, gradients, reference, run, with_split

SIZE = 8


def compare(objective, batch, noise, num: int, kappa: float = 1.0):
    """(what the objective says, the reference)."""
    chosen = objective._self_conditioned(noise)[0].tolist()
    loss, terms = run(objective, batch, noise)
    return loss, terms, reference(objective, batch, noise, num_reconstructed=num, conditioned=chosen, kappa=kappa)


@pytest.mark.parametrize("num", [1, 3, 7])
def test_the_loss_is_the_bound(num):
    """Prior, mean over the reconstructed and mean over the others, to 1e-6."""
    objective = with_split(build_replaid(), num, SIZE)
    loss, terms, expected = compare(objective, *batch_and_noise(SIZE), num)
    assert loss == pytest.approx(expected.nelbo.item(), rel=1e-6)
    for name in ("prior", "reconstruction", "diffusion"):
        mean = torch.stack(getattr(expected, name)).mean().item()
        assert float(terms.terms[name] / terms.count) == pytest.approx(mean, rel=1e-6), name
    assert sum(map(float, terms.terms.values())) == pytest.approx(float(terms.total.detach()), rel=1e-12)


def test_padding_does_not_count():
    """Rows end in padding: means are over what is scored, and what is not scored costs nothing."""
    objective = with_split(build_replaid(), 3, SIZE)
    batch, noise = batch_and_noise(SIZE, padding=4)
    loss, _, expected = compare(objective, batch, noise, 3)
    assert loss == pytest.approx(expected.nelbo.item(), rel=1e-6)


def test_the_gradient_is_that_of_the_bound_except_in_the_interior():
    """Network, embeddings and endpoints follow the bound. Reference: autograd through the second implementation."""
    objective = with_split(build_replaid(), 3, SIZE)
    _, _, expected = compare(objective, *batch_and_noise(SIZE), 3)
    names = [name for name, _ in objective.named_parameters() if "interior" not in name]
    wanted = torch.autograd.grad(expected.nelbo, [objective.get_parameter(name) for name in names])
    ours = gradients(objective, "")
    for name, gradient in zip(names, wanted, strict=True):
        scale = float(gradient.abs().max())
        assert scale > 0, name
        assert torch.allclose(ours[name], gradient.double(), rtol=1e-4, atol=1e-4 * scale), name


@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_the_interior_follows_the_mean_square_of_the_loss(checkpointing):
    """d/dphi (1/B_d) sum ell_i^2 by autograd without hooks; with s.c. rows constant."""
    model = ModelConfig(width=32, num_layers=2, num_heads=2, cond_dim=16, activation_checkpointing=checkpointing)
    objective = with_split(build_replaid(model=model), 3, SIZE)
    _, _, expected = compare(objective, *batch_and_noise(SIZE), 3)
    interior = dict(objective.schedule.interior.named_parameters())
    mean_square = torch.stack(expected.diffusion).square().mean()
    wanted = torch.autograd.grad(mean_square, interior.values(), retain_graph=True)
    plain = torch.autograd.grad(expected.nelbo, interior.values())
    for (name, parameter), square, other in zip(interior.items(), wanted, plain, strict=True):
        scale = float(square.abs().max())
        assert torch.allclose(parameter.grad, square, rtol=1e-4, atol=1e-4 * scale), name
        assert not torch.allclose(parameter.grad, other, rtol=0.1, atol=0.1 * scale), name


def test_an_auxiliary_term_joins_the_loss_and_what_the_interior_squares():
    objective = with_split(build_replaid(auxiliary_weight=0.3), 3, SIZE)
    loss, terms, expected = compare(objective, *batch_and_noise(SIZE), 3)
    entropy = torch.stack(expected.cross_entropy)
    assert loss == pytest.approx((expected.nelbo + 0.3 * entropy.mean()).item(), rel=1e-6)
    assert float(terms.terms["auxiliary"] / terms.count) == pytest.approx(0.3 * entropy.mean().item(), rel=1e-6)
    squares = (torch.stack(expected.diffusion) + 0.3 * entropy).square().mean()
    parameter = objective.schedule.interior.bias
    (wanted,) = torch.autograd.grad(squares, parameter)
    assert torch.allclose(parameter.grad, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_from_self_conditioned_sequences_the_network_alone_learns(monkeypatch):
    """Exactly nothing reaches schedule and embeddings, not even through the input, the output prior or z_1."""
    monkeypatch.setattr(module, "SELF_CONDITIONED_EVERY", 1)
    objective = with_split(build_replaid(), 3, SIZE)
    run(objective, *batch_and_noise(SIZE))
    for name, parameter in objective.named_parameters():
        learns = name.startswith("network.") and "embedding.raw" not in name
        grad = torch.zeros(()) if parameter.grad is None else parameter.grad
        assert (grad.abs().max() > 0) == learns, name


def test_self_conditioned_rows_of_a_mixed_batch_add_nothing_to_the_embeddings():
    """Change the noise of those rows alone: the embeddings' and the schedule's gradients stay, the network's do not."""
    objective = with_split(build_replaid(), 3, SIZE)
    batch, noise = batch_and_noise(SIZE)
    chosen = objective._self_conditioned(noise)[0]
    assert 0 < int(chosen.sum()) < SIZE
    before, after = [], []
    for seen, tokens in (
        (before, batch.tokens),
        (after, torch.where(chosen[:, None], (batch.tokens + 3) % MASK, batch.tokens)),
    ):
        run(objective, Batch(tokens, batch.loss_mask, batch.ordinals), noise)
        seen += [gradients(objective, prefix) for prefix in ("network.embedding", "schedule.", "network.blocks")]
    for one, other in zip(before[:2], after[:2], strict=True):
        assert all(torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-6) for name in one)
    assert not any(torch.allclose(before[2][name], after[2][name], rtol=1e-2) for name in before[2])


def test_a_quarter_is_self_conditioned_and_every_sequence_has_its_turn():
    objective = build_replaid()
    batch, noise = batch_and_noise(64)
    shares, ever = [], torch.zeros(64, dtype=torch.bool)
    for step in range(40):
        objective.begin_step(step, 100)
        chosen, rows = objective._self_conditioned(noise)
        shares.append(float(chosen.double().mean()))
        assert len(rows) == 16 and set(rows.tolist()) == set(chosen.nonzero()[:, 0].tolist())
        ever |= chosen
    assert shares == [0.25] * 40 and ever.all()


@pytest.mark.parametrize("num", [1, 6, 32])
def test_both_kinds_of_sequences_have_an_even_grid_of_times(num):
    """Of the sequences that diffuse, every fourth stratum is the self-conditioned ones'."""
    objective = with_split(build_replaid(), num, 64)
    batch, _ = batch_and_noise(64)
    noise = Noise.training(7, 0, 64, batch.ordinals, objective.time_groups)
    for step in range(4):
        objective.begin_step(step, 100)
        corrupted = objective.corrupt(batch, noise)
        chosen, diffuses = corrupted.self_conditioned, corrupted.times > 0
        for some, gaps in ((chosen, {4}), (~chosen, {1, 2})):
            strata = (corrupted.times[some & diffuses] * (64 - num)).floor().long().sort().values
            assert set(strata.diff().tolist()) == gaps
    assert objective.time_groups == 4 and build_replaid(self_conditioning=False).time_groups == 1


def test_without_self_conditioning_there_is_one_call_and_no_constant_row():
    objective = with_split(build_replaid(self_conditioning=False), 3, SIZE)
    calls = []
    objective.network.register_forward_hook(lambda *_: calls.append(1))
    loss, _, expected = compare(objective, *batch_and_noise(SIZE), 3)
    assert objective.extra_forward_passes == 0 and build_replaid().extra_forward_passes == 0.25
    assert len(calls) == 1 + SIZE  # the reference's own
    assert loss == pytest.approx(expected.nelbo.item(), rel=1e-6)


@pytest.mark.parametrize("step, kappa", [(0, 0.0), (1000, 0.2), (5000, 1.0), (90_000, 1.0)])
def test_the_output_prior_warms_up(step, kappa):
    objective = with_split(build_replaid(), 3, SIZE)
    objective.begin_step(step, 100_000)
    loss, _, expected = compare(objective, *batch_and_noise(SIZE), 3, kappa=kappa)
    assert loss == pytest.approx(expected.nelbo.item(), rel=1e-6)
    objective.eval()
    assert objective.output_prior_strength == 1


def test_the_warm_up_of_a_short_run_is_a_twentieth_of_it():
    objective = build_replaid()
    strengths = []
    for step in (0, 5, 10, 11):
        objective.begin_step(step, 200)
        strengths.append(objective.output_prior_strength)
    assert strengths == [0, 0.5, 1, 1]


def test_without_the_output_prior_the_network_has_the_only_word():
    objective = with_split(build_replaid(output_prior=False), 3, SIZE)
    loss, _, expected = compare(objective, *batch_and_noise(SIZE), 3, kappa=0.0)
    assert loss == pytest.approx(expected.nelbo.item(), rel=1e-6)


def test_frozen_parts_take_no_gradient_and_no_place_in_the_optimizer():
    objective = with_split(build_replaid(gamma_schedule="frozen", fixed_embeddings=True), 3, SIZE)
    loss, _, expected = compare(objective, *batch_and_noise(SIZE), 3)
    assert loss == pytest.approx(expected.nelbo.item(), rel=1e-6)
    assert objective.parameter_rates() == {}
    assert objective.network.embedding.raw.grad is None
    assert all(parameter.grad is None for parameter in objective.schedule.parameters())


def test_embeddings_schedule_and_endpoints_have_their_own_rates_and_no_decay():
    objective = build_replaid(embedding_lr=0.04, schedule_lr=0.05, bounds_lr=0.06)
    optimizer = build_optimizer(objective, OptimizerConfig(lr=1e-3, weight_decay=0.1))
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    found = {name: rates[id(parameter)] for name, parameter in objective.named_parameters()}
    assert found["network.embedding.raw"] == (0.04, 0)
    assert {found[f"schedule.interior.{name}"] for name in ("input", "bias", "output")} == {(0.05, 0)}
    assert found["schedule.gamma_0"] == found["schedule.gamma_1"] == (0.06, 0)
    assert found["network.input.weight"] == found["network.blocks.0.mlp.input.weight"] == (1e-3, 0.1)


def test_given_tokens_enter_clean_and_are_not_scored():
    """The source of a pair: its embedding, scaled to unit variance, whatever the noise; its tokens matter elsewhere."""
    objective = with_split(build_replaid(), 3, SIZE)
    batch, noise = batch_and_noise(SIZE)
    condition = torch.zeros_like(batch.loss_mask)
    condition[:, :4] = True
    batch = Batch(batch.tokens, ~condition, batch.ordinals, condition)
    loss, terms, expected = compare(objective, batch, noise, 3)
    assert loss == pytest.approx(expected.nelbo.item(), rel=1e-6)
    assert int(terms.count) == SIZE * (LENGTH - 4)
    seen = []
    objective.network.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    objective.predict(objective.corrupt(batch, noise))
    assert torch.allclose(seen[-1][:, :4].square().mean(-1), torch.ones(SIZE, 4), atol=1e-5)
    other_noise = replace(noise, key=noise.key + 1)
    objective.predict(objective.corrupt(batch, other_noise))
    assert torch.equal(seen[-1][:, :4], seen[-3][:, :4]) and not torch.equal(seen[-1], seen[-3])


def test_the_mask_is_no_token():
    objective = build_replaid()
    batch, noise = batch_and_noise(SIZE)
    corrupted = objective.corrupt(batch, noise)
    logits = objective.predict(corrupted).logits
    assert logits.shape == (SIZE, LENGTH, VOCAB)
    assert torch.isneginf(logits[..., MASK]).all() and torch.isfinite(logits[..., :MASK]).all()
    run(objective, batch, noise)
    assert (objective.network.embedding.raw.grad[MASK] == 0).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in objective.parameters())


def in_chunks_of(num_rows: int, monkeypatch, **options):
    """Loss, losses of rows, bound, gradients, and how many rows of logits there ever were at a time."""
    seen, without = [], Vocabulary.without_
    with monkeypatch.context() as patched:
        patched.setattr(linear_loss, "CHUNK_LOGITS", num_rows * 64)
        patched.setattr(Vocabulary, "without_", lambda *args: seen.append(len(args[1])) or without(*args))
        objective = with_split(build_replaid(**options), 3, SIZE)
        loss, terms = run(objective, *batch_and_noise(SIZE, padding=2))
        with torch.no_grad():
            bound = objective.evaluate(*batch_and_noise(SIZE))["bound"]
    learnt = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    return loss, terms.row_losses, bound, learnt, max(seen)


@pytest.mark.parametrize("num_rows", [1, 7])
@pytest.mark.parametrize("options", [{}, {"auxiliary_weight": 0.3}, {"output_prior": False, "fixed_embeddings": True}])
def test_logits_are_made_a_chunk_at_a_time(monkeypatch, num_rows, options):
    """Loss and gradients are those of all logits at once, in training and in the bound."""
    loss, row_losses, bound, gradients_at_once, most = in_chunks_of(10**6, monkeypatch, **options)
    again, rows_again, bound_again, in_chunks, most_again = in_chunks_of(num_rows, monkeypatch, **options)
    assert (most, most_again) == (SIZE * LENGTH, num_rows)
    assert again == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(rows_again, row_losses, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bound_again, bound, rtol=1e-6, atol=1e-6)
    assert in_chunks.keys() == gradients_at_once.keys()
    for name, gradient in gradients_at_once.items():
        assert (in_chunks[name] - gradient).abs().max() <= 5e-6 * max(gradient.abs().max(), 1e-3), name


def test_time_can_be_fed_instead_of_gamma():
    levels = {}
    for kind in ("gamma", "time"):
        objective = build_replaid(time_input=kind)
        objective.network.register_forward_pre_hook(lambda _, args, kind=kind: levels.update({kind: args[2].detach()}))
        corrupted = objective.corrupt(*batch_and_noise(SIZE))
        objective.predict(corrupted)
        assert torch.equal(levels[kind], getattr(corrupted, "gamma" if kind == "gamma" else "times"))


def test_loss_by_time_is_the_diffusion_loss():
    """Buckets hold the diffusion loss of the sequences at those times, unscaled; reconstruction is not among them."""
    objective = with_split(build_replaid(), 3, SIZE)
    _, terms, expected = compare(objective, *batch_and_noise(SIZE), 3)
    sums, counts = torch.zeros(10, dtype=torch.float64), torch.zeros(10, dtype=torch.float64)
    for time, loss in zip(expected.times, expected.diffusion, strict=True):
        sums[int(10 * time)] += LENGTH * loss.item()
        counts[int(10 * time)] += LENGTH
    assert torch.allclose(terms.bucket_sums, sums, rtol=1e-5) and torch.equal(terms.bucket_counts, counts)


def test_curves_of_the_schedule():
    curves = build_replaid().schedule_curves(torch.linspace(0, 1, 5, dtype=torch.float64))
    assert set(curves) == {"gamma", "alpha", "sigma"}
    assert curves["gamma"][0] == -3 and curves["gamma"][-1] == 6
    assert torch.allclose(curves["alpha"].square() + curves["sigma"].square(), torch.ones(5, dtype=torch.float64))
