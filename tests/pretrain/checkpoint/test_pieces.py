"""Tensors written by some layout and read by another: the same bits, and no more read than was asked for."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from braid.parallel.layers import Shard
from braid.pretrain.checkpoint import tensor_files
from braid.pretrain.checkpoint.pieces import Entry, Index, Part, local_tensor, merge_indices, read_part, read_span
from braid.pretrain.checkpoint.tensor_files import DTYPES, TensorFile
from braid.pretrain.checkpoint.writing import write_tensors


def shards(dim: int, parts: int, size: int, length: int) -> list[Shard]:
    return [Shard(dim, parts, rank, size, length) for rank in range(size)]


def write(folder: Path, full: torch.Tensor, layout: list[Shard]) -> Index:
    """As the ranks of `layout` write it; the index as it comes back from JSON."""
    written = [
        write_tensors(folder, {"weights": {"w": local_tensor(shard.cut(full), shard)}}, lambda phase: None, rank, 9)
        for rank, shard in enumerate(layout)
    ]
    merged = merge_indices(each.index for each in written)
    entry = Entry.from_json(json.loads(json.dumps(merged["weights"]["w"].to_json())))
    assert merged == {"weights": {"w": entry}}
    return merged


@contextmanager
def opened(folder: Path, entry: Entry) -> Iterator[Callable[[str], TensorFile]]:
    with ExitStack() as stack:
        files = {piece.file: stack.enter_context(TensorFile(folder / piece.file)) for piece in entry.pieces}
        yield files.__getitem__


def read(folder: Path, entry: Entry, shard: Shard | None) -> torch.Tensor:
    with opened(folder, entry) as open_file:
        values = read_part(entry, "w", None if shard is None else Part.of(shard), open_file)
    return values if shard is None else shard.pad(values)


def span(folder: Path, entry: Entry, shard: Shard | None, start: int, stop: int) -> torch.Tensor:
    with opened(folder, entry) as open_file:
        return read_span(entry, "w", shard, start, stop, open_file)


def as_documented(folder: Path, entry: dict) -> torch.Tensor:
    """With the safetensors package alone, as folder.py says."""
    whole = None
    for piece in entry["pieces"]:
        with safe_open(folder / piece["file"], "pt") as file:
            tensor = file.get_tensor("w")
        if "dim" not in piece:
            return tensor
        whole = torch.empty(entry["shape"], dtype=tensor.dtype) if whole is None else whole
        offset, dim = 0, piece["dim"]
        for start, stop in piece["ranges"]:
            whole.narrow(dim, start, stop - start).copy_(tensor.narrow(dim, offset, stop - start))
            offset += stop - start
    return whole


@settings(max_examples=150, deadline=None, database=None)
@given(st.data())
def test_written_under_one_layout_and_read_under_another(data):
    dtype = data.draw(st.sampled_from(sorted(set(DTYPES.values()) - {torch.bool}, key=str)))
    shape = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    lengths = {}
    for side in ("written", "read"):  # of both, sizes that do not divide and ranks that have nothing but padding
        lengths[side] = tuple(data.draw(st.integers(*edges)) for edges in ((0, len(shape) - 1), (1, 3), (1, 5)))
    for dim, parts, _ in lengths.values():
        shape[dim] *= parts
    full = torch.randint(0, 100, shape).to(dtype)
    (dim, parts, size), (other, other_parts, other_size) = lengths["written"], lengths["read"]
    short_run = data.draw(st.sampled_from([1, 8, 2**14]))  # reading run by run, and through what is between
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_files, "SHORT_RUN", short_run)
        patch.setattr(tensor_files, "CHUNK", data.draw(st.sampled_from([16, 64, 2**20])))
        entry = write(Path(name), full, shards(dim, parts, size, shape[dim]))["weights"]["w"]
        assert (entry.dtype, entry.shape) == (tensor_files.NAMES[dtype], tuple(shape))
        for shard in shards(other, other_parts, other_size, shape[other]):
            found, wanted = read(Path(name), entry, shard), shard.cut(full)
            assert found.dtype == wanted.dtype and torch.equal(found, wanted)
            start, stop = sorted(data.draw(st.integers(0, wanted.numel())) for _ in range(2))
            assert torch.equal(span(Path(name), entry, shard, start, stop), wanted.reshape(-1)[start:stop])
        assert torch.equal(read(Path(name), entry, None), full)
        start, stop = sorted(data.draw(st.integers(0, full.numel())) for _ in range(2))
        assert torch.equal(span(Path(name), entry, None, start, stop), full.reshape(-1)[start:stop])
        assert torch.equal(as_documented(Path(name), entry.to_json()), full)


def test_what_was_padding_is_not_in_the_files(tmp_path):
    full = torch.arange(1, 31).view(10, 3)  # 10 rows on 4 processes: 3, 3, 3 and 1
    entry = write(tmp_path, full, shards(0, 1, 4, 10))["weights"]["w"]
    lengths = [piece.part.length for piece in entry.pieces]
    assert lengths == [3, 3, 3, 1]
    with safe_open(tmp_path / entry.pieces[-1].file, "pt") as file:
        assert torch.equal(file.get_tensor("w"), full[9:])
    assert read(tmp_path, entry, Shard(0, 1, 3, 4, 10)).tolist() == [*full[9:].tolist(), [0, 0, 0], [0, 0, 0]]


def test_scalars_and_empty_tensors(tmp_path):
    tensors = {"scalar": torch.tensor(7, dtype=torch.int64), "empty": torch.empty(0, 4), "flag": torch.tensor([True])}
    written = write_tensors(tmp_path, {"weights": {k: local_tensor(t, None) for k, t in tensors.items()}}, str)
    with TensorFile(tmp_path / "weights.safetensors") as file:
        for name, tensor in tensors.items():
            found = read_part(written.index["weights"][name], name, None, lambda _, file=file: file)
            assert found.dtype == tensor.dtype and torch.equal(found, tensor) and found.shape == tensor.shape


@pytest.mark.parametrize("left_out", [0, 1, 2])
def test_pieces_that_are_not_the_whole_are_no_checkpoint(tmp_path, left_out):
    full = torch.arange(30).view(10, 3)
    layout = shards(0, 1, 3, 10)
    del layout[left_out]
    with pytest.raises(AssertionError, match="the pieces of w are not the whole tensor"):
        write(tmp_path, full, layout)
    with pytest.raises(AssertionError, match="not the whole"):
        write(tmp_path / "twice", full, [Shard(0, 1, 0, 1, 10)] * 2)


def test_an_index_that_lacks_a_piece_is_not_believed(tmp_path):
    full = torch.arange(30.0).view(10, 3)
    entry = write(tmp_path, full, shards(0, 1, 2, 10))["weights"]["w"]
    half = Entry(entry.dtype, entry.shape, entry.pieces[:1])
    assert torch.equal(read(tmp_path, half, Shard(0, 1, 0, 2, 10)), full[:5])
    with pytest.raises(ValueError, match="15 of 30 values of w"):
        read(tmp_path, half, None)
    (tmp_path / "no").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="no safetensors file"):
        TensorFile(tmp_path / "no")


@pytest.mark.parametrize("dim", [0, 1])
def test_only_what_is_wanted_is_read(tmp_path, dim, monkeypatch):
    full = torch.randn(64, 4 * 8192)  # a quarter of a row is 32 KiB
    entry = write(tmp_path, full, [Shard(0, 1, 0, 1, 64)])["weights"]["w"]
    count, preadv = [0], tensor_files.os.preadv

    def counted(descriptor, buffers, offset):
        count[0] += len(buffers[0])
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(tensor_files.os, "preadv", counted)
    shard = Shard(dim, 1, 1, 4, full.shape[dim])
    assert torch.equal(read(tmp_path, entry, shard), shard.cut(full))
    assert full.nbytes / 4 <= count[0] < full.nbytes / 4 + 1000
    count[0], size = 0, shard.cut(full).numel()
    assert torch.equal(span(tmp_path, entry, shard, 3, size // 4), shard.cut(full).reshape(-1)[3 : size // 4])
    assert count[0] < full.nbytes / 16 + 1000, "a quarter of the quarter"


MEASURE = """
import sys
from pathlib import Path
from braid.pretrain.checkpoint.pieces import Entry, Part, Piece, read_part
from braid.pretrain.checkpoint.tensor_files import TensorFile
def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024
path, dim, start, stop = Path(sys.argv[1]), *map(int, sys.argv[2:])
entry = Entry("F32", (32768, 4096), (Piece(path.name),))
small = path.with_name("small.safetensors")
with TensorFile(small) as file:  # what the first such read of a process loads is not what is measured
    read_part(Entry("F32", (64, 4096), (Piece(small.name),)), "w", Part(dim, ((8, 16),)), lambda name: file)
open("/proc/self/clear_refs", "w").write("5")
before = peak()
with TensorFile(path) as file:
    part = read_part(entry, "w", Part(dim, ((start, stop),)), lambda name: file)
print(peak() - before, part.nbytes, float(part.double().sum()))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "start", "stop"), [(0, 4096, 8192), (1, 512, 1024), (1, 0, 8)])
def test_a_part_takes_no_memory_for_the_rest(tmp_path, dim, start, stop):
    """512 MiB, of which an eighth, or 8 of 4096 columns, is read in a process of its own."""
    full = torch.arange(32768.0)[:, None] + torch.arange(4096.0)
    save_file({"w": full}, tmp_path / "big.safetensors")
    save_file({"w": full[:64].clone()}, tmp_path / "small.safetensors")
    words = [sys.executable, "-c", MEASURE, tmp_path / "big.safetensors", dim, start, stop]
    grown, size, total = subprocess.run([*map(str, words)], capture_output=True, text=True, check=True).stdout.split()
    assert float(total) == full.narrow(dim, start, stop - start).double().sum()
    assert int(grown) < int(size) + 5 * tensor_files.CHUNK < full.nbytes / 4
