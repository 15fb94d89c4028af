"""MDS shards: round trip, agreement with mosaicml-streaming both ways, damage, crashes, threads and forks."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import xxhash
from small_corpus import damage

from braid.data_pipeline import shards as shards_module
from braid.data_pipeline.mds import MDSReader, MDSWriter, write_index
from braid.data_pipeline.shards import atomic_file
from braid.kernels.errors import InputError

COLUMNS = {"tokens": "ndarray:uint16", "ends": "ndarray:int32"}
LENGTHS = (1, 3, 255, 256, 300, 65_535, 65_536, 70_000)


def samples(num: int, seed: int = 0, lengths=LENGTHS, empty: bool = True) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        {
            "tokens": rng.integers(0, 1 << 16, rng.choice(lengths)).astype(np.uint16),
            "ends": rng.integers(-9, 9, rng.integers(0 if empty else 1, 4)).astype(np.int32),
        }
        for _ in range(num)
    ]


def write(folder, rows, shard_bytes=1 << 18, columns=COLUMNS) -> list[dict]:
    with MDSWriter(folder, columns, shard_bytes=shard_bytes) as writer:
        for row in rows:
            writer.write(row)
    write_index(folder, writer.finished_shards)
    return writer.finished_shards


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_round_trip(tmp_path):
    rows = samples(40)
    shards = write(tmp_path, rows)
    reader = MDSReader(tmp_path)
    assert len(shards) > 3 and reader.shard_rows.tolist() == [shard["samples"] for shard in shards]
    assert reader.num_rows == len(rows)
    for i in np.random.default_rng(1).permutation(len(rows)):
        assert_equal(reader.row(int(i)), rows[i])
    for i in (-1, len(rows)):
        with pytest.raises(IndexError):
            reader.row(i)


def test_rows_are_views_of_the_file(tmp_path):
    write(tmp_path, samples(3))
    for array in MDSReader(tmp_path).row(1).values():
        assert not array.flags.owndata and not array.flags.writeable


def test_shards_keep_to_their_size_and_entries_are_true(tmp_path):
    shards = write(tmp_path, samples(200, lengths=(10, 500)), shard_bytes=20_000)
    assert len(shards) > 5
    for shard in shards:
        content = (tmp_path / shard["raw_data"]["basename"]).read_bytes()
        assert len(content) == shard["raw_data"]["bytes"] <= 20_000
        assert xxhash.xxh3_64_hexdigest(content) == shard["raw_data"]["hashes"]["xxh3_64"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "index.json",
        *(f"shard.{k:05}.mds" for k in range(len(shards))),
    ]


def test_a_sample_larger_than_a_shard_gets_its_own(tmp_path):
    rows = samples(5, lengths=(1000,))
    assert [shard["samples"] for shard in write(tmp_path, rows, shard_bytes=100)] == [1] * 5
    assert_equal(MDSReader(tmp_path).row(3), rows[3])


def test_wrong_dtype_is_refused(tmp_path):
    writer = MDSWriter(tmp_path, COLUMNS)
    with pytest.raises(AssertionError, match="int64"):
        writer.write({"tokens": np.arange(3), "ends": np.zeros(1, np.int32)})


def test_a_writer_goes_on_where_another_stopped(tmp_path):
    rows = samples(20, lengths=(1000,))
    shards: list[dict] = []
    for part in (rows[:9], rows[9:]):
        writer = MDSWriter(tmp_path, COLUMNS, shard_bytes=5000, first_shard=len(shards))
        for row in part:
            writer.write(row)
        before = len(writer.finished_shards)
        writer.finish()
        assert len(writer.finished_shards) == before + 1
        shards += writer.finished_shards
    write_index(tmp_path, shards)
    reader = MDSReader(tmp_path)
    assert reader.num_rows == 20
    for i, row in enumerate(rows):
        assert_equal(reader.row(i), row)


@pytest.fixture(scope="module")
def streaming():
    """mosaicml-streaming; its vision parts need torchvision, which nothing here uses."""
    if importlib.util.find_spec("streaming") is None:
        pytest.skip("mosaicml-streaming is not installed")
    for name in ("streaming.vision", "streaming.text", "streaming.multimodal"):
        sys.modules.setdefault(name, types.ModuleType(name))
    import streaming

    return streaming


def test_mosaicml_reads_what_we_write(tmp_path, streaming):
    rows = samples(30)
    write(tmp_path, rows)
    dataset = streaming.LocalDataset(str(tmp_path))
    assert len(dataset) == len(rows)
    for i, row in enumerate(rows):
        assert_equal(dataset[i], row)
    from streaming.base.format import reader_from_json

    entry = json.loads((tmp_path / "index.json").read_text())["shards"][1]
    first = json.loads((tmp_path / "index.json").read_text())["shards"][0]["samples"]
    assert_equal(reader_from_json(str(tmp_path), "", entry)[0], rows[first])


def test_we_read_what_mosaicml_writes_and_files_are_identical(tmp_path, streaming):
    rows = samples(30, empty=False)
    with streaming.MDSWriter(
        out=str(tmp_path / "theirs"), columns=COLUMNS, hashes=["xxh3_64"], size_limit=1 << 18
    ) as writer:
        for row in rows:
            writer.write(row)
    reader = MDSReader(tmp_path / "theirs")
    assert len(reader.shard_rows) > 2
    for i, row in enumerate(rows):
        assert_equal(reader.row(i), row)
    write(tmp_path / "ours", rows)
    for path in (tmp_path / "theirs").iterdir():
        assert (tmp_path / "ours" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
def test_damage_is_found_at_first_touch_and_named(tmp_path, how):
    shards = write(tmp_path, samples(40))
    damage(tmp_path / "shard.00002.mds", how)
    reader = MDSReader(tmp_path)
    first = int(reader.shard_rows[:2].sum())
    reader.row(first - 1)
    with pytest.raises(InputError) as caught:
        reader.row(first)
    with pytest.raises(InputError):
        reader.verify_shard(2)
    expected = shards[2]["raw_data"]
    assert "shard.00002.mds" in caught.value.what and caught.value.change
    if how == "truncated":
        assert str(expected["bytes"]) in caught.value.found and str(expected["bytes"] - 5) in caught.value.found
    elif how == "flipped":
        found = xxhash.xxh3_64_hexdigest((tmp_path / "shard.00002.mds").read_bytes())
        assert expected["hashes"]["xxh3_64"] in caught.value.found and found in caught.value.found
    else:
        assert "No such file" in caught.value.found


def test_a_shard_is_hashed_once(tmp_path, monkeypatch):
    write(tmp_path, samples(40))
    hashed = []
    original = MDSReader.verify_shard
    monkeypatch.setattr(MDSReader, "verify_shard", lambda self, shard: hashed.append(shard) or original(self, shard))
    monkeypatch.setattr(shards_module, "MAX_OPEN_SHARDS", 2)
    reader = MDSReader(tmp_path)
    for _ in range(2):
        for i in range(reader.num_rows):
            reader.row(i)
    assert hashed == list(range(len(reader.shard_rows)))


def test_open_files_are_bounded_and_old_rows_stay_valid(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "MAX_OPEN_SHARDS", 3)
    rows = samples(60, lengths=(1000,))
    write(tmp_path, rows, shard_bytes=5000)
    reader = MDSReader(tmp_path)
    assert len(reader.shard_rows) > 20
    kept = reader.row(0)
    num_files = len(os.listdir("/proc/self/fd"))
    for i in range(reader.num_rows):
        reader.row(i)
    assert len(os.listdir("/proc/self/fd")) <= num_files + 3
    assert_equal(kept, rows[0])


@pytest.mark.parametrize("change", [
    {"format": "csv"}, {"compression": "zstd"}, {"column_encodings": ["ndarray:int32", "str"]}, {"samples": 0},
    {"raw_data": {"basename": "shard.00001.mds", "bytes": 1, "hashes": {}}}, {"column_names": ["ends", "ids"]},
    {"raw_data": None}])  # fmt: skip
def test_an_index_that_cannot_be_read_is_refused(tmp_path, change):
    shards = write(tmp_path, samples(20))
    shards[1] = shards[1] | change
    write_index(tmp_path, shards)
    with pytest.raises(InputError, match="index.json") as caught:
        MDSReader(tmp_path)
    assert caught.value.found and caught.value.change


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"version": 2}', b'{"version": 1, "shards": []}', b'{"version": 2, "shards": []}']
)
def test_an_index_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(InputError, match="index.json"):
        MDSReader(tmp_path)


def test_a_folder_without_index_is_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        MDSReader(tmp_path / "nowhere")


def test_an_error_while_writing_leaves_whole_shards_only(tmp_path):
    with pytest.raises(KeyboardInterrupt), MDSWriter(tmp_path, COLUMNS, shard_bytes=5000) as writer:
        for row in samples(10, lengths=(1000,)):
            writer.write(row)
        raise KeyboardInterrupt
    assert writer.finished_shards
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        shard["raw_data"]["basename"] for shard in writer.finished_shards
    ]


def test_an_error_inside_an_atomic_file_keeps_the_old_one(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "file") as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_bytes() == b"old"


def test_a_killed_writer_leaves_no_partial_shard(tmp_path):
    code = f"""
import os, signal
import numpy as np
from pathlib import Path
from braid.data_pipeline import mds, shards
writer = mds.MDSWriter(Path({str(tmp_path)!r}), {COLUMNS!r}, shard_bytes=5000)
fsync, calls = os.fsync, []
def dying(file):
    calls.append(file)
    if len(calls) == 5:  # two syncs a shard: the third shard is written but has no name yet
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(file)
shards.os.fsync = dying
while True:
    writer.write({{"tokens": np.arange(1000, dtype=np.uint16), "ends": np.ones(1, np.int32)}})
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert sorted(path.name for path in tmp_path.glob("*.mds")) == ["shard.00000.mds", "shard.00001.mds"]
    writer = MDSWriter(tmp_path, COLUMNS, shard_bytes=5000, first_shard=2)
    writer.write(samples(1)[0])
    writer.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"shard.0000{k}.mds" for k in range(3)]


def test_threads_and_forked_processes_read_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "MAX_OPEN_SHARDS", 2)  # shards are opened and dropped all the time
    rows = samples(40, lengths=(1000,))
    write(tmp_path, rows, shard_bytes=9000)
    reader = MDSReader(tmp_path)
    reader.row(0)

    def check(seed: int) -> bool:
        for i in np.random.default_rng(seed).integers(0, len(rows), 500).tolist():
            assert_equal(reader.row(i), rows[i])
        return True

    children = []
    for seed in range(3):
        pid = os.fork()
        if pid == 0:
            os._exit(0 if check(seed) else 1)
        children.append(pid)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(check, range(4)))
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]


def test_a_reader_can_be_pickled(tmp_path):
    rows = samples(10)
    write(tmp_path, rows)
    reader = MDSReader(tmp_path)
    reader.row(3)
    assert_equal(pickle.loads(pickle.dumps(reader)).row(3), rows[3])
