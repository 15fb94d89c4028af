"""Every objective in pieces on several processes is the one of one process: losses, gradients, bounds, samples."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from pipeline_bodies import NAMES, NUM, Parts, Result, looks, nested, num_blocks, step, steps, weights
from tensor_bodies import look
from tensor_cases import build

from braid.kernels.errors import ConfigError
from braid.parallel.mesh import Mesh
from braid.parallel.pipeline import ONE_PIECE, Stage
from braid.parallel.plan import ParallelConfig
from braid.pretrain.config.load import load_config
from braid.pretrain.config.validate import validate

PATIENCE_S = 400
INTERLEAVED = {"pipeline": 2, "virtual": 2}
LAYOUTS = {
    "1F1B": (2, {"pipeline": 2}, 4),
    "uneven, two micro-batches": (3, {"pipeline": 3}, 2),
    "interleaved": (2, INTERLEAVED, 4),
    "interleaved, one by one": (2, INTERLEAVED | {"overlap": False}, 2),
    "interleaved of four": (4, {"pipeline": 4, "virtual": 2}, 4),
    "1F1B, six micro-batches": (2, {"pipeline": 2}, 6),
    "1F1B, eight": (2, {"pipeline": 2}, 8),
    "1F1B of four, six": (4, {"pipeline": 4}, 6),
    "1F1B of four, eight": (4, {"pipeline": 4}, 8),
    "interleaved, six": (2, INTERLEAVED, 6),
    "interleaved of four, eight": (4, {"pipeline": 4, "virtual": 2}, 8),
    "with tensor and sequence": (4, {"pipeline": 2, "tensor": 2, "sequence": True}, 2),
}
QUICK = ("1F1B", "interleaved")
OFFLOADED = {"zero": 1, "offload": "cpu"}
NAMES_OF_WEIGHTS = ("alone", "everywhere", "everywhere_divided")


@cache
def expected(name: str, number: int, num: int, precision: str = "fp32", dropout: float | None = None) -> Result:
    """On one process: of so many blocks, in `num` micro-batches."""
    model = {} if dropout is None else {"dropout": dropout}
    return step(build(name, num_layers=number, **model), Mesh.single(), ParallelConfig(), num, precision)


def largest_error(value: torch.Tensor, wanted: torch.Tensor) -> float:
    """Over the largest value."""
    return float((value - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))


def assert_equal_steps(found: list[Result], wanted: Result, name: str) -> None:
    for result in found:  # every rank knows the sums, also one without heads
        assert result.loss == pytest.approx(wanted.loss, rel=1e-6)
        assert result.terms == pytest.approx(wanted.terms, rel=1e-5, abs=1e-6)
        assert result.norm == pytest.approx(wanted.norm, rel=1e-5)
        assert result.statistics.keys() == wanted.statistics.keys()
        for key, value in wanted.statistics.items():
            torch.testing.assert_close(result.statistics[key], value, rtol=1e-5, atol=1e-5)
        assert result.counts == wanted.counts
    assert found[0].gradients.keys() == wanted.gradients.keys()
    for key, gradient in wanted.gradients.items():
        assert largest_error(found[0].gradients[key], gradient) < 1e-5, (name, key)


@pytest.mark.parametrize("layout", [pytest.param(x, marks=[] if x in QUICK else pytest.mark.slow) for x in LAYOUTS])
def test_losses_and_gradients_are_those_of_one_process(ranks, layout):
    """With random weights everywhere, dropout and activation checkpointing in some of the cases."""
    size, fields, num = LAYOUTS[layout]
    results = ranks(steps, size, NAMES, fields, num, "fp32", {}, timeout_s=PATIENCE_S)
    for name in NAMES:
        wanted = expected(name, num_blocks(name, ParallelConfig(**fields)), num)
        assert_equal_steps([of_rank[name] for of_rank in results], wanted, name)


def test_a_process_holds_its_blocks_and_what_all_need(ranks):
    """Every parameter is somewhere. What is in several places is small, and on all of them."""
    results = ranks(steps, 3, ["co_ladd-learned", "replaid"], {"pipeline": 3}, 1, "fp32", {}, timeout_s=PATIENCE_S)
    for name, everywhere in (("co_ladd-learned", {"token_time", "latent_time"}), ("replaid", {"time_embedding"})):
        held, whole = [of_rank[name].held for of_rank in results], expected(name, 4, 1).held
        assert set().union(*held) == whole
        in_common = set.intersection(*held)
        assert all(key in in_common or sum(key in one for one in held) == 1 for key in whole)
        owned = {key for key in in_common if not key.startswith(("schedule.", "network.embedding"))}
        assert {key.split(".")[1] for key in owned} == everywhere
        blocks = [{key.split(".")[2] for key in one if ".blocks." in key} for one in held]
        assert blocks == [{"0"}, {"1", "2"}, {"3"}]
        at_start, at_end = ({key for key in one if ".blocks." not in key} - in_common for one in (held[0], held[2]))
        assert any("input" in key for key in at_start) and all("_head." in key for key in at_end) and at_end
        assert not {key for key in held[1] if ".blocks." not in key} - in_common


def test_what_was_sent_may_be_freed(ranks):
    """All transfers are waited for, so that the CPU can do what a GPU does. MMDiT's states travel as views."""
    fields = {"pipeline": 2, "overlap": False}
    for virtual, name in ((1, "ccdd-mmdit"), (2, "mdlm")):
        results = ranks(steps, 2, [name], fields | {"virtual": virtual}, 4, "fp32", {}, True, timeout_s=PATIENCE_S)
        wanted = expected(name, num_blocks(name, ParallelConfig(**fields)), 4)
        assert_equal_steps([of_rank[name] for of_rank in results], wanted, name)


def test_under_autocast_the_states_travel_in_float32(ranks):
    """All of them (else the schedule refuses), and what comes of it is as near as bfloat16 is."""
    results = ranks(steps, 2, NAMES, {"pipeline": 2}, 2, "bf16", {"dropout": 0.0}, timeout_s=PATIENCE_S)
    for name in NAMES:
        wanted = expected(name, num_blocks(name, ParallelConfig(pipeline=2)), 2, "bf16", 0.0)
        found = [of_rank[name] for of_rank in results]
        assert found[0].terms == found[1].terms == pytest.approx(wanted.terms, rel=1e-3, abs=1e-3), name
        for key, gradient in wanted.gradients.items():
            error = (found[0].gradients[key] - gradient).norm() / gradient.norm().clamp(min=1e-12)
            assert float(error) < 0.02, (name, key)


@pytest.mark.parametrize(
    "fields",
    [
        {"pipeline": 2},
        pytest.param({"pipeline": 2, "virtual": 2}, marks=pytest.mark.slow),
        pytest.param({"pipeline": 2, "tensor": 2, "sequence": True}, marks=pytest.mark.slow),
    ],
)
def test_figures_and_samples_are_those_of_one_process(ranks, fields):
    """Every process has all of them; an AR model's cache is in pieces too. The probe sees both ends."""
    plan = ParallelConfig(**fields)
    results = ranks(looks, plan.model_processes, NAMES, fields, timeout_s=PATIENCE_S)
    for name in NAMES:
        figures, samples = look(build(name, num_layers=num_blocks(name, plan)), guided=False)
        for seen, drawn in (of_rank[name] for of_rank in results):
            assert seen.keys() == figures.keys()
            for figure, value in figures.items():
                torch.testing.assert_close(seen[figure], value, rtol=1e-5, atol=1e-5, msg=f"{name} {figure}")
            assert all(torch.equal(*pair) for pair in zip(drawn, samples, strict=True)), name


def test_what_the_last_has_is_spread_whatever_it_is(ranks):
    columns = torch.arange(6, dtype=torch.float64).view(2, 3).T + 2
    for found in ranks(nested, 3):
        assert isinstance(found, Parts) and torch.equal(found.numbers, columns) and found.nothing is None
        assert found.more["text"] == "of 2" and found.more["flags"][0].tolist() == [True, False]


ENGINES = [{}, {"engine": "deepspeed", "zero": 1}]
MORE_ENGINES = [{"engine": "deepspeed"}, {"engine": "deepspeed"} | OFFLOADED]
MORE_ENGINES += [{"engine": "megatron"}, {"engine": "megatron", "overlap": False}]
ENGINES += [pytest.param(fields, marks=pytest.mark.slow) for fields in MORE_ENGINES]


@pytest.mark.parametrize("fields", ENGINES)
def test_replicated_gradients_are_summed_and_count_once(ranks, fields):
    """On pipeline 2 x tensor 2 x data 2: sums over data and pipeline of what every process has, over data alone of what
    one stage has; the norm is that of all weights laid end to end."""
    found = ranks(weights, 8, fields, False)
    over_data = {
        (name, stage): 2 * (1 + n + 10 * stage) + 100 for n, name in enumerate(NAMES_OF_WEIGHTS) for stage in (0, 1)
    }
    everywhere = over_data["everywhere", 0] + over_data["everywhere", 1]
    divided = [over_data["everywhere_divided", 0] + over_data["everywhere_divided", 1] + 4 * t for t in (0, 1)]
    alone = [over_data["alone", stage] for stage in (0, 1)]
    norm = math.sqrt(NUM * sum(value**2 for value in (everywhere, *divided, *alone)))
    for rank, (measured, after) in enumerate(found):
        tensor, stage = rank % 2, rank // 4
        assert measured == pytest.approx(norm, rel=1e-6)
        for name, value in zip(NAMES_OF_WEIGHTS, (alone[stage], everywhere, divided[tensor]), strict=True):
            assert after[name].tolist() == [-value] * NUM, (rank, name)


@pytest.mark.parametrize("fields", ENGINES)
def test_no_process_steps_where_one_has_no_number(ranks, fields):
    for norm, after in ranks(weights, 8, fields, True):
        assert math.isnan(norm) and all(not weight.any() for weight in after.values())


def test_a_network_in_one_piece_is_at_both_ends():
    assert ONE_PIECE.at_start and ONE_PIECE.at_end and ONE_PIECE.holds_start and ONE_PIECE.holds_end
    assert ONE_PIECE.through(lambda x: x + 1, 1) == 2
    assert Stage().add_up([3, 4]) == [3, 4]


def test_what_needs_the_gradient_of_the_whole_network_is_refused():
    words = ["sampling.token_guidance=0.5", "training.sample_every=5", "parallel.pipeline=2", "model.num_layers=4"]
    with pytest.raises(ConfigError, match="no process has"):
        validate(load_config("tiny_replaid", words), world_size=2)
    validate(load_config("tiny_replaid", [*words, "training.sample_every=0"]), world_size=2)
