"""What DeepSpeed writes optimizer state to a disk with (`parallel.offload=nvme`)."""

from __future__ import annotations

import fcntl
from pathlib import Path

from braid.kernels.errors import ConfigError


def compile_writing() -> None:
    """Compile it where it is not yet. Of the processes of a node one compiles, and the others wait; one that was killed
    meanwhile leaves nothing behind that others would wait for.

    Raises ConfigError where it cannot be compiled.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils.cpp_extension import _get_build_directory

    builder = AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        raise ConfigError(
            "parallel.offload=nvme: DeepSpeed cannot compile what writes to the disk",
            found="libaio, its header, or a compiler is missing",
            change="apt-get install libaio-dev g++, and pip install ninja; or parallel.offload=cpu",
        )
    folder = Path(_get_build_directory(builder.name, verbose=False))
    with open(folder / "braid.lock", "w") as ours:
        fcntl.flock(ours, fcntl.LOCK_EX)  # ends with the process; torch's own is a file that stays
        (folder / "lock").unlink(missing_ok=True)
        builder.load(verbose=False)
