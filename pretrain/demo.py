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
from typing import Any

MODELS = {"ccdd": "joint_bound", "mdlm": "mdlm_bound", "ar": "ar_nll"}
"""The three runs in training order, and what summary.json calls the headline figure of each."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dir", type=Path, default=Path("runs/demo"), help="where everything goes; default runs/demo")
    parser.add_argument("--steps", type=int, help="optimizer steps of each model; default: the demo recipes'")
    parser.add_argument("--sequences", type=int, default=256, help="validation rows in the final figures; default 256")
    parser.add_argument(
        "--draws", type=int, default=4, help="Monte-Carlo draws per row in the final figures; default 4"
    )


def main(args: argparse.Namespace) -> int:
    """Prepare, train, evaluate, sample, report. Exit codes as for `braid pretrain`."""
    from braid.data_pipeline.prepare import prepare_embedded
    from braid.pretrain.report.html import write_report
    from braid.pretrain.training.run import pretrain

    started = time.monotonic()
    _section("1. The corpus every Python carries")
    data = args.dir / "data"
    prepare_embedded(data)

    configs = {name: _config(name, args, data) for name in MODELS}
    _section(
        "2. Three models of one size on the same tokens: joint (ccdd), masked diffusion (mdlm), autoregressive (ar)"
    )
    _announce_time(configs["ccdd"], args)
    for config in configs.values():
        pretrain(config)

    _section("3. Evaluation on the validation text")
    results = {name: _evaluate(Path(config.run.dir), args) for name, config in configs.items()}

    _section("4. Samples")
    samples = _sample(Path(configs["ccdd"].run.dir))

    summary = _summarise(args.dir, results, samples, time.monotonic() - started)
    joint = Path(configs["ccdd"].run.dir)
    _write_json(args.dir / "summary.json", summary)
    _write_json(joint / "summary.json", summary)
    report = write_report(joint, comparisons=[Path(configs[name].run.dir) for name in ("mdlm", "ar")])
    shutil.copyfile(report, args.dir / "report.html")
    _conclude(args.dir, summary)
    return 0


def _config(name: str, args: argparse.Namespace, data: Path):
    from braid.pretrain.config.load import load_config

    overrides = [f"run.dir={args.dir / name}", f"data.path={data}"]
    if args.steps is not None:
        overrides.append(f"training.steps={args.steps}")
    config = load_config(f"demo_{name}", overrides)
    warmup = min(config.optimizer.warmup_steps, config.training.steps // 4)
    decay = min(config.optimizer.decay_steps, config.training.steps // 2)
    return replace(config, optimizer=replace(config.optimizer, warmup_steps=warmup, decay_steps=decay))


def _announce_time(config, args: argparse.Namespace) -> None:
    """Time a few steps on a scratch copy of the first model and say how long all three will take."""
    import torch

    from braid.parallel.data_parallel import pick_device
    from braid.pretrain.model.backbone import Backbone

    device = pick_device(config.run.device)
    shape = (config.training.micro_batch_size, config.data.sequence_length)
    network = Backbone(config.model, vocab_size=512, causal=False, time_conditioned=False, seed=0).to(device)
    tokens = torch.zeros(shape, dtype=torch.int64, device=device)
    for attempt in range(4):
        begin = time.perf_counter()
        network(tokens, None).logits.logsumexp(-1).mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin if attempt else 0.0
    accumulation = config.training.global_batch_size // config.training.micro_batch_size
    minutes = len(MODELS) * config.training.steps * accumulation * seconds * 1.3 / 60  # the optimizer, data and noise
    tokens_seen = config.training.steps * config.training.global_batch_size * config.data.sequence_length
    print(
        f"each sees {tokens_seen:,} tokens; at this machine's speed about {minutes:.0f} minutes for the three",
        flush=True,
    )


def _evaluate(run_dir: Path, args: argparse.Namespace) -> dict[str, Any]:
    from braid.pretrain.evaluation import command

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    given = [str(run_dir), "--metrics", "bound,entropy", "--sequences", str(args.sequences), "--draws", str(args.draws)]
    parsed = parser.parse_args(given)
    result = command.evaluate(parsed)
    _write_json(run_dir / "evaluation.json", result)
    print(command.format_table(result), flush=True)
    return result


def _sample(run_dir: Path) -> Path:
    """A few samples of the joint model, and one trajectory for the report. Returns the samples' file."""
    from braid.parallel.data_parallel import pick_device
    from braid.pretrain.checkpoint.snapshot import load_model
    from braid.pretrain.sampling.output import write_samples, write_trajectory
    from braid.pretrain.sampling.prompts import no_prompt
    from braid.pretrain.sampling.sampler import draw_samples

    model = load_model(run_dir, pick_device("auto"))
    settings = model.config.sampling
    prompt = no_prompt(model.config.training.num_samples, model.config.data.sequence_length)
    samples = draw_samples(model.objective, settings, prompt, key=model.config.run.seed, record=True)
    path = run_dir / "samples" / "final.jsonl"
    write_samples(path, samples, model.tokenizer, settings, step=model.step, seed=model.config.run.seed)
    write_trajectory(run_dir / "trajectory.json", samples, model.tokenizer)
    for index, tokens in enumerate(samples.tokens.tolist()[:2]):
        print(f"--- sample {index}\n{model.tokenizer.decode(tokens)}")
    return path


def _summarise(folder: Path, results: dict[str, Any], samples: Path, seconds: float) -> dict[str, Any]:
    summary: dict[str, Any] = {"unit": "nats per token, validation"}
    figures = {key: results[name]["figures"][0] for name, key in MODELS.items()}
    figures["joint_nelbo"] = results["ccdd"]["figures"][1]
    figures["unigram_entropy"] = results["ccdd"]["unigram_entropy"]
    summary |= {key: figure["value"] for key, figure in figures.items()}
    summary["standard_errors"] = {key: figure["standard_error"] for key, figure in figures.items()}
    summary["bits_per_byte"] = {key: figure["bits_per_byte"] for key, figure in figures.items()}
    summary["what"] = {key: f"{figure['label']}: {figure['note']}" for key, figure in figures.items()}
    joint = json.loads((folder / "ccdd" / "environment.json").read_text(encoding="utf-8"))
    last = (folder / "ccdd" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    summary |= {
        "joint_bound_over_unigram_entropy": summary["joint_bound"] / summary["unigram_entropy"],
        "parameters": joint["parameters"]["total"],
        "tokens_seen": json.loads(last)["tokens_seen"],
        "seconds": seconds,
        "samples": str(samples.relative_to(folder)),
        "sample_entropy": {name: results[name]["samples"]["entropy"] for name in MODELS},
        "report": "report.html",
    }
    return summary


def _conclude(folder: Path, summary: dict[str, Any]) -> None:
    print()
    for key in (*MODELS.values(), "unigram_entropy"):
        error, bits = summary["standard_errors"][key], summary["bits_per_byte"][key]
        print(f"  {key:16s} {summary[key]:.4f} +- {error:.4f} nats per token, {bits:.4f} bits per byte")
    below = 100 * (1 - summary["joint_bound_over_unigram_entropy"])
    print(f"The joint model's token bound is {below:.1f} % below the unigram entropy of the validation tokens.")
    gain = summary["mdlm_bound"] - summary["joint_bound"]
    noise = (summary["standard_errors"]["mdlm_bound"] ** 2 + summary["standard_errors"]["joint_bound"] ** 2) ** 0.5
    if gain > 2 * noise:
        print(f"It is {gain:.4f} nats below the masked-diffusion control.")
    else:
        print(f"Its latents do not help the bound here: {-gain:+.4f} +- {noise:.4f} nats against the masked-diffusion "
              "control. (A table encoder knows nothing of the context; see the README.)")  # fmt: skip
    print(f"Took {summary['seconds'] / 60:.1f} minutes. Look at {folder / 'report.html'};")
    print(f"numbers are in {folder / 'summary.json'}, samples in {folder / summary['samples']}.")


def _section(title: str) -> None:
    print(f"\n== {title}", flush=True)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
