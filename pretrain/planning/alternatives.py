"""What to change in a plan that does not fit into the GPU's memory: the plans nearest to it that do."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

from braid.pretrain.config.schema import Config
from braid.pretrain.config.validate import problems

from .estimate import Machine, estimate
from .vocabulary import VocabularySize

NUM_PLANS = 2
Change = dict[str, int | str | bool]


def fitting_plans(config: Config, machine: Machine, vocabulary: VocabularySize) -> list[str]:
    """At most two plans that fit, as overrides: of those with the fewest changes the fastest first, then that
    with the larger micro-batches."""
    found: list[tuple[int, float, int, str]] = []
    for change in sorted(_changes(config, machine), key=len):
        if len(found) >= NUM_PLANS and len(change) > found[-1][0]:
            break
        changed = _apply(config, change)
        if problems(changed, world_size=machine.num_gpus):
            continue
        figures = estimate(changed, machine, vocabulary)
        if figures.fits:
            words = " ".join(f"{field}={str(value).lower()}" for field, value in change.items())
            found.append((len(change), figures.timing.step or 0.0, -changed.training.micro_batch_size, words))
    return [words for *_, words in sorted(found)[:NUM_PLANS]]


def _changes(config: Config, machine: Machine) -> Iterator[Change]:
    """Recomputation, smaller micro-batches, layers divided within a node, and divided optimizer state, in any mixture;
    what stays as it is, is left out."""
    plan, micro = config.parallel, config.training.micro_batch_size
    sizes = [plan.tensor * factor for factor in (1, 2, 4, 8) if plan.tensor * factor <= machine.gpus_per_node]
    for recompute, rows, tensor, engine in itertools.product(
        dict.fromkeys((config.model.activation_checkpointing, "block")),
        dict.fromkeys((micro, max(1, micro // 2), max(1, micro // 4), 1)),
        sizes or [plan.tensor],
        dict.fromkeys((plan.engine, "megatron")),
    ):
        change: Change = {}
        if recompute != config.model.activation_checkpointing:
            change["model.activation_checkpointing"] = recompute
        if rows != micro:
            change["training.micro_batch_size"] = rows
        if tensor != plan.tensor:
            change |= {"parallel.tensor": tensor} | ({} if plan.sequence else {"parallel.sequence": True})
        if engine != plan.engine:
            change |= {"parallel.engine": engine} | ({"parallel.zero": 0} if plan.zero else {})
        if change:
            yield change


def _apply(config: Config, change: Change) -> Config:
    for path, value in change.items():
        section, _, field = path.partition(".")
        config = replace(config, **{section: replace(getattr(config, section), **{field: value})})
    return config
