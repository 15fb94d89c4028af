"""The benchmark of the output head runs and reports what it compared."""

from __future__ import annotations

import json

import pytest
import torch.nn.functional as F

from braid.kernels import dispatch
from braid.kernels.bench.head import CONTENDERS, run


def test_a_small_run():
    report = run(tokens=512, width=32, vocab=8000, rounds=3)
    assert json.loads(json.dumps(report)) == report
    assert report["implementation"] == dispatch.choose("cpu").name
    assert report["shape"] == {"tokens": 512, "width": 32, "vocab": 8000}
    results = report["results"]
    torchs = ["torch's linear_cross_entropy"] if hasattr(F, "linear_cross_entropy") else []
    assert {*CONTENDERS, *torchs, "speedup", "peak_bytes", "memory_share"} == set(results)
    first, *others = CONTENDERS
    for name in others:
        assert results["speedup"][name] == results[name]["median_ms"] / results[first]["median_ms"]
    # All logits at once, their gradients and more of the size: 16 MB each.
    assert results["peak_bytes"][CONTENDERS[-1]] > 2 * 512 * 8000 * 4
    share = results["peak_bytes"][first] / results["peak_bytes"][CONTENDERS[-1]]
    assert results["memory_share"][first] == pytest.approx(share) and share < 1
