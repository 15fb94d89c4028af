"""Each constraint, its arithmetic, and what the message proposes (which must itself be valid)."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from braid.kernels.errors import ConfigError
from braid.pretrain.config.load import load_config
from braid.pretrain.config.objectives.ar import ARConfig
from braid.pretrain.config.schema import Config
from braid.pretrain.config.validate import check_seed, problems, validate

RECIPE = {"objective.loss": "tiny_mdlm", "objective.schedule_eps": "tiny_mdlm", "objective.time_min": "tiny_mdlm"}


def found(*overrides, recipe="tiny_ccdd", world_size=1):
    return problems(load_config(recipe, list(overrides)), world_size=world_size)


def the_problem(*overrides, **options):
    problem, *others = found(*overrides, **options)
    assert not others, others
    return problem


@pytest.mark.parametrize(
    "override",
    [
        "run.dir=",
        "run.seed=-1",
        "run.seed=18446744073709551616",
        "run.device=gpu",
        "run.precision=fp16",
        "run.threads=-1",
        "data.path=",
        "data.sequence_length=3",
        "data.packing=pad",
        "data.window=0",
        "data.workers=-1",
        "data.damaged=ignore",
        "model.width=0",
        "model.num_layers=0",
        "model.num_heads=0",
        "model.mlp_ratio=0",
        "model.mlp_ratio=0.001",
        "model.cond_dim=0",
        "model.dropout=1",
        "model.dropout=-0.1",
        "model.rope_base=1",
        "model.activation_checkpointing=full",
        "model.z_loss=-0.1",
        "objective.loss=elb",
        "objective.schedule_eps=1",
        "objective.schedule_eps=-0.1",
        "objective.time_min=0",
        "objective.time_min=1",
        "objective.schedule=cosine",
        "objective.token_weight=dynamics",
        "objective.continuous_weight=snr2",
        "objective.continuous_scale=-1",
        "objective.full_visibility_probability=1.1",
        "objective.latent_dropout=1",
        "objective.time_eps=0",
        "objective.time_eps=0.5",
        "objective.latent_sigma=0",
        "objective.leaky_encoder=true",
        "objective.encoder.kind=hf",
        "objective.encoder.kind=huggingface",
        "objective.encoder.latent_dim=0",
        "objective.encoder.window=0",
        "objective.encoder.variance_floor=0",
        "objective.encoder.layer=3",
        "optimizer.lr=0",
        "optimizer.beta1=1",
        "optimizer.beta2=1",
        "optimizer.eps=0",
        "optimizer.weight_decay=-1",
        "optimizer.clip_norm=-1",
        "optimizer.schedule=linear",
        "optimizer.schedule=wsd",
        "optimizer.warmup_steps=-1",
        "optimizer.warmup_steps=21",
        "optimizer.decay_steps=5",
        "optimizer.min_lr_ratio=1.5",
        "optimizer.min_lr_ratio=0.5",
        "training.steps=0",
        "training.global_batch_size=0",
        "training.global_batch_size=12",
        "training.micro_batch_size=0",
        "training.micro_batch_size=32",
        "training.ema_decay=1",
        "training.log_every=0",
        "training.validate_every=-1",
        "training.validation_sequences=0",
        "training.sample_every=-1",
        "training.num_samples=0",
        "checkpoint.every=-1",
        "checkpoint.keep=-1",
        "checkpoint.resume=yes",
        "sampling.steps=0",
        "sampling.sampler=ddpmm",
        "sampling.guidance=-1",
        "sampling.temperature=0",
        "sampling.top_p=0",
        "sampling.top_p=1.1",
        "telemetry.wandb=on",
    ],
)
def test_a_value_out_of_range_is_one_problem_that_names_field_and_value(override):
    field, value = override.split("=")
    problem = the_problem(override, recipe=RECIPE.get(field, "tiny_ccdd"))
    text = " ".join((problem.what, problem.found))
    assert field in text
    assert value in text


@pytest.mark.parametrize(
    "overrides",
    [
        ("data.sequence_length=4",),
        ("data.sequence_length=2", "data.packing=stream"),
        ("run.seed=18446744073709551615",),
        ("model.dropout=0.999",),
        ("objective.full_visibility_probability=0",),
        ("objective.full_visibility_probability=1",),
        ("objective.schedule=flow_linear", "objective.continuous_weight=ddpm_x"),
        ("objective.encoder.kind=huggingface", "objective.encoder.path=x", "objective.encoder.layer=3"),
        ("objective.encoder.kind=huggingface", "objective.encoder.path=x", "objective.leaky_encoder=true"),
        ("objective.encoder.path=table.npz",),
        ("optimizer.schedule=wsd", "optimizer.decay_steps=15"),
        ("optimizer.warmup_steps=0",),
        ("optimizer.warmup_steps=20",),
        ("optimizer.clip_norm=0",),
        ("training.ema_decay=0",),
        ("checkpoint.keep=0",),
        ("sampling.guidance=0",),
        ("telemetry.wandb=offline",),
        ("objective.name=mdlm", "objective.schedule_eps=0"),
    ],
)
def test_the_edges_that_are_allowed(overrides):
    assert found(*overrides) == []


def test_not_a_number_never_passes():
    config = load_config("tiny_ccdd")
    for section in ("model", "objective", "optimizer", "training", "sampling"):
        part = getattr(config, section)
        for field in dataclasses.fields(part):
            if isinstance(getattr(part, field.name), float):
                broken = dataclasses.replace(part, **{field.name: math.nan})
                told = problems(dataclasses.replace(config, **{section: broken}))
                assert any(f"{section}.{field.name}" in problem.what for problem in told), field.name


def test_a_misspelt_choice_is_told_the_nearest():
    assert the_problem("objective.continuous_weight=minsnr").change == "did you mean min_snr?"
    assert the_problem("checkpoint.resume=atuo").change == "did you mean auto?"


def test_all_problems_come_at_once_as_one_error():
    config = load_config("tiny_mdlm", ["model.dropout=2", "optimizer.lr=-1", "training.steps=0"])
    with pytest.raises(ConfigError) as caught:
        validate(config)
    text = str(caught.value)
    assert text.startswith("the configuration has 3 problems")
    assert [name in text for name in ("model.dropout", "optimizer.lr", "training.steps")] == [True] * 3
    validate(load_config("tiny_mdlm"))


def test_an_objective_whose_name_is_not_its_class():
    (problem,) = problems(dataclasses.replace(load_config("tiny_ar"), objective=ARConfig(name="mdlm")))
    assert "ARConfig" in problem.found


def test_ignored_settings_are_problems():
    assert "ignored" in the_problem("optimizer.schedule=cosine", "optimizer.decay_steps=3").what
    assert "ignored" in the_problem("objective.encoder.kind=random", "objective.encoder.path=x").what
    assert "ignored" in the_problem("objective.encoder.kind=random", "objective.encoder.layer=0").what


def test_guidance_of_a_model_that_cannot_be_guided():
    for name in ("tiny_ar", "tiny_mdlm"):
        problem = the_problem("sampling.guidance=1.5", recipe=name)
        assert "sampling.guidance = 1.5 is ignored by objective.name" in problem.what
        assert found("sampling.guidance=1.5", problem.change, recipe=name) == []
    assert "latent_dropout = 0" in the_problem("sampling.guidance=0", "objective.latent_dropout=0").what
    assert found("objective.latent_dropout=0") == found("sampling.guidance=2.5") == []


def test_the_seed_of_a_command_is_a_key():
    for seed in (0, 2**64 - 1):
        check_seed(seed)
    for seed in (-1, 2**64):
        with pytest.raises(ConfigError, match=f"--seed must be .*\n.*{seed}\n.*from 0 to 18446744073709551615"):
            check_seed(seed)


def test_schedules_that_do_not_fit_show_the_sum():
    wsd = ("optimizer.schedule=wsd", "optimizer.decay_steps=18")
    problem = the_problem(*wsd)
    assert "5 + 18 = 23 > training.steps = 20" in problem.found
    assert problem.change == "training.steps=23, or optimizer.decay_steps=15"
    for way in problem.change.split(", or "):
        assert found(*wsd, way) == []
    problem = the_problem("training.steps=4")
    assert "optimizer.warmup_steps = 5 > training.steps = 4" in problem.found
    for way in problem.change.split(", or "):
        assert found("training.steps=4", way) == []


def test_heads_that_do_not_divide_the_width():
    problem = the_problem("model.width=100", "model.num_heads=12")
    assert "100 / 12 = 8.33333, remainder 4" in problem.found
    assert problem.change == "model.width=96 or 120, or model.num_heads=10"
    assert "whole number" in problem.what
    problem = the_problem("model.width=60", "model.num_heads=12")
    assert "even" in problem.what and "60 / 12 = 5" in problem.found
    for way in ("model.width=48", "model.width=72", "model.num_heads=10"):
        assert found("model.width=60", "model.num_heads=12", way) == []


def test_a_batch_that_does_not_divide_shows_the_arithmetic():
    problem = the_problem("training.global_batch_size=500", "training.micro_batch_size=32", world_size=8)
    assert problem.found == "500 = 1 x (32 x 8 ranks = 256) + 244"
    problem = the_problem("training.global_batch_size=16", "training.micro_batch_size=32")
    assert problem.found == "16 is less than 32 x 1 rank = 32"


@settings(max_examples=150, deadline=None, database=None)
@given(size=st.integers(1, 3000), micro=st.integers(1, 200), world_size=st.integers(1, 64))
def test_the_two_batches_proposed_fit(size, micro, world_size):
    config = load_config("tiny_mdlm", [f"training.global_batch_size={size}", f"training.micro_batch_size={micro}"])
    told = problems(config, world_size=world_size)
    assert bool(told) == (size % (micro * world_size) != 0)
    for problem in told:
        ways = problem.change.split(", or ")
        assert len(set(ways)) == 2
        for way in ways:
            numbers = {name: int(number) for name, number in re.findall(r"training\.(\w+)=(\d+)", way)}
            assert numbers
            changed = dataclasses.replace(config, training=dataclasses.replace(config.training, **numbers))
            assert problems(changed, world_size=world_size) == [], way


def test_the_defaults_of_the_schema_are_valid_for_a_run_of_ordinary_length():
    config = Config()
    assert problems(dataclasses.replace(config, training=dataclasses.replace(config.training, steps=10_000))) == []


def test_what_only_some_samplers_read():
    for recipe, words in (
        ("tiny_co_ladd", ["sampling.latent_steps=4"]),
        ("tiny_elf", ["sampling.sampler=ode", "sampling.noise_scale=0.5"]),
    ):
        assert "is ignored by the sampler" in the_problem(*words, recipe=recipe).what
    assert found("sampling.sampler=sequential", "sampling.latent_steps=4", recipe="tiny_di_ladd") == []
    assert found("sampling.noise_scale=0.5", recipe="tiny_elf") == []


@pytest.mark.parametrize("recipe, field", [("tiny_duo", "curriculum_steps"), ("tiny_di_ladd", "stage_one_steps")])
def test_a_stage_ends_before_the_run(recipe, field):
    problem = the_problem(f"objective.{field}=20", recipe=recipe)
    assert f"objective.{field} = 20 is as long as the run" in problem.what and problem.found == "training.steps = 20"
    for way in problem.change.split(", or "):
        assert found(f"objective.{field}=20", way, recipe=recipe) == []
    assert found(f"objective.{field}=19", recipe=recipe) == []


def test_latents_of_one_dimension_are_none():
    assert "latent_dim = 1" in the_problem("objective.encoder.latent_dim=1", recipe="tiny_ccdd").what


@pytest.mark.parametrize("recipe", ["tiny_duo", "tiny_gidd", "tiny_replaid"])
def test_a_z_loss_that_nothing_would_come_of(recipe):
    (problem,) = problems(load_config(recipe, ["data.path=somewhere", "model.z_loss=1e-4"]))
    assert "model.z_loss is ignored" in problem.what
