"""`braid demo` from nothing, much shortened: everything it promises is there, and a second call has nothing to do."""

import json


def test_demo(run_braid, tmp_path):
    words = ("demo", "--dir", "runs/demo", "--steps", 12, "--sequences", 8, "--draws", 1)
    done = run_braid(*words, timeout=300)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "demo"
    summary = json.loads((run / "summary.json").read_text())
    figures = ("joint_bound", "mdlm_bound", "ar_nll", "unigram_entropy")
    for name in figures:
        assert 0 < summary[name] < 20
        assert summary["standard_errors"][name] > 0
        assert summary["bits_per_byte"][name] > 0
        assert f"{summary[name]:.4f}" in done.stdout
    assert summary["parameters"] > 100_000 and summary["seconds"] > 0
    assert summary["tokens_seen"] > 0
    assert (run / summary["samples"]).read_text().count("\n") >= 1
    page = (run / summary["report"]).read_text()
    assert "joint" in page and len(page) < 2_000_000
    assert str(run.relative_to(tmp_path) / "report.html") in done.stdout

    again = run_braid(*words, timeout=300)
    assert again.returncode == 0, again.stderr
    repeated = json.loads((run / "summary.json").read_text())
    assert {name: repeated[name] for name in figures} == {name: summary[name] for name in figures}
