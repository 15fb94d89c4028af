from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from refused import error

from braid.data_pipeline.readers import TextFiles, documents

pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
feather = pytest.importorskip("pyarrow.feather")
TEXTS = [f"{text} {i}" for i in range(300) for text in ("one\nline two\n", "  zwei, ünï 語 🙂", "drei")]


def write(table, path: Path) -> Path:
    """`stream.arrow` is an IPC stream, other .arrow files are IPC files."""
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=100)
    elif path.suffix == ".feather":
        feather.write_feather(table, str(path), compression="zstd")
    else:
        new = pyarrow.ipc.new_stream if path.stem == "stream" else pyarrow.ipc.new_file
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.feather", "a.arrow", "stream.arrow"])
@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_one_document_a_row(tmp_path, name, kind):
    column = pyarrow.array(TEXTS)
    column = column.dictionary_encode() if kind == "dictionary" else column.cast(kind)
    path = write(pyarrow.table({"n": list(range(len(TEXTS))), "body": column}), tmp_path / name)
    source = TextFiles([path], text_field="body")
    found = [(piece.document, piece.text, source.position) for piece in source.pieces()]
    assert [entry[:2] for entry in found] == [(f"{name}#{i}", text) for i, text in enumerate(TEXTS)]
    positions = [position for *_, position in found]
    assert positions == sorted(positions) and positions[-1] <= source.total_bytes == source.position


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "stream.arrow"])
def test_pairs(tmp_path, name):
    table = pyarrow.table({"target": TEXTS[::-1], "other": TEXTS, "source": TEXTS})
    pieces = list(TextFiles([write(table, tmp_path / name)], pair_fields=("source", "target")).pieces())
    assert [piece.text for piece in pieces[::2]] == TEXTS and [piece.text for piece in pieces[1::2]] == TEXTS[::-1]


def test_other_columns_of_an_arrow_file_are_not_made_into_objects(tmp_path):
    wide = pyarrow.table({"text": ["x"] * 2000, "image": [b"y" * 10_000] * 2000})  # 20 MB
    path = write(wide, tmp_path / "a.arrow")
    tracemalloc.start()
    assert len(list(documents([path]))) == 2000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6


def test_a_saved_dataset_is_a_folder_of_texts(tmp_path):
    write(pyarrow.table({"text": TEXTS}), tmp_path / "stream.arrow").rename(tmp_path / "data-00000-of-00001.arrow")
    (tmp_path / "state.json").write_text("{}")
    (tmp_path / "dataset_info.json").write_text("{}")
    source = TextFiles([tmp_path])
    assert source.names == ["data-00000-of-00001.arrow"] and source.num_ignored == 2


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "stream.arrow"])
def test_errors(tmp_path, name):
    path = write(pyarrow.table({"body": ["x", None], "n": [1, 2]}), tmp_path / name)
    missing = error(path)
    assert "no column `text`" in missing and "columns: body, n" in missing
    assert f"{name}, row 2: field `body` is not text" in error(path, text_field="body")
    assert "row 1: field `n` is not text" in error(path, text_field="n")
    kind = "parquet" if name == "a.parquet" else "Arrow"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert f"not a readable {kind} file" in error(path, text_field="body")
    path.write_bytes(b"nothing of the kind")
    assert f"not a readable {kind} file" in error(path, text_field="body")


def test_parquet_without_pyarrow(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    program = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from braid.data_pipeline.readers import documents\n"
        "list(documents([sys.argv[1]]))"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "a.parquet")], capture_output=True, text=True)
    assert (
        "a.parquet cannot be read: pyarrow is needed here" in done.stderr
        and "pip install 'braid-lm[parquet]'" in done.stderr
    )
