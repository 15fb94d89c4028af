"""Writing into the temporary folder of a checkpoint: each process its tensors, then one of them all the rest."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .files import file_chunks, fsync_folder, write_file
from .folder import FORMAT, INDEX, MANIFEST, STATE, render_manifest
from .pieces import Index, LocalTensor, merge_indices
from .tensor_files import safetensors_chunks

Fault = Callable[[str], None]
"""Told of every phase of a save (faults.py)."""


@dataclass(frozen=True)
class Written:
    """What one process has written: size and xxh3_128 of its files, and the tensors in them."""

    files: dict[str, dict[str, Any]]
    index: Index


def write_tensors(
    folder: Path,
    groups: Mapping[str, Mapping[str, LocalTensor]],
    fault: Fault,
    writer: int = 0,
    num_writers: int = 1,
    load: Callable[[str, str], Any] | None = None,
) -> Written:
    """This process's tensors, a file for each group that has any, all of it durable. Raises OSError.

    load: gives the values of (group, name) when their turn comes; those of `groups` may then be on the device `meta`.
    """
    fault("before_write")
    written = Written({}, {})
    for group, tensors in groups.items():
        name = f"{group}.safetensors" if num_writers == 1 else f"{group}-{writer:03d}.safetensors"
        written.index[group] = {key: tensor.entry(name) for key, tensor in tensors.items()}
        if tensors:
            values = {key: tensor.values for key, tensor in tensors.items()}
            fetch = load and (lambda key, group=group: load(group, key))
            chunks = safetensors_chunks(values, lambda: fault("during_tensors"), fetch)
            written.files[name] = _write(folder, name, chunks)
    fsync_folder(folder)
    fault("after_tensors")
    return written


def seal_folder(
    folder: Path,
    step: int,
    by_writers: Sequence[Written],
    state: str,
    files: Mapping[str, bytes | Path],
    fault: Fault,
) -> None:
    """Everything else, the manifest last, all of it durable. Raises OSError.

    files: relative name -> content, or a file to copy.
    """
    written = {name: entry for each in by_writers for name, entry in each.files.items()}

    def write(name: str, chunks: Iterable[bytes | memoryview]) -> None:
        assert name not in written and name != MANIFEST, f"{name}: taken"
        written[name] = _write(folder, name, chunks)

    merged = merge_indices(each.index for each in by_writers)
    index = {group: {name: entry.to_json() for name, entry in entries.items()} for group, entries in merged.items()}
    write(INDEX, [json.dumps(index).encode()])
    write(STATE, [state.encode()])
    for name, content in files.items():
        write(name, [content] if isinstance(content, bytes) else file_chunks(content))
    for subfolder in {parent for name in written for parent in Path(name).parents}:
        fsync_folder(folder / subfolder)
    fault("before_manifest")
    manifest = {"format": FORMAT, "step": step, "files": written}
    write_file(folder / MANIFEST, iter([render_manifest(manifest)]))
    fsync_folder(folder)
    fault("after_manifest")


def _write(folder: Path, name: str, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    parts = PurePosixPath(name).parts
    assert parts and ".." not in parts and not name.startswith("/"), f"{name}: not a name below the checkpoint"
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    size, digest = write_file(path, iter(chunks))
    return {"size": size, "xxh3_128": digest}
