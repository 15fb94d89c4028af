"""`braid sample CHECKPOINT`: unconditional, from a prefix, or filling gaps."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from braid.pretrain.config.objectives import ObjectiveConfig
    from braid.pretrain.config.problem import Problem
    from braid.pretrain.config.schema import SamplingConfig


OPTIONS = {
    "steps": (int, "denoising steps; default: the run's sampling.steps"),
    "sampler": (str, "how a step is made, for objectives that have several (see `braid pretrain --help`)"),
    "guidance": (float, "ccdd: weight of guidance by the latents, 1 is none; elf: the guidance scale"),
    "temperature": (float, "temperature of the token distribution"),
    "top-p": (float, "nucleus: smallest token set with this mass; 1 keeps all"),
    "greedy-final": (None, "mdlm, duo, gidd, ccdd, co_ladd, di_ladd: the last step takes the most probable tokens"),
    "draw-final": (None, "elf: the decoder's tokens are drawn at temperature 1 too"),
    "score-temperature": (float, "replaid: divides the predicted noise"),
    "token-guidance": (float, "replaid: weight of the gradient of the known tokens' log-probability"),
    "latent-steps": (int, "co_ladd, di_ladd: steps of the latents in the sequential samplers"),
    "noise-scale": (float, "elf: gamma of the SDE samplers"),
    "grid": (str, "elf: flow times of the steps: quantiles, random or uniform"),
    "input-guidance": (float, "elf on pairs: weight of guidance by the source"),
}
"""Options that stand for the field of `sampling` of the same name; left out, the run's own setting holds."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="run directory, or one of its checkpoints/step-* folders")
    parser.add_argument("--num", type=int, default=4, help="samples (per line of --infill); default 4")
    for name, (kind, text) in OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind, help=text) if kind else parser.add_argument(
            f"--{name}", action="store_true", default=None, help=text
        )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="text every sample begins with")
    prompt.add_argument(
        "--infill", type=Path, help='JSON lines {"text": "known [[5]] known"}; [[n]] is a gap of n tokens'
    )
    prompt.add_argument(
        "--latents-of",
        metavar="CORPUS",
        help="co_ladd, di_ladd: no samples of the model, but texts that it writes when it is shown the latents of rows "
        "of this corpus's validation split: how much is lost by sampling the latents too",
    )
    parser.add_argument("--seed", type=int, default=0, help="key of the draws; default 0")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=0,
        help="samples drawn at a time, which does not change them; default 0: what fits the device",
    )
    parser.add_argument("--raw-weights", action="store_true", help="trained weights instead of their moving average")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--output", type=Path, default=Path("samples.jsonl"), help="default samples.jsonl")


def main(args: argparse.Namespace) -> int:
    """Draw, print and write the samples. Exit code 0; errors are BraidErrors (2)."""
    from braid.kernels.errors import InputError
    from braid.parallel.data_parallel import pick_device
    from braid.pretrain.checkpoint.files import check_place
    from braid.pretrain.checkpoint.snapshot import load_model
    from braid.pretrain.config.problem import configuration_error
    from braid.pretrain.config.sampling import require_sampler
    from braid.pretrain.config.validate import check_seed

    from .batches import draw_in_batches
    from .output import sampler_settings, write_samples
    from .prompts import described_prompt, infill_prompts, no_prompt, prefix_lengths, prefix_prompt

    check_seed(args.seed)
    check_place(args.output)
    model = load_model(args.checkpoint, pick_device(args.device), use_ema=not args.raw_weights)
    require_sampler(model.config.objective)
    settings = _settings(args, model.config.sampling)
    problems = _problems(args, settings, model.config.objective)
    if problems:
        raise configuration_error(problems)
    length, packing = model.config.data.sequence_length, model.config.data.packing
    if packing == "pairs" and args.prompt is None:
        raise InputError("this model answers sources: it was trained on pairs", change="give the source with --prompt")
    if args.prompt is not None:
        prompt = prefix_prompt(args.prompt, args.num, length, model.tokenizer, packing=packing)
    elif args.infill is not None:
        prompt = infill_prompts(args.infill, args.num, length, model.tokenizer, packing=packing)
    elif args.latents_of is not None:
        prompt = described_prompt(model.rows(args.latents_of, "validation"), args.num)
    else:
        prompt = no_prompt(args.num, length)
    if model.objective.causal:
        prefix_lengths(prompt)  # refused before anything is drawn

    samples = draw_in_batches(
        model.objective, settings, prompt, key=args.seed, precision=model.config.run.precision,
        batch_size=args.batch_size, progress=_progress,
    )  # fmt: skip
    used = sampler_settings(settings, model.config.objective, model.config.run.precision)
    if args.latents_of is not None:
        used["latents_of"] = args.latents_of
    write_samples(args.output, samples, model.tokenizer, used, step=model.step, seed=args.seed)
    for index, tokens in enumerate(samples.tokens.tolist()):
        print(f"--- sample {index}\n{model.tokenizer.decode(tokens)}")
    calls = sum(samples.network_calls) / len(samples.tokens)
    print(f"--- {len(samples.tokens)} samples, {calls:g} network calls a sample, written to {args.output}")
    return 0


def _problems(args: argparse.Namespace, settings: SamplingConfig, objective: ObjectiveConfig) -> list[Problem]:
    """What is wrong with the sampler's settings, and with options that a model of this objective would ignore."""
    from braid.pretrain.config.check import Check
    from braid.pretrain.config.sampling import check_sampling, sampler_name

    def named(field: str) -> str:
        return "--" + field.replace("_", "-")

    check = Check()
    check.at_least("--num", args.num, 1)
    check.at_least("--batch-size", args.batch_size, 0)
    given = [name.replace("-", "_") for name in OPTIONS if getattr(args, name.replace("-", "_")) is not None]
    check_sampling(check, settings, objective, named, given)
    if args.token_guidance and args.prompt is None and args.infill is None:
        check.add(
            f"--token-guidance {args.token_guidance} would do nothing: it follows the gradient of the known tokens",
            found="neither --prompt nor --infill",
            change="leave it out, or give a prompt",
        )
    if args.latents_of is not None:
        if not objective.name.endswith("_ladd"):
            check.add(
                f"--latents-of is for LADD, whose latents describe a text; objective.name = {objective.name!r}",
                change="leave it out",
            )
        elif not sampler_name(settings, objective).startswith("sequential"):
            found = f"sampler {sampler_name(settings, objective)}"
            check.add("--latents-of shows latents that are there before the text", found, "--sampler sequential")
        elif args.latent_steps is not None:
            check.add("--latent-steps would be ignored: with --latents-of none are sampled", change="leave one out")
    return check.problems


def _settings(args: argparse.Namespace, defaults: SamplingConfig) -> SamplingConfig:
    from dataclasses import replace

    given = {name.replace("-", "_"): getattr(args, name.replace("-", "_")) for name in OPTIONS}
    return replace(defaults, **{name: value for name, value in given.items() if value is not None})


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\rsamples: {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)
