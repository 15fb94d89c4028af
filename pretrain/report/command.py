"""`braid report RUN`: draw a run directory as one HTML file."""

from __future__ import annotations

import argparse
from pathlib import Path

from braid.kernels.errors import InputError

from .html import write_report
from .reading import holds_a_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `braid report`."""
    parser.description = "Write a run's report: numbers, curves, samples and settings in one HTML file."
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory (the run.dir of a training run)")
    parser.add_argument(
        "--compare",
        metavar="RUN",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        help="other run directories, drawn in the same figures and table",
    )
    parser.add_argument(
        "--output", metavar="FILE", type=Path, default=None, help="where to write (default: RUN/report.html)"
    )


def main(args: argparse.Namespace) -> int:
    """Write the report and print where it is. InputError for a directory that is missing or not of a run."""
    for folder in (args.run, *args.compare):
        if not folder.is_dir():
            raise InputError("The run directory does not exist", found=str(folder), change="give the run.dir of a run")
        if not holds_a_run(folder):
            raise InputError(
                "This folder holds nothing of a run",
                found=f"{folder}: no config.yaml, metrics.jsonl, evaluation.json, samples/, ...",
                change="give the run.dir of a run",
            )
    print(write_report(args.run, comparisons=args.compare, output=args.output))
    return 0
