"""What a run ran on, as `environment.json`. It says nothing of who or where: no host, user or path is in it."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any


def collect_environment(device: str = "cpu") -> dict[str, Any]:
    """Versions, device, cores and threads of this process, in the units the names say.

    `device` is what the run computes on, as torch spells it (`cpu`, `cuda`, `cuda:1`). Needs torch.
    """
    import torch  # here, so that drawing a report of a finished run does not wait for torch to load

    on_cuda = torch.device(device).type == "cuda"
    return {
        "braid": metadata.version("braid-lm"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": metadata.version("numpy"),
        "cuda": torch.version.cuda if on_cuda else None,
        "cudnn": str(torch.backends.cudnn.version()) if on_cuda else None,
        "device": torch.cuda.get_device_name(device) if on_cuda else processor_name(),
        "device_type": torch.device(device).type,
        "visible_devices": torch.cuda.device_count() if on_cuda else 1,
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_gib": memory_gib(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def usable_cores() -> int:
    """Cores this process may use, which in a container or a job can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_gib() -> float | None:
    """The machine's memory in GiB; None where the system does not tell."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def processor_name() -> str:
    """The processor's model name where the system tells, else its architecture."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()
