"""The same checkpoint in other files. What is written is read back and compared with what it came from."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from braid.kernels.errors import CheckpointError, InputError
from braid.pretrain.checkpoint.files import fsync_folder
from braid.pretrain.checkpoint.folder import INDEX, STATE, CheckpointReader, open_checkpoint, verify_folder
from braid.pretrain.checkpoint.pieces import Entry, LocalTensor, Part
from braid.pretrain.checkpoint.snapshot import find_checkpoint
from braid.pretrain.checkpoint.store import SPACE_MARGIN, format_bytes
from braid.pretrain.checkpoint.tensor_files import DTYPES
from braid.pretrain.checkpoint.writing import seal_folder, write_tensors

MAX_FILES = 1000

Contents = dict[str, dict[str, str]]
"""Group -> name -> the group of the source it is read from."""


def reshard(path: Path, output: Path, *, num_files: int, content: str) -> str:
    """Write the checkpoint at `path` (or the newest valid one of a run directory) to the new folder `output`; returns a
    sentence about it. It takes the memory of one tensor, or of the part of one that goes into a file; two to compare.

    Args:
        num_files: files of each group, of about equal size; what is large is cut along its first dimension.
        content: `all`; `weights`, without optimizer and averages; `ema`, the averages in place of the weights.

    Raises InputError (the output exists, or cannot be written) and CheckpointError (no valid checkpoint there, or one
    without averages).
    """
    if not 1 <= num_files <= MAX_FILES:
        raise InputError("there is no such number of files", found=f"--files {num_files}", change=f"1 to {MAX_FILES}")
    if output.exists() or output.is_symlink():
        raise InputError(f"{output} exists", change="name a folder that is not there; nothing is rewritten in place")
    groups = {"all": None, "weights": ("weights", "encoder"), "ema": ("weights", "encoder", "ema")}[content]
    path = find_checkpoint(path, groups)
    if path.resolve() in output.resolve().parents:
        raise InputError(
            f"{output} would lie in the checkpoint itself", change="name a folder elsewhere; it stays as it is"
        )
    with open_checkpoint(path, check_tensors=False) as reader:
        contents = _contents(reader, content)
        temporary = output.parent / f".tmp-{output.name}-{os.getpid()}"
        try:
            _write(reader, contents, temporary, num_files)
            _compare(reader, contents, temporary)
            os.rename(temporary, output)
            fsync_folder(output.parent)
        except OSError as error:
            raise InputError(
                f"{output} could not be written",
                found=str(error),
                change="free some space or choose another place; the checkpoint is as it was",
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    written = [file for file in output.rglob("*") if file.is_file()]
    size = format_bytes(sum(file.stat().st_size for file in written))
    return f"{output}: step {reader.step}, {', '.join(contents)}; {size} in {len(written)} files, the same as {path}"


def _contents(reader: CheckpointReader, content: str) -> Contents:
    index = reader.index
    if content == "all":
        return {group: dict.fromkeys(entries, group) for group, entries in index.items()}
    if content == "ema" and not index.get("ema"):
        raise CheckpointError(
            "the checkpoint has no averaged weights",
            found=f"{reader.path} has {', '.join(index)}",
            change="leave out --ema, or name one of a run with training.ema_decay above 0",
        )
    averaged = index["ema"] if content == "ema" else {}
    contents = {"weights": {name: "ema" if name in averaged else "weights" for name in index["weights"]}}
    if "encoder" in index:
        contents["encoder"] = dict.fromkeys(index["encoder"], "encoder")
    return contents


def _write(reader: CheckpointReader, contents: Contents, folder: Path, num_files: int) -> None:
    tensor_files = {
        piece.file for entries in reader.index.values() for each in entries.values() for piece in each.pieces
    }
    others = {name: reader.path / name for name in reader.manifest["files"].keys() - tensor_files - {INDEX, STATE}}
    entries = {
        group: {name: reader.index[source][name] for name, source in sources.items()}
        for group, sources in contents.items()
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    needed = SPACE_MARGIN + sum(entry.num_bytes for named in entries.values() for entry in named.values())
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise InputError(
            f"too little space for {folder.parent / folder.name.removeprefix('.tmp-')}",
            found=f"needs {format_bytes(needed)}, free {format_bytes(free)}",
            change="free some space or choose another place",
        )
    folder.mkdir()
    cut = {group: divide(named, num_files) for group, named in entries.items()}
    written = []
    for number in range(num_files):
        parts = {group: files[number] for group, files in cut.items()}
        groups = {
            group: {name: _on_meta(entries[group][name], part) for name, part in named.items()}
            for group, named in parts.items()
        }

        def load(group: str, name: str, parts: dict[str, dict[str, Part | None]] = parts) -> Tensor:
            return reader.read_part(contents[group][name], name, parts[group][name])

        written.append(write_tensors(folder, groups, lambda phase: None, number, num_files, load))
    state = json.dumps(reader.state, indent=1)
    seal_folder(folder, reader.step, written, state, others, lambda phase: None)


def divide(entries: dict[str, Entry], num_files: int) -> list[dict[str, Part | None]]:
    """Which part of each tensor (None: all of it) goes into which file: laid end to end, tensors are cut every so many
    bytes, at the nearest row."""
    files: list[dict[str, Part | None]] = [{} for _ in range(num_files)]
    total, first = sum(entry.num_bytes for entry in entries.values()), 0
    for name, entry in entries.items():
        rows = entry.shape[0] if entry.shape else 1
        if not entry.num_bytes:
            files[0][name] = None
            continue
        edges = [total * number / num_files for number in range(num_files + 1)]
        cuts = [round(min(max((edge - first) / entry.num_bytes, 0), 1) * rows) for edge in edges]
        for number, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False)):
            if start < stop:
                files[number][name] = None if (start, stop) == (0, rows) else Part(0, ((start, stop),))
        first += entry.num_bytes
    return files


def _on_meta(entry: Entry, part: Part | None) -> LocalTensor:
    shape = list(entry.shape)
    if part is not None:
        shape[part.dim] = part.length
    return LocalTensor(torch.empty(shape, dtype=DTYPES[entry.dtype], device="meta"), entry.shape, part)


def _compare(reader: CheckpointReader, contents: Contents, folder: Path) -> None:
    """Raises OSError where what the disk holds is not what was read."""
    problem = verify_folder(folder, step=reader.step, from_disk=True)
    if problem:
        raise OSError(f"what was written reads back differently: {problem}")
    with open_checkpoint(folder, check_tensors=False) as written:
        for group, sources in contents.items():
            for name, source in sources.items():
                if not _same([written.read(group, name), reader.read(source, name)]):
                    raise OSError(f"what was written reads back differently: {name} of {group}")


def _same(tensors: Iterable[Tensor]) -> bool:
    """Bit for bit: a NaN is itself."""
    one, other = tensors
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(each.reshape(math.prod(each.shape)).view(torch.uint8) for each in (one, other)))
