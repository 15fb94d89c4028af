"""Settings of T5's pretraining, which makes an encoder for the systems that read one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from braid.pretrain.config.check import Check

from .conditioning import check_cond_dim

if TYPE_CHECKING:
    from braid.pretrain.config.schema import Config


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """Span corruption with an encoder-decoder (T5, arXiv 1910.10683): the contextual encoder of ELF, CCDD and LADD
    where no pretrained one fits the corpus (`objective.encoder.kind=trained` with this run's directory). Encoder and
    decoder have `model.num_layers` blocks each; there is no time conditioning, so `model.cond_dim` has no part in it.
    It writes no text and is not sampled. Needs the extra `hf`.
    """

    name: str = "t5"
    """`t5`"""
    noise_density: float = 0.15
    """Share of a row's tokens that are left out and to be said; rounded to whole tokens, the same number in every
    row."""
    mean_span_length: float = 3.0
    """Mean number of consecutive tokens left out; it fixes the number of spans of a row."""


def check(check: Check, config: Config) -> None:
    """What is wrong with the objective's settings."""
    objective, model = config.objective, config.model
    check.within("objective.noise_density", objective.noise_density, "()", 0, 1)
    check.at_least("objective.mean_span_length", objective.mean_span_length, 1)
    check_cond_dim(check, config)
    if config.data.packing == "pairs":
        check.add(
            "T5's pretraining leaves out spans of running text, not of (source, target) pairs",
            found="data.packing = 'pairs'",
            change="data.packing=wrap or stream, with the sources and targets prepared as documents",
        )
    if config.training.sample_every != 0:
        found = f"training.sample_every = {config.training.sample_every}"
        check.add("objective.name = 't5' writes no text that could be sampled", found, "training.sample_every=0")
    ignored = {
        "dropout": "the library's dropout would not be repeatable",
        "rope_base": "it has relative positions",
        "activation_checkpointing": "its blocks keep theirs",
        "compile": "its blocks are not compiled",
    }
    for name, reason in ignored.items():
        value, default = getattr(model, name), getattr(type(model), name)
        if value != default:
            check.add(
                f"objective.name = 't5' does not take model.{name}: {reason}",
                found=f"model.{name} = {value}",
                change=f"model.{name}={str(default).lower()}",
            )
