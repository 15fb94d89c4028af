"""`braid plan` as its users meet it, and the figures it puts together."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import pytest
import torch

from braid.data_pipeline.prepare import prepare
from braid.kernels.errors import ConfigError
from braid.parallel.plan import ParallelConfig
from braid.pretrain.config.load import load_config, recipes
from braid.pretrain.config.validate import problems
from braid.pretrain.model.network import parameter_counts
from braid.pretrain.planning.command import add_arguments, main
from braid.pretrain.planning.estimate import Machine, estimate
from braid.pretrain.planning.facts import plan_facts
from braid.pretrain.planning.hardware import find_gpu
from braid.pretrain.planning.network import planned_objective
from braid.pretrain.planning.vocabulary import VOCABULARIES, find_vocabulary

ONE_OF_A_KIND = ["ar_small", "mdlm_small", "duo_small", "gidd_small", "ccdd_mdit_owt", "ccdd_mmdit_owt",
                 "ccdd_moedit_owt", "replaid_owt", "co_ladd_owt", "di_ladd_lm1b", "elf_b_owt"]  # fmt: skip


def plan(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return main(parser.parse_intermixed_args(list(words)))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No data, no runs."""
    monkeypatch.chdir(tmp_path)


def figures(recipe, *overrides, gpus=1, gpu="h200"):
    config = load_config(recipe, list(overrides))
    assert problems(config, world_size=gpus) == []
    return estimate(config, Machine(gpus, 8, find_gpu(gpu)), find_vocabulary(config, "gpt2"))


def test_the_command(run_braid, tmp_path):
    words = ["plan", "mdlm_small", "--gpus", "16", "parallel.tensor=2", "--json", "plan.json"]
    done = run_braid(*words)
    assert done.returncode == 0, done.stderr
    for part in ("170M", "50,258", "first group of ranks", "0 2 4 ... 14", "Adam's moments", "activations kept",
                 "fullest moment", "all-reduce", "GPU hours", "on disk"):  # fmt: skip
        assert part in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    read = json.loads((tmp_path / "plan.json").read_text())
    assert read["parameters"]["total"] == 169_627_218
    assert read["stages"][0]["memory"]["total"] > 0 and read["fits"] is True
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_every_problem_at_once(run_braid):
    words = ["plan", "mdlm_small", "--gpus", "16", "parallel.tensor=8", "model.dropout=2", "data.path=elsewhere",
             "--efficiency", "2"]  # fmt: skip
    done = run_braid(*words)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("braid: error: the configuration has 4 problems")
    for part in ("--efficiency", "model.dropout = 2.0", "12 heads / tensor 8 = 1.5", "--vocabulary"):
        assert part in done.stderr


@pytest.mark.parametrize(
    ("words", "part"),
    [(["--gpus", "0"], "--gpus = 0"), (["--gpus-per-node", "0"], "--gpus-per-node"), (["--network", "0"], "--network"),
     (["--vocabulary", "klingon"], "neither a size nor a tokenizer")],
)  # fmt: skip
def test_options_out_of_range(words, part):
    with pytest.raises(ConfigError, match=part):
        plan("mdlm_small", *words)


def test_a_plan_that_does_not_fit(capsys):
    with pytest.raises(ConfigError, match="does not fit") as caught:
        plan("mdlm_small", "--gpu", "l4", "training.micro_batch_size=64")
    assert "fullest moment" in capsys.readouterr().out, "the figures are shown all the same"
    assert "GiB on stage 0, of 22.1 usable" in caught.value.found and "activations" in caught.value.found
    ways = caught.value.change.split(", or ")
    assert len(ways) == 2 and "training.micro_batch_size=32" in ways
    for way in ways:
        assert plan("mdlm_small", "--gpu", "l4", "training.micro_batch_size=64", *way.split()) == 0


def test_a_model_too_large_for_any_plan_with_so_few_gpus():
    with pytest.raises(ConfigError, match="does not fit") as caught:
        plan("mdlm_70B", "--gpus", "1", "parallel.tensor=1", "parallel.sequence=false", "parallel.pipeline=1",
             "parallel.virtual=1")  # fmt: skip
    assert caught.value.change.startswith("more or larger GPUs")


def test_an_unknown_gpu_has_no_times(capsys):
    assert plan("mdlm_small", "--gpu", "abacus") == 0
    shown = capsys.readouterr().out
    assert "usable, 92% of the GPU's" in shown and "n/a s at 45%" in shown and "n/a s, n/a, MFU n/a" in shown


@pytest.mark.parametrize("recipe", ONE_OF_A_KIND)
def test_every_network_has_figures_on_any_plan(recipe):
    """Without data, network or encoder; the parameters are those of the network itself."""
    plans = [[], ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2", "parallel.engine=megatron"],
             ["parallel.context=2", "parallel.engine=deepspeed", "parallel.zero=3"]]  # fmt: skip
    totals = []
    for overrides in plans:
        found = figures(recipe, "training.micro_batch_size=2", *overrides, gpus=8)
        totals.append(max(stage.memory.total for stage in found.stages))
        with torch.device("meta"):
            objective = planned_objective(load_config(recipe), VOCABULARIES["gpt2"])
        assert found.parameters["total"] == sum(p.numel() for p in objective.parameters())
        assert found.parameters["blocks"] == parameter_counts(objective.network)["blocks"]
        assert found.timing.total > 0 and found.checkpoint["total"] >= 12 * found.parameters["total"]
    assert totals[1] < totals[0] and totals[2] < totals[0]


def test_another_librarys_blocks_are_not_guessed():
    pytest.importorskip("transformers")
    found = figures("t5_small_owt")
    assert found.stages[0].memory.total is None and found.fits is None
    assert any("another library" in note for note in found.notes)


@pytest.mark.parametrize(("recipe", "gpus", "billions"), [("ccdd_8B", 64, 7.9), ("mdlm_70B", 512, 70.8)])
def test_the_large_recipes_fit(recipe, gpus, billions):
    config = load_config(recipe)
    assert problems(config, world_size=gpus) == []
    found = estimate(config, Machine(gpus, 8, find_gpu("h200")), find_vocabulary(config))
    assert round(found.parameters["total"] / 1e9, 1) == billions
    assert found.fits and 0.3 < found.timing.mfu < 0.5 and found.timing.bubble < 0.02
    assert not found.axes["tensor"].crosses_nodes


def test_time_without_communication_is_products_over_speed():
    found = figures("mdlm_small")
    assert found.timing.step == pytest.approx(found.needed_flops / (0.45 * 989e12))
    head = 6 * 50_258 * 768 * 512 * 1024
    assert found.model_flops - found.needed_flops == pytest.approx(head / 2), "half of the tokens are masked"
    assert found.timing.mfu == pytest.approx(0.45) and found.timing.exposed == 0
    assert found.timing.tokens_per_second == pytest.approx(512 * 1024 / found.timing.step)
    again = figures("mdlm_small", "model.activation_checkpointing=block")
    assert found.timing.mfu > again.timing.mfu > 0.75 * found.timing.mfu, "a third more, but for the head"
    assert again.model_flops == found.model_flops
    assert figures("mdlm_small", "run.precision=fp32").timing.step is None, "the peaks are those of bf16"


def test_the_head_makes_the_last_stage_slow():
    words = ["parallel.pipeline=4", "training.micro_batch_size=4"]
    found = figures("mdlm_small", *words, gpus=4)
    flops = [stage.flops for stage in found.stages]
    assert flops[0] == flops[1] == flops[2] < flops[3]
    share = [stage.flops / sum(flops) for stage in found.stages][0]
    assert found.timing.bubble == pytest.approx(3 / (128 + 3))
    assert found.timing.waiting_share > 1 - 0.25 / (1 - 3 * share) - 0.01
    assert sum(flops) * 128 == pytest.approx(found.needed_flops)


def test_overlap_hides_what_a_micro_batch_can():
    words = ["parallel.engine=megatron", "training.micro_batch_size=32"]
    hidden, shown = (
        figures("mdlm_small", *words, gpus=16),
        figures("mdlm_small", *words, "parallel.overlap=false", gpus=16),
    )
    assert hidden.timing.exposed == 0 < shown.timing.exposed
    assert shown.timing.step == pytest.approx(hidden.timing.step + shown.timing.exposed)


@pytest.mark.parametrize("recipe", [*ONE_OF_A_KIND, "tiny_mdlm"])
def test_the_facts_are_those_of_the_network(recipe):
    config = load_config(recipe)
    facts, network = plan_facts(config), planned_objective(config, 300).network
    assert facts.num_layers == len(network.blocks) and facts.causal == network.causal
    assert facts.num_slots == getattr(network, "num_slots", 0)
    kinds = {type(block) for block in network.blocks}
    assert facts.alternates == (len(kinds) == 2)
    outputs = [m for name, m in network.blocks.named_modules() if name.endswith(("mlp.output", "mlps.0.output"))]
    assert {facts.mlp_width} == {module.in_features for module in outputs}
    prefix = 12 if recipe.startswith("elf") else 0
    assert facts.sequence_length == config.data.sequence_length + prefix


def test_the_vocabulary_of_a_corpus_that_is_not_here(tmp_path):
    from braid.data_pipeline.tokenizers import load_tokenizer

    config = load_config("mdlm_small")
    assert find_vocabulary(config).size == VOCABULARIES["gpt2"] == 50_258
    assert find_vocabulary(config, "32001").size == 32_001
    assert find_vocabulary(config, "bert").size == 30_522
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.vocab_size == VOCABULARIES["bytes"]
    tokenizer.save(tmp_path / "here" / "tokenizer")
    here = replace(config, data=replace(config.data, path=str(tmp_path / "here")))
    assert find_vocabulary(here).size == tokenizer.vocab_size
    nowhere = replace(config, data=replace(config.data, path="data/embedded"))
    with pytest.raises(ConfigError, match="not known"):
        find_vocabulary(nowhere)


def test_the_vocabulary_of_a_corpus_in_a_store(tmp_path):
    config = load_config("mdlm_small")
    data = replace(config.data, cache=str(tmp_path / "cache"), retries=0, timeout_s=5.0)

    def of(path):
        return find_vocabulary(replace(config, data=replace(data, path=path.as_uri())))

    (tmp_path / "text.txt").write_text("some\nlines\n" * 9)
    prepare([tmp_path / "text.txt"], "bytes", tmp_path / "corpus", progress=False)
    assert of(tmp_path / "corpus").size == 259
    assert of(tmp_path / "nothing-gpt2").size == 50_258
    with pytest.raises(ConfigError, match="not known") as caught:
        of(tmp_path / "nothing")
    assert "manifest.json is missing" in caught.value.found


def test_recipes_with_a_plan_are_checked_like_others():
    sharded = [name for name in recipes() if load_config(name).parallel != ParallelConfig()]
    assert sharded == ["ccdd_8B", "mdlm_70B"]
    assert all(problems(load_config(name)) == [] for name in sharded)
