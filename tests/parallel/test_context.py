"""Attention over divided sequences is that of whole ones, and so is every objective: losses, gradients, direction."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from context_bodies import ATTENTIONS, attentions, probes, steps, sums_and_parts
from tensor_cases import CASES, LENGTH, NUM_SLOTS, batch_and_noise, build, step

from braid.kernels.errors import ConfigError
from braid.parallel.context import Context, CoreAttention
from braid.parallel.mesh import Axis
from braid.pretrain.config.objectives.t5 import T5Config
from braid.pretrain.config.schema import Config
from braid.pretrain.objectives.build import build_objective

PATIENCE_S = 300
LAYOUTS = {
    "context 2": (2, {"context": 2}),
    "context 2 by gather": (2, {"context": 2, "context_by": "gather"}),
    "tensor 2 with sequence, context 2": (4, {"tensor": 2, "sequence": True, "context": 2}),
    "context 4": (4, {"context": 4}),
    "tensor 2, context 2 by gather": (4, {"tensor": 2, "context": 2, "context_by": "gather"}),
}
QUICK = ("context 2", "context 2 by gather", "tensor 2 with sequence, context 2")
ONE_OF_EACH_NETWORK = ["ar", "mdlm", "ccdd-mdit", "ccdd-mmdit", "ccdd-moedit-1", "replaid", "co_ladd", "elf"]


@pytest.mark.parametrize(("by", "num_heads"), [("ulysses", 3), ("ulysses", 6), ("gather", 4)])
def test_attention_is_that_of_whole_sequences(ranks, by, num_heads):
    """Three processes, float64; those that gather keys do not divide the heads."""
    for errors in ranks(attentions, 3, by, num_heads):
        assert errors.keys() == ATTENTIONS.keys() - ({"causal"} if by == "gather" else set())
        assert max(errors.values()) < 1e-13, errors


@pytest.mark.parametrize("size", [2, 3])
def test_positions_are_dealt_and_added_up(ranks, size):
    ranks(sums_and_parts, size)


def test_whole_sequences_stay_as_they_are():
    """On one process, whatever is asked for."""
    for context in (Context(), Context(Axis("context", 0, 1, None), "gather")):
        with context.dividing():
            x = torch.ones(2, 3, 4)
            assert context.size == 1 and not context.divides and context.sum(x) is x and context.gather(x) is x
            assert torch.equal(context.part(x), x) and torch.equal(context.mean(x), x.mean(1))
    assert CoreAttention.context.size == 1


@pytest.mark.parametrize("name", CASES)
def test_all_that_has_positions_is_divided(name):
    """A field whose dimension 1 is the number of tokens or slots is among those that are cut; and no other."""
    batch, noise = batch_and_noise()
    corrupted = build(name).corrupt(batch, noise)
    lengths = (LENGTH, NUM_SLOTS) if "ladd" in name else (LENGTH,)
    fields = {field: value for field, value in vars(corrupted).items() if torch.is_tensor(value)}
    found = {field for field, value in fields.items() if value.ndim > 1 and value.shape[1] in lengths}
    assert found == set(corrupted.by_position) & fields.keys()
    context = Context(Axis("context", 1, 2, None))
    with context.dividing():
        part = corrupted.part(context)
    for field, value in fields.items():
        wanted = value.chunk(2, 1)[1] if field in found else value
        assert torch.equal(getattr(part, field), wanted), field
    if corrupted.dropout is not None:
        assert part.dropout.positions.tolist() == list(range(LENGTH // 2, LENGTH))


@cache
def expected(name: str) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Loss terms and gradients on one process."""
    return step(build(name))


@pytest.fixture(scope="module")
def measured(ranks):
    """measured(layout): the results of all cases by rank, run when they are first asked for."""

    def run(layout: str) -> list[dict]:
        size, fields = LAYOUTS[layout]
        names = [name for name in CASES if name != "ar" or "context_by" not in fields]
        return ranks(steps, size, names, fields, timeout_s=PATIENCE_S)

    return cache(run)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        pytest.param(name, layout, marks=[] if layout in QUICK else pytest.mark.slow)
        for layout in LAYOUTS
        for name in CASES
        if name != "ar" or "gather" not in layout  # check_plan refuses it
    ],
)
def test_losses_and_gradients_are_those_of_one_process(measured, name, layout):
    """With random weights everywhere; activation checkpointing and dropout in some of the cases."""
    terms, gradients = expected(name)
    for result in measured(layout):
        found_terms, found = result[name]
        assert found_terms == pytest.approx(terms, rel=1e-6, abs=1e-6)
        assert found.keys() == gradients.keys()
        for key, gradient in gradients.items():
            error = float((found[key] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-12))
            assert error < 1e-5, (key, error)


@pytest.mark.parametrize("by", ["ulysses", "gather"])
def test_bf16_is_as_near_as_bf16_is(ranks, by):
    """Under autocast, where bfloat16 travels; and the weights' gradients stay float32."""
    names = ["mdlm", "ccdd-mmdit", "elf"]
    for results in ranks(steps, 2, names, {"context": 2, "context_by": by}, "bf16", timeout_s=PATIENCE_S):
        for name in names:
            terms, gradients = step(build(name), "bf16")
            found_terms, found = results[name]
            assert found_terms == pytest.approx(terms, rel=0.02, abs=0.02), name
            for key, gradient in gradients.items():
                assert found[key].dtype == torch.float32
                assert float((found[key] - gradient).norm() / gradient.norm()) < 0.1, (name, key)


@pytest.mark.parametrize("by", ["ulysses", "gather"])
def test_the_probe_sees_what_does_not_travel(ranks, by):
    """The start-up check passes on divided sequences, and fails if nothing is exchanged."""
    names = [name for name in ONE_OF_EACH_NETWORK if name != "ar" or by == "ulysses"]
    for said in ranks(probes, 2, names, by, timeout_s=PATIENCE_S):
        for name, (sound, broken) in said.items():
            assert sound == "", name
            assert "does not see" in broken or "sees later" in broken, name


def test_t5_is_not_divided():
    context = Context(Axis("context", 0, 2, None))
    with pytest.raises(ConfigError, match=r"objective.name=t5, 2 processes on the context axis"):
        build_objective(Config(objective=T5Config()), None, None, torch.device("cpu"), context=context)
