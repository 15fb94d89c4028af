"""`braid evaluate CHECKPOINT`: likelihood figures with standard errors, and the quality of what the model writes."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .table import format_table

if TYPE_CHECKING:
    from braid.data_pipeline.mixture import MixedRows
    from braid.data_pipeline.packing import Rows
    from braid.pretrain.checkpoint.snapshot import LoadedModel
    from braid.pretrain.config.schema import SamplingConfig
    from braid.pretrain.sampling.sampler import Samples

    from .bound import Estimate
    from .judge import Judge

METRICS = ("bound", "entropy", "generative", "conditional")
READ_BY = {
    "sequences": ("bound",),
    "draws": ("bound",),
    "samples": ("entropy", "generative", "conditional"),
    "judge": ("generative",),
    "judge_precision": ("generative",),
    "judge_length": ("generative",),
    "samples_file": ("generative",),
    "sample_steps": ("entropy", "generative", "conditional"),
}
"""Metrics that look at an option; with none of them it would be ignored."""

DEFAULTS = {"sequences": 0, "draws": 4, "samples": 16}
"""What options of numbers are when they are left out."""

KEPT = ("samples", "judge", "generative", "conditional")
"""Parts of evaluation.json that stay when a later evaluation of the same weights does not ask for them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="run directory, or one of its checkpoints/step-* folders")
    parser.add_argument(
        "--metrics", default="bound",
        help="comma-separated: bound (likelihood figures), entropy (of samples), generative (samples before a judge), "
        "conditional (answers to the sources of pairs: BLEU, ROUGE, exact match); default bound",
    )  # fmt: skip
    parser.add_argument(
        "--data", metavar="CORPUS", action="append",
        help="prepared corpus, a folder or URL; default: the one the run was trained on, or all sources of a mixture, "
        "each by itself and together in the shares they have in training. Repeat it to score several, each prepared "
        "with the model's tokenizer; samples are compared with the first",
    )  # fmt: skip
    parser.add_argument("--split", default="validation", choices=["validation", "train"], help="default validation")
    parser.add_argument("--sequences", type=int, help="rows scored of a corpus, spread over it; default: all")
    parser.add_argument("--draws", type=int, help="Monte-Carlo draws per row; default 4")
    parser.add_argument("--samples", type=int, help="samples drawn, or pairs answered; default 16")
    parser.add_argument(
        "--sample-steps", metavar="T,T,...",
        help="denoising steps of the samples, each number measured by itself; default: the run's sampling.steps",
    )  # fmt: skip
    parser.add_argument(
        "--samples-file", type=Path, action="append", metavar="FILE",
        help='generative: judge the texts of these JSON lines, {"text": ...} as `braid sample` writes them; others are '
        "then drawn for --sample-steps only. Repeat it to compare several",
    )  # fmt: skip
    parser.add_argument(
        "--judge", metavar="PATH",
        help="generative: the causal language model that judges; a Hugging Face folder (or hub name), or a run "
        "directory or checkpoint of an AR model",
    )  # fmt: skip
    parser.add_argument("--judge-precision", choices=["fp32", "bf16"], help="of the judge; default fp32")
    parser.add_argument(
        "--judge-length", type=int, metavar="N",
        help="tokens the judge reads of a text, its BOS included; what is beyond is cut off, not scored; default 1024, "
        "or all it can read if that is less",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=32, help="rows at a time; does not change the numbers")
    parser.add_argument("--seed", type=int, default=0, help="key of the draws; default 0")
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="of the network that is scored; default fp32"
    )
    parser.add_argument("--raw-weights", action="store_true", help="trained weights instead of their moving average")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--json", type=Path,
        help="write the result here; default, for the bound on a run's own validation text: its evaluation.json",
    )  # fmt: skip


def main(args: argparse.Namespace) -> int:
    """Print a table and write JSON. Exit code 0; errors are BraidErrors (2)."""
    from braid.pretrain.checkpoint.files import check_place

    if args.json:
        check_place(args.json)
    result, _ = evaluate(args)
    print(format_table(result))
    own = (args.checkpoint / "checkpoints").is_dir() and args.data is None and args.split == "validation"
    target = args.json or (args.checkpoint / "evaluation.json" if own and result["figures"] else None)
    if target:
        if not args.json:
            result = _kept(target, result) | result
        target.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"written to {target}")
    return 0


def _kept(file: Path, result: dict[str, Any]) -> dict[str, Any]:
    """What an earlier evaluation of the same weights found and this one did not look at."""
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    same = all(before.get(name) == result[name] for name in ("checkpoint_step", "weights", "objective"))
    return {name: before[name] for name in KEPT if same and name in before}


def evaluate(args: argparse.Namespace) -> tuple[dict[str, Any], list[Estimate]]:
    """The result as a JSON-able dictionary (the contract of evaluation.json), and the estimates of what is on top.

    `corpora` has an entry for each corpus; the first one's fields are on top as well. Of a run on a mixture these are
    its sources, and on top is the mixture, see mixture.mixture_of. Each with the metric of its name:
    `samples`, `generative` (entries for the corpus's own rows, each file and each number of steps; and `judge`),
    `conditional` (an entry for each number of steps).
    """
    from braid.data_pipeline.mixture import MixedRows
    from braid.kernels.errors import ConfigError
    from braid.parallel.data_parallel import pick_device
    from braid.pretrain.checkpoint.snapshot import load_model
    from braid.pretrain.training.precision import prepare_process

    from .judge import load_judge
    from .mixture import mixture_of

    metrics = _check(args)
    args = argparse.Namespace(**vars(args) | {name: getattr(args, name) or n for name, n in DEFAULTS.items()})
    device = pick_device(args.device)
    model = load_model(args.checkpoint, device, use_ema=not args.raw_weights)
    config = model.config
    prepare_process(config.run)
    steps = _steps(args, model)
    if len(steps) > 1 and not {"generative", "conditional"} & set(metrics):
        raise ConfigError(
            "the metric entropy is of one number of steps",
            found=f"--sample-steps {args.sample_steps}",
            change="give one, or --metrics generative, which prints the entropy for each",
        )
    sources = {} if args.data else config.data.sources
    folders = args.data or config.data.folders
    corpora = [model.rows(folder, args.split) for folder in folders]
    compared = MixedRows(dict(zip(sources, corpora, strict=True))) if sources else corpora[0]
    judge = None
    if "generative" in metrics:  # a judge that cannot be loaded should be known before hours of scoring
        precision = args.judge_precision or "fp32"
        judge = load_judge(args.judge, device, precision=precision, max_length=args.judge_length)
    result: dict[str, Any] = {
        "objective": config.objective.name,
        "checkpoint_step": model.step,
        "tokenizer": {"vocab_size": model.tokenizer.vocab_size, "hash": model.tokenizer.hash},
        "sequence_length": config.data.sequence_length,
        "packing": config.data.packing,
        "draws": 1 if model.objective.causal else args.draws,  # an exact likelihood has nothing to draw
        "dtype": args.precision,
        "weights": "trained" if args.raw_weights or not config.training.ema_decay else "moving average",
    }
    scored = [_score(args, metrics, model, rows) for rows in corpora]
    result["corpora"] = [corpus for corpus, _ in scored]
    on_top, estimates = scored[0]
    if sources:
        named = dict(zip(sources, scored, strict=True))
        on_top, estimates = mixture_of(
            {name: entry for name, (entry, _) in named.items()}, {name: each for name, (_, each) in named.items()},
            model.shares,
        )  # fmt: skip
    result |= on_top
    if "conditional" in metrics:
        result["conditional"] = [_answer(args, model, compared, each) for each in steps]
    drawn = {}
    if "entropy" in metrics or ("generative" in metrics and (args.sample_steps or not args.samples_file)):
        drawn = {each: _draw(args, model, each) for each in steps}
    if "entropy" in metrics:
        result["samples"] = {**_entropy(drawn[steps[0]]), "sampler": _sampler(model, steps[0])}
    if judge is not None:
        result["judge"] = judge.as_dict()
        result["generative"] = _generative(args, model, compared, drawn, judge)
    return result, estimates


def _check(args: argparse.Namespace) -> list[str]:
    """The metrics asked for; every option in range and looked at by one of them."""
    from braid.kernels.errors import ConfigError
    from braid.kernels.reference import MAX_DRAWS
    from braid.pretrain.config.validate import check_seed

    metrics = [name.strip() for name in args.metrics.split(",") if name.strip()]
    unknown = sorted(set(metrics) - set(METRICS))
    if unknown or not metrics:
        raise ConfigError(
            "unknown metric", found=", ".join(unknown) or "none", change=f"choose from {', '.join(METRICS)}"
        )
    least = {"draws": 1, "batch-size": 1, "samples": 1, "sequences": 0}
    for name, smallest in least.items():
        value = getattr(args, name.replace("-", "_"))
        if value is not None and value < smallest:
            raise ConfigError(f"--{name} must be at least {smallest}", found=str(value))
    check_seed(args.seed)
    if args.draws is not None and args.draws > MAX_DRAWS:
        raise ConfigError("too many draws", found=str(args.draws), change=f"the noise counter holds {MAX_DRAWS}")
    for name, readers in READ_BY.items():
        if getattr(args, name) is not None and not set(readers) & set(metrics):
            raise ConfigError(
                f"--{name.replace('_', '-')} would be ignored",
                found=f"--metrics {args.metrics}",
                change=f"leave it out, or ask for one of {', '.join(readers)}",
            )
    if "generative" in metrics and args.judge is None:
        raise ConfigError(
            "generative metrics need a judge", change="--judge FOLDER: a causal language model, or a run of an AR model"
        )
    return metrics


def _steps(args: argparse.Namespace, model: LoadedModel) -> list[int | None]:
    """The numbers of denoising steps; of a model that has none, [None]."""
    from braid.kernels.errors import ConfigError

    if model.objective.causal:
        if args.sample_steps:
            raise ConfigError(
                "--sample-steps would be ignored: an AR model takes one call a token", change="leave it out"
            )
        return [None]
    words = args.sample_steps.split(",") if args.sample_steps is not None else [str(model.config.sampling.steps)]
    if not all(word.strip().isdecimal() and int(word) >= 1 for word in words):
        raise ConfigError(
            "--sample-steps must be whole numbers of at least 1", found=args.sample_steps, change="--sample-steps 8,32"
        )
    return list(dict.fromkeys(map(int, words)))


def _score(
    args: argparse.Namespace, metrics: list[str], model: LoadedModel, rows: Rows
) -> tuple[dict[str, Any], list[Estimate]]:
    """What is scored of one corpus, and where the bound is asked for, its figures."""
    from braid.data_pipeline.loader import validation_batches
    from braid.parallel.data_parallel import World
    from braid.pretrain.training.precision import autocast

    from .bound import ROWS_AT_A_TIME, evaluate_rows, unigram_entropy

    num_sequences = min(args.sequences or len(rows), len(rows))
    num_tokens, num_bytes = 0, 0.0
    for batch in validation_batches(rows, num_sequences, ROWS_AT_A_TIME, 0, 1):
        num_tokens += int(batch.loss_mask.sum())
        num_bytes += sum(rows.num_bytes(i) for i in batch.ordinals.tolist())
    estimates: list[Estimate] = []
    result: dict[str, Any] = {
        "data": rows.corpus.source,
        "split": args.split,
        "num_sequences": num_sequences,
        "num_tokens": num_tokens,
        "num_bytes": num_bytes,
        "bytes_are_exact": rows.bytes_are_exact,
        "figures": [],
    }
    if "bound" in metrics:
        show = _progress("rows evaluated")
        device = next(model.objective.parameters()).device
        with autocast(args.precision, device):
            estimates = evaluate_rows(
                model.objective, rows, num_sequences=num_sequences,
                draws=1 if model.objective.causal else args.draws, seed=args.seed,
                micro_batch_size=args.batch_size, peers=World.single(device),
                progress=lambda done: show(done, num_sequences),
            )  # fmt: skip
        result["figures"] = [estimate.as_dict() for estimate in estimates]
        result["unigram_entropy"] = unigram_entropy(rows, model.tokenizer.vocab_size).as_dict()
    return result, estimates


def _draw(args: argparse.Namespace, model: LoadedModel, steps: int | None) -> Samples:
    from braid.kernels.errors import ConfigError
    from braid.pretrain.sampling.batches import draw_in_batches
    from braid.pretrain.sampling.prompts import no_prompt

    if model.config.data.packing == "pairs":
        raise ConfigError(
            "a model of (source, target) pairs writes answers, not texts of its own", change="--metrics conditional"
        )
    prompt = no_prompt(args.samples, model.config.data.sequence_length)
    return draw_in_batches(
        model.objective, _settings(model, steps), prompt, key=args.seed,
        precision=model.config.run.precision, progress=_progress(_about("samples drawn", steps)),
    )  # fmt: skip


def _settings(model: LoadedModel, steps: int | None) -> SamplingConfig:
    return model.config.sampling if steps is None else replace(model.config.sampling, steps=steps)


def _sampler(model: LoadedModel, steps: int | None) -> dict[str, Any]:
    """What makes the samples of so many steps."""
    from braid.pretrain.sampling.output import sampler_settings

    return sampler_settings(_settings(model, steps), model.config.objective, model.config.run.precision)


def _entropy(samples: Samples) -> dict[str, Any]:
    from braid.pretrain.sampling.sampler import sample_entropy

    from .bound import finite, mean_and_error

    mean, error = mean_and_error(sample_entropy(samples.tokens))
    calls, _ = mean_and_error(samples.network_calls)
    num = len(samples.tokens)
    return finite({"num": num, "network_calls": calls, "entropy": mean, "standard_error": error})


def _generative(
    args: argparse.Namespace, model: LoadedModel, rows: Rows | MixedRows, drawn: dict[int | None, Samples], judge: Judge
) -> list[dict[str, Any]]:
    """An entry for real text first, then for each file and each number of steps."""
    from .bound import mean_and_error
    from .generative import Reference, corpus_texts, measure, read_samples, texts_of_rows

    tokenizer, wrapped = model.tokenizer, model.config.data.packing == "wrap"
    files = [(str(path), read_samples(path, tokenizer, wrapped=wrapped)) for path in args.samples_file or []]
    reference_texts, control, counts = corpus_texts(rows, args.samples, tokenizer)
    sets = [("data", control), *files]
    for steps, samples in drawn.items():
        calls, _ = mean_and_error(samples.network_calls)
        about = {"network_calls": calls, "sampler": _sampler(model, steps)}
        texts = texts_of_rows(samples.tokens.numpy(), tokenizer, wrapped=wrapped, **about)
        sets.append((_about("samples", steps), texts))

    def judged(name, texts):
        progress = _progress(f"texts judged ({name})")
        return judge.judge(texts.texts, texts.ended, batch_size=args.batch_size, progress=progress)

    reference = Reference(judged("reference", reference_texts).features, counts)
    return [{"name": name, **measure(texts, judged(name, texts), reference)} for name, texts in sets]


def _answer(args: argparse.Namespace, model: LoadedModel, rows: Rows | MixedRows, steps: int | None) -> dict[str, Any]:
    from .conditional import answer_rows, measure_answers

    answers = answer_rows(
        model, _settings(model, steps), rows, args.samples, seed=args.seed,
        progress=_progress(_about("sources answered", steps)),
    )  # fmt: skip
    return {"steps": steps, "sampler": _sampler(model, steps), **measure_answers(answers, model.tokenizer.decode)}


def _about(what: str, steps: int | None) -> str:
    return what if steps is None else f"{what}, {steps} step{'s' * (steps != 1)}"


def _progress(what: str) -> Callable[[int, int], None]:
    """Counts on one line of a terminal."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{what}: {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return show
