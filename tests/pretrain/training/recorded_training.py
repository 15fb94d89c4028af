"""`python -m braid.pretrain WORDS`, keeping a record: `python recorded_training.py FILE WORDS`.

FILE-rank-R gets a line of JSON for every micro-batch of training: `step`, `rank`, its `samples` (ordinal: a hash of
the sample's tokens and of all that was drawn to corrupt it), and where it has one the `sum` and `count` of its loss.
Environment: PADDED=1 cuts every sample to a length of its own, GRADIENTS=FOLDER keeps the whole gradients of each step,
before they are clipped, as FOLDER/STEP.pt, DENSE=1 starts from weights none of which is zero (gates and heads that
start at zero would hide what lies behind them), RESAVED=FOLDER saves a checkpoint there as soon as the run has resumed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from braid.data_pipeline.loader import Batch
from braid.parallel import deepspeed_engine, engine, megatron_engine
from braid.parallel.layers import gather_whole
from braid.parallel.pipeline import counts_here
from braid.pretrain.checkpoint.layout import shards_of
from braid.pretrain.checkpoint.store import CheckpointStore
from braid.pretrain.command import run
from braid.pretrain.exits import run_and_report
from braid.pretrain.model import network
from braid.pretrain.model.initialisation import initial_values, starts_at_zero
from braid.pretrain.objectives.base import Noise
from braid.pretrain.training import loop
from braid.pretrain.training import run as run_module


class RecordedTrainer(loop.Trainer):
    """The trainer, watched where it corrupts, sums up and reduces."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.lines = []
        path = f"{RECORD}-rank-{self.world.rank}"
        self.record = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.plain_corrupt, self.objective.corrupt = self.objective.corrupt, self.corrupt
        self.plain_loss, self.objective.loss = self.objective.loss, self.loss
        self.plain_norm = engine.gradient_norm
        engine.gradient_norm = megatron_engine.gradient_norm = self.gradient_norm
        if RESAVED and self.step:
            self._save_in(CheckpointStore(RESAVED))

    def _save_in(self, store: CheckpointStore) -> None:
        own, self.saver.store = self.saver.store, store
        with store if self.world.rank == 0 else nullcontext():
            self._save(last=True)
        self.saver.store = own

    def corrupt(self, batch, noise):
        noise = RecordedNoise(**vars(noise))
        corrupted = self.plain_corrupt(batch, noise)
        drawn = [batch.tokens, batch.loss_mask, noise.index, noise.shift, *noise.drawn]
        samples = zip(batch.ordinals.tolist(), hashes(drawn), strict=True)
        self.lines.append({"step": self.step + 1, "rank": self.world.rank, "samples": dict(samples)})
        return corrupted

    def loss(self, prediction, corrupted):
        terms = self.plain_loss(prediction, corrupted)
        self.write({"sum": terms.total.item(), "count": terms.count.item()})
        return terms

    def write(self, figures):
        line = self.lines.pop(0) | figures
        os.write(self.record, b"\n" + json.dumps(line).encode())  # a line torn by a kill does not spoil the next

    def gradient_norm(self, held, tensor, *axes):
        if GRADIENTS:
            shards, whole = shards_of(self.objective), {}
            here = {name for name, p in self.objective.named_parameters() if counts_here(p, self.mesh.pipeline)}
            for name, gradient in self.engine.named([weight.grad for weight in held]):
                gradient = gather_whole(gradient, shards[name], tensor) if name in shards else gradient
                if name in here:
                    whole[name] = gradient
            if self.mesh.tensor.rank == self.mesh.reduction.rank == 0 and self.mesh.pipeline.grouped:
                stages = self.mesh.pipeline.gather_object(whole)
                whole = {name: gradient for stage in stages or [] for name, gradient in stage.items()}
            if self.world.rank == 0:
                torch.save(
                    {name: gradient.clone() for name, gradient in whole.items()}, GRADIENTS / f"{self.step + 1}.pt"
                )
        return self.plain_norm(held, tensor, *axes)

    def _optimizer_step(self, micro_batches):
        self.lines = []  # without those of evaluations
        done = super()._optimizer_step([pad(batch) for batch in micro_batches] if PADDED else micro_batches)
        while self.lines:  # of a process without the heads
            self.write({})
        return done


def pad(batch: Batch) -> Batch:
    """Samples of 1 to 16 tokens; their lengths fall within a global batch, so ranks have very different counts."""
    length = batch.tokens.shape[1]
    kept = 1 + (length - 1) * (7 - batch.ordinals % 8) // 7
    return dataclasses.replace(batch, loss_mask=torch.arange(length) < kept[:, None])


class RecordedNoise(Noise):
    """Noise that keeps what was drawn of it. What corruption makes of the draws may depend on weights (embeddings, a
    codebook), which differ between layouts in their last bits."""

    def __init__(self, **fields: object) -> None:
        super().__init__(**fields)
        object.__setattr__(self, "drawn", [])

    def _kept(self, values: torch.Tensor) -> torch.Tensor:
        self.drawn.append(values)
        return values

    def uniforms(self, *arguments, **options):
        return self._kept(super().uniforms(*arguments, **options))

    def normals(self, *arguments, **options):
        return self._kept(super().normals(*arguments, **options))

    def noised_tokens(self, *arguments, **options):
        made = super().noised_tokens(*arguments, **options)
        self._kept(made[0])
        return made

    def noised_latents(self, clean, *coefficients, purpose="latent"):
        self.normals(*clean.shape[1:], purpose=purpose)
        return super().noised_latents(clean, *coefficients, purpose=purpose)

    def coins(self, which):
        return self._kept(super().coins(which))


def hashes(drawn: list[torch.Tensor]) -> list[str]:
    """One for each sample, over tensors that all have one row for each."""
    return [
        hashlib.sha256(b"".join(tensor[i].contiguous().numpy().tobytes() for tensor in drawn)).hexdigest()[:16]
        for i in range(len(drawn[0]))
    ]


def dense_values(seed, name, shape, std=None):
    """The house's initial values, and normal ones of deviation 0.1 where it has zeros."""
    return initial_values(seed, name, shape, 0.1 if std == 0 or (std is None and starts_at_zero(name)) else std)


if __name__ == "__main__":
    RECORD, PADDED = os.path.abspath(sys.argv[1]), os.environ.get("PADDED") == "1"
    GRADIENTS = Path(os.environ["GRADIENTS"]) if "GRADIENTS" in os.environ else None
    RESAVED = Path(os.environ["RESAVED"]) if "RESAVED" in os.environ else None
    deepspeed_engine.SMALL_PARAMETER = 0  # every parameter of a tiny model is small: ZeRO 3 would keep them all whole
    if os.environ.get("DENSE") == "1":
        network.initial_values = dense_values
    run_module.Trainer = RecordedTrainer
    sys.exit(run_and_report(lambda: run(sys.argv[2:])))
