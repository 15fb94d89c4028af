"""From a valid configuration to everything `braid plan` shows: sizes, layout, memory, traffic, time, disk."""

from __future__ import annotations

from dataclasses import dataclass, replace

from braid.parallel.plan import ParallelConfig, deal_blocks
from braid.pretrain.config.schema import Config
from braid.pretrain.model.elf_network import ELFNetwork
from braid.pretrain.model.flops import TrainingFlops
from braid.pretrain.objectives.base import Objective

from .activations import FLOAT, HALF, Cost, block_costs, head_bytes
from .facts import plan_facts
from .hardware import EFFICIENCY, GIB, GPU
from .memory import USABLE, Head, Load, StageMemory, micro_batches_in_flight, stage_memory
from .network import (
    PARTS,
    PlannedParameter,
    frozen_encoder_bytes,
    padding_share,
    planned_objective,
    planned_parameters,
)
from .schedule import pipeline_seconds, waiting_share
from .traffic import Axis, Traffic, plan_axes, stage_traffic
from .vocabulary import VocabularySize


@dataclass(frozen=True)
class Machine:
    """What the run is to be on."""

    num_gpus: int
    gpus_per_node: int
    gpu: GPU
    efficiency: float = EFFICIENCY


@dataclass(frozen=True)
class Stage:
    """One pipeline process (all processes with its index are alike)."""

    blocks: list[list[int]]
    """First and last block of each piece."""
    memory: StageMemory
    traffic: list[Traffic]
    flops: float
    """Of one process for one micro-batch, with recomputation."""


@dataclass(frozen=True)
class Timing:
    """Of one optimizer step, in seconds; None where the GPU is not known."""

    products: float | None
    """A process's matrix products, recomputation included."""
    bubble: float
    """Share of the time that a pipeline of equal stages waits."""
    waiting_share: float
    """The same of these stages, which may be uneven."""
    exposed: float | None
    """Communication that no computation hides."""
    step: float | None
    tokens_per_second: float | None
    mfu: float | None
    """Of the FLOPs that are needed, the head's at scored positions alone."""
    total: float | None
    """The whole run's."""


@dataclass(frozen=True)
class Estimate:
    """All figures. Bytes, seconds, FLOPs; of one process unless said otherwise."""

    parameters: dict[str, int]
    """Of the whole model by part, `total` last."""
    copies_share: float
    """Share of what the processes of the tensor axis hold that another of them holds too, or that is padding."""
    vocabulary: VocabularySize
    axes: dict[str, Axis]
    num_micro_batches: int
    stages: list[Stage]
    usable_memory: float | None
    model_flops: float
    """Of all processes for one optimizer step, recomputation left out, the head at every position."""
    needed_flops: float
    """The same with the head at the positions whose logits the loss needs."""
    timing: Timing
    checkpoint: dict[str, float]
    """Bytes on disk by group of tensors, and `total`."""
    notes: list[str]

    @property
    def fits(self) -> bool | None:
        """Whether every stage fits into the GPU's memory; None where that is not known."""
        totals = [stage.memory.total for stage in self.stages]
        if self.usable_memory is None or None in totals:
            return None
        return max(totals) <= self.usable_memory

    @property
    def overflow(self) -> str:
        """What the fullest stage needs, and what there is."""
        fullest = max((stage.memory for stage in self.stages), key=lambda memory: memory.total)
        held = fullest.held | {"activations": fullest.activations}
        largest = max(held, key=held.get)
        return (
            f"{fullest.total / GIB:.1f} GiB on stage {fullest.stage}, of {self.usable_memory / GIB:.1f} usable; "
            f"the most for: {largest} ({held[largest] / GIB:.1f})"
        )


def estimate(config: Config, machine: Machine, vocabulary: VocabularySize) -> Estimate:
    """Estimate a configuration without problems on `machine`."""
    plan = config.parallel
    objective = planned_objective(config, vocabulary.size)
    network, parameters = objective.network, planned_parameters(objective, config)
    axes = plan_axes(plan, machine.num_gpus, machine.gpus_per_node)
    rows = config.training.micro_batch_size * axes["data"].size
    num_micro_batches = config.training.global_batch_size // rows
    loads = _loads(config, objective, parameters, num_micro_batches)
    encoder_bytes = frozen_encoder_bytes(config, vocabulary.size)

    per_token = network.training_flops(config.data.sequence_length)
    extra = objective.extra_forward_passes / 3
    flops = [_stage_flops(load, config, per_token, extra, objective.token_share) for load in loads]
    stages = []
    for load, work in zip(loads, flops, strict=True):
        memory = stage_memory(load, config, num_ranks=axes["reduction"].size, encoder_bytes=encoder_bytes or 0.0)
        traffic = stage_traffic(load, config, axes, machine.gpu, num_micro_batches)
        stages.append(Stage(_pieces(config, load.stage), memory, traffic, work))

    tokens = config.training.global_batch_size * config.data.sequence_length
    model_flops = per_token.total * (1 + extra) * tokens
    needed_flops = per_token.needed(objective.token_share) * (1 + extra) * tokens
    return Estimate(
        parameters=_by_part(parameters),
        copies_share=padding_share(parameters, plan.tensor),
        vocabulary=vocabulary,
        axes=axes,
        num_micro_batches=num_micro_batches,
        stages=stages,
        usable_memory=machine.gpu.memory and machine.gpu.memory * USABLE,
        model_flops=model_flops,
        needed_flops=needed_flops,
        timing=_timing(config, machine, stages, num_micro_batches, needed_flops, tokens),
        checkpoint=_checkpoint(config, parameters, encoder_bytes),
        notes=_notes(config, axes, num_micro_batches, encoder_bytes, loads[0].costs is None),
    )


# -- the stages ------------------------------------------------------------------------------------------------------


def _pieces(config: Config, stage: int) -> list[list[int]]:
    dealt = _dealt(config)[stage]
    return [[piece[0], piece[-1]] for piece in dealt]


def _dealt(config: Config) -> list[list[tuple[int, ...]]]:
    plan, facts = config.parallel, plan_facts(config)
    return deal_blocks(facts.num_layers, plan.pipeline, plan.virtual, alternates=facts.alternates)


def _loads(
    config: Config, objective: Objective, parameters: list[PlannedParameter], num_micro_batches: int
) -> list[Load]:
    plan, half, network = config.parallel, config.run.precision == "bf16", objective.network
    sequences, length = config.training.micro_batch_size, config.data.sequence_length
    costs = block_costs(network, sequences=sequences, length=length, half=half)
    divided = costs and [divided_cost(cost, plan, HALF if half else FLOAT) for cost in costs]
    output = Head(
        positions=sequences * length // plan.context,
        num_tokens=-(-network.vocab_size // plan.tensor),
        width=network.latent_dim if isinstance(network, ELFNetwork) else network.config.width,
    )
    # Duo's curriculum shows the network weights over the vocabulary, which a product then keeps as it takes them.
    soft = getattr(config.objective, "curriculum_steps", 0) > 0
    soft_bytes = soft * output.positions * network.vocab_size * (FLOAT + (HALF if half else 0))
    # All networks but ELF's keep the hidden states of the head divided, too.
    spread = plan.tensor if plan.sequence and not isinstance(network, ELFNetwork) else 1
    head = head_bytes(network, costs, sequences=sequences, length=length, half=half) if costs else 0.0
    head /= plan.context * spread
    last = plan.pipeline - 1
    loads = []
    for stage, pieces in enumerate(_dealt(config)):
        blocks = [block for piece in pieces for block in piece]
        here = {*blocks, "every", *(["first"] if stage == 0 else []), *(["last"] if stage == last else [])}
        loads.append(
            Load(
                stage=stage,
                parameters=[parameter for parameter in parameters if parameter.place in here],
                costs=divided and [divided[block] for block in blocks],
                head=output if stage == last else None,
                head_kept=head if stage == last else 0.0,
                inputs_kept=soft_bytes if stage == 0 else 0.0,
                in_flight=micro_batches_in_flight(plan, stage, num_micro_batches),
            )
        )
    return loads


def divided_cost(cost: Cost, plan: ParallelConfig, num_bytes: int) -> Cost:
    """The cost of a block to one of the processes that share it (arXiv 2205.05198, 4). Gathered keys and values are
    kept by all."""
    outside = plan.context * (plan.tensor if plan.sequence else 1)
    gathered = 0.0
    if plan.context_by == "gather":
        gathered = 2 * cost.attended * num_bytes * (plan.context - 1) / (plan.context * plan.tensor)
    return replace(
        cost,
        state=cost.state / outside,
        outside=cost.outside / outside,
        inside=cost.inside / (plan.context * plan.tensor) + gathered,
        reduced=cost.reduced / plan.context,
        attended=cost.attended / plan.context,
        fixed=cost.fixed / plan.tensor,
        widest=cost.widest / (plan.context * plan.tensor),
    )


def _stage_flops(load: Load, config: Config, per_token: TrainingFlops, extra: float, token_share: float) -> float:
    """FLOPs of one process of the stage for one micro-batch, the head at the positions that need it. All blocks count
    alike."""
    tokens = config.training.micro_batch_size * config.data.sequence_length
    num_blocks = config.model.num_layers
    here = sum(len(piece) for piece in _dealt(config)[load.stage]) / num_blocks
    again = 1 / 3 if config.model.activation_checkpointing == "block" else 0.0
    blocks = (per_token.linear + per_token.attention + per_token.conditioning) * here
    head = token_share * per_token.head if load.head else 0.0
    return (
        (blocks * (1 + extra + again) + head * (1 + extra))
        * tokens
        / (config.parallel.tensor * config.parallel.context)
    )


# -- time and disk ---------------------------------------------------------------------------------------------------


def _timing(
    config: Config, machine: Machine, stages: list[Stage], num_micro_batches: int, needed_flops: float, tokens: int
) -> Timing:
    plan, training = config.parallel, config.training
    peak = machine.gpu.peak if config.run.precision == "bf16" else None
    bubble = waiting_share([1.0] * plan.pipeline, num_micro_batches, plan.virtual)
    waiting = waiting_share([stage.flops for stage in stages], num_micro_batches, plan.virtual)
    known = all(traffic.seconds is not None for stage in stages for traffic in stage.traffic)
    if peak is None:
        return Timing(None, bubble, waiting, None, None, None, None, None)
    speed = peak * machine.efficiency
    products = [stage.flops / speed for stage in stages]
    most = max(products) * num_micro_batches
    if not known:
        return Timing(most, bubble, waiting, None, None, None, None, None)
    micro, rest = zip(
        *(_exposed(s, p, plan, num_micro_batches) for s, p in zip(stages, products, strict=True)), strict=True
    )
    busy = [work + sent for work, sent in zip(products, micro, strict=True)]
    step = pipeline_seconds(busy, num_micro_batches, plan.virtual) + max(rest)
    return Timing(
        products=most,
        bubble=bubble,
        waiting_share=waiting_share(busy, num_micro_batches, plan.virtual),
        exposed=max(sent * num_micro_batches + end for sent, end in zip(micro, rest, strict=True)),
        step=step,
        tokens_per_second=tokens / step,
        mfu=needed_flops / (step * peak * machine.num_gpus),
        total=step * training.steps,
    )


def _exposed(stage: Stage, products: float, plan: ParallelConfig, num_micro_batches: int) -> tuple[float, float]:
    """Seconds of communication that nothing hides: of each micro-batch, and of gradients and weights once a step.

    The latter can hide behind the products of one micro-batch, the last or the first; where every micro-batch sends
    its gradients (ZeRO 2 and 3), behind all of them.
    """
    micro = end = hidden = 0.0
    for traffic in stage.traffic:
        of_step = traffic.axis == "reduction"
        if traffic.hidden and of_step:
            hidden += traffic.seconds
        elif of_step:
            end += traffic.seconds
        elif not traffic.hidden:
            micro += traffic.seconds / num_micro_batches
    window = products * (num_micro_batches if plan.zero >= 2 else 1)
    return micro, end + max(0.0, hidden - window)


def _checkpoint(config: Config, parameters: list[PlannedParameter], encoder_bytes: float | None) -> dict[str, float]:
    """Float32, whole tensors, whatever the layout."""
    whole = sum(parameter.whole for parameter in parameters)
    groups = {
        "weights": FLOAT * whole,
        "optimizer": FLOAT * sum(p.whole * p.moments for p in parameters if p.trained),
        "average": FLOAT * whole if config.training.ema_decay else 0,
        "encoder": encoder_bytes or 0.0,
    }
    return groups | {"total": sum(groups.values())}


def _by_part(parameters: list[PlannedParameter]) -> dict[str, int]:
    parts = {part: sum(p.whole for p in parameters if p.part == part) for part in PARTS}
    return parts | {"total": sum(parts.values())}


def _notes(
    config: Config, axes: dict[str, Axis], num_micro_batches: int, encoder_bytes: float | None, is_foreign: bool
) -> list[str]:
    """What a reader of the figures should know."""
    plan, notes = config.parallel, []
    if axes["tensor"].crosses_nodes:
        notes.append("the tensor axis crosses nodes: each block waits for the network several times")
    if plan.pipeline > 1 and num_micro_batches < plan.pipeline:
        notes.append(f"{num_micro_batches} micro-batches do not fill a pipeline of {plan.pipeline}")
    if not plan.batched_transfers:
        notes.append("interleaved over two processes: sends and receives go one by one, a batch would mix them up")
    if encoder_bytes is None:
        encoder = config.objective.encoder
        notes.append(f"the frozen encoder ({encoder.kind}: {encoder.path}) is not here: neither its memory nor its "
                     "passes are counted")  # fmt: skip
    if is_foreign:
        notes.append("the blocks are another library's: what they keep for the backward pass is not known here")
    if config.accelerators.linears == "transformer-engine":
        notes.append("layers in fp8 count as bf16: what Transformer Engine keeps and saves is not known here")
    if config.run.precision != "bf16":
        notes.append("the peak speeds known are for bf16, so a run in fp32 gets no times")
    return notes
