"""Every system under every layout equals one process: see layouts.py. `make parity` prints the table."""

from __future__ import annotations

import pytest
from layouts import CONTEXT_LAYOUTS, LAYOUTS, SYSTEMS, compare, train

QUICK = {
    ("CCDD MDiT", "DP 2"),
    ("CCDD MDiT", "PP 4"),
    ("RePlaid", "TP 2 x PP 2 x DP 2 + SP"),
    ("MDLM", "DP 2, ZeRO-1"),
    ("ELF", "DP 2, ZeRO-3"),
    ("AR", "PP 2 x DP 2, ZeRO-1"),
    ("CCDD MMDiT", "TP 2 x PP 2 x DP 2, Megatron"),
    ("Co-LADD", "DP 2, ZeRO-2, offloaded to the CPU"),
}
"""Each engine under each kind of division; without engines the other layouts are quick in test_layouts.py."""
QUICK_CONTEXT = ("CCDD MDiT", "CP 2, ZeRO-3")


@pytest.mark.parametrize(
    ("system", "layout"),
    [
        pytest.param(system, layout, marks=[] if (system, layout) in QUICK else pytest.mark.slow)
        for system in SYSTEMS
        for layout in LAYOUTS
    ],
)
def test_a_layout_equals_one_process(reference, trainers, parity_table, system: str, layout: str) -> None:
    run_dir = train(trainers, system, "run", LAYOUTS[layout])
    difference = compare(run_dir, reference(system))
    parity_table[system, layout] = difference
    assert difference.within_limits, difference


@pytest.mark.parametrize(
    ("system", "layout"),
    [
        pytest.param(system, layout, marks=[] if (system, layout) == QUICK_CONTEXT else pytest.mark.slow)
        for system in ("MDLM", "CCDD MDiT", "RePlaid")
        for layout in CONTEXT_LAYOUTS
    ],
)
def test_divided_sequences_under_an_engine(reference, trainers, system: str, layout: str) -> None:
    """Positions are divided on the axis that gradients are added up over."""
    difference = compare(train(trainers, system, "run", CONTEXT_LAYOUTS[layout]), reference(system))
    assert difference.within_limits, difference
