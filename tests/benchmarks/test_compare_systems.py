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


def test_the_table_says_what_there_is_and_what_there_is_not():
    def judged(steps, perplexity):
        return {
            "name": "samples",
            "steps": steps,
            "perplexity": perplexity,
            "standard_error": 0.1,
            "judge_entropy": 4.5,
        }

    bound = {"bound": 6.5, "standard_error": 0.1, "bits_per_byte": 2.5, "joint_nelbo": None}
    speed = {"tokens_per_second": 2500.4, "parameters": 13_000_000, "frozen_parameters": 0}
    none = {"bound": None, "standard_error": None, "bits_per_byte": None, "joint_nelbo": None}
    real = judged(None, 250) | {"name": "data"}
    evaluation = {"generative": [real, judged(4, 800) | {"network_calls": 7.4}]}
    lines = compare_systems.table(
        [
            {"name": "MDLM", "generative": [judged(8, 1000), judged(32, 500)], **bound, **speed},
            {"name": "ELF", "generative": [judged(8, None)], **none, **speed},
            compare_systems.sampler_row("MDLM, otherwise", evaluation, ["8"]),
        ]
    ).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert rows[0] == [
        "MDLM",
        "6.500 ± 0.100",
        "2.500",
        "-",
        "1000 ± 100 (4.50)",
        "500 ± 50 (4.50)",
        "2500",
        "13,000,000",
        "0",
    ]
    assert rows[1][:6] == ["ELF", "n/a", "n/a", "-", "n/a", "n/a"]
    assert rows[2] == ["MDLM, otherwise", "-", "-", "-", "800 ± 80 (4.50)", "n/a", "-", "-", "-"]
