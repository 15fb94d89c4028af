"""ELF's settings: what is refused and why, and recipes that say what the paper says."""

from __future__ import annotations

import pytest

from braid.kernels.errors import ConfigError
from braid.pretrain.config.load import load_config
from braid.pretrain.config.validate import problems

PAPER = {
    "elf_b_owt": (12, 768, 12, 95_085, 1024),
    "elf_m_owt": (24, 1056, 16, 76_068, 1024),
    "elf_l_owt": (32, 1280, 16, 57_051, 1024),
    "elf_b_wmt14": (12, 768, 12, 880_600, 128),
    "elf_b_xsum": (12, 768, 12, 40_000, 1088),
}


def found(*overrides: str, recipe: str = "tiny_elf") -> list[str]:
    return [f"{problem.what} {problem.found}" for problem in problems(load_config(recipe, list(overrides)))]


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("objective.latent_std=0.3", "latent_std is ignored: a table"),
        ("objective.bottleneck=0", "objective.bottleneck"),
        ("objective.noise_scale=0", "objective.noise_scale"),
        ("objective.time_std=0", "objective.time_std"),
        ("objective.velocity_floor=0", "objective.velocity_floor"),
        ("objective.velocity_floor=1", "objective.velocity_floor"),
        ("objective.decode_probability=0", "objective.decode_probability"),
        ("objective.decode_probability=1", "objective.decode_probability"),
        ("objective.decode_time_std=-1", "objective.decode_time_std"),
        ("objective.decode_noise_scale=0", "objective.decode_noise_scale"),
        ("objective.self_condition_probability=1.1", "objective.self_condition_probability"),
        ("objective.guidance_min=1.5", "objective.guidance_min"),
        ("objective.guidance_min=0", "objective.guidance_min"),
        ("objective.guidance_max=0.9", "objective.guidance_max"),
        ("data.packing=pairs objective.condition_dropout=1", "objective.condition_dropout"),
        ("objective.condition_dropout=0.3", "objective.condition_dropout = 0.3 is ignored"),
        ("sampling.grid=gauss", "sampling.grid"),
        ("objective.encoder.variance_floor=1e-3", "variance_floor is ignored"),
        ("sampling.guidance=0.4", "sampling.guidance"),
        ("sampling.guidance=5.5", "sampling.guidance"),
        ("sampling.input_guidance=2", "nothing to guide"),
        ("model.dropout=0.1", "model.dropout is ignored"),
        ("model.cond_dim=64", "model.cond_dim = 64 is ignored by objective.name = 'elf'"),
        ("objective.encoder.window=5 objective.encoder.kind=random", "objective.encoder.window is ignored"),
    ],
)
def test_one_wrong_setting_is_one_problem(override, what):
    (text,) = found(*override.split())
    assert what in text


def test_the_grid_was_a_field_of_the_objective(tmp_path):
    config = load_config("tiny_elf", ["sampling.grid=uniform"])
    assert config.sampling.grid == "uniform"
    assert load_config("tiny_elf", ["objective.grid=uniform"]) == config
    old = tmp_path / "config.yaml"
    old.write_text("inherit: tiny_elf\nobjective:\n  grid: uniform\nsampling:\n")
    assert load_config(old) == config
    old.write_text("inherit: tiny_elf\nobjective:\n  grid: uniform\nsampling:\n  sampler: ode\n  grid: random\n")
    with pytest.raises(ConfigError, match="sampling.grid is set twice"):
        load_config(old)
    (text,) = found("sampling.grid=uniform", recipe="tiny_mdlm")
    assert "sampling.grid = uniform is ignored by objective.name = 'mdlm'" in text


def test_t5_has_no_use_for_cond_dim_either():
    (text,) = found("model.cond_dim=64", recipe="tiny_t5")
    assert "model.cond_dim = 64 is ignored by objective.name = 't5'" in text
    assert found(recipe="tiny_t5") == []


def test_settings_that_go_together():
    assert found("objective.guidance_max=8", "sampling.guidance=6.5") == []
    pairs = ["data.packing=pairs", "sampling.input_guidance=2"]
    assert found(*pairs) == []
    (text,) = found(*pairs, "objective.condition_dropout=0")
    assert "nothing to guide" in text
    t5 = ["objective.encoder.kind=huggingface", "objective.encoder.path=google-t5/t5-small"]
    assert found(*t5, "objective.latent_std=0.3") == []
    (text,) = found(*t5, "objective.latent_std=0")
    assert "objective.latent_std = 0" in text
    (text,) = found(*t5, "objective.encoder.layer=2")
    assert "last layer" in text


@pytest.mark.parametrize("name", PAPER)
def test_recipes_say_what_the_paper_says(name):
    """arXiv 2605.10938, table 4 and section 5; how they train: test_published_training.py; parameters:
    test_elf_network.py."""
    config = load_config(name)
    model, elf = config.model, config.objective
    sizes = (model.num_layers, model.width, model.num_heads, config.training.steps, config.data.sequence_length)
    assert sizes == PAPER[name]
    for world_size in (1, 8, 16):
        assert problems(config, world_size=world_size) == []
    assert (elf.encoder.kind, elf.encoder.latent_dim, elf.bottleneck, elf.latent_std) == ("huggingface", 512, 128, 0.2)
    assert (elf.noise_scale, elf.time_mean, elf.time_std, elf.velocity_floor) == (2, -1.5, 0.8, 0.05)
    assert (elf.decode_probability, elf.decode_time_mean, elf.decode_time_std) == (0.2, 0.8, 0.8)
    assert (elf.guidance_min, elf.guidance_max, elf.self_condition_probability) == (0.5, 5, 0.5)
    paired = name in ("elf_b_wmt14", "elf_b_xsum")
    assert elf.decode_noise_scale == (1 if paired else 5)
    sampling = config.sampling
    # 64 steps of the ODE are 64 of the SDE that puts nothing back
    published = {"elf_b_owt": (32, 3, 1.5, 1), "elf_b_wmt14": (64, 1, 0, 2), "elf_b_xsum": (64, 1, 0, 2)}
    expected = published.get(name, (64, 3, 1, 1))
    assert (sampling.steps, sampling.guidance, sampling.noise_scale, sampling.input_guidance) == expected
