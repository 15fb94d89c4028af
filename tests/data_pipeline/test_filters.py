from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from test_prepare import error, num_journal_lines, start, stored_documents, tree, wait_for

from braid.data_pipeline import filters as filters_module
from braid.data_pipeline import readers
from braid.data_pipeline.filters import FILTERS_FILE, FilteredSource, Filters
from braid.data_pipeline.prepare import prepare
from braid.data_pipeline.readers import TextFiles, documents
from braid.data_pipeline.workers import Workers

SMALL = {"row_tokens": 500, "shard_bytes": 8192, "progress": False}


def write_texts(folder: Path, num_documents: int = 600, num_files: int = 3, seed: int = 0) -> Path:
    """Texts of which about a third repeats an earlier one, often of another file."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    fresh = ["".join(rng.choice(list("abü語 \n"), 1 + rng.poisson(rng.exponential(150)))) + "." for _ in range(400)]
    texts = [fresh[rng.integers(len(fresh))] for _ in range(num_documents)]
    for k in range(num_files):
        part = texts[k * num_documents // num_files : (k + 1) * num_documents // num_files]
        (folder / f"{k}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    return folder


def naive(texts: list[str], shortest: int, longest: int, accepts=lambda text: True) -> tuple[list[str], dict[str, int]]:
    kept, counts = {}, {"too_short": 0, "too_long": 0, "duplicate": 0, "filter": 0}
    refused = set()
    for text in texts:
        size = len(text.encode())
        if size < shortest or size > longest:
            counts["too_short" if size < shortest else "too_long"] += 1
        elif text in kept or text in refused:
            counts["duplicate"] += 1
        elif not accepts(text):
            counts["filter"] += 1
            refused.add(text)
        else:
            kept[text] = None
    return list(kept), counts


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture
def my_filters(tmp_path, monkeypatch) -> str:
    """The name of a module whose folder is on the path, of this process and of its children."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "my_filters.py").write_text(
        "import os\n"
        "def few_spaces(text): return text.count(' ') * 5 < len(text)\n"
        "def broken(text): return 1 / ('ü' not in text)\n"
        "def score(text): return 0.5\n"
        "def differ(source, target): return source != target\n"
        "def elsewhere(text): return os.getpid() != int(os.environ['PARENT'])\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "modules")
    yield "my_filters"
    sys.modules.pop("my_filters", None)
    filters_module._function.cache_clear()


def kept_texts(source: FilteredSource, first_file: int = 0) -> list[str]:
    return [piece.text for piece in source.pieces(first_file)]


def test_equals_the_naive_way_with_any_number_of_processes(texts, my_filters, tmp_path, monkeypatch):
    import my_filters as module

    chosen = Filters(40, 400, True, f"{my_filters}:few_spaces")
    expected, counts = naive([text for _, text in documents([texts])], 40, 400, module.few_spaces)
    assert min(counts.values()) > 20 and len(expected) > 100
    monkeypatch.setattr(filters_module, "BATCH_DOCUMENTS", 7)
    for workers in (1, 3):
        output = tmp_path / f"{workers}"
        manifest = prepare([texts], "bytes", output, filters=chosen, workers=workers, **SMALL)
        assert manifest["left_out"] == counts
        assert sorted(stored_documents(output, "train") + stored_documents(output, "validation")) == sorted(expected)
    assert tree(tmp_path / "1") == tree(tmp_path / "3")
    assert not (tmp_path / "1" / FILTERS_FILE).exists()
    stored = {name: manifest["settings"][name] for name in ("min_bytes", "max_bytes", "deduplicate", "filter")}
    assert stored == {"min_bytes": 40, "max_bytes": 400, "deduplicate": True, "filter": "my_filters:few_spaces"}


def test_the_function_runs_in_the_processes(texts, my_filters, tmp_path, monkeypatch):
    import os

    monkeypatch.setenv("PARENT", str(os.getpid()))
    chosen = Filters(filter=f"{my_filters}:elsewhere")
    manifest = prepare([texts], "bytes", tmp_path / "corpus", filters=chosen, workers=2, **SMALL)
    assert manifest["left_out"]["filter"] == 0
    assert "the filters leave no document" in error([texts], "bytes", tmp_path / "none", filters=chosen)


def test_without_filters_nothing_is_counted(texts, tmp_path):
    manifest = prepare([texts], "bytes", tmp_path / "corpus", **SMALL)
    assert "left_out" not in manifest and "deduplicate" not in manifest["settings"]


def test_long_documents_are_judged_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "PIECE_BYTES", 100)
    line = "x" * 59 + "\n"
    texts = [line * 5 + "one", line * 5 + "two", line * 5 + "one", line * 20, line * 5, "short"]
    (tmp_path / "a.txt").write_text("|".join(texts))

    def kept(**limits) -> list[str]:
        source = TextFiles([tmp_path / "a.txt"], separator="|")
        parts = list(FilteredSource(source, Filters(**limits), Workers(1), None).pieces())
        whole = "".join(piece.text + "|" * piece.last for piece in parts)
        return whole.split("|")[:-1]

    assert kept(deduplicate=True) == [text for i, text in enumerate(texts) if i != 2]
    assert kept(min_bytes=301) == texts[:4]
    assert kept(max_bytes=303) == [text for text in texts if len(text) <= 303]
    assert kept(max_bytes=5) == ["short"]


def test_pairs_stay_or_go_together(tmp_path, my_filters):
    pairs = [
        ("ab", "c"),
        ("a", "bc"),
        ("ab", "c"),
        ("", "abc"),
        ("same", "same"),
        ("x", ""),
        ("long" * 9, "y"),
        ("ab", "d"),
    ]
    lines = [json.dumps({"source": source, "target": target}) + "\n" for source, target in pairs]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    source = TextFiles([tmp_path / "a.jsonl"], pair_fields=("source", "target"))
    chosen = Filters(2, 20, True, f"{my_filters}:differ")
    filtered = FilteredSource(source, chosen, Workers(1), None)
    found = kept_texts(filtered)
    assert list(zip(found[::2], found[1::2], strict=True)) == [pairs[i] for i in (0, 1, 3, 7)]
    assert filtered.left_out() == {"too_short": 1, "too_long": 1, "duplicate": 1, "filter": 1}


@pytest.mark.parametrize("num_passes", [0, 1])
@pytest.mark.parametrize("torn", [0, 5, 17])
def test_verdicts_outlive_the_process(texts, tmp_path, torn, num_passes, monkeypatch):
    """A pass that stopped in the middle, or a whole one; the end of the file may be torn."""
    chosen = Filters(min_bytes=20, deduplicate=True)
    expected = kept_texts(FilteredSource(TextFiles([texts]), chosen, Workers(1), None))
    last = kept_texts(FilteredSource(TextFiles([texts]), chosen, Workers(1), None), 0)[-20:]
    first = FilteredSource(TextFiles([texts]), chosen, Workers(1), tmp_path)
    pieces = first.pieces()
    while piece := next(pieces, None):
        if not num_passes and piece.file == 2:
            break
    first.sync()
    path = tmp_path / FILTERS_FILE
    path.write_bytes(path.read_bytes()[: path.stat().st_size - torn])
    again = FilteredSource(TextFiles([texts]), chosen, Workers(1), tmp_path, goes_on=True)
    assert kept_texts(again, 1)[-20:] == last
    assert kept_texts(again) == expected
    counts = again.left_out()
    # What is known is not judged again.
    monkeypatch.setattr(FilteredSource, "_read", None)
    known = FilteredSource(TextFiles([texts]), chosen, Workers(1), tmp_path, goes_on=True)
    assert kept_texts(known) == expected and known.left_out() == counts
    assert kept_texts(FilteredSource(TextFiles([texts]), chosen, Workers(1), tmp_path, goes_on=True), 1 << 62) == []
    known.remove()
    assert not path.exists()


def test_killed_and_continued(tmp_path):
    texts = write_texts(tmp_path / "texts", 15_000, num_files=20)
    chosen, options = Filters(min_bytes=10, deduplicate=True), {"row_tokens": 1000, "shard_bytes": 4000}
    expected = prepare([texts], "train:300", tmp_path / "once", filters=chosen, progress=False, **options)
    assert expected["left_out"]["duplicate"] > 10_000
    output = tmp_path / "killed"
    arguments = {"inputs": [str(texts)], "tokenizer": "train:300", "output": str(output), "workers": 2, **options}
    for wanted in (1, 5, 9):  # lines of the journal: what is prepared, the plan, the shards
        child = start(tmp_path, **arguments, filters=chosen.settings())
        wait_for(lambda: num_journal_lines(output) >= wanted or child.poll() is not None)  # noqa: B023
        child.kill()
        _, err = child.communicate(timeout=60)
        assert child.returncode == -signal.SIGKILL, err or "it was finished before it could be killed"
    other = Filters(min_bytes=11, deduplicate=True)
    assert "min_bytes was 10, now 11" in error([texts], "train:300", output, filters=other, **options)
    out, err = start(tmp_path, **arguments, filters=chosen.settings()).communicate(timeout=120)
    assert out == "finished\n" and "going on after" in err, err
    assert tree(output) == tree(tmp_path / "once")


def test_what_is_wrong(texts, my_filters, tmp_path):
    def message(**options) -> str:
        return error([texts], "bytes", tmp_path / "corpus", filters=Filters(**options))

    assert "impossible --min-bytes" in message(min_bytes=0)
    assert "--min-bytes 9, --max-bytes 8" in message(min_bytes=9, max_bytes=8)
    assert "the filters leave no document" in message(min_bytes=10**6)
    assert "PYTHONPATH" in message(filter="no_such_module:f")
    assert "no attribute 'f'" in message(filter="my_filters:f")
    assert "there is no --filter my_filters" in message(filter="my_filters")
    assert "is no function" in message(filter="my_filters:number")
    failed = message(filter="my_filters:broken")
    assert "--filter my_filters:broken failed on 0.jsonl#" in failed and "ZeroDivisionError" in failed
    assert "gave no bool for 0.jsonl#0" in message(filter="my_filters:score")
    broken = Filters(filter="my_filters:broken")
    assert "ZeroDivisionError" in error([texts], "bytes", tmp_path / "corpus", filters=broken, workers=2)
    # What such a preparation leaves behind is no part of the next.
    assert (tmp_path / "corpus" / FILTERS_FILE).exists()
    prepare([texts], "bytes", tmp_path / "corpus", **SMALL)
    prepare([texts], "bytes", tmp_path / "other", **SMALL)
    assert tree(tmp_path / "corpus") == tree(tmp_path / "other")


def test_command(texts, tmp_path, run_braid):
    words = ("prepare", "--input", texts, "--tokenizer", "bytes", "--output", "out")
    done = run_braid(*words, "--min-bytes", 40, "--deduplicate")
    assert done.returncode == 0, done.stderr
    _, counts = naive([text for _, text in documents([texts])], 40, 10**9)
    total = counts["too_short"] + counts["duplicate"]
    line = next(line for line in done.stdout.splitlines() if "left out" in line)
    assert (
        line.split()
        == f"left out {total} documents {counts['too_short']} too short, {counts['duplicate']} repeated".split()
    )
    again = run_braid(*words, "--min-bytes", 40)
    assert again.returncode == 2 and "deduplicate was True, now None" in again.stderr
    assert run_braid("prepare", "--embedded", "--output", "e", "--max-bytes", 9).returncode == 2
