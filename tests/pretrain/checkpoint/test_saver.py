"""Saves by several processes, and while training goes on: the same files, one fate for all ranks, nothing half done."""

from __future__ import annotations

import functools
import re
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import saves
import torch
from rank_processes import run_on_ranks
from saver_bodies import (
    resave,
    save_and_load_shared,
    save_more_than_there_is,
    save_stages,
    save_without_seeing,
    train_while_saving,
    values_of,
)
from training_runs import (
    TINY,
    Trainers,
    assert_outcome,
    assert_refused,
    assert_same_run,
    checkpoints,
    last_checkpoint,
)

from braid.parallel.mesh import Mesh
from braid.parallel.plan import ParallelConfig
from braid.pretrain.checkpoint import saver as saver_module
from braid.pretrain.checkpoint.folder import load_checkpoint, open_checkpoint, verify_folder
from braid.pretrain.checkpoint.pieces import local_tensor
from braid.pretrain.checkpoint.saver import Saver, available_memory
from braid.pretrain.checkpoint.store import CheckpointStore

SYNCHRONOUS = pytest.param(False, id="synchronous", marks=pytest.mark.slow)
MODES = pytest.mark.parametrize("asynchronous", [SYNCHRONOUS, pytest.param(True, id="asynchronous")])
on_ranks = functools.partial(run_on_ranks, timeout_s=300)
TWO = {"parallel__tensor": 2, "ranks": 2}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def start(store: CheckpointStore, step: int, weights: dict[str, torch.Tensor]) -> Saver:
    saver = Saver(store, Mesh.single(), asynchronous=True, report=store.report)
    saver.start(step, {"weights": {key: local_tensor(value, None) for key, value in weights.items()}}, {})
    return saver


# -- one process ------------------------------------------------------------------------------------------------------


def test_both_modes_write_the_same_files(tmp_path: Path) -> None:
    written = []
    for asynchronous in (False, True):
        with CheckpointStore(tmp_path / str(asynchronous) / "checkpoints") as store:
            written.append(files_of(saves.save(store, 3, asynchronous=asynchronous)))
    assert written[0] == written[1] and len(written[0]) == 7


def test_what_is_saved_is_what_was_there_when_it_began(tmp_path: Path) -> None:
    """The thread is held back until the weights have moved on."""
    gate, values = threading.Event(), torch.arange(1000.0)
    with CheckpointStore(tmp_path / "checkpoints") as store:
        store.fault = lambda phase: gate.wait(60)
        saver = start(store, 1, {"w": values})
        assert saver.settle(wait=False) is None and store.steps() == []
        values.zero_()
        gate.set()
        assert saver.settle(wait=True).problem is None
    assert torch.equal(load_checkpoint(store.path(1)).groups["weights"]["w"], torch.arange(1000.0))


def test_where_memory_is_short_training_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    assert 2**20 < available_memory() < 2**50
    monkeypatch.setattr(saver_module, "available_memory", lambda: 10_000 + saver_module.MEMORY_MARGIN)
    values = torch.zeros(5000)
    with CheckpointStore(tmp_path / "checkpoints", report=messages.append) as store:
        saver = start(store, 1, {"small": values[:10], "large": values})
        values.fill_(1)
        assert checkpoints(tmp_path) == [1], "it was over before training went on"
        assert saver.settle(wait=False).problem is None
    assert "is saved while training waits: its 0.0 MiB are more than the host memory of 1 of 1" in messages[0]
    assert not load_checkpoint(store.path(1)).groups["weights"]["large"].any()


@pytest.mark.parametrize("reason", ["synchronous", "memory is short"])
def test_no_more_than_a_buffer_is_held_while_training_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    """Fresh tensors, as an engine that gathers them gives them, on their way to a disk that is slower than it: how many
    of them are alive at a time?"""
    alive, most, names = set(), 0, [f"w{number:02d}" for number in range(40)]

    def fresh() -> Iterator[tuple[str, str, torch.Tensor]]:
        nonlocal most
        for number, name in enumerate(names):
            memory = np.full(1000, number, dtype=np.float32)
            alive.add(name)
            weakref.finalize(memory, alive.remove, name)
            most = max(most, len(alive))
            yield "weights", name, torch.from_numpy(memory)
            del memory

    monkeypatch.setattr(saver_module, "available_memory", lambda: 0)
    monkeypatch.setattr(saver_module, "BUFFER", 3 * 4000)
    with CheckpointStore(tmp_path / "checkpoints") as store:
        store.fault = lambda phase: time.sleep(0.002)
        saver = Saver(store, Mesh.single(), asynchronous=reason != "synchronous", report=store.report)
        mine = {name: local_tensor(torch.empty(1000, device="meta"), None) for name in names}
        saver.start(1, {"weights": mine}, {}, values=fresh())
        assert checkpoints(tmp_path) == [1] and saver.settle(wait=True).problem is None
    assert 2 <= most <= 5 and not alive
    saved = load_checkpoint(store.path(1)).groups["weights"]
    assert [int(saved[name][0]) for name in names] == list(range(40))


def test_tensors_may_come_in_another_order_than_they_lie_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of large elements come last and lie first; the buffer holds one."""
    monkeypatch.setattr(saver_module, "BUFFER", 1)
    values = {
        "bytes": torch.arange(50, dtype=torch.uint8),
        "half": torch.ones(9).half(),
        "double": torch.rand(7).double(),
    }
    with CheckpointStore(tmp_path / "checkpoints") as store:
        saves.save_these(store, 1, {"weights": values}, {})
    found = load_checkpoint(tmp_path / "checkpoints" / "step-00000001").groups["weights"]
    assert all(torch.equal(found[name], value) for name, value in values.items())


def test_an_iteration_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[str, str, torch.Tensor]]:
        yield "weights", "a", torch.ones(3)
        raise RuntimeError("a peer died")

    with CheckpointStore(tmp_path / "checkpoints") as store:
        saver = Saver(store, Mesh.single(), asynchronous=True, report=store.report)
        mine = {name: local_tensor(torch.empty(3, device="meta"), None) for name in "ab"}
        with pytest.raises(RuntimeError, match="a peer died"):
            saver.start(1, {"weights": mine}, {}, values=failing())
        saver.close(wait=True)
        deadline = time.monotonic() + 10
        while list(store.folder.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not list(store.folder.iterdir())


@pytest.mark.parametrize("wait", [True, False])
def test_a_run_that_ends_in_the_middle_of_a_save(tmp_path: Path, wait: bool) -> None:
    messages: list[str] = []
    gate = threading.Event()
    with CheckpointStore(tmp_path / "checkpoints", report=messages.append) as store:
        store.fault = lambda phase: gate.wait(60)
        saver = start(store, 1, {"w": torch.ones(3)})
        if wait:
            threading.Timer(0.2, gate.set).start()
        saver.close(wait=wait)
        assert store.steps() == ([1] if wait else [])
        assert messages == ([] if wait else ["the checkpoint of step 1 was not finished"])
        gate.set()
        saver.settle(wait=True)


def test_a_save_that_fails_behind_a_failing_run_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setenv("BRAID_FAULT", "save:after_tensors:enospc")
    with CheckpointStore(tmp_path / "checkpoints", report=messages.append) as store:
        start(store, 1, {"w": torch.ones(3)}).close(wait=True)
    assert len(messages) == 1 and "No space left on device" in messages[0]


def test_a_defect_in_the_thread_is_not_hidden(tmp_path: Path) -> None:
    with CheckpointStore(tmp_path / "checkpoints") as store:
        store.fault = lambda phase: 1 / 0
        saver = start(store, 1, {"w": torch.ones(3)})
        with pytest.raises(ZeroDivisionError):
            saver.settle(wait=True)
        assert store.steps() == [] and not list(store.folder.glob(".tmp-*"))


# -- several ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of its own, 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this process may not mount a tmpfs")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@MODES
def test_a_disk_that_is_full_for_a_rank_that_is_not_the_first(small_disk: Path, asynchronous: bool) -> None:
    folder = small_disk / "run" / "checkpoints"
    for failed, saved in on_ranks(save_more_than_there_is, 2, folder, asynchronous):
        assert "rank 1 on" in failed and "No space left on device" in failed and "step-00000001" in failed
        assert saved is None
    checkpoint = load_checkpoint(folder / "step-00000002")
    assert CheckpointStore(folder).steps() == [2]
    assert checkpoint.groups["weights"].keys() == {"of rank 0", "of rank 1"}


@MODES
def test_a_folder_that_one_rank_does_not_see(tmp_path: Path, asynchronous: bool) -> None:
    folder = tmp_path / "run" / "checkpoints"
    results = on_ranks(save_without_seeing, 2, folder, asynchronous)
    if None in results:
        pytest.skip("this process may not have mounts of its own")
    for saving, resuming in results:
        assert "rank 1 on" in saving and "a file system that all machines of the run share" in saving
        assert "not every rank sees the checkpoint" in resuming and "not there for rank 1" in resuming
    assert CheckpointStore(folder).steps() == [1] and not list(folder.glob(".tmp-*"))


def test_training_goes_on_while_a_slow_writer_writes(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    assert on_ranks(train_while_saving, 2, folder) == [True, True]
    for values in load_checkpoint(folder / "step-00000001").groups["weights"].values():
        assert torch.equal(values, torch.arange(100.0))


def test_each_tensor_is_written_once_whoever_has_it(tmp_path: Path) -> None:
    """The lowest stage writes what several have; of the tensor axis, rank 0 what all have. Ranks 0 and 1 are the first
    stage."""
    folder = tmp_path / "run" / "checkpoints"
    results = on_ranks(save_stages, 4, folder)
    own = [{f"matrix_of_{stage}", f"bias_of_stage_{stage}"} for stage in (0, 0, 1, 1)]
    assert [owned for owned, _, _ in results] == [own[0] | {"table", "norm"}] * 2 + [own[2]] * 2
    names = sorted({"table", "norm", *own[0], *own[2]})
    assert all(here == own[rank] | {"table", "norm"} for rank, (_, here, _) in enumerate(results))
    assert all(everywhere == names for _, _, everywhere in results)
    path = folder / "step-00000001"
    with open_checkpoint(path) as reader:
        files = {name: [piece.file for piece in entry.pieces] for name, entry in reader.index["weights"].items()}
        for name in names:
            assert torch.equal(reader.read("weights", name), values_of(name))
    numbers = {name: [int(file[8:11]) for file in each] for name, each in files.items()}
    assert numbers == {"table": [0, 1], "matrix_of_0": [0, 1], "matrix_of_1": [2, 3], "norm": [0],
                       "bias_of_stage_0": [0], "bias_of_stage_1": [2]}  # fmt: skip


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(ParallelConfig(engine="deepspeed", zero=3), id="ZeRO-3"),
        *(
            pytest.param(plan, id=name, marks=pytest.mark.slow)
            for name, plan in {
                "plain": ParallelConfig(),
                "ZeRO-1": ParallelConfig(engine="deepspeed", zero=1),
                "Megatron": ParallelConfig(engine="megatron"),
            }.items()
        ),
    ],
)
def test_ranks_with_the_same_part_of_the_model_share_the_writing(tmp_path: Path, plan: ParallelConfig) -> None:
    """Each writes a third of the bytes, and is sent nothing else; on load each reads what it holds."""
    results = on_ranks(save_and_load_shared, 3, tmp_path / "run" / "checkpoints", plan)
    written, given, read, held = zip(*results, strict=True)
    total = sum(written)
    assert written == given and max(written) - min(written) < total / 100
    for number, size in enumerate(read):
        assert size < 1.2 * held[number] and (plan.engine == "plain" or size < 0.42 * total)
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000001")
    assert sum(tensor.nbytes for tensors in checkpoint.groups.values() for tensor in tensors.values()) == total


def test_from_two_to_one_to_four_and_back_the_bits_are_the_same(trainers: Trainers, tmp_path: Path) -> None:
    """Weights, moments and averages; each layout reads what another has written, and writes it again. The vocabulary
    does not divide."""
    fields = {"model__num_heads": 4, "model__num_layers": 2, "training__steps": 5}
    trainers.train("tiny_ccdd", "run", **TWO, **fields)
    path = tmp_path / "run" / "checkpoints" / "step-00000005"
    words = [f"{name}={value}" for name, value in TINY.items()]
    words += [f"{name.replace('__', '.')}={value}" for name, value in fields.items()]
    words += [f"run.dir={tmp_path / 'run'}", f"data.path={trainers.corpus}"]
    expected, first = load_checkpoint(path), files_of(path)
    assert sorted(name for name in first if name.endswith("tensors") and "weights" in name) == [
        "weights-000.safetensors",
        "weights-001.safetensors",
    ]
    with open_checkpoint(path) as reader:
        parts = [(entry.shape, piece.part) for entry in reader.index["weights"].values() for piece in entry.pieces]
        assert any(part and shape[part.dim] % 2 for shape, part in parts), "nothing that does not divide"
        split = [entry for entry in reader.index["optimizer"].values() if len(entry.pieces) == 2]
        assert len(split) > 10 and all(entry.pieces[0].part for entry in split)
    for number, (size, tensor, sequence) in enumerate([(1, 1, False), (4, 4, False), (4, 2, True), (2, 2, False)]):
        plan = [f"parallel.tensor={tensor}", f"parallel.sequence={sequence}".lower(), "training.micro_batch_size=2"]
        assert on_ranks(resave, size, [*words, *plan], tmp_path / f"aside-{number}")[0] == size
        found = load_checkpoint(path)
        assert {group: tensors.keys() for group, tensors in found.groups.items()} == {
            group: tensors.keys() for group, tensors in expected.groups.items()
        }
        for group, tensors in expected.groups.items():
            for name, value in tensors.items():
                other = found.groups[group][name]
                assert value.dtype == other.dtype and torch.equal(value, other), (size, tensor, group, name)
        assert verify_folder(path) is None
    again = files_of(path)
    assert {name: again[name] for name in again if name.endswith("tensors") or name == "index.json"} == {
        name: first[name] for name in first if name.endswith("tensors") or name == "index.json"
    }, "the same layout, the same files"


@MODES
def test_a_writer_without_space_costs_a_warning(trainers: Trainers, tmp_path: Path, asynchronous: bool) -> None:
    """It is the second rank's disk that fails, in the second save: all ranks go on, and the run is undisturbed."""
    options = {"training__steps": 6, "checkpoint__every": 2, "checkpoint__keep": 0, "parallel__tensor": 2}
    options["checkpoint__asynchronous"] = asynchronous
    trainers.train("tiny_mdlm", "straight", ranks=2, **options)
    first, second = trainers.start_ranks(
        2, "tiny_mdlm", "run", env_of={1: {"BRAID_FAULT": "save:during_tensors:enospc@2"}}, **options
    )
    assert first.wait() == second.wait() == 0, first.err + second.err
    assert "warning: the checkpoint of step 4 could not be saved; training goes on" in first.out
    assert "rank 1 on" in first.out and "No space left on device" in first.out
    assert checkpoints(tmp_path / "run") == [2, 6] and not list((tmp_path / "run" / "checkpoints").glob(".tmp-*"))
    assert_same_run(tmp_path / "run", tmp_path / "straight")
    assert_outcome(tmp_path / "run", 0)


@MODES
@pytest.mark.parametrize(
    "phase",
    ["during_tensors", *(pytest.param(name, marks=pytest.mark.slow) for name in ("before_write", "after_tensors"))],
)
def test_a_writer_killed_in_a_save(trainers: Trainers, tmp_path: Path, phase: str, asynchronous: bool) -> None:
    """The other ends and does not commit; the run goes on from the checkpoint before, bit for bit."""
    options = {"training__steps": 9, "checkpoint__every": 3, "parallel__tensor": 2, "training__log_every": 2}
    options["checkpoint__asynchronous"] = asynchronous
    trainers.train("tiny_mdlm", "straight", ranks=2, **options)
    fault = {1: {"BRAID_FAULT": f"save:{phase}:kill@2"}}
    first, second = trainers.start_ranks(2, "tiny_mdlm", "run", env_of=fault, **options)
    assert second.wait() == -signal.SIGKILL
    assert first.wait() != 0 and re.search("another rank died or is stuck|Connection (closed|reset) by peer", first.err)
    assert checkpoints(tmp_path / "run") == [3] and last_checkpoint(tmp_path / "run").step == 3
    assert "resumed from step 3" in trainers.train("tiny_mdlm", "run", ranks=2, **options).out
    assert_same_run(tmp_path / "run", tmp_path / "straight")


def test_asynchronous_runs_leave_what_synchronous_ones_do(trainers: Trainers, tmp_path: Path) -> None:
    """The files of every checkpoint, bit for bit, where nothing in them measures time."""
    for name, asynchronous in (("waits", False), ("goes-on", True)):
        trainers.train("tiny_ccdd", name, training__steps=7, checkpoint__every=2, checkpoint__keep=0, **TWO,
                       checkpoint__asynchronous=asynchronous)  # fmt: skip
    assert checkpoints(tmp_path / "waits") == checkpoints(tmp_path / "goes-on") == [2, 4, 6, 7]
    for step in (2, 4, 6, 7):
        found, wanted = (files_of(tmp_path / run / "checkpoints" / f"step-{step:08d}") for run in ("goes-on", "waits"))
        assert found.keys() == wanted.keys()
        for name in found.keys() - {"state.json", "manifest.json", "config.yaml"}:
            assert found[name] == wanted[name], (step, name)
    assert_same_run(tmp_path / "goes-on", tmp_path / "waits")


def test_a_stop_waits_for_the_save_in_flight(trainers: Trainers, tmp_path: Path) -> None:
    """SIGTERM while a thread writes: what it writes is committed, and what the run had reached too."""
    options = {
        "training__steps": 10**6,
        "checkpoint__every": 2,
        "checkpoint__keep": 0,
        "checkpoint__asynchronous": True,
    }
    process = trainers.start("tiny_mdlm", "run", recorded=True, **options)
    folder = tmp_path / "run" / "checkpoints"
    process.wait_until(lambda: list(folder.glob(".tmp-step*")) and len(list(folder.glob("step-*"))) > 1)
    process.signal(signal.SIGTERM)
    assert_refused(process, 3, "stopped by SIGTERM", run_dir=tmp_path / "run")
    step = assert_outcome(tmp_path / "run", 3)["step"]
    assert checkpoints(tmp_path / "run") == sorted({*range(2, step + 1, 2), step})
    assert last_checkpoint(tmp_path / "run").step == step and not list(folder.glob(".tmp-*"))


def test_a_second_key_press_leaves_the_save_as_a_kill_would(trainers: Trainers, tmp_path: Path) -> None:
    """The save hangs; Ctrl-C twice ends the run all the same."""
    options = {"training__steps": 10**6, "checkpoint__every": 3, "checkpoint__asynchronous": True}
    process = trainers.start("tiny_mdlm", "run", env={"BRAID_FAULT": "save:after_tensors:hang@2"}, **options)
    process.wait_until(lambda: list((tmp_path / "run" / "checkpoints").glob(".tmp-step-00000006-*/optimizer*")))
    process.signal(signal.SIGINT)
    time.sleep(0.8)
    process.signal(signal.SIGINT)
    assert_refused(process, 130, "interrupted", run_dir=tmp_path / "run")
    assert checkpoints(tmp_path / "run") == [3]
