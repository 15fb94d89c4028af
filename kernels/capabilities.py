"""What this machine can do: one table of every library and device feature Braid uses or could use.

A capability works only if it was tried: its symbol was imported and used once (`probes.py`). That happens in a child
process, because a library built for another torch, or an instruction the CPU lacks, kills rather than raises. Nothing
heavy is imported here.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType, TracebackType

from braid.kernels import probes
from braid.kernels.errors import BraidError

PROBING_SECONDS = 300
"""A child without an end after that long is taken to hang; a first import from a network drive takes a while."""

BROKEN_IMPORT = (ImportError, OSError, RuntimeError, AttributeError, ValueError)
"""What importing a package raises that is absent, or built for another torch, CUDA, NumPy or C library."""

ANSWER = "braid-probe "
"""Begins a line of the child that is meant for us; libraries print as they please."""


@dataclass(frozen=True)
class Capability:
    """One line of the table."""

    name: str
    status: str
    """`works` (tried), `untried`, `missing`, or `broken` (there, but its probe failed)."""
    version: str | None
    found: str
    """What the probe saw, or why it failed."""
    choice: str
    """What Braid does because of it."""
    install: str
    """How to get or mend it; may be empty."""


@dataclass(frozen=True)
class _Entry:
    name: str
    chosen: str
    """What Braid does where it works."""
    otherwise: str
    probe: Callable[[], str] = lambda: "imported"
    module: str = ""
    """A package is imported as this, and must then have `symbol`. The module alone proves nothing: flash-attn-4 has a
    `flash_attn` too, and PyPI's `apex` is not NVIDIA's."""
    symbol: str = ""
    distribution: str = ""
    without: tuple[str, ...] = ()
    """Sub-modules replaced by empty ones, because they drag in what Braid does not install."""
    install: str = ""


def report(probe: bool = True) -> list[Capability]:
    """The whole table. Without `probe` nothing is imported or run: packages are only looked up."""
    table = [_look_up(entry) for entry in ENTRIES]
    if not probe:
        return table
    answers = _probe_all([capability.name for capability in table if capability.status != "missing"])
    for index, (entry, capability) in enumerate(zip(ENTRIES, table, strict=True)):
        if entry.name in answers:
            status, found = answers[entry.name]
            choice = entry.chosen if status == "works" else entry.otherwise
            table[index] = replace(capability, status=status, found=found, choice=choice)
    return table


def require(name: str) -> ModuleType:
    """The imported module of an optional package, or BraidError saying how to install it."""
    entry = _entry(name)
    assert entry.module, f"{name} is no package"
    try:
        return _import(entry)
    except BROKEN_IMPORT as error:
        absent = _look_up(entry).status == "missing"
        raise BraidError(
            f"{name} is needed here, but it " + ("is not installed" if absent else "cannot be imported"),
            found="" if absent else _one_line(error),
            change=entry.install,
        ) from error


def _entry(name: str) -> _Entry:
    return next(entry for entry in ENTRIES if entry.name == name)


def _import(entry: _Entry) -> ModuleType:
    for name in entry.without:
        sys.modules.setdefault(name, ModuleType(name))
    module = importlib.import_module(entry.module)
    if not hasattr(module, entry.symbol):
        raise ImportError(f"the module {entry.module} has no {entry.symbol}, so it belongs to another package")
    return module


def _look_up(entry: _Entry) -> Capability:
    if entry.module and importlib.util.find_spec(entry.module.partition(".")[0]) is None:
        return Capability(entry.name, "missing", None, "not installed", entry.otherwise, entry.install)
    version = None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version = importlib.metadata.version(entry.distribution) if entry.distribution else None
    return Capability(entry.name, "untried", version, "", entry.otherwise, entry.install)


def _probe_all(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """(status, found) of each name. What ends its child process is broken, and a new child tries those after it."""
    answers: dict[str, tuple[str, str]] = {}
    while waiting := [name for name in names if name not in answers]:
        printed, failure = _child(waiting)
        for line in printed.splitlines():
            if line.startswith(ANSWER):
                name, status, found = json.loads(line.removeprefix(ANSWER))
                answers[name] = status, found
        culprit = next((name for name in waiting if name not in answers), None)
        assert failure or culprit is None, f"the child ended without a word about {culprit}"
        if culprit:
            answers[culprit] = "broken", failure
    return answers


def _child(names: Sequence[str]) -> tuple[str, str]:
    """What `python -m braid.kernels.capabilities NAMES` printed, and what ended it early (empty if nothing did)."""
    # Without the working directory on the path: a run's folder `wandb` would be imported as the package.
    environment = os.environ | {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as complaints:
        try:
            code = subprocess.run(
                [sys.executable, "-m", "braid.kernels.capabilities", *names],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=complaints,
                timeout=PROBING_SECONDS,
            ).returncode
            failure = ""
        except subprocess.TimeoutExpired:
            code, failure = 0, f"no answer within {PROBING_SECONDS} s"
        printed.seek(0)
        complaints.seek(0)
        if code < 0:
            failure = f"killed by {signal.Signals(-code).name}"
        elif code > 0:
            failure = (complaints.read().strip().splitlines() or [f"exit code {code}"])[-1]
        return printed.read(), failure


def _answer(names: Sequence[str]) -> None:
    """The child: try one after the other. An exception ends it, with its one line as the last on stderr."""
    sys.excepthook = _complain
    for name in names:
        entry = _entry(name)
        try:
            if entry.module:
                _import(entry)
            status, found = "works", entry.probe()
        except probes.NotHere as error:
            status, found = "missing", str(error)
        print(f"\n{ANSWER}{json.dumps([name, status, found])}", flush=True)


def _complain(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    print(f"\n{_one_line(error)}", file=sys.stderr)


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return type(error).__name__ + (f": {lines[0][:200]}" if lines else "")


FROM_SOURCE = "pip install --no-build-isolation"

ENTRIES = (
    _Entry(
        "torch",
        "all tensors, gradients and optimizer steps",
        "nothing runs without it",
        probes.torch_itself,
        module="torch",
        symbol="Tensor",
        distribution="torch",
        install="pip install torch",
    ),
    _Entry("cuda", "run.device=auto trains on it", "run.device=auto trains on the CPU", probes.cuda),
    _Entry(
        "bfloat16",
        "run.precision=bf16 can be chosen",
        "keep run.precision=fp32",
        probes.bfloat16,
        install="if SIGILL kills it on a CPU that only claims AMX: export ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16",
    ),
    _Entry("attention", "torch picks one of these for every call", "nothing trains", probes.attention),
    _Entry(
        "compiler",
        "model.compile=true works on the CPU",
        "keep model.compile=false on the CPU",
        probes.compiler,
        install="install a C++ compiler and Python's headers",
    ),
    _Entry(
        "fused kernels",
        "noise is drawn and added by these; BRAID_KERNELS=auto, compiled, triton or eager picks others",
        "set BRAID_KERNELS=eager: noise is drawn by plain torch operations, slowly",
        probes.fused_kernels,
        install="install a C++ compiler and, for a GPU, an nvcc of torch's CUDA version",
    ),
    _Entry(
        "triton",
        "model.compile=true works on the GPU",
        "keep model.compile=false on a GPU",
        probes.triton,
        module="triton",
        symbol="jit",
        distribution="triton",
        install="comes with torch's CUDA build",
    ),
    _Entry(
        "pyarrow",
        "reads .parquet and .arrow corpora",
        ".parquet and .arrow are refused; .txt, .jsonl and .json are read",
        probes.pyarrow,
        module="pyarrow",
        symbol="table",
        distribution="pyarrow",
        install="pip install 'braid-lm[parquet]'",
    ),
    _Entry(
        "transformers",
        "objective.encoder.kind=huggingface can be chosen",
        "objective.encoder.kind=huggingface is refused; table and random need nothing",
        probes.transformers,
        module="transformers",
        symbol="AutoModel",
        distribution="transformers",
        install="pip install 'braid-lm[hf]'",
    ),
    _Entry(
        "wandb",
        "telemetry.wandb=online or offline can be chosen",
        "keep telemetry.wandb=off; metrics.jsonl is always written",
        module="wandb",
        symbol="init",
        distribution="wandb",
        install="pip install 'braid-lm[wandb]'",
    ),
    _Entry(
        "mosaicml-streaming",
        "not needed: Braid reads and writes MDS shards itself (the tests compare the two)",
        "not needed: Braid reads and writes MDS shards itself",
        module="streaming",
        symbol="MDSWriter",
        distribution="mosaicml-streaming",
        without=("streaming.vision", "streaming.text", "streaming.multimodal"),
        install="pip install 'braid-lm[mds]', then pip install --no-deps mosaicml-streaming (its pins replace torch)",
    ),
    _Entry(
        "webdataset",
        "not needed: Braid reads and writes webdataset shards itself (the tests compare the two)",
        "not needed: Braid reads and writes webdataset shards itself",
        probes.webdataset,
        module="webdataset",
        symbol="WebDataset",
        distribution="webdataset",
        install="pip install webdataset",
    ),
    _Entry(
        "s3fs",
        "data.path and --input can be s3:// URLs",
        "s3:// URLs are refused",
        module="s3fs",
        symbol="S3FileSystem",
        distribution="s3fs",
        install="pip install 'braid-lm[s3]'",
    ),
    _Entry(
        "gcsfs",
        "data.path and --input can be gs:// URLs",
        "gs:// URLs are refused",
        module="gcsfs",
        symbol="GCSFileSystem",
        distribution="gcsfs",
        install="pip install 'braid-lm[gcs]'",
    ),
    _Entry(
        "aiohttp",
        "data.path and --input can be http:// and https:// URLs",
        "http:// and https:// URLs are refused",
        module="aiohttp",
        symbol="ClientSession",
        distribution="aiohttp",
        install="pip install 'braid-lm[http]'",
    ),
    _Entry(
        "huggingface_hub",
        "data.path and --input can be hf:// URLs",
        "hf:// URLs are refused",
        module="huggingface_hub",
        symbol="HfFileSystem",
        distribution="huggingface_hub",
        install="pip install huggingface_hub",
    ),
    _Entry(
        "flash-attn",
        "accelerators.attention=flash-attn can be chosen",
        "accelerators.attention=flash-attn is refused; torch has fused attention of its own",
        probes.flash_attention,
        module="flash_attn",
        symbol="flash_attn_func",
        distribution="flash-attn",
        install=f"{FROM_SOURCE} flash-attn",
    ),
    _Entry(
        "flash-attn-3",
        "accelerators.attention=flash-attn-3 can be chosen",
        "accelerators.attention=flash-attn-3 is refused; torch has fused attention of its own",
        probes.flash_attention_3,
        module="flash_attn_interface",
        symbol="flash_attn_func",
        distribution="flash-attn-3",
        install="build the folder `hopper` of the flash-attention repository against the installed torch",
    ),
    _Entry(
        "transformer-engine",
        "accelerators.linears=transformer-engine (fp8) can be chosen",
        "accelerators.linears=transformer-engine (fp8) is refused; layers are torch's and Megatron-core's",
        probes.transformer_engine,
        module="transformer_engine.pytorch",
        symbol="Linear",
        distribution="transformer-engine",
        install=f"{FROM_SOURCE} 'transformer-engine[pytorch]'",
    ),
    _Entry(
        "apex",
        "accelerators.norms and .optimizer=apex can be chosen",
        "accelerators.norms and .optimizer=apex are refused; torch has both",
        probes.apex,
        module="apex.optimizers",
        symbol="FusedAdam",
        distribution="apex",
        install="build NVIDIA's apex from its repository against the installed torch; PyPI's apex is another project",
    ),
    _Entry(
        "megatron-core",
        "parallel.tensor, .context and .pipeline can be above 1, and parallel.engine=megatron can be chosen",
        "keep parallel.tensor, .context and .pipeline at 1 and parallel.engine=plain",
        probes.megatron,
        module="megatron.core",
        symbol="parallel_state",
        distribution="megatron-core",
        install="pip install 'braid-lm[megatron]'",
    ),
    _Entry(
        "deepspeed",
        "parallel.engine=deepspeed (ZeRO) can be chosen, where megatron-core works too",
        "parallel.engine=deepspeed (ZeRO) is refused",
        probes.deepspeed,
        module="deepspeed",
        symbol="initialize",
        distribution="deepspeed",
        install="DS_BUILD_OPS=0 pip install 'braid-lm[deepspeed]'",
    ),
)


if __name__ == "__main__":
    _answer(sys.argv[1:])
