"""Ids that others have made: every kind of store, beside megatron-core's own reader, and what is refused."""

from __future__ import annotations

import json
import struct
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from small_corpus import texts

from braid.data_pipeline import token_stores, tokenising
from braid.data_pipeline.corpus import TokenCorpus
from braid.data_pipeline.prepare import prepare_tokens
from braid.data_pipeline.token_stores import MegatronStore, TokenFiles
from braid.data_pipeline.tokenizers import load_tokenizer, train_bpe
from braid.kernels.errors import InputError

TEXTS = texts(300, 60)
SMALL = {"row_tokens": 500, "shard_bytes": 8192, "progress": False}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_bpe(TEXTS, 330).save(folder)
    return folder


@pytest.fixture(scope="module")
def ids(tokenizer) -> list[list[int]]:
    return [document.tolist() for document in load_tokenizer(tokenizer).encode_batch(TEXTS)]


def write_megatron(path: Path, documents: list[list[list[int]]], dtype: type = np.uint16) -> Path:
    """Documents of sequences, as Megatron's IndexedDatasetBuilder lays them out; written here a second time."""
    code = {np.uint16: 8, np.int32: 4, np.int64: 5}[dtype]
    sequences = list(chain(*documents))
    lengths = np.array([len(sequence) for sequence in sequences], np.int32)
    offsets = (np.cumsum(lengths, dtype=np.int64) - lengths) * np.dtype(dtype).itemsize
    entries = np.cumsum([0, *map(len, documents)]).astype(np.int64)
    path.write_bytes(np.array(list(chain(*sequences)), dtype).tobytes())
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(entries))
    path.with_suffix(".idx").write_bytes(header + lengths.tobytes() + offsets.tobytes() + entries.tobytes())
    return path


def write_dataset(path: Path, rows: list[list[int]], files: int = 2, **columns) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    path.mkdir(parents=True)
    names = [f"data-{k:05}-of-{files:05}.arrow" for k in range(files)]
    for k, name in enumerate(names):
        table = pyarrow.table({"input_ids": rows[k::files], **{c: v[k::files] for c, v in columns.items()}})
        with pyarrow.ipc.new_stream(str(path / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=50)
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return path


def read(source: TokenFiles) -> list[list[int]]:
    found, parts = [], []
    for piece in source.pieces():
        parts += piece.ids.tolist()
        if piece.last:
            found.append(parts)
            parts = []
    assert not parts, "the last document ends"
    return found


def open_files(path, tokenizer, **options) -> TokenFiles:
    return TokenFiles([path], load_tokenizer(tokenizer), **options)


def with_eos(ids, tokenizer) -> np.ndarray:
    eos = load_tokenizer(tokenizer).eos_id
    return np.array(list(chain(*([*document, eos] for document in ids))))


# --- each kind of store ---


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("eod", [True, False])
def test_megatron(tmp_path, tokenizer, ids, dtype, eod):
    eos = load_tokenizer(tokenizer).eos_id
    documents = [[document[:3], [], document[3:] + [eos] * eod] for document in ids]
    write_megatron(tmp_path / "a.bin", documents, dtype)
    for path in (tmp_path / "a.bin", tmp_path / "a.idx", tmp_path):
        assert read(open_files(path, tokenizer)) == ids


def test_megatron_core_writes_what_we_read(tmp_path, tokenizer, ids):
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    torch = pytest.importorskip("torch")
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "b.bin"), dtype=np.uint16)
    for document in ids:
        builder.add_document(torch.tensor(document), [min(5, len(document)), max(0, len(document) - 5)])
    builder.finalize(str(tmp_path / "b.idx"))
    documents = [[document[:5], document[5:]] for document in ids]
    write_megatron(tmp_path / "a.bin", documents)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    theirs = indexed_dataset.IndexedDataset(str(tmp_path / "b"))
    ours = [segment.tolist() for segment, _ in MegatronStore(tmp_path / "b.bin").segments()]
    assert ours == [theirs[i].tolist() for i in range(len(theirs))] and len(ours) == 2 * len(ids)
    assert read(open_files(tmp_path / "b.bin", tokenizer)) == ids


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_datatrove(tmp_path, tokenizer, ids, dtype):
    with_eos(ids, tokenizer).astype(dtype).tofile(tmp_path / "a.ds")
    ends = np.cumsum([len(document) + 1 for document in ids])
    ends.astype(np.uint64).tofile(tmp_path / "a.ds.index")
    (tmp_path / "a.ds.metadata").write_text("some/tokenizer\n123\n123 T")
    for path in (tmp_path / "a.ds", tmp_path / "a.ds.index", tmp_path):
        assert read(open_files(path, tokenizer)) == ids


def test_flat(tmp_path, tokenizer, ids, monkeypatch):
    monkeypatch.setattr(token_stores, "PIECE_TOKENS", 7)  # documents over the edges of what is read at a time
    for dtype in ("uint16", "uint32"):
        with_eos(ids, tokenizer)[:-1].astype(dtype).tofile(tmp_path / "a.bin")  # the last document just ends
        assert read(open_files(tmp_path / "a.bin", tokenizer, token_dtype=dtype)) == ids
    with pytest.raises(InputError, match="how wide its ids are"):
        open_files(tmp_path / "a.bin", tokenizer)


def write_litdata(folder: Path, documents: list[list[int]], dtype: type, layout: str, files: int = 3) -> Path:
    """What litdata 0.2.76 writes with its TokensLoader; written here a second time."""
    folder.mkdir()
    chunks = []
    for k in range(files):
        items = documents[k * len(documents) // files : (k + 1) * len(documents) // files]
        lengths = [len(item) * np.dtype(dtype).itemsize for item in items]
        ends = 8 + 4 * len(items) + np.cumsum([0, *lengths])
        content = struct.pack("<I", len(items)) + ends.astype("<u4").tobytes()
        content += np.array(list(chain(*items)), dtype).tobytes()
        name, dim = f"chunk-0-{k}.bin", sum(map(len, items))
        (folder / name).write_bytes(content)
        chunks.append({"chunk_bytes": len(content), "chunk_size": len(items), "dim": dim, "filename": name})
    config = {"compression": None, "data_format": [layout], "encryption": None, "item_loader": "TokensLoader"}
    (folder / "index.json").write_text(json.dumps({"chunks": chunks, "config": config}))
    return folder


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (np.int32, "no_header_tensor:16"),
        (np.int64, "no_header_tensor:18"),
        (np.uint16, "no_header_tensor:20"),
        (np.uint16, "no_header_numpy:5"),
        (np.uint32, "no_header_numpy:6"),
    ],
)
def test_litdata(tmp_path, tokenizer, ids, dtype, layout):
    eos = load_tokenizer(tokenizer).eos_id
    folder = write_litdata(tmp_path / "a", [[*document, eos] for document in ids], dtype, layout)
    assert read(open_files(folder, tokenizer)) == ids
    assert read(open_files(write_litdata(tmp_path / "b", ids, dtype, layout), tokenizer)) == ids


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"compression": "zstd"}, "zstd"),
        ({"encryption": {"algorithm": "fernet"}}, "fernet"),
        ({"data_format": ["no_header_tensor:0"]}, "no_header_tensor:0"),
        ({"data_format": ["jpeg", "int"]}, "ValueError"),
    ],
)
def test_litdata_that_is_not_plain_ids(tmp_path, tokenizer, ids, config, found):
    folder = write_litdata(tmp_path / "a", ids, np.int32, "no_header_tensor:16")
    content = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(content | {"config": content["config"] | config}))
    with pytest.raises(InputError) as caught:
        open_files(folder, tokenizer)
    assert found in caught.value.found


@pytest.mark.parametrize(("dtype", "layout"), [(np.int32, "no_header_tensor:16"), (np.uint16, "no_header_tensor:20")])
def test_litdata_that_is_damaged(tmp_path, tokenizer, ids, dtype, layout):
    """Also where what is there does not divide by the four bytes of an end."""
    small = [document[:3] for document in ids if len(document) >= 3][:33]  # 66 bytes of ids of two bytes in a chunk
    folder = write_litdata(tmp_path / "a", small, dtype, layout)
    whole = (folder / "chunk-0-1.bin").read_bytes()
    (folder / "chunk-0-1.bin").write_bytes(whole[:-4])
    with pytest.raises(InputError, match="chunk-0-1.bin is cut off"):
        open_files(folder, tokenizer)
    for damaged in (b"\x00\x00\x00\x7f" + whole[4:], whole[:8] + b"\xff" + whole[9:]):
        (folder / "chunk-0-1.bin").write_bytes(damaged)
        with pytest.raises(InputError, match="contradicts itself"):
            read(open_files(folder, tokenizer))


def test_datasets(tmp_path, tokenizer, ids):
    write_dataset(tmp_path / "one", ids, attention_mask=[[1] * len(document) for document in ids])
    assert read(open_files(tmp_path / "one", tokenizer)) == ids[::2] + ids[1::2]
    write_dataset(tmp_path / "all" / "train", ids)
    (tmp_path / "all" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(InputError, match="several splits") as caught:
        open_files(tmp_path / "all", tokenizer)
    assert "splits train" in caught.value.found


def test_a_selection_of_rows_is_refused(tmp_path, tokenizer, ids):
    state = write_dataset(tmp_path / "a", ids) / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"_indices_data_files": [{"filename": "i.arrow"}]}))
    with pytest.raises(InputError, match="selection") as caught:
        open_files(tmp_path / "a", tokenizer)
    assert "flatten_indices" in caught.value.change


def test_rows_cut_from_one_text(tmp_path, tokenizer, ids):
    """Rows of equal length say nothing about documents: they end at EOS alone, also over the edge of a file."""
    stream = with_eos(ids, tokenizer)
    rows = [stream[k : k + 64].tolist() for k in range(0, len(stream), 64)]
    write_dataset(tmp_path / "rows", rows, files=1)
    write_megatron(tmp_path / "a.bin", [[row] for row in rows])
    for path in (tmp_path / "rows", tmp_path / "a.bin"):
        assert read(open_files(path, tokenizer, documents="eos")) == ids
        assert len(read(open_files(path, tokenizer))) > len(rows)


def test_special_ids_around_documents_are_left_out(tmp_path, tokenizer):
    bytes_ = load_tokenizer("bytes")
    bos, eos = bytes_.bos_id, bytes_.eos_id
    ends = [] if bos == eos else [bos]
    stream = [eos, *ends, 65, 66, eos, eos, *ends, 67, eos, *ends, eos]
    np.array(stream, np.uint16).tofile(tmp_path / "a.bin")
    assert read(TokenFiles([tmp_path / "a.bin"], bytes_, token_dtype="uint16")) == [[65, 66], [67]]


# --- corpora ---


def stored_documents(folder: Path, split: str) -> list[list[int]]:
    corpus = TokenCorpus.open(folder, split)
    stream = corpus.read(0, corpus.num_stream_tokens)
    ends = np.flatnonzero(stream == corpus.eos_id)
    return [part[part != corpus.eos_id].tolist() for part in np.split(stream, ends + 1)[:-1]]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("format", ["mds", "wds", "flat"])
def test_a_corpus_of_tokens(tmp_path, tokenizer, ids, format):
    write_megatron(tmp_path / "a.bin", [[document] for document in ids])
    stored = prepare_tokens([tmp_path / "a.bin"], tokenizer, tmp_path / "out", format=format, **SMALL)
    train, validation = (stored_documents(tmp_path / "out", split) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(ids) and len(train) > len(validation) > 0
    assert train == [document for document in ids if document in train]  # in the order of the store
    assert sum(split["bytes"] for split in stored["splits"].values()) == sum(len(text.encode()) for text in TEXTS)
    assert [source["name"] for source in stored["sources"]] == ["a.bin", "a.idx"]
    before = tree(tmp_path / "out")
    assert prepare_tokens([tmp_path / "a.bin"], tokenizer, tmp_path / "out", format=format, **SMALL) == stored
    assert tree(tmp_path / "out") == before


def test_a_store_for_validation(tmp_path, tokenizer, ids):
    write_megatron(tmp_path / "a.bin", [[document] for document in ids[:-9]])
    write_megatron(tmp_path / "b.bin", [[document] for document in ids[-9:]])
    prepare_tokens([tmp_path / "a.bin"], tokenizer, tmp_path / "out", validation=[tmp_path / "b.bin"], **SMALL)
    assert stored_documents(tmp_path / "out", "train") == ids[:-9]
    assert stored_documents(tmp_path / "out", "validation") == ids[-9:]
    with pytest.raises(InputError, match="for training and for validation"):
        prepare_tokens([tmp_path / "*.bin"], tokenizer, tmp_path / "x", validation=[tmp_path / "b.bin"], **SMALL)


@pytest.mark.parametrize("stop_after", [1, 60, 150, 290])
def test_interrupted_and_continued_gives_the_same_bytes(tmp_path, tokenizer, ids, monkeypatch, stop_after):
    monkeypatch.setattr(token_stores, "PIECE_TOKENS", 50)
    monkeypatch.setattr(tokenising, "BATCH_BYTES", 300)
    with_eos(ids, tokenizer).astype(np.uint16).tofile(tmp_path / "a.bin")
    options = {"token_dtype": "uint16", "row_tokens": 100, "shard_bytes": 1000, "progress": False}
    prepare_tokens([tmp_path / "a.bin"], tokenizer, tmp_path / "once", **options)
    original = TokenFiles._documents
    reading = []  # passes over the store: the first one decides about the split

    def interrupted(self, number):
        reading.append(number)
        for k, piece in enumerate(original(self, number)):
            if len(reading) == 2 and k == stop_after:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(TokenFiles, "_documents", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare_tokens([tmp_path / "a.bin"], tokenizer, tmp_path / "out", **options)
    assert (tmp_path / "out" / "prepare.journal").exists()
    assert bool(list((tmp_path / "out").rglob("shard.*"))) == (stop_after > 1)
    prepare_tokens([tmp_path / "a.bin"], tokenizer, tmp_path / "out", **options)
    assert tree(tmp_path / "out") == tree(tmp_path / "once")


def test_command(tmp_path, tokenizer, ids, run_braid):
    write_megatron(tmp_path / "a.bin", [[document] for document in ids])
    done = run_braid("prepare", "--tokens", "a.bin", "--tokenizer", tokenizer, "--output", "out", "--format", "flat")
    assert done.returncode == 0, done.stderr
    assert "prepared out" in done.stdout and (tmp_path / "out" / "train" / "shard.00000.bin").exists()


# --- what is refused ---


def refused(path, tokenizer, **options) -> InputError:
    with pytest.raises(InputError) as caught:
        read(TokenFiles([path], load_tokenizer(tokenizer), **options))
    assert caught.value.change
    return caught.value


def test_ids_that_are_none_of_text_are_refused_with_their_place(tmp_path, tokenizer):
    loaded = load_tokenizer(tokenizer)
    for wrong, said in ((loaded.vocab_size, "the tokenizer has ids 0 to"), (-1, "id -1"), (loaded.mask_id, "special")):
        write_megatron(tmp_path / "a.bin", [[[65, 66, 67]], [[65, 66, wrong, 65]]], np.int32)
        error = refused(tmp_path / "a.bin", tokenizer)
        assert "a.bin, token 5" in error.what and said in error.found


def test_damaged_stores_are_refused(tmp_path, tokenizer, ids):
    path = write_megatron(tmp_path / "a.bin", [[document] for document in ids])
    data, index = path.read_bytes(), path.with_suffix(".idx").read_bytes()
    for cut in (0, 20, 33, 34, 500, len(index) - 1):
        path.with_suffix(".idx").write_bytes(index[:cut])
        assert "a.idx" in refused(path, tokenizer).what
    changed = index[:42] + struct.pack("<i", 10**6) + index[46:]  # the length of the third sequence
    path.with_suffix(".idx").write_bytes(changed)
    assert "is cut off" in refused(path, tokenizer).what
    path.with_suffix(".idx").write_bytes(index)
    for cut in (1, 2, len(data) // 2):
        path.write_bytes(data[:-cut])
        assert "a.bin is cut off" in refused(path, tokenizer).what

    with_eos(ids, tokenizer).astype(np.uint16).tofile(tmp_path / "b.ds")
    np.cumsum([len(document) + 1 for document in ids]).astype(np.uint64).tofile(tmp_path / "b.ds.index")
    (tmp_path / "b.ds").write_bytes((tmp_path / "b.ds").read_bytes()[:-2])
    assert "do not fit" in refused(tmp_path / "b.ds", tokenizer).what

    dataset = write_dataset(tmp_path / "c", ids)
    file = dataset / "data-00001-of-00002.arrow"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert "cannot be read to its end" in refused(dataset, tokenizer).what
    file.unlink()
    assert file.name in refused(dataset, tokenizer).what
    (dataset / "state.json").write_text("{")
    assert "state.json" in refused(dataset, tokenizer).what


def test_columns_that_are_not_clear_are_refused(tmp_path, tokenizer, ids):
    write_dataset(tmp_path / "a", ids, labels=ids)
    assert len(read(open_files(tmp_path / "a", tokenizer))) == len(ids), "input_ids goes before others"
    pyarrow = pytest.importorskip("pyarrow")
    for name, columns in (("two", {"a": ids, "b": ids}), ("text", {"text": TEXTS})):
        write_dataset(tmp_path / name, ids, files=1)
        table = pyarrow.table(columns)
        with pyarrow.ipc.new_stream(str(tmp_path / name / "data-00000-of-00001.arrow"), table.schema) as writer:
            writer.write_table(table)
        assert "which column" in refused(tmp_path / name, tokenizer).what


def test_one_document_cannot_be_split(tmp_path, tokenizer):
    np.full(1000, 65, np.uint16).tofile(tmp_path / "a.bin")
    with pytest.raises(InputError, match="all tokens are one document"):
        prepare_tokens([tmp_path / "a.bin"], tokenizer, tmp_path / "out", token_dtype="uint16", **SMALL)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--tokens", "a.bin"), "which tokenizer?"),
        (("--tokens", "a.bin", "--tokenizer", "train:300"), "cannot be trained on ids"),
        (("--tokens", "a.bin", "--tokenizer", "bytes", "--input", "a.txt"), "--input"),
        (("--tokens", "a.bin", "--tokenizer", "bytes", "--workers", "2"), "--workers"),
        (("--tokens", "a.bin", "--tokenizer", "bytes"), "does not exist"),
        (("--tokens", "s3://b/a.bin", "--tokenizer", "bytes"), "download it first"),
        (("--input", "a.txt", "--tokenizer", "bytes", "--documents", "eos"), "go with --tokens"),
    ],
)
def test_command_says_what_is_wrong(tmp_path, words, said, monkeypatch, capsys):
    from braid.launch.cli import main

    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "--output", "out", *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
