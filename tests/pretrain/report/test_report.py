"""The report of a realistic run directory: whole, escaped, self-contained, honest about what is not there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from report_page import page_of
from synthetic_run import STORY, schedule, write_run

from braid.kernels.errors import InputError
from braid.pretrain.report.html import MAX_SAMPLE_TEXT, MAX_SAMPLES, write_report
from braid.pretrain.report.reading import read_run
from braid.pretrain.report.results import kind_of

SECTIONS = ["results", "quality", "loss", "time", "trajectory", "samples", "speed", "config", "environment"]
HOSTILE = '</script><script>alert("x")</script> <b onmouseover=go()>&amp; \u2028 </div>'


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    names = {"ccdd": "joint-small", "mdlm": "mdlm-small", "ar": "ar-small"}
    return {objective: write_run(root / name, objective, seed) for seed, (objective, name) in enumerate(names.items())}


@pytest.fixture
def run(runs, tmp_path) -> Path:
    """A copy of the joint run that a test may change."""
    ignore = shutil.ignore_patterns("*.html")
    return Path(shutil.copytree(runs["ccdd"], tmp_path / "joint-small", ignore=ignore))


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# -- the whole page --------------------------------------------------------------------------------------------


def test_page_is_well_formed_and_complete(runs):
    text, page = page_of(runs["ccdd"], runs["mdlm"], runs["ar"])
    assert text.startswith("<!DOCTYPE html>")
    assert list(page.sections) == SECTIONS
    assert not page.attributes("class").count("absent")
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    anchors = [href[1:] for href in page.attributes("href") if href.startswith("#")]
    assert set(SECTIONS) <= set(anchors) <= set(ids)
    assert sum(tag == "svg" and "chart" in (a.get("class") or "").split() for tag, a in page.tags) == 16
    assert "NaN" not in text and "None" not in text and "nan" not in re.sub(r"[a-z]+", "", text)


def test_page_loads_nothing(runs):
    text, page = page_of(runs["ccdd"], runs["mdlm"])
    for name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
        assert all(value.startswith(("#", "data:")) for value in page.attributes(name))
    assert not re.search(r"@import|url\(|https?:|fetch\(|XMLHttpRequest|import\(", text)
    assert {tag for tag, _ in page.tags} & {"img", "iframe", "object", "embed", "base", "form"} == set()
    (policy,) = (a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert len(text.encode()) < 2_000_000


def test_same_run_gives_the_same_bytes_and_names_no_folder_above_it(runs, tmp_path):
    first = write_report(runs["ccdd"], comparisons=[runs["ar"]]).read_bytes()
    assert (runs["ccdd"] / "report.html").is_file()
    moved = Path(shutil.copytree(runs["ccdd"], tmp_path / "elsewhere" / "joint-small"))
    second = write_report(moved, comparisons=[runs["ar"]], output=tmp_path / "second.html").read_bytes()
    assert first == second
    assert str(runs["ccdd"].parent).encode() not in first
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["second.html"]


def test_numbers_come_from_the_files(run):
    _, page = page_of(run)
    head = "".join(page.words).replace("\u00a0", " ")
    for expected in ("8.91 M", "6 layers × 256", "13.1 M", "1,600 of 1,600", "10 min 56 s", "AMD EPYC 9B14"):
        assert expected in head
    results = page.sections["results"].replace("\u00a0", " ")
    for expected in ("5.031 ± 0.012", "1.956", "153.1", "41.873 ± 0.094", "6.413", "1,024", "131,072"):
        assert expected in results
    assert "486,277 (exact)" in results and "hash 7d1f03c6" in results
    change(run / "evaluation.json", bytes_are_exact=False, num_sequences=77)
    results = page_of(run)[1].sections["results"]
    assert "mean bytes per token" in results and "77" in results


def test_each_number_says_what_it_is(runs):
    _, joint = page_of(runs["ccdd"])
    assert "This is an upper bound on the model's negative log-likelihood" in joint.sections["results"]
    _, ar = page_of(runs["ar"])
    assert "This is the model's exact negative log-likelihood" in ar.sections["results"]
    _, mdlm = page_of(runs["mdlm"])
    assert mdlm.sections["results"].count("not a bound") == 1


def test_a_number_that_is_no_bound_is_not_called_one(run):
    figures = json.loads((run / "evaluation.json").read_text())["figures"]
    figures[0] |= {"is_bound": False, "note": "discrete NELBO; NOT a bound: the encoder is leaky"}
    change(run / "evaluation.json", figures=figures[:1], corpora=[])
    results = page_of(run)[1].sections["results"]
    assert "not a bound on the likelihood" in results and "upper bound" not in results.lower()


@pytest.mark.parametrize(
    ("figure", "kind"),
    [
        ({"is_bound": True, "note": "NELBO"}, "bound"),
        ({"is_bound": True, "note": "exact: next-token cross-entropy"}, "exact"),
        ({"is_bound": True, "label": "exact NLL", "note": ""}, "exact"),
        ({"is_bound": True, "note": "not exact, but a bound"}, "bound"),
        ({"is_bound": False, "note": "exact"}, "neither"),
        ({"is_bound": False, "unit": "value", "note": "exact"}, "value"),
        ({}, "neither"),
    ],
)
def test_kinds(figure, kind):
    assert kind_of(figure) == kind


# -- what is absent --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "section", "message"),
    [
        ("evaluation.json", "results", "Not evaluated yet"),
        ("evaluation.json", "quality", "Nothing that this run writes was measured yet"),
        ("metrics.jsonl", "loss", "Not trained yet"),
        ("metrics.jsonl", "time", "No loss by time bucket"),
        ("metrics.jsonl", "speed", "Nothing was measured yet"),
        ("schedule.json", "time", "No noise schedule was recorded"),
        ("trajectory.json", "trajectory", "No denoising trajectory was recorded"),
        ("samples", "samples", "No samples were drawn yet"),
        ("config.yaml", "config", "This run has no config.yaml"),
        ("environment.json", "environment", "The environment was not recorded"),
    ],
)
def test_absent_part_is_said_to_be_absent(run, name, section, message):
    assert message not in page_of(run)[1].sections[section]
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    _, page = page_of(run)
    assert list(page.sections) == SECTIONS
    assert message in page.sections[section]


def test_without_evaluation_the_validation_loss_is_not_called_a_bound(run):
    (run / "evaluation.json").unlink()
    results = page_of(run)[1].sections["results"]
    assert "The last validation during training, at step 1,600, gave" in results and "±\u00a00.021" in results
    assert "it is not the run's result" in results and "upper bound" not in results.lower()
    (run / "metrics.jsonl").unlink()
    assert "The last validation" not in page_of(run)[1].sections["results"]


def test_folder_of_nothing_gives_a_page_of_absences(tmp_path):
    _, page = page_of(tmp_path)
    assert list(page.sections) == SECTIONS
    assert page.attributes("class").count("absent") == len(SECTIONS) + 1
    assert "".join(page.words).count("not recorded") == 8  # six facts, the objective, the environment
    assert not re.search(r"\d", "".join(page.sections.values()))


def test_autoregressive_run_has_no_diffusion_time(runs):
    _, page = page_of(runs["ar"])
    assert "An autoregressive model has no diffusion time" in page.sections["time"]
    assert "does not denoise" in page.sections["trajectory"]


def test_figure_that_was_not_computed(run):
    figures = json.loads((run / "evaluation.json").read_text())["figures"]
    figures[0]["value"] = None
    change(run / "evaluation.json", figures=figures)
    results = page_of(run)[1].sections["results"]
    assert "not computed" in results and "no headline number" in results


def test_summary_of_the_demo(run):
    (run / "summary.json").write_text(json.dumps({"joint_bound": 5.03121, "unigram_entropy": {"value": 6.4127}}))
    results = page_of(run)[1].sections["results"]
    assert "joint bound" in results and "5.0312" in results and "unigram entropy · value" in results


# -- text that looks like markup -------------------------------------------------------------------------------


def test_text_is_escaped_everywhere(run):
    hostile_folder = run.rename(run.with_name("<i>run & co"))
    run = hostile_folder
    (run / "samples" / "step-9.jsonl").write_text(json.dumps({"text": HOSTILE + "\x00\x1b", "step": 9999}) + "\n")
    pieces = [HOSTILE, None, " plain"]
    final = [HOSTILE, "</script>", " plain"]
    frames = [{"time": 1.0, "pieces": shown, "changed": [], "latent_norm": None} for shown in (pieces, final)]
    (run / "trajectory.json").write_text(json.dumps({"mask_id": 0, "decoded_mask": "<", "frames": frames}))
    figures = [{"name": "b", "label": HOSTILE, "value": 5.0, "standard_error": 0.1, "is_bound": True, "note": HOSTILE}]
    change(run / "evaluation.json", figures=figures, dtype=HOSTILE, tokenizer={"name": HOSTILE, "hash": "<b>"})
    (run / "config.yaml").write_text(f"run: {{}}\nkey: '{HOSTILE}'\n")
    change(run / "environment.json", device=HOSTILE)
    (run / "schedule.json").write_text(json.dumps({"times": [0, 1], "series": {HOSTILE: [0, 1], "b": [1, 0]}}))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line | {"terms": {HOSTILE: line["loss"], "b": 0.1}} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    text, page = page_of(run)
    assert "alert(" not in "".join(page.scripts[1:])  # the first holds the trajectory, as data
    assert "<script>alert" not in text and len(page.scripts) == 2
    assert not any("onmouseover" in attributes for _, attributes in page.tags)
    assert json.loads(page.scripts[0])["frames"][-1]["set"] == [[1, "</script>"]]
    assert HOSTILE + "\ufffd\ufffd" in page.boxes
    words = "".join(page.words)
    assert words.count(HOSTILE.strip()) >= 7


def test_facts_of_samples(runs):
    joint = page_of(runs["ccdd"])[1].sections["samples"]
    facts = "64 steps · sampler ddim · temperature 0.9 · 64 network calls · 128 tokens · entropy 4.21 nats"
    assert facts in joint and "guidance" not in joint and "top p" not in joint
    assert "The evaluation drew 16: 4.317 ± 0.042 nats, 64 network calls each." in joint.replace("\u00a0", " ")
    assert "ddim" not in page_of(runs["mdlm"])[1].sections["samples"]
    assert "64 steps" not in page_of(runs["ar"])[1].sections["samples"]


def test_samples_are_shown_as_drawn(run):
    text = "two  spaces\n\n\ttab, \u201cquotes\u201d \u4e2d\u6587 \u05d0\u05d1 <eos>"
    (run / "samples" / "step-2000.jsonl").write_text(json.dumps({"text": text, "tokens": [1, 2], "step": 2000}) + "\n")
    _, page = page_of(run)
    assert text in page.boxes
    assert STORY in page.boxes
    assert page.sections["samples"].index("Step 2,000") < page.sections["samples"].index("Step 1,600")


def test_too_many_or_too_long_samples_are_cut_and_said_to_be(run):
    samples = [{"text": f"{i} " + "x" * MAX_SAMPLE_TEXT, "step": 5000} for i in range(MAX_SAMPLES + 3)]
    (run / "samples" / "z.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    _, page = page_of(run)
    assert f"The newest {MAX_SAMPLES} of {MAX_SAMPLES + 11} samples" in page.sections["samples"]
    assert "2 more characters not shown" in page.sections["samples"]


# -- comparisons -----------------------------------------------------------------------------------------------


def test_comparisons_share_table_and_curves(runs):
    _, page = page_of(runs["ccdd"], runs["mdlm"], runs["ar"])
    results = page.sections["results"].replace("\u00a0", " ")
    assert "joint-small scores 0.087 ± 0.016 nats per token lower (better) than mdlm-small." in results
    assert "joint-small scores 0.384 ± 0.015 nats per token higher (worse) than ar-small." in results
    assert "The number of ar-small is exact" in results
    assert "4.647 ± 0.010" in results  # the decimals of the table, not its own
    assert page.sections["loss"].count("mdlm-small") >= 2
    assert "the heights of those curves cannot be compared" in page.sections["loss"]
    _, alone = page_of(runs["ccdd"])
    assert "mdlm-small" not in "".join(alone.words) and "cannot be compared" not in alone.sections["loss"]


def test_difference_within_its_error_is_called_none(run, runs):
    figures = json.loads((run / "evaluation.json").read_text())["figures"]
    figures[0] |= {"value": 5.1186 - 0.02}
    change(run / "evaluation.json", figures=figures)
    results = page_of(run, runs["mdlm"])[1].sections["results"].replace("\u00a0", " ")
    assert "Against mdlm-small no difference can be told: 0.020 ± 0.016" in results


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("sequence_length", 256, "another sequence length (128, here 256)"),
        ("tokenizer", {"name": "bpe", "hash": "ffff"}, "another tokenizer"),
        ("num_sequences", 12, "another number of sequences (1024, here 12)"),
        ("split", "train", "another split (validation, here train)"),
    ],
)
def test_numbers_of_other_conditions_are_not_compared(run, runs, key, value, said):
    change(run / "evaluation.json", **{key: value})
    results = page_of(run, runs["mdlm"])[1].sections["results"]
    assert "not comparable" in results and "(better)" not in results
    assert said in results


def test_runs_of_the_same_name_are_told_apart(run, runs):
    _, page = page_of(run, runs["ccdd"])
    assert f"{run.parent.name}/joint-small" in page.sections["results"]
    assert f"{runs['ccdd'].parent.name}/joint-small" in page.sections["results"]


# -- curves ----------------------------------------------------------------------------------------------------


def test_long_runs_stay_small(run):
    rng = np.random.default_rng(1)
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, 8_001):
            line = {"step": step, "split": "train", "tokens_seen": step * 10, "loss": 4 + rng.random(), "terms": {}}
            line |= {"grad_norm": 400.0 if step == 4_000 else 1.0, "loss_by_time": [1.0] * 10, "seconds": step}
            file.write(json.dumps(line) + "\n")
    text, page = page_of(run)
    paths = [a["d"] for tag, a in page.tags if tag == "path"]
    assert max(path.count("L") for path in paths) <= 320
    assert len(text) < 300_000
    assert "Means over 25 lines; pale: the highest." in page.sections["speed"]


def test_half_written_and_lost_lines(run):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[5] = json.dumps(json.loads(lines[5]) | {"loss": float("nan")}) + "\n"
    path.write_text("".join(lines) + '{"step": 1610, "split": "tr')
    loss = page_of(run)[1].sections["loss"]
    assert "The last line of metrics.jsonl is incomplete" in loss
    assert "without a finite loss: 1." in loss
    path.write_text("".join([*lines[:7], '{"step": 70, "spl\n', *lines[7:]]))
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 8"):
        write_report(run)


def test_columns_align_with_lines(run):
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "split": "train", "loss": 2.0, "terms": {"a": 1}}\n'
        '{"step": 1, "split": "validation", "loss": 3.0}\n'
        '{"step": 2, "split": "train", "loss": null, "terms": {"b": 5}, "lr": 0.1}\n'
    )
    train = read_run(run).train
    assert train.terms == ["a", "b"] and len(train) == 2
    np.testing.assert_array_equal(train["loss"], [2, np.nan])
    np.testing.assert_array_equal(train["terms.a"], [1, np.nan])
    np.testing.assert_array_equal(train["terms.b"], [np.nan, 5])
    np.testing.assert_array_equal(train["lr"], [np.nan, 0.1])
    np.testing.assert_array_equal(read_run(run).validation["loss"], [3])
    assert not train.has("mfu") and len(train["mfu"]) == 2


@pytest.mark.parametrize("name", ["evaluation.json", "trajectory.json", "schedule.json", "summary.json"])
@pytest.mark.parametrize("content", ["{", "[1, 2]"])
def test_damaged_file_is_named(run, name, content):
    (run / name).write_text(content)
    with pytest.raises(InputError, match=re.escape(name)):
        write_report(run)
    assert not (run / "report.html").exists()


# -- the schedule ----------------------------------------------------------------------------------------------


def test_weights_have_their_own_chart(run):
    _, page = page_of(run)
    assert "Noise schedule" in page.sections["time"] and "Loss weights" in page.sections["time"]
    only = schedule()
    only["series"] = {"token survival": only["series"]["token survival"]}
    (run / "schedule.json").write_text(json.dumps(only))
    assert "Loss weights" not in page_of(run)[1].sections["time"]


# -- command and environment -----------------------------------------------------------------------------------


def braid_report(*arguments: str) -> int:
    import argparse

    from braid.pretrain.report.command import add_arguments, main

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return main(parser.parse_args(list(arguments)))


def test_command_writes_and_names_the_report(run, runs, tmp_path, capsys):
    output = tmp_path / "page.html"
    compare = ["--compare", str(runs["mdlm"]), str(runs["ar"])]
    assert braid_report(str(run), *compare, "--output", str(output)) == 0
    assert capsys.readouterr().out.strip() == str(output)
    assert "ar-small" in output.read_text(encoding="utf-8")
    assert braid_report(str(run)) == 0
    assert (run / "report.html").is_file()


def test_command_refuses_what_is_no_run(run, tmp_path):
    (tmp_path / "empty").mkdir()
    for arguments in (["missing"], [run, "--compare", "missing"], ["empty"], [run, "--output", "no/where.html"]):
        arguments = [str(tmp_path / a) if not str(a).startswith("--") else a for a in arguments]
        with pytest.raises(InputError) as error:
            braid_report(*arguments)
        assert error.value.exit_code == 2 and str(tmp_path) in str(error.value)


def test_report_needs_no_torch():
    code = "import sys, braid.pretrain.report.command, braid.pretrain.report.environment; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_environment_says_what_but_not_who_or_where():
    import getpass
    import socket

    import torch

    from braid.pretrain.report.environment import collect_environment

    environment = collect_environment("cpu")
    assert environment["torch"] == torch.__version__ and environment["threads"] == torch.get_num_threads()
    assert environment["cores"] >= 1 and environment["device"] and environment["cuda"] is None
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
    text = json.dumps(environment)
    assert json.loads(text) == environment
    for private in (socket.gethostname(), str(Path.home()), str(Path.cwd()), sys.prefix):
        assert private not in text
    assert getpass.getuser() not in environment.values()
