"""A run directory as training, evaluation and sampling leave it, with curves that look like real ones."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import yaml

from braid.pretrain.config.objectives import OBJECTIVES
from braid.pretrain.config.schema import Config

STEPS, TOKENS_PER_STEP, SECONDS_PER_STEP = 1600, 64 * 128, 0.41
SAMPLER_SETTINGS = {
    "ar": {"sampler": "autoregressive"},
    "ccdd": {"steps": 64, "sampler": "ddim", "guidance": 1.0},
}
STORY = (
    "The river was frozen from one bank to the other, and nobody in the village had seen that before. Old Marit put "
    "on her coat and walked down to look at it. \u201cIt will hold a child,\u201d she said, \u201cbut not a cow.\u201d "
    "The children laughed; the cow, of course, did not.\n\nIn the evening the wind turned. By morning there was water "
    "on the ice, and by noon the ice had gone, all of it at once, with a noise like carts on a bridge."
)


def resolved_config(objective: str) -> dict:
    """The resolved configuration as plain data, every field of the schema in it."""
    config = asdict(Config(objective=OBJECTIVES[objective]()))
    config["run"]["dir"] = f"runs/{objective}"
    config["model"] |= {"width": 256, "num_layers": 6, "num_heads": 4}
    config["training"] |= {"steps": STEPS, "global_batch_size": 64, "validate_every": 100}
    return config


def metrics_lines(objective: str, rng: np.random.Generator) -> list[dict]:
    """Losses that fall like a power law, throughput with hiccups, gradient norms with a spike.

    Training lines hold averages of the loss and its terms, validation lines the objective's figures.
    """
    floors = {"ar": (4.62, 0.0), "mdlm": (5.09, 0.1), "ccdd": (4.99, -0.7), "replaid": (4.9, 0.0), "elf": (0.8, 0.2)}
    floor, offset = floors[objective]
    middles = (np.arange(10) + 0.5) / 10
    lines = []
    for step in range(10, STEPS + 1, 10):
        mean = floor + 4.6 * (1 + step / 25) ** -0.62
        noise = 0.02 if objective == "ar" else 0.16
        shape = 0.35 + 1.3 * middles**0.7
        common = {"step": step, "tokens_seen": step * TOKENS_PER_STEP, "seconds": step * SECONDS_PER_STEP}
        loss = mean + offset + noise * rng.normal()
        if objective == "replaid":  # a schedule that is learned until the loss is the same at every time
            shape = 1 + np.exp(-step / 200) * np.linspace(0.9, -0.9, 10)
        buckets = [None] * 10 if objective == "ar" else list(loss * shape * (1 + 0.06 * rng.normal(size=10)))
        lr = 3e-4 * min(1.0, step / 150)
        lines.append(
            common
            | {
                "split": "train",
                "loss": loss,
                "terms": {name: share * loss for name, share in TERMS[objective].items()},
                "loss_by_time": buckets,
                "grad_norm": float(0.55 + 1.8 / (1 + step / 60) + 0.08 * abs(rng.normal()) + 14 * (step == 730)),
                "lr": lr,
                "tokens_per_second": float(20_000 * (1 - 0.03 * abs(rng.normal())) * (0.55 if step % 500 == 0 else 1)),
                "mfu": None,
                "data_wait": float(0.01 + 0.01 * rng.random()),
            }
        )
        if step % 100 == 0:
            value = mean + 0.03 + 0.01 * rng.normal()
            others = {
                "ccdd": {"joint_nelbo": 7 * value + 6},
                "mdlm": {"published": value - 0.007},
                "replaid": {"diffusion": 0.9 * value},
                "elf": {"decode_accuracy": 1 - 0.2 * value},
            }.get(objective, {})
            figures = {FIGURES[objective][0][0]: value} | others
            lines.append(
                common
                | {
                    "split": "validation",
                    "loss": value,
                    "terms": figures,
                    "standard_error": 0.021,
                    "bits_per_byte": None if objective == "elf" else 1.9,
                }
            )
    return lines


TERMS = {
    "ar": {"token_loss": 1.0},
    "mdlm": {"token_loss": 1.0},
    "ccdd": {"token_loss": 0.84, "latent_loss": 0.16},
    "replaid": {"prior": 0.01, "reconstruction": 0.09, "diffusion": 0.9},
    "elf": {"denoise_loss": 0.6, "decode_loss": 0.4},
}
"""Terms of the training loss and their shares in it."""
FIGURES = {
    "ccdd": [
        ("token_bound", "token bound, latents from visible tokens only", 5.0312, 0.0117, True, "discrete NELBO"),
        ("joint_nelbo", "joint NELBO of tokens and latents", 41.873, 0.094, True, "q(z|x) = N(E(x), 0.1^2 I)"),
    ],
    "mdlm": [
        ("bound", "token bound", 5.1186, 0.0113, True, "NELBO with eps = 0, t in [1e-5, 1]"),
        ("published", "published convention", 5.1119, 0.0112, False, "eps = 1e-3: about 0.007 nats too low"),
    ],
    "ar": [("nll", "exact NLL", 4.6473, 0.0098, True, "exact: next-token cross-entropy of every token")],
    "replaid": [
        ("bound", "token bound", 4.9671, 0.0121, True, "prior, reconstruction and diffusion, t in [0, 1]"),
        ("diffusion", "diffusion term of the bound", 4.4702, 0.0119, False, "denoising of the embeddings"),
    ],
    "elf": [
        ("velocity_mse", "velocity error of the denoiser", 0.8864, 0.0628, False, "mean square per dimension"),
        ("decode_accuracy", "decode accuracy under the training noise", 0.91264, 0.00043, False, "share of tokens"),
    ],
}
WITHOUT_LIKELIHOOD = ("elf",)
CORPORA = {"ccdd": ("runs/corpora/web-text", "elsewhere/wiki-pages")}
"""Where several corpora were scored; the second one's figures are 0.4 higher."""


def evaluation(objective: str) -> dict:
    """evaluation.json: figures, unigram entropy, several corpora, samples before a judge, answers to sources."""
    corpora = [
        {"data": folder, "split": "validation", "num_sequences": 1024, "num_tokens": 131072 // (1 + index)}
        | {"num_bytes": 486_277, "bytes_are_exact": index == 0, "figures": _figures(objective, 0.4 * index)}
        | {"unigram_entropy": _estimate("unigram_entropy", "unigram entropy", 6.4127 + index, 0.0151, False, UNIGRAM)}
        for index, folder in enumerate(CORPORA.get(objective, ("corpus",)))
    ]
    return {
        "objective": objective,
        "checkpoint_step": STEPS,
        "tokenizer": {"vocab_size": 8193, "hash": "7d1f03c6a2b94e58"},
        "sequence_length": 128,
        "packing": "pairs" if objective == "elf" else "wrap",
        "draws": 4,
        "dtype": "fp32",
        "weights": "moving average",
        "corpora": corpora,
        **corpora[0],
        "samples": {"num": 16, "network_calls": 64, "entropy": 4.317, "standard_error": 0.042},
        **({"conditional": conditional()} if objective == "elf" else generative(objective)),
    }


UNIGRAM = "frequencies of the scored rows themselves"


def _figures(objective: str, more: float) -> list[dict]:
    unit = "value" if objective in WITHOUT_LIKELIHOOD else "nats"
    return [
        _estimate(name, label, value + more, error, is_bound, note, unit)
        for name, label, value, error, is_bound, note in FIGURES[objective]
    ]


def _estimate(name: str, label: str, value: float, error: float, is_bound: bool, note: str, unit: str = "nats") -> dict:
    bits, nats = 1 / np.log(2) / 3.71, unit == "nats"
    return {
        "name": name,
        "label": label,
        "unit": unit,
        "value": value,
        "standard_error": error,
        "bits_per_byte": value * bits if nats else None,
        "bits_per_byte_standard_error": error * bits if nats else None,
        "perplexity": float(np.exp(value)) if nats else None,
        "is_bound": is_bound,
        "note": note,
    }


def generative(objective: str) -> dict:
    """Real text first, a file, and samples of 8, 32 and 128 steps that get better; of AR, of no number of steps."""
    sets = [("data", None, 20.0, 4.8), ("files/judged/mine.jsonl", None, 55.0, 4.4)]
    if objective == "ar":
        sets.append(("samples", None, 35.0, 4.6))
    else:
        sets += [(f"samples, {steps} steps", steps, 30 + 800 / steps, 4.5 - 2 / steps) for steps in (128, 8, 32)]
    entries = [
        {
            "name": name,
            "steps": steps,
            "network_calls": None if name == "data" else steps or 128,
            "num": 16,
            "num_empty": 0,
            "num_truncated": 3,
            "num_tokens": 2040,
            "nats_per_token": float(np.log(perplexity)),
            "standard_error": 0.02,
            "perplexity": perplexity,
            "entropy": entropy,
            "entropy_standard_error": 0.031,
            "judge_entropy": entropy - 0.3,
            "judge_entropy_standard_error": 0.032,
            "distinct_1": 0.412,
            "distinct_2": 0.871,
            "distinct_3": 0.973,
            "repetition_4": 0.0123,
            "frequency_kl": 0.654,
            "divergence": None if name == "data" else 0.789,
        }
        for name, steps, perplexity, entropy in sets
    ]
    judge = {"path": "models/judges/judge-large", "kind": "huggingface", "precision": "fp32", "max_length": 1024}
    return {"judge": judge, "generative": entries}


def conditional() -> list[dict]:
    """Answers of 8 and of 64 steps."""
    names = ("rouge_1", "rouge_2", "rouge_l", "exact_match")
    return [
        {"steps": steps, "network_calls": 2.0 * steps, "num": 48, "bleu": bleu, "bleu_cased": bleu - 1.5}
        | {"bleu_signature": "nrefs:1|case:lc|eff:yes", "token_accuracy": 2 * bleu}
        | {name: bleu + 3 + index for index, name in enumerate(names)}
        | {f"{name}_standard_error": 0.37 for name in names}
        for steps, bleu in ((8, 17.25), (64, 25.75))
    ]


def pieces_of(text: str) -> list[str]:
    """Word pieces with their leading space, long words in two, as a byte-level BPE cuts them."""
    pieces = []
    for word in re.findall(r"\s*\S+|\s+$", text):
        cut = len(word) - 3 if len(word) > 7 else len(word)
        pieces += [part for part in (word[:cut], word[cut:]) if part]
    return ["", *pieces]  # the special token at the beginning has no text


def trajectory(num_steps: int = 64) -> dict:
    pieces = pieces_of(STORY)
    rng = np.random.default_rng(5)
    shown_at = rng.integers(1, num_steps + 1, len(pieces))
    frames, before = [], [None] * len(pieces)
    for step in range(num_steps + 1):
        now = [piece if shown_at[i] <= step else None for i, piece in enumerate(pieces)]
        frames.append(
            {
                "time": 1 - step / num_steps,
                "tokens": [8192 if piece is None else 17 + i for i, piece in enumerate(now)],
                "pieces": now,
                "changed": [i for i, (old, new) in enumerate(zip(before, now, strict=True)) if old != new],
                "latent_norm": 5.66 - 1.4 * (step / num_steps) ** 2,
            }
        )
        before = now
    return {"mask_id": 8192, "decoded_mask": "_", "frames": frames}


def schedule(objective: str = "ccdd") -> dict:
    times = np.linspace(0, 1, 101)
    late = np.clip(times, 0.01, 0.99)
    gamma = -3 + 9 * times**1.5
    series = {
        "replaid": {
            "gamma": gamma,
            "alpha": np.sqrt(1 / (1 + np.exp(gamma))),
            "sigma": np.sqrt(1 / (1 + np.exp(-gamma))),
        },
        "elf": {
            "share of clean latent": 1 - times,
            "noise": 2 * times,
            "density of training times": 12 * times**3 * (1 - times),
            "weight of the latent error": 1 / np.maximum(times, 0.05) ** 2,
        },
    }.get(
        objective,
        {
            "token survival": 1 - times,
            "latent alpha": np.sqrt(1 - times),
            "latent sigma": np.sqrt(times),
            "token loss weight": 1 / late,
            "latent loss weight": np.minimum(1 / (1 - late), 10),
        },
    )
    return {"times": times.tolist(), "series": {name: values.tolist() for name, values in series.items()}}


def write_run(folder: Path, objective: str, seed: int = 0) -> Path:
    """A whole run directory."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(resolved_config(objective), sort_keys=False))
    with (folder / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in metrics_lines(objective, np.random.default_rng(seed)))
    (folder / "evaluation.json").write_text(json.dumps(evaluation(objective)))
    (folder / "samples").mkdir()
    for step in (800, 1600):
        samples = [
            {
                "text": STORY[start:] if step == 1600 else " ".join(STORY.split()[::-1])[start:],
                "tokens": list(range(128)),
                "step": step,
                "sampler": {
                    **SAMPLER_SETTINGS.get(objective, {"steps": 64, "sampler": "ancestral"}),
                    "temperature": 0.9,
                    "top_p": 1.0,
                },
                "network_calls": 64,
                "seed": start,
                "entropy": 4.21 + 0.01 * start,
            }
            for start in (0, 4, 92, 160)
        ]
        lines = "".join(json.dumps(sample) + "\n" for sample in samples)
        (folder / "samples" / f"step-{step}.jsonl").write_text(lines)
    if objective != "ar":
        (folder / "trajectory.json").write_text(json.dumps(trajectory()))
        (folder / "schedule.json").write_text(json.dumps(schedule(objective)))
    (folder / "environment.json").write_text(
        json.dumps(
            {
                "braid": "0.1.0",
                "python": "3.12.4",
                "torch": "2.13.0+cpu",
                "cuda": None,
                "device": "AMD EPYC 9B14",
                "cores": 2,
                "threads": 1,
                "memory_gib": 15.6,
                "deterministic": True,
                "platform": "Linux 6.1 x86_64",
                "ranks": 1,
                "parameters": {"blocks": 6_291_456, "embedding": 2_097_408, "heads": 523_776, "total": 8_912_640},
            }
        )
    )
    return folder
