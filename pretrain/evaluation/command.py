"""`braid evaluate CHECKPOINT`: likelihood figures with standard errors, and the entropy of samples."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bound import Estimate

METRICS = ("bound", "entropy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="run directory, or one of its checkpoints/step-* folders")
    parser.add_argument("--data", type=Path, help="prepared corpus; default: the one the run was trained on")
    parser.add_argument("--split", default="validation", choices=["validation", "train"], help="default validation")
    parser.add_argument("--metrics", default="bound", help=f"comma-separated, of {', '.join(METRICS)}; default bound")
    parser.add_argument("--sequences", type=int, default=0, help="rows scored, spread over the split; default: all")
    parser.add_argument("--draws", type=int, default=4, help="Monte-Carlo draws per row; default 4")
    parser.add_argument("--samples", type=int, default=16, help="samples drawn for `entropy`; default 16")
    parser.add_argument("--batch-size", type=int, default=32, help="rows at a time; does not change the numbers")
    parser.add_argument("--seed", type=int, default=0, help="key of the draws; default 0")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the network; default fp32")
    parser.add_argument("--raw-weights", action="store_true", help="trained weights instead of their moving average")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--json", type=Path, help="write the result here; default, for a run's own validation text: its evaluation.json"
    )


def main(args: argparse.Namespace) -> int:
    """Print a table and write JSON. Exit code 0; errors are BraidErrors (2)."""
    result, _ = evaluate(args)
    print(format_table(result))
    own = (args.checkpoint / "checkpoints").is_dir() and args.data is None and args.split == "validation"
    target = args.json or (args.checkpoint / "evaluation.json" if own else None)
    if target:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"written to {target}")
    return 0


def evaluate(args: argparse.Namespace) -> tuple[dict[str, Any], list[Estimate]]:
    """The result as a JSON-able dictionary (the contract of evaluation.json), and the estimates with their rows."""
    from braid.data_pipeline.loader import spread
    from braid.kernels.errors import ConfigError
    from braid.kernels.reference import MAX_DRAWS
    from braid.parallel.data_parallel import World, pick_device
    from braid.pretrain.checkpoint.snapshot import load_model
    from braid.pretrain.config.validate import check_seed
    from braid.pretrain.training.precision import autocast, prepare_process

    from .bound import evaluate_rows, unigram_entropy

    metrics = [name.strip() for name in args.metrics.split(",") if name.strip()]
    unknown = sorted(set(metrics) - set(METRICS))
    if unknown or not metrics:
        raise ConfigError(
            "unknown metric", found=", ".join(unknown) or "none", change=f"choose from {', '.join(METRICS)}"
        )
    least = {"draws": 1, "batch-size": 1, "samples": 1, "sequences": 0}
    for name, smallest in least.items():
        value = getattr(args, name.replace("-", "_"))
        if value < smallest:
            raise ConfigError(f"--{name} must be at least {smallest}", found=str(value))
    check_seed(args.seed)
    if args.draws > MAX_DRAWS:
        raise ConfigError("too many draws", found=str(args.draws), change=f"the noise counter holds {MAX_DRAWS}")

    device = pick_device(args.device)
    model = load_model(args.checkpoint, device, use_ema=not args.raw_weights)
    config = model.config
    prepare_process(config.run)
    rows = _rows(args, model)
    num_sequences = min(args.sequences or len(rows), len(rows))
    result: dict[str, Any] = {
        "objective": config.objective.name,
        "checkpoint_step": model.step,
        "tokenizer": {"vocab_size": model.tokenizer.vocab_size, "hash": model.tokenizer.hash},
        "sequence_length": config.data.sequence_length,
        "packing": config.data.packing,
        "split": args.split,
        "num_sequences": num_sequences,
        "num_tokens": num_sequences * config.data.sequence_length,
        "num_bytes": sum(rows.num_bytes(i) for i in spread(len(rows), num_sequences).tolist()),
        "bytes_are_exact": rows.bytes_are_exact,
        "draws": 1 if model.objective.causal else args.draws,  # an exact likelihood has nothing to draw
        "t_range": None if model.objective.causal else [1e-5, 1.0],
        "dtype": args.precision,
        "weights": "trained" if args.raw_weights or not config.training.ema_decay else "moving average",
        "figures": [],
    }
    estimates: list[Estimate] = []
    if "bound" in metrics:
        with autocast(args.precision, device):
            estimates = evaluate_rows(
                model.objective, rows, num_sequences=num_sequences, draws=result["draws"], seed=args.seed,
                micro_batch_size=args.batch_size, world=World.single(device),
                progress=lambda done: _progress(done, num_sequences),
            )  # fmt: skip
        result["figures"] = [estimate.as_dict() for estimate in estimates]
        result["unigram_entropy"] = unigram_entropy(rows, model.tokenizer.vocab_size).as_dict()
    if "entropy" in metrics:
        result["samples"] = _sample_entropy(args, model, device)
    return result, estimates


def _rows(args: argparse.Namespace, model):
    from braid.data_pipeline.corpus import TokenCorpus
    from braid.data_pipeline.packing import Rows
    from braid.kernels.errors import InputError

    corpus = TokenCorpus.open(args.data or Path(model.config.data.path), args.split)
    if corpus.tokenizer.hash != model.tokenizer.hash:
        raise InputError(
            "the corpus was tokenised with another tokenizer than the model's",
            found=f"corpus {corpus.tokenizer.hash[:16]} ({corpus.vocab_size} ids), "
            f"model {model.tokenizer.hash[:16]} ({model.tokenizer.vocab_size} ids)",
            change=f"prepare the text with --tokenizer {model.path / 'tokenizer'}",
        )
    return Rows(corpus, model.config.data.sequence_length, model.config.data.packing)


def _sample_entropy(args: argparse.Namespace, model, device) -> dict[str, Any]:
    from braid.pretrain.sampling.prompts import no_prompt
    from braid.pretrain.sampling.sampler import draw_samples, sample_entropy
    from braid.pretrain.training.precision import autocast

    prompt = no_prompt(args.samples, model.config.data.sequence_length)
    with autocast(model.config.run.precision, device):
        samples = draw_samples(model.objective, model.config.sampling, prompt, key=args.seed)
    entropies = sample_entropy(samples.tokens.cpu())
    mean = sum(entropies) / len(entropies)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in entropies) / max(1, len(entropies) - 1))
    return {
        "num": args.samples,
        "network_calls": samples.network_calls,
        "entropy": mean,
        "standard_error": deviation / math.sqrt(len(entropies)) if len(entropies) > 1 else None,
    }


def _perplexity(figure: dict[str, Any]) -> str:
    return "beyond floating point" if figure["perplexity"] is None else f"{figure['perplexity']:.4g}"


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\revaluated {done} of {total} rows", end="\n" if done == total else "", file=sys.stderr, flush=True)


def format_table(result: dict[str, Any]) -> str:
    """The result for people: every figure with what it is and the conventions it depends on."""
    lines = [
        f"{result['objective']}, step {result['checkpoint_step']}, {result['weights']} weights; "
        f"{result['split']} split: {result['num_sequences']} rows of {result['sequence_length']} tokens "
        f"({result['packing']}), {result['draws']} draws, {result['dtype']}"
    ]
    for figure in [*result["figures"], *([result["unigram_entropy"]] if "unigram_entropy" in result else [])]:
        error = figure["standard_error"]
        lines.append(
            f"  {figure['label']}: {figure['value']:.4f}"
            + (f" +- {error:.4f}" if error is not None else " (one row: no standard error)")
            + f" nats per token, perplexity {_perplexity(figure)}, {figure['bits_per_byte']:.4f} bits per byte"
            + ("" if result["bytes_are_exact"] else " (bytes by the split's mean)")
        )
        lines.append(f"      {'bound' if figure['is_bound'] else 'not a bound'}: {figure['note']}")
    if "samples" in result:
        samples = result["samples"]
        lines.append(
            f"  entropy of {samples['num']} samples: {samples['entropy']:.4f} nats "
            f"({samples['network_calls']} network calls)"
        )
    return "\n".join(lines)
