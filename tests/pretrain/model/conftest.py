"""bfloat16 on the CPU, and corpora prepared from a few documents."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from braid.data_pipeline.prepare import prepare


@pytest.fixture(scope="session")
def prepare_documents() -> Callable[..., Path]:
    """prepare_documents(folder, documents, tokenizer="bytes"): the folder, now a prepared corpus."""

    def make(folder: Path, documents: list[str], tokenizer: str | Path = "bytes") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        source = folder.with_name(folder.name + ".jsonl")
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        prepare([source], tokenizer, folder, progress=False)
        return folder

    return make
