"""`braid plan`: what a recipe needs on so many GPUs, before one is asked for. torch is loaded after the checks."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from braid.kernels.errors import ConfigError
from braid.pretrain.config.check import Check
from braid.pretrain.config.load import load_config
from braid.pretrain.config.problem import configuration_error
from braid.pretrain.config.validate import problems

from .hardware import EFFICIENCY, find_gpu
from .vocabulary import VOCABULARIES, find_vocabulary


def add_arguments(parser: argparse.ArgumentParser) -> None:
    network_help = "what a GPU sends to other nodes (default: that of the GPU maker's own machine)"
    vocabulary_help = f"size of the vocabulary, or one of {', '.join(VOCABULARIES)}, where the corpus is not here"
    parser.add_argument("recipe", metavar="RECIPE", help="name of a recipe, or a YAML file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="fields set over the recipe; the last wins")
    parser.add_argument("--gpus", type=int, metavar="N", help="processes (default: the fewest that the plan takes)")
    parser.add_argument("--gpu", default="h200", metavar="NAME", help="what they are (default: %(default)s)")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument("--network", type=float, metavar="GB/S", help=network_help)
    parser.add_argument(
        "--efficiency", type=float, default=EFFICIENCY, metavar="SHARE",
        help="share of the GPU's peak that products reach (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--vocabulary", default="", metavar="N|NAME", help=vocabulary_help)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")


def main(options: argparse.Namespace) -> int:
    """Print the page. ConfigError with every problem at once, and when the plan does not fit into the memory."""
    config = load_config(options.recipe, options.overrides)
    check = _check_options(options)
    if options.gpus is None or options.gpus >= 1:
        check.problems += problems(config, world_size=options.gpus)
    try:
        vocabulary = find_vocabulary(config, options.vocabulary)
    except ConfigError as error:
        check.add(error.what, error.found, error.change)
    if check.problems:
        raise configuration_error(check.problems)

    from .alternatives import fitting_plans
    from .estimate import Machine, estimate
    from .page import as_json, print_page

    gpu = find_gpu(options.gpu, options.network)
    gpus = options.gpus or config.parallel.model_processes
    machine = Machine(gpus, options.gpus_per_node, gpu, options.efficiency)
    figures = estimate(config, machine, vocabulary)
    print_page(options.recipe, config, machine, figures)
    if options.json:
        text = json.dumps(as_json(options.recipe, machine, figures), indent=2)
        options.json.write_text(text + "\n", encoding="utf-8")
    if figures.fits is False:
        fitting = fitting_plans(config, machine, vocabulary)
        raise ConfigError(
            "by this estimate the plan does not fit into the GPU's memory",
            found=figures.overflow,
            change=", or ".join(fitting)
            or "more or larger GPUs: recomputation, micro-batches of one row, layers "
            "divided within a node and divided optimizer state are not enough together",
        )
    return 0


def _check_options(options: argparse.Namespace) -> Check:
    check = Check()
    if options.gpus is not None:
        check.at_least("--gpus", options.gpus, 1)
    check.at_least("--gpus-per-node", options.gpus_per_node, 1)
    check.within("--efficiency", options.efficiency, "(]", 0, 1)
    if options.network is not None:
        check.positive("--network", options.network)
    return check
