"""`braid demo`: from nothing to a trained, evaluated, sampled and pictured joint diffusion model, with two controls.

The text is what every Python carries. Three models of one size see the same tokens: joint (CCDD), masked diffusion
(MDLM) and autoregressive (AR). Run it again and it continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from braid.pretrain.config.schema import Config
    from braid.pretrain.evaluation.bound import Estimate

MODELS = {"ccdd": "joint_bound", "mdlm": "mdlm_bound", "ar": "ar_nll"}
"""The three runs in training order, and what summary.json calls the headline figure of each."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dir", type=Path, default=Path("runs/demo"), help="where everything goes; default runs/demo")
    parser.add_argument("--steps", type=int, help="optimizer steps of each model; default: the demo recipes'")
    parser.add_argument("--sequences", type=int, default=320, help="validation rows in the final figures; default 320")
    parser.add_argument(
        "--draws", type=int, default=4, help="Monte-Carlo draws per row in the final figures; default 4"
    )


def main(args: argparse.Namespace) -> int:
    """Prepare, train, evaluate, sample, report. Exit codes as for `braid pretrain`."""
    from braid.data_pipeline.prepare import prepare_embedded
    from braid.pretrain.report.html import write_report
    from braid.pretrain.training.precision import prepare_process
    from braid.pretrain.training.run import pretrain

    started = time.monotonic()
    data = args.dir / "data"
    configs = {name: _config(name, args, data) for name in MODELS}
    _check(args, configs)

    _section("1. The corpus every Python carries")
    prepare_embedded(data)

    _section(
        "2. Three models of one size on the same tokens: joint (ccdd), masked diffusion (mdlm), autoregressive (ar)"
    )
    prepare_process(configs["ccdd"].run)
    _announce_time(configs["ccdd"])
    for config in configs.values():
        pretrain(config)

    _section("3. Evaluation on the validation text")
    results, estimates = {}, {}
    for name, config in configs.items():
        results[name], estimates[name] = _evaluate(Path(config.run.dir), args)

    _section("4. Samples")
    samples = _sample(Path(configs["ccdd"].run.dir))

    summary = _summarise(args.dir, configs, results, estimates, samples)
    summary["seconds"] = time.monotonic() - started
    joint = Path(configs["ccdd"].run.dir)
    _write_json(args.dir / "summary.json", summary)
    _write_json(joint / "summary.json", summary)
    report = write_report(joint, comparisons=[Path(configs[name].run.dir) for name in ("mdlm", "ar")])
    shutil.copyfile(report, args.dir / "report.html")
    _conclude(args.dir, summary)
    return 0


def _config(name: str, args: argparse.Namespace, data: Path) -> Config:
    from braid.pretrain.config.load import load_config

    overrides = [f"run.dir={args.dir / name}", f"data.path={data}"]
    if args.steps is not None:
        overrides.append(f"training.steps={args.steps}")
    config = load_config(f"demo_{name}", overrides)
    warmup = min(config.optimizer.warmup_steps, config.training.steps // 4)
    decay = min(config.optimizer.decay_steps, config.training.steps // 2)
    return replace(config, optimizer=replace(config.optimizer, warmup_steps=warmup, decay_steps=decay))


def _check(args: argparse.Namespace, configs: dict[str, Config]) -> None:
    """What would fail, or mislead, only after minutes of training."""
    from braid.kernels.errors import ConfigError
    from braid.pretrain.config.load import load_config
    from braid.pretrain.config.validate import validate

    for name, value, least in (("sequences", args.sequences, 2), ("draws", args.draws, 1)):
        if value < least:
            raise ConfigError(f"--{name} must be at least {least}", found=str(value))
    for config in configs.values():
        validate(config)
        saved = Path(config.run.dir) / "config.yaml"
        if saved.is_file() and (steps := load_config(saved).training.steps) != config.training.steps:
            raise ConfigError(
                f"{config.run.dir} holds a demo of another length, whose learning rate has decayed for it",
                found=f"{steps} steps there, {config.training.steps} asked for",
                change=f"choose another --dir, remove {args.dir}, or give --steps {steps}",
            )


def _announce_time(config: Config) -> None:
    """Time a few steps on a scratch network and say how long all three will take on this machine."""
    import torch

    from braid.parallel.data_parallel import pick_device
    from braid.pretrain.model.backbone import Backbone

    device = pick_device(config.run.device)
    shape = (config.training.micro_batch_size, config.data.sequence_length)
    network = Backbone(config.model, vocab_size=512, causal=False, time_conditioned=False, seed=0).to(device)
    tokens = torch.zeros(shape, dtype=torch.int64, device=device)
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        network(tokens, None).logits.logsumexp(-1).mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    accumulation = config.training.global_batch_size // config.training.micro_batch_size
    per_step = sorted(seconds)[2] * accumulation * 1.5  # beside it: optimizer, noise, data, validation
    minutes = len(MODELS) * config.training.steps * per_step / 60
    num_tokens = config.training.steps * config.training.global_batch_size * config.data.sequence_length
    print(
        f"each sees {num_tokens:,} tokens; at this machine's speed some {minutes:.0f} minutes for the three", flush=True
    )


def _evaluate(run_dir: Path, args: argparse.Namespace) -> tuple[dict[str, Any], list[Estimate]]:
    from braid.pretrain.evaluation import command

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    given = [str(run_dir), "--metrics", "bound,entropy", "--sequences", str(args.sequences), "--draws", str(args.draws)]
    result, estimates = command.evaluate(parser.parse_args(given))
    _write_json(run_dir / "evaluation.json", result)
    print(command.format_table(result), flush=True)
    return result, estimates


def _sample(run_dir: Path) -> Path:
    """A few samples of the joint model, and one trajectory for the report. Returns the samples' file."""
    from braid.parallel.data_parallel import pick_device
    from braid.pretrain.checkpoint.snapshot import load_model
    from braid.pretrain.sampling.output import sampler_settings, write_samples, write_trajectory
    from braid.pretrain.sampling.prompts import no_prompt
    from braid.pretrain.sampling.sampler import draw_samples

    model = load_model(run_dir, pick_device("auto"))
    settings = model.config.sampling
    prompt = no_prompt(model.config.training.num_samples, model.config.data.sequence_length)
    samples = draw_samples(model.objective, settings, prompt, key=model.config.run.seed, record=True)
    path = run_dir / "samples" / "final.jsonl"
    used = sampler_settings(settings, model.config.objective, "fp32")
    write_samples(path, samples, model.tokenizer, used, step=model.step, seed=model.config.run.seed)
    write_trajectory(run_dir / "trajectory.json", samples, model.tokenizer)
    for index, tokens in enumerate(samples.tokens.tolist()[:2]):
        print(f"--- sample {index}\n{model.tokenizer.decode(tokens)}")
    return path


def _summarise(
    folder: Path,
    configs: dict[str, Config],
    results: dict[str, Any],
    estimates: dict[str, list[Estimate]],
    samples: Path,
) -> dict[str, Any]:
    from braid.pretrain.evaluation.bound import paired_difference
    from braid.pretrain.telemetry.metrics_log import read_metrics

    by_name = {figure["name"]: figure for figure in results["ccdd"]["figures"]}
    figures = {key: results[name]["figures"][0] for name, key in MODELS.items()}
    figures["joint_bound_latents_off"] = by_name["token_bound_latents_off"]
    figures["joint_nelbo"] = by_name["joint_nelbo"]
    figures["unigram_entropy"] = results["ccdd"]["unigram_entropy"]
    summary: dict[str, Any] = {"unit": "nats per token, validation"}
    summary |= {key: figure["value"] for key, figure in figures.items()}
    summary["standard_errors"] = {key: figure["standard_error"] for key, figure in figures.items()}
    summary["bits_per_byte"] = {key: figure["bits_per_byte"] for key, figure in figures.items()}
    summary["what"] = {key: f"{figure['label']}: {figure['note']}" for key, figure in figures.items()}

    joint, joint_off = (
        next(e for e in estimates["ccdd"] if e.name == n) for n in ("token_bound", "token_bound_latents_off")
    )
    summary["differences"] = {
        "what": "nats per token on the same rows and noise, and the standard error of the difference",
        "joint_bound - mdlm_bound": paired_difference(joint, estimates["mdlm"][0]),
        "joint_bound - joint_bound_latents_off": paired_difference(joint, joint_off),
    }
    summary["joint_bound_over_unigram_entropy"] = summary["joint_bound"] / summary["unigram_entropy"]
    environment = json.loads((folder / "ccdd" / "environment.json").read_text(encoding="utf-8"))
    summary["parameters"] = environment["parameters"]["total"]
    ends = {name: read_metrics(Path(config.run.dir) / "metrics.jsonl") for name, config in configs.items()}
    last = {name: [line for line in lines if line["split"] == "train"][-1] for name, lines in ends.items()}
    summary["tokens_seen"] = last["ccdd"]["tokens_seen"]
    summary["training_seconds"] = {name: line["seconds"] for name, line in last.items()}
    summary["samples"] = str(samples.relative_to(folder))
    summary["sample_entropy"] = {name: results[name]["samples"]["entropy"] for name in MODELS}
    summary["report"] = "report.html"
    return summary


def _conclude(folder: Path, summary: dict[str, Any]) -> None:
    print()
    for key in (*MODELS.values(), "unigram_entropy"):
        error, bits = summary["standard_errors"][key], summary["bits_per_byte"][key]
        print(f"  {key:16s} {summary[key]:.4f} +- {error:.4f} nats per token, {bits:.4f} bits per byte")
    below = 100 * (1 - summary["joint_bound_over_unigram_entropy"])
    print(f"The joint model's token bound is {below:.1f} % below the unigram entropy of the validation tokens.")
    differences = summary["differences"]
    print("Against the masked-diffusion control:", _verdict(*differences["joint_bound - mdlm_bound"]))
    print("Against itself with the latents off:", _verdict(*differences["joint_bound - joint_bound_latents_off"]))
    print(f"Took {summary['seconds'] / 60:.1f} minutes. Look at {folder / 'report.html'};")
    print(f"numbers are in {folder / 'summary.json'}, samples in {folder / summary['samples']}.")


def _verdict(difference: float, error: float) -> str:
    """A difference in words: better, worse, or not to be told apart (two standard errors)."""
    words = "no difference can be told" if abs(difference) < 2 * error else "lower" if difference < 0 else "higher"
    return f"{difference:+.4f} +- {error:.4f} nats per token, {words}."


def _section(title: str) -> None:
    print(f"\n== {title}", flush=True)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
