"""`braid data inspect|verify|sample`: what a prepared corpus holds, whether it is whole, how its rows look."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from braid.data_pipeline.corpus import TokenCorpus
from braid.data_pipeline.inspection import damaged_shards, spelt
from braid.data_pipeline.order import ShuffledOrder
from braid.data_pipeline.packing import STYLES, Rows
from braid.kernels.errors import InputError

from .description import describe, lines
from .page import write_page

HAS_ACTIONS = True
SPLITS = ("train", "validation")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    corpus = {"help": "folder written by `braid prepare`"}

    inspect = actions.add_parser("inspect", help="counts, sizes, hashes and lengths of documents")
    inspect.add_argument("corpus", **corpus)
    inspect.add_argument("--json", action="store_true", help="as JSON")
    inspect.add_argument(
        "--report", type=Path, metavar="FILE", help="write an HTML page with the lengths as pictures and some rows"
    )

    verify = actions.add_parser("verify", help="read every shard and compare it with its hash")
    verify.add_argument("corpus", **corpus)
    verify.add_argument("--workers", type=int, default=4, metavar="N", help="shards read at a time (4)")

    sample = actions.add_parser("sample", help="rows as training sees them, as text, in the order of an epoch")
    sample.add_argument("corpus", **corpus)
    add = sample.add_argument
    add("--split", choices=SPLITS, default="train", help="default train")
    add("--rows", type=int, default=4, metavar="N", help="how many (4)")
    add("--seed", type=int, default=0, help="of the order, run.seed of a run (0)")
    add("--window", type=int, default=4, help="of the order, data.window of a run (4)")
    add("--sequence-length", type=int, default=128, metavar="L", help="tokens in a row (128)")
    add("--packing", default="wrap", choices=STYLES, help="how rows are cut (wrap)")
    add("--ids", action="store_true", help="the ids beside the text")


def main(args: argparse.Namespace) -> int:
    """Exit code 0; errors are BraidErrors (2), a damaged shard among them."""
    if args.action == "inspect":
        facts = describe(args.corpus)
        print(json.dumps(facts, indent=1) if args.json else "\n".join(lines(facts)))
        if args.report:
            print(f"written to {write_page(args.corpus, facts, args.report)}")
    elif args.action == "verify":
        _verify(args.corpus, args.workers)
    else:
        _sample(args)
    return 0


def _verify(folder: str, workers: int) -> None:
    if workers < 1:
        raise InputError("impossible --workers", found=str(workers), change="give a number from 1 on")
    damaged, number = [], 0
    for split in SPLITS:
        corpus = TokenCorpus.open(folder, split)
        for name, reason in damaged_shards(corpus, workers):
            number += 1
            if reason is not None:
                damaged.append(f"{split}/{name}")
                print(f"{split}/{name}: {reason}", flush=True)
    if damaged:
        raise InputError(
            f"{len(damaged)} of {number} shards of {folder} are missing or damaged",
            found=", ".join(damaged),
            change="copy them again from their source, prepare the corpus again, or train with data.damaged=skip",
        )
    print(f"{folder}: {number} shards, all whole")


def _sample(args: argparse.Namespace) -> None:
    if args.rows < 1 or args.window < 1 or not 0 <= args.seed < 1 << 64:
        found = f"--rows {args.rows}, --window {args.window}, --seed {args.seed}"
        raise InputError("impossible rows", found=found, change="give rows and window from 1 on and a seed from 0 on")
    corpus = TokenCorpus.open(args.corpus, args.split)
    rows = Rows(corpus, args.sequence_length, args.packing, oversized="skip" if args.packing == "pairs" else "auto")
    order = ShuffledOrder(rows.rows_per_shard, args.seed, args.window)
    for position, row in enumerate(order.span(0, args.rows)):
        print(f"-- position {position}, row {row} of {len(rows):,}")
        tokens, segments = rows.load([row])
        if segments is not None:
            tokens = tokens[:, segments[0] > 0]  # without padding
        given = rows.condition(tokens)[0]
        if given.any():
            print(f"given: {spelt(corpus.tokenizer, tokens[0, given])}")
            print(f"learnt: {spelt(corpus.tokenizer, tokens[0, ~given])}")
        else:
            print(spelt(corpus.tokenizer, tokens[0]))
        if args.ids:
            print(np.array2string(tokens[0], threshold=args.sequence_length, max_line_width=120))
