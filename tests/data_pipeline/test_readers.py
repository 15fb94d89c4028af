from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import xxhash
import zstandard
from refused import error

from braid.data_pipeline import compression, readers
from braid.data_pipeline.readers import TextFiles, documents

TEXTS = ["one\nline two\n", "  zwei, ünï 語 🙂", "three\r\n\r\n\tdrei"]
COMPRESS = {".gz": gzip.compress, ".zst": zstandard.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def write_jsonl(path: Path, texts=TEXTS, field="text") -> Path:
    content = "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)).encode()
    return write(path, content)


def write(path: Path, content: bytes) -> Path:
    """Compressed as the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(content))
    return path


# --- what is read ---


@pytest.mark.parametrize(
    "ending", [".jsonl", *(f".jsonl{ending}" for ending in COMPRESS), ".JSONL", ".json", ".json.gz"]
)
def test_json_lines(tmp_path, ending):
    path = write_jsonl(tmp_path / f"a{ending}")
    assert list(documents([path])) == [(f"a{ending}#{i}", text) for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize("ending", [".txt", *(f".txt{ending}" for ending in COMPRESS)])
def test_a_text_file_is_one_document(tmp_path, ending):
    path = write(tmp_path / f"a{ending}", "\n".join(TEXTS).encode())
    assert list(documents([path])) == [(f"a{ending}#0", "\n".join(TEXTS))]


def test_separator(tmp_path):
    path = write(tmp_path / "a.txt", b"first\n<|end|>\n\n<|end|>second\nhere<|end|>third")
    # The blank document between the first two separators is left out; its number is not given to another.
    assert list(documents([path], separator="<|end|>")) == [
        ("a.txt#0", "first\n"),
        ("a.txt#2", "second\nhere"),
        ("a.txt#3", "third"),
    ]


def test_separators_on_every_offset_of_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr(compression, "BLOCK", 7)
    monkeypatch.setattr(readers, "PIECE_BYTES", 11)
    texts = ["x" * n + "\n" * (n % 3) + "ü" * (n % 5) + "y" for n in range(40)]
    path = write(tmp_path / "a.txt", "\n\n\n".join(texts).encode())
    assert [text for _, text in documents([path], separator="\n\n\n")] == texts


def test_byte_order_mark_is_dropped(tmp_path):
    first = write(tmp_path / "a.txt", b"\xef\xbb\xbfhello")
    second = write(tmp_path / "b.jsonl", b"\xef\xbb\xbf" + b'{"text": "world"}')
    assert [text for _, text in documents([first, second])] == ["hello", "world"]


def test_several_frames_and_members(tmp_path):
    line = b'{"text": "hi"}\n'
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(line * 3) + zstandard.compress(line * 2))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(line * 3) + gzip.compress(line * 2))
    (tmp_path / "c.jsonl.bz2").write_bytes(bz2.compress(line * 3) + bz2.compress(line * 2))
    assert [len(list(documents([path]))) for path in sorted(tmp_path.iterdir())] == [5, 5, 5]


def test_long_lines_are_joined_over_blocks(tmp_path):
    texts = ["語" * 400_000, "short", "x" * 700_000]
    assert [text for _, text in documents([write_jsonl(tmp_path / "a.jsonl", texts)])] == texts


# --- which files, in which order ---


def test_folders_are_walked_in_sorted_order(tmp_path):
    for name in ("b/2.txt", "b/10.txt", "a.jsonl", "c.txt.gz", ".hidden/x.txt", "b/.x.txt"):
        write_jsonl(tmp_path / name) if "jsonl" in name else write(tmp_path / name, b"text")
    write(tmp_path / "b" / "image.png", b"?")
    source = TextFiles([tmp_path])
    assert source.names == ["a.jsonl", "c.txt.gz", "b/10.txt", "b/2.txt"]
    assert source.num_ignored == 1


def test_files_patterns_and_folders_together_each_once(tmp_path, monkeypatch):
    for name in ("x/1.txt", "x/2.txt", "y/1.txt"):
        write(tmp_path / name, name.encode())
    monkeypatch.chdir(tmp_path)
    source = TextFiles(["y/1.txt", "x/*.txt", tmp_path / "x"])
    assert source.names == ["y/1.txt", "x/1.txt", "x/2.txt"]
    assert [document for document, _ in documents(["**/1.txt"])] == ["x/1.txt#0", "y/1.txt#0"]


def test_ids_and_description_do_not_depend_on_where_the_files_lie(tmp_path):
    def described(root: Path):
        write_jsonl(root / "data" / "a.jsonl")
        write(root / "data" / "sub" / "b.txt", b"text")
        return TextFiles([root / "data"]).describe(), [name for name, _ in documents([root / "data"])]

    here, there = described(tmp_path / "here"), described(tmp_path / "far" / "away")
    assert here == there
    content = (tmp_path / "here" / "data" / "sub" / "b.txt").read_bytes()
    assert here[0][1] == {"name": "sub/b.txt", "bytes": 4, "xxh3": xxhash.xxh3_64_hexdigest(content)}


# --- pieces ---


def test_a_long_document_comes_in_pieces_cut_at_line_ends(tmp_path):
    lines = [f"line {i} " + "ü" * (i % 90) + "\n" for i in range(40_000)]
    path = write(tmp_path / "a.txt", "".join(lines).encode())
    source = TextFiles([path])
    pieces = list(source.pieces())
    assert "".join(piece.text for piece in pieces) == "".join(lines)
    assert len(pieces) == -(-path.stat().st_size // readers.PIECE_BYTES) == pieces[-1].part + 1
    assert all(piece.text.endswith("\n") and piece.num_bytes <= readers.PIECE_BYTES for piece in pieces[:-1])
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert sum(piece.num_bytes for piece in pieces) == path.stat().st_size == source.position


@pytest.mark.parametrize("character", ["x", "語", "🙂"])
def test_a_document_without_line_ends_is_cut_between_characters(tmp_path, character):
    text = character * (3_000_000 // len(character.encode()))
    pieces = list(TextFiles([write(tmp_path / "a.txt", text.encode())]).pieces())
    assert "".join(piece.text for piece in pieces) == text and len(pieces) == 3


def test_pieces_from_a_later_file_on(tmp_path):
    paths = [write_jsonl(tmp_path / f"{i}.jsonl") for i in range(3)]
    everything = list(TextFiles(paths).pieces())
    assert list(TextFiles(paths).pieces(1)) == [piece for piece in everything if piece.file >= 1]
    assert [piece[:3] for piece in everything] == sorted(piece[:3] for piece in everything)


@pytest.mark.parametrize("ending", [".txt", ".txt.zst", ".jsonl", ".jsonl.gz", ".jsonl.bz2", ".json"])
def test_memory_does_not_grow_with_the_file(tmp_path, ending):
    words = np.random.default_rng(0).integers(97, 123, (1000, 7), dtype=np.uint8)
    words[:, -1] = ord(" ")
    texts = words[np.random.default_rng(1).integers(0, 1000, (500, 3000))]
    path = write(tmp_path / f"a{ending}", b"".join(b'{"text": "%s"}\n' % text.tobytes() for text in texts))  # 10 MB
    if ending == ".json":
        path.write_bytes(b"[" + b",".join(path.read_bytes().splitlines()) + b"]")
    tracemalloc.start()
    total = sum(piece.num_bytes for piece in TextFiles([path]).pieces())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total > 10e6 and peak < 6e6


# --- what is wrong ---


def test_paths(tmp_path):
    assert "does not exist" in error(tmp_path / "no.txt")
    assert "matches no file" in error(f"{tmp_path}/*.txt")
    assert "there is no input" in error()
    strange = error(write(tmp_path / "a.pdf", b"x"))
    assert "`.pdf`" in strange and ".jsonl" in strange and ".zst" in strange
    (tmp_path / "folder").mkdir()
    assert "0 files" in error(tmp_path / "folder")
    write(tmp_path / "folder" / "image.png", b"x")
    nothing = error(tmp_path / "folder")
    assert "holds nothing readable" in nothing and ".png" in nothing and ".parquet" in nothing


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", b""), ("a.txt", b" \n\n "), ("a.txt.gz", b""), ("a.jsonl", b"\n\n"), ("a.jsonl", b'{"text": " "}\n')],
)
def test_files_without_text(tmp_path, name, content):
    message = error(write(tmp_path / name, content))
    assert name in message and ("is empty" in message or "holds no text" in message)


def test_links_to_nowhere(tmp_path):
    (tmp_path / "a.txt").symlink_to(tmp_path / "gone.txt")
    assert "a.txt cannot be read" in error(tmp_path)


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_not_utf8_names_line_and_byte(tmp_path, ending):
    path = write(tmp_path / f"a.txt{ending}", b"good\nline\nbad \xff here\n")
    message = error(path)
    assert f"a.txt{ending}, line 3: not UTF-8" in message and "byte 0xff, 14 bytes into the text" in message
    path = write(tmp_path / f"b.jsonl{ending}", b'{"text": "good"}\n{"text": "b\xe9"}\n')
    message = error(path)
    assert f"b.jsonl{ending}, line 2: not UTF-8" in message and "byte 0xe9, 11 bytes into the line" in message


def test_not_utf8_far_into_a_file(tmp_path):
    content = b"0123456789\n" * 300_000
    bad = 2_500_003
    path = write(tmp_path / "a.txt", content[:bad] + b"\x80" + content[bad + 1 :])
    assert f"line {bad // 11 + 1}: not UTF-8" in (message := error(path)) and f"{bad} bytes into" in message


def test_utf16_is_recognised(tmp_path):
    message = error(write(tmp_path / "a.txt", "hello".encode("utf-16")))
    assert "looks like UTF-16" in message and "iconv -f UTF-16" in message


def test_json_errors_name_the_line(tmp_path):
    def message(second: str, **options) -> str:
        path = write(tmp_path / "a.jsonl", b'{"text": "good"}\n' + second.encode() + b'\n{"text": "good"}\n')
        found = error(path, **options)
        assert "a.jsonl, line 2" in found
        return found

    assert "not valid JSON" in message('{"text": "cut')
    assert "not valid JSON" in message('{"text": "two"} {"text": "objects"}')
    assert "not valid JSON" in message("[" * 100_000)
    assert "not a JSON object" in message('["text"]')
    missing = message('{"body": "x", "id": 3}')
    assert "no field `text`" in missing and "fields: body, id" in missing and "--text-field" in missing
    assert "is not text" in (null := message('{"text": null}')) and "NoneType" in null
    assert "list" in message('{"text": ["a"]}')
    assert "U+D83D" in message(r'{"text": "half \ud83d of a pair"}')


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.txt.bz2", "a.txt.xz", "a.jsonl.gz", "a.jsonl.zst"])
def test_cut_off_compressed_files(tmp_path, name):
    line = (json.dumps({"text": "words"}) + "\n").encode()
    path = write(tmp_path / name, b"".join(line + b"%d " % i * ("txt" in name) for i in range(20_000)))
    whole = path.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2):
        path.write_bytes(whole[:length])
        assert f"{name} cannot be decompressed to its end" in error(path)
    path.write_bytes(b"this was never compressed")
    assert f"{name} cannot be decompressed" in error(path)


def test_damaged_gzip_is_detected(tmp_path):
    path = write(tmp_path / "a.txt.gz", bytes(range(32, 127)) * 5000)
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # in the checksum of the content
    path.write_bytes(content)
    assert "cannot be decompressed to its end" in error(path)


def test_empty_separator(tmp_path):
    assert "separator is empty" in error(write(tmp_path / "a.txt", b"x"), separator="")
