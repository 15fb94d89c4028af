"""Recipes and overrides become a configuration, or one message that names everything that is wrong."""

from __future__ import annotations

import dataclasses
import typing

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from braid.kernels.errors import ConfigError
from braid.pretrain.config.load import dump_config, load_config, recipes
from braid.pretrain.config.objectives import OBJECTIVES
from braid.pretrain.config.objectives.ar import ARConfig
from braid.pretrain.config.objectives.ccdd import CCDDConfig
from braid.pretrain.config.objectives.mdlm import MDLMConfig
from braid.pretrain.config.schema import Config


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe; return its path."""

    def write(text, name="recipe.yaml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def message(*arguments) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(*arguments)
    return str(caught.value)


SIMPLE = "training:\n  steps: 7\n"


# Values


def test_defaults_recipe_and_overrides_in_that_order(recipe):
    path = recipe("training:\n  steps: 7\n  global_batch_size: 8\n")
    config = load_config(path, ["training.steps=9", "training.log_every=3", "training.log_every=4"])
    assert config.training.steps == 9
    assert config.training.global_batch_size == 8
    assert config.training.log_every == 4, "the last override of a key wins"
    assert config.training.ema_decay == Config().training.ema_decay
    assert config.model == Config().model


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("optimizer: {lr: 1e-3}", "optimizer.lr", 1e-3),
        ("optimizer: {lr: 3E-4}", "optimizer.lr", 3e-4),
        ("optimizer: {lr: 1}", "optimizer.lr", 1.0),
        ("optimizer: {lr: .5}", "optimizer.lr", 0.5),
        ("training: {steps: 1_000_000}", "training.steps", 1_000_000),
        ("training: {steps: 010}", "training.steps", 10),
        ("model: {compile: true}", "model.compile", True),
        ("model: {compile: no}", "model.compile", False),
        ("telemetry: {wandb: off}", "telemetry.wandb", "off"),
        ("telemetry: {wandb_name: 007}", "telemetry.wandb_name", "007"),
        ("telemetry: {wandb_name: 2024-01-01}", "telemetry.wandb_name", "2024-01-01"),
        ("telemetry: {wandb_name: '1e3'}", "telemetry.wandb_name", "1e3"),
        ("telemetry: {wandb_name: ''}", "telemetry.wandb_name", ""),
        ("telemetry: {wandb_name: 'null'}", "telemetry.wandb_name", "null"),
    ],
)
def test_the_type_of_the_field_reads_the_text(recipe, text, field, value):
    section, name = field.split(".")
    found = getattr(getattr(load_config(recipe(text)), section), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.path=a=b", "a=b"),
        ("data.path=a: b # c", "a: b # c"),
        ("data.path=@scratch/*", "@scratch/*"),
        ("data.path='quoted: #text'", "quoted: #text"),
        ("data.path=", ""),
    ],
)
def test_a_text_override_is_taken_as_the_shell_gives_it(override, value):
    assert load_config("tiny_ar", [override]).data.path == value


@pytest.mark.parametrize(
    ("override", "expected", "advice"),
    [
        ("training.steps=1.5", "whole number (int)", "digits only"),
        ("training.steps=1e3", "whole number (int)", "write 1000"),
        ("training.steps=true", "whole number (int)", "digits only"),
        ("training.steps='7'", "whole number (int)", "remove the quotes"),
        ("training.steps=", "whole number (int)", "digits only"),
        ("training.steps=[1, 2]", "whole number (int)", "single value"),
        ("training.steps={a: 1}", "whole number (int)", "single value"),
        ("optimizer.lr=fast", "number (float)", "finite number"),
        ("optimizer.lr=nan", "number (float)", "finite number"),
        ("optimizer.lr=.inf", "number (float)", "finite number"),
        ("optimizer.lr=1e999", "number (float)", "finite number"),
        ("optimizer.lr=true", "number (float)", "finite number"),
        ("model.compile=1", "true or false (bool)", "true or false"),
        ("data.path=null", "text (str)", '""'),
        ("data.path=[a, b]", "text (str)", "single value"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_its_type(override, expected, advice):
    text = message("tiny_ar", [override])
    assert text.startswith(f"{override.split('=')[0]} takes")
    assert expected in text.splitlines()[0] and advice in text
    assert repr(override) in text


def test_a_wrong_value_in_a_file_is_named_with_its_line(recipe):
    path = recipe("run:\n  seed: 1\n\ntraining:\n  steps: soon\n")
    text = message(path)
    assert "training.steps takes a whole number (int)" in text
    assert f"'soon' ({path}, line 5)" in text


def test_unsafe_yaml_tags_are_refused(recipe):
    assert "python/object" in message(recipe("run:\n  dir: !!python/object/apply:os.getcwd []\n"))


# Keys


def test_an_unknown_key_of_a_file_is_named_with_line_and_neighbour(recipe):
    path = recipe("training:\n  steps: 7\n  globel_batch_size: 8\n")
    text = message(path)
    assert "unknown key training.globel_batch_size" in text
    assert f"{path}, line 3" in text
    assert "did you mean training.global_batch_size" in text


@pytest.mark.parametrize(
    ("override", "neighbour"),
    [
        ("training.stepz=1", "training.steps"),
        ("lr=1", "optimizer.lr"),
        ("steps=1", "training.steps"),
        ("training.lr=1", "optimizer.lr"),
        ("trainin.steps=1", "training.steps"),
        ("trainin={}", "training"),
        ("objective.encoder.latent_dims=1", "objective.encoder.latent_dim"),
    ],
)
def test_an_unknown_override_is_named_with_its_neighbour(override, neighbour):
    text = message("tiny_ccdd", [override])
    assert f"unknown key {override.split('=')[0]}\n" in text
    assert repr(override) in text
    assert "did you mean" in text and neighbour in text.split("did you mean")[1]


def test_a_key_set_twice_in_a_file_is_refused(recipe):
    assert "training.steps is set twice" in message(recipe("training:\n  steps: 1\n  steps: 2\n"))


def test_a_section_is_not_a_value(recipe):
    assert "training is a section" in message(recipe("training: 5\n"))
    assert "objective.name=ccdd" in message("tiny_ar", ["objective=ccdd"])
    assert load_config(recipe("training:\n  # steps: 7\n")) == Config(), "a section may be empty"


@pytest.mark.parametrize("override", ["training.steps", "training.steps 5", "=5", "training..steps=5", "--steps"])
def test_an_override_has_a_key_and_a_value(override):
    text = message("tiny_ar", [override])
    assert repr(override) in text and "section.field=value" in text


def test_everything_wrong_is_reported_at_once(recipe):
    path = recipe("inherit: tiny_ccdd\nmodle:\n  width: 3\ntraining:\n  steps: x\n")
    text = message(path, ["a.b=1", "optimizer.lr=fast", "nonsense", "data.path=[", "objective.loss=elbo"])
    assert text.startswith("the configuration has 7 problems")
    named = ("modle.width", "training.steps", "a.b", "optimizer.lr", "'nonsense'", "'data.path=['", "objective.loss")
    assert [name for name in named if name not in text] == []


# Files


def test_malformed_yaml_names_file_and_line(recipe):
    path = recipe("training:\n  steps: 7\n  log_every: [1, 2\n")
    text = message(path)
    assert f"{path}, line" in text and "malformed YAML" in text
    path = recipe("training:\n\tsteps: 7\n")
    assert f"{path}, line 2: malformed YAML" in message(path)


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"- a\n- b\n", b"just text\n"])
def test_a_file_without_settings_is_refused(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    assert "holds no settings" in message(path)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"run:\n  dir: \x07\n"])
def test_a_file_that_is_no_text_is_refused(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    assert str(path) in message(path)


def test_a_recipe_that_does_not_exist_lists_the_names():
    text = message("tiny_cdd")
    assert "did you mean tiny_ccdd" in text
    assert all(name in text for name in recipes())


def test_a_run_folder_points_to_its_configuration(tmp_path):
    (tmp_path / "config.yaml").write_text(SIMPLE)
    assert f"did you mean {tmp_path / 'config.yaml'}?" in message(tmp_path)
    assert load_config(tmp_path / "config.yaml").training.steps == 7


def test_a_recipe_inherits_from_a_name_or_a_file_beside_it(recipe):
    recipe("inherit: tiny_mdlm\ntraining:\n  steps: 7\n", "base.yaml")
    config = load_config(recipe("inherit: base.yaml\ntraining:\n  log_every: 3\n"))
    tiny = load_config("tiny_mdlm")
    assert config == dataclasses.replace(tiny, training=dataclasses.replace(tiny.training, steps=7, log_every=3))


def test_a_circle_of_recipes_is_refused(recipe):
    recipe("inherit: recipe.yaml\n", "other.yaml")
    assert "circle" in message(recipe("inherit: other.yaml\n"))
    assert "inherit" in message(recipe("inherit: [tiny_ar, tiny_mdlm]\n"))


def test_a_recursive_alias_ends(recipe):
    assert "unknown key a" in message(recipe("a: &a\n  b: *a\n"))


# The objective


def test_the_name_chooses_the_class():
    assert type(load_config("tiny_ar").objective) is ARConfig
    assert type(load_config("tiny_mdlm").objective) is MDLMConfig
    assert type(load_config("tiny_ccdd").objective) is CCDDConfig


def test_a_new_name_over_a_recipe_drops_the_old_objective_only():
    ccdd = load_config("tiny_ccdd")
    assert ccdd.objective.encoder.latent_dim == 8
    switched = load_config("tiny_ccdd", ["objective.name=mdlm"])
    assert switched == dataclasses.replace(ccdd, objective=MDLMConfig())


def test_a_new_name_may_come_with_fields_of_the_new_objective_in_any_order():
    wanted = MDLMConfig(loss="low_variance")
    assert load_config("tiny_ccdd", ["objective.loss=low_variance", "objective.name=mdlm"]).objective == wanted
    assert load_config("tiny_ccdd", ["objective={name: mdlm, loss: low_variance}"]).objective == wanted


def test_the_same_name_keeps_what_the_recipe_says():
    assert load_config("tiny_ccdd", ["objective.name=ccdd"]) == load_config("tiny_ccdd")


def test_fields_that_both_objectives_have_survive_a_switch(monkeypatch, recipe):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Other:
        name: str = "other"
        schedule: str = "none"
        time_eps: str = "another type"

    monkeypatch.setitem(OBJECTIVES, "other", Other)
    switched = load_config("tiny_ccdd", ["objective.name=other"]).objective
    assert switched == Other()
    overrides = ["objective.schedule=flow_linear", "objective.time_eps=0.01"]
    path = recipe(dump_config(load_config("tiny_ccdd", overrides)))
    assert load_config(path, ["objective.name=other"]).objective == Other(schedule="flow_linear")


def test_fields_of_another_objective_are_refused_and_say_whose_they_are(recipe):
    text = message("tiny_ccdd", ["objective.loss=elbo"])
    assert "unknown key objective.loss" in text and "objective.name=mdlm" in text and "ccdd" in text
    assert "unknown key objective.encoder" in message(recipe("objective:\n  name: ar\n  encoder:\n    kind: table\n"))


def test_a_file_is_checked_against_its_own_objective_even_when_that_is_replaced(recipe):
    path = recipe("objective:\n  name: ccdd\n  loss: elbo\n")
    assert "unknown key objective.loss" in message(path, ["objective.name=mdlm"])


def test_an_unknown_objective_is_named_once_with_the_nearest():
    text = message("tiny_ccdd", ["objective.name=mldm", "objective.loss=elbo"])
    assert text.startswith("there is no objective 'mldm'")
    assert "did you mean mdlm?" in text and "di_ladd, elf and t5" in text


# Round trip


AWKWARD = ["off", "null", "~", "1e-3", "true", "1", " a", "a: b", "# x", "x\n", "[", "\t"]


def values(kind: type) -> st.SearchStrategy:
    if typing.get_origin(kind) is dict:
        return st.dictionaries(st.text() | st.sampled_from(AWKWARD), values(typing.get_args(kind)[1]), max_size=3)
    if typing.get_origin(kind) is tuple:
        return st.lists(values(typing.get_args(kind)[0]), max_size=2).map(tuple)
    if typing.get_args(kind):
        return st.one_of([values(objective) for objective in OBJECTIVES.values()])
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        own = {name: values(hint) for name, hint in hints.items() if not (name == "name" and hint is str)}
        return st.builds(kind, **own)
    return {
        str: st.text() | st.sampled_from(AWKWARD),
        int: st.integers(),
        float: st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
    }[kind]


@settings(max_examples=150, deadline=None, database=None)
@given(config=values(Config))
def test_a_dumped_configuration_loads_back_equal(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    again = load_config(path)
    assert again == config
    assert dump_config(again) == dump_config(config)


def test_a_dump_has_every_field_in_the_order_of_the_schema():
    config = load_config("tiny_ccdd")
    plain = yaml.safe_load(dump_config(config).replace("1.0e-", "1.0e-0"))
    assert list(plain) == [field.name for field in dataclasses.fields(Config)]
    for section in plain:
        names = [field.name for field in dataclasses.fields(getattr(config, section))]
        assert list(plain[section]) == names
    assert list(plain["objective"]["encoder"]) == [f.name for f in dataclasses.fields(config.objective.encoder)]
