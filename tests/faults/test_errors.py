"""What users get wrong, and training that fails: a message with what to change, an exit code, no traceback."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
from small_corpus import build, texts
from training_runs import (
    Trainers,
    assert_outcome,
    assert_refused,
    assert_same_bits,
    checkpoints,
    has_lines,
    last_checkpoint,
    steps_of,
)

from braid.data_pipeline.tokenizers import train_bpe
from braid.pretrain.training.outcome import read_outcome


@pytest.fixture(scope="module")
def other_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of the same text, of another tokenizer."""
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer = train_bpe(texts(30, 60), 280)
    for split in ("train", "validation"):
        build(folder, texts(60, 90, seed=1), split=split, tokenizer=tokenizer)
    return folder


@pytest.fixture
def trained(trainers: Trainers, tmp_path: Path) -> Path:
    trainers.train("tiny_mdlm", "run", training__steps=6)
    return tmp_path / "run"


# -- the command line and the configuration -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tiny_mdml"], ["tiny_mdml", "tiny_mdlm"]),
        (["no/such/recipe.yaml"], ["no/such/recipe.yaml"]),
        (["tiny_mdlm", "training.step=9"], ["training.step", r"training\.steps"]),
        (["tiny_mdlm", "trainig.steps=9"], ["trainig", "training"]),
        (["tiny_mdlm", "objective.latent_sigma=1"], [r"objective\.latent_sigma", "ccdd|mdlm"]),
        (["tiny_mdlm", "training.steps=many"], [r"training\.steps", "many"]),
        (["tiny_mdlm", "training.steps=2.5"], [r"training\.steps", r"2\.5"]),
        (["tiny_mdlm", "run.deterministic=perhaps"], [r"run\.deterministic", "perhaps"]),
        (["tiny_mdlm", "training.steps"], ["training.steps", "key=value|="]),
        (["tiny_mdlm", "run.device=abacus"], [r"run\.device", "abacus", "auto, cpu"]),
        (
            ["tiny_mdlm", "training.global_batch_size=10", "training.micro_batch_size=4", "model.num_heads=3",
             "optimizer.beta1=1.5", "data.packing=tight"],
            ["global_batch_size", "num_heads", r"optimizer\.beta1 = 1\.5", "data.packing = 'tight'"],
        ),
        ([], ["needs a recipe", "tiny_mdlm"]),
    ],
)  # fmt: skip
def test_a_wrong_configuration_is_refused_at_once(trainers: Trainers, tmp_path: Path, words: list, said: list) -> None:
    assert_refused(trainers.braid("pretrain", *words), 2, *said)
    assert [path for path in tmp_path.iterdir() if not path.name.startswith("process-")] == [], "nothing was written"


# -- the data -----------------------------------------------------------------------------------------------------


def test_no_data(trainers: Trainers, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for path in ("missing", "empty", "file", "file/below"):
        process = trainers.start("tiny_mdlm", "run", data__path=path)
        assert_refused(process, 2, f"{path} is not a prepared corpus", "braid prepare", run_dir=tmp_path / "run")


def test_a_corpus_whose_tokenizer_was_exchanged(
    trainers: Trainers, corpus: Path, other_tokenizer: Path, tmp_path: Path
) -> None:
    trainers.corpus = tmp_path / "corpus"
    shutil.copytree(corpus, trainers.corpus)
    shutil.rmtree(trainers.corpus / "tokenizer")
    shutil.copytree(other_tokenizer / "tokenizer", trainers.corpus / "tokenizer")
    assert_refused(trainers.start("tiny_mdlm", "run"), 2, "tokenizer mismatch", "hash", run_dir=tmp_path / "run")


def test_less_data_than_a_batch(trainers: Trainers, tmp_path: Path) -> None:
    process = trainers.start("tiny_mdlm", "run", training__global_batch_size=128)
    assert_refused(process, 5, "fewer rows than one global batch", "120 rows", run_dir=tmp_path / "run")
    process = trainers.start("tiny_mdlm", "run", data__sequence_length=4000)
    assert_refused(process, 5, "shorter than one row", run_dir=tmp_path / "run")


# -- a run directory that is of something else ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model__width": 24}, ["of another run or model", r"weight: checkpoint \(\d+, 16\), this run \(\d+, 24\)"]),
        ({"model__num_layers": 2}, [r"blocks\.1\..* only in this run", r"and \d+ more tensors"]),
        ({"objective__name": "ar"}, ["objective: checkpoint mdlm, this run ar"]),
        ({"run__seed": 5}, ["seed: checkpoint 0, this run 5"]),
        ({"data__sequence_length": 20}, ["sequence_length differs", "checkpoint 16, this run 20"]),
        ({"training__ema_decay": 0.5, "checkpoint__resume": "never"}, ["already holds checkpoints", "resume=auto"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_checkpoint_that_does_not_fit(
    trainers: Trainers, trained: Path, fields: dict[str, object], said: list[str]
) -> None:
    before, config = last_checkpoint(trained), (trained / "config.yaml").read_bytes()
    metrics = (trained / "metrics.jsonl").read_bytes()
    assert_refused(trainers.start("tiny_mdlm", "run", training__steps=9, **fields), 2, *said)
    assert_same_bits(last_checkpoint(trained), before)
    assert (trained / "config.yaml").read_bytes() == config and (trained / "metrics.jsonl").read_bytes() == metrics


def test_another_tokenizer_or_corpus_than_the_checkpoints(
    trainers: Trainers, trained: Path, other_tokenizer: Path, tmp_path: Path
) -> None:
    process = trainers.braid("evaluate", "run", "--data", other_tokenizer, "--device", "cpu")
    said = ("another tokenizer than the model's", r"corpus \w+ \(\d+ ids\), model \w+ \(\d+ ids\)", "prepare the text")
    assert_refused(process, 2, *said)
    trainers.corpus = other_tokenizer
    process = trainers.start("tiny_mdlm", "run", training__steps=9)
    assert_refused(process, 2, "tokenizer_hash: checkpoint", run_dir=trained)
    trainers.corpus = tmp_path / "similar"
    for split in ("train", "validation"):
        build(trainers.corpus, texts(60, 90, seed=3), split=split)
    process = trainers.start("tiny_mdlm", "run", training__steps=9)
    assert_refused(process, 2, "data cannot be continued: fingerprint differs", run_dir=trained)


@pytest.mark.parametrize("command", ["sample", "evaluate", "report"])
def test_no_run_to_look_at(trainers: Trainers, tmp_path: Path, command: str) -> None:
    (tmp_path / "empty").mkdir()
    for path in ("missing", "empty"):
        options = ["--num", 1, "--output", "samples.jsonl"] if command == "sample" else []
        assert_refused(trainers.braid(command, path, *options), 2, path)


# -- places --------------------------------------------------------------------------------------------------------


def test_a_run_directory_that_cannot_be(trainers: Trainers, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for ranks, run in ((1, "file"), (1, "file/far/below"), (2, "file/below")):
        for process in trainers.start_ranks(ranks, "tiny_mdlm", run):
            assert_refused(process, 2, f"the run folder {run} cannot be written", "choose another run.dir")
    assert (tmp_path / "file").read_text() == "mine"


def test_two_trainers_in_one_run_directory(trainers: Trainers, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    first = trainers.start("tiny_mdlm", "run", training__steps=10**6)
    first.wait_until(lambda: has_lines(run_dir))
    second = trainers.start("tiny_ar", "run")
    assert_refused(second, 2, "another process is writing the run in run", f"held by process {first.pid} on ")
    assert read_outcome(run_dir) is None, "the run that goes on has not ended"
    lines = steps_of(run_dir)
    first.wait_until(lambda: len(steps_of(run_dir)) > len(lines))
    first.signal(signal.SIGTERM)
    assert_refused(first, 3, run_dir=run_dir)
    assert "name: mdlm" in (run_dir / "config.yaml").read_text()
    steps = steps_of(run_dir)
    assert steps == list(range(4, steps[-1] + 1, 4)), "one writer"


# -- training that fails -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_gradient_that_is_not_finite(trainers: Trainers, trained: Path, ranks: int) -> None:
    before = last_checkpoint(trained)
    options = {"training__steps": 40, "optimizer__lr": 1e30}
    for process in trainers.start_ranks(ranks, "tiny_mdlm", "run", **options):
        assert_refused(process, 4, r"the gradient is not finite at step \d+; the weights were left as they were",
                       "token_loss", r"lower optimizer\.lr", run_dir=trained)  # fmt: skip
    assert checkpoints(trained) == [6]
    assert_same_bits(last_checkpoint(trained), before)
    assert assert_outcome(trained, 4)["step"] in (7, 8)
    trainers.train("tiny_mdlm", "run", training__steps=8, ranks=ranks)  # as the message says
    assert last_checkpoint(trained).step == 8


def test_every_line_of_the_metrics_is_json_and_finite(trainers: Trainers, tmp_path: Path) -> None:
    """A loss that overflows is written as null, not as NaN, which no JSON reader takes."""
    process = trainers.start("tiny_mdlm", "run", optimizer__lr=1e30, training__log_every=1, training__steps=40)
    assert_refused(process, 4, run_dir=tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert lines and all(json.loads(line, parse_constant=pytest.fail) for line in lines)


def test_an_interrupted_start_leaves_nothing_half(trainers: Trainers, tmp_path: Path) -> None:
    """Told to stop while a model is being built that takes seconds: there is nothing to save yet."""
    process = trainers.start("tiny_mdlm", "run", model__width=512, model__num_layers=32, model__num_heads=8)
    process.wait_until(lambda: (tmp_path / "run" / "checkpoints").exists())
    before = process.cpu_seconds()
    process.wait_until(lambda: process.cpu_seconds() > before + 0.3)
    process.signal(signal.SIGINT)
    assert_refused(process, 130, "braid: interrupted", run_dir=tmp_path / "run")
    assert checkpoints(tmp_path / "run") == []
    trainers.train("tiny_mdlm", "run", training__steps=5)
