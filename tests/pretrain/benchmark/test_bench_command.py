"""`braid bench`: real figures, for the kinds and options there are."""

import json

import pytest
import torch

from braid.pretrain.benchmark.step import run

TINY = ("model.width=32", "model.num_layers=2", "model.num_heads=2", "data.sequence_length=16")


def test_a_step_is_timed_and_written(run_braid, tmp_path):
    (tmp_path / "check.json").write_text('{"counts": {"passed": 3}}')
    words = ("bench", "step", *TINY, "--rounds", 3, "--vocab", 64, "--rows", 2, "--device", "cpu")
    done = run_braid(*words, "--json", "bench.json", "--into", "check.json")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "bench.json").read_text())
    step = record["step"]
    assert step["sizes"]["width"] == 32 and step["sizes"]["length"] == 16 and step["sizes"]["vocab"] == 64
    for name in ("plain", "braid"):
        assert step["timings"][name]["rounds"] == 3
        assert step["tokens_per_second"][name] == pytest.approx(2 * 16 / step["timings"][name]["median_ms"] * 1e3)
        assert f"{step['timings'][name]['median_ms']:.3f} ms" in done.stdout
    speeds = step["tokens_per_second"]
    assert step["speedup"] == {"plain": pytest.approx(speeds["braid"] / speeds["plain"])}
    assert step["mfu"]["braid"] == {"full_head": None, "needed": None}, "a CPU's peak is not known"
    whole = json.loads((tmp_path / "check.json").read_text())
    assert whole["counts"] == {"passed": 3} and whole["benchmarks"]["step"] == step
    assert record["command"].startswith("braid bench step model.width=32")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["head", "--recipe", "mdlm_small"], "`braid bench head` has no such option"),
        (["noising", "model.width=8"], "`braid bench noising` has no such option"),
        (["step", "--rounds", "0"], "--rounds must be a positive number"),
        (["step", "--into", "nowhere.json"], "there is no file to add the figures to"),
        (["step", "--recipe", "tiny_elf"], "the step benchmark compares masked diffusion"),
        (["step", "--recipe", "mdlm_smal"], "mdlm_small"),
        (["step", "model.depth=3"], "depth"),
    ],
)
def test_what_makes_no_sense_is_an_error_that_says_so(run_braid, words, what):
    done = run_braid("bench", *words)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert what in done.stderr


@pytest.mark.slow
def test_compiled_contenders_step_without_compiling_again():
    """Blocks share one graph, and the next steps, with other tokens, times and keys, find it."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = run("cpu", overrides=TINY, vocab=64, rows=2, rounds=3, compile_blocks=True, compile_plain=True)
    assert found["timings"].keys() == {"plain", "compiled", "braid"}
    assert found["sizes"]["compiled_blocks"]


def test_engines_are_timed_beside_torch(run_braid, tmp_path):
    words = ("bench", "engines", *TINY, "--rounds", 3, "--vocab", 64, "--rows", 2, "--device", "cpu")
    done = run_braid(*words, "--json", "bench.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "bench.json").read_text())["engines"]
    assert found["left_out"] == {} and found["sizes"]["precision"] == "fp32"
    assert list(found["timings"]) == ["plain", "Megatron", "ZeRO-1", "ZeRO-2", "ZeRO-3"]
    plain = found["timings"]["plain"]["median_ms"]
    for name, ratio in found["times_plain"].items():
        assert ratio == pytest.approx(found["timings"][name]["median_ms"] / plain)
        assert f"{found['timings'][name]['median_ms']:.3f} ms" in done.stdout
