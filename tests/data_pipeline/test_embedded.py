from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from braid.data_pipeline.embedded import EmbeddedCorpus
from braid.data_pipeline.splitting import choose_split
from braid.kernels.errors import InputError


@pytest.fixture(scope="module")
def corpus() -> EmbeddedCorpus:
    return EmbeddedCorpus()


@pytest.fixture(scope="module")
def pieces(corpus):
    return list(corpus.pieces())


def test_there_are_megabytes_of_text(corpus, pieces):
    assert 5e6 < corpus.total_bytes == sum(piece.num_bytes for piece in pieces) == corpus.position
    assert all(piece.num_bytes == len(piece.text.encode()) > 0 and piece.last for piece in pieces)
    documents = [piece.document for piece in pieces]
    assert len(set(documents)) == len(documents) > 500
    assert [piece[:3] for piece in pieces] == [(number, 0, 0) for number in range(len(pieces))]


def test_documents_are_what_they_are_called(pieces):
    texts = {piece.document: piece.text for piece in pieces}
    assert "def dumps(obj, *, skipkeys=False" in texts["json:source"]
    assert "json.dumps\n\nSerialize ``obj`` to a JSON formatted ``str``." in texts["json:docstrings"]
    assert "def dumps(" not in texts["json:docstrings"]
    assert '"with"' in texts["topic:with"]


def test_nothing_from_outside_the_library_and_no_tests(pieces):
    groups = {piece.group for piece in pieces}
    assert {"json", "asyncio", "argparse"} <= groups
    assert not {"site-packages", "dist-packages", "test", "encodings", "numpy", "pytest", "pydoc_data"} & groups
    assert not [piece.document for piece in pieces if ".test." in piece.document or "_sysconfigdata" in piece.document]


def test_a_package_is_one_group(pieces):
    of_email = {piece.group for piece in pieces if piece.document.startswith(("email.", "email:"))}
    assert of_email == {"email"}


def test_no_group_in_both_splits(corpus):
    split = choose_split(corpus, 0.05)
    groups, sizes = {"train": set(), "validation": set()}, {"train": 0, "validation": 0}
    for name, piece in split.assign(corpus.pieces()):
        groups[name].add(piece.group)
        sizes[name] += piece.num_bytes
    assert groups["train"] and groups["validation"] and not groups["train"] & groups["validation"]
    assert 0.02 < sizes["validation"] / corpus.total_bytes < 0.10


def test_same_in_another_process_and_nothing_is_imported(corpus):
    program = (
        "import json, sys; from braid.data_pipeline.embedded import EmbeddedCorpus; corpus = EmbeddedCorpus();"
        "print(json.dumps([corpus.describe(), [m for m in ('this', 'antigravity', 'idlelib', 'turtle', 'tkinter')"
        " if m in sys.modules]]))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert json.loads(done.stdout) == [corpus.describe(), []]


def test_reading_starts_where_asked(corpus, pieces):
    assert list(corpus.pieces(first_file=len(pieces) - 3)) == pieces[-3:]


def test_broken_files_are_passed_over(tmp_path):
    long = 'def f():\n    """Explains."""\n' + "# padding\n" * 60_000
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text(long)
    (tmp_path / "latin.py").write_bytes("# -*- coding: latin-1 -*-\nx = 'é'\n".encode("latin-1"))
    (tmp_path / "broken.py").write_bytes(b"'\xff'\n")
    (tmp_path / "syntax.py").write_text("def (:\n")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "surrogate.py").write_text('"""Has \\ud800 in it."""\n')
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text(long)
    texts = {piece.document: piece.text for piece in EmbeddedCorpus(tmp_path).pieces()}
    assert set(texts) == {"a:docstrings", "a:source", "b:docstrings", "b:source", "latin:source"} | {
        "surrogate:docstrings", "surrogate:source"
    }  # fmt: skip
    assert texts["a:docstrings"] == "a.f\n\nExplains.\n"
    assert "é" in texts["latin:source"] and "\\ud800" in texts["surrogate:docstrings"]


def test_python_without_its_library(tmp_path):
    with pytest.raises(InputError, match="without the source of its standard library") as caught:
        EmbeddedCorpus(tmp_path).describe()
    assert str(tmp_path) in caught.value.found and "--input" in caught.value.change
