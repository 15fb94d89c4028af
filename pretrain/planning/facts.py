"""What a configuration says a parallel plan must fit. No torch here."""

from __future__ import annotations

from braid.parallel.plan import PlanFacts
from braid.pretrain.config.schema import Config

ELF_PREFIX = 12
"""Tokens that ELF's network puts before the text (elf_network.NUM_PREFIX)."""


def plan_facts(config: Config) -> PlanFacts:
    """Of the network and batch that `config` describes. Its sizes must be valid numbers."""
    model, objective, training = config.model, config.objective, config.training
    is_elf = objective.name == "elf"
    prefix_length = ELF_PREFIX if is_elf else 0
    return PlanFacts(
        num_layers=model.num_layers,
        num_heads=model.num_heads,
        mlp_width=int(model.width * model.mlp_ratio * 2 / 3) if is_elf else round(model.width * model.mlp_ratio),
        sequence_length=config.data.sequence_length + prefix_length,
        prefix_length=prefix_length,
        global_batch_size=training.global_batch_size,
        micro_batch_size=training.micro_batch_size,
        precision=config.run.precision,
        num_slots=getattr(objective, "num_slots", 0),
        alternates=getattr(objective, "architecture", "") == "mmdit",
        causal=objective.name == "ar",
        divisible=objective.name != "t5",
    )
