"""The compiled kernels as a shared library: found or built at the first call, loaded once, never an exception.

    packaged   `BRAID_BUILD_KERNELS=1 pip install --no-build-isolation .` puts it beside this file
    cached     built by an earlier process, or by `make kernels`
    built      now, with g++ (and nvcc), into the cache: some ten seconds, once

The cache is BRAID_KERNELS_CACHE, else $XDG_CACHE_HOME/braid/kernels, else ~/.cache/braid/kernels; a library's name
holds a hash of the sources, flags, compilers and torch. Builders of the same library wait for each other on a lock that
dies with its holder; what they make appears under its name whole or not at all. Where nothing can be built or loaded,
one warning says why, and `dispatch.py` goes on without the library.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from braid.kernels import toolchain
from braid.kernels.toolchain import BuildError, Toolchain

LOG = logging.getLogger("braid.kernels")

PACKAGED = Path(__file__).with_name("compiled")

LOCK_SECONDS = 900
"""How long a builder is waited for. One that hangs is not waited for longer: this process builds for itself."""

FAILURE_SECONDS = 600
"""How long a failed build is not tried again, by the other ranks of a run or its next start."""


@dataclass(frozen=True)
class Library:
    """What was loaded, or why nothing was."""

    path: Path | None
    found: str
    """One line: how it was found and for what, or what is missing."""
    cuda: bool = False
    """Has kernels for CUDA tensors."""

    @property
    def loaded(self) -> bool:
        return self.path is not None


@cache
def load() -> Library:
    """The library, loaded into this process. After this call its operations are in `torch.ops.braid`."""
    try:
        path, found, cuda = _find_or_build()
        torch.ops.load_library(str(path))
    except (BuildError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        LOG.warning("braid: no compiled kernels, slower ones are used: %s", reason)
        return Library(None, reason)
    return Library(path, found, cuda)


def _find_or_build() -> tuple[Path, str, bool]:
    if not sys.platform.startswith("linux"):
        raise BuildError(f"compiled kernels are for Linux, this is {sys.platform}")
    for with_cuda in (True, False):
        if (path := PACKAGED / toolchain.packaged_name(with_cuda)).exists():
            return path, "packaged", with_cuda
    tools = toolchain.find()
    try:
        return _cached_or_built(tools)
    except BuildError as error:
        if not tools.nvcc:
            raise
        # A pair of compilers that do not get on must not cost the CPU its kernels, and CUDA has NVRTC.
        return _cached_or_built(replace(tools, nvcc=None, nvcc_version="", architectures=(), without_cuda=str(error)))


def _cached_or_built(tools: Toolchain) -> tuple[Path, str, bool]:
    path = cache_folder() / f"braid-{tools.key()}.so"
    how = "cached" if path.exists() else "built"
    if how == "built":
        _build_into_cache(tools, path)
    what = tools.compiler_version
    what += f"; {tools.nvcc_version}, sm_{', sm_'.join(map(str, tools.architectures))}" if tools.nvcc else ""
    what += f"; without CUDA: {tools.without_cuda}" if tools.without_cuda else ""
    return path, f"{how} by {what}", bool(tools.nvcc)


def cache_folder() -> Path:
    """Where built libraries are kept."""
    if named := os.environ.get("BRAID_KERNELS_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "braid" / "kernels"


def _build_into_cache(tools: Toolchain, path: Path) -> None:
    """Make `path`, unless another process does while this one waits for it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            if path.exists():
                return
            failure = path.with_suffix(".failed")
            with contextlib.suppress(OSError):
                if time.time() - failure.stat().st_mtime < FAILURE_SECONDS:
                    raise BuildError(f"{failure.read_text()} (tried a moment ago; remove {failure} to try again)")
            LOG.info("braid: compiling kernels into %s, once", path)
            try:
                build_library(tools, path)
            except BuildError as error:
                failure.write_text(str(error))
                raise
    except OSError as error:
        raise BuildError(f"the folder of compiled kernels, {path.parent}, cannot be used: {error}") from error


def build_library(tools: Toolchain, path: Path) -> None:
    """Build in a folder beside `path`, and move the result there. Folders of killed builders are removed."""
    for left in path.parent.glob(f"{path.stem}-*.building"):
        if time.time() - left.stat().st_mtime > LOCK_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{path.stem}-", suffix=".building", dir=path.parent) as name:
        folder = Path(name)
        toolchain.build(tools, folder / path.name, folder)
        os.replace(folder / path.name, path)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock, unless its holder hangs or the file system has none: then go on without it."""
    with path.open("wb") as file:
        give_up = time.monotonic() + LOCK_SECONDS
        while time.monotonic() < give_up:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:
                break
        yield


def main() -> int:
    """`python -m braid.kernels.library`: build into the cache now, or say why not."""
    LOG.setLevel(logging.INFO)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    library = load()
    if library.loaded:
        print(f"{library.path}: {library.found}")
    return 0 if library.loaded else 1


if __name__ == "__main__":
    sys.exit(main())
