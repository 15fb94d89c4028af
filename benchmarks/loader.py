"""How fast rows are read: our loader over each stored format, beside what else reads the same rows, in one sitting.

    python benchmarks/loader.py [--tokens 20000000] [--workers 0] [--json loader.json]

All hand out batches of int64 tensors [32, 1024] in random order, from local files in the page cache:

    braid mds, wds, flat    our loader: packed rows from documents, exact order and state, every shard checked at first
    StreamingDataset        mosaicml-streaming as it comes, over stored rows of 1024 uint16
    webdataset              one row per member (raw bytes, the fastest it reads), shuffled through a buffer of 1000
    memmap                  numpy, row by row: no documents, no checks

They take turns; a figure is the median of the rounds. Contenders that are not installed are left out. With workers, all
but memmap read in that many processes.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import logging
import sys
import tarfile
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from braid.data_pipeline.corpus import TokenCorpus
from braid.data_pipeline.formats import FORMATS
from braid.data_pipeline.loader import Loader
from braid.data_pipeline.order import ShuffledOrder
from braid.data_pipeline.packing import Rows
from braid.data_pipeline.prepare import prepare_tokens
from braid.data_pipeline.tokenizers import load_tokenizer
from braid.kernels.bench.measure import interleaved, machine

LENGTH, BATCH = 1024, 32
MEAN_DOCUMENT = 600  # tokens
ROWS_PER_TAR = 4096


def write_corpora(folder: Path, num_tokens: int) -> np.ndarray:
    """The same random documents in every format; returns the rows of the training split, uint16 [n, LENGTH]."""
    rng = np.random.default_rng(0)
    tokens = np.minimum(rng.zipf(1.2, num_tokens), 256).astype(np.uint16) - 1
    tokens[rng.random(num_tokens) < 1 / MEAN_DOCUMENT] = load_tokenizer("bytes").eos_id
    tokens.tofile(folder / "tokens.bin")
    for format in FORMATS:
        options = {"token_dtype": "uint16", "validation_fraction": 0.01, "format": format}
        prepare_tokens([folder / "tokens.bin"], "bytes", folder / format, progress=False, **options)
    rows = open_rows(folder, "mds")
    return rows.read(range(len(rows)))


def open_rows(folder: Path, format: str) -> Rows:
    return Rows(TokenCorpus.open(folder / format, "train"), LENGTH, "stream")


def ours(folder: Path, format: str, workers: int) -> Iterator[torch.Tensor]:
    rows = open_rows(folder, format)
    order = ShuffledOrder(rows.rows_per_shard, 0, 4)
    sizes = {"global_batch_size": BATCH, "micro_batch_size": BATCH, "data_rank": 0, "data_size": 1}
    return (step[0].tokens for step in Loader(rows, order, workers=workers, **sizes))


def memmap(folder: Path, rows: np.ndarray) -> Iterator[torch.Tensor]:
    rows.tofile(folder / "rows.bin")
    stored, rng = np.memmap(folder / "rows.bin", np.uint16, mode="r").reshape(rows.shape), np.random.default_rng(0)
    while True:
        order = rng.permutation(len(stored))
        for first in range(0, len(order) - BATCH + 1, BATCH):
            chosen = [stored[i].astype(np.int64) for i in order[first : first + BATCH]]
            yield torch.from_numpy(np.stack(chosen))


def streaming_dataset(folder: Path, rows: np.ndarray, workers: int) -> Iterator[torch.Tensor]:
    for name in ("streaming.vision", "streaming.text", "streaming.multimodal"):  # which need torchvision
        sys.modules.setdefault(name, types.ModuleType(name))
    import streaming

    columns = {"tokens": f"ndarray:uint16:{LENGTH}"}
    with streaming.MDSWriter(out=str(folder / "streaming"), columns=columns) as writer:
        for row in rows:
            writer.write({"tokens": row})
    dataset = streaming.StreamingDataset(local=str(folder / "streaming"), shuffle=True, batch_size=BATCH)
    batches = DataLoader(dataset, BATCH, num_workers=workers, collate_fn=stacked_columns, drop_last=True)
    return itertools.chain.from_iterable(itertools.repeat(batches))


def stacked_columns(samples: list[dict]) -> torch.Tensor:
    return stacked([sample["tokens"] for sample in samples])


def stacked(samples: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(samples).astype(np.int64))


def webdataset_rows(folder: Path, rows: np.ndarray, workers: int) -> Iterator[torch.Tensor]:
    import webdataset

    (folder / "webdataset").mkdir()
    urls = []
    for first in range(0, len(rows), ROWS_PER_TAR):
        urls.append(str(folder / "webdataset" / f"{first:08}.tar"))
        with tarfile.open(urls[-1], "w", format=tarfile.USTAR_FORMAT) as tar:
            for i, row in enumerate(rows[first : first + ROWS_PER_TAR], first):
                member = tarfile.TarInfo(f"{i:08}.u16")
                member.size = row.nbytes
                tar.addfile(member, io.BytesIO(row.tobytes()))
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False).repeat().shuffle(1000)
    dataset = dataset.map(lambda sample: np.frombuffer(sample["u16"], np.uint16)).batched(
        BATCH, collation_fn=stacked, partial=False
    )
    return iter(webdataset.WebLoader(dataset, batch_size=None, num_workers=workers))


def contenders(folder: Path, rows: np.ndarray, workers: int) -> Iterator[tuple[str, Iterator[torch.Tensor]]]:
    for format in FORMATS:
        yield f"braid {format}", ours(folder, format, workers)
    for name, make in (("StreamingDataset", streaming_dataset), ("webdataset", webdataset_rows)):
        try:
            yield name, make(folder, rows, workers)
        except ImportError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    yield "memmap", memmap(folder, rows)


def takes(batches: Iterator[torch.Tensor], num_batches: int) -> Callable[[], None]:
    def take() -> None:
        for batch in itertools.islice(batches, num_batches):
            assert batch.shape == (BATCH, LENGTH) and batch.dtype == torch.int64

    return take


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--batches", type=int, default=128, help="that each contender reads in a round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where the figures go")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # StreamingDataset reads ahead in threads, which at the end complain that the folder is gone.
    logging.getLogger("concurrent.futures").setLevel(logging.CRITICAL + 1)
    with tempfile.TemporaryDirectory(prefix="braid-loader-") as name:
        rows = write_corpora(Path(name), args.tokens)
        iterators = dict(contenders(Path(name), rows, args.workers))
        calls = {name: takes(batches, args.batches) for name, batches in iterators.items()}
        timings = interleaved(
            calls, torch.device("cpu"), rounds=args.rounds, warmup=-(-len(rows) // BATCH // args.batches)
        )
    speeds = {name: args.batches * BATCH / timing.median_ms * 1e3 for name, timing in timings.items()}
    others = [name for name in speeds if not name.startswith("braid")]
    print("| reader | rows/s | Mtok/s | quartiles, ms |" + "".join(f" / {name} |" for name in others))
    print("|---|---|---|---|" + "---|" * len(others))
    for name, speed in speeds.items():
        timing = timings[name]
        ratios = "".join(f" {speed / speeds[other]:.2f} |" for other in others)
        quartiles = f"{timing.first_quartile_ms:.1f} - {timing.third_quartile_ms:.1f}"
        print(f"| {name} | {speed:,.0f} | {speed * LENGTH / 1e6:.0f} | {quartiles} |{ratios}")
    if args.json:
        report = {"machine": machine(torch.device("cpu")), "workers": args.workers, "rows": len(rows)}
        args.json.write_text(json.dumps(report | {"rows_per_second": speeds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
