"""One checkpoint folder: what makes it valid, and reading it.

    step-00001234/  weights.safetensors, optimizer.safetensors, ...   one file per group of tensors
                    state.json                                        everything that is not a tensor
                    config.yaml, tokenizer/...                        whatever files the trainer adds
                    manifest.json                                     written last: size and xxh3_128 of every other
                                                                      file, and a hash of itself

A folder without a valid manifest is not a checkpoint. A valid one may be copied or renamed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from braid.kernels.errors import CheckpointError
from braid.pretrain.checkpoint.files import hash_file

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: tensors on the CPU by group and name, and the JSON state."""

    path: Path
    step: int
    groups: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def load_checkpoint(path: Path, groups: Collection[str] | None = None) -> Checkpoint:
    """Read a checkpoint folder, wherever it lies, after re-computing the hash of everything that is read.

    Args:
        groups: the groups wanted; None is all of them.

    Raises:
        CheckpointError: it is damaged, or has no such group.
    """
    from safetensors.torch import load_file

    path = Path(path)
    try:
        manifest = _read_manifest(path)
        unknown = set(groups or ()) - set(manifest["groups"])
        if unknown:
            raise _Problem(f"it has no {', '.join(sorted(unknown))}; it has {', '.join(manifest['groups'])}")
        wanted = [group for group in manifest["groups"] if groups is None or group in groups]
        unread = {f"{group}.safetensors" for group in manifest["groups"]} - {f"{group}.safetensors" for group in wanted}
        _check_files(path, {name: entry for name, entry in manifest["files"].items() if name not in unread})
    except _Problem as problem:
        raise CheckpointError(
            f"checkpoint {path} cannot be loaded", found=str(problem), change="name another checkpoint"
        ) from problem
    tensors = {group: load_file(path / f"{group}.safetensors") for group in wanted}
    return Checkpoint(path, manifest["step"], tensors, json.loads((path / STATE).read_bytes()))


def verify_folder(path: Path, *, step: int | None = None, from_disk: bool = False) -> str | None:
    """What is wrong with a checkpoint folder, or None: manifest, presence, sizes, then hashes of all files.

    Args:
        step: the step it should be of; None accepts any.
        from_disk: drop cached pages first, so that the disk itself is asked.
    """
    try:
        manifest = _read_manifest(path)
        if step is not None and manifest["step"] != step:
            raise _Problem(f"{MANIFEST} is that of step {manifest['step']}")
        _check_files(path, manifest["files"], from_disk=from_disk)
    except _Problem as problem:
        return str(problem)
    return None


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


def _check_files(path: Path, files: Mapping[str, Mapping[str, Any]], *, from_disk: bool = False) -> None:
    """Presence and size of every file first (cheap), then every hash."""
    for name, entry in files.items():
        try:
            size = (path / name).stat().st_size
        except OSError:
            raise _Problem(f"{name} is missing") from None
        if size != entry["size"]:
            raise _Problem(f"{name} has {size} bytes instead of {entry['size']}")
    for name, entry in files.items():
        try:
            size, digest = hash_file(path / name, from_disk=from_disk)
        except OSError as error:
            raise _Problem(f"{name} cannot be read: {error}") from error
        if (size, digest) != (entry["size"], entry["xxh3_128"]):
            raise _Problem(f"the content of {name} has changed: xxh3_128 {digest} instead of {entry['xxh3_128']}")
