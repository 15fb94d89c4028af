"""What is refused of CCDD's settings, and that the published sizes are what the recipes build."""

from __future__ import annotations

import pytest
import torch

from braid.pretrain.config.load import load_config
from braid.pretrain.config.validate import problems
from braid.pretrain.model.network import parameter_counts
from braid.pretrain.objectives.ccdd import build_network

BLOCKS = {
    "ccdd_mdit_lm1b": 92_132_352,
    "ccdd_mdit_owt": 92_132_352,
    "ccdd_mmdit_lm1b": 216_152_064,
    "ccdd_mmdit_owt": 216_152_064,
    "ccdd_moedit_lm1b": 103_968_768,
    "ccdd_moedit_owt": 103_968_768,
    "ccdd_moedit_owt_roberta": 103_968_768,
}


def found(*overrides, recipe="tiny_ccdd"):
    return problems(load_config(recipe, list(overrides)))


@pytest.mark.parametrize("recipe", BLOCKS)
def test_recipes_are_valid_and_build_the_published_sizes(recipe):
    config = load_config(recipe, [])
    assert problems(config) == []
    with torch.device("meta"):
        network = build_network(config.objective, config.model, vocab_size=100, latent_dim=32, seed=0)
    assert parameter_counts(network)["blocks"] == BLOCKS[recipe]
    assert (config.training.steps, config.training.global_batch_size) == (500_000, 512)
    assert config.data.sequence_length == (128 if "lm1b" in recipe else 512)


@pytest.mark.parametrize("recipe", ["tiny_ccdd", "tiny_ccdd_mmdit", "tiny_ccdd_moedit"])
def test_tiny_recipes_are_valid(recipe):
    assert found(recipe=recipe) == []


MOE = "objective.architecture=moedit"


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective.architecture=dit"],
        ["objective.architecture=mmdit", "model.num_layers=3"],
        ["objective.experts.num=4"],
        ["objective.experts.balance=0.01"],
        ["objective.experts.shared_adaln=true", "objective.architecture=mmdit"],
        [MOE, "objective.experts.num=1"],
        [MOE, "objective.experts.per_token=3"],
        [MOE, "objective.experts.per_token=0"],
        [MOE, "objective.experts.gate=sigmoid"],
        [MOE, "objective.experts.per_token=1", "objective.experts.balance=-1"],
        [MOE, "objective.experts.balance=0.01"],
        ["objective.latent_mode=none"],
        ["objective.latent_times=both"],
        ["objective.token_dropout=1"],
        ["objective.latent_mode=features", "objective.latent_times=independent"],
        ["objective.latent_mode=features", "objective.schedule=flow_linear"],
        ["objective.latent_mode=features", "objective.continuous_weight=snr"],
        ["objective.latent_mode=features", "objective.continuous_scale=0"],
        ["objective.latent_mode=features", "objective.latent_sigma=0.2"],
        ["objective.latent_mode=features", "objective.full_visibility_probability=0.1"],
        ["objective.latent_mode=features", "objective.p_r_max=0.9"],
        ["objective.latent_mode=features", "objective.p_r_per=batch"],
        ["objective.full_visibility_probability=1", "objective.p_r_max=0.9"],
        ["objective.p_r_max=1.1"],
        ["objective.p_uniform=1"],
        ["objective.gamma=2"],
        ["objective.p_uniform=0.1", "objective.gamma=4"],
        ["objective.p_uniform=0.1", "objective.token_dropout=0.1"],
        ["objective.p_r_per=token"],
        ["objective.latent_mode=features", "sampling.sampler=ddpm"],
        ["objective.continuous_scale=0", "objective.continuous_weight=snr"],
        ["objective.latent_times=clean", "objective.schedule=flow_linear"],
        ["objective.latent_times=clean", "objective.continuous_weight=inv_snr"],
        ["objective.latent_times=clean", "sampling.sampler=ddim"],
        ["objective.encoder.random_weights=true"],
    ],
    ids=" ".join,
)
def test_each_is_one_problem(overrides):
    (problem,) = found(*overrides)
    option = overrides[-1].split("=")[0].rpartition(".")[2]
    assert option in problem.what + problem.found + problem.change


@pytest.mark.parametrize(
    "overrides",
    [
        [MOE, "objective.experts.per_token=1", "objective.experts.balance=0.01"],
        [MOE, "objective.experts.per_token=1", "objective.experts.gate=renormalised"],
        [MOE, "objective.experts.num=4", "objective.experts.balance=0.01"],
        ["objective.architecture=mmdit", "model.num_layers=4", "objective.latent_times=independent"],
        ["objective.latent_times=clean", "objective.continuous_weight=uniform"],
        ["objective.full_visibility_probability=0", "objective.p_r_max=0.9", "objective.p_r_per=batch"],
        ["objective.full_visibility_probability=1", "sampling.sampler=ddpm"],
        ["objective.p_uniform=0.1", "objective.gamma=2", "objective.token_weight=uniform"],
        ["objective.latent_mode=features", "objective.latent_dropout=0"],
        ["objective.encoder.kind=huggingface", "objective.encoder.path=x", "objective.encoder.random_weights=true"],
    ],
    ids=" ".join,
)
def test_these_are_fine(overrides):
    assert found(*overrides) == []
