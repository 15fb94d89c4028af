"""The parity matrix: which systems are trained under which layouts, and how far a layout may be from one process.

A cell is five steps of a real run, `braid pretrain` on as many processes as the layout takes, beside the same run in
one process. What was drawn for every sample must be equal to the bit; losses, gradient norms and the gradient of every
parameter at the first step must agree within the limits below. The direction probe runs at the start of every run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from training_runs import Trainers, samples

from braid.pretrain.checkpoint.folder import load_checkpoint
from braid.pretrain.checkpoint.store import CheckpointStore
from braid.pretrain.telemetry.metrics_log import read_metrics

STEPS = 5
LOSS_LIMIT, NORM_LIMIT, GRADIENT_LIMIT = 1e-5, 1e-5, 1e-4

SYSTEMS = {
    "MDLM": ("tiny_mdlm", {}),
    "CCDD MDiT": ("tiny_ccdd", {}),
    "CCDD MMDiT": ("tiny_ccdd_mmdit", {"model__num_layers": 8}),
    "RePlaid": ("tiny_replaid", {}),
    "Co-LADD": ("tiny_co_ladd", {}),
    "ELF": ("tiny_elf", {}),
    "AR": ("tiny_ar", {}),
}
"""Name -> recipe and what differs from it: MMDiT's blocks come in pairs. ELF is trained with Muon."""


@dataclass(frozen=True)
class Layout:
    """Processes and the fields of the section `parallel`."""

    ranks: int
    tensor: int = 1
    sequence: bool = False
    context: int = 1
    context_by: str = "ulysses"
    pipeline: int = 1
    virtual: int = 1
    engine: str = "plain"
    zero: int = 0
    offload: str = "none"

    @property
    def fields(self) -> dict[str, object]:
        return {f"parallel__{name}": value for name, value in vars(self).items() if name != "ranks"}


LAYOUTS = {
    "DP 2": Layout(2),
    "TP 2": Layout(2, tensor=2),
    "TP 2 + SP": Layout(2, tensor=2, sequence=True),
    "PP 2": Layout(2, pipeline=2),
    "PP 4": Layout(4, pipeline=4),
    "PP 2, interleaved": Layout(2, pipeline=2, virtual=2),
    "CP 2": Layout(2, context=2),
    "TP 2 x PP 2 x DP 2 + SP": Layout(8, tensor=2, pipeline=2, sequence=True),
    "DP 2, ZeRO-1": Layout(2, engine="deepspeed", zero=1),
    "DP 2, ZeRO-2": Layout(2, engine="deepspeed", zero=2),
    "DP 2, ZeRO-3": Layout(2, engine="deepspeed", zero=3),
    "TP 2 x DP 2 + SP, ZeRO-3": Layout(4, tensor=2, sequence=True, engine="deepspeed", zero=3),
    "PP 2 x DP 2, ZeRO-1": Layout(4, pipeline=2, engine="deepspeed", zero=1),
    "TP 2 x PP 2 x DP 2, ZeRO-1": Layout(8, tensor=2, pipeline=2, engine="deepspeed", zero=1),
    "TP 2 x PP 2 x DP 2, Megatron": Layout(8, tensor=2, pipeline=2, engine="megatron"),
    "DP 2, ZeRO-2, offloaded to the CPU": Layout(2, engine="deepspeed", zero=2, offload="cpu"),
}

CONTEXT_LAYOUTS = {
    "CP 2, ZeRO-1": Layout(2, context=2, engine="deepspeed", zero=1),
    "CP 2, ZeRO-2": Layout(2, context=2, engine="deepspeed", zero=2),
    "CP 2, ZeRO-3": Layout(2, context=2, engine="deepspeed", zero=3),
    "CP 2 x DP 2, ZeRO-3": Layout(4, context=2, engine="deepspeed", zero=3),
    "TP 2 x CP 2 + SP, ZeRO-3": Layout(
        4, tensor=2, sequence=True, context=2, context_by="gather", engine="deepspeed", zero=3
    ),
    "PP 2 x CP 2, ZeRO-1": Layout(4, pipeline=2, context=2, engine="deepspeed", zero=1),
    "PP 2 x CP 2, Megatron": Layout(4, pipeline=2, context=2, engine="megatron"),
}
"""Divided sequences under the engines: those of tokens, of both strands and of embeddings show it for all systems."""

FIELDS = {
    "training__steps": STEPS,
    "training__log_every": 1,
    "training__validation_sequences": 4,
    "training__global_batch_size": 8,
    "training__micro_batch_size": 2,
    "training__sample_every": STEPS,
    "training__num_samples": 2,
    "sampling__steps": 4,
    "model__num_layers": 4,
    "checkpoint__every": 1,
    "checkpoint__keep": 0,
    "recorded": True,
}


class Difference(NamedTuple):
    """From the run of one process."""

    noise_equal: bool
    """Tokens and everything drawn for them, of every sample of every step, hashed."""
    loss: float
    """Largest relative difference over the steps, and of the validation's figures."""
    norm: float
    """Of the gradient norm, the same."""
    gradient: float
    """Of a parameter's first gradient, relative to the parameter's largest; the largest over parameters."""

    @property
    def within_limits(self) -> bool:
        return (
            self.noise_equal and self.loss <= LOSS_LIMIT and self.norm <= NORM_LIMIT and self.gradient <= GRADIENT_LIMIT
        )

    def __str__(self) -> str:
        noise = "noise equal" if self.noise_equal else "NOISE DIFFERS"
        return f"{noise}, loss {self.loss:.0e}, norm {self.norm:.0e}, gradient {self.gradient:.0e}"


def train(trainers: Trainers, system: str, run: str, layout: Layout, **fields: object) -> Path:
    """Train a system under a layout, from weights none of which is zero; the run's folder."""
    recipe, own = SYSTEMS[system]
    options = FIELDS | own | layout.fields | fields
    trainers.train(recipe, run, ranks=layout.ranks, env={"DENSE": "1"}, **options)
    return trainers.folder / run


def first_moments(run_dir: Path) -> dict:
    """Of the optimizer after the first step: a tenth of each parameter's clipped gradient."""
    optimizer = load_checkpoint(CheckpointStore(run_dir / "checkpoints").path(1), ["optimizer"]).groups["optimizer"]
    return {name: value for name, value in optimizer.items() if name.endswith("/exp_avg")}


def compare(run_dir: Path, reference: Path) -> Difference:
    """A run beside that of one process."""
    lines, others = (read_metrics(each / "metrics.jsonl") for each in (run_dir, reference))
    assert [(line["step"], line["split"]) for line in lines] == [(line["step"], line["split"]) for line in others]
    pairs = list(zip(lines, others, strict=True))
    moments, expected = first_moments(run_dir), first_moments(reference)
    assert moments.keys() == expected.keys()
    assert all(value.any() for value in expected.values()), "in all of these systems every parameter has a gradient"
    return Difference(
        noise_equal=samples(run_dir) == samples(reference),
        loss=max(relative(line["loss"], other["loss"]) for line, other in pairs),
        norm=max(relative(a["grad_norm"], b["grad_norm"]) for a, b in pairs if a["split"] == "train"),
        gradient=max(
            ((moments[name] - value).abs().max() / (value.abs().max() + 1e-9)).item()
            for name, value in expected.items()
        ),
    )


def relative(value: float, reference: float) -> float:
    return abs(value - reference) / abs(reference)
