"""What processes send, against collectives carried out message by message."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small_networks import build

from braid.parallel.plan import ParallelConfig
from braid.pretrain.planning.estimate import Machine, estimate
from braid.pretrain.planning.hardware import GPU, find_gpu
from braid.pretrain.planning.traffic import LINK_EFFICIENCY, plan_axes
from braid.pretrain.planning.vocabulary import VocabularySize
from braid.pretrain.training.optimizer import parameter_kinds

B, L, W, LAYERS = 2, 64, 128, 4
N = B * L * W


def traffic_of(plan, num_processes, *overrides, gpu="h200", per_node=8, recipe="tiny_mdlm"):
    """{(kind, operation): traffic} of every stage, for micro-batches of B rows; four a rank."""
    config, _ = build(recipe, f"model.num_layers={LAYERS}", f"data.sequence_length={L}", *overrides, vocab_size=96)
    size = 4 * B * plan.data(num_processes)
    training = replace(config.training, micro_batch_size=B, global_batch_size=size)
    config = replace(config, parallel=plan, training=training)
    figures = estimate(config, Machine(num_processes, per_node, find_gpu(gpu)), VocabularySize(96, ""))
    return [{(t.kind, t.operation): t for t in stage.traffic} for stage in figures.stages], figures


def ring_reduce(size: int, elements: int) -> int:
    """Elements that one process sends in a ring reduce-scatter (an all-gather is as much), step by step."""
    return sum(elements // size for _ in range(size - 1))


def test_ranks_count_along_tensor_then_context_data_pipeline():
    axes = plan_axes(ParallelConfig(tensor=2, context=2, pipeline=2), 16, 8)
    assert {name: axis.ranks for name, axis in axes.items()} == {
        "tensor": [0, 1], "context": [0, 2], "data": [0, 4], "pipeline": [0, 8], "reduction": [0, 2, 4, 6],
    }  # fmt: skip
    assert [axis.name for axis in axes.values() if axis.crosses_nodes] == ["pipeline"]
    axes = plan_axes(ParallelConfig(tensor=4, pipeline=2), 64, 8)
    assert (axes["data"].size, axes["data"].in_node, axes["pipeline"].in_node) == (8, 2, 1)
    six = plan_axes(ParallelConfig(tensor=6), 24, 8)["tensor"]
    assert six.crosses_nodes and six.in_node == 2, "ranks 6 to 11 have two in the first node and four in the second"
    assert plan_axes(ParallelConfig(pipeline=4), 12, 6)["pipeline"].in_node == 2, "every third rank"


@pytest.mark.parametrize("recomputation", ["none", "block"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tensor(precision, recomputation):
    words = [f"run.precision={precision}", f"model.activation_checkpointing={recomputation}"]
    number = 2 if precision == "bf16" else 4
    again = recomputation == "block"
    (found,), _ = traffic_of(ParallelConfig(tensor=4), 4, *words)
    sums = 2 * LAYERS * (2 + again)  # attention and MLP, forward and backward
    assert found["tensor", "all-reduce"].sent == 4 * sums * 2 * ring_reduce(4, N) * number
    (found,), _ = traffic_of(ParallelConfig(tensor=4, sequence=True), 4, *words)
    moves = 2 * LAYERS * (2 + 3 + 2 * again)
    assert found["tensor", "gather, scatter"].sent == 4 * moves * ring_reduce(4, N) * number


def test_two_streams_send_more():
    (plain,), _ = traffic_of(ParallelConfig(tensor=2), 2)
    (streams,), _ = traffic_of(ParallelConfig(tensor=2), 2, recipe="tiny_ccdd_mmdit")
    kind = ("tensor", "all-reduce")
    assert streams[kind].sent == plain[kind].sent * (3 * 2 + 2 * 2) / (2 * 2), "two-stream blocks and private ones"


def test_context():
    (found,), _ = traffic_of(ParallelConfig(context=4), 4)
    local = N // 4
    sent = 3 * local // 4  # of its positions, the heads of three others
    assert found["context", "all-to-all"].sent == 4 * LAYERS * 2 * 4 * sent * 4
    (found,), _ = traffic_of(ParallelConfig(context=4, context_by="gather"), 4)
    assert found["context", "gather, scatter"].sent == 4 * LAYERS * 2 * 2 * 3 * local * 4


def test_pipeline():
    stages, _ = traffic_of(ParallelConfig(pipeline=4), 4)
    kind = ("pipeline", "send, receive")
    assert [stage[kind].sent / (4 * N * 4) for stage in stages] == [1, 2, 2, 1], "forward, both, both, backward"
    stages, _ = traffic_of(ParallelConfig(pipeline=2, virtual=2), 2)
    assert [stage[kind].sent / (4 * N * 4) for stage in stages] == [3, 3]
    stages, _ = traffic_of(ParallelConfig(pipeline=2, tensor=2, sequence=True), 4)
    assert stages[0][kind].sent == 4 * N * 4 / 2


@pytest.mark.parametrize(
    ("engine", "zero", "precision", "of_matrices", "of_others"),
    [  # bytes sent for each parameter over (k - 1) / k, with four micro-batches
        ("plain", 0, "fp32", 2 * 4, 2 * 4),
        ("plain", 0, "bf16", 2 * 4, 2 * 4),
        ("megatron", 0, "bf16", 4 + 2, 4 + 4),
        ("megatron", 0, "fp32", 4 + 4, 4 + 4),
        ("deepspeed", 0, "fp32", 2 * 4, 2 * 4),
        ("deepspeed", 1, "fp32", 4 + 4, 4 + 4),
        ("deepspeed", 1, "bf16", 4 + 4, 4 + 4),
        ("deepspeed", 2, "bf16", 4 * 4 + 4, 4 * 4 + 4),
        ("deepspeed", 3, "bf16", 4 * 4 + 4 * 2 * 2, 4 * 4 + 4 * 2 * 4),
        ("deepspeed", 3, "fp32", 4 * 4 + 4 * 2 * 4, 4 * 4 + 4 * 2 * 4),
    ],
)
def test_data(engine, zero, precision, of_matrices, of_others):
    (found,), figures = traffic_of(ParallelConfig(engine=engine, zero=zero), 8, f"run.precision={precision}")
    _, objective = build("tiny_mdlm", f"model.num_layers={LAYERS}", vocab_size=96)
    matrices = sum(p.numel() for name, p in objective.named_parameters() if p.ndim == 2 and "embedding" not in name)
    others = sum(p.numel() for p in objective.parameters()) - matrices
    sent = sum(traffic.sent for traffic in found.values())
    assert sent == pytest.approx((of_matrices * matrices + of_others * others) * 7 / 8)
    kinds = {kind for (kind, _), traffic in found.items() if traffic.hidden}
    hidden = {"plain": set(), "megatron": {"gradients", "weights"}}.get(engine)
    assert kinds == (
        {0: set(), 1: set(), 2: {"gradients"}, 3: {"gradients", "weights"}}[zero] if hidden is None else hidden
    )


def test_muon_makes_matrices_whole():
    muon = "optimizer.name=muon"
    config, objective = build("tiny_mdlm", f"model.num_layers={LAYERS}", f"data.sequence_length={L}", vocab_size=96)
    kinds = parameter_kinds(objective)
    matrices = sum(p.numel() for name, p in objective.named_parameters() if kinds[name] != "other")
    (plain,), _ = traffic_of(ParallelConfig(), 4, muon)
    assert not any(kind == "Muon" for kind, _ in plain)
    (found,), _ = traffic_of(ParallelConfig(engine="deepspeed", zero=3), 4, muon)
    # Of each matrix three ranks send a quarter to the fourth, and get another one back.
    assert found["Muon", "gather, scatter"].sent == pytest.approx(4 * (3 + 3) * matrices / 4 / 4)
    for engine in ("plain", "megatron"):
        (found,), _ = traffic_of(ParallelConfig(tensor=2, engine=engine), 8, muon)
        (alone,), _ = traffic_of(ParallelConfig(tensor=2, engine=engine), 8)
        assert found.keys() - alone.keys() == {("Muon", "gather")}
        halves = found["Muon", "gather"].sent / 4 * (4 if engine == "megatron" else 1)
        assert 0.4 * matrices < halves <= matrices / 2 + 96 * W, "each sends its half to the other"


def test_data_goes_over_context_too():
    (found,), figures = traffic_of(ParallelConfig(context=2), 4)
    assert found["gradients", "all-reduce"].sent == pytest.approx(8 * figures.stages[0].memory.parameters * 3 / 4)
    assert found["gradients", "all-reduce"].axis == "reduction"


def test_seconds_follow_from_the_links():
    gpu = find_gpu("H200")
    assert (gpu.link, gpu.network) == (450e9, 50e9)

    def seconds(plan, num_processes, kind):
        stages, _ = traffic_of(plan, num_processes)
        traffic = stages[0][kind]
        return traffic.sent / traffic.seconds / LINK_EFFICIENCY

    assert seconds(ParallelConfig(tensor=4), 4, ("tensor", "all-reduce")) == pytest.approx(450e9)
    assert seconds(ParallelConfig(), 16, ("gradients", "all-reduce")) == pytest.approx(8 * 50e9), "eight cards a node"
    plan = ParallelConfig(tensor=4)
    assert seconds(plan, 64, ("gradients", "all-reduce")) == pytest.approx(2 * 50e9), "two members in a node"
    assert seconds(ParallelConfig(pipeline=2), 16, ("pipeline", "send, receive")) == pytest.approx(50e9)
    kind = ("context", "all-to-all")
    assert seconds(ParallelConfig(context=4), 4, kind) == pytest.approx(450e9)
    stages, _ = traffic_of(ParallelConfig(context=4), 4, per_node=2)
    crossing = stages[0][kind].sent * 2 / 3  # of three others, two are on the other node
    assert stages[0][kind].seconds == pytest.approx(crossing / (50e9 * LINK_EFFICIENCY))


def test_an_unknown_link_has_no_time():
    for gpu in ("some card", "GB200"):
        (found,), figures = traffic_of(ParallelConfig(), 16, "run.precision=bf16", gpu=gpu)
        assert found["gradients", "all-reduce"].seconds is None and found["gradients", "all-reduce"].sent > 0
        assert figures.timing.step is None and figures.timing.total is None


def test_the_table_of_gpus():
    from braid.pretrain.model.flops import PEAKS
    from braid.pretrain.planning.hardware import SHEETS

    names = [row[0] for row in SHEETS]
    assert [name for name, _ in PEAKS if name not in names] == []
    for name, _ in PEAKS:
        assert find_gpu(name).name == name and find_gpu(f"nvidia {name.lower()}").name == name
    assert find_gpu("NVIDIA A100-SXM4-80GB").memory == 80 * 2**30 and find_gpu("a100").memory is None
    assert find_gpu("NVIDIA H200 NVL").link == 64e9
    assert find_gpu("abacus") == GPU("abacus", None, None, None, None)
    assert find_gpu("h200 mig 1g.18gb").memory is None, "a slice is not the card"
    assert find_gpu("abacus", 25).network == 25e9 and find_gpu("h100", 25).network == 25e9
