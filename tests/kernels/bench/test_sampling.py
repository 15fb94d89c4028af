"""The benchmark of sampling runs and reports what it compared."""

from __future__ import annotations

import json

from braid.kernels import dispatch
from braid.kernels.bench.sampling import run


def test_a_small_run():
    report = run(rows=3, vocab=50, rounds=3)
    assert json.loads(json.dumps(report)) == report
    assert report["implementation"] == dispatch.choose("cpu").name
    assert report["shape"] == {"rows": 3, "vocab": 50}
    assert set(report["results"]) == {"token", "nucleus", "reverse step"}
    for result in report["results"].values():
        assert result["speedup"]["float64"] == result["float64"]["median_ms"] / result["ours"]["median_ms"] > 0
