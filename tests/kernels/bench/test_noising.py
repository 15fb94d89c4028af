"""The benchmark of joint noising runs and reports what it compared."""

from __future__ import annotations

import json

from braid.kernels import dispatch
from braid.kernels.bench.noising import run


def test_a_small_run():
    report = run(rows=2, length=8, channels=16, vocab=50, rounds=3, compiled=False)
    assert json.loads(json.dumps(report)) == report
    assert report["implementation"] == dispatch.choose("cpu").name
    assert set(report["results"]) == {"float32", "bfloat16"}
    for result in report["results"].values():
        assert result["speedup"] == {"eager": result["eager"]["median_ms"] / result["fused"]["median_ms"]}
        assert 0 < result["share_of_copy"] < 1
