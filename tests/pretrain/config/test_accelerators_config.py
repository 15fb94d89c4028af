"""The section `accelerators`: every combination that cannot be right says so, whatever the machine is."""

from __future__ import annotations

import pytest

from braid.pretrain.config.load import load_config
from braid.pretrain.config.validate import problems

ATTENTION, NORMS = "accelerators.attention=flash-attn", "accelerators.norms=apex"
OPTIMIZER, LINEARS = "accelerators.optimizer=apex", "accelerators.linears=transformer-engine"
GPU = ("run.device=cuda", "run.precision=bf16")
SIZES = ("data.sequence_length=1024", "training.micro_batch_size=2")


def found(recipe, *overrides):
    return problems(load_config(recipe, [*GPU, *SIZES, *overrides]))


@pytest.mark.parametrize("recipe", ["mdlm_small", "ccdd_mmdit_owt", "replaid_owt", "co_ladd_owt", "ar_small"])
def test_what_goes_together(recipe):
    overrides = ("data.packing=stream",) if recipe == "co_ladd_owt" else ()
    assert found(recipe, ATTENTION, NORMS, OPTIMIZER, LINEARS, *overrides) == []


@pytest.mark.parametrize(
    ("recipe", "overrides", "part"),
    [
        ("mdlm_small", (ATTENTION, "run.device=cpu"), "for GPUs"),
        ("mdlm_small", (ATTENTION, "run.precision=fp32"), "run.precision = 'fp32'"),
        ("mdlm_small", ("accelerators.norms=apx",), "did you mean apex?"),
        ("elf_b_owt", (ATTENTION,), "takes no mask"),
        ("mdlm_small", (ATTENTION, "data.packing=best_fit"), "takes no mask"),
        ("mdlm_small", (ATTENTION, "model.num_heads=2"), "768 / 2 = 384"),
        ("mdlm_small", (NORMS, "model.compile=true"), "fused norms of their own"),
        ("elf_b_owt", (OPTIMIZER,), "no Muon"),
        ("mdlm_small", (OPTIMIZER, "parallel.engine=megatron"), "torch's AdamW alone"),
        ("mdlm_small", (LINEARS, "run.precision=fp32"), "take and give bf16"),
        ("mdlm_small", (LINEARS, "model.compile=true"), "not compiled"),
        ("mdlm_small", (LINEARS, "parallel.tensor=2"), "Megatron-core's"),
        ("mdlm_small", (LINEARS, "parallel.engine=megatron"), "lays elsewhere"),
        ("mdlm_small", (LINEARS, "model.width=1000", "model.num_heads=10"), "1000 = 62 x 16 + 8"),
        ("mdlm_small", (LINEARS, "training.micro_batch_size=1", "data.sequence_length=1000"), "1000 = 62 x 16 + 8"),
        ("elf_b_owt", (LINEARS, "training.micro_batch_size=1", "optimizer.name=adamw"), "1036 = 64 x 16 + 12"),
        ("ccdd_moedit_owt", (LINEARS, "objective.experts.per_token=1"), "per_token = 1 of 2"),
        ("t5_small_owt", (NORMS,), "another library's"),
    ],
)
def test_what_cannot_be_right(recipe, overrides, part):
    texts = [f"{problem.what} {problem.found} {problem.change}" for problem in found(recipe, *overrides)]
    assert len([text for text in texts if part in text]) == 1, texts


def test_torch_is_asked_for_nothing():
    assert problems(load_config("tiny_mdlm", ["run.device=cpu", "data.sequence_length=7", "data.packing=stream"])) == []
