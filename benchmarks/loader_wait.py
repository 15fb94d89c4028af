"""Whether the loader keeps up with a fast device: how long a step waits for data, and what memory an epoch takes.

    python benchmarks/loader_wait.py [--tokens 400000000] [--rate 600000] [--format mds] [--workers 1] [--json F]

A step is simulated: it takes as long as a device of `--rate` tokens a second needs for its batch, in which this process
sleeps. The corpus has random tokens in documents of 600 on average, rows of 1024, and lies on the local disk; one epoch
is read. Memory is that of this process and its workers without the mapped pages of shards, sampled along the epoch.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch

from braid.data_pipeline.corpus import TokenCorpus
from braid.data_pipeline.formats import FORMATS
from braid.data_pipeline.loader import Loader
from braid.data_pipeline.order import ShuffledOrder
from braid.data_pipeline.packing import Rows
from braid.data_pipeline.prepare import prepare_tokens
from braid.data_pipeline.tokenizers import load_tokenizer
from braid.kernels.bench.measure import machine

LENGTH, BATCH, MEAN_DOCUMENT = 1024, 32, 600
CHUNK = 20_000_000
WARM_UP = 8  # steps, in which workers start


def write_tokens(path: Path, num_tokens: int) -> None:
    rng, eos_id = np.random.default_rng(0), load_tokenizer("bytes").eos_id
    with open(path, "wb") as file:
        for first in range(0, num_tokens, CHUNK):
            size = min(CHUNK, num_tokens - first)
            tokens = rng.integers(0, 256, size, np.uint16)
            tokens[rng.random(size) < 1 / MEAN_DOCUMENT] = eos_id
            tokens.tofile(file)


def own_memory() -> int:
    """Bytes that belong to this process and its children alone."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(process.memory_full_info().uss for process in processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=400_000_000, help="of the corpus")
    parser.add_argument("--rate", type=float, default=600_000, help="tokens a second of the simulated device")
    parser.add_argument("--format", default="mds", choices=FORMATS)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where the corpus is made; default: a temporary folder")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        write_tokens(Path(folder) / "tokens.bin", args.tokens)
        options = {"token_dtype": "uint16", "validation_fraction": 0.01, "format": args.format}
        prepare_tokens([Path(folder) / "tokens.bin"], "bytes", Path(folder) / "corpus", progress=False, **options)
        found = read_epoch(Path(folder) / "corpus", args.rate, args.workers)
    print(
        f"{found['steps']} steps of {BATCH} x {LENGTH} tokens, {args.format}, {args.workers} workers: "
        f"waited {100 * found['wait_share']:.2f} % of the time at {found['tokens_per_second']:,.0f} tokens/s, longest "
        f"{1e3 * found['longest_wait_s']:.1f} ms; memory {' '.join(f'{b / 1e6:.0f}' for b in found['memory_bytes'])} MB"
    )
    if args.json:
        about = {"rate": args.rate, "format": args.format, "workers": args.workers, "tokens": args.tokens}
        args.json.write_text(json.dumps({"machine": machine(torch.device("cpu")), **about, **found}, indent=1) + "\n")


def read_epoch(corpus: Path, rate: float, workers: int) -> dict:
    """Shares of the time over one epoch, and memory at ten points of it."""
    rows = Rows(TokenCorpus.open(corpus, "train"), LENGTH, "stream")
    order = ShuffledOrder(rows.rows_per_shard, 0, 4)
    sizes = {"global_batch_size": BATCH, "micro_batch_size": BATCH, "data_rank": 0, "data_size": 1}
    steps, batches = len(rows) // BATCH, iter(Loader(rows, order, workers=workers, **sizes))
    waits, memory, device_free = [], [], time.perf_counter()
    for step in range(steps):
        asked = time.perf_counter()
        next(batches)
        ready = time.perf_counter()
        if step == WARM_UP:
            begun = asked
        if step >= WARM_UP:
            waits.append(ready - max(asked, device_free))
        device_free = max(ready, device_free) + BATCH * LENGTH / rate
        time.sleep(max(0.0, device_free - time.perf_counter()))
        if step % max(1, steps // 10) == WARM_UP:
            memory.append(own_memory())
    taken = time.perf_counter() - begun
    waited = [max(0.0, wait) for wait in waits]
    return {"steps": steps, "wait_share": sum(waited) / taken, "longest_wait_s": max(waited),
            "tokens_per_second": len(waits) * BATCH * LENGTH / taken, "memory_bytes": memory}  # fmt: skip


if __name__ == "__main__":
    main()
