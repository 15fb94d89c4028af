"""ZeRO in every stage against plain torch on one process: gradients, norms, clipping, averages, and what goes wrong."""

from __future__ import annotations

import functools

import pytest
import torch
from deepspeed_bodies import (
    ADAMW,
    CLIP_NORM,
    MUON,
    InPieces,
    Trained,
    built,
    gathered_bytes,
    moved,
    poisoned,
    train,
    train_in_pieces,
)
from tensor_cases import CASES, build

from braid.parallel.data_parallel import World
from braid.parallel.plan import ParallelConfig
from braid.pretrain.config.schema import OptimizerConfig

TWICE = ["mdlm", "replaid-auxiliary", "elf", "co_ladd-learned"]
"""Recomputed blocks; two passes, and weights that are read outside their modules; three passes; learned tokens."""
REST = ["ar", "duo", "gidd", "ccdd-mdit", "ccdd-mmdit", "ccdd-moedit-1", "replaid", "co_ladd", "di_ladd-learned"]
PATIENCE_S = 300


def plan(zero: int, **fields) -> ParallelConfig:
    return ParallelConfig(engine="deepspeed", zero=zero, **fields)


@functools.cache
def expected(name: str, precision: str = "fp32", width: int = 32) -> Trained:
    [trained] = train(World.single(), [name], ParallelConfig(), 2, precision, width).values()
    assert min(trained.norms) > 2 * CLIP_NORM, "clipping must be at work"
    return trained


def assert_same(found: Trained, wanted: Trained, name: str) -> None:
    """Norms, the first step's gradient (Adam's first moment), weights and averages."""
    assert found.norms == pytest.approx(wanted.norms, rel=1e-5), name
    first, gradients = found.moments[0], wanted.moments[0]
    assert first.keys() == gradients.keys()
    for key, value in gradients.items():
        if key.endswith("/exp_avg"):
            bound = 1e-4 * value.abs().max().item() + 1e-9
            torch.testing.assert_close(first[key], value, rtol=0, atol=bound, msg=f"{name} {key}")
        if key.endswith("/step"):
            assert first[key] == value
    for kind in ("weights", "average", "averaged", "seen"):
        tensors, others = getattr(found, kind), getattr(wanted, kind)
        assert others.keys() <= tensors.keys()
        for key, value in others.items():
            # A gradient that is nearly nothing has a sign by chance, and Adam's step is as long as any other.
            assert (tensors[key] - value).abs().mean() < 2e-5, (name, kind, key)
            assert tensors[key].shape == value.shape


@pytest.mark.parametrize(
    ("num_ranks", "names", "fields"),
    [
        (3, TWICE, {}),
        pytest.param(3, sorted(CASES), {}, marks=pytest.mark.slow),
        pytest.param(2, TWICE, {"offload": "cpu"}, marks=pytest.mark.slow),
        pytest.param(4, TWICE, {"tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_model_built_in_shares_has_the_weights_of_one_process(ranks, num_ranks, names, fields):
    """To the bit, though no rank ever has more than a module whole."""
    for of_rank in ranks(built, num_ranks, names, plan(3, **fields), timeout_s=PATIENCE_S):
        for name, found in of_rank.items():
            wanted = dict(build(name, randomise=False).named_parameters())
            assert found.keys() == wanted.keys()
            assert all(torch.equal(found[key], value) for key, value in wanted.items()), name


@pytest.mark.parametrize(
    ("zero", "fields"),
    [
        pytest.param(0, {}, marks=pytest.mark.slow),
        (1, {}),
        (2, {}),
        (3, {}),
        pytest.param(1, {"offload": "cpu"}, marks=pytest.mark.slow),
        pytest.param(2, {"offload": "cpu"}, marks=pytest.mark.slow),
        (3, {"offload": "cpu"}),
        pytest.param(2, {"overlap": False}, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_train_as_one(ranks, zero, fields):
    for of_rank in ranks(train, 2, TWICE, plan(zero, **fields), timeout_s=PATIENCE_S):
        for name, found in of_rank.items():
            assert_same(found, expected(name), name)
            for kind in ("weights", "average"):  # what is saved is what a calculation with the module finds
                seen = found.seen if kind == "weights" else found.averaged
                assert all(torch.equal(seen[key], value) for key, value in getattr(found, kind).items())


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_every_system_on_two_ranks(ranks, zero):
    for of_rank in ranks(train, 2, REST, plan(zero), timeout_s=600):
        for name, found in of_rank.items():
            assert_same(found, expected(name), name)


@pytest.mark.parametrize(
    ("zero", "sequence"),
    [(3, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, True), (2, False), (3, False)))],
)
def test_with_tensor_parallelism(ranks, zero, sequence):
    """Norms count divided weights on every rank and others once; partial gradients are whole before they are cut."""
    for of_rank in ranks(train, 4, TWICE[:2], plan(zero, tensor=2, sequence=sequence), timeout_s=PATIENCE_S):
        for name, found in of_rank.items():
            assert_same(found, expected(name), name)


@functools.cache
def expected_of_pieces(optimizer: OptimizerConfig) -> dict[str, InPieces]:
    return train_in_pieces(World.single(), TWICE[:2], ParallelConfig(), optimizer)


@pytest.mark.parametrize(
    ("num_ranks", "fields", "optimizer"),
    [
        (6, {"zero": 1}, ADAMW),  # what three ranks add up depends on the order
        pytest.param(4, {"zero": 0}, ADAMW, marks=pytest.mark.slow),
        (2, {"zero": 0}, MUON),  # only the first stage has a table, which is a group of its own
        pytest.param(4, {"zero": 1, "virtual": 2}, ADAMW, marks=pytest.mark.slow),
        pytest.param(8, {"zero": 1, "tensor": 2, "sequence": True, "offload": "cpu"}, ADAMW, marks=pytest.mark.slow),
    ],
)
def test_a_pipeline_trains_as_one(ranks, num_ranks, fields, optimizer):
    """What every stage has counts once in the norm, and stays the same on all of them, to the bit."""
    found = ranks(train_in_pieces, num_ranks, TWICE[:2], plan(pipeline=2, **fields), optimizer, timeout_s=PATIENCE_S)
    for name, wanted in expected_of_pieces(optimizer).items():
        assert min(wanted.norms) > 2 * CLIP_NORM, "clipping must be at work"
        for of_rank in found:
            assert of_rank[name].norms == pytest.approx(wanted.norms, rel=1e-5), name
            assert all(of_rank[name].copies.values()), (name, of_rank[name].copies)
        weights = found[0][name].weights
        assert weights.keys() == wanted.weights.keys()
        for key, value in wanted.weights.items():
            assert (weights[key] - value).abs().mean() < 2e-5, (name, key)
    copies = {key for key in found[0]["replaid-auxiliary"].copies if "/" not in key}
    for part in ("schedule", "network.embedding", "network.time_embedding"):
        assert any(key.startswith(part) for key in copies), part


@pytest.fixture(scope="module")
def plain_bf16(ranks):
    return ranks(train, 2, ["mdlm", "replaid"], ParallelConfig(), 2, "bf16", timeout_s=PATIENCE_S)


@pytest.mark.parametrize(("zero", "tolerance"), [(0, 1e-6), (1, 1e-6), (2, 1e-6), (3, 5e-3)])
def test_bf16_is_that_of_plain_torch(ranks, plain_bf16, zero, tolerance):
    """Weights and gradients are float32, so that nothing is rounded which is not under plain autocast; only the linear
    layers of stage 3 are DeepSpeed's, which round once more."""
    names = ["mdlm", "replaid"]
    for of_rank, plain in zip(
        ranks(train, 2, names, plan(zero), 2, "bf16", timeout_s=PATIENCE_S), plain_bf16, strict=True
    ):
        for name in names:
            found, wanted = of_rank[name], plain[name]
            assert found.norms == pytest.approx(wanted.norms, rel=tolerance)
            for key, value in wanted.moments[0].items():
                if key.endswith("/exp_avg"):
                    other = found.moments[0][key]
                    assert other.dtype == torch.float32
                    assert (other - value).norm() <= 20 * tolerance * value.norm() + 1e-9, (name, key)


def test_stage_3_gathers_matrices_in_the_precision_of_their_products(ranks):
    """A pass gathers each weight, a recomputed block's again."""
    (exact, matrices, everything), _ = ranks(gathered_bytes, 2, "fp32", timeout_s=PATIENCE_S)
    (half, *_), _ = ranks(gathered_bytes, 2, "bf16", timeout_s=PATIENCE_S)
    times = exact / 4 / everything
    assert times > 2 and matrices > 0.8 * everything
    assert exact - half == pytest.approx(2 * times * matrices, rel=0.1)


@pytest.mark.parametrize(
    ("zero", "optimizer"),
    [pytest.param(0, ADAMW, marks=pytest.mark.slow), (0, MUON), (1, ADAMW), (2, ADAMW), (3, ADAMW)],
)
def test_a_gradient_that_is_not_finite_changes_nothing(ranks, zero, optimizer):
    """Muon goes on moving what has no gradient, but not where nothing has one."""
    for told, same, then_moved, norms in ranks(poisoned, 2, "mdlm", plan(zero), optimizer, timeout_s=PATIENCE_S):
        assert told and same and then_moved
        if optimizer is ADAMW:
            assert norms == pytest.approx(expected("mdlm").norms, rel=1e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"zero": 3},
        pytest.param({"zero": 2}, marks=pytest.mark.slow),
        pytest.param({"zero": 1}, marks=pytest.mark.slow),
        pytest.param({"zero": 3, "offload": "cpu"}, marks=pytest.mark.slow),
        pytest.param({"zero": 3, "tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_what_is_saved_is_all_there_is(ranks, fields):
    """Sizes divide by no number of ranks; RePlaid's fixed embeddings are not trained."""
    num_ranks = 4 if "tensor" in fields else 3
    for name in ("replaid-fixed", "di_ladd-learned"):
        assert all(ranks(moved, num_ranks, name, plan(**fields), timeout_s=PATIENCE_S)), name


def test_stages_divide_what_they_say(ranks):
    whole = sum(value.numel() for value in expected("mdlm").weights.values())
    for zero in (2, 3):
        for of_rank in ranks(train, 2, ["mdlm"], plan(zero), 1, timeout_s=PATIENCE_S):
            assert sum(of_rank["mdlm"].sizes) == pytest.approx(whole / 2, rel=0.01)


WIDE = 256
"""Only what is larger than a megabyte goes to a disk."""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mdlm", "replaid-fixed"])
def test_state_on_a_disk(ranks, asynchronous_io, tmp_path, name):
    on_disk = plan(3, offload="nvme", offload_dir=str(tmp_path))
    for of_rank in ranks(train, 2, [name], on_disk, 2, "fp32", WIDE, timeout_s=PATIENCE_S):
        found, wanted = of_rank[name], expected(name, width=WIDE)
        assert found.norms == pytest.approx(wanted.norms, rel=1e-5)
        assert 0 in found.sizes, "nothing was put there"
        for kind in ("weights", "seen", "average", "averaged"):
            for key, value in getattr(wanted, kind).items():
                assert (getattr(found, kind)[key] - value).abs().mean() < 2e-5, (kind, key)
    assert list(tmp_path.rglob("*.swp"))
    assert all(ranks(moved, 2, name, on_disk, WIDE, timeout_s=PATIENCE_S))
