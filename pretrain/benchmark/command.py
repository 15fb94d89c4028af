"""`braid bench`: Braid's operations against what one would take instead, timed in turn in one process."""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from braid.kernels.errors import ConfigError

KINDS = {
    "noising": ("braid.kernels.bench.noising", "masking, embedding and Gaussian noise, fused against plain torch"),
    "head": (
        "braid.kernels.bench.head",
        "output head and cross-entropy: masked positions in chunks against all at once",
    ),
    "cross_entropy": ("braid.kernels.bench.cross_entropy", "losses and gradient of rows of logits, in place"),
    "sampling": ("braid.kernels.bench.sampling", "exact draws of tokens against float64 and Gumbel noise"),
    "step": ("braid.pretrain.benchmark.step", "a whole training step against plain and compiled PyTorch"),
    "engines": ("braid.pretrain.benchmark.engines", "the same step with DeepSpeed's and Megatron-core's optimizers"),
}
OF_STEPS = ("step", "engines")
"""Kinds that train a recipe."""
SIZES = {
    "rows": ("noising", *OF_STEPS),
    "length": ("noising",),
    "vocab": ("noising", "head", "cross_entropy", "sampling", *OF_STEPS),
    "recipe": OF_STEPS,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = "; ".join(f"{name}: {about}" for name, (_, about) in KINDS.items())
    parser.add_argument("kind", metavar="KIND", choices=[*KINDS, "all"], help=f"{kinds}; all: each of them")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="step, engines: fields set over the recipe")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: a GPU, if any")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="CPU threads (default: torch's choice)")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="turns of each contender (default: 20)")
    parser.add_argument("--recipe", default="", metavar="RECIPE", help="step, engines: default mdlm_small")
    parser.add_argument("--rows", type=int, default=0, metavar="N", help="noising, step, engines: sequences")
    parser.add_argument("--length", type=int, default=0, metavar="N", help="noising: positions of a sequence")
    parser.add_argument("--vocab", type=int, default=0, metavar="N", help="tokens of the vocabulary")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    parser.add_argument("--into", type=Path, metavar="FILE", help="add them as `benchmarks` to the object in FILE")


def main(options: argparse.Namespace) -> int:
    """Print a table of each kind. ConfigError for options that the kind does not have."""
    kinds = list(KINDS) if options.kind == "all" else [options.kind]
    sizes = {name: getattr(options, name) for name in SIZES if getattr(options, name)}
    _check(options, kinds, sizes)

    import torch

    from braid.parallel.data_parallel import pick_device

    if options.threads:
        torch.set_num_threads(options.threads)
    device, found = pick_device(options.device).type, {}
    for kind in kinds:
        settings: dict[str, Any] = {name: value for name, value in sizes.items() if kind in SIZES[name]}
        if kind in OF_STEPS:
            settings["overrides"] = tuple(options.overrides)
        result = importlib.import_module(KINDS[kind][0]).run(device, rounds=options.rounds, **settings)
        found[kind] = result
        print(f"{kind} ({KINDS[kind][1]})")
        print("\n".join(_lines(result, "  ")), flush=True)
    record = {"command": shlex.join(["braid", *sys.argv[1:]]), "time": time.strftime("%Y-%m-%dT%H:%M:%S"), **found}
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if options.into:
        whole = json.loads(options.into.read_text(encoding="utf-8")) | {"benchmarks": record}
        options.into.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return 0


def _check(options: argparse.Namespace, kinds: list[str], sizes: Mapping[str, Any]) -> None:
    asked = {f"--{name}": value for name, value in sizes.items() if not set(kinds) & set(SIZES[name])}
    if options.overrides and not set(OF_STEPS) & set(kinds):
        asked["key=value"] = " ".join(options.overrides)
    if asked:
        raise ConfigError(
            f"`braid bench {options.kind}` has no such option",
            found=", ".join(f"{name} {value}" for name, value in asked.items()),
            change="leave it out",
        )
    for name in ("rounds", "rows", "length", "vocab", "threads"):
        if getattr(options, name) < (1 if name == "rounds" else 0):
            raise ConfigError(f"--{name} must be a positive number", found=str(getattr(options, name)))
    if options.into and not options.into.is_file():
        raise ConfigError("there is no file to add the figures to", found=str(options.into), change="--json FILE")


def _lines(result: Mapping[str, Any], indent: str) -> list[str]:
    """Nested figures, one to a line; of a timing its median."""
    lines = []
    for name, value in result.items():
        if isinstance(value, Mapping) and "median_ms" in value:
            spread = f"{value['first_quartile_ms']:.3g} to {value['third_quartile_ms']:.3g}"
            lines.append(f"{indent}{name:32} {value['median_ms']:10.3f} ms   (middle half {spread})")
        elif isinstance(value, Mapping):
            lines += [f"{indent}{name}", *_lines(value, indent + "  ")]
        elif isinstance(value, float):
            lines.append(f"{indent}{name:32} {value:10.4g}")
        else:
            lines.append(f"{indent}{name:32} {'n/a' if value is None else value}")
    return lines
