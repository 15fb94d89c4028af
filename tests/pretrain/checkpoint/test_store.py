"""The commit protocol under real deaths, full disks and damaged files."""

from __future__ import annotations

import errno
import functools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import saves
import torch
from safetensors import safe_open
from saves import FILES, assert_is, groups_of, save, save_these, state_of

from braid.kernels.errors import CheckpointError, InputError
from braid.pretrain.checkpoint import store as store_module
from braid.pretrain.checkpoint.faults import PHASES
from braid.pretrain.checkpoint.files import RunLock
from braid.pretrain.checkpoint.folder import load_checkpoint, verify_folder
from braid.pretrain.checkpoint.store import CheckpointStore, SaveFailed

COMMITTED = ("after_rename", "before_pointer", "during_purge")


@pytest.fixture(autouse=True, params=["synchronous", "asynchronous"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test, in both modes."""
    asynchronous = {"asynchronous": request.param == "asynchronous"}
    for name in ("save", "save_these"):
        monkeypatch.setitem(globals(), name, functools.partial(getattr(saves, name), **asynchronous))


def in_child(body: Callable[[], None]) -> int:
    """Run `body` in a forked process; its wait status (0: it returned)."""
    child = os.fork()
    if child == 0:
        try:
            body()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitpid(child, 0)[1]


@pytest.fixture
def messages() -> list[str]:
    return []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of its own, 4 MiB: `checkpoints` of a run."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this process may not mount a tmpfs")
    yield disk
    while os.path.ismount(disk):
        subprocess.run(["umount", disk], check=True)


def test_round_trip_is_bitwise_and_plain_safetensors(folder: Path) -> None:
    with CheckpointStore(folder) as store:
        path = save(store, 1234)
        assert path == folder / "step-00001234" and store.steps() == [1234] and store.verify(1234) is None
    assert_is(path, 1234)
    assert (folder / "latest").read_text() == "step-00001234\n"
    assert sorted(entry.name for entry in folder.iterdir()) == ["latest", "step-00001234"]
    assert not (path / "ema.safetensors").exists(), "a group without tensors"
    for group, tensors in groups_of(1234).items():
        if not tensors:
            continue
        with safe_open(path / f"{group}.safetensors", framework="pt") as file:
            assert set(file.keys()) == set(tensors) and file.metadata() == {"format": "pt"}
            assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
    moved = path.rename(folder.parent / "my-model")  # a checkpoint is whole in itself: it may be copied and renamed
    assert_is(moved, 1234)


def test_groups_may_be_read_alone_and_only_what_is_read_is_checked(folder: Path) -> None:
    with CheckpointStore(folder) as store:
        path = save(store, 1)
    assert list(load_checkpoint(path, ["weights"]).groups) == ["weights"]
    (path / "optimizer.safetensors").unlink()
    assert list(load_checkpoint(path, ["weights"]).groups) == ["weights"]
    with pytest.raises(CheckpointError, match="optimizer.safetensors is missing"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="it has no averages; it has weights, optimizer, ema"):
        load_checkpoint(path, ["averages"])


@pytest.mark.parametrize("phase", PHASES)
def test_sigkill_at_every_phase_leaves_a_loadable_latest(folder: Path, phase: str, messages: list[str]) -> None:
    with CheckpointStore(folder, keep=1) as store:
        save(store, 1)

    def save_and_die() -> None:
        os.environ["BRAID_FAULT"] = f"save:{phase}:kill"
        with CheckpointStore(folder, keep=1) as store:
            save(store, 2)

    status = in_child(save_and_die)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert list(folder.glob(".tmp-*")) or phase in ("after_rename", "before_pointer")

    with CheckpointStore(folder, keep=1, report=messages.append) as store:
        assert not list(folder.glob(".tmp-*"))
        expected = 2 if phase in COMMITTED else 1
        found = store.latest_valid()
        assert found == (expected, folder / f"step-{expected:08d}")
        assert not [message for message in messages if "damaged" in message]
        assert_is(found[1], expected)
        save(store, 3)
        assert store.steps() == [3] and (folder / "latest").read_text() == "step-00000003\n"
    assert_is(folder / "step-00000003", 3)


def test_sigkill_at_random_instants(folder: Path) -> None:
    """Savers are killed at any time, the next one continues: what is found is always whole, and never older."""
    ready = folder.parent.parent / "ready"

    def save_for_ever() -> None:
        with CheckpointStore(folder, keep=2) as store:
            step, _ = store.latest_valid()
            ready.touch()
            while True:
                step += 1
                save(store, step)

    with CheckpointStore(folder) as store:
        started = time.monotonic()
        save(store, 1)
        duration = time.monotonic() - started
    draw, newest, kills = random.Random(0), 1, 0
    while kills < 25 or newest < 10:
        kills += 1
        assert kills < 200
        child = os.fork()
        if child == 0:
            try:
                save_for_ever()
            finally:
                os._exit(1)
        while not ready.exists():
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 4 * duration))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        ready.unlink()
        store = CheckpointStore(folder, report=pytest.fail)
        step, path = store.latest_valid()
        assert step >= newest
        newest = step
        assert_is(path, newest)


def damage(path: Path, draw: random.Random) -> str:
    """Truncate, lengthen, remove or flip one bit of the file; says which."""
    content = path.read_bytes()
    kind = draw.choice(["truncated", "flipped", "flipped", "lengthened", "removed"])
    if kind == "truncated":
        path.write_bytes(content[: draw.randrange(len(content))])
    elif kind == "flipped":
        byte, bit = draw.randrange(len(content)), draw.randrange(8)
        path.write_bytes(content[:byte] + bytes([content[byte] ^ 1 << bit]) + content[byte + 1 :])
    elif kind == "lengthened":
        path.write_bytes(content + b"\0")
    else:
        path.unlink()
    return kind


def test_every_corruption_is_found_and_the_previous_checkpoint_used(folder: Path, messages: list[str]) -> None:
    with CheckpointStore(folder) as store:
        save(store, 1)
        newest = save(store, 2)
    names = sorted(str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file())
    assert len(names) == 7
    draw, kinds = random.Random(1), set()
    for trial in range(140):
        name = names[trial % len(names)]
        content = (newest / name).read_bytes()
        kind = damage(newest / name, draw)
        kinds.add((name, kind))
        messages.clear()
        assert CheckpointStore(folder, report=messages.append).latest_valid() == (1, folder / "step-00000001")
        assert len(messages) == 1 and str(newest) in messages[0] and name in messages[0], (kind, messages)
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(newest)
        (newest / name).write_bytes(content)
    assert len(kinds) == 4 * len(names)
    assert CheckpointStore(folder).latest_valid() == (2, newest)
    assert_is(folder / "step-00000001", 1)


def test_every_byte_of_the_manifest_counts(folder: Path) -> None:
    with CheckpointStore(folder) as store:
        path = save(store, 1)
    manifest = path / "manifest.json"
    content = manifest.read_bytes()
    draw = random.Random(2)
    for byte in range(len(content)):
        flipped = bytearray(content)
        flipped[byte] ^= 1 << draw.randrange(8)
        manifest.write_bytes(flipped)
        assert "manifest.json is damaged" in verify_folder(path), byte
    manifest.write_bytes(content)
    assert verify_folder(path) is None


def test_a_folder_of_another_step_is_not_taken_for_this_one(folder: Path) -> None:
    with CheckpointStore(folder) as store:
        shutil.copytree(save(store, 1), folder / "step-00000009")
        assert "that of step 1" in store.verify(9)
        assert store.latest_valid(lambda message: None) == (1, folder / "step-00000001")


@pytest.mark.parametrize("phase", PHASES)
def test_full_disk_at_every_phase(folder: Path, phase: str, monkeypatch, messages: list[str]) -> None:
    with CheckpointStore(folder, keep=1, report=messages.append) as store:
        save(store, 1)
        monkeypatch.setenv("BRAID_FAULT", f"save:{phase}:enospc@2")
        if phase in ("before_pointer", "during_purge"):  # committed by then: told, and the run goes on
            save(store, 2)
            assert len(messages) == 1 and "No space left on device" in messages[0]
        else:
            with pytest.raises(SaveFailed, match="No space left on device") as failure:
                save(store, 2)
            assert failure.value.path == folder / "step-00000002" and failure.value.exit_code == 4
            assert failure.value.needed > store_module.SPACE_MARGIN and failure.value.free > failure.value.needed
            assert (store.latest_valid() or (0,))[0] == (2 if phase == "after_rename" else 1)
        if phase != "during_purge":  # what is out of sight and could not be removed waits for the next start
            assert not list(folder.glob(".tmp-*"))
        assert_is(save(store, 2), 2)
        assert_is(save(store, 3), 3)
        assert store.steps() == [3] and (folder / "latest").read_text() == "step-00000003\n"


def test_a_file_size_limit_is_a_failed_save(folder: Path) -> None:
    def save_under_limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with CheckpointStore(folder) as store:
            save(store, 1)
            with pytest.raises(SaveFailed, match="File too large") as failure:
                save_these(store, 2, {"weights": {"w": torch.zeros(50_000)}}, {})
            assert failure.value.__cause__.errno == errno.EFBIG
            assert store.latest_valid() == (1, folder / "step-00000001") and not list(folder.glob(".tmp-*"))
            save(store, 3)

    assert in_child(save_under_limit) == 0


def test_really_full_and_really_read_only_disk(small_disk: Path, monkeypatch) -> None:
    checkpoints = small_disk / "run" / "checkpoints"
    big = {"weights": {"w": torch.ones(5 * 2**18)}}  # 5 MiB
    with CheckpointStore(checkpoints) as store:
        with pytest.raises(SaveFailed, match="too little space") as failure:
            save(store, 1)
        assert failure.value.free <= 4 * 2**20 < failure.value.needed and not list(checkpoints.iterdir())
        monkeypatch.setattr(store_module, "SPACE_MARGIN", -(2**24))  # as if the space went while it was being written
        save(store, 1)
        with pytest.raises(SaveFailed, match="No space left on device"):
            save_these(store, 2, big, {})
        assert store.latest_valid() == (1, checkpoints / "step-00000001") and not list(checkpoints.glob(".tmp-*"))
        assert_is(save(store, 2), 2)
        subprocess.run(["mount", "--bind", small_disk, small_disk], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", small_disk], check=True)
        with pytest.raises(SaveFailed, match="Read-only file system"):
            save(store, 3)
        assert_is(store.latest_valid()[1], 2)
    with pytest.raises(CheckpointError, match="cannot be written"):
        CheckpointStore(small_disk / "other" / "checkpoints").__enter__()


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        CheckpointStore(tmp_path / "file" / "checkpoints").__enter__()
    (tmp_path / "checkpoints").touch()
    with pytest.raises(CheckpointError, match="cannot be made"):
        CheckpointStore(tmp_path / "checkpoints").__enter__()
    (tmp_path / "checkpoints").unlink()
    with CheckpointStore(tmp_path / "checkpoints") as store:
        (tmp_path / "checkpoints").rmdir()
        (tmp_path / "checkpoints").touch()
        with pytest.raises(SaveFailed):
            save(store, 1)
        (tmp_path / "checkpoints").unlink()
        assert_is(save(store, 1), 1)


def test_a_write_that_reads_back_differently_is_not_committed(folder: Path) -> None:
    class FilesOnABadDisk(dict):
        """While the caller's files are written, a bit of the weights, already written, turns."""

        def items(self):
            [weights] = folder.glob(".tmp-*/weights.safetensors")
            damaged = bytearray(weights.read_bytes())
            damaged[-1] ^= 1
            weights.write_bytes(damaged)
            return super().items()

    with CheckpointStore(folder) as store:
        with pytest.raises(SaveFailed, match="reads back differently: the content of weights.safetensors"):
            save_these(store, 1, groups_of(1), state_of(1), FilesOnABadDisk(FILES))
        assert store.steps() == [] and list(folder.iterdir()) == []


def test_a_saved_step_is_left_alone_and_a_damaged_one_moved_aside(folder: Path, messages: list[str]) -> None:
    with CheckpointStore(folder, report=messages.append) as store:
        path = save(store, 1)
        inode = path.stat().st_ino
        assert save(store, 1) == path and path.stat().st_ino == inode
        assert messages == [f"checkpoint {path} exists and is valid: not written again"]
        (path / "state.json").write_text("{}")
        assert_is(save(store, 1), 1)
        assert "moved the damaged" in messages[-1]
        assert (folder / "step-00000001.damaged-1" / "state.json").read_text() == "{}" and store.steps() == [1]
        (path / "state.json").unlink()
        save(store, 1)
        assert (folder / "step-00000001.damaged-2").exists() and store.verify(1) is None


def test_keep_counts_valid_checkpoints_only(folder: Path, messages: list[str]) -> None:
    with CheckpointStore(folder, keep=2, report=messages.append) as store:
        for step in (1, 2, 3):
            save(store, step)
        assert store.steps() == [2, 3]
    for step in (4, 5, 6):  # newer than all good ones, and no checkpoints
        (folder / f"step-{step:08d}").mkdir()
    (folder / "step-00000003" / "weights.safetensors").write_bytes(b"")
    with CheckpointStore(folder, keep=2, report=messages.append) as store:
        save(store, 7)
        assert store.steps() == [2, 3, 4, 5, 6, 7]  # 7 and 2 are the two valid ones
        assert sum("not counted" in message for message in messages) == 4
        save(store, 8)
        assert store.steps() == [3, 4, 5, 6, 7, 8]
        assert sum("not counted" in message for message in messages) == 4, "said once, not at every save"
        save(store, 2)  # behind the others: what was just saved is never what is removed
        assert 2 in store.steps()


def test_keep_zero_keeps_all(folder: Path) -> None:
    with CheckpointStore(folder, keep=0) as store:
        for step in range(1, 6):
            save(store, step)
        assert store.steps() == [1, 2, 3, 4, 5]


def test_what_cannot_be_purged_is_told_and_the_save_stands(small_disk: Path, monkeypatch, messages: list[str]) -> None:
    monkeypatch.setattr(store_module, "SPACE_MARGIN", 0)
    checkpoints = small_disk / "run" / "checkpoints"
    with CheckpointStore(checkpoints, keep=1, report=messages.append) as store:
        first = save(store, 1)
        subprocess.run(["mount", "--bind", first, first], check=True)  # a mount point can be neither moved nor removed
        try:
            assert_is(save(store, 2), 2)
            assert store.steps() == [1, 2] and "could not all be removed" in messages[-1]
        finally:
            subprocess.run(["umount", first], check=True)
        save(store, 3)
        assert store.steps() == [3]


def test_leftovers_of_interrupted_saves_are_removed_at_the_next_start(folder: Path, messages: list[str]) -> None:
    (folder / ".tmp-step-00000003-4242" / "tokenizer").mkdir(parents=True)
    (folder / ".tmp-step-00000003-4242" / "weights.safetensors").write_bytes(b"half")
    (folder / ".tmp-latest-4242").touch()
    (folder / "notes.txt").touch()
    CheckpointStore(folder, report=pytest.fail).latest_valid()  # a reader touches nothing
    assert len(list(folder.iterdir())) == 3
    with CheckpointStore(folder, report=messages.append):
        assert [entry.name for entry in folder.iterdir()] == ["notes.txt"]
    assert len(messages) == 2 and all("left by an interrupted save" in message for message in messages)


def test_one_writer_at_a_time(folder: Path) -> None:
    run_dir = folder.parent
    ready_read, ready_write = os.pipe()
    holder = os.fork()
    if holder == 0:
        with CheckpointStore(folder):
            orphan = os.fork()  # like a loader process: must not keep the lock when its parent is killed
            if orphan == 0:
                os.close(ready_write)
                time.sleep(60)
                os._exit(0)
            os.write(ready_write, str(orphan).encode())
            time.sleep(60)
        os._exit(0)
    orphan = int(os.read(ready_read, 20))
    os.close(ready_read)
    os.close(ready_write)
    try:
        with pytest.raises(CheckpointError, match=f"held by process {holder} on ") as refusal:
            RunLock(run_dir, wait_s=0.1)
        assert str(run_dir) in str(refusal.value)
        CheckpointStore(folder).latest_valid()  # reading needs no lock
        os.kill(holder, signal.SIGKILL)
        with CheckpointStore(folder) as store:  # may have to wait for the kernel to end the other, and does
            save(store, 1)
    finally:
        os.waitpid(holder, 0)
        os.kill(orphan, signal.SIGKILL)
    RunLock(run_dir, wait_s=0).release()


def test_the_pointer_is_not_trusted(folder: Path) -> None:
    with CheckpointStore(folder) as store:
        save(store, 1)
        (folder / "latest").write_text("step-00000099\n")
        assert store.latest_valid() == (1, folder / "step-00000001")
        (folder / "latest").unlink()
        assert store.latest_valid() == (1, folder / "step-00000001")


def test_a_missing_step_is_an_error_that_lists_those_present(folder: Path) -> None:
    store = CheckpointStore(folder)
    assert store.steps() == [] and store.latest_valid() is None and store.latest_step() is None
    with pytest.raises(CheckpointError, match="steps none"):
        store.path(3)
    with store:
        save(store, 1)
        save(store, 2)
    with pytest.raises(CheckpointError, match="steps 1, 2"):
        store.path(3)
    assert store.latest_step() == 2
    assert_is(store.path(2), 2)
    with pytest.raises(CheckpointError, match="no such folder"):
        load_checkpoint(folder / "step-00000003")


def test_misuse_is_refused(folder: Path, monkeypatch) -> None:
    with pytest.raises(AssertionError, match="enter the store"):
        save(CheckpointStore(folder), 1)
    with CheckpointStore(folder) as store:
        with pytest.raises(AssertionError, match="survive JSON"):
            save_these(store, 1, {}, {"shape": (1, 2)})
        with pytest.raises(AssertionError, match="not a name below"):
            save_these(store, 1, {}, {}, {"../escape": b""})
        assert not list(folder.iterdir())
        monkeypatch.setenv("BRAID_FAULT", "save:after_tensor:kill")
        with pytest.raises(InputError, match="BRAID_FAULT"):
            save_these(store, 1, {}, {})
        monkeypatch.delenv("BRAID_FAULT")
        save_these(store, 1, {}, {})
    assert json.loads((folder / "step-00000001" / "index.json").read_text()) == {}
