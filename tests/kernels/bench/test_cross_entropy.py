"""The benchmark of cross-entropy runs and reports what it compared."""

from __future__ import annotations

import json

from braid.kernels import dispatch
from braid.kernels.bench.cross_entropy import run


def test_a_small_run():
    report = run(rows=3, vocab=50, rounds=3)
    assert json.loads(json.dumps(report)) == report
    assert report["implementation"] == dispatch.choose("cpu").name
    assert report["shape"] == {"rows": 3, "vocab": 50}
    assert set(report["results"]) == {"ours", "eager", "autograd", "speedup", "share_of_copy"}
    results = report["results"]
    assert results["speedup"]["eager"] == results["eager"]["median_ms"] / results["ours"]["median_ms"] > 0
    assert results["share_of_copy"] > 0
