"""How the recipes train, as one table: every value of the papers and their releases (see the head of each recipe)."""

from __future__ import annotations

import pytest
import torch

from braid.pretrain.config.load import load_config, recipes
from braid.pretrain.model.backbone import Backbone
from braid.pretrain.model.network import parameter_counts

# lr, beta1, beta2, eps, weight decay, schedule, warm-up, EMA, steps, rows of a step
MDLM = (3e-4, 0.9, 0.999, 1e-8, 0.0, "constant", 2500, 0.9999, 1_000_000, 512)
LADD = (3e-4, 0.9, 0.999, 1e-8, 0.03, "constant", 2500, 0.9999, 1_000_000, 512)
CCDD_LM1B = (3e-4, 0.9, 0.99, 1e-9, 0.02, "constant", 2500, 0.9999, 500_000, 512)
CCDD_OWT = (5e-4, 0.9, 0.99, 1e-9, 0.02, "constant", 10_000, 0.9999, 500_000, 512)
COSINE = (5e-4, 0.9, 0.99, 1e-9, 0.02, "cosine", 10_000, 0.9999, 500_000, 512)
PUBLISHED = {
    "mdlm_small": MDLM,
    "mdlm_lm1b": MDLM,
    "mdlm_lm1b_padded": MDLM,
    "mdlm_text8": MDLM,
    "ar_small": MDLM,
    "ar_lm1b": MDLM,
    "ar_text8": MDLM,
    "duo_small": MDLM,
    "duo_lm1b": MDLM,
    "replaid_owt": MDLM,
    "gidd_small": COSINE,
    "ccdd_mdit_lm1b": CCDD_LM1B,
    "ccdd_mmdit_lm1b": CCDD_LM1B,
    "ccdd_moedit_lm1b": CCDD_LM1B,
    "ccdd_mdit_owt": CCDD_OWT,
    "ccdd_mmdit_owt": CCDD_OWT,
    "ccdd_moedit_owt": COSINE,
    "ccdd_moedit_owt_roberta": COSINE,
    "mdlm_bl": LADD,
    "co_ladd_lm1b": LADD,
    "co_ladd_owt": LADD,
    "di_ladd_lm1b": LADD,
    "di_ladd_owt": LADD,
    "di_ladd_text8": LADD,
    "elf_b_owt": (2e-3, 0.9, 0.999, 1e-8, 0.0, "constant", 9508, 0.9999, 95_085, 512),
    "elf_m_owt": (2e-3, 0.9, 0.999, 1e-8, 0.0, "constant", 9508, 0.9999, 76_068, 512),
    "elf_l_owt": (2e-3, 0.9, 0.999, 1e-8, 0.0, "constant", 9508, 0.9999, 57_051, 512),
    "elf_b_wmt14": (2e-3, 0.9, 0.999, 1e-8, 0.0, "constant", 5000, 0.9999, 880_600, 512),
    "elf_b_xsum": (2e-3, 0.9, 0.999, 1e-8, 0.0, "constant", 5000, 0.9999, 40_000, 512),
    "t5_small_owt": (1e-3, 0.9, 0.999, 1e-8, 0.0, "cosine", 6897, 0.9999, 86_213, 512),
}
RUNGS = [name for name in recipes() if name.startswith("ladder_")]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_trains_as_published(name):
    config = load_config(name)
    optimizer, training = config.optimizer, config.training
    assert (
        optimizer.lr, optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.weight_decay, optimizer.schedule,
        optimizer.warmup_steps, training.ema_decay, training.steps, training.global_batch_size,
    ) == PUBLISHED[name]  # fmt: skip
    assert optimizer.clip_norm == 1
    assert optimizer.name == ("muon" if name.startswith("elf") else "adamw")
    if optimizer.schedule == "cosine":
        assert optimizer.min_lr_ratio == (0 if name == "t5_small_owt" else 0.1)
    if optimizer.name == "muon":
        assert optimizer.momentum == 0.95


@pytest.mark.parametrize("name", RUNGS)
def test_a_rung_trains_as_the_study(name):
    """AdamW 2e-4 to 2e-5 by a cosine, 1 % of the steps of warm-up and at least 100, no average."""
    config = load_config(name)
    optimizer, training = config.optimizer, config.training
    assert (optimizer.lr, optimizer.beta1, optimizer.beta2, optimizer.eps) == (2e-4, 0.9, 0.95, 1e-8)
    assert (optimizer.weight_decay, optimizer.clip_norm, optimizer.name) == (0.1, 1, "adamw")
    assert (optimizer.schedule, optimizer.min_lr_ratio) == ("cosine", 0.1)
    assert optimizer.warmup_steps == max(100, round(training.steps / 100))
    assert (training.ema_decay, training.global_batch_size, config.model.dropout) == (0, 256, 0)


def test_every_recipe_of_a_published_run_is_in_the_table():
    ours = ("tiny_", "demo_", "ladder_", "sudoku_", "own_text", "compare_base")
    unpublished = {"ccdd_8B", "mdlm_70B"}
    assert {name for name in recipes() if not name.startswith(ours)} - unpublished == PUBLISHED.keys()


def test_replaids_own_rates_are_plaids():
    for name in ("replaid_owt", "ladder_base"):
        objective = load_config(name).objective
        assert (objective.embedding_lr, objective.schedule_lr, objective.bounds_lr) == (1e-2, 1e-2, 1e-2)


def test_the_baseline_of_ladd_has_its_size_and_loss():
    """13 blocks of width 1024 and conditioning of 256: 184.198M, beside 184.265M in LADD's."""
    config = load_config("mdlm_bl")
    with torch.device("meta"):
        network = Backbone(config.model, vocab_size=100, causal=False, time_conditioned=False, seed=0)
    assert parameter_counts(network)["blocks"] == 184_198_144
    assert (config.model.num_heads, config.objective.loss, config.objective.time_conditioning) == (
        16, "low_variance", False,
    )  # fmt: skip
    ladd = load_config("co_ladd_lm1b")
    assert config.data.path == ladd.data.path and config.data.sequence_length == ladd.data.sequence_length
