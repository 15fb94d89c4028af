"""The compiled library is found, built once, and does without whatever is missing; real builds, in child processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from braid.kernels import dispatch, library, toolchain
from braid.kernels.errors import BraidError

LOAD = "from braid.kernels import library; found = library.load(); print(found.loaded, found.found)"
DRAW = (
    "import torch; from braid.kernels import dispatch, random\n"
    "print(dispatch.choose('cpu').name, float(random.normal(1, torch.arange(1), torch.arange(1), 1)))"
)

needs_compiler = pytest.mark.skipif(dispatch.choose("cpu").name != "compiled", reason="there is no compiler")


def start(code: str, **environment: str) -> subprocess.Popen[str]:
    env = os.environ | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], env=env, start_new_session=True, **pipes)


def finish(process: subprocess.Popen[str]) -> tuple[str, list[str]]:
    """What it printed, and the lines of its complaints."""
    printed, complaints = process.communicate(timeout=600)
    assert process.returncode == 0, complaints
    return printed, complaints.splitlines()


def wrapped_compiler(folder: Path, body: str) -> str:
    """A compiler whose calls are counted in `folder`/calls, one line each."""
    script = folder / "compiler"
    script.write_text(f'#!/bin/sh\necho "$$" >> "{folder}/calls"\n{body}\n')
    script.chmod(0o755)
    return str(script)


def test_importing_builds_nothing(tmp_path):
    code = "import braid.kernels.random, braid.kernels.noising; import braid.pretrain.objectives.base"
    finish(start(code, BRAID_KERNELS_CACHE=str(tmp_path / "cache")))
    assert not (tmp_path / "cache").exists()


def test_without_a_compiler_noise_is_drawn_eagerly(tmp_path):
    """One line says so. The number is that of the compiled kernels."""
    environment = {"BRAID_KERNELS_CACHE": str(tmp_path), "PATH": str(tmp_path), "CXX": "g++"}
    printed, complaints = finish(start(DRAW, **environment))
    from braid.kernels import random

    assert printed == f"eager {float(random.normal(1, torch.arange(1), torch.arange(1), 1))}\n"
    assert len(complaints) == 1 and "there is no C++ compiler g++ on the PATH" in complaints[0]


def test_a_compiler_that_fails_is_not_tried_again_at_once(tmp_path):
    compiler = wrapped_compiler(
        tmp_path, '[ "$1" = --version ] && echo broken 1.0 && exit\necho "x.h: error: it is broken" >&2; exit 1'
    )
    environment = {"BRAID_KERNELS_CACHE": str(tmp_path / "cache"), "CXX": compiler}
    printed, complaints = finish(start(DRAW, **environment))
    assert printed.startswith("eager ")
    assert len(complaints) == 1 and "compiler: x.h: error: it is broken" in complaints[0]
    calls = (tmp_path / "calls").read_text().count("\n")
    _, complaints = finish(start(LOAD, **environment))
    assert len(complaints) == 1 and "it is broken (tried a moment ago" in complaints[0]
    assert (tmp_path / "calls").read_text().count("\n") == calls + 1  # its version


@needs_compiler
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("")
    printed, complaints = finish(start(DRAW, BRAID_KERNELS_CACHE=str(tmp_path / "file" / "cache")))
    assert printed.startswith("eager ")
    assert len(complaints) == 1 and "cannot be used" in complaints[0] and "Not a directory" in complaints[0]


def test_the_cache_can_be_moved(monkeypatch):
    monkeypatch.delenv("BRAID_KERNELS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert library.cache_folder() == Path("/somewhere/braid/kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert library.cache_folder() == Path.home() / ".cache/braid/kernels"
    monkeypatch.setenv("BRAID_KERNELS_CACHE", "/elsewhere")
    assert library.cache_folder() == Path("/elsewhere")


@needs_compiler
def test_the_key_follows_the_sources_and_the_compiler(tmp_path, monkeypatch):
    tools = toolchain.find()
    assert tools.key() == tools.key() != toolchain.Toolchain(tools.compiler, "another version").key()
    for path in toolchain.SOURCES.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = toolchain.sources_hash()
    monkeypatch.setattr(toolchain, "SOURCES", tmp_path)
    toolchain.sources_hash.cache_clear()
    assert toolchain.sources_hash() == before
    (tmp_path / "core.h").write_text("// nothing\n")
    toolchain.sources_hash.cache_clear()
    assert toolchain.sources_hash() != before
    monkeypatch.undo()
    toolchain.sources_hash.cache_clear()


@needs_compiler
@pytest.mark.slow
def test_of_two_processes_one_builds(tmp_path):
    """An unoptimised build, for speed."""
    compiler = wrapped_compiler(tmp_path, 'exec g++ "$@" $([ "$1" = --version ] || echo -O0)')
    environment = {"BRAID_KERNELS_CACHE": str(tmp_path / "cache"), "CXX": compiler}
    both = [start(DRAW, **environment) for _ in range(2)]
    printed = {finish(process)[0] for process in both}
    assert len(printed) == 1 and printed.pop().startswith("compiled ")
    calls = (tmp_path / "calls").read_text().count("\n")
    assert calls == 2 + len(toolchain.find().compilations(tmp_path)) + 1  # versions, files, the link
    assert [path.suffix for path in sorted((tmp_path / "cache").iterdir())] == [".lock", ".so"]


@needs_compiler
@pytest.mark.slow
def test_a_killed_builder_is_in_nobodys_way(tmp_path):
    compiler = wrapped_compiler(tmp_path, 'exec g++ "$@" $([ "$1" = --version ] || echo -O0)')
    environment = {"BRAID_KERNELS_CACHE": str(tmp_path / "cache"), "CXX": compiler}
    killed = start(DRAW, **environment)
    deadline = time.monotonic() + 300
    while not list((tmp_path / "cache").glob("*.building/*.o")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL and not list((tmp_path / "cache").glob("*.so"))
    assert finish(start(DRAW, **environment))[0].startswith("compiled ")


@pytest.mark.parametrize(
    "asked, device, message",
    [("fast", "cpu", "BRAID_KERNELS is unknown"), ("compiled", "mps", "BRAID_KERNELS=compiled cannot be used on mps")],
)
def test_what_cannot_be_had_is_an_error_for_users(monkeypatch, asked, device, message):
    monkeypatch.setenv("BRAID_KERNELS", asked)
    with pytest.raises(BraidError, match=message):
        dispatch.choose.__wrapped__(device)


def test_implementations_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("BRAID_KERNELS", "eager")
    assert dispatch.choose.__wrapped__("cpu") == dispatch.Choice("eager", "BRAID_KERNELS=eager")
    monkeypatch.setenv("BRAID_KERNELS", "triton")
    assert dispatch.choose.__wrapped__("cpu").name == "eager"
    monkeypatch.setenv("BRAID_KERNELS", "auto")
    assert dispatch.choose.__wrapped__("mps").name == "eager"


@needs_compiler
@pytest.mark.slow
@pytest.mark.skipif(toolchain.find_nvcc() is None, reason="there is no nvcc")
def test_a_library_with_cuda_can_be_loaded_without(tmp_path):
    """Every launcher is there, and what only a torch with CUDA has is not asked for."""
    tools, nvcc = toolchain.find(), toolchain.find_nvcc()
    with_cuda = toolchain.Toolchain(tools.compiler, tools.compiler_version, nvcc, "", (90,))
    toolchain.build(with_cuda, tmp_path / "library.so", tmp_path)
    code = (
        f"import torch; torch.ops.load_library({str(tmp_path / 'library.so')!r}); out = torch.zeros(1, 1, 4)\n"
        "torch.ops.braid.normals_into(out, torch.tensor(1), torch.arange(1), torch.arange(1), 0, 0); print(out.any())"
    )
    assert finish(start(code))[0] == "tensor(True)\n"


@needs_compiler
@pytest.mark.slow
def test_an_nvcc_that_fails_does_not_cost_the_cpu_its_kernels(tmp_path, monkeypatch):
    nvcc = wrapped_compiler(tmp_path, 'echo "error: unsupported host compiler" >&2; exit 1')
    tools = toolchain.find()
    broken = toolchain.Toolchain(tools.compiler, tools.compiler_version, nvcc, "nvcc 1.0", (90,))
    monkeypatch.setattr(toolchain, "find", lambda: broken)
    monkeypatch.setenv("BRAID_KERNELS_CACHE", str(tmp_path / "cache"))
    path, found, with_cuda = library._find_or_build()
    assert path.exists() and not with_cuda and "without CUDA: compiler: error: unsupported host compiler" in found
