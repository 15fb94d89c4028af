"""What the order of rows costs, whatever the size of the corpus: start-up, a batch far in, memory, size of the state.

    python benchmarks/order.py [--json order.json]

A corpus is here nothing but its numbers of rows per shard. Every size is measured in a process of its own, whose memory
is what it has beyond that of a process which only imports the code.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from braid.data_pipeline.order import ShuffledOrder
from braid.kernels.bench.measure import machine

BATCH, WINDOW, EPOCH = 256, 4, 10
SIZES = ((300, 32_768), (3_000, 32_768), (100_000, 32_768), (1_000_000, 1_000), (10_000_000, 100))
"""(shards, rows of each): 10 billion tokens in rows of 1024, 100 billion, 3.4 trillion, and two of small shards."""


def measure(num_shards: int, rows: int) -> dict:
    """One corpus, in this process."""
    sizes = np.full(num_shards, rows, np.int64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.perf_counter()
    order = ShuffledOrder(sizes, 0, WINDOW)
    order.span(0, BATCH)
    start = time.perf_counter() - begun
    position = EPOCH * len(order) + len(order) // 2
    begun = time.perf_counter()
    order.span(position, position + BATCH)
    far = time.perf_counter() - begun
    each = []
    for k in range(1, 200):
        begun = time.perf_counter()
        order.span(position + k * BATCH, position + (k + 1) * BATCH)
        each.append(time.perf_counter() - begun)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {"shards": num_shards, "rows": len(order), "start_s": start, "resume_in_epoch_10_s": far,
            "batch_us": 1e6 * statistics.median(each), "memory_bytes": memory,
            "state_bytes": len(json.dumps({"consumed": position}))}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--one", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one)))
        return
    found = []
    for size in SIZES:
        command = [sys.executable, __file__, "--one", *map(str, size)]
        found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    print("| shards | rows | first batch | a batch in epoch 10 | later batches | memory |\n|---|---|---|---|---|---|")
    for one in found:
        print(f"| {one['shards']:,} | {one['rows']:.1e} | {one['start_s']:.2f} s | {one['resume_in_epoch_10_s']:.2f} s "
              f"| {one['batch_us']:.0f} us | {one['memory_bytes'] / 1e6:.0f} MB |")  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(torch.device("cpu")), "sizes": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
