"""`braid pretrain RECIPE [key=value ...]`, also reached as `python -m braid.pretrain` (for torchrun). No torch here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from braid.kernels.errors import ConfigError
from braid.pretrain.config.help import help_text, recipe_summary
from braid.pretrain.config.load import dump_config, load_config, recipes
from braid.pretrain.config.validate import validate
from braid.pretrain.exits import EXIT_CODES
from braid.pretrain.training.outcome import write_failed_start

DESCRIPTION = """Train a model. A recipe is a name (`--list` shows them) or a YAML file; `key=value` sets a field of the
configuration over it, for example: braid pretrain demo_mdlm data.path=data/mine training.steps=500

On several GPUs or machines: torchrun [...] -m braid.pretrain RECIPE [key=value ...]"""


def run(words: Sequence[str]) -> int:
    """Do what the words after `braid pretrain` say; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="braid pretrain",
        usage="braid pretrain [--print-config] RECIPE [key=value ...] | --list | --help",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="name of a recipe, or a YAML file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="fields set over the recipe; the last wins")
    parser.add_argument("--print-config", action="store_true", help="print the whole configuration as YAML and stop")
    parser.add_argument("--list", action="store_true", help="list the recipes and stop")
    parser.add_argument("-h", "--help", action="store_true", help="show this text with every field and stop")
    options = parser.parse_intermixed_args(words)
    if options.help:
        sys.stdout.write(f"{parser.format_help()}\nfields of the configuration:\n\n{help_text()}\n{EXIT_CODES}\n")
    elif options.list:
        for name in recipes():
            print(f"{name:16} {recipe_summary(name)}")
    elif options.recipe is None:
        raise ConfigError(
            "braid pretrain needs a recipe",
            change="braid pretrain RECIPE [key=value ...]; RECIPE is a YAML file or one of " + ", ".join(recipes()),
        )
    elif options.print_config:
        _print_config(options.recipe, options.overrides)
    else:
        return _train(options.recipe, options.overrides)
    return 0


def _print_config(recipe: str, overrides: Sequence[str]) -> None:
    config = load_config(recipe, overrides)
    validate(config)
    sys.stdout.write(dump_config(config))


def _train(recipe: str, overrides: Sequence[str]) -> int:
    """Train, unless the configuration is wrong: that is found before torch is loaded, and left in the run directory."""
    try:
        validate(load_config(recipe, overrides))  # the trainer repeats it with the number of ranks
    except ConfigError as error:
        run_dir = _run_dir(recipe, overrides)
        if run_dir and run_dir.is_dir():
            write_failed_start(run_dir, error)
        raise
    from braid.pretrain.training.run import main

    return main(recipe, overrides)


def _run_dir(recipe: str, overrides: Sequence[str]) -> Path | None:
    """The run directory of a configuration that may not load; None where it is not clear which was meant."""
    named = [text for text in overrides if text.startswith("run.dir=")]
    others = [text for text in overrides if text.startswith("run.")]  # one of them may be a misspelt run.dir
    for source, given in ((recipe, named or others), (recipes()[0], named)):
        try:
            if given or source == recipe:
                folder = load_config(source, given).run.dir
                return Path(folder) if folder.strip() else None
        except ConfigError:
            continue
    return None
