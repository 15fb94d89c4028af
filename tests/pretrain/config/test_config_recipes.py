"""The recipes that come with Braid are right as they are, and say what the papers say."""

from __future__ import annotations

import pytest

from braid.pretrain.config.load import dump_config, load_config, recipes
from braid.pretrain.config.validate import problems


def test_the_recipes_are_there():
    assert {"tiny_ar", "tiny_mdlm", "tiny_ccdd", "demo_ar", "demo_mdlm", "demo_ccdd", "own_text"} <= set(recipes())
    assert {"mdlm_small", "ar_small", "ccdd_mdit_lm1b", "ccdd_mdit_owt"} <= set(recipes())


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_loads_and_validates_and_survives_a_round_trip(name, tmp_path):
    config = load_config(name)
    assert problems(config) == []
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("name", ["mdlm_small", "ar_small", "ccdd_mdit_lm1b", "ccdd_mdit_owt"])
def test_a_published_recipe_runs_on_1_8_and_16_ranks(name):
    for world_size in (1, 8, 16):
        assert problems(load_config(name), world_size=world_size) == []


@pytest.mark.parametrize("name", recipes())
@pytest.mark.parametrize("objective", ["ar", "mdlm", "ccdd"])
def test_every_recipe_takes_every_objective(name, objective):
    overrides = [f"objective.name={objective}"]
    encoder = getattr(load_config(name).objective, "encoder", None)
    if objective == "ccdd" and encoder and encoder.kind == "learned":  # only LADD learns its encoder
        overrides.append("objective.encoder.kind=table")
    config = load_config(name, overrides)
    assert config.objective.name == objective
    assert [problem for problem in problems(config) if "is ignored by objective.name" not in problem.what] == []


def test_the_three_demo_recipes_differ_in_objective_and_folder_only():
    demos = [load_config(f"demo_{name}", ["run.dir=runs/x", "objective.name=mdlm"]) for name in ("ar", "mdlm", "ccdd")]
    assert demos[0] == demos[1] == demos[2]


def test_the_published_sizes():
    """arXiv 2406.07524 (MDLM on OpenWebText) and arXiv 2510.03206 (CCDD: 33B and 131B tokens)."""
    mdlm = load_config("mdlm_small")
    assert (mdlm.model.num_layers, mdlm.model.width, mdlm.model.num_heads) == (12, 768, 12)
    assert mdlm.training.steps * mdlm.training.global_batch_size * mdlm.data.sequence_length == 524_288_000_000
    lm1b, owt = load_config("ccdd_mdit_lm1b"), load_config("ccdd_mdit_owt")
    tokens = [c.training.steps * c.training.global_batch_size * c.data.sequence_length for c in (lm1b, owt)]
    assert [round(count / 1e9) for count in tokens] == [33, 131]
    assert lm1b.objective == owt.objective and lm1b.objective.encoder.latent_dim == 32
