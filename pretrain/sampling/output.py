"""Samples on disk: one JSON object a line, and the step-by-step trajectory of one of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from braid.data_pipeline.tokenizers import Tokenizer
from braid.pretrain.checkpoint.files import write_atomically
from braid.pretrain.config.objectives import ObjectiveConfig
from braid.pretrain.config.sampling import read_fields, sampler_name
from braid.pretrain.config.schema import SamplingConfig

from .sampler import Samples, sample_entropy


def sampler_settings(settings: SamplingConfig, objective: ObjectiveConfig, precision: str) -> dict[str, Any]:
    """What made samples: the settings that the objective's sampler read, with the sampler's name spelt out, and the
    network's precision."""
    read = {name: getattr(settings, name) for name in read_fields(objective)}
    return read | {"sampler": sampler_name(settings, objective), "precision": precision}


def write_samples(
    path: Path, samples: Samples, tokenizer: Tokenizer, settings: dict[str, Any], *, step: int, seed: int
) -> None:
    """Write `samples` as JSON lines, atomically. `settings`: what `sampler_settings` says. `entropy` is the sample's
    unigram entropy in nats."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entropies = sample_entropy(samples.tokens.cpu())
    lines = [
        json.dumps(
            {
                "text": tokenizer.decode(tokens),
                "tokens": tokens,
                "step": step,
                "sampler": settings,
                "network_calls": calls,
                "seed": seed,
                "entropy": entropy,
            },
            ensure_ascii=False,
        )
        for tokens, calls, entropy in zip(samples.tokens.tolist(), samples.network_calls, entropies, strict=True)
    ]
    write_atomically(path, "".join(line + "\n" for line in lines).encode())


def write_trajectory(path: Path, samples: Samples, tokenizer: Tokenizer) -> None:
    """The recorded frames of the first sample, for the report: text per position, null where masked."""
    frames, previous = [], None
    for frame in samples.frames:
        tokens = frame["tokens"]
        changed = [i for i, token in enumerate(tokens) if previous is None or token != previous[i]]
        frames.append(
            {
                "time": frame["time"],
                "tokens": tokens,
                "pieces": [None if token == tokenizer.mask_id else tokenizer.decode([token]) for token in tokens],
                "changed": [i for i in changed if tokens[i] != tokenizer.mask_id],
                "latent_norm": frame["latent_norm"],
            }
        )
        previous = tokens
    record = {"mask_id": tokenizer.mask_id, "decoded_mask": "_", "frames": frames}
    write_atomically(path, json.dumps(record, ensure_ascii=False).encode())
