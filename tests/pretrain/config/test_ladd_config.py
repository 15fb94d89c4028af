"""What can be wrong with LADD's settings, and the sizes its recipes take from the release."""

import pytest

from braid.pretrain.config.load import load_config
from braid.pretrain.config.validate import problems

CO, DI = "tiny_co_ladd", "tiny_di_ladd"


@pytest.mark.parametrize(
    "recipe, overrides, words",
    [
        (CO, ["num_slots=33"], "more latent slots than tokens"),
        (DI, ["num_slots=0"], "objective.num_slots"),
        (CO, ["pooling=last_layer"], "one slot for every token"),
        (CO, ["pooling=mean"], "objective.pooling"),
        (DI, ["pooling=adaptive_chunk_mean_eos", "num_slots=1"], "needs a slot beside the last"),
        (CO, ["latent_positions=none"], "objective.latent_positions"),
        (CO, ["time_conditioning=tokens"], "objective.time_conditioning"),
        (CO, ["time_eps=0"], "objective.time_eps"),
        (CO, ["latent_schedule=square"], "objective.latent_schedule"),
        (DI, ["latent_schedule=sqrt"], "objective.latent_schedule"),
        (DI, ["latent_power=3"], "objective.latent_power = 3.0 is ignored"),
        (CO, ["latent_schedule=poly", "latent_power=0.5"], "objective.latent_power = 0.5 must be at least 1"),
        (CO, ["hidden_max=1.5"], "objective.hidden_max"),
        (DI, ["latent_dropout=1"], "objective.latent_dropout"),
        (DI, ["stage_one_steps=-1"], "objective.stage_one_steps"),
        (CO, ["time_shift=0"], "objective.time_shift"),
        (CO, ["time_shift_correction=true"], "time_shift_correction is ignored"),
        (CO, ["latent_sigma=-1"], "objective.latent_sigma"),
        (CO, ["encoder.variance_floor=1e-3"], "variance_floor is ignored"),
        (CO, ["encoder.kind=learnt"], "objective.encoder.kind"),
        (CO, ["encoder.kind=random", "encoder.window=3"], "objective.encoder.window is ignored"),
        (CO, ["encoder.kind=embeddings"], "objective.encoder.kind = 'embeddings' needs a model"),
        (CO, ["encoder.kind=learned", "encoder.variance_floor=1e-3"], "objective.encoder.variance_floor is ignored"),
        (CO, ["encoder_layers=2"], "objective.encoder_layers = 2 is ignored by a frozen encoder"),
        (CO, ["encoder_masking=1"], "objective.encoder_masking"),
        (CO, ["latent_warmup=cosine"], "objective.latent_warmup"),
        (DI, ["latent_warmup_steps=10"], "objective.latent_warmup_steps = 10 is ignored"),
        (DI, ["latent_warmup=linear", "latent_warmup_steps=0"], "objective.latent_warmup_steps"),
        (DI, ["latent_scale=0", "stage_one_steps=3"], "stage_one_steps = 3 is ignored by objective.latent_scale = 0"),
        (CO, ["latent_scale=0", "latent_warmup=linear"], "latent_warmup = linear is ignored"),
        (CO, ["encoder.kind=learned", "encoder.random_weights=true"], "objective.encoder.random_weights is ignored"),
        (CO, ["encoder.kind=trained", "encoder.path=x", "encoder.window=3"], "objective.encoder.window is ignored"),
        (DI, ["independence_scale=-1"], "objective.independence_scale"),
        (CO, ["latent_norm=none"], "objective.latent_norm = 'none' is for an encoder that is learnt"),
        (CO, ["encoder.kind=learned", "latent_norm=layer"], "objective.latent_norm"),
        (CO, ["encoder.kind=learned", "latent_prior_scale=0.1"], "objective.latent_prior_scale = 0.1 is ignored"),
        (CO, ["latent_denoiser_layers=2"], "objective.latent_denoiser_layers = 2 is ignored"),
        (CO, ["latent_denoiser=true", "independent_times=true"], "objective.independent_times = True is ignored"),
        (DI, ["quantiser=gumbel"], "objective.quantiser = 'gumbel' is for an encoder that is learnt"),
        (DI, ["quantiser=fsq"], "objective.quantiser"),
        (DI, ["gumbel_end=0.1"], "objective.gumbel_end = 0.1 is ignored"),
        (DI, ["encoder.kind=learned", "quantiser=gumbel", "gumbel_start=0"], "objective.gumbel_start"),
        (DI, ["encoder.kind=learned", "quantiser=gumbel", "commitment=0.2"], "objective.commitment = 0.2 is ignored"),
        (
            DI,
            ["encoder.kind=learned", "quantiser=gumbel", "codebook_decay=0.9"],
            "codebook_decay = 0.9 is ignored",
        ),
        (DI, ["codebook_size=130"], "the codebook has more vectors than a global batch has slots"),
        (DI, ["codebook_size=2"], "objective.codebook_size"),
        (DI, ["codebook_decay=1"], "objective.codebook_decay"),
        (DI, ["codebook_dead_below=-1"], "objective.codebook_dead_below"),
        (DI, ["commitment=0.2"], "objective.commitment = 0.2 is ignored by a frozen encoder"),
        (DI, ["encoder_layers=2"], "objective.encoder_layers = 2 is ignored by a frozen encoder"),
        (DI, ["encoder.kind=learned", "encoder.window=2"], "objective.encoder.window is ignored"),
        (DI, ["encoder.kind=learned", "pooling=adaptive_chunk_mean_eos"], "mean_eos is ignored by"),
    ],
)
def test_a_wrong_setting_is_named(recipe, overrides, words):
    found = problems(load_config(recipe, [f"objective.{override}" for override in overrides]))
    assert [words in problem.what for problem in found] == [True]


@pytest.mark.parametrize(
    "recipe, overrides, words",
    [
        (CO, ["sampling.sampler=sequential"], "times it is never trained at"),
        (DI, ["sampling.sampler=sequential", "objective.independent_times=false"], "times it is never trained at"),
        (DI, ["sampling.latent_steps=4"], "sampling.latent_steps = 4 is ignored"),
        (CO, ["objective.latent_denoiser=true", "sampling.sampler=joint"], "sampling.sampler = 'joint' is not one of"),
        (CO, ["objective.latent_denoiser=true", "data.packing=pairs"], "does not see the source"),
    ],
)
def test_sampling_must_fit_what_is_trained(recipe, overrides, words):
    found = problems(load_config(recipe, overrides))
    assert [words in problem.what for problem in found] == [True]


@pytest.mark.parametrize(
    "recipe, overrides",
    [
        (CO, ["objective.pooling=last_layer", "objective.num_slots=32"]),
        (CO, ["objective.independent_times=true", "sampling.sampler=sequential_ddpm", "sampling.latent_steps=4"]),
        (CO, ["objective.time_shift=0.7", "objective.time_shift_correction=true", "objective.latent_sigma=0"]),
        (DI, ["objective.encoder.kind=learned", "objective.encoder_layers=1", "objective.commitment=0.25"]),
        (DI, ["objective.latent_schedule=poly", "objective.latent_power=2", "sampling.sampler=sequential"]),
        (DI, ["objective.codebook_size=129"]),
        (
            DI,
            [
                "objective.encoder.kind=learned",
                "objective.quantiser=gumbel",
                "objective.codebook_size=512",
                "objective.gumbel_steps=10",
                "objective.independence_scale=0.1",
                "objective.encoder_masking=0.25",
            ],
        ),
        (CO, ["objective.encoder.kind=learned", "objective.latent_norm=none", "objective.latent_prior_scale=0.1"]),
        (
            CO,
            [
                "objective.latent_denoiser=true",
                "sampling.sampler=sequential_ddpm",
                "sampling.latent_steps=4",
                "objective.latent_denoiser_layers=1",
                "objective.latent_warmup=delayed",
            ],
        ),
    ],
)
def test_what_goes_together(recipe, overrides):
    assert problems(load_config(recipe, overrides)) == []


@pytest.mark.parametrize("option", ["independence_scale=0.1", "latent_denoiser=true"])
def test_what_calls_more_than_one_network_is_not_divided_along_a_pipeline(option):
    found = problems(load_config(CO, [f"objective.{option}", "parallel.pipeline=2"]))
    assert any("needs the whole network in one process" in problem.what for problem in found)
    others = problems(load_config(CO, ["parallel.pipeline=2"]))
    others += problems(load_config(CO, [f"objective.{option}", "parallel.context=2"]))
    assert not any("whole network" in problem.what for problem in others)


def test_the_published_sizes():
    """arXiv 2510.18114: LM1B in rows of 128, text8 of 256 and OpenWebText of 512."""
    lengths = {"co_ladd_lm1b": 128, "co_ladd_owt": 512, "di_ladd_lm1b": 128, "di_ladd_owt": 512, "di_ladd_text8": 256}
    for name, length in lengths.items():
        config = load_config(name)
        assert (config.model.width, config.model.num_layers, config.model.num_heads) == (768, 12, 12)
        assert config.data.sequence_length == length
        for world_size in (1, 8, 16):
            assert problems(config, world_size=world_size) == []
    co, di = load_config("co_ladd_owt").objective, load_config("di_ladd_owt").objective
    assert (co.num_slots, co.encoder.latent_dim, co.hidden_max, co.latent_dropout) == (64, 32, 0.9, 0.15)
    assert co.time_shift == pytest.approx((2048 / 4096) ** 0.5) and not co.independent_times
    assert (di.num_slots, di.encoder.latent_dim, di.codebook_size, di.stage_one_steps) == (64, 128, 8192, 50_000)
    assert (di.hidden_max, di.latent_dropout, di.independent_times) == (0, 0, True)
    text8 = load_config("di_ladd_text8").objective
    assert (text8.encoder.kind, text8.num_slots, text8.encoder.latent_dim, text8.codebook_size) == (
        "learned",
        16,
        128,
        4096,
    )
    assert (text8.latent_schedule, text8.latent_power, text8.commitment) == ("poly", 2, 0.25)
