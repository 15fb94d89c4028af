"""The rows of the comparison of all systems: each is a valid run, and what is timed is the row's own model."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from braid.pretrain.config.load import load_config
from braid.pretrain.config.validate import problems

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compare_systems.py"
SPEC = importlib.util.spec_from_file_location("compare_systems", SCRIPT)
compare_systems = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(compare_systems)
ROWS = compare_systems.ROWS


@pytest.mark.parametrize("name", ROWS)
def test_what_is_timed_is_the_model_of_the_row(name):
    settings = ["model.width=64", "data.sequence_length=64", "training.steps=400", "optimizer.decay_steps=150"]
    overrides = [override.format(MDLM="runs/mdlm") for override in ROWS[name]]
    row = load_config("compare_base", overrides + settings)
    timed = load_config("compare_base", compare_systems.timed_settings(overrides, settings))
    assert problems(row) == problems(timed) == []
    assert (timed.model, timed.data, timed.objective) == (row.model, row.data, row.objective)
    assert timed.training == replace(row.training, steps=16, log_every=1, validate_every=0)


def test_elf_is_trained_and_sampled_as_it_can_be():
    """Muon as published, and an SDE that keeps the marginals: the released one does not at few steps."""
    elf = load_config("compare_base", ROWS["ELF"])
    assert (elf.optimizer.name, elf.sampling.sampler) == ("muon", "sde_marginal")
