"""`braid pretrain RECIPE [key=value ...]`, also reached as `python -m braid.pretrain` (for torchrun). No torch here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from braid.kernels.errors import ConfigError
from braid.pretrain.config.help import help_text, recipe_summary
from braid.pretrain.config.load import dump_config, load_config, recipes
from braid.pretrain.config.validate import validate
from braid.pretrain.exits import EXIT_CODES

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
    else:
        config = load_config(options.recipe, options.overrides)
        validate(config)  # the trainer repeats it with the number of ranks; this one comes before torch is loaded
        if not options.print_config:
            from braid.pretrain.training.run import main

            return main(options.recipe, options.overrides)
        sys.stdout.write(dump_config(config))
    return 0
