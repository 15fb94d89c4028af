"""The probe of a run's start sees the passes of training, whatever divides them, and the weights of the engine."""

from __future__ import annotations

import pytest
from direction_bodies import probes

from braid.parallel.plan import ParallelConfig

QUICK = ["mdlm"]
OTHERS = ["elf", "ccdd-mmdit", "ccdd-moedit-1", "co_ladd", "replaid"]
TRAINING = "causal in training"
LAYOUTS = {
    "tensor 2 with sequence": (2, {"tensor": 2, "sequence": True}, TRAINING),
    "context 2": (2, {"context": 2}, "causal where divided"),
    "pipeline 2": (2, {"pipeline": 2}, TRAINING),
    "ZeRO 3": (2, {"engine": "deepspeed", "zero": 3}, TRAINING),
    "Megatron in bf16": (2, {"engine": "megatron"}, TRAINING),
    "tensor 2 with sequence, pipeline 2": (4, {"tensor": 2, "sequence": True, "pipeline": 2}, TRAINING),
    "ZeRO 1, pipeline 2": (2, {"engine": "deepspeed", "zero": 1, "pipeline": 2}, TRAINING),
}
CHEAP = list(LAYOUTS)[:4]
SLOW = pytest.mark.slow


@pytest.mark.parametrize("names", [QUICK, pytest.param(OTHERS, marks=SLOW)], ids=["quick", "others"])
@pytest.mark.parametrize("layout", [pytest.param(x, marks=[] if x in CHEAP else SLOW) for x in LAYOUTS])
def test_what_trains_is_probed(ranks, layout: str, names: list[str]) -> None:
    """What samples is right in all of these, and the weights that the network was made with are."""
    number, fields, broken = LAYOUTS[layout]
    precision = "bf16" if "bf16" in layout else "fp32"
    for found in ranks(probes, number, names, ParallelConfig(**fields), broken, precision, timeout_s=300):
        for name, (as_it_is, in_training, by_weights) in found.items():
            assert as_it_is == "", (name, as_it_is)
            assert "does not see the last token" in in_training, (name, in_training)
            assert "does not see" in by_weights, (name, by_weights)
