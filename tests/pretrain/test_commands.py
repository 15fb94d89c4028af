"""From text to samples through the command line, as real processes: prepare, pretrain, evaluate, sample, report."""

import json
import math

import pytest

TEXT = "\n".join(
    f"The {colour} {animal} number {n} looks at the {other} {place} and says hello to {n + 1} friends."
    for n, (colour, animal, other, place) in enumerate(
        (c, a, o, p) for c in ("red", "blue", "green") for a in ("fox", "owl", "cat") for o in ("old", "new")
        for p in ("house", "river", "tree", "hill")
    )
)  # fmt: skip


@pytest.fixture(scope="module")
def braid(tmp_path_factory):
    """Run `braid WORDS` in one folder, in which a joint and an AR model have been trained."""
    import os
    import subprocess
    import sys

    folder = tmp_path_factory.mktemp("commands")

    def run(*words, code=0):
        done = subprocess.run(
            [sys.executable, "-m", "braid.launch.cli", *map(str, words)],
            cwd=folder, env=os.environ, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == code, done.stderr + done.stdout
        assert "Traceback" not in done.stderr
        return done

    run.folder = folder
    (folder / "text.txt").write_text(TEXT * 4)
    run("prepare", "--input", "text.txt", "--tokenizer", "train:300", "--output", "corpus")
    for name in ("ccdd", "ar"):
        run("pretrain", f"tiny_{name}", "data.path=corpus", f"run.dir={name}", "training.steps=6",
            "training.log_every=2", "training.sample_every=3", "training.validate_every=3")  # fmt: skip
    return run


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_run_directory_is_as_documented(braid):
    run = braid.folder / "ccdd"
    expected = {"config.yaml", "metrics.jsonl", "checkpoints", "samples", "environment.json", "schedule.json"}
    assert expected | {"outcome.json"} <= {entry.name for entry in run.iterdir()}
    train = [line for line in lines(run / "metrics.jsonl") if line["split"] == "train"]
    assert [line["step"] for line in train] == [2, 4, 6]
    first = train[0]
    assert set(first["terms"]) == {"token_loss", "latent_loss"}
    assert first["loss"] == pytest.approx(sum(first["terms"].values()))
    assert len(first["loss_by_time"]) == 10 and first["mfu"] is None and 0 <= first["data_wait"] <= 1
    assert first["tokens_seen"] == 2 * 16 * 32
    validation = [line for line in lines(run / "metrics.jsonl") if line["split"] == "validation"]
    assert [line["step"] for line in validation] == [3, 6]
    assert {"token_bound", "token_bound_latents_off", "joint_nelbo", "published"} == set(validation[0]["terms"])
    assert json.loads((run / "outcome.json").read_text())["status"] == "done"
    assert [path.name for path in sorted((run / "samples").iterdir())] == ["step-00000003.jsonl", "step-00000006.jsonl"]


def test_the_resolved_configuration_is_a_recipe(braid):
    """Passed back verbatim, it finds the run finished and adds nothing."""
    before = (braid.folder / "ccdd" / "metrics.jsonl").read_bytes()
    done = braid("pretrain", "ccdd/config.yaml")
    assert "resumed from step 6" in done.stdout
    assert (braid.folder / "ccdd" / "metrics.jsonl").read_bytes() == before


def test_evaluate_writes_what_it_prints(braid):
    done = braid("evaluate", "ccdd", "--metrics", "bound,entropy", "--sequences", 5, "--draws", 3, "--samples", 3)
    result = json.loads((braid.folder / "ccdd" / "evaluation.json").read_text())
    bound, off, joint, published = result["figures"]
    assert published["name"] == "published" and not published["is_bound"]
    assert bound["name"] == "token_bound" and bound["is_bound"] and joint["name"] == "joint_nelbo"
    assert off["name"] == "token_bound_latents_off" and off["is_bound"]
    assert f"{bound['value']:.4f}" in done.stdout and bound["label"] in done.stdout
    assert result["num_tokens"] == 5 * 32 and result["draws"] == 3 and result["bytes_are_exact"]
    assert bound["perplexity"] == pytest.approx(math.exp(bound["value"]))
    bits = bound["value"] * result["num_tokens"] / math.log(2) / result["num_bytes"]
    assert bound["bits_per_byte"] == pytest.approx(bits)
    assert 0 < result["unigram_entropy"]["value"] < math.log(300)
    assert result["samples"]["entropy"] > 0

    braid("evaluate", "ccdd", "--sequences", 5, "--draws", 3, "--batch-size", 2, "--json", "again.json")
    again = json.loads((braid.folder / "again.json").read_text())["figures"][0]["value"]
    assert again == pytest.approx(bound["value"], rel=1e-6)


def test_evaluate_of_an_exact_likelihood_draws_once(braid):
    braid("evaluate", "ar", "--sequences", 5, "--draws", 3)
    result = json.loads((braid.folder / "ar" / "evaluation.json").read_text())
    assert result["draws"] == 1
    assert "t_range" not in result, "each figure has a range of its own, and its note says it"
    assert [figure["name"] for figure in result["figures"]] == ["nll"]


def test_samples_with_a_prefix_and_gaps(braid):
    braid("sample", "ccdd", "--num", 3, "--prompt", "The red fox", "--steps", 4, "--output", "prefix.jsonl")
    texts = [line["text"] for line in lines(braid.folder / "prefix.jsonl")]
    assert len(texts) == 3 and all(text.startswith("The red fox") for text in texts)
    braid("sample", "ar", "--num", 2, "--prompt", "The red fox", "--output", "ar.jsonl")
    assert all(line["text"].startswith("The red fox") for line in lines(braid.folder / "ar.jsonl"))
    (braid.folder / "gaps.jsonl").write_text('{"text": "The red [[3]] looks"}\n\n{"text": "[[2]] says hello"}\n')
    braid("sample", "ccdd", "--num", 2, "--infill", "gaps.jsonl", "--steps", 4, "--output", "gaps_out.jsonl")
    records = lines(braid.folder / "gaps_out.jsonl")
    assert len(records) == 4
    assert all(r["text"].startswith("The red ") and " looks" in r["text"] for r in records[:2])
    assert all(" says hello" in r["text"] for r in records[2:])
    assert all(r["network_calls"] == 4 and len(r["tokens"]) == 32 for r in records)


def test_samples_do_not_depend_on_the_batch(braid):
    for size, name in ((4, "a.jsonl"), (1, "b.jsonl")):
        braid("sample", "ccdd", "--num", 4, "--steps", 4, "--batch-size", size, "--output", name)
    assert (braid.folder / "a.jsonl").read_bytes() == (braid.folder / "b.jsonl").read_bytes()


@pytest.mark.parametrize(
    "words, says",
    [
        (["sample", "nowhere"], "neither a run directory nor a checkpoint"),
        (["sample", "ccdd", "--prompt", "very long " * 50], "does not fit into a row"),
        (["sample", "ccdd", "--infill", "missing.jsonl"], "cannot read the infill file"),
        (["sample", "ar", "--infill", "bad.jsonl"], "line 1"),
        (["sample", "ccdd", "--steps", "0", "--top-p", "2"], "--top-p = 2.0 must lie in (0, 1]"),
        (["evaluate", "ccdd", "--metrics", "beauty"], "unknown metric"),
        (["evaluate", "ccdd", "--data", "nowhere"], "nowhere"),
        (["evaluate", "ccdd", "--draws", "1000"], "too many draws"),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_explained(braid, words, says):
    (braid.folder / "bad.jsonl").write_text("not json\n")
    done = braid(*words, code=2)
    assert says in done.stderr


def test_the_report_shows_the_run(braid):
    braid("evaluate", "ccdd", "--sequences", 5)
    braid("report", "ccdd", "--compare", "ar")
    page = (braid.folder / "ccdd" / "report.html").read_text()
    assert "token bound, latents from visible tokens only" in page
