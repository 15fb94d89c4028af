"""Rows of several documents, divided: losses and gradients are those of one process, and those of no other rows."""

from __future__ import annotations

import context_bodies
import pipeline_bodies
import pytest
from tensor_cases import build, step

from braid.parallel.mesh import Mesh
from braid.parallel.plan import ParallelConfig

QUICK, SLOW = ["ar", "mdlm", "ccdd-mmdit"], ["ccdd-mdit", "ccdd-moedit-2", "replaid"]
NAMES = [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)]
LAYOUTS = {
    "context 2": (2, {"context": 2}),
    "context 2 by gather": (2, {"context": 2, "context_by": "gather"}),
    "tensor 2 with sequence, context 2": (4, {"tensor": 2, "sequence": True, "context": 2}),
}


def assert_close(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        error = float((found[key] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-12))
        assert error < 1e-5, (key, error)


@pytest.mark.parametrize("names", NAMES, ids=["quick", "others"])
@pytest.mark.parametrize(
    "layout", [*list(LAYOUTS)[:2], pytest.param("tensor 2 with sequence, context 2", marks=pytest.mark.slow)]
)
def test_divided_rows(ranks, layout, names):
    size, fields = LAYOUTS[layout]
    names = [name for name in names if name != "ar" or "gather" not in layout]
    results = ranks(context_bodies.steps, size, names, fields, "fp32", True)
    for name in names:
        terms, gradients = step(build(name), packed=True)
        assert terms["total"] != pytest.approx(step(build(name))[0]["total"], rel=1e-3)
        for result in results:
            assert result[name][0] == pytest.approx(terms, rel=1e-6, abs=1e-6)
            assert_close(result[name][1], gradients)


@pytest.mark.parametrize("names", NAMES, ids=["quick", "others"])
def test_divided_networks(ranks, names):
    """Each stage of a pipeline makes the mask for itself."""
    plan, alone = ParallelConfig(), Mesh.single()
    first, _ = ranks(pipeline_bodies.steps, 2, names, {"pipeline": 2}, 2, "fp32", {}, False, True)
    for name in names:
        expected = pipeline_bodies.step(pipeline_bodies.build_piece(name, alone, plan), alone, plan, 2, packed=True)
        assert first[name].terms == pytest.approx(expected.terms, rel=1e-5)
        assert_close(first[name].gradients, expected.gradients)
