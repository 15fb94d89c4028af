"""The split of RePlaid's batch between two terms, and what must not depend on how a global batch is cut."""

import math

import pytest
import torch

from braid.data_pipeline.loader import Batch
from braid.data_pipeline.tokenizers import load_tokenizer
from braid.pretrain.config.load import load_config
from braid.pretrain.config.schema import ModelConfig
from braid.pretrain.config.validate import problems
from braid.pretrain.objectives.base import Noise
from braid.pretrain.objectives.build import build_objective
from braid.pretrain.objectives.replaid_terms import BatchSplit

from .conftest import batch_and_noise, rows
from .replaid_reference import build_replaid, gradients, with_split

SIZE = 16
DECAY = 0.997


def part(batch: Batch, which: slice) -> Batch:
    return Batch(batch.tokens[which], batch.loss_mask[which], batch.ordinals[which], batch.condition[which])


@pytest.mark.parametrize("micro_batch_size", [1, 2, 6, 8])
def test_a_global_batch_gives_the_same_however_it_is_cut(micro_batch_size):
    """One micro-batch of 16 against micro-batches (or ranks) of other sizes: the noised sequences bit for bit; loss,
    gradients and statistics as sums."""
    objective = with_split(build_replaid(), 5, SIZE)
    batch, noise = batch_and_noise(SIZE)
    whole = objective.corrupt(batch, noise)
    objective.zero_grad()
    wanted = objective.loss(objective.predict(whole), whole)
    wanted.total.backward()
    wanted_gradients = gradients(objective, "")

    objective.zero_grad()
    found = []
    for start in range(0, SIZE, micro_batch_size):
        which = slice(start, start + micro_batch_size)
        corrupted = objective.corrupt(part(batch, which), rows(noise, which))
        for name in ("z", "clean", "times", "gamma", "gamma_rate", "gamma_1", "row_weight", "self_conditioned"):
            assert torch.equal(getattr(corrupted, name), getattr(whole, name)[which]), name
        found.append(objective.loss(objective.predict(corrupted), corrupted))
        found[-1].total.backward()
    assert sum(terms.total for terms in found).item() == pytest.approx(wanted.total.item(), rel=1e-6)
    for name, value in wanted.terms.items():
        assert float(sum(terms.terms[name] for terms in found)) == pytest.approx(float(value), rel=1e-6), name
    statistics = sum(terms.statistics["split"] for terms in found)
    assert torch.allclose(statistics, wanted.statistics["split"], rtol=1e-6)
    assert torch.allclose(sum(terms.bucket_sums for terms in found), wanted.bucket_sums, rtol=1e-6)
    for name, value in gradients(objective, "").items():
        scale = float(wanted_gradients[name].abs().max())
        assert torch.allclose(value, wanted_gradients[name], rtol=1e-4, atol=2e-5 * scale), name


@pytest.mark.parametrize("num", [1, 5, 15])
def test_the_split_of_a_batch(num):
    """`num` sequences at t = 0, the others on an even grid of (0, 1) with one shift, all weighted to means."""
    objective = with_split(build_replaid(), num, SIZE)
    batch, noise = batch_and_noise(SIZE)
    corrupted = objective.corrupt(batch, noise)
    assert int(corrupted.reconstructs.sum()) == num
    others = corrupted.times[~corrupted.reconstructs].sort().values * (SIZE - num)
    shift = float(noise.shift[0])
    assert torch.allclose(others, torch.arange(SIZE - num).double() + shift, rtol=1e-12) and 0 < shift < 1
    assert torch.allclose(corrupted.gamma[corrupted.reconstructs], objective.schedule.gamma_0.double(), rtol=1e-15)
    weights = corrupted.row_weight
    assert torch.allclose(weights[corrupted.reconstructs], torch.tensor(SIZE / num, dtype=torch.float64))
    assert float(weights[~corrupted.reconstructs].sum()) == pytest.approx(SIZE)


def test_the_split_follows_the_deviations_of_both_losses():
    """Bias-corrected running moments, with Python floats; before the first step, and clipped at both ends."""
    split, generator = BatchSplit(), torch.Generator().manual_seed(0)
    assert float(split.num_reconstructed(100)) == 1
    history: list[tuple[list[float], list[float]]] = []
    for step in range(1, 6):
        losses = torch.rand(20, generator=generator, dtype=torch.float64) * torch.where(torch.arange(20) < 8, 3.0, 1.0)
        reconstructs = torch.arange(20) < 8
        split.update(split.statistics(losses, reconstructs))
        history.append((losses[:8].tolist(), losses[8:].tolist()))
        deviations = []
        for kind in (0, 1):
            weights = [(1 - DECAY) * DECAY ** (step - 1 - i) for i in range(step)]
            moments = [
                sum(
                    w * sum(x**power for x in batch[kind]) / len(batch[kind])
                    for w, batch in zip(weights, history, strict=True)
                )
                / sum(weights)
                for power in (1, 2)
            ]
            deviations.append(math.sqrt(moments[1] - moments[0] ** 2))
        assert float(split.num_reconstructed(100)) == round(100 * deviations[0] / sum(deviations))
    split.moments.copy_(torch.tensor([[1.0, 1.0], [1.0, 5.0]]) * split.weight)
    assert float(split.num_reconstructed(100)) == 1
    split.moments.copy_(torch.tensor([[1.0, 5.0], [1.0, 1.0]]) * split.weight)
    assert float(split.num_reconstructed(100)) == 99


def test_the_state_is_updated_and_saved():
    """A step's statistics change the next split; the running moments travel with the weights."""
    objective = build_replaid()
    batch, noise = batch_and_noise(64)
    corrupted = objective.corrupt(batch, noise)
    assert int(corrupted.reconstructs.sum()) == 1
    terms = objective.loss(objective.predict(corrupted), corrupted)
    assert terms.statistics["split"][:, 0].tolist() == [1, 63]
    spread = torch.tensor([[20.0, 20.0, 80.0], [44.0, 44.0, 60.0]], dtype=torch.float64)
    objective.update_state({"split": spread})
    num = int(objective.corrupt(batch, noise).reconstructs.sum())
    assert num == round(64 * math.sqrt(3) / (math.sqrt(3) + math.sqrt(16 / 44)))
    other = build_replaid()
    other.load_state_dict(objective.state_dict())
    assert int(other.corrupt(batch, noise).reconstructs.sum()) == num


def test_statistics_are_of_losses_per_token():
    """Mean per scored token of a sequence: reconstruction where t = 0, diffusion elsewhere, without batch weights."""
    objective = with_split(build_replaid(), 5, SIZE)
    batch, noise = batch_and_noise(SIZE, padding=3)
    corrupted = objective.corrupt(batch, noise)
    terms = objective.loss(objective.predict(corrupted), corrupted)
    (num, total, _), (_, other, _) = terms.statistics["split"].tolist()
    assert num == 5
    assert total / 5 == pytest.approx(float(terms.terms["reconstruction"] / terms.count), rel=1e-12)
    assert other / 11 == pytest.approx(float(terms.terms["diffusion"] / terms.count), rel=1e-12)


def evaluate(objective, size: int = SIZE, draws: int = 4):
    """Mean over draws of every figure, [B]."""
    batch, _ = batch_and_noise(size, purpose="validation")
    objective.eval()
    with torch.no_grad():
        found = [objective.evaluate(batch, Noise.evaluation(9, batch.ordinals, draw, draws)) for draw in range(draws)]
    return {name: sum(each[name] for each in found) / draws for name in found[0]}


def test_the_figures_of_an_evaluation():
    """The bound is the sum of its terms; one figure is a bound; neither the split nor the warm-up touches any."""
    objective = build_replaid()
    figures = evaluate(objective)
    assert {figure.name for figure in objective.figures} == set(figures)
    assert [figure.name for figure in objective.figures if figure.is_bound] == ["bound"]
    assert all(figure.unit == "nats" for figure in objective.figures)
    assert torch.allclose(figures["bound"], figures["prior"] + figures["reconstruction"] + figures["diffusion"])
    assert figures["bound"].dtype == torch.float64 and (figures["diffusion"] > 0).all()
    objective.begin_step(0, 100_000)
    again = evaluate(with_split(objective, 9, SIZE))
    assert all(torch.equal(again[name], figures[name]) for name in figures)


def test_all_sequences_of_an_evaluation_are_self_conditioned():
    objective = build_replaid()
    calls = []
    objective.network.register_forward_pre_hook(lambda _, args: calls.append(args[1].abs().sum((1, 2))))
    evaluate(objective, draws=1)
    assert [bool((estimates > 0).all()) for estimates in calls] == [False, True, False, True]
    calls.clear()
    plain = build_replaid(self_conditioning=False)
    plain.network.register_forward_pre_hook(lambda _, args: calls.append(args[1].abs().sum()))
    evaluate(plain, draws=1)
    assert [float(each) for each in calls] == [0, 0]


def test_dropout_is_the_same_for_a_sequence_in_both_passes_and_absent_from_the_bound():
    model = ModelConfig(width=32, num_layers=2, num_heads=2, cond_dim=16, dropout=0.5)
    objective = with_split(build_replaid(model=model), 5, SIZE)
    batch, noise = batch_and_noise(SIZE)
    corrupted = objective.corrupt(batch, noise)
    assert torch.equal(objective.predict(corrupted).logits, objective.predict(corrupted).logits)
    keys = []
    objective.network.register_forward_pre_hook(lambda _, args: keys.append(args[3]))
    objective.predict(corrupted)
    assert torch.equal(keys[0].ordinals, batch.ordinals[corrupted.first_pass]) and keys[0].key == keys[1].key
    keys.clear()
    evaluate(objective, draws=1)
    assert keys == [None] * 4


@pytest.mark.parametrize(
    "overrides, said",
    [
        (["training.global_batch_size=1", "training.micro_batch_size=1"], "splits the global batch"),
        (["objective.gamma_0=7"], "must lie below"),
        (["objective.gamma_schedule=cosine"], "is not one of"),
        (["objective.gamma_schedule=frozen", "objective.schedule_lr=0.1"], "by objective.gamma_schedule = 'frozen'"),
        (["objective.gamma_schedule=linear", "objective.bounds_lr=0.1"], "by objective.gamma_schedule = 'linear'"),
        (["objective.fixed_embeddings=true", "objective.embedding_lr=0.1"], "is ignored by objective.fixed_embeddings"),
        (["objective.output_prior=false", "objective.output_prior_warmup_steps=9"], "by objective.output_prior = f"),
        (["objective.time_input=snr"], "is not one of"),
        (["objective.auxiliary_weight=-1"], "must be at least"),
        (["objective.embedding_dim=1"], "must be at least"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_meant(overrides, said):
    assert problems(load_config("tiny_replaid")) == []
    (problem,) = problems(load_config("tiny_replaid", overrides))
    assert said in problem.what


def test_built_from_a_recipe():
    """The tokenizer's vocabulary and ids, the seed's initial values, and whether sources will be shown clean."""
    tokenizer = load_tokenizer("bytes")
    for packing in ("wrap", "pairs"):
        config = load_config("tiny_replaid", [f"data.packing={packing}", "run.seed=5"])
        objective = build_objective(config, tokenizer, None, torch.device("cpu"))
        assert objective.given_clean == (packing == "pairs")
        assert objective.network.embedding().shape == (tokenizer.vocab_size, 16)
        assert (objective.mask_id, objective.bos_id) == (tokenizer.mask_id, tokenizer.bos_id)
    other = build_objective(load_config("tiny_replaid", ["run.seed=6"]), tokenizer, None, torch.device("cpu"))
    for name in ("network.embedding.raw", "schedule.interior.bias", "network.input.weight"):
        assert not torch.equal(other.get_parameter(name), objective.get_parameter(name))
