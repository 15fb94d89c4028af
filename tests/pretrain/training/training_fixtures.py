"""A small corpus, prepared once, trainers that work on it as processes, and what has to be compiled for some."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import _get_build_directory

sys.path.append(str(Path(__file__).parents[2] / "data_pipeline"))

from small_corpus import build, texts  # noqa: E402
from training_runs import Trainers  # noqa: E402

ROWS = 120
"""Training rows of 16 tokens: an epoch is 15 global batches of 8."""


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bytes in several shards: `ROWS` training rows, and about as many for validation."""
    folder = tmp_path_factory.mktemp("corpus")
    text = "".join(texts(60, 60, seed=1)).encode()[: 14 * ROWS - 20].decode(errors="ignore")
    documents = [text[start : start + 90] for start in range(0, len(text), 90)]
    while sum(len(document.encode()) + 1 for document in documents) < 14 * ROWS + 3:
        documents[-1] += "."
    build(folder, documents, shard_bytes=1 << 9)
    build(folder, texts(20, 60, seed=2), split="validation")
    return folder


@pytest.fixture
def trainers(corpus: Path, tmp_path: Path):
    started = Trainers(corpus, tmp_path)
    yield started
    started.close()


@pytest.fixture(scope="session")
def asynchronous_io() -> None:
    """What DeepSpeed writes to a disk with, compiled once. A process that compiled it was killed."""
    builder = pytest.importorskip("deepspeed.ops.op_builder").AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        pytest.skip("libaio is not installed")
    Path(_get_build_directory(builder.name, verbose=False), "lock").touch()
    code = "from braid.parallel.deepspeed_disk import compile_writing; compile_writing()"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"DS_ACCELERATOR": "cpu"}, timeout=600)
