"""`braid convert`: what a checkpoint holds, and the same bits in other files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_corpus import damage
from training_runs import Trainers, assert_refused, assert_same_bits, assert_same_run, checkpoints

from braid.launch.cli import main
from braid.pretrain.checkpoint.folder import load_checkpoint, open_checkpoint, verify_folder
from braid.pretrain.checkpoint.pieces import Entry
from braid.pretrain.checkpoint.snapshot import load_model
from braid.pretrain.convert import reshard as reshard_module
from braid.pretrain.convert.reshard import divide

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run_dir(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A joint model, six steps by two ranks that share every layer."""
    trainers = Trainers(corpus, tmp_path_factory.mktemp("convert"))
    trainers.train("tiny_ccdd", "run", ranks=2, training__steps=6, parallel__tensor=2, training__ema_decay=0.5)
    trainers.close()
    return trainers.folder / "run"


@pytest.fixture
def checkpoint(run_dir: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(run_dir / "checkpoints" / "step-00000006", tmp_path / "checkpoint"))


def refused(capsys: pytest.CaptureFixture, words: list[object], *said: str) -> None:
    assert main(["convert", *map(str, words)]) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("braid: error: ") and "Traceback" not in complaint
    for text in said:
        assert text in complaint


def tensor_files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}


# -- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_says_what_is_there(run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["convert", "inspect", str(run_dir)]) == 0
    text = capsys.readouterr().out
    for said in ("step-00000006", "valid, every hash re-computed", "6 of 6", "ccdd", "259 entries", "noise contract",
                 "2 processes (engine plain, tensor 2)", "weights", "optimizer", "ema", "encoder", "F32"):  # fmt: skip
        assert said in text, said
    assert main(["convert", "inspect", str(run_dir), "--json", "--tensors"]) == 0
    facts = json.loads(capsys.readouterr().out)
    whole = load_checkpoint(run_dir / "checkpoints" / "step-00000006")
    assert facts["valid"] and facts["problem"] is None and facts["step"] == whole.step == 6
    assert facts["written_by"]["processes"] == 2 and facts["written_by"]["tensor"] == 2
    assert facts["tokenizer"]["hash"] == whole.state["tokenizer_hash"]
    for group, tensors in whole.groups.items():
        figures = facts["groups"][group]
        assert figures["tensors"] == len(tensors) and figures["values"] == sum(t.numel() for t in tensors.values())
        assert figures["bytes"] == sum(t.nbytes for t in tensors.values())
        assert figures["files"] == (1 if group == "encoder" else 2)
        assert {name: tuple(each["shape"]) for name, each in facts["tensors"][group].items()} == {
            name: tuple(tensor.shape) for name, tensor in tensors.items()
        }
    assert main(["convert", "inspect", str(run_dir / "checkpoints" / "step-00000006"), "--tensors"]) == 0
    assert "network.blocks.0" in (text := capsys.readouterr().out) and "in 2 pieces" in text


def test_inspect_of_what_is_damaged_shows_it_and_fails(checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    damage(checkpoint / "ema-001.safetensors", "flipped")
    assert main(["convert", "inspect", str(checkpoint)]) == 2
    shown = capsys.readouterr()
    assert "DAMAGED: the content of ema-001.safetensors has changed" in shown.out and "optimizer" in shown.out
    assert "cannot be loaded" in shown.err
    damage(checkpoint / "index.json", "missing")
    refused(capsys, ["inspect", checkpoint], "index.json is missing")
    refused(capsys, ["inspect", checkpoint / "nothing"], "neither a run directory nor a checkpoint", "no such folder")
    refused(capsys, ["inspect", checkpoint.parent], "no checkpoints/ and no manifest.json in it")


# -- reshard ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_files", [1, 3])
def test_the_same_in_other_files(run_dir: Path, tmp_path: Path, num_files: int, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "handed" / "over"
    assert main(["convert", "reshard", str(run_dir), str(output), "--files", str(num_files)]) == 0
    assert f"{output}: step 6, weights, optimizer, ema, encoder" in capsys.readouterr().out
    source = run_dir / "checkpoints" / "step-00000006"
    assert verify_folder(output, step=6) is None and os.listdir(output.parent) == ["over"]
    assert_same_bits(load_checkpoint(output), load_checkpoint(source))
    for name in ("config.yaml", "state.json"):
        assert (
            json.loads((output / name).read_text()) == json.loads((source / name).read_text())
            if (name == "state.json")
            else (output / name).read_bytes() == (source / name).read_bytes()
        )
    sizes = tensor_files(output)
    if num_files == 1:
        assert sizes.keys() == {f"{group}.safetensors" for group in ("weights", "optimizer", "ema", "encoder")}
    else:
        for group in ("weights", "optimizer", "ema"):
            each = [size for name, size in sizes.items() if name.startswith(group)]
            assert len(each) == 3 and max(each) < 1.3 * min(each), sizes


def test_a_run_goes_on_from_it(run_dir: Path, trainers: Trainers, tmp_path: Path) -> None:
    """On one process, from five files a group, as from what two processes wrote."""
    for name in ("packed", "straight"):
        shutil.copytree(run_dir, tmp_path / name)
    step = tmp_path / "packed" / "checkpoints" / "step-00000006"
    step.rename(tmp_path / "original")
    done = trainers.braid("convert", "reshard", "original", step, "--files", 5)
    assert done.code == 0, done.err
    for name in ("packed", "straight"):
        options = {"training__steps": 9, "training__ema_decay": 0.5}
        assert "resumed from step 6" in trainers.train("tiny_ccdd", name, **options).out
    assert_same_run(tmp_path / "packed", tmp_path / "straight")


@pytest.mark.parametrize("option", ["--weights-only", "--ema"])
def test_what_only_training_needs_is_left_out(
    run_dir: Path, trainers: Trainers, tmp_path: Path, option: str, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "run" / "checkpoints" / "step-00000006"
    assert main(["convert", "reshard", str(run_dir), str(output), option]) == 0
    with open_checkpoint(output) as reader:
        assert reader.index.keys() == {"weights", "encoder"}
    found = load_model(output, CPU).objective.state_dict()
    averaged, trained = (load_model(run_dir, CPU, use_ema=each).objective.state_dict() for each in (True, False))
    wanted, other = (averaged, trained) if option == "--ema" else (trained, averaged)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert not all(torch.equal(found[name], value) for name, value in other.items())
    shutil.copy(run_dir / "config.yaml", tmp_path / "run")
    process = trainers.start("tiny_ccdd", "run", training__steps=9, training__ema_decay=0.5)
    assert_refused(process, 2, "has no optimizer state: it can be sampled and evaluated, not continued")
    if option == "--ema":
        refused(capsys, ["reshard", output, tmp_path / "again", "--ema"], "no averaged weights", "leave out --ema")


def test_careless_users(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "there").mkdir()
    refused(capsys, ["reshard", checkpoint, tmp_path / "there"], "there exists", "nothing is rewritten in place")
    refused(capsys, ["reshard", checkpoint, checkpoint], "checkpoint exists")
    refused(capsys, ["reshard", checkpoint, checkpoint / "new"], "would lie in the checkpoint itself")
    refused(capsys, ["reshard", checkpoint, tmp_path / "new", "--files", 0], "--files 0", "1 to 1000")
    refused(capsys, ["reshard", tmp_path / "nowhere", tmp_path / "new"], "no such folder")
    (tmp_path / "file").touch()
    refused(capsys, ["reshard", checkpoint, tmp_path / "file" / "new"], "could not be written", "is as it was")
    damage(checkpoint / "optimizer-000.safetensors", "truncated")
    refused(capsys, ["reshard", checkpoint, tmp_path / "new"], "optimizer-000.safetensors has")
    assert main(["convert", "reshard", str(checkpoint), str(tmp_path / "new"), "--weights-only"]) == 0
    capsys.readouterr()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "file", "new", "there"]


def test_no_space(checkpoint: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this process may not mount a tmpfs")
    try:
        refused(capsys, ["reshard", checkpoint, disk / "new"], f"too little space for {disk / 'new'}", "free 0.1 MiB")
        monkeypatch.setattr(reshard_module, "SPACE_MARGIN", -(2**24))  # as if the space went while it is written
        refused(capsys, ["reshard", checkpoint, disk / "new"], "No space left on device", "free some space")
        assert os.listdir(disk) == []
    finally:
        subprocess.run(["umount", disk], check=True)
    assert verify_folder(checkpoint) is None


def test_what_reads_back_differently_is_not_kept(checkpoint, tmp_path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    write = reshard_module.write_tensors

    def from_a_bad_disk(folder: Path, *arguments):
        written = write(folder, *arguments)
        damage(folder / "weights.safetensors", "flipped")
        return written

    monkeypatch.setattr(reshard_module, "write_tensors", from_a_bad_disk)
    refused(capsys, ["reshard", checkpoint, tmp_path / "new"], "reads back differently: the content of weights")
    assert checkpoints(tmp_path) == [] and os.listdir(tmp_path) == ["checkpoint"]


@settings(max_examples=200, deadline=None, database=None)
@given(st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=8), st.integers(1, 6))
def test_every_row_goes_into_one_file(shapes: list[list[int]], num_files: int) -> None:
    entries = {f"t{number}": Entry("F32", tuple(shape), ()) for number, shape in enumerate(shapes)}
    files = divide(entries, num_files)
    assert len(files) == num_files
    for name, entry in entries.items():
        parts = [file[name] for file in files if name in file]
        if None in parts:
            assert len(parts) == 1
        else:
            rows = [row for part in parts for start, stop in part.ranges for row in range(start, stop)]
            assert rows == list(range(entry.shape[0])) and all(part.dim == 0 for part in parts)
    row = max(entry.num_bytes // max(entry.shape[0], 1) if entry.shape else 4 for entry in entries.values())
    total = sum(entry.num_bytes for entry in entries.values())
    for file in files:
        size = sum(
            entries[name].num_bytes if part is None else entries[name].num_bytes * part.length // entries[name].shape[0]
            for name, part in file.items()
        )
        assert abs(size - total / num_files) <= row
