"""GPUs as their makers describe them: memory and links, by the names of model/flops.py. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from braid.pretrain.model.flops import peak_flops

GB, GIB = 1e9, 2**30

EFFICIENCY = 0.45
"""Share of a GPU's dense bfloat16 peak that matrix products are assumed to reach, waiting for others left out."""


@dataclass(frozen=True)
class GPU:
    """None where the data sheets leave it open, or nothing is known."""

    name: str
    memory: float | None
    """Bytes."""
    link: float | None
    """Bytes per second that a GPU sends to others in its node, while it receives as many."""
    network: float | None
    """Bytes per second that a GPU sends to other nodes, while it receives as many."""
    peak: float | None
    """Dense bfloat16 FLOP/s."""


# (name, memory in GiB, link within a node in GB/s as the data sheets say it, that is of both directions together, and
# network of the maker's own machine in Gbit/s per GPU and direction: DGX A100, H100, H200, B200). Makers' GB of memory
# are 2^30 bytes, of which a driver takes some (an H200's 141 are 140.4). Cards without NVLink, or with bridges between
# pairs only, have what PCIe gives: gen 4 64, gen 5 128. A name matches the first row whose words are all in it.
SHEETS: tuple[tuple[str, float | None, float | None, float | None], ...] = (
    ("GB200", 186, 1800, None),
    ("B200", 180, 1800, 400),
    ("H200 NVL", 141, 128, None),
    ("H200", 141, 900, 400),
    ("GH200", None, None, None),
    ("H100 PCIe", 80, 128, None),
    ("H100 NVL", 94, 128, None),
    ("H100", 80, 900, 400),
    ("H800", 80, 400, None),
    ("H20", 96, 900, None),
    ("A100 80GB", 80, 600, 200),
    ("A100 40GB", 40, 600, 200),
    ("A100", None, 600, 200),
    ("A800 80GB", 80, 400, None),
    ("A800", None, 400, None),
    ("A40", 48, 64, None),
    ("A30", 24, 64, None),
    ("A10", 24, 64, None),
    ("RTX A6000", 48, 64, None),
    ("L40S", 48, 64, None),
    ("L40", 48, 64, None),
    ("L4", 24, 64, None),
    ("RTX 4090", 24, 64, None),
    ("RTX 3090", 24, 64, None),
    ("MI300X", 192, 896, None),
)


def find_gpu(name: str, network: float | None = None) -> GPU:
    """The GPU of this name (any letter case); all of it None where it is not known. `network` in GB/s per GPU replaces
    the table's."""
    words = set(name.lower().replace("-", " ").split())
    known = peak_flops(name) is not None
    row = next((row for row in SHEETS if known and words.issuperset(row[0].lower().split())), (name, None, None, None))
    _, memory, link, sheet_network = row
    if network is None:
        network = sheet_network and sheet_network / 8
    return GPU(
        name=row[0],
        memory=memory and memory * GIB,
        link=link and link * GB / 2,
        network=network and network * GB,
        peak=peak_flops(name),
    )
