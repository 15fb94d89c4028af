"""Files that are the validation split; that a preparation with such is continued after a kill is in test_prepare."""

from __future__ import annotations

import json

from test_prepare import SMALL, error, stored_documents, write_texts

from braid.data_pipeline.filters import Filters
from braid.data_pipeline.prepare import prepare
from braid.data_pipeline.readers import documents


def test_files_for_validation(tmp_path):
    texts = write_texts(tmp_path / "texts", 100)
    inputs, apart = [texts / "1.jsonl", texts / "long.txt"], [texts / "0.jsonl"]
    prepare(inputs, "train:400", tmp_path / "out", validation=apart, **SMALL)
    assert stored_documents(tmp_path / "out", "train") == [text for _, text in documents(inputs)]
    assert stored_documents(tmp_path / "out", "validation") == [text for _, text in documents(apart)]
    prepare(inputs, "train:400", tmp_path / "out", validation=apart, **SMALL)  # finished
    assert "validation" in error(inputs, "train:400", tmp_path / "out")
    assert "for training and for validation" in error([texts], "bytes", tmp_path / "x", validation=apart)
    assert "0.1" in error(inputs, "bytes", tmp_path / "x", validation=apart, validation_fraction=0.1)
    # What training has seen says nothing about what it has learnt.
    (tmp_path / "twice.jsonl").write_text((texts / "0.jsonl").read_text() + json.dumps({"text": "new"}) + "\n")
    twice = {"validation": [tmp_path / "twice.jsonl"], "filters": Filters(deduplicate=True)}
    prepare([texts / "0.jsonl"], "bytes", tmp_path / "leaked", **twice, **SMALL)
    assert stored_documents(tmp_path / "leaked", "validation") == ["new"]
