"""The command `braid prepare`: its options and what it prints."""

from __future__ import annotations

import argparse
import shlex
import sys

from braid.data_pipeline.estimate import Estimate
from braid.data_pipeline.filters import Filters
from braid.data_pipeline.formats import FORMATS
from braid.data_pipeline.prepare import (
    EMBEDDED_VOCAB_SIZE,
    VALIDATION_FRACTION,
    estimate,
    prepare,
    prepare_embedded,
    prepare_tokens,
)
from braid.data_pipeline.readers import ENDINGS
from braid.kernels.errors import InputError

SAID = {"too_short": "too short", "too_long": "too long", "duplicate": "repeated", "filter": "refused by --filter"}
"""What is printed for the reasons of `filters.REASONS`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `braid prepare`."""
    add = parser.add_argument
    add("--input", nargs="+", metavar="INPUT", help=f"files, folders, patterns, by path or URL: {ENDINGS}")
    add(
        "--tokens",
        nargs="+",
        metavar="PATH",
        help="instead: its ids (Megatron, datatrove, litdata, datasets, flat)",
    )
    add("--documents", choices=("index", "eos"), help="with --tokens: where documents end besides at EOS (index)")
    add("--token-dtype", choices=("uint16", "uint32"), help="with --tokens: of flat files that have no index")
    add("--embedded", action="store_true", help="prepare the text that comes with Python instead of --input")
    add("--output", required=True, metavar="DIR", help="folder of the corpus; an interrupted one is continued")
    add(
        "--tokenizer",
        metavar="T",
        help="bytes, text8, train:N (byte-level BPE of N ids), tokenizer.json, or its folder",
    )
    add("--vocab-size", type=int, metavar="N", help=f"with --embedded: train:N, by default {EMBEDDED_VOCAB_SIZE}")
    add("--text-field", default="text", metavar="F", help="field of a record or column of a table with the text (text)")
    add("--pairs", action="store_true", help="(source, target) pairs, to train and score targets given sources")
    add(
        "--source-field",
        metavar="F",
        help="with --pairs: field of a record or column of a table with the source (source)",
    )
    add(
        "--target-field",
        metavar="F",
        help="with --pairs: field of a record or column of a table with the target (target)",
    )
    add("--separator", metavar="S", help=r"text between the documents of a .txt file; \n and \t are understood")
    add("--min-bytes", type=int, metavar="N", help="leave out documents (pairs: both texts together) of fewer bytes")
    add("--max-bytes", type=int, metavar="N", help="leave out longer ones")
    add("--deduplicate", action="store_true", help="of documents with the same text, keep the first")
    add("--filter", metavar="MODULE:FUNCTION", help="keep the documents for whose text (pairs: texts) it returns True")
    add("--validation", nargs="+", metavar="INPUT", help="what is validation, given as for --input or --tokens")
    add(
        "--validation-fraction",
        type=float,
        metavar="F",
        help=f"or the share of the documents that is ({VALIDATION_FRACTION})",
    )
    add(
        "--format",
        default="mds",
        choices=FORMATS,
        help="of the shards: mosaicml-streaming, webdataset, flat files (mds)",
    )
    add("--dry-run", action="store_true", help="say what it would give and take, from a sample; write nothing")
    add("--workers", type=int, default=1, metavar="N", help="processes that tokenise (1)")


def main(args: argparse.Namespace) -> int:
    """Run `braid prepare`; returns the exit code. InputError goes to the caller."""
    try:
        manifest = _from_arguments(args)
    except KeyboardInterrupt:
        print("braid: interrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    if isinstance(manifest, Estimate):
        _print_estimate(manifest, args.pairs)
        return 0
    print(f"prepared {args.output}")
    noun = "pairs" if args.pairs else "documents"
    for name, counts in manifest["splits"].items():
        ratio, number = counts["bytes"] / counts["tokens"], counts["documents"] // (2 if args.pairs else 1)
        print(f"  {name:11}{number:>12,} {noun:9} {counts['tokens']:>15,} tokens  {ratio:.2f} bytes each")
    if left_out := {reason: number for reason, number in manifest.get("left_out", {}).items() if number}:
        reasons = ", ".join(f"{number:,} {SAID[reason]}" for reason, number in left_out.items())
        print(f"  {'left out':11}{sum(left_out.values()):>12,} {noun:9} {reasons}")
    print(f"  {'tokenizer':11}{manifest['vocab_size']:>12,} ids")
    packing = " data.packing=pairs" if args.pairs else ""
    print(f"next: braid pretrain own_text data.path={shlex.quote(args.output)}{packing}")
    return 0


def _print_estimate(found: Estimate, pairs: bool) -> None:
    noun, number = ("pairs", found.documents / 2) if pairs else ("documents", found.documents)
    ignored = f"; {found.ignored_files} of other kinds are left out" if found.ignored_files else ""
    minutes, seconds = divmod(round(found.seconds), 60)
    speed = found.tokens / max(found.seconds, 1e-9)
    lines = {
        "inputs": f"{found.files:,} files, {found.input_bytes / 1e6:,.1f} MB{ignored}",
        noun: f"about {number:,.0f}",
        "text": f"about {found.text_bytes / 1e6:,.1f} MB",
        "tokens": f"about {found.tokens:,.0f}, {found.text_bytes / found.tokens:.2f} bytes each",
        "output": f"about {found.output_bytes / 1e6:,.1f} MB",
        "free disk": f"{found.free_bytes / 1e6:,.1f} MB",
        "time": f"about {minutes // 60}:{minutes % 60:02}:{seconds:02} on {found.cores} cores, {speed:,.0f} tokens/s",
        "sample": f"{found.sampled_bytes / 1e6:,.1f} MB of text from {found.sampled_files} files",
    }
    print("dry run: nothing is written")
    for name, value in lines.items():
        print(f"  {name:11}{value}")
    if found.output_bytes > found.free_bytes:
        print("  the disk has not enough space for it")


def _from_arguments(args: argparse.Namespace) -> dict | Estimate:
    common = {"validation_fraction": args.validation_fraction, "format": args.format}
    if args.tokens:
        return _tokens_from_arguments(args, common)
    if args.documents or args.token_dtype:
        raise InputError("--documents and --token-dtype go with --tokens", change="leave them out")
    common["workers"] = args.workers
    filters = Filters(args.min_bytes, args.max_bytes, args.deduplicate, args.filter)
    if args.embedded == bool(args.input):
        found = "both" if args.embedded else "neither"
        change = "give --input FILES|DIR ..., or --embedded for the text that comes with Python"
        raise InputError("one of --input and --embedded is needed", found=found, change=change)
    fields = (args.source_field, args.target_field)
    if args.pairs and (args.separator is not None or args.text_field != "text"):
        change = "leave these options out; --source-field and --target-field name the fields of a pair"
        raise InputError("--pairs has neither text field nor separator", change=change)
    if not args.pairs and any(field is not None for field in fields):
        raise InputError("--source-field and --target-field go with --pairs", change="give --pairs, or leave them out")
    if args.embedded:
        if args.separator is not None or args.text_field != "text" or args.pairs:
            change = "leave these options out: they are about the files of --input"
            raise InputError("--embedded has neither text field nor separator nor pairs", change=change)
        if filters.settings() or args.dry_run or args.validation:
            change = "leave these options out: they are about --input"
            raise InputError("--embedded has neither filters nor a dry run nor files for validation", change=change)
        if args.tokenizer and args.vocab_size:
            change = "leave out one of the two"
            raise InputError("--vocab-size is for a tokenizer trained here, --tokenizer names another", change=change)
        size = EMBEDDED_VOCAB_SIZE if args.vocab_size is None else args.vocab_size
        return prepare_embedded(args.output, vocab_size=size, tokenizer=args.tokenizer, **common)
    if args.tokenizer is None:
        change = f"give --tokenizer bytes, train:{args.vocab_size or 8192}, a tokenizer.json or a folder with one"
        raise InputError("which tokenizer?", change=change)
    if args.vocab_size is not None:
        change = f"write --tokenizer train:{args.vocab_size} to train one of that size"
        raise InputError("--vocab-size goes with --embedded", change=change)
    separator = None if args.separator is None else args.separator.replace(r"\n", "\n").replace(r"\t", "\t")
    content = {"text_field": args.text_field, "separator": separator}
    if args.pairs:
        content = {"pair_fields": (fields[0] or "source", fields[1] or "target")}
    content["validation"] = args.validation or ()
    if args.dry_run:
        return estimate(args.input, args.tokenizer, args.output, workers=args.workers, filters=filters, **content)
    return prepare(args.input, args.tokenizer, args.output, **content, filters=filters, **common)


def _tokens_from_arguments(args: argparse.Namespace, common: dict) -> dict:
    others = {
        "--input": args.input,
        "--embedded": args.embedded,
        "--pairs": args.pairs or args.source_field or args.target_field,
        "--separator": args.separator is not None,
        "--text-field": args.text_field != "text",
        "--vocab-size": args.vocab_size is not None,
        "--workers": args.workers != 1,
        "--dry-run": args.dry_run,
        "filters": Filters(args.min_bytes, args.max_bytes, args.deduplicate, args.filter).settings(),
    }
    if found := ", ".join(option for option, given in others.items() if given):
        raise InputError(
            "--tokens holds ids already", found=found, change="leave these options out: they are about text"
        )
    if args.tokenizer is None:
        raise InputError("which tokenizer?", change="give the one that made the ids: --tokenizer FILE|DIR")
    options = {"documents": args.documents or "index", "token_dtype": args.token_dtype}
    options["validation"] = args.validation or ()
    return prepare_tokens(args.tokens, args.tokenizer, args.output, **options, **common)
