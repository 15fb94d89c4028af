"""Sources, weights and stages, from recipes and the command line; every careless use is a message."""

from __future__ import annotations

import pytest
import yaml

from braid.kernels.errors import ConfigError
from braid.pretrain.config.help import help_text
from braid.pretrain.config.load import dump_config, load_config
from braid.pretrain.config.schema import StageConfig
from braid.pretrain.config.validate import problems

RECIPE = """
inherit: tiny_mdlm
data:
  sources: {web: data/web, code: data/code}
  weights:
    web: 0.7
    code: 3e-1
  stages:
    - {from_sample: 100, weights: {web: 1, code: 0}}
    - from_sample: 200
      weights: {web: 1, code: 1}
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mixture.yaml"
    path.write_text(RECIPE)
    return path


def test_a_recipe_and_overrides_name_by_name(recipe):
    data = load_config(recipe).data
    assert data.sources == {"web": "data/web", "code": "data/code"} and data.folders == ["data/web", "data/code"]
    assert data.weights == {"web": 0.7, "code": 0.3} and data.temperature == 1
    assert data.stages == (StageConfig(from_sample=100, weights={"web": 1, "code": 0}),
                           StageConfig(from_sample=200, weights={"web": 1, "code": 1}))  # fmt: skip
    assert not problems(load_config(recipe, ["training.steps=100"]))
    words = ["data.sources.math=data/math", "data.weights={math: 2, web: 1}", "data.weights.web=4", "data.stages=[]"]
    data = load_config(recipe, [*words, "data.temperature=2"]).data
    assert data.folders == ["data/web", "data/code", "data/math"] and data.temperature == 2
    assert data.weights == {"web": 4.0, "code": 0.3, "math": 2.0} and data.stages == ()
    data = load_config(recipe, ["data.stages=[{from_sample: 7, weights: {web: 1, code: 2}}]"]).data
    assert data.stages == (StageConfig(from_sample=7, weights={"web": 1.0, "code": 2.0}),)


def test_what_is_saved_is_a_recipe(recipe, tmp_path):
    config = load_config(recipe)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config
    single = load_config("tiny_mdlm")
    of_old = yaml.safe_load(dump_config(single))
    for name in ("sources", "weights", "temperature", "stages"):
        del of_old["data"][name]
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(of_old))
    assert load_config(tmp_path / "old.yaml") == single and single.data.folders == [single.data.path]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.sources=data/web", "data.sources maps names to values"),
        ("data.sources=[data/web]", "data.sources maps names to values"),
        ("data.sources.web=[a]", "data.sources.web takes text"),
        ("data.weights.web=much", "data.weights.web takes a number"),
        ("data.weights={web: 1, web: 2}", "data.weights.web is set twice"),
        ("data.stages=7", "data.stages takes a list"),
        ("data.stages=[7]", "data.stages[0] is a section, not a value"),
        ("data.stages=[{from_sample: 7}]", "data.stages[0] lacks weights"),
        ("data.stages=[{from_sample: a, weights: {web: 1}}]", "data.stages[0].from_sample takes a whole number"),
        ("data.stages=[{from_step: 7, weights: {web: 1}}]", "unknown key data.stages[0].from_step"),
    ],
)
def test_what_cannot_be_read_is_named(recipe, override, says):
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, [override])
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data.weights.math=1"], "data.weights.math is the weight of no source"),
        (["data.weights.cod=1"], "did you mean code?"),
        (["data.sources.math=data/math"], "data.weights has no weight for source math"),
        (["data.weights.web=-1"], "data.weights.web = -1.0 must be at least 0"),
        (["data.weights={web: 0, code: 0}"], "data.weights adds up to nothing"),
        (["data.temperature=0"], "data.temperature = 0.0 must be above 0"),
        (["data.sources.web="], "data.sources.web must not be empty"),
        (["data.sources.code=data/web"], "the sources web and code are one folder"),
        (["data.sources={a/b: x}", "data.weights={a/b: 1}"], "'a/b' is no name"),
        (["data.stages=[{from_sample: 0, weights: {web: 1, code: 1}}]"], "data.stages[0] is out of order"),
        (["data.stages=[{from_sample: 9, weights: {web: 1, code: 1}}, {from_sample: 9, weights: {web: 1, code: 2}}]"],
         "data.stages[1] is out of order"),
        (["data.stages=[{from_sample: 9, weights: {web: 1}}]"], "data.stages[0].weights has no weight for source code"),
        (["data.stages=[{from_sample: 9, weights: {web: 1, code: -2}}]"], "data.stages[0].weights.code = -2.0"),
        (["data.stages=[{from_sample: 1600, weights: {web: 1, code: 2}}]"], "would never begin"),
    ],
)  # fmt: skip
def test_careless_mixtures_are_problems(recipe, overrides, says):
    sizes = ["training.steps=100", "training.global_batch_size=16", "training.micro_batch_size=8"]
    found = problems(load_config(recipe, [*sizes, *overrides]))
    assert any(says in " ".join(map(str, (p.what, p.found, p.change))) for p in found), found
    assert not problems(load_config(recipe, sizes))


@pytest.mark.parametrize("override", ["data.weights={web: 1}", "data.temperature=2",
                                      "data.stages=[{from_sample: 3, weights: {web: 1}}]"])  # fmt: skip
def test_without_sources_they_are_ignored_and_that_is_said(override):
    (problem,) = problems(load_config("tiny_mdlm", [override]))
    assert "is ignored: the run has one corpus" in problem.what


def test_the_help_shows_how_they_are_written():
    text = help_text()
    assert "  data.weights: {name: float, ...} = {}\n" in text
    assert "  data.stages: [{from_sample: ..., weights: ...}, ...] = []\n" in text
