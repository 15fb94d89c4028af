"""`braid doctor`: what is installed, what works, and what Braid does because of it."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import asdict
from importlib.metadata import version

from braid.kernels.capabilities import Capability, report

COLOURS = {"works": "green", "missing": "dim", "broken": "red"}
"""Of a capability's status."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def main(options: argparse.Namespace) -> int:
    """Print the table; 2 if torch does not work, else 0."""
    machine = {"braid": version("braid-lm"), "python": platform.python_version(), "platform": platform.platform()}
    if sys.stderr.isatty():
        print("trying everything once, which takes some seconds ...", file=sys.stderr)
    capabilities = report()
    if options.json:
        print(json.dumps(machine | {"capabilities": [asdict(capability) for capability in capabilities]}, indent=2))
    else:
        (print_table if sys.stdout.isatty() else print_plain)(machine, capabilities)
    return 0 if next(c for c in capabilities if c.name == "torch").status == "works" else 2


def print_table(machine: dict[str, str], capabilities: list[Capability]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=_title(machine), title_justify="left", box=None, pad_edge=False)
    for column in ("", "", "version", "found", "so Braid ..."):
        table.add_column(column, overflow="fold")
    for c in capabilities:
        table.add_row(c.name, Text(c.status, COLOURS[c.status]), c.version or "", Text(c.found), Text(c.choice))
    console = Console()
    console.print(table)
    for c in capabilities:
        if c.status != "works" and c.install:
            console.print(Text(f"{c.name}: {c.install}", "dim"))


def print_plain(machine: dict[str, str], capabilities: list[Capability]) -> None:
    """For logs and pipes: two lines each, nothing wrapped, no colours."""
    print(_title(machine))
    for c in capabilities:
        print(f"{c.status:7} {' '.join(filter(None, (c.name, c.version)))}: {c.found}")
        print(f"{'':7} -> {c.choice}" + (f" ({c.install})" if c.status != "works" and c.install else ""))


def _title(machine: dict[str, str]) -> str:
    return f"braid {machine['braid']}, Python {machine['python']}, {machine['platform']}"
