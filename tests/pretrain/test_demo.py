"""`braid demo` from nothing, much shortened: everything it promises is there, and a second call has nothing to do."""

import json

import pytest


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


@pytest.mark.slow
def test_the_demo_as_it_is_teaches_something(run_braid, tmp_path):
    """At full length the leak-free bound is at least 10 % below the unigram entropy of the validation tokens."""
    done = run_braid("demo", timeout=2400, env={"OMP_NUM_THREADS": "2"})
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs" / "demo" / "summary.json").read_text())
    assert summary["joint_bound"] + 2 * summary["standard_errors"]["joint_bound"] < 0.9 * summary["unigram_entropy"]
    assert summary["ar_nll"] < summary["joint_bound"]
