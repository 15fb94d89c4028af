from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from braid.data_pipeline import compression
from braid.data_pipeline import estimate as estimate_module
from braid.data_pipeline.filters import Filters
from braid.data_pipeline.prepare import estimate, prepare
from braid.kernels.errors import InputError


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Plain and compressed files of different texts and sizes, more of them than are sampled."""
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    words = np.array(["".join(rng.choice(list("abcdefghijklmnop"), rng.integers(1, 9))) for _ in range(500)])
    for k in range(24):
        texts = [" ".join(rng.choice(words, 1 + rng.poisson(40 + k))) for _ in range(150 + 10 * k)]
        lines = "".join(json.dumps({"text": text, "n": k}) + "\n" for text in texts).encode()
        name, content = (f"{k:02}.jsonl.gz", gzip.compress(lines)) if k % 2 else (f"{k:02}.jsonl", lines)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("read_bytes", [1 << 22, 30_000])
def test_is_near_to_what_preparing_gives(texts, tmp_path, monkeypatch, read_bytes):
    """With the whole of the sampled files, and with a part of each."""
    monkeypatch.setattr(estimate_module, "READ_BYTES", read_bytes)
    monkeypatch.setattr(compression, "BLOCK", 4096)
    found = estimate([texts], "train:400", tmp_path / "corpus")
    assert list(tmp_path.iterdir()) == []
    manifest = prepare([texts], "train:400", tmp_path / "corpus", progress=False)
    total = {
        name: sum(split[name] for split in manifest["splits"].values()) for name in ("documents", "tokens", "bytes")
    }
    for name, value in (("documents", found.documents), ("tokens", found.tokens), ("bytes", found.text_bytes)):
        assert abs(value / total[name] - 1) < 0.1, name
    stored = [path for path in (tmp_path / "corpus").rglob("*") if path.is_file() and "tokenizer" not in str(path)]
    assert abs(found.output_bytes / sum(path.stat().st_size for path in stored) - 1) < 0.1
    assert found.files == 24 and found.sampled_files == 16 and found.sampled_bytes > 16 * 20_000
    assert found.input_bytes == sum(path.stat().st_size for path in texts.iterdir())
    assert found.seconds > 0 and found.cores == 1
    disk = os.statvfs(tmp_path)
    assert abs(found.free_bytes - disk.f_bavail * disk.f_frsize) < 1e9


def test_filters_count(texts, tmp_path):
    half = Filters(min_bytes=260)
    found = estimate([texts], "bytes", tmp_path / "corpus", filters=half)
    manifest = prepare([texts], "bytes", tmp_path / "corpus", filters=half, progress=False)
    total = sum(split["tokens"] for split in manifest["splits"].values())
    assert manifest["left_out"]["too_short"] > 1000 and abs(found.tokens / total - 1) < 0.1


def test_the_time_goes_down_with_processes_as_far_as_there_are_cores(texts, tmp_path):
    assert estimate([texts], "bytes", tmp_path / "corpus", workers=500).cores == len(os.sched_getaffinity(0))


def test_errors(texts, tmp_path):
    for options, said in (({"filters": Filters(min_bytes=10**6)}, "leave no document"), ({"workers": 0}, "workers")):
        with pytest.raises(InputError, match=said):
            estimate([texts], "bytes", tmp_path / "corpus", **options)


def test_command(tmp_path, run_braid):
    pairs = [json.dumps({"source": f"source {i}", "target": f"target {i}"}) + "\n" for i in range(50)]
    (tmp_path / "a.jsonl").write_text("".join(pairs))
    words = ("prepare", "--input", "a.jsonl", "--tokenizer", "bytes", "--output", "out/corpus", "--dry-run")
    done = run_braid(*words, "--pairs")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("dry run: nothing is written\n") and not (tmp_path / "out").exists()
    said = {line[2:13].strip(): line[13:] for line in done.stdout.splitlines()[1:]}
    assert said["inputs"] == f"1 files, {(tmp_path / 'a.jsonl').stat().st_size / 1e6:,.1f} MB"
    assert said["pairs"] == "about 50" and said["tokens"] == "about 880, 1.00 bytes each"
    assert set(said) == {"inputs", "pairs", "text", "tokens", "output", "free disk", "time", "sample"}
    assert run_braid(*words).returncode == 2  # no field `text`
    assert run_braid("prepare", "--embedded", "--output", "e", "--dry-run").returncode == 2
