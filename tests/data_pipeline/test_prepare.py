from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from braid.data_pipeline.corpus import TokenCorpus
from braid.data_pipeline.prepare import prepare, prepare_embedded
from braid.data_pipeline.readers import documents
from braid.data_pipeline.tokenizers import load_tokenizer
from braid.kernels.errors import InputError

SMALL = {"row_tokens": 500, "shard_bytes": 8192, "progress": False}
JOURNAL = "prepare.journal"


def write_texts(folder: Path, num_documents: int, mean_words: int = 60, seed: int = 0) -> Path:
    """Two .jsonl files and a .txt file of random words, with documents of very different lengths."""
    rng = np.random.default_rng(seed)
    words = np.array(["".join(rng.choice(list("abcdefgéü語🙂 \n"), rng.integers(1, 9))) for _ in range(500)])
    texts = [" ".join(rng.choice(words, 1 + rng.poisson(rng.exponential(mean_words)))) for _ in range(num_documents)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "long.txt").write_text(" ".join(rng.choice(words, 20 * mean_words)), encoding="utf-8")
    for number in range(2):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[number::2]]
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def stored_documents(folder: Path, split: str) -> list[str]:
    corpus = TokenCorpus.open(folder, split)
    stream = corpus.read(0, corpus.num_stream_tokens)
    parts = groupby(stream.tolist(), lambda token: token == corpus.eos_id)
    return [corpus.tokenizer.decode(list(tokens)) for is_end, tokens in parts if not is_end]


def error(*arguments, **options) -> str:
    with pytest.raises(InputError) as caught:
        prepare(*arguments, **({"progress": False} | options))
    assert caught.value.change
    return str(caught.value)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"), 400)


@pytest.fixture(scope="module")
def once(texts, tmp_path_factory) -> Path:
    """The texts prepared in one go by one process."""
    output = tmp_path_factory.mktemp("once") / "corpus"
    prepare([texts], "train:400", output, **SMALL)
    return output


# --- what is written ---


def test_the_stored_documents_are_the_documents(texts, once):
    expected = [text for _, text in documents([texts])]
    train, validation = stored_documents(once, "train"), stored_documents(once, "validation")
    assert len(train) + len(validation) == len(expected) == 401 and len(set(expected)) == len(expected)
    assert sorted(train + validation) == sorted(expected)
    assert train == [text for text in expected if text in set(train)]  # in the order of the input
    assert 0.02 < len(validation) / len(expected) < 0.09


def test_manifest(texts, once):
    manifest = json.loads((once / "manifest.json").read_bytes())
    tokenizer = load_tokenizer(once / "tokenizer")
    assert manifest["version"] == 1 and manifest["dtype"] == "uint16" and manifest["vocab_size"] == 400
    assert manifest["tokenizer_hash"] == tokenizer.hash
    assert [source["name"] for source in manifest["sources"]] == ["0.jsonl", "1.jsonl", "long.txt"]
    assert manifest["settings"]["tokenizer"] == "train:400"
    assert set(manifest["versions"]) == {"braid-lm", "tokenizers"}
    total = 0
    for split in ("train", "validation"):
        corpus, counts = TokenCorpus.open(once, split), manifest["splits"][split]
        found = stored_documents(once, split)
        assert counts["documents"] == corpus.num_documents == len(found)
        assert counts["bytes"] == sum(len(text.encode()) for text in found)
        assert counts["tokens"] == sum(map(len, tokenizer.encode_batch(found)))
        assert counts["rows"] == -(-counts["tokens"] // SMALL["row_tokens"])
        assert counts["fingerprint"] == corpus.fingerprint
        total += counts["bytes"]
    assert total == sum(len(text.encode()) for _, text in documents([texts]))
    assert not (once / JOURNAL).exists()
    assert len(list((once / "train").glob("shard.*.mds"))) > 3


def test_twice_gives_the_same_bytes_even_from_another_place(texts, once, tmp_path):
    copied = tmp_path / "elsewhere"
    copied.mkdir()
    for path in texts.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    prepare([copied], "train:400", tmp_path / "again", **SMALL)
    assert tree(tmp_path / "again") == tree(once)


def test_processes_change_nothing(texts, once, tmp_path, monkeypatch):
    from braid.data_pipeline import tokenising

    monkeypatch.setattr(tokenising, "BATCH_BYTES", 5000)  # many batches in flight
    prepare([texts], "train:400", tmp_path / "three", workers=3, **SMALL)
    assert tree(tmp_path / "three") == tree(once)


def test_large_vocabularies_are_stored_in_four_bytes(texts, tmp_path):
    load_tokenizer("bytes").save(tmp_path / "wide")
    path = tmp_path / "wide" / "tokenizer.json"
    definition = json.loads(path.read_text())
    definition["model"]["vocab"] = {token: 300 * i for token, i in definition["model"]["vocab"].items()}
    path.write_text(json.dumps(definition))
    (tmp_path / "wide" / "braid_tokenizer.json").unlink()
    manifest = prepare([texts / "0.jsonl"], tmp_path / "wide", tmp_path / "corpus", progress=False)
    assert manifest["dtype"] == "uint32" and manifest["vocab_size"] > 65_536
    found = stored_documents(tmp_path / "corpus", "train") + stored_documents(tmp_path / "corpus", "validation")
    assert sorted(found) == sorted(text for _, text in documents([texts / "0.jsonl"]))


def test_a_row_holds_64_kib_by_default(texts, tmp_path):
    prepare([write_texts(tmp_path / "texts", 300)], "bytes", tmp_path / "corpus", progress=False)
    assert np.load(tmp_path / "corpus" / "train" / "rows.npy")[0, 0] == 32_768


def test_one_text_file_is_split_at_a_line(tmp_path, capsys):
    text = "".join(f"line number {i}\n" for i in range(3000))
    (tmp_path / "a.txt").write_text(text)
    prepare([tmp_path / "a.txt"], "bytes", tmp_path / "corpus")
    assert "there is only one document" in capsys.readouterr().err
    (train,), (validation,) = (stored_documents(tmp_path / "corpus", split) for split in ("train", "validation"))
    assert train + validation == text and train.endswith("\n")
    assert abs(len(validation) / len(text) - 0.05) < 0.001


def test_a_single_long_document_is_cut_and_continued(tmp_path, monkeypatch):
    from braid.data_pipeline import readers

    monkeypatch.setattr(readers, "PIECE_BYTES", 4096)
    text = "".join(f"line number {i}\n" for i in range(6000))
    (tmp_path / "a.txt").write_text(text)
    prepare([tmp_path / "a.txt"], "bytes", tmp_path / "corpus", validation_fraction=0.3, **SMALL)
    (train,), (validation,) = (stored_documents(tmp_path / "corpus", split) for split in ("train", "validation"))
    assert train + validation == text


def test_separator_and_text_field(tmp_path):
    (tmp_path / "a.txt").write_text("one|two|three|four")
    (tmp_path / "b.jsonl").write_text('{"body": "five"}\n')
    prepare(tmp_path.glob("*.[tj]*"), "bytes", tmp_path / "c", separator="|", text_field="body", progress=False)
    found = stored_documents(tmp_path / "c", "train") + stored_documents(tmp_path / "c", "validation")
    assert sorted(found) == sorted(["one", "two", "three", "four", "five"])


def test_tokenizer_is_trained_on_training_text_only(tmp_path):
    texts = [f"{'common words ' * 20}{i}" for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    share = {"validation_fraction": 0.01, "progress": False}  # one document
    prepare([tmp_path / "a.jsonl"], "bytes", tmp_path / "first", **share)
    held_out = set(stored_documents(tmp_path / "first", "validation"))
    marked = [text + " zyzzyva" * 50 if text in held_out else text for text in texts]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in marked))
    prepare([tmp_path / "a.jsonl"], "train:300", tmp_path / "second", **share)
    assert " zyzzyva" in stored_documents(tmp_path / "second", "validation")[0]
    vocabulary = json.loads((tmp_path / "second" / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    assert "Ġcommon" in vocabulary and not any("zy" in token for token in vocabulary)


def test_text_that_quotes_special_tokens_does_not_end_documents(tmp_path):
    texts = [f"{i} ends<|endoftext|>here <|mask|><|pad|>" for i in range(50)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([tmp_path / "a.jsonl"], "train:300", tmp_path / "corpus", progress=False)
    found = stored_documents(tmp_path / "corpus", "train") + stored_documents(tmp_path / "corpus", "validation")
    assert sorted(found) == sorted(texts)


# --- running again ---


def test_a_finished_folder_is_left_alone(texts, once, capsys):
    before = {path: path.stat().st_mtime_ns for path in once.rglob("*")}
    manifest = prepare([texts], "train:400", once, **(SMALL | {"progress": True}))
    assert manifest == json.loads((once / "manifest.json").read_bytes())
    assert "is already prepared" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in once.rglob("*")} == before


def test_a_finished_folder_of_something_else_is_refused(texts, once):
    assert "tokenizer was 'train:400', now 'train:401'" in error([texts], "train:401", once, **SMALL)
    changed = SMALL | {"validation_fraction": 0.1}
    assert "validation_fraction was 0.05, now 0.1" in error([texts], "train:400", once, **changed)
    assert "input long.txt is gone" in error([texts / "0.jsonl", texts / "1.jsonl"], "train:400", once, **SMALL)


def test_folders_that_are_no_corpus_are_refused(texts, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    message = error([texts], "bytes", tmp_path)
    assert "is not empty" in message and "thesis.tex" in message
    (tmp_path / "manifest.json").write_text('{"name": "a web application"}')
    assert "not of a corpus" in error([texts], "bytes", tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    assert "is damaged" in error([texts], "bytes", tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


CHILD = """
import json, sys
from braid.data_pipeline import tokenising
from braid.data_pipeline.filters import Filters
from braid.data_pipeline.prepare import prepare
tokenising.BATCH_BYTES = 20_000
if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    prepare(**options | {"filters": Filters(**options.get("filters", {}))})
    print("finished")
"""


def start(tmp_path: Path, **options) -> subprocess.Popen:
    """A process of its own that prepares with these options. A file, because its workers import the main module."""
    (tmp_path / "child.py").write_text(CHILD)
    command = [sys.executable, str(tmp_path / "child.py"), json.dumps(options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def num_journal_lines(output: Path) -> int:
    path = output / JOURNAL
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


@pytest.mark.parametrize(("workers", "kills", "format"), [(1, 5, "mds"), (2, 2, "mds"), (1, 2, "wds"), (1, 2, "flat")])
def test_killed_at_random_moments_and_continued(tmp_path, workers, kills, format):
    texts = write_texts(tmp_path / "texts", 1000, mean_words=120)
    options = {"row_tokens": 1000, "shard_bytes": 8000, "format": format, "inputs": [str(texts)]}
    if format == "flat":
        options |= {"inputs": [str(texts / name) for name in ("0.jsonl", "long.txt")]}
        options |= {"validation": [str(texts / "1.jsonl")]}
    prepare(tokenizer="train:300", output=tmp_path / "once", progress=False, **options)
    num_shards = len(list((tmp_path / "once").rglob("shard.*")))
    assert num_shards > 60

    output = tmp_path / "killed"
    arguments = {"tokenizer": "train:300", "output": str(output), "workers": workers, **options}
    randomly = random.Random(workers)
    finished = 0  # lines in the journal: what is prepared, the plan, the shards
    for number in range(kills):
        child = start(tmp_path, **arguments)
        # The first is killed while the tokenizer is made, the others after a few more shards and a moment.
        wanted = finished + randomly.randrange(2, 9) if number else 1
        wait_for(lambda: num_journal_lines(output) >= wanted or child.poll() is not None)  # noqa: B023
        time.sleep(randomly.uniform(0, 0.02))
        child.kill()
        _, err = child.communicate(timeout=60)
        assert child.returncode == -signal.SIGKILL, err or "it was finished before it could be killed"
        assert not (output / "manifest.json").exists()
        assert num_journal_lines(output) >= finished  # what is finished stays so
        finished = num_journal_lines(output)
    assert finished > 2 + kills
    out, err = start(tmp_path, **arguments).communicate(timeout=60)
    assert out == "finished\n" and f"going on after {finished - 2} finished shards" in err, err
    assert tree(output) == tree(tmp_path / "once")


def test_finished_shards_are_not_written_again(tmp_path):
    texts = write_texts(tmp_path / "texts", 1500, mean_words=150)
    output = tmp_path / "corpus"
    options = {"tokenizer": "train:300", "output": str(output), "row_tokens": 1000, "shard_bytes": 12_000}
    child = start(tmp_path, inputs=[str(texts)], **options)
    wait_for(lambda: num_journal_lines(output) >= 12 or child.poll() is not None)
    child.kill()
    child.communicate()
    assert (output / JOURNAL).exists()
    finished = [json.loads(line) for line in (output / JOURNAL).read_bytes().splitlines() if line.endswith(b"}")][2:]
    paths = [output / record["split"] / record["shard"]["raw_data"]["basename"] for record in finished]
    before = [path.stat().st_mtime_ns for path in paths]
    tokenizer_before = (output / "tokenizer" / "tokenizer.json").stat().st_mtime_ns
    assert len(paths) >= 10

    # Something else cannot be put on top of it.
    assert "tokenizer was 'train:300', now 'train:301'" in error([texts], **(options | {"tokenizer": "train:301"}))
    changed = texts / "1.jsonl"
    content = changed.read_bytes()
    changed.write_bytes(content + b'{"text": "more"}\n')
    message = error([texts], **options)
    assert "input 1.jsonl is changed" in message and f"delete {output}" in message
    changed.write_bytes(content)

    prepare([texts], progress=False, **options)
    assert [path.stat().st_mtime_ns for path in paths] == before
    assert (output / "tokenizer" / "tokenizer.json").stat().st_mtime_ns == tokenizer_before


def test_processes_die_with_their_parent(tmp_path):
    texts = write_texts(tmp_path / "texts", 1500, mean_words=150)
    output = tmp_path / "corpus"
    options = {"tokenizer": "train:300", "output": str(output), "row_tokens": 1000, "shard_bytes": 12_000}
    child = start(tmp_path, inputs=[str(texts)], workers=2, **options)
    try:
        wait_for(lambda: num_journal_lines(output) >= 3 or child.poll() is not None)
        listed = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    finally:
        child.kill()
        child.communicate()
    assert len(listed) >= 2
    wait_for(lambda: not any(is_running(int(pid)) for pid in listed), seconds=10)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_worker_that_dies_is_an_error_not_a_hang(tmp_path):
    texts = write_texts(tmp_path / "texts", 1500, mean_words=150)
    output = tmp_path / "corpus"
    options = {"tokenizer": "train:300", "output": str(output), "row_tokens": 1000, "shard_bytes": 12_000}
    child = start(tmp_path, inputs=[str(texts)], workers=2, **options)
    wait_for(lambda: num_journal_lines(output) >= 3 or child.poll() is not None)
    for pid in Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split():
        if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(int(pid), signal.SIGKILL)
    _, err = child.communicate(timeout=60)
    assert child.returncode != 0 and "a tokenising process died" in err and "--workers" in err


# --- errors ---


def test_impossible_options(texts, tmp_path):
    for share in (0, 1, -0.5, 1.5):
        assert "impossible --validation-fraction" in error([texts], "bytes", tmp_path / "x", validation_fraction=share)
    assert "impossible workers" in error([texts], "bytes", tmp_path / "x", workers=0)
    assert "impossible row_tokens" in error([texts], "bytes", tmp_path / "x", row_tokens=0)
    assert "write train:8192" in error([texts], "train:many", tmp_path / "x")
    assert "too small for a byte-level BPE" in error([texts], "train:100", tmp_path / "x")
    assert "there is no tokenizer" in error([texts], tmp_path / "nothing", tmp_path / "x")
    assert "does not exist" in error([tmp_path / "nothing"], "bytes", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_after_an_error_in_the_input_the_same_folder_serves(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n{"text": 3}\n')
    assert "line 3" in error([path], "bytes", tmp_path / "corpus")
    path.write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    prepare([path], "bytes", tmp_path / "corpus", progress=False)
    found = stored_documents(tmp_path / "corpus", "train") + stored_documents(tmp_path / "corpus", "validation")
    assert sorted(found) == ["one", "three", "two"]


def test_a_split_without_text(tmp_path):
    # Two documents, one of which the tokenizer makes nothing of.
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1, "</s>": 2}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Replace("z", "")
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.jsonl").write_text('{"text": "a a a"}\n{"text": "zz"}\n')
    message = error([tmp_path / "a.jsonl"], tmp_path / "tokenizer.json", tmp_path / "corpus")
    assert "no text came into the" in message and "--validation-fraction" in message


def test_output_that_cannot_be_written(texts, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in error([texts], "bytes", tmp_path / "file" / "corpus")
    assert "cannot be written" in error([texts], "bytes", tmp_path / "file")
    if os.geteuid() == 0:
        return  # nothing is forbidden to root
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "cannot be written" in error([texts], "bytes", tmp_path / "closed" / "corpus")


def test_no_space_left(tmp_path):
    """A limit on the size of files stands for a full disk: the write itself fails, in the middle of a shard."""
    texts = write_texts(tmp_path / "texts", 1500, mean_words=150)
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
        "from braid.data_pipeline import tokenising; tokenising.BATCH_BYTES = 20_000\n"
        "from braid.data_pipeline.prepare import prepare\n"
        "prepare([sys.argv[1]], 'bytes', sys.argv[2], row_tokens=1000, shard_bytes=100_000)"
    )
    command = [sys.executable, "-c", limited, str(texts), str(tmp_path / "corpus")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "InputError: no space left to write" in done.stderr
    missing = re.search(r"MB free, about ([\d.]+) MB more needed", done.stderr)
    assert missing and 0.5 < float(missing[1]) < 5 and "goes on where it stopped" in done.stderr
    prepare([texts], "bytes", tmp_path / "corpus", row_tokens=1000, shard_bytes=100_000, progress=False)
    assert stored_documents(tmp_path / "corpus", "train")


# --- the command ---


def test_command(texts, tmp_path, run_braid):
    words = ("prepare", "--input", texts / "*.jsonl", texts / "long.txt", "--tokenizer", "train:400", "--output", "out")
    done = run_braid(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("prepared out\n") and "next: braid pretrain own_text data.path=out" in done.stdout
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    train = manifest["splits"]["train"]
    line = next(line for line in done.stdout.splitlines() if line.strip().startswith("train"))
    assert f"{train['documents']:,} documents" in line and f"{train['tokens']:,} tokens" in line
    assert f"{train['bytes'] / train['tokens']:.2f} bytes each" in line
    again = run_braid(*words)
    assert again.returncode == 0 and again.stdout == done.stdout and "is already prepared" in again.stderr


def test_command_understands_escapes_in_the_separator(tmp_path, run_braid):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\nthree")
    done = run_braid("prepare", "--input", "a.txt", "--tokenizer", "bytes", "--output", "out", "--separator", r"\n\n")
    assert done.returncode == 0, done.stderr
    assert len(stored_documents(tmp_path / "out", "train")) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "one of --input and --embedded is needed"),
        (("--embedded", "--input", "a.txt"), "one of --input and --embedded is needed"),
        (("--input", "a.txt"), "which tokenizer?"),
        (("--input", "a.txt", "--vocab-size", "500"), "train:500"),
        (("--input", "a.txt", "--tokenizer", "bytes", "--vocab-size", "500"), "--vocab-size goes with --embedded"),
        (("--embedded", "--tokenizer", "bytes", "--vocab-size", "500"), "--vocab-size is for a tokenizer trained here"),
        (("--embedded", "--separator", "x"), "neither text field nor separator"),
        (("--embedded", "--vocab-size", "0"), "too small for a byte-level BPE"),
        (("--embedded", "--validation", "a.txt"), "nor files for validation"),
        (("--input", "a.txt", "--tokenizer", "bytes"), "the input a.txt does not exist"),
    ],
)
def test_command_says_what_is_wrong(tmp_path, words, said, monkeypatch, capsys):
    from braid.launch.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "--output", "out", *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_interrupted_command_says_how_to_go_on(tmp_path):
    texts = write_texts(tmp_path / "texts", 3000, mean_words=150)
    words = ["prepare", "--input", str(texts), "--tokenizer", "train:400", "--output", "out", "--workers", "2"]
    child = subprocess.Popen(
        [sys.executable, "-m", "braid.launch.cli", *words],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: num_journal_lines(tmp_path / "out") >= 2 or child.poll() is not None)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: every process of the group gets it
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert "the same command goes on where it stopped" in err and "Traceback" not in err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_embedded(tmp_path):
    manifest = prepare_embedded(tmp_path / "corpus", tokenizer="bytes", progress=False)
    assert manifest["sources"][0]["name"].startswith("standard library of Python 3")
    train, validation = (manifest["splits"][name] for name in ("train", "validation"))
    assert train["bytes"] > 4e6 and 0.02 < validation["bytes"] / train["bytes"] < 0.11
    found = stored_documents(tmp_path / "corpus", "validation")
    assert len(found) == validation["documents"] and sum(len(text.encode()) for text in found) == validation["bytes"]


@pytest.mark.slow
def test_embedded_with_its_own_tokenizer_twice(tmp_path, run_braid):
    first, second = (run_braid("prepare", "--embedded", "--output", name) for name in ("first", "second"))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "512 ids" in first.stdout
    assert tree(tmp_path / "first") == tree(tmp_path / "second")
