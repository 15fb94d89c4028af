"""`braid prepare --dry-run`: what preparing would give and take, from a sample of the inputs. Nothing is written."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from braid.data_pipeline.filters import FilteredSource, Filters
from braid.data_pipeline.inputs import InputFile
from braid.data_pipeline.readers import TextFiles
from braid.data_pipeline.tokenizers import Tokenizer
from braid.data_pipeline.workers import Workers
from braid.kernels.errors import InputError

SAMPLED_FILES = 16
READ_BYTES, TOKENISED_BYTES = 4 << 20, 512 << 10
"""Of the text of each sampled file."""
END_BYTES = 4
"""What a document takes beside its tokens."""


@dataclass(frozen=True)
class Estimate:
    """Everything but the inputs, the sample and the free space is an estimate."""

    files: int
    ignored_files: int
    input_bytes: int
    documents: float  # a pair is two
    text_bytes: float
    tokens: float
    output_bytes: float
    free_bytes: int
    seconds: float
    cores: int
    sampled_files: int
    sampled_bytes: int  # of text, tokenised


@dataclass
class _Sample:
    """Of one file, standing for `weight` bytes of input; counts are for each of these."""

    weight: int
    documents: float
    text_bytes: float
    texts: list[str]

    @property
    def tokenised_bytes(self) -> int:
        return sum(len(text.encode("utf-8")) for text in self.texts)


def estimated(
    source: TextFiles,
    open_source: Callable[[Sequence[str]], TextFiles],
    make_tokenizer: Callable[[Callable[[], list[str]]], Tokenizer],
    output: Path,
    *,
    workers: int,
    filters: Filters,
) -> Estimate:
    """What preparing `source` in the folder `output` comes to.

    open_source: makes a source of some of its files. make_tokenizer: gives the tokenizer, trained on the texts of the
    sample where it is to be trained. Repetitions are found within the sample of a file only. Each of `workers` is taken
    to get a core, as far as there are cores.
    """
    samples = [_sample(open_source([file.location]), filters, weight) for file, weight in _chosen_files(source)]
    texts = [text for sample in samples for text in sample.texts]
    if not texts:
        raise InputError("the filters leave no document of the sample", change="make them milder")
    tokenizer = make_tokenizer(lambda: texts)
    tokens, seconds = 0.0, 0.0
    for sample in samples:
        if sample.texts:
            begun = time.perf_counter()
            with _parallel(workers == 1):
                found = sum(map(len, tokenizer.encode_batch(sample.texts)))
            text_bytes = sample.weight * sample.text_bytes
            tokens += text_bytes * found / sample.tokenised_bytes
            seconds += text_bytes * (time.perf_counter() - begun) / sample.tokenised_bytes
    cores = min(workers, len(os.sched_getaffinity(0)))
    documents = sum(sample.weight * sample.documents for sample in samples)
    return Estimate(
        files=len(source.files),
        ignored_files=source.num_ignored,
        input_bytes=source.total_bytes,
        documents=documents,
        text_bytes=sum(sample.weight * sample.text_bytes for sample in samples),
        tokens=tokens,
        output_bytes=tokens * tokenizer.dtype.itemsize + documents * END_BYTES,
        free_bytes=shutil.disk_usage(next(path for path in output.absolute().parents if path.exists())).free,
        seconds=seconds / cores,
        cores=cores,
        sampled_files=len(samples),
        sampled_bytes=sum(sample.tokenised_bytes for sample in samples),
    )


def _chosen_files(source: TextFiles) -> Iterator[tuple[InputFile, int]]:
    """Some files, each with the bytes it stands for: its own and those of files of its kind beside it."""
    files = sorted(source.files, key=lambda file: os.path.splitext(file.name)[1])
    num_runs = min(SAMPLED_FILES, len(files))
    for k in range(num_runs):
        run = files[k * len(files) // num_runs : (k + 1) * len(files) // num_runs]
        yield run[len(run) // 2], sum(file.size for file in run)


def _sample(source: TextFiles, filters: Filters, weight: int) -> _Sample:
    kept = FilteredSource(source, filters, Workers(1), None)
    documents = text_bytes = tokenised_bytes = 0
    texts: list[str] = []
    begin = position = None
    for piece in kept.pieces():
        # Reading runs ahead of the pieces. What comes from one step of it to another is what a step has read.
        if source.position != position:
            position, at_position = source.position, (documents, text_bytes)
            begin = position if begin is None else begin
            if text_bytes >= READ_BYTES:
                read = position - begin
                break
        documents += piece.last
        text_bytes += piece.num_bytes
        if tokenised_bytes < TOKENISED_BYTES:
            texts.append(piece.text)
            tokenised_bytes += piece.num_bytes
    else:
        read, at_position = source.total_bytes, (documents, text_bytes)
    return _Sample(weight, at_position[0] / read, at_position[1] / read, texts)


@contextmanager
def _parallel(allowed: bool) -> Iterator[None]:
    """Let the tokenizer library use threads, or keep it to one as in a process among several."""
    name, before = "TOKENIZERS_PARALLELISM", os.environ.get("TOKENIZERS_PARALLELISM")
    if not allowed:
        os.environ[name] = "false"
    try:
        yield
    finally:
        if not allowed:
            os.environ.pop(name)
            os.environ |= {name: before} if before else {}
