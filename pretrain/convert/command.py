"""`braid convert inspect|reshard`: what a checkpoint holds, and the same packed anew."""

from __future__ import annotations

import argparse
from pathlib import Path

HAS_ACTIONS = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    checkpoint = {"type": Path, "help": "run directory (its newest valid checkpoint), or a checkpoints/step-* folder"}

    inspect = actions.add_parser("inspect", help="say what a checkpoint holds, and whether it is intact")
    inspect.add_argument("checkpoint", **checkpoint)
    inspect.add_argument("--tensors", action="store_true", help="list every tensor: type, shape, files")
    inspect.add_argument("--json", action="store_true", help="as JSON")

    reshard = actions.add_parser(
        "reshard",
        help="pack a checkpoint anew: one file for each group of tensors, or several of equal size",
        description="A checkpoint has no layout: any run reads it, however it is packed. This is for handing one over, "
        "for stores that want files of another size, and to leave out what only training needs.",
    )
    reshard.add_argument("checkpoint", **checkpoint)
    reshard.add_argument("output", type=Path, help="folder to make")
    reshard.add_argument("--files", type=int, default=1, help="files of each group of tensors; default 1")
    content = reshard.add_mutually_exclusive_group()
    content.add_argument(
        "--weights-only", action="store_true", help="leave out the optimizer's state and the averaged weights"
    )
    content.add_argument(
        "--ema", action="store_true", help="the averaged weights in place of the trained ones, and no optimizer's state"
    )


def main(args: argparse.Namespace) -> int:
    """Exit code 0; errors are BraidErrors (2), a damaged checkpoint among them."""
    if args.action == "inspect":
        from .inspection import show

        show(args.checkpoint, tensors=args.tensors, as_json=args.json)
    else:
        from .reshard import reshard

        content = "ema" if args.ema else "weights" if args.weights_only else "all"
        print(reshard(args.checkpoint, args.output, num_files=args.files, content=content))
    return 0
