"""Bytes of weights, gradients and optimizer state of each process, against real tensors cut by hand."""

from __future__ import annotations

from dataclasses import replace

import memory_bodies
import pytest
import torch
from small_networks import SMALL, build

from braid.parallel.plan import ParallelConfig
from braid.pretrain.config.load import load_config
from braid.pretrain.planning.estimate import Machine, estimate
from braid.pretrain.planning.hardware import find_gpu
from braid.pretrain.planning.vocabulary import VocabularySize
from braid.pretrain.training.optimizer import build_optimizer

VOCAB = 97
BY_ROWS = ("qkv.weight", "mlp.input.weight", "mlp.input.bias", "token_head.linear.weight", "token_head.linear.bias",
           "token_embedding.weight")  # fmt: skip
BY_COLUMNS = ("attention.out.weight", "mlp.output.weight")


def stages_of(config, num_processes=1):
    return estimate(config, Machine(num_processes, 8, find_gpu("h200")), VocabularySize(VOCAB, "")).stages


def part_of(name: str, tensor: torch.Tensor, size: int) -> int:
    """Elements that one of `size` processes has of a tensor, cut by hand and padded to equal parts."""
    for names, dim in ((BY_ROWS, 0), (BY_COLUMNS, 1)):
        if name.endswith(names):
            return tensor.split(-(-tensor.shape[dim] // size), dim)[0].numel()
    return tensor.numel()


def held_by_hand(objective, plan, stage):
    """Elements of the weights of linear layers, and of all other parameters, of a stage of two, by the names of MDiT's
    modules."""
    matrices = others = 0
    for name, parameter in objective.named_parameters():
        _, module, *rest = name.split(".")
        if module == "blocks" and plan.pipeline > 1 and (int(rest[0]) < 3) != (stage == 0):
            continue
        if plan.pipeline > 1 and module in ("token_embedding", "latent_input") and stage == 1:
            continue
        if plan.pipeline > 1 and module in ("token_head", "latent_head") and stage == 0:
            continue
        held = part_of(name, parameter, plan.tensor)
        if parameter.ndim == 2 and not module.endswith("_embedding"):  # of tokens and of times
            matrices += held
        else:
            others += held
    return matrices, others


@pytest.mark.parametrize("pipeline", [1, 2])
@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize(
    ("engine", "zero", "precision", "of_matrices", "of_others"),
    [  # bytes per element of weights, gradients, master weights, moments, average; those after the bar are divided
        ("plain", 0, "fp32", "4 4 0 8 4 |", "4 4 0 8 4 |"),
        ("plain", 0, "bf16", "4 4 0 8 4 |", "4 4 0 8 4 |"),
        ("megatron", 0, "fp32", "4 4 | 0 8 4", "4 4 | 0 8 4"),
        ("megatron", 0, "bf16", "2 4 | 4 8 4", "4 4 | 0 8 4"),
        ("deepspeed", 1, "bf16", "4 4 | 4 8 4", "4 4 | 4 8 4"),
        ("deepspeed", 2, "bf16", "4 | 4 4 8 4", "4 | 4 4 8 4"),
        ("deepspeed", 3, "bf16", "| 4 4 4 8 4", "| 4 4 4 8 4"),
        ("deepspeed", 2, "fp32", "4 | 4 4 8 4", "4 | 4 4 8 4"),
    ],
)
def test_state_of_a_process(engine, zero, precision, of_matrices, of_others, tensor, pipeline):
    if zero > 1 and pipeline > 1:
        pytest.skip("refused")
    config, objective = build("tiny_ccdd", "model.num_layers=6", f"run.precision={precision}", "training.ema_decay=0.9",
                              vocab_size=VOCAB)  # fmt: skip
    plan = ParallelConfig(tensor=tensor, pipeline=pipeline, engine=engine, zero=zero)
    ranks = 3
    batch = replace(config.training, global_batch_size=6, micro_batch_size=1)
    config = replace(config, parallel=plan, training=batch)
    for stage, found in enumerate(stages_of(config, tensor * pipeline * ranks)):
        matrices, others = held_by_hand(objective, plan, stage)
        assert found.memory.parameters == matrices + others
        expected = 0.0
        for held, bytes_each in ((matrices, of_matrices), (others, of_others)):
            whole, divided = (sum(int(word) for word in side.split()) for side in bytes_each.split("|"))
            expected += held * (whole + divided / ranks)
        names = ("weights", "gradients", "float32 master weights", "Adam's moments", "average of the weights (EMA)")
        state = sum(found.memory.held.get(name, 0) for name in names)
        assert expected - 1 <= state <= expected + 4 * 6 * ranks, "each kind is padded to equal parts by itself"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_moments_are_those_of_the_real_optimizer(optimizer):
    config, objective = build("tiny_mdlm", f"optimizer.name={optimizer}", vocab_size=VOCAB)
    stepped = build_optimizer(objective, config.optimizer)
    for parameter in objective.parameters():
        parameter.grad = torch.ones_like(parameter)
    stepped.step()
    real = sum(t.nbytes for state in stepped.state.values() for name, t in state.items() if name != "step")
    (stage,) = stages_of(config)
    (moments,) = [size for name, size in stage.memory.held.items() if "moments" in name]
    assert moments == real


def test_what_is_frozen_has_no_state():
    config, objective = build(
        "tiny_replaid", "objective.fixed_embeddings=true", "training.ema_decay=0", vocab_size=VOCAB
    )
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in objective.parameters())
    (stage,) = stages_of(config)
    assert trained < everything
    assert stage.memory.held["weights"] == 4 * everything and stage.memory.held["gradients"] == 4 * trained
    assert "average of the weights (EMA)" not in stage.memory.held


def test_a_stage_needs_what_it_holds_and_the_largest_moment():
    config, _ = build("tiny_mdlm", vocab_size=VOCAB)
    (stage,) = stages_of(config)
    memory = stage.memory
    assert memory.total == sum(memory.held.values()) + memory.activations + max(memory.head, memory.block)
    assert replace(memory, start=memory.total + 1).total == memory.total + 1
    idle = replace(memory, activations=0.0, head=0.0, block=1.0)
    assert idle.total == sum(memory.held.values()) + memory.step, "the step, where activations are few"


def test_offload_leaves_the_gpu():
    config, _ = build("tiny_mdlm", "run.precision=bf16", "training.ema_decay=0.9", vocab_size=VOCAB)

    def memory(**fields):
        plan = ParallelConfig(engine="deepspeed", **fields)
        return stages_of(replace(config, parallel=plan))[0].memory

    for zero, moved in ((1, 16), (3, 20)):
        kept, offloaded = memory(zero=zero), memory(zero=zero, offload="cpu")
        assert kept.host == 0 and offloaded.host == moved * kept.parameters
        assert sum(kept.held.values()) - sum(offloaded.held.values()) == offloaded.host


# What is left between two steps, by engine: gradients only where the engine keeps a buffer for them.
KEPT = {
    "plain": ("weights", "Adam's moments"),
    "megatron": ("weights", "gradients", "float32 master weights", "Adam's moments"),
    "deepspeed": ("weights", "float32 master weights", "Adam's moments"),
    "ZeRO 3": ("weights", "gradients", "float32 master weights", "Adam's moments"),
}
MEASURED = [  # (processes, plan, precision)
    (1, ParallelConfig(), "fp32"),
    (2, ParallelConfig(), "fp32"),
    (2, ParallelConfig(tensor=2), "fp32"),
    (4, ParallelConfig(tensor=4), "fp32"),
    (4, ParallelConfig(tensor=2, sequence=True), "fp32"),
    (2, ParallelConfig(tensor=2), "bf16"),
    *((2, ParallelConfig(engine="deepspeed", zero=zero), "fp32") for zero in (1, 2, 3)),
    *((2, ParallelConfig(engine="deepspeed", zero=zero), "bf16") for zero in (1, 3)),
    (4, ParallelConfig(tensor=2, engine="deepspeed", zero=3), "bf16"),
    (2, ParallelConfig(engine="megatron"), "fp32"),
    (2, ParallelConfig(engine="megatron"), "bf16"),
    (4, ParallelConfig(tensor=2, engine="megatron"), "bf16"),
    (2, ParallelConfig(pipeline=2), "fp32"),
    (4, ParallelConfig(pipeline=2, tensor=2), "fp32"),
    (4, ParallelConfig(pipeline=2, engine="megatron"), "fp32"),
]
WITHIN = 0.02
"""Of the estimate."""


@pytest.mark.parametrize(("num_processes", "plan", "precision"), MEASURED)
def test_an_engine_really_holds_so_much(ranks, num_processes, plan, precision):
    """Weights and optimizer state of every rank, against the formula of its stage."""
    config = load_config("tiny_mdlm", [*SMALL, f"run.precision={precision}", "training.ema_decay=0"])
    data = plan.data(num_processes)
    batch = replace(config.training, global_batch_size=data, micro_batch_size=1)
    config = replace(config, parallel=plan, training=batch, data=replace(config.data, sequence_length=16))
    stages = stages_of(config, num_processes)
    for rank, (weights, held) in enumerate(ranks(memory_bodies.of_engine, num_processes, config, VOCAB)):
        memory = stages[rank // (num_processes // plan.pipeline)].memory
        assert weights == pytest.approx(memory.held["weights"], rel=WITHIN)
        assert held == pytest.approx(
            sum(memory.held.get(name, 0) for name in KEPT["ZeRO 3" if plan.zero == 3 else plan.engine]), rel=WITHIN
        )


@pytest.mark.parametrize(
    ("num_processes", "plan"),
    [
        (4, ParallelConfig(engine="deepspeed", zero=3)),
        pytest.param(4, ParallelConfig(engine="deepspeed", zero=3, tensor=2), marks=pytest.mark.slow),
        pytest.param(2, ParallelConfig(engine="deepspeed", zero=2), marks=pytest.mark.slow),
    ],
)
def test_so_much_is_there_while_the_model_is_built(ranks, num_processes, plan):
    """Under ZeRO 3 a rank never has more than its share and one module, whatever the size of the whole."""
    config = load_config("tiny_mdlm", [*SMALL, "model.num_layers=8", "training.ema_decay=0"])
    batch = replace(config.training, global_batch_size=num_processes, micro_batch_size=1)
    config = replace(config, parallel=plan, training=batch)
    (stage,) = stages_of(config, num_processes)
    assert stage.memory.start < 1.2 * stage.memory.held["weights"]
    for peak in ranks(memory_bodies.while_built, num_processes, config, VOCAB):
        assert 0.9 * stage.memory.start < peak < (1 + WITHIN) * stage.memory.start
