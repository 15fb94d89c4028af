"""The `braid` command. A subcommand's module is imported when it is called, so `braid --help` is immediate."""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence

from braid.pretrain.exits import EXIT_CODES, run_and_report

PRETRAIN = "pretrain"
PRETRAIN_SUMMARY = "train a model from a recipe"

# Each of these modules has `add_arguments(parser)` and `main(options) -> exit code`; HAS_ACTIONS where the first word
# after the command is an action with options of its own.
COMMANDS = {
    "prepare": ("tokenise texts into a corpus", "braid.data_pipeline.prepare_command"),
    "data": ("what a prepared corpus holds, and whether it is whole", "braid.pretrain.corpora.command"),
    "sample": ("draw texts from a checkpoint", "braid.pretrain.sampling.command"),
    "evaluate": ("bounds and qualities of a checkpoint, with standard errors", "braid.pretrain.evaluation.command"),
    "convert": ("say what a checkpoint holds, or pack it anew", "braid.pretrain.convert.command"),
    "plan": (
        "parameters, memory, traffic, time and disk of a recipe on so many GPUs",
        "braid.pretrain.planning.command",
    ),
    "bench": ("time Braid's operations against what one would take instead", "braid.pretrain.benchmark.command"),
    "report": ("write a run's report.html", "braid.pretrain.report.command"),
    "demo": ("train, evaluate and sample small models on this machine", "braid.pretrain.demo"),
    "doctor": ("what is installed, what works, what was picked and why", "braid.launch.doctor"),
}


def main(words: Sequence[str] | None = None) -> int:
    """Entry point of `braid`; `words` defaults to the command line. Returns the exit code."""
    return run_and_report(lambda: _dispatch(sys.argv[1:] if words is None else list(words)))


def _dispatch(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="braid",
        usage="braid COMMAND ... | --version | --help",
        description="Pretrain diffusion language models whose state is a braid of tokens and continuous vectors.",
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    if words[:1] == ["--version"]:
        from importlib.metadata import version

        print(f"braid {version('braid-lm')}")
        return 0
    name = parser.parse_args(words[:1]).command
    rest = words[1:]
    if name == PRETRAIN:
        from braid.pretrain.command import run

        return run(rest)
    if name not in COMMANDS:
        alike = difflib.get_close_matches(name, [PRETRAIN, *COMMANDS], n=1)
        parser.error(f"there is no command {name!r}" + (f"; did you mean {alike[0]!r}?" if alike else ""))
    summary, module_name = COMMANDS[name]
    module = importlib.import_module(module_name)
    own = argparse.ArgumentParser(prog=f"braid {name}", description=f"{summary[0].upper()}{summary[1:]}.")
    module.add_arguments(own)
    # Options may stand between positional words, which argparse cannot do where there are actions.
    parse = own.parse_args if getattr(module, "HAS_ACTIONS", False) else own.parse_intermixed_args
    return module.main(parse(rest))


def _epilog() -> str:
    summaries = {PRETRAIN: PRETRAIN_SUMMARY} | {name: summary for name, (summary, _) in COMMANDS.items()}
    lines = [f"  {name:10} {summary}" for name, summary in summaries.items()]
    return "\n".join(["commands (`braid COMMAND --help` says more):", *lines, "", EXIT_CODES])


if __name__ == "__main__":
    sys.exit(main())
