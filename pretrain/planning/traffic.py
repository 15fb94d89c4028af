"""What a process sends in one optimizer step, by kind, and how long that takes. Sources: this package's docstring."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from braid.parallel.plan import ParallelConfig
from braid.pretrain.config.schema import Config

from .activations import FLOAT, HALF
from .hardware import GPU
from .memory import Load, state_bytes

LINK_EFFICIENCY = 0.8
"""Share of a link's speed on paper that large messages are assumed to reach."""


@dataclass(frozen=True)
class Axis:
    """The processes that share one thing: how many, how far apart in rank, how many of them in one node at least."""

    name: str
    size: int
    stride: int
    in_node: int

    @property
    def crosses_nodes(self) -> bool:
        return self.in_node < self.size

    @property
    def ranks(self) -> list[int]:
        """Of the first group."""
        return list(range(0, self.size * self.stride, self.stride))


def plan_axes(plan: ParallelConfig, num_processes: int, gpus_per_node: int) -> dict[str, Axis]:
    """The axes by name, and `reduction`: data and context together, the ranks with the same weights. An axis counts as
    its worst group does, the one with the fewest members in some node."""
    data = plan.data(num_processes)
    sizes = {"tensor": plan.tensor, "context": plan.context, "data": data, "pipeline": plan.pipeline}
    axes, stride = {}, 1
    for name, size in sizes.items():
        axes[name] = Axis(name, size, stride, _fewest_in_a_node(size, stride, num_processes, gpus_per_node))
        stride *= size
    size, stride = plan.context * data, plan.tensor
    axes["reduction"] = Axis("reduction", size, stride, _fewest_in_a_node(size, stride, num_processes, gpus_per_node))
    return axes


def _fewest_in_a_node(size: int, stride: int, num_processes: int, gpus_per_node: int) -> int:
    """Fewest members that a group of the axis has in a node where it has any."""
    firsts = (rank for rank in range(num_processes) if rank // stride % size == 0)
    nodes = (Counter((first + stride * index) // gpus_per_node for index in range(size)) for first in firsts)
    return min(min(members.values()) for members in nodes)


@dataclass(frozen=True)
class Traffic:
    """One kind of communication of one process in one optimizer step."""

    kind: str
    operation: str
    axis: str
    sent: float
    """Bytes."""
    seconds: float | None
    """None where the link's speed is not known."""
    hidden: bool
    """May run beside computation."""


def stage_traffic(load: Load, config: Config, axes: dict[str, Axis], gpu: GPU, num_micro_batches: int) -> list[Traffic]:
    """What a process of this stage sends. The costs of the load are those of a process as the plan divides it."""
    found = [
        *_tensor(load, config, axes["tensor"], num_micro_batches),
        *_context(load, config, axes["context"], num_micro_batches),
        *_pipeline(load, config, axes["pipeline"], num_micro_batches),
        *_data(load, config, axes["reduction"], num_micro_batches),
        *_whole_matrices(load, config, axes),
    ]
    return [
        Traffic(kind, operation, axis.name, sent, _seconds(operation, sent, axis, gpu), hidden)
        for kind, operation, axis, sent, hidden in found
        if sent
    ]


Sent = tuple[str, str, Axis, float, bool]


def _tensor(load: Load, config: Config, axis: Axis, num_micro_batches: int) -> Iterator[Sent]:
    """Sums of the outputs of divided layers, forward, and of the gradients of their inputs, backward; with sequence
    parallelism each is a scatter here and a gather there, and the input is gathered once more for the weights."""
    plan, num_bytes = config.parallel, HALF if config.run.precision == "bf16" else FLOAT
    again = config.model.activation_checkpointing == "block"
    elements = sum(cost.reduced for cost in load.costs or [])
    ring = (axis.size - 1) / axis.size
    if plan.sequence:
        passes = 2 + 3 + 2 * again
        sent = passes * elements * num_bytes * ring * num_micro_batches
        yield "tensor", "gather, scatter", axis, sent, False
    else:
        sent = (1 + 1 + again) * elements * num_bytes * 2 * ring * num_micro_batches
        yield "tensor", "all-reduce", axis, sent, False


def _context(load: Load, config: Config, axis: Axis, num_micro_batches: int) -> Iterator[Sent]:
    """Queries, keys, values and outputs change hands (ulysses), or keys and values go to all (gather); the gradients
    the other way."""
    plan, num_bytes = config.parallel, HALF if config.run.precision == "bf16" else FLOAT
    passes = 2 + (config.model.activation_checkpointing == "block")
    elements = sum(cost.attended for cost in load.costs or []) / plan.tensor
    if plan.context_by == "ulysses":
        sent = passes * 4 * elements * num_bytes * (axis.size - 1) / axis.size * num_micro_batches
        yield "context", "all-to-all", axis, sent, False
    else:
        sent = passes * 2 * elements * num_bytes * (axis.size - 1) * num_micro_batches
        yield "context", "gather, scatter", axis, sent, False


def _pipeline(load: Load, config: Config, axis: Axis, num_micro_batches: int) -> Iterator[Sent]:
    """The state after each piece but the last goes on, the gradient of the state before each but the first goes back.
    Only the interleaved schedule computes meanwhile."""
    plan = config.parallel
    if plan.pipeline == 1 or not load.costs:
        return
    pieces = 2 * plan.virtual - (load.stage == 0) - (load.stage == plan.pipeline - 1)
    sent = pieces * max(cost.state for cost in load.costs) * num_micro_batches
    yield "pipeline", "send, receive", axis, sent, plan.overlap and plan.virtual > 1


def _data(load: Load, config: Config, axis: Axis, num_micro_batches: int) -> Iterator[Sent]:
    """Gradients are summed, and weights that were divided for the step come back."""
    plan, each = config.parallel, state_bytes(config.parallel, config.run.precision)
    ring = (axis.size - 1) / axis.size
    trained = [p for p in load.parameters if p.trained]
    hidden = plan.overlap and (plan.engine == "megatron" or plan.zero > 1)
    reduced, gathered = FLOAT * sum(p.held for p in trained) * ring, each.weights(trained) * ring
    if "state" not in each.divided:
        yield "gradients", "all-reduce", axis, 2 * reduced, hidden
    elif plan.engine == "megatron":
        yield "gradients", "scatter", axis, reduced, hidden
        yield "weights", "gather", axis, gathered, hidden
    elif plan.zero == 1:  # nothing is reduced before the last backward pass has ended
        yield "gradients", "scatter", axis, reduced, hidden
        yield "weights", "gather", axis, gathered, False
    else:  # gradients are divided, so each micro-batch's are sent, as they are computed
        yield "gradients", "scatter", axis, reduced * num_micro_batches, hidden
        if plan.zero == 3:  # they travel in the precision of the products, forward and backward
            of_matrix = HALF if config.run.precision == "bf16" else FLOAT
            once = sum(p.held * (of_matrix if p.is_matrix else FLOAT) for p in trained) * ring
            yield "weights", "gather", axis, once * 2 * num_micro_batches, hidden
        else:
            yield "weights", "gather", axis, gathered, False


def _whole_matrices(load: Load, config: Config, axes: dict[str, Axis]) -> Iterator[Sent]:
    """Muon makes its averages whole in float32: over the ranks that a matrix is cut on, and over the tensor axis. Where
    parameters are cut end to end, but for the ends each matrix lies on one rank, which orthogonalises it."""
    if config.optimizer.name != "muon":
        return
    plan, reduction, tensor = config.parallel, axes["reduction"], axes["tensor"]
    matrices = [p for p in load.parameters if p.trained and p.moments == 1]
    dealt = "state" in state_bytes(plan, config.run.precision).divided
    share = 1 / reduction.size if dealt else 1.0
    if plan.zero == 3:
        ring = (reduction.size - 1) / reduction.size
        yield "Muon", "gather, scatter", reduction, 2 * FLOAT * sum(p.held for p in matrices) * share * ring, False
    parts = sum(p.held for p in matrices if p.held < p.whole)
    yield "Muon", "gather", tensor, FLOAT * parts * share * (tensor.size - 1), False


def _seconds(operation: str, sent: float, axis: Axis, gpu: GPU) -> float | None:
    """Time to send so many bytes. A ring over several nodes crosses each of them through as many network cards as it
    has members there; of an all-to-all, what goes to other nodes leaves through the process's own."""
    if not axis.crosses_nodes:
        return gpu.link and sent / (gpu.link * LINK_EFFICIENCY)
    if gpu.network is None or gpu.link is None:
        return None
    if operation == "all-to-all":
        sent *= (axis.size - axis.in_node) / (axis.size - 1)
        return sent / (gpu.network * LINK_EFFICIENCY)
    members = axis.in_node if operation != "send, receive" else 1
    return sent / (min(gpu.link, members * gpu.network) * LINK_EFFICIENCY)
