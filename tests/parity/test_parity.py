"""Every system under every layout equals one process: see layouts.py. `make parity` prints the table."""

from __future__ import annotations

import pytest
from layouts import LAYOUTS, SYSTEMS, compare, train

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
