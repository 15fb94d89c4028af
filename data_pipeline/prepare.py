"""`braid prepare`: documents to a corpus of token shards, once, for every sequence length and way of packing.

The steps, in the order of this file: what is asked for; which documents are validation and which tokenizer is used
(the plan); tokenising in processes; writing; the manifest, which comes last and makes the folder a corpus. The same
inputs and settings give the same bytes, whatever the number of processes and however often it was interrupted.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path

from braid.data_pipeline.blocks import JOURNAL_FILE, BlockWriter, Journal, differences
from braid.data_pipeline.corpus import (
    BLOCK_BYTES,
    MANIFEST_FILE,
    TOKENIZER_FOLDER,
    split_fingerprint,
    write_pairs_file,
)
from braid.data_pipeline.embedded import EmbeddedCorpus
from braid.data_pipeline.estimate import Estimate, estimated
from braid.data_pipeline.filters import FILTERS_FILE, FilteredSource, Filters
from braid.data_pipeline.formats import FORMATS, shard_reader
from braid.data_pipeline.progress import Progress
from braid.data_pipeline.readers import TextFiles
from braid.data_pipeline.shards import atomic_file
from braid.data_pipeline.splitting import Source, Split, choose_split, training_sample
from braid.data_pipeline.token_stores import TokenFiles
from braid.data_pipeline.tokenising import batches_of, tokenised
from braid.data_pipeline.tokenizers import Tokenizer, check_bpe_size, load_tokenizer, train_bpe
from braid.data_pipeline.workers import Workers
from braid.kernels.errors import InputError

SHARD_BYTES = 64 << 20
EMBEDDED_VOCAB_SIZE = 512
SAMPLE_BYTES = 64 << 20
"""Most text a tokenizer is trained on; ten seconds of training."""
VALIDATION_FRACTION = 0.05
MOST_WORKERS = 4096
SPLITS = ("train", "validation")
NO_FILTERS = Filters()


def prepare(
    inputs: Sequence[str | Path],
    tokenizer: str | Path,
    output: str | Path,
    *,
    validation: Sequence[str | Path] = (),
    validation_fraction: float | None = None,
    workers: int = 1,
    text_field: str = "text",
    separator: str | None = None,
    pair_fields: tuple[str, str] | None = None,
    filters: Filters = NO_FILTERS,
    format: str = "mds",
    row_tokens: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> dict:
    """Make a corpus of `inputs` (see `readers.TextFiles`) in the folder `output`; returns its manifest.

    tokenizer: what `load_tokenizer` takes, or `train:N` for a byte-level BPE of N ids learnt from the training split.
    validation: inputs that are the validation split, all the others training; or validation_fraction: the share that is
    set apart (VALIDATION_FRACTION), whole documents chosen by hash; a single document is cut at a line end.
    workers: processes; one also uses the tokenizer library's own threads. separator: stands between the documents of a
    .txt file, which otherwise is one document. pair_fields: the fields of source and target, to make a corpus of pairs
    (each is two documents, and wholly in one split). filters: which documents are left out; the manifest counts them.
    format: of the shards, one of `formats.FORMATS`; what is read from them is the same. row_tokens: tokens in a stored
    row, by default 64 KiB of them.
    shard_bytes: largest shard.

    Continues where an interrupted preparation of the same stopped; does nothing where it was finished. Raises
    InputError for inputs that cannot be read, an output folder with something else in it, a disk that is full.
    """
    settings = {
        "text_field": text_field,
        "separator": separator,
        "pair_fields": list(pair_fields) if pair_fields else None,
        **filters.settings(),
        **_set_apart(validation, validation_fraction),
        **_stored(format, row_tokens, shard_bytes),
    }
    with Progress(progress) as report:
        _check(settings, workers)
        filters.check()
        content = {"text_field": text_field, "separator": separator, "pair_fields": pair_fields}
        source = TextFiles(inputs, validation=validation, **content)
        return _prepare(source, str(tokenizer), Path(output), settings, workers, report, filters)


def estimate(
    inputs: Sequence[str | Path],
    tokenizer: str | Path,
    output: str | Path,
    *,
    validation: Sequence[str | Path] = (),
    workers: int = 1,
    filters: Filters = NO_FILTERS,
    **content: object,
) -> Estimate:
    """What `prepare` with these arguments would give and take; nothing is written. `content`: text_field, separator and
    pair_fields."""
    _check_number("workers", workers, MOST_WORKERS)
    filters.check()
    _, make_tokenizer = _tokenizer(str(tokenizer))
    open_source = partial(TextFiles, **content)
    source = open_source(inputs, validation=validation)
    return estimated(source, open_source, make_tokenizer, Path(output), workers=workers, filters=filters)


def prepare_embedded(
    output: str | Path,
    *,
    vocab_size: int = EMBEDDED_VOCAB_SIZE,
    tokenizer: str | Path | None = None,
    validation_fraction: float | None = None,
    workers: int = 1,
    format: str = "mds",
    row_tokens: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> dict:
    """`prepare` for the text that comes with Python (see `embedded`), with a tokenizer of `vocab_size` ids trained on
    it unless `tokenizer` names another."""
    settings = _set_apart((), validation_fraction) | _stored(format, row_tokens, shard_bytes)
    with Progress(progress) as report:
        _check(settings, workers)
        chosen = str(tokenizer or f"train:{vocab_size}")
        return _prepare(EmbeddedCorpus(), chosen, Path(output), settings, workers, report)


def prepare_tokens(
    inputs: Sequence[str | Path],
    tokenizer: str | Path,
    output: str | Path,
    *,
    validation: Sequence[str | Path] = (),
    documents: str = "index",
    token_dtype: str | None = None,
    validation_fraction: float | None = None,
    format: str = "mds",
    row_tokens: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> dict:
    """`prepare` for ids that `tokenizer` gave elsewhere; inputs, validation, documents, token_dtype: see
    `token_stores.TokenFiles`.
    Where its tokens do not tell the bytes of a text, those of the decoded text are counted."""
    settings = {
        "documents": documents,
        "token_dtype": token_dtype,
        **_set_apart(validation, validation_fraction),
        **_stored(format, row_tokens, shard_bytes),
    }
    with Progress(progress) as report:
        _check(settings, 1)
        if str(tokenizer).startswith("train:"):
            change = "give the tokenizer that made the ids"
            raise InputError("a tokenizer cannot be trained on ids", found=str(tokenizer), change=change)
        content = {"documents": documents, "token_dtype": token_dtype}
        source = TokenFiles(inputs, load_tokenizer(tokenizer), validation=validation, **content)
        return _prepare(source, str(tokenizer), Path(output), settings, 1, report)


def _prepare(
    source: Source,
    tokenizer: str,
    output: Path,
    settings: dict,
    workers: int,
    report: Progress,
    filters: Filters = NO_FILTERS,
) -> dict:
    label, make_tokenizer = _tokenizer(tokenizer)
    versions = {name: version(name) for name in ("braid-lm", "tokenizers")}
    settings = settings | {"tokenizer": label}
    report.note(f"reading {source.total_bytes / 1e6:,.1f} MB of input once for its hashes")
    header = {"settings": settings, "sources": source.describe(), "versions": versions}
    if (output / MANIFEST_FILE).is_file():
        manifest = _finished(output, header)
        report.note(f"{output} is already prepared from these inputs with these settings")
        return manifest
    if source.num_ignored:
        report.note(f"left out {source.num_ignored} files of other kinds in the folders")
    writers: dict[str, BlockWriter] = {}
    explained = _explained(output, lambda: _missing_space(output, writers, source, report))
    with explained, Workers(workers) as processes, Journal(output, header) as journal:
        if filters.settings():
            source = FilteredSource(source, filters, processes, output, goes_on=journal.plan is not None)
        else:
            (output / FILTERS_FILE).unlink(missing_ok=True)  # of one with other settings that came to nothing
        chosen, split = _plan(journal, source, make_tokenizer, output, settings, report)
        writers.update((name, _writer(name, output, chosen, settings, journal, source)) for name in SPLITS)
        if journal.num_shards:
            report.note(f"going on after {journal.num_shards} finished shards")
        _fill(writers, source, split, chosen, output / TOKENIZER_FOLDER, processes, report)
        manifest = _commit(writers, chosen, output, header, source)
        if isinstance(source, FilteredSource):
            source.remove()
        journal.remove()
    return manifest


def _set_apart(validation: Sequence[str | Path], fraction: float | None) -> dict:
    """The setting about what is validation. Which files are is part of the sources."""
    if not validation:
        return {"validation_fraction": VALIDATION_FRACTION if fraction is None else fraction}
    if fraction is not None:
        found = f"--validation-fraction {fraction}"
        raise InputError("--validation says what is validation", found=found, change="leave out one of the two")
    return {"validation": "files"}


def _stored(format: str, row_tokens: int | None, shard_bytes: int) -> dict:
    """The settings about how a corpus is stored. Those of MDS do not name it: it was the only format once."""
    settings = {"row_tokens": row_tokens, "shard_bytes": shard_bytes}
    return settings if format == "mds" else settings | {"format": format}


def _check(settings: dict, workers: int) -> None:
    if not 0 < settings.get("validation_fraction", VALIDATION_FRACTION) < 1:
        change = "give a share between 0 and 1, such as 0.05; both splits need text"
        raise InputError("impossible --validation-fraction", found=str(settings["validation_fraction"]), change=change)
    if (format := settings.get("format", "mds")) not in FORMATS:
        raise InputError("the format is not known", found=format, change=f"use one of {', '.join(FORMATS)}")
    _check_number("workers", workers, MOST_WORKERS)
    _check_number("row_tokens", settings["row_tokens"], 1 << 24)
    _check_number("shard_bytes", settings["shard_bytes"], 2**32 - 1)


def _check_number(name: str, value: int | None, largest: int) -> None:
    if value is not None and not 1 <= value <= largest:
        raise InputError(f"impossible {name}", found=str(value), change=f"give a number from 1 to {largest}")


def _tokenizer(chosen: str) -> tuple[str, Callable[[Callable[[], list[str]]], Tokenizer]]:
    """What identifies the tokenizer in the settings, and how to get it once there are texts to train it on."""
    if not chosen.startswith("train:"):
        loaded = load_tokenizer(chosen)
        return loaded.hash, lambda texts: loaded
    number = chosen.removeprefix("train:")
    if not number.isdecimal():
        raise InputError("no vocabulary size to train a tokenizer with", found=chosen, change="write train:8192")
    check_bpe_size(int(number))
    return chosen, lambda texts: train_bpe(texts(), int(number))


def _finished(output: Path, header: dict) -> dict:
    path = output / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is damaged", found=str(error), change=f"delete {output} or give another") from error
    if not isinstance(manifest, dict) or not header.keys() <= manifest.keys():
        raise InputError(f"{path} is not of a corpus written by `braid prepare`", change="give another --output")
    # Other versions than today's may have written it; what they wrote is finished all the same.
    if differing := differences(manifest, header | {"versions": manifest["versions"]}):
        raise InputError(
            f"{output} holds a corpus prepared differently",
            found=differing,
            change=f"give another --output, or delete {output} to prepare it again",
        )
    for name in (FILTERS_FILE, JOURNAL_FILE):
        (output / name).unlink(missing_ok=True)  # stopped between the manifest and the end
    return manifest


def _plan(
    journal: Journal,
    source: Source,
    make_tokenizer: Callable[[Callable[[], list[str]]], Tokenizer],
    output: Path,
    settings: dict,
    report: Progress,
) -> tuple[Tokenizer, Split]:
    """The tokenizer and the split: from the journal, or decided now and written there."""
    folder = output / TOKENIZER_FOLDER
    if journal.plan is not None:
        tokenizer = load_tokenizer(folder)
        if tokenizer.hash != journal.plan["tokenizer_hash"]:
            raise InputError(f"{folder} was changed since", change=f"delete {output} and start again")
        return tokenizer, Split(**journal.plan["split"])
    split = choose_split(source, settings.get("validation_fraction"))
    if split.cut is not None and isinstance(source, TokenFiles):
        change = "check that the tokenizer's EOS is the id that ends documents in these files"
        raise InputError("all tokens are one document, so none can be set apart for validation", change=change)
    if split.cut is not None:
        report.note("there is only one document: its last part, from a line boundary on, becomes the validation split")
    if settings["tokenizer"].startswith("train:"):
        report.note("learning a tokenizer from the training texts")
    tokenizer = make_tokenizer(lambda: training_sample(source, split, SAMPLE_BYTES))
    if settings["tokenizer"] not in (tokenizer.hash, f"train:{tokenizer.vocab_size}"):
        report.note(f"this text is enough for a vocabulary of {tokenizer.vocab_size} ids only")
    tokenizer.save(folder)
    journal.append({"plan": {"tokenizer_hash": tokenizer.hash, "split": asdict(split)}})
    return tokenizer, split


def _writer(
    name: str, output: Path, tokenizer: Tokenizer, settings: dict, journal: Journal, source: Source
) -> BlockWriter:
    def record_shard(record: dict) -> None:
        if isinstance(source, FilteredSource):
            source.sync()  # a line of the journal relies on the verdicts about the files before
        journal.append({"split": name, **record})

    return BlockWriter(
        output / name,
        tokenizer.dtype,
        format=settings.get("format", "mds"),
        row_tokens=settings["row_tokens"] or BLOCK_BYTES // tokenizer.dtype.itemsize,
        shard_bytes=settings["shard_bytes"],
        records=journal.records(name),
        on_shard=record_shard,
        keep_empty=source.has_pairs,
    )


def _fill(
    writers: dict[str, BlockWriter],
    source: Source,
    split: Split,
    tokenizer: Tokenizer,
    folder: Path,
    workers: Workers,
    report: Progress,
) -> None:
    """Tokenise what is not in finished shards yet and write it."""

    def total(count: str) -> int:
        return sum(getattr(writer, count) for writer in writers.values())

    first_file = min(writer.resume_at.piece[0] for writer in writers.values())
    assigned = split.assign(source.pieces(first_file))
    missing = ((name, piece) for name, piece in assigned if piece[:3] >= writers[name].resume_at.piece)
    report.begin(source.total_bytes)
    batches = batches_of(missing, source)
    if isinstance(source, TokenFiles):
        encoded = ((batch, [piece.ids for _, piece in batch.pieces]) for batch in batches)
    else:
        encoded = tokenised(batches, tokenizer, folder, workers)
    for batch, ids_of_batch in encoded:
        for (name, piece), ids in zip(batch.pieces, ids_of_batch, strict=True):
            writers[name].add(piece, ids)
        report.update(total("documents"), total("num_bytes"), total("num_tokens"), batch.position)
    for writer in writers.values():
        writer.finish()


def _commit(writers: dict[str, BlockWriter], tokenizer: Tokenizer, output: Path, header: dict, source: Source) -> dict:
    """Write the manifest. Only with it is the folder a corpus."""
    if empty := [name for name, writer in writers.items() if writer.num_tokens == 0]:
        raise InputError(
            f"no text came into the {empty[0]} split",
            found=", ".join(f"{writer.documents} documents in {name}" for name, writer in writers.items()),
            change=f"delete {output} and give more documents or another --validation-fraction",
        )
    format, pairs = header["settings"].get("format", "mds"), source.has_pairs
    if pairs:
        for name in writers:
            write_pairs_file(output / name, shard_reader(format, output / name))
    splits = {
        name: {
            "documents": writer.documents,
            "tokens": writer.num_tokens,
            "bytes": writer.num_bytes,
            "rows": writer.num_rows,
            "fingerprint": split_fingerprint(output / name, tokenizer.hash, pairs=pairs),
        }
        for name, writer in writers.items()
    }
    manifest = {
        "version": 1,
        "tokenizer_hash": tokenizer.hash,
        "dtype": tokenizer.dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "format": format,
        "pairs": pairs,
        "splits": splits,
        **({"left_out": source.left_out()} if isinstance(source, FilteredSource) else {}),
        **header,
    }
    with atomic_file(output / MANIFEST_FILE) as file:
        file.write((json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode())
    return manifest


@contextmanager
def _explained(output: Path, missing_space: Callable[[], str]) -> Iterator[None]:
    """Turn what the file system refuses into an InputError."""
    try:
        yield
    except OSError as error:
        path = error.filename or output
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InputError(
                f"no space left to write {path} ({error.strerror})",
                found=f"{shutil.disk_usage(output).free / 1e6:,.1f} MB free{missing_space()}",
                change="free some space and run the same command again, it goes on where it stopped; "
                "or give another --output",
            ) from error
        if isinstance(error, PermissionError | NotADirectoryError | FileExistsError) or error.errno == errno.EROFS:
            change = "give an --output folder that you may write to"
            raise InputError(f"{path} cannot be written", found=str(error.strerror), change=change) from error
        raise


def _missing_space(output: Path, writers: dict[str, BlockWriter], source: Source, report: Progress) -> str:
    """What the rest of the corpus takes, from the share of the input that has been tokenised."""
    if not report.position:
        return ""
    tokenised_bytes = sum(writer.num_tokens * writer.dtype.itemsize for writer in writers.values())
    written = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    missing = tokenised_bytes * source.total_bytes / report.position - written
    return f", about {missing / 1e6:,.1f} MB more needed"
