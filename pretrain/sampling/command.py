"""`braid sample CHECKPOINT`: unconditional, from a prefix, or filling gaps."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from braid.pretrain.config.problem import Problem
    from braid.pretrain.config.schema import ARConfig, CCDDConfig, MDLMConfig, SamplingConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="run directory, or one of its checkpoints/step-* folders")
    parser.add_argument("--num", type=int, default=4, help="samples (per line of --infill); default 4")
    parser.add_argument("--steps", type=int, help="denoising steps; default: the run's sampling.steps")
    parser.add_argument("--sampler", choices=["ddim", "ddpm"], help="latents of joint models; default: the run's")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance weight of the latents; 1 is none")
    parser.add_argument("--temperature", type=float, help="temperature of the token distribution")
    parser.add_argument("--top-p", type=float, help="nucleus: smallest token set with this mass; 1 keeps all")
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="text every sample begins with")
    prompt.add_argument(
        "--infill", type=Path, help='JSON lines {"text": "known [[5]] known"}; [[n]] is a gap of n tokens'
    )
    parser.add_argument("--seed", type=int, default=0, help="key of the draws; default 0")
    parser.add_argument("--batch-size", type=int, default=16, help="samples drawn at a time; does not change them")
    parser.add_argument("--raw-weights", action="store_true", help="trained weights instead of their moving average")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--output", type=Path, default=Path("samples.jsonl"), help="default samples.jsonl")


def main(args: argparse.Namespace) -> int:
    """Draw, print and write the samples. Exit code 0; errors are BraidErrors (2)."""
    import torch

    from braid.parallel.data_parallel import pick_device
    from braid.pretrain.checkpoint.snapshot import load_model
    from braid.pretrain.config.problem import configuration_error
    from braid.pretrain.config.validate import check_seed
    from braid.pretrain.training.precision import autocast

    from .output import write_samples
    from .prompts import Prompt, infill_prompts, no_prompt, prefix_length, prefix_prompt
    from .sampler import Samples, draw_samples

    check_seed(args.seed)
    model = load_model(args.checkpoint, pick_device(args.device), use_ema=not args.raw_weights)
    settings = _settings(args, model.config.sampling)
    problems = _problems(args, settings, model.config.objective)
    if problems:
        raise configuration_error(problems)
    length, wrapped = model.config.data.sequence_length, model.config.data.packing == "wrap"
    if args.prompt is not None:
        prompt = prefix_prompt(args.prompt, args.num, length, model.tokenizer, wrapped=wrapped)
    elif args.infill is not None:
        prompt = infill_prompts(args.infill, args.num, length, model.tokenizer, wrapped=wrapped)
    else:
        prompt = no_prompt(args.num, length)
    if model.objective.causal:
        prefix_length(prompt)  # of all prompts together: what is refused must not depend on the batch size

    parts: list[Samples] = []
    total = len(prompt.tokens)
    for start in range(0, total, args.batch_size):
        part = Prompt(prompt.tokens[start : start + args.batch_size], prompt.known[start : start + args.batch_size])
        with autocast(model.config.run.precision, next(model.objective.parameters()).device):
            parts.append(
                draw_samples(
                    model.objective, settings, part, key=args.seed, first_ordinal=start,
                    progress=lambda step, steps, start=start: _progress(start, total, step, steps),
                )
            )  # fmt: skip
    samples = Samples(torch.cat([part.tokens for part in parts]), parts[0].network_calls)
    write_samples(args.output, samples, model.tokenizer, settings, step=model.step, seed=args.seed)
    for index, tokens in enumerate(samples.tokens.tolist()):
        print(f"--- sample {index}\n{model.tokenizer.decode(tokens)}")
    print(f"--- {total} samples, {samples.network_calls} network calls each batch, written to {args.output}")
    return 0


def _problems(
    args: argparse.Namespace, settings: SamplingConfig, objective: ARConfig | MDLMConfig | CCDDConfig
) -> list[Problem]:
    """What is wrong with the sampler's settings, and with options that a model of this objective would ignore."""
    from braid.pretrain.config.problem import Problem
    from braid.pretrain.config.validate import why_unguided

    problems = [
        Problem(f"--{name} {value} must be {rule}", change=f"for example --{name} {example}")
        for name, value, rule, right, example in [
            ("num", args.num, "at least 1", args.num >= 1, 4),
            ("batch-size", args.batch_size, "at least 1", args.batch_size >= 1, 16),
            ("steps", settings.steps, "at least 1", settings.steps >= 1, 64),
            ("guidance", settings.guidance, "at least 0 and finite", 0 <= settings.guidance < math.inf, 1),
            ("temperature", settings.temperature, "positive and finite", 0 < settings.temperature < math.inf, 1),
            ("top-p", settings.top_p, "in (0, 1]", 0 < settings.top_p <= 1, 1),
        ]
        if not right
    ]
    unguided = why_unguided(objective)
    if objective.name == "ccdd":
        if settings.guidance != 1 and unguided:
            found = f"guidance {settings.guidance}"
            problems.append(Problem(f"there is nothing to guide: {unguided}", found, "--guidance 1"))
    else:
        for name, value in (("sampler", args.sampler), ("guidance", args.guidance)):
            if value is not None:
                problems.append(Problem(f"--{name} {value} would be ignored: {unguided}", change=f"leave out --{name}"))
    return problems


def _settings(args: argparse.Namespace, defaults: SamplingConfig) -> SamplingConfig:
    from dataclasses import replace

    given = {
        "steps": args.steps,
        "continuous_sampler": args.sampler,
        "guidance": args.guidance,
        "temperature": args.temperature,
        "top_p": args.top_p,
    }
    return replace(defaults, **{name: value for name, value in given.items() if value is not None})


def _progress(start: int, total: int, step: int, steps: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if step == steps else ""
        print(f"\rsamples {start + 1}.. of {total}: step {step}/{steps}", end=end, file=sys.stderr, flush=True)
