"""The command lines that make the compiled library out of `csrc/`, and the key under which the result is kept.

Host code is compiled once for each instruction set; device code by nvcc, where torch is built for CUDA and an nvcc of
the same major version is found, for all architectures below that it knows, and as PTX for later ones. Every operation
is a few files of its own (`X.h`, `X_host.h`, `X_host.cpp`, `X.cuh`, `X_cuda.h`, `X_cuda.cu`, `X_binding.cpp`), found by
their names. (setup.py loads this file by itself: it imports nothing else of Braid.)
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

SOURCES = Path(__file__).with_name("csrc")
NORMAL_TABLE = Path(__file__).with_name("normal_table.inc")

TORCH_TARGET_VERSION = "0x020b000000000000"
"""2.11, the oldest torch the library is to be loaded by, as the stable ABI's headers want it."""

INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {"generic": ()}
if platform.machine() == "x86_64":
    INSTRUCTION_SETS["avx2"] = ("-mavx2", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt")
    INSTRUCTION_SETS["avx512"] = (
        *INSTRUCTION_SETS["avx2"],
        *("-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl"),
    )

ARCHITECTURES = (80, 90, 100)
"""Compute capabilities that device code is compiled for: A100, H100 and H200, B200."""

COMMON_FLAGS = ("-std=c++17", "-O3", "-fPIC")
EXACT_FLAGS = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
"""Every operation rounded on its own, and nothing that would keep loops from being vectorised."""


class BuildError(Exception):
    """A compiler failed, or there is none; the message is one line."""


@dataclass(frozen=True)
class Toolchain:
    """What there is to build with."""

    compiler: str
    compiler_version: str
    nvcc: str | None = None
    nvcc_version: str = ""
    architectures: tuple[int, ...] = ()
    without_cuda: str = ""
    """Why device code is not compiled; empty where it is."""

    def key(self) -> str:
        """16 hexadecimal digits: sources, flags, compilers, torch. Another key, another library."""
        parts = [self.compiler_version, self.nvcc_version, torch.__version__, platform.machine()]
        parts += [repr(command) for command in (*self.compilations(Path("o")), self.link([], Path("l")))]
        digest = hashlib.sha256("\0".join(parts).encode())
        digest.update(sources_hash().encode())
        return digest.hexdigest()[:16]

    def compilations(self, folder: Path) -> dict[tuple[str, ...], Path]:
        """Command line -> the object file it makes in `folder`."""
        commands = {}
        compiler = (self.compiler, *COMMON_FLAGS, *EXACT_FLAGS)
        for source in sorted(SOURCES.glob("*.cpp")):
            if source.stem.endswith("_host"):
                for name, flags in INSTRUCTION_SETS.items():
                    made = folder / f"{source.stem}_{name}.o"
                    commands[(*compiler, *flags, f"-DBRAID_ISA={name}", "-c", str(source), "-o", str(made))] = made
                continue
            flags = self._binding_flags() if source.stem.endswith("_binding") else ()
            made = folder / f"{source.stem}.o"
            commands[(*compiler, *flags, "-c", str(source), "-o", str(made))] = made
        if self.nvcc:
            for source in sorted(SOURCES.glob("*_cuda.cu")):
                made = folder / f"{source.stem}.o"
                commands[(self.nvcc, *nvcc_flags(self.architectures), "-c", str(source), "-o", str(made))] = made
        return commands

    def _binding_flags(self) -> tuple[str, ...]:
        include = Path(torch.__file__).parent / "include"
        stable = (f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", "-DTORCH_STABLE_ONLY")
        return (*stable, *(("-DBRAID_CUDA",) if self.nvcc else ()), "-isystem", str(include))

    def link(self, objects: Sequence[Path], library: Path) -> tuple[str, ...]:
        """The command line that makes `library`. It must name libtorch.so among what it needs, even though nothing of
        it is used where torch has no CUDA: it is what brings libtorch_cuda.so where torch has."""
        torch_libraries = Path(torch.__file__).parent / "lib"
        command = [self.compiler, "-shared", "-o", str(library), *map(str, objects), f"-L{torch_libraries}"]
        command += ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-Wl,--as-needed"]
        if self.nvcc:
            command += [f"-L{folder}" for folder in cuda_libraries(self.nvcc)]
            command += ["-lcudart_static", "-lpthread", "-ldl", "-lrt"]
        return tuple(command)


def find() -> Toolchain:
    """The compilers of this machine, or BuildError without a C++ compiler. CXX and CUDACXX name others."""
    name = os.environ.get("CXX", "g++")
    compiler = shutil.which(name)
    if compiler is None:
        raise BuildError(f"there is no C++ compiler {name} on the PATH")
    version = first_line(compiler, "--version")
    if torch.version.cuda is None:
        return Toolchain(compiler, version, without_cuda="this torch is built without CUDA")
    nvcc = find_nvcc()
    if nvcc is None:
        return Toolchain(compiler, version, without_cuda="there is no nvcc")
    nvcc_version = last_line(nvcc, "--version")
    if nvcc_major(nvcc) != torch.version.cuda.partition(".")[0]:
        reason = f"{nvcc} is of another major version than torch's CUDA {torch.version.cuda}"
        return Toolchain(compiler, version, without_cuda=reason)
    return Toolchain(compiler, version, nvcc, nvcc_version, known_architectures(nvcc))


def find_nvcc() -> str | None:
    """Named by CUDACXX, on the PATH, in CUDA_HOME, or in the usual place."""
    roots = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ] + ["/usr/local/cuda"]
    places = [os.environ.get("CUDACXX"), "nvcc", *(os.path.join(root, "bin", "nvcc") for root in roots)]
    return next((found for place in places if place and (found := shutil.which(place))), None)


@cache
def known_architectures(nvcc: str) -> tuple[int, ...]:
    """Those of ARCHITECTURES that this nvcc can compile for."""
    listed = run((nvcc, "--list-gpu-arch"))
    return tuple(number for number in ARCHITECTURES if f"compute_{number}\n" in listed + "\n")


def nvcc_flags(architectures: Sequence[int]) -> tuple[str, ...]:
    """Machine code for each architecture, and PTX of the last one for those to come."""
    targets = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures]
    targets.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
    return ("-std=c++17", "-O3", "-Xcompiler", "-fPIC", "--threads", "0", *targets)


@cache
def cuda_libraries(nvcc: str) -> list[str]:
    """Folders that may hold libcudart_static.a, by what nvcc would do: it may be a link or a script from elsewhere."""
    told = subprocess.run((nvcc, "--dryrun", "-c", "nothing.cu"), capture_output=True, text=True).stderr
    folders = re.findall(r'"-L([^"]+)"', told)
    for root in re.findall(r"^#\$ TOP=(.+)$", told, re.MULTILINE):
        folders += [os.path.join(root.strip(), name) for name in ("lib64", "lib")]
    return [os.path.normpath(folder) for folder in folders]


def nvcc_major(nvcc: str) -> str:
    found = re.search(r"release (\d+)\.", run((nvcc, "--version")))
    return found.group(1) if found else ""


@cache
def sources_hash() -> str:
    """Of everything below `csrc/`, names and contents, and of the table of normals."""
    digest = hashlib.sha256()
    for path in (*sorted(SOURCES.iterdir()), NORMAL_TABLE):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def packaged_name(with_cuda: bool) -> str:
    """A packaged library's file. It is used by any torch its ABI allows, but only with the sources it was made of."""
    return f"braid-{sources_hash()[:16]}-{'cuda' if with_cuda else 'cpu'}.so"


def build(toolchain: Toolchain, library: Path, folder: Path) -> None:
    """Compile everything into `folder`, as many files at a time as there are processors, and link `library`."""
    commands = toolchain.compilations(folder)
    waiting, running = list(commands), []
    num_processors = len(os.sched_getaffinity(0))
    try:
        while waiting or running:
            while waiting and len(running) < num_processors:
                command = waiting.pop()
                running.append((command, _start(command, commands[command].with_suffix(".log"))))
            command, process = running.pop(0)
            if process.wait():
                raise BuildError(_complaint(command, commands[command].with_suffix(".log")))
    finally:
        for _, process in running:
            process.kill()
            process.wait()
    command, log = toolchain.link(list(commands.values()), library), folder / "link.log"
    if _start(command, log).wait():
        raise BuildError(_complaint(command, log))


def _start(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as output:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)


def _complaint(command: Sequence[str], log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() or ["it failed without a word"]
    told = [line for line in lines if "collect2" not in line]  # which says no more than that ld failed
    error = next((line for line in told if "error" in line), (told or lines)[0])
    return f"{Path(command[0]).name}: {error.strip()[:300]}"


def run(command: Sequence[str]) -> str:
    """What a compiler says of itself, or BuildError."""
    try:
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise BuildError(f"{' '.join(command)}: {error}") from error


def first_line(*command: str) -> str:
    return (run(command).splitlines() or [""])[0]


def last_line(*command: str) -> str:
    return (run(command).splitlines() or [""])[-1]
