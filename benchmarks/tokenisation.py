"""How fast texts become a corpus, beside the `tokenizers` library that does nothing but encode them, in one sitting.

    python benchmarks/tokenisation.py [--input FILES] [--tokenizer T] [--workers 2] [--rounds 5] [--json FILE]

    tokenizers, threads     `encode_batch_fast` on batches of texts that are in memory already, with its own threads
    tokenizers, processes   the same, without threads, in as many processes as there are --workers
    prepare, 1 worker       from a .jsonl file to a finished corpus on disk, start-up included; the library's threads
    prepare, N workers      the same with processes

They take turns; a figure is the median of the rounds. Without --input: the text that comes with Python. What starting
takes (processes, the tokenizer) is measured on a few documents and left out of the last columns: a corpus for which
speed matters is a thousand times as large as what is encoded here. CPU seconds are those of all processes and threads;
they tell more than the time on a clock where others use the same cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from braid.data_pipeline.embedded import EmbeddedCorpus
from braid.data_pipeline.prepare import prepare
from braid.data_pipeline.readers import documents
from braid.data_pipeline.tokenising import BATCH_BYTES
from braid.data_pipeline.tokenizers import Tokenizer, load_tokenizer, train_bpe

FEW = 20
"""Documents that are enough to have started."""


def batches_of(texts: list[str]) -> list[list[str]]:
    batches, size = [[]], 0
    for text in texts:
        batches[-1].append(text)
        size += len(text.encode())
        if size >= BATCH_BYTES:
            batches.append([])
            size = 0
    return batches if batches[-1] else batches[:-1]


def encoded(tokenizer: Tokenizer, batch: list[str]) -> int:
    """Tokens of the batch, as the library alone finds them."""
    return sum(map(len, tokenizer._backend.encode_batch_fast(batch, add_special_tokens=False)))


def in_processes(tokenizer: Tokenizer, batches: list[list[str]], workers: int) -> int:
    """Forked, so that tokenizer and texts are there at once."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        with mp.get_context("fork").Pool(workers, initializer=_inherit, initargs=(tokenizer, batches)) as pool:
            total = sum(pool.imap_unordered(_encode_inherited, range(len(batches))))
            pool.close()
            pool.join()
            return total
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]


def _inherit(*inherited: object) -> None:
    global INHERITED
    INHERITED = inherited


def _encode_inherited(number: int) -> int:
    tokenizer, batches = INHERITED
    return encoded(tokenizer, batches[number])


def prepared(path: Path, tokenizer: Path, output: Path, workers: int) -> int:
    shutil.rmtree(output, ignore_errors=True)
    manifest = prepare([path], tokenizer, output, workers=workers, progress=False)
    return sum(split["tokens"] for split in manifest["splits"].values())


def measured(call: Callable[..., int], expected: int, *made: Callable[[], object]) -> tuple[float, float]:
    """Seconds on a clock, and CPU seconds of this process and of those that have ended in it, but for making what the
    call takes."""
    arguments = [make() for make in made]
    clock, cpu = time.perf_counter(), sum(os.times()[:4])
    assert call(*arguments) == expected
    return time.perf_counter() - clock, sum(os.times()[:4]) - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", help="files as `braid prepare` takes them")
    parser.add_argument("--tokenizer", default="train:8192")
    parser.add_argument("--workers", type=int, default=2, help="two or more")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where the figures go")
    args = parser.parse_args()
    texts = [text for _, text in documents(args.input)] if args.input else [p.text for p in EmbeddedCorpus().pieces()]
    trained = args.tokenizer.startswith("train:")
    tokenizer = train_bpe(texts, int(args.tokenizer[6:])) if trained else load_tokenizer(args.tokenizer)
    batches = batches_of(texts)
    num_bytes = sum(len(text.encode()) for text in texts)
    with tempfile.TemporaryDirectory(prefix="braid-tokenisation-") as name:
        folder = Path(name)
        tokenizer.save(folder / "tokenizer")
        for file, some in (("all.jsonl", texts), ("few.jsonl", texts[:FEW])):
            (folder / file).write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
        total, few = (in_processes(tokenizer, some, 1) for some in (batches, batches_of(texts[:FEW])))
        # A new one each time: a tokenizer that has seen the texts finds their words in its cache.
        new = partial(load_tokenizer, folder / "tokenizer")
        library = {
            f"tokenizers, {args.workers} processes": partial(in_processes, batches=batches, workers=args.workers),
            "tokenizers, threads": lambda tokenizer: sum(encoded(tokenizer, batch) for batch in batches),
        }
        calls, starts = {}, {}
        for workers in (1, args.workers):
            label = f"prepare, {workers} worker{'s' * (workers > 1)}"
            run = partial(prepared, tokenizer=folder / "tokenizer", output=folder / "corpus", workers=workers)
            calls[label], starts[label] = partial(run, folder / "all.jsonl"), partial(run, folder / "few.jsonl")
        times = {label: [] for label in (*library, *calls)}
        start_times = {label: [] for label in starts}
        for _ in range(args.rounds):
            for label, call in library.items():
                times[label].append(measured(call, total, new))
            for label, call in calls.items():
                times[label].append(measured(call, total))
            for label, call in starts.items():
                start_times[label].append(measured(call, few))
    print(f"{num_bytes / 1e6:.1f} MB of text in {len(texts):,} documents, {total:,} tokens")
    print("| what | Mtok/s | s | CPU s | of these start | speed / tokenizers | per CPU s / tokenizers |")
    print("|---|---|---|---|---|---|---|")
    medians = {label: tuple(map(statistics.median, zip(*pairs, strict=True))) for label, pairs in times.items()}
    start = {label: tuple(map(statistics.median, zip(*pairs, strict=True))) for label, pairs in start_times.items()}
    alone = [min(medians[label][k] for label in library) for k in range(2)]
    for label, (clock, cpu) in medians.items():
        start_clock, start_cpu = start.get(label, (0.0, 0.0))
        starting = f"{start_clock:.1f}, {start_cpu:.1f}"
        ratios = f"{alone[0] / (clock - start_clock):.2f} | {alone[1] / (cpu - start_cpu):.2f}"
        print(f"| {label} | {total / clock / 1e6:.2f} | {clock:.1f} | {cpu:.1f} | {starting} | {ratios} |")
    if args.json:
        report = {"bytes": num_bytes, "tokens": total, "seconds": times, "start_seconds": start_times}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
