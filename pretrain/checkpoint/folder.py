"""One checkpoint folder: what makes it valid, and reading it.

    step-00001234/  weights.safetensors, optimizer.safetensors, ...   the tensors, by group
                    index.json                                        which tensors there are, and where each lies
                    state.json                                        everything that is not a tensor
                    config.yaml, tokenizer/...                        whatever files the trainer adds
                    manifest.json                                     written last: size and xxh3_128 of every other
                                                                      file, and a hash of itself

A folder without a valid manifest is not a checkpoint. A valid one may be copied or renamed.

A checkpoint has no layout: its index is of whole tensors, by the names they have in a run of one process. Where several
processes have written it, each has left a file for a group, `weights-000.safetensors`, `weights-001.safetensors`, and a
tensor may lie there in pieces:

    {"weights": {"network.embedding.weight": {"dtype": "F32", "shape": [512, 64], "pieces": [
        {"file": "weights-000.safetensors", "dim": 0, "ranges": [[0, 256]]},
        {"file": "weights-001.safetensors", "dim": 0, "ranges": [[256, 512]]}]}}}

A piece is the tensor of that name in that file. It is what the whole tensor has in the `ranges` (start, stop) along
`dim`, laid end to end; without these two it is the whole tensor. The pieces of a tensor cover it once, so the index and
the safetensors package are all it takes to read a checkpoint:

    offset = 0
    for start, stop in piece["ranges"]:
        whole.narrow(dim, start, stop - start).copy_(tensor.narrow(dim, offset, stop - start))
        offset += stop - start
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from braid.kernels.errors import CheckpointError
from braid.pretrain.checkpoint.files import hash_file
from braid.pretrain.checkpoint.pieces import Entry, Index, Part, read_part, read_span
from braid.pretrain.checkpoint.tensor_files import TensorFile

if TYPE_CHECKING:
    from torch import Tensor

    from braid.parallel.layers import Shard

FORMAT = 2
MANIFEST, INDEX, STATE = "manifest.json", "index.json", "state.json"


class CheckpointReader:
    """An open checkpoint folder: what it holds is known, its tensors are read one by one, or a part of one."""

    def __init__(self, path: Path, manifest: dict[str, Any], index: Index) -> None:
        self.path, self.manifest, self.index = path, manifest, index
        self.step: int = manifest["step"]
        self.state: dict[str, Any] = json.loads((path / STATE).read_bytes())
        self._files: dict[str, TensorFile] = {}

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def read(self, group: str, name: str, shard: Shard | None = None) -> Tensor:
        """A tensor on the CPU, or what a process holds of it, zeros at its end included. Raises CheckpointError."""
        values = self.read_part(group, name, None if shard is None else Part.of(shard))
        return values if shard is None else shard.pad(values)

    def read_span(self, group: str, name: str, shard: Shard | None, start: int, stop: int) -> Tensor:
        """Of what `read` gives, laid end to end, the values from `start` to `stop`. Raises CheckpointError."""
        return self._reading(group, name, lambda entry: read_span(entry, name, shard, start, stop, self._open))

    def read_part(self, group: str, name: str, part: Part | None) -> Tensor:
        """The part of a tensor, None for all of it, on the CPU. Raises CheckpointError."""
        return self._reading(group, name, lambda entry: read_part(entry, name, part, self._open))

    def _reading(self, group: str, name: str, read: Callable[[Entry], Tensor]) -> Tensor:
        """CheckpointError: a file cannot be read, or the index says of it what it does not hold."""
        try:
            return read(self.index[group][name])
        except (OSError, ValueError) as error:
            raise refusal(self.path, f"{name} of {group} cannot be read: {error}") from error

    def _open(self, name: str) -> TensorFile:
        if name not in self._files:
            self._files[name] = TensorFile(self.path / name)
        return self._files[name]


@dataclass(frozen=True)
class Checkpoint:
    """The whole of a checkpoint in memory: tensors on the CPU by group and name, and the JSON state."""

    path: Path
    step: int
    groups: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def load_checkpoint(path: Path, groups: Collection[str] | None = None) -> Checkpoint:
    """Read everything, or the groups named, after checking it. Raises CheckpointError."""
    with open_checkpoint(path, groups) as reader:
        wanted = [group for group in reader.index if groups is None or group in groups]
        tensors = {group: {name: reader.read(group, name) for name in reader.index[group]} for group in wanted}
        return Checkpoint(reader.path, reader.step, tensors, reader.state)


def open_checkpoint(
    path: Path, groups: Collection[str] | None = None, *, check_tensors: bool = True
) -> CheckpointReader:
    """Open a checkpoint folder, wherever it lies, after re-computing the hash of everything that is to be read.

    Args:
        groups: the groups that will be read; None is all of them.
        check_tensors: False where somebody else has just done it: then only the files beside the tensors are hashed.

    Raises:
        CheckpointError: it is damaged, or has no such group.
    """
    path = Path(path)
    try:
        manifest = _read_manifest(path)
        index = _read_index(path, manifest)
        unknown = set(groups or ()) - set(index)
        if unknown:
            raise _Problem(f"it has no {', '.join(sorted(unknown))}; it has {', '.join(index)}")
        _check_files(path, _files_of(manifest, index, groups if check_tensors else ()))
    except _Problem as problem:
        raise refusal(path, str(problem)) from problem
    return CheckpointReader(path, manifest, index)


def verify_folder(
    path: Path,
    *,
    step: int | None = None,
    groups: Collection[str] | None = None,
    share: tuple[int, int] = (0, 1),
    from_disk: bool = False,
    trusted: Collection[str] = (),
) -> str | None:
    """What is wrong with a checkpoint folder, or None: manifest, presence, sizes, then hashes.

    Args:
        step: the step it should be of; None accepts any.
        groups: the groups whose tensors matter; None is all of them, and a group that is not there is no problem.
        share: (n, of how many): re-compute the hashes of this share of the files, where others do the rest.
        from_disk: drop cached pages first, so that the disk itself is asked.
        trusted: files whose hashes somebody has just re-computed.
    """
    try:
        manifest = _read_manifest(path)
        if step is not None and manifest["step"] != step:
            raise _Problem(f"{MANIFEST} is that of step {manifest['step']}")
        files = _files_of(manifest, _read_index(path, manifest), groups)
        number, of = share
        hashed = [name for name in list(files)[number::of] if name not in trusted]
        _check_files(path, files, hashed, from_disk=from_disk)
    except _Problem as problem:
        return str(problem)
    return None


def refusal(path: Path, found: str) -> CheckpointError:
    """What to raise when a checkpoint is no good."""
    return CheckpointError(f"checkpoint {path} cannot be loaded", found=found, change="name another checkpoint")


def reads_back(path: Path, files: Mapping[str, Mapping[str, Any]]) -> str | None:
    """What is wrong with files that were just written (name -> size and xxh3_128), asking the disk itself; or None."""
    try:
        _check_files(path, files, from_disk=True)
    except _Problem as problem:
        return str(problem)
    return None


def _files_of(manifest: dict[str, Any], index: Index, groups: Collection[str] | None) -> dict[str, dict[str, Any]]:
    """The manifest's files, less those that hold only tensors of other groups."""
    homes = {
        group: {piece.file for entry in entries.values() for piece in entry.pieces} for group, entries in index.items()
    }
    wanted = set().union(*(files for group, files in homes.items() if groups is None or group in groups))
    unread = set().union(*homes.values()) - wanted
    return {name: entry for name, entry in manifest["files"].items() if name not in unread}


def _read_index(path: Path, manifest: dict[str, Any]) -> Index:
    _check_files(path, {INDEX: manifest["files"][INDEX]})
    index = json.loads((path / INDEX).read_bytes())
    return {
        group: {name: Entry.from_json(entry) for name, entry in entries.items()} for group, entries in index.items()
    }


class _Problem(Exception):
    """Why a folder is not a valid checkpoint."""


def render_manifest(body: dict[str, Any]) -> bytes:
    """The manifest's only spelling: a changed bit anywhere is either no JSON, another hash or another spelling."""
    digest = xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
    return json.dumps(body | {"xxh3_128": digest}, indent=1).encode()


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise _Problem("there is no such folder")
    try:
        content = (path / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise _Problem(f"{MANIFEST} is missing: not a checkpoint, or one that was not finished") from None
    except OSError as error:
        raise _Problem(f"{MANIFEST} cannot be read: {error}") from error
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise _Problem(f"{MANIFEST} is damaged ({len(content)} bytes): {error}") from error
    body = {key: value for key, value in manifest.items() if key != "xxh3_128"} if isinstance(manifest, dict) else {}
    if render_manifest(body) != content:
        raise _Problem(f"{MANIFEST} is damaged ({len(content)} bytes): its hash does not match")
    if body["format"] != FORMAT:
        raise _Problem(f"its format is {body['format']}, this version reads {FORMAT}")
    return body


def _check_files(
    path: Path,
    files: Mapping[str, Mapping[str, Any]],
    hashed: Collection[str] | None = None,
    *,
    from_disk: bool = False,
) -> None:
    """Presence and size of every file first (cheap), then every hash, or those of `hashed`."""
    for name, entry in files.items():
        try:
            size = (path / name).stat().st_size
        except OSError:
            raise _Problem(f"{name} is missing") from None
        if size != entry["size"]:
            raise _Problem(f"{name} has {size} bytes instead of {entry['size']}")
    for name in files if hashed is None else hashed:
        entry = files[name]
        try:
            size, digest = hash_file(path / name, from_disk=from_disk)
        except OSError as error:
            raise _Problem(f"{name} cannot be read: {error}") from error
        if (size, digest) != (entry["size"], entry["xxh3_128"]):
            raise _Problem(f"the content of {name} has changed: xxh3_128 {digest} instead of {entry['xxh3_128']}")
