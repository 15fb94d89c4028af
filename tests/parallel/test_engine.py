"""The engine of one process: an update that is left out on the device, and a step that asks the device nothing."""

from __future__ import annotations

import traceback
from dataclasses import replace

import pytest
import torch
from pipeline_bodies import micro_batches
from tensor_cases import CASES, build
from torch.utils._python_dispatch import TorchDispatchMode

from braid.parallel.data_parallel import World
from braid.parallel.engine import NotFinite, PlainEngine
from braid.parallel.mesh import build_mesh
from braid.parallel.plan import ParallelConfig
from braid.pretrain.config.schema import OptimizerConfig
from braid.pretrain.training.gradients import Gradients
from braid.pretrain.training.optimizer import build_optimizer, set_learning_rate
from braid.pretrain.training.step import Interval

OPTIMIZER = OptimizerConfig(lr=1e-2, weight_decay=0.1)
OPTIMIZED = [*((name, "adamw") for name in CASES), ("elf", "muon"), ("ccdd-mdit", "muon")]
WAITING = {
    torch.ops.aten._local_scalar_dense.default: "item() or tolist()",
    torch.ops.aten.nonzero.default: "nonzero() or a boolean index",
    torch.ops.aten.masked_select.default: "masked_select()",
    torch.ops.aten.equal.default: "equal()",
    torch.ops.aten.is_nonzero.default: "a tensor as a condition",
    torch.ops.aten._unique2.default: "unique()",
    torch.ops.aten.repeat_interleave.Tensor: "repeat_interleave()",
    torch.ops.aten.bincount.default: "bincount()",
}
"""What needs the values of a tensor on the host, and so waits for all that a GPU has been given to do."""


class Waits(TorchDispatchMode):
    """Collects what would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        what = WAITING.get(function)
        if function is torch.ops.aten.index.Tensor:
            what = "a boolean index" if any(i is not None and i.dtype == torch.bool for i in arguments[1]) else None
        if what:
            self.found.append(f"{what} in {traceback.extract_stack()[-2].line}")
        return function(*arguments, **options or {})


def prepared(name: str, fused: bool = True, optimizer: str = "adamw"):
    torch.manual_seed(0)
    mesh = build_mesh(World.single(), ParallelConfig())
    objective = build(name)
    objective.train()
    objective.begin_step(0, 100)
    engine = PlainEngine(objective, build_optimizer(objective, replace(OPTIMIZER, name=optimizer), fused=fused), mesh)
    set_learning_rate(engine.optimizer, 1.0)
    return mesh, objective, engine


def state(engine):
    kept = {name: value.clone() for name, value in engine.optimizer_state()}
    return kept | {str(index): weight.detach().clone() for index, weight in enumerate(engine.held)}


def give_gradients(engine, value=1e-3):
    for weight in engine.held:
        weight.grad = torch.full_like(weight, value)


def test_the_fused_update_is_that_of_many_tensors_at_once():
    found = []
    for fused in (True, False):
        _, _, engine = prepared("mdlm", fused)
        for step in range(3):
            give_gradients(engine, 1e-3 * (step + 1))
            engine.step(clip_norm=0.05)
        found.append(state(engine))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_updates_nothing_from_then_on(bad, optimizer):
    _, _, engine = prepared("mdlm", optimizer=optimizer)
    give_gradients(engine)
    engine.step(1.0)
    engine.check_finite()
    before = state(engine)
    give_gradients(engine)
    engine.held[1].grad.view(-1)[0] = bad
    engine.step(1.0)  # it does not wait to know
    with pytest.raises(NotFinite) as now:
        engine.check_finite()
    assert now.value.steps_ago == 0
    give_gradients(engine)
    with pytest.raises(NotFinite) as late:
        engine.step(1.0)
    assert late.value.steps_ago == 1
    after = state(engine)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_saved_fused_state_goes_on_bit_for_bit():
    runs = [prepared("mdlm")[2] for _ in range(2)]
    for engine in runs:
        give_gradients(engine)
        engine.step(1.0)
    saved = state(runs[0])
    keys = [name for name, _ in runs[0].optimizer_state()]
    runs[1].load_optimizer_state(keys, saved.__getitem__)
    for engine in runs:
        give_gradients(engine, 2e-3)
        engine.step(1.0)
    first, second = map(state, runs)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def one_step(mesh, objective, engine, pieces) -> tuple[torch.Tensor, torch.Tensor, Interval]:
    """As the training loop makes it."""
    device = engine.held[0].device
    interval, gradients = Interval(device), Gradients(objective, engine, "fp32", None)
    pieces = [(batch.to(device), noise.to(device)) for batch, noise in pieces]
    count = mesh.data.all_reduce_sum(sum(objective.num_scored(*piece) for piece in pieces))
    sums = gradients.add_up(pieces, count)
    sums.reduce(mesh.reduction, mesh.data, mesh.pipeline)
    norm = engine.step(1.0)
    with torch.no_grad():
        objective.update_state(sums.statistics)
    interval.add(sums)
    return norm, count, interval


@pytest.mark.parametrize(("name", "optimizer"), OPTIMIZED)
def test_a_step_asks_the_device_nothing(name, optimizer):
    """Every system, from clean tokens to updated weights: on a GPU the host runs ahead of it."""
    run, pieces = prepared(name, optimizer=optimizer), micro_batches(2)
    with Waits() as waits:
        norm, count, interval = one_step(*run, pieces)
    assert waits.found == []
    assert norm.item() > 0 and interval.read().count == count.item()


def test_the_detector_detects():
    with Waits() as waits:
        x = torch.arange(4)
        x.sum().item(), x[x > 1], x.nonzero()
    assert len(waits.found) == 3


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "optimizer"), OPTIMIZED)
def test_no_step_waits_for_a_gpu(name, optimizer):
    """The third: the first ones compile, allocate and choose algorithms."""
    with torch.device("cuda"):
        run = prepared(name, optimizer=optimizer)
    pieces = micro_batches(2)
    for _ in range(2):
        one_step(*run, pieces)
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm, count, interval = one_step(*run, pieces)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert norm.item() > 0 and interval.read().count == count.item()
