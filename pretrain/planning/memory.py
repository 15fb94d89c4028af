"""Bytes of GPU memory that each process of a plan needs, by item. The sources are in this package's docstring."""

from __future__ import annotations

from dataclasses import dataclass

from braid.kernels.linear_loss import TOKENS_ADDED, aligned, chunk_rows
from braid.parallel.data_parallel import BUCKET_BYTES
from braid.parallel.plan import ParallelConfig
from braid.pretrain.config.schema import Config

from .activations import FLOAT, HALF, Cost
from .network import PlannedParameter

USABLE = 0.92
"""Share of a GPU's memory that a plan may count on; the rest is the driver's, NCCL's and lost between allocations."""
DEEPSPEED_BUCKET = 5e8
"""Elements of DeepSpeed's default buckets for reducing and gathering."""
DEEPSPEED_SMALL = 1e5
"""Elements up to which ZeRO 3 keeps a weight whole between uses, by default."""
IN_CHUNKS = ("replaid",)
"""Objectives whose loss is left to autograd, a chunk of logits at a time (`TokenLogits.in_chunks`)."""
LOGIT_TENSORS = 4
"""Float32 tensors of a chunk's shape that exist then: the logits, their log-probabilities, and the gradients after and
before the softmax."""
DIVERGENCE_TENSORS = {"duo": 2, "gidd": 2}
"""Float32 tensors of a chunk's shape that a loss of all probabilities takes beside them."""


@dataclass(frozen=True)
class StateBytes:
    """Bytes per parameter of what outlives a step, and which of it the ranks with the same weights divide."""

    matrices: int
    """Of the weights that autocast would cast in every use."""
    master: tuple[int, int]
    """Of the float32 copies that the optimizer steps, where the weights are not they: of matrices, and of all else."""
    copies: int
    """Of the bf16 copies of float32 matrices that autocast makes."""
    divided: frozenset[str]
    """Of `weights`, `gradients` (float32) and `state` (master copies, moments, average)."""

    def weights(self, parameters: list[PlannedParameter]) -> int:
        """Bytes of the weights; all but matrices are float32."""
        return sum(p.held * (self.matrices if p.is_matrix else FLOAT) for p in parameters)

    def masters(self, parameters: list[PlannedParameter]) -> int:
        """Bytes of the master copies."""
        return sum(p.held * self.master[0 if p.is_matrix else 1] for p in parameters if p.trained)


def state_bytes(plan: ParallelConfig, precision: str) -> StateBytes:
    """How an engine keeps weights and optimizer state.

    `plain` (and DeepSpeed without ZeRO): float32 under autocast, everything on every rank. `megatron`, bf16: matrices
    bf16, the state divided. `deepspeed`: float32 under autocast, from stage 2 gradients divided and from stage 3
    weights; it keeps a float32 copy of its part besides.
    """
    half = precision == "bf16"
    copies = HALF if half and plan.zero < 3 else 0  # the linear layers of stage 3 are DeepSpeed's, and keep none
    if plan.engine == "megatron":
        return StateBytes(HALF, (FLOAT, 0), 0, frozenset({"state"})) if half else (
            StateBytes(FLOAT, (0, 0), 0, frozenset({"state"})))  # fmt: skip
    if plan.engine == "plain" or plan.zero == 0:
        return StateBytes(FLOAT, (0, 0), copies, frozenset())
    divided = {"state"} | ({"gradients"} if plan.zero >= 2 else set()) | ({"weights"} if plan.zero == 3 else set())
    return StateBytes(FLOAT, (FLOAT, FLOAT), copies, frozenset(divided))


@dataclass(frozen=True)
class Head:
    """The output layer of tokens on one process, and what it is called with in a micro-batch."""

    positions: int
    num_tokens: int
    """Of the vocabulary; those of this process."""
    width: int
    """Of what the layer reads."""

    @property
    def weights(self) -> int:
        """Elements of its matrix."""
        return self.num_tokens * self.width

    def loss_bytes(self, objective: str, *, half: bool, copied: bool) -> float:
        """While the loss of tokens is computed, and with it the gradients of what the layer reads and of its weights.
        `half` is bf16 autocast; `copied`: weights are float32 then, and are cast."""
        rows = chunk_rows(self.positions, self.num_tokens)
        if objective in IN_CHUNKS:
            each = FLOAT * LOGIT_TENSORS + HALF * half
            differentiated = each * rows * self.num_tokens + HALF * half * copied * self.weights
            if rows == self.positions:
                return differentiated
            # Beside a chunk the weights' gradient so far; then it, the chunk's own, and their sum.
            return max(FLOAT * self.weights + differentiated, 3 * FLOAT * self.weights)
        # Kept until the backward pass: both gradients. Beside them a chunk of logits, and what is made of it.
        kept = self.positions * self.width * (HALF if half else FLOAT) + FLOAT * self.weights
        chunk = rows * aligned(self.num_tokens)
        each, tensors = HALF if half else FLOAT, DIVERGENCE_TENSORS.get(objective, 0)
        each += FLOAT * (tensors + 1 if half and tensors else tensors)  # bf16 logits have a float32 copy there
        # The matrix that is multiplied, and some rows of a chunk's part of its gradient.
        cast = HALF * copied * self.weights + FLOAT * min(self.num_tokens, TOKENS_ADDED) * self.width
        return kept + each * chunk + (cast if half else 0)


@dataclass(frozen=True)
class Load:
    """What the processes of one pipeline stage work with."""

    stage: int
    parameters: list[PlannedParameter]
    costs: list[Cost] | None
    """Of its blocks, for one micro-batch and process, as the plan divides them; None where they are not known."""
    head: Head | None
    """None on a stage without."""
    head_kept: float
    """Bytes that the heads keep beside logits."""
    inputs_kept: float
    """Bytes of soft tokens, weights over the vocabulary, that one micro-batch keeps."""
    in_flight: float
    """Micro-batches that wait for their backward pass at the fullest moment."""


@dataclass(frozen=True)
class StageMemory:
    """Of one process of a pipeline stage, in bytes."""

    stage: int
    parameters: int
    """Elements that one process works with."""
    held: dict[str, float]
    """All the time."""
    activations: float | None
    """Kept for the backward pass of all micro-batches in flight; None where it is not known."""
    head: float
    """While the loss is differentiated."""
    block: float
    """While a block is differentiated: its gradients, and with recomputation what it keeps."""
    step: float
    """In the optimizer's step, when the activations are gone."""
    start: float
    """While the model is built and the rest of `held` is not there yet: the weights, float32; where they are divided,
    its part of them and one module whole."""
    host: float
    """Held in the memory of the node or on its disks (offload)."""

    @property
    def total(self) -> float | None:
        """GPU memory at the fullest moment."""
        if self.activations is None:
            return None
        later = sum(self.held.values()) + max(self.activations + max(self.head, self.block), self.step)
        return max(self.start, later)


def stage_memory(load: Load, config: Config, *, num_ranks: int, encoder_bytes: float) -> StageMemory:
    """Memory of one stage, whose weights `num_ranks` have and whose state they divide as the engine does."""
    plan, each = config.parallel, state_bytes(config.parallel, config.run.precision)
    share = {kind: num_ranks if kind in each.divided else 1 for kind in ("weights", "gradients", "state")}
    size = sum(p.held for p in load.parameters)
    trained = sum(p.held for p in load.parameters if p.trained)
    moments = sum(p.held * p.moments for p in load.parameters if p.trained)
    copies = each.copies * sum(p.held for p in load.parameters if p.is_matrix)
    if load.head:
        copies -= each.copies * load.head.weights  # it is gone with the loss
    recomputes = config.model.activation_checkpointing == "block"

    weights = {"weights": _part(each.weights(load.parameters), share["weights"])}
    state = {
        "float32 master weights": _part(each.masters(load.parameters), share["state"]),
        "Adam's moments" if config.optimizer.name == "adamw" else "Muon's momentum, Adam's moments": FLOAT
        * _part(moments, share["state"]),
        "average of the weights (EMA)": FLOAT * _part(size, share["state"]) if config.training.ema_decay else 0.0,
    }
    # Each micro-batch has copies of its own; blocks that run again make theirs again, one block at a time.
    kept_copies = each.copies * _largest_block(load) if recomputes else copies * load.in_flight
    offloaded = {} if plan.offload == "none" else state | (weights if plan.zero == 3 else {})
    held = {
        **weights,
        "bf16 copies of the matrices": kept_copies,
        "gradients": FLOAT * _part(trained, share["gradients"]),
        **state,
        "frozen encoder": encoder_bytes,
        "communication buffers": _buffers(load, config, size, num_ranks),
    }
    kept = again = gradients = 0.0
    if load.costs:
        kept = sum(cost.state if recomputes else cost.kept for cost in load.costs) * load.in_flight
        again = max(cost.kept for cost in load.costs) if recomputes else 0.0
        gradients = max(cost.state + cost.widest for cost in load.costs)
    # When the forward pass ends, the copies of all blocks are still there.
    loss, forward = 0.0, max(0.0, copies - kept_copies)
    if load.head:
        half = config.run.precision == "bf16"
        loss = load.head.loss_bytes(config.objective.name, half=half, copied=plan.engine != "megatron")
    kept += load.inputs_kept * load.in_flight
    start = encoder_bytes + FLOAT * size
    if "weights" in each.divided:
        start = encoder_bytes + FLOAT * _largest_module(load.parameters)
        start += weights["weights"] if plan.offload == "none" else 0.0
    return StageMemory(
        stage=load.stage,
        parameters=size,
        held={name: number for name, number in held.items() if number and name not in offloaded},
        activations=None if load.costs is None else kept + load.head_kept,
        head=max(loss, forward),
        block=again + gradients,
        step=FLOAT * _part(trained, share["state"]) if plan.offload == "none" else 0.0,
        start=start,
        host=sum(offloaded.values()),
    )


def micro_batches_in_flight(plan: ParallelConfig, stage: int, num_micro_batches: int) -> float:
    """Micro-batches whose activations a stage keeps at its fullest moment; a piece of an interleaved stage counts as
    its share of one.

    1F1B: one for this stage and one for each after it. Interleaved: the 2 (p - 1 - i) + (v - 1) p pieces of Megatron's
    warm-up, and one more.
    """
    after = plan.pipeline - 1 - stage
    if plan.virtual == 1:
        return min(after + 1, num_micro_batches)
    pieces = 2 * after + (plan.virtual - 1) * plan.pipeline + 1
    return min(pieces, num_micro_batches * plan.virtual) / plan.virtual


def _part(size: float, num_ranks: int) -> float:
    """Elements, or bytes, of parameters laid end to end and cut into `num_ranks` equal pieces, the last one padded."""
    return -(-size // num_ranks)


def _largest_block(load: Load) -> int:
    """Elements of the matrices of the largest block, and of those outside blocks; of an output layer only if it is
    called under autocast."""
    sizes = _by_place([parameter for parameter in load.parameters if parameter.is_matrix])
    blocks = [size for place, size in sizes.items() if isinstance(place, int)]
    outside = sum(size for place, size in sizes.items() if not isinstance(place, int))
    return max(blocks, default=0) + outside - (load.head.weights if load.head else 0)


def _largest_module(parameters: list[PlannedParameter]) -> int:
    """Elements of the module that has the most parameters of its own."""
    sizes: dict[str, int] = {}
    for parameter in parameters:
        module = parameter.name.rpartition(".")[0]
        sizes[module] = sizes.get(module, 0) + parameter.held
    return max(sizes.values())


def _by_place(parameters: list[PlannedParameter]) -> dict[int | str, int]:
    sizes: dict[int | str, int] = {}
    for parameter in parameters:
        sizes[parameter.place] = sizes.get(parameter.place, 0) + parameter.held
    return sizes


def _buffers(load: Load, config: Config, size: int, num_ranks: int) -> float:
    """Room that collectives need beside what they send from and to."""
    plan, room = config.parallel, 0.0
    if plan.engine == "plain" and num_ranks > 1:
        room += min(BUCKET_BYTES, FLOAT * size)
    elif plan.engine == "deepspeed":
        bucket = min(DEEPSPEED_BUCKET, size) * FLOAT
        room += bucket * (2 if plan.overlap and plan.zero > 1 else 1)  # one is filled while the other travels
        if plan.zero < 3:
            room += bucket
        else:  # the weights in use, those fetched ahead, and small ones, which stay
            room += FLOAT * sum(sorted(_by_place(load.parameters).values())[-2:])
            room += FLOAT * sum(p.held for p in load.parameters if p.held <= DEEPSPEED_SMALL)
    if plan.pipeline > 1 and load.costs:
        room += 4 * max(cost.state for cost in load.costs)  # to and from both neighbours
    return room
