"""What is wrong with a plan: everything that cannot be right, each with its arithmetic and two plans that fit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from braid.parallel.plan import CONTEXT_BY, ENGINES, OFFLOADS, STAGES, ParallelConfig, PlanFacts

EXAMPLE_DIR = "/local_nvme"


class PlanProblem(NamedTuple):
    """What is wrong, the arithmetic, and two plans that fit, as overrides."""

    message: str
    found: str
    change: str


def check_plan(plan: ParallelConfig, facts: PlanFacts, num_processes: int | None = None) -> list[PlanProblem]:
    """Everything that is wrong with a plan for `num_processes`, in the order of the fields.

    None is an unknown number: then only what no number could mend is a problem. Each plan proposed fits altogether, so
    that any one of them ends all problems; the fields that a problem is about are changed rather than others.
    """
    shaped, findings = _within_range(plan)
    world = num_processes or shaped.model_processes
    findings += [
        (rule, *told) for rules in RULES.values() for rule in rules if (told := rule.find(shaped, facts, world))
    ]
    problems = []
    for rule, message, found in findings:
        ways = _nearest(plan, shaped, facts, num_processes, rule.fields)
        problems.append(PlanProblem(message, found, ", or ".join(_overrides(way) for way in ways)))
    return problems


# The rules. A rule reads the fields of its group and those of the groups before it in RULES.

Told = tuple[str, str] | None


class _Rule(NamedTuple):
    fields: tuple[str, ...]
    find: Callable[[ParallelConfig, PlanFacts, int], Told]


def _processes(plan: ParallelConfig, facts: PlanFacts, world: int) -> Told:
    if world % plan.model_processes == 0:
        return None
    sizes = f"tensor {plan.tensor} x context {plan.context} x pipeline {plan.pipeline}"
    found = _quotient(f"{world} processes", world, sizes, plan.model_processes)
    return "parallel.tensor x context x pipeline must divide the number of processes", found


def _whole_layers(plan: ParallelConfig, facts: PlanFacts, world: int) -> Told:
    if facts.divisible or plan.model_processes == 1:
        return None
    found = f"parallel.tensor = {plan.tensor}, context = {plan.context}, pipeline = {plan.pipeline}"
    return "the layers of this network are another library's and cannot be divided among processes", found


def _heads(plan: ParallelConfig, facts: PlanFacts, world: int) -> Told:
    if facts.num_heads % plan.tensor == 0:
        return None
    found = _quotient(f"{facts.num_heads} heads", facts.num_heads, f"tensor {plan.tensor}", plan.tensor)
    return "parallel.tensor must divide model.num_heads: a process computes whole heads", found


def _mlp(plan: ParallelConfig, facts: PlanFacts, world: int) -> Told:
    if facts.mlp_width % plan.tensor == 0:
        return None
    found = _quotient(f"{facts.mlp_width} columns", facts.mlp_width, f"tensor {plan.tensor}", plan.tensor)
    return "parallel.tensor must divide the width of the MLP: a process holds as many columns as any other", found


def _context(plan: ParallelConfig, facts: PlanFacts, world: int) -> Told:
    text, prefix = facts.sequence_length - facts.prefix_length, facts.prefix_length
    streams = (text, "positions"), (prefix, "positions before the text"), (facts.num_slots, "latent slots")
    found = _uneven(streams, plan.context, f"context {plan.context}")
    return found and (
        "parallel.context must divide the sequence: a process holds as many positions as any other",
        found,
    )


def _pieces(plan: ParallelConfig, facts: PlanFacts, world: int) -> Told:
    if facts.num_units >= plan.pipeline:
        return None
    message = "every process of the pipeline needs a block"
    if facts.alternates:
        message = "every process of the pipeline needs a pair of blocks: two kinds alternate, which stay together"
    return message, _quotient(_units(facts), facts.num_units, f"pipeline {plan.pipeline}", plan.pipeline)


def _sequence(plan: ParallelConfig, facts: PlanFacts, world: int) -> Told:
    if not plan.sequence:
        return None
    if plan.tensor == 1:
        message = "parallel.sequence divides activations among the processes of the tensor axis, and there is only one"
        return message, "parallel.sequence = true, parallel.tensor = 1"
    streams = (facts.sequence_length, "positions"), (facts.num_slots, "latent slots")
    found = _uneven(streams, plan.tensor * plan.context, f"tensor {plan.tensor} x context {plan.context}")
    return found and ("parallel.sequence needs a sequence that tensor x context divides", found)


def _attention(plan: ParallelConfig, facts: PlanFacts, world: int) -> Told:
    by = f"parallel.context_by = {plan.context_by!r}"
    if plan.context == 1:
        ignored = plan.context_by != ParallelConfig.context_by
        return (f"{by} is ignored: one process holds every sequence", "parallel.context = 1") if ignored else None
    if plan.context_by == "gather" and facts.causal:
        message = (
            f"{by} is for networks that look both ways: of a causal one the first process would have next to no work"
        )
        return message, f"the network is causal, parallel.context = {plan.context}"
    if plan.context_by == "gather" or facts.num_heads % (plan.tensor * plan.context) == 0:
        return None
    divisor, size = f"tensor {plan.tensor} x context {plan.context}", plan.tensor * plan.context
    message = f"{by} needs heads that tensor x context divides: each process gets all positions of some of them"
    return message, _quotient(f"{facts.num_heads} heads", facts.num_heads, divisor, size)


def _interleaving(plan: ParallelConfig, facts: PlanFacts, world: int) -> Told:
    if plan.virtual == 1:
        return None
    if plan.pipeline == 1:
        message = "parallel.virtual is ignored: there is no pipeline whose pieces could be interleaved"
        return message, f"parallel.virtual = {plan.virtual}, parallel.pipeline = 1"
    size = plan.pipeline * plan.virtual
    if facts.num_units % size == 0:
        return None
    divisor = f"pipeline {plan.pipeline} x virtual {plan.virtual}"
    message = "the interleaved schedule needs equal pieces" + (" of pairs of blocks" if facts.alternates else "")
    return message, _quotient(_units(facts), facts.num_units, divisor, size)


def _batch(plan: ParallelConfig, facts: PlanFacts, world: int) -> Told:
    size, micro, ranks = facts.global_batch_size, facts.micro_batch_size, plan.data(world)
    together = micro * ranks
    if world % plan.model_processes or size % together == 0:
        return None
    kind = "" if plan.model_processes == 1 else "data-parallel "
    product = f"{micro} x {ranks} {kind}rank{'s' if ranks > 1 else ''}"
    found = f"{size} = {size // together} x ({product} = {together}) + {size % together}"
    if size < together:
        found = f"{size} is less than {product} = {together}"
    return f"training.global_batch_size must be a multiple of training.micro_batch_size x {kind}ranks", found


def _micro_batches(plan: ParallelConfig, facts: PlanFacts, world: int) -> Told:
    size, micro, ranks = facts.global_batch_size, facts.micro_batch_size, plan.data(world)
    if plan.virtual == 1 or plan.pipeline == 1 or world % plan.model_processes or size % (micro * ranks):
        return None
    number = size // (micro * ranks)
    if number % plan.pipeline == 0:
        return None
    found = f"{size} / ({micro} x {ranks} data-parallel ranks) = "
    found += _quotient(f"{number} micro-batches", number, f"pipeline {plan.pipeline}", plan.pipeline)
    message = "the interleaved schedule goes through micro-batches in rounds of one for every pipeline process"
    return message, found


def _zero(plan: ParallelConfig, facts: PlanFacts, world: int) -> Told:
    given = f"parallel.zero = {plan.zero}, parallel.engine = {plan.engine!r}"
    if plan.engine != "deepspeed":
        return ("parallel.zero is DeepSpeed's: no other engine has stages", given) if plan.zero else None
    if plan.zero == 0 and facts.precision == "bf16":
        message = "DeepSpeed without ZeRO does not do bf16: its own optimizer for it is off by one step, and under "
        return message + "autocast it would be the plain engine", f"{given}, run.precision = 'bf16'"
    if plan.zero < 2 or plan.pipeline == 1:
        return None
    given = f"parallel.zero = {plan.zero}, parallel.pipeline = {plan.pipeline}"
    if plan.zero == 3:
        return (
            "ZeRO 3 under a pipeline waits for ever: each forward pass has a broadcast that all processes join",
            given,
        )
    message = (
        "ZeRO 2 under a pipeline reduces a gradient once for every micro-batch, which DeepSpeed refuses; kept whole "
    )
    return message + "until the last one it would save nothing over ZeRO 1", given


def _offload(plan: ParallelConfig, facts: PlanFacts, world: int) -> Told:
    given = f"parallel.offload = {plan.offload!r}, parallel.zero = {plan.zero}"
    if plan.offload == "nvme" and 0 < plan.zero < 3:
        return "DeepSpeed writes to a disk at stage 3 alone; below it the state would stay on the CPU", given
    if plan.offload == "none" or plan.zero:
        return None
    return "parallel.offload moves what ZeRO divides", given


def _offload_dir(plan: ParallelConfig, facts: PlanFacts, world: int) -> Told:
    given = f"parallel.offload = {plan.offload!r}, parallel.offload_dir = {plan.offload_dir!r}"
    if plan.offload == "nvme" and not plan.offload_dir.strip():
        return "parallel.offload = 'nvme' needs a folder on a local disk", given
    if plan.offload != "nvme" and plan.offload_dir:
        return "parallel.offload_dir is ignored: nothing is put there", given
    return None


def _fused(plan: ParallelConfig, facts: PlanFacts, world: int) -> Told:
    if not plan.fused_accumulation or plan.engine == "megatron":
        return None
    found = f"parallel.fused_accumulation = true, parallel.engine = {plan.engine!r}"
    return "only engine = 'megatron' has sums that products can add gradients to", found


LAYOUT, BATCH = ("tensor", "context", "pipeline"), ("global_batch_size", "micro_batch_size")
RULES: dict[str, tuple[_Rule, ...]] = {
    "layout": (
        _Rule(LAYOUT, _processes),
        _Rule(LAYOUT, _whole_layers),
        _Rule(("tensor",), _heads),
        _Rule(("tensor",), _mlp),
        _Rule(("context",), _context),
        _Rule(("pipeline",), _pieces),
    ),
    "sequence": (_Rule(("sequence", "tensor"), _sequence),),
    "attention": (_Rule(("context", "context_by"), _attention),),
    "schedule": (
        _Rule(("pipeline", "virtual"), _interleaving),
        _Rule(BATCH, _batch),
        _Rule((*BATCH, "virtual"), _micro_batches),
    ),
    "engine": (
        _Rule(("engine", "zero"), _zero),
        _Rule(("offload", "zero", "engine"), _offload),
        _Rule(("offload", "offload_dir"), _offload_dir),
        _Rule(("fused_accumulation", "engine"), _fused),
    ),
}
COUNTS, CHOICES = ("tensor", "context", "pipeline", "virtual"), {
    "context_by": CONTEXT_BY,
    "engine": ENGINES,
    "zero": STAGES,
    "offload": OFFLOADS,
}  # fmt: skip


def _within_range(plan: ParallelConfig) -> tuple[ParallelConfig, list[tuple[_Rule, str, str]]]:
    """The plan with neutral values where a field has an impossible one, and a finding for each of those."""
    findings, neutral = [], ParallelConfig()
    for field in (*COUNTS, *CHOICES):
        value = getattr(plan, field)
        if field in COUNTS and value < 1:
            message = f"parallel.{field} = {value} must be at least 1"
        elif field in CHOICES and value not in CHOICES[field]:
            message = f"parallel.{field} = {value!r} is not one of {', '.join(map(str, CHOICES[field]))}"
        else:
            continue
        findings.append((_Rule((field,), lambda *_: None), message, ""))
        plan = replace(plan, **{field: getattr(neutral, field)})
    return plan, findings


def _quotient(dividend: str, number: int, divisor: str, size: int) -> str:
    divisor = f"({divisor})" if " x " in divisor else divisor
    return f"{dividend} / {divisor} = {number / size:g}"


def _units(facts: PlanFacts) -> str:
    return f"{facts.num_layers} blocks" + (f" = {facts.num_units} pairs" if facts.alternates else "")


def _uneven(streams: Iterable[tuple[int, str]], size: int, divisor: str) -> str:
    """The arithmetic of the first stream of positions that `size` does not divide; empty where it divides them all."""
    for number, what in streams:
        if number % size:
            return _quotient(f"{number} {what}", number, divisor, size)
    return ""


# The nearest plans that fit. Once the layout (tensor, context, pipeline) is fixed, the other groups of rules do not
# depend on each other, so that each is searched by itself, for every layout.

Change = dict[str, int | str | bool]
NUM_WAYS = 2
FOREIGN = 4.0
"""How much dearer it is to change a field that a problem is not about."""


def _nearest(
    given: ParallelConfig, plan: ParallelConfig, facts: PlanFacts, num_processes: int | None, about: tuple[str, ...]
) -> list[Change]:
    """The cheapest changes to `given` that fit; `plan` is the same with its impossible values put right."""

    def price(change: Change) -> float:
        total = 0.0
        for field, value in change.items():
            old = getattr(facts if field in BATCH else plan, field)
            if value != old:
                numeric = field in (*COUNTS, *BATCH)
                distance = abs(math.log2(value / old)) if numeric else abs(value - old) / 2 if field == "zero" else 0
                total += (1 + distance) * (1 if field in about else FOREIGN)
        return total

    found: list[tuple[float, Change]] = []
    cheapest: dict[tuple, list[Change]] = {}  # of a group's options, by what of the layout they depend on
    for layout in sorted(_layouts(plan, facts, num_processes), key=price):
        if len(found) == NUM_WAYS and price(layout) >= found[-1][0]:
            break
        shaped = replace(plan, **layout)
        world = num_processes or shaped.model_processes
        if not _fits("layout", shaped, facts, world, {}):
            continue
        keys = {
            "sequence": (shaped.tensor, shaped.context),
            "attention": (shaped.tensor, shaped.context),
            "engine": (shaped.pipeline,),
            "schedule": (shaped.pipeline, shaped.data(world)),
        }
        choices, least = [], price(layout)
        for key in keys.items():
            if key not in cheapest:
                options = sorted(_options(key[0], shaped, facts, world), key=price)
                fitting = (option for option in options if _fits(key[0], shaped, facts, world, option))
                cheapest[key] = list(itertools.islice(fitting, NUM_WAYS))
            choices.append(cheapest[key])
            least += price(choices[-1][0]) if choices[-1] else math.inf
            if len(found) == NUM_WAYS and least >= found[-1][0]:
                break
        else:
            for parts in itertools.product(*choices):
                change = layout | {field: value for part in parts for field, value in part.items()}
                found.append((price(change), change))
        found = sorted(found, key=lambda pair: pair[0])[:NUM_WAYS]
    return [
        {f: value for f, value in change.items() if value != getattr(facts if f in BATCH else given, f)}
        for _, change in found
    ]


def _fits(group: str, plan: ParallelConfig, facts: PlanFacts, world: int, change: Change) -> bool:
    batch = {field: value for field, value in change.items() if field in BATCH}
    plan = replace(plan, **{field: value for field, value in change.items() if field not in BATCH})
    return not any(rule.find(plan, replace(facts, **batch), world) for rule in RULES[group])


def _layouts(plan: ParallelConfig, facts: PlanFacts, num_processes: int | None) -> Iterator[Change]:
    """Every (tensor, context, pipeline) that the number of processes allows; where it is unknown, those up to twice
    what is given."""
    most = [num_processes or 2 * getattr(plan, axis) for axis in LAYOUT]
    for tensor in _divisors(facts.num_heads, most[0]):
        for context in _divisors(facts.sequence_length, most[1]):
            for pipeline in range(1, min(most[2], facts.num_units) + 1):
                if num_processes is None or num_processes % (tensor * context * pipeline) == 0:
                    yield {"tensor": tensor, "context": context, "pipeline": pipeline}


def _options(group: str, plan: ParallelConfig, facts: PlanFacts, world: int) -> Iterable[Change]:
    """What the fields of a group of rules may become."""
    match group:
        case "sequence":
            return [{"sequence": value} for value in (False, True)]
        case "attention":
            return [{"context_by": value} for value in CONTEXT_BY]
        case "schedule":
            return _schedules(plan, facts, world)
    names = ("engine", "zero", "offload", "offload_dir", "fused_accumulation")
    folders = dict.fromkeys((plan.offload_dir, EXAMPLE_DIR, ""))
    engines = itertools.product(ENGINES, STAGES, OFFLOADS, folders, dict.fromkeys((plan.fused_accumulation, False)))
    return [dict(zip(names, values, strict=True)) for values in engines]


def _schedules(plan: ParallelConfig, facts: PlanFacts, world: int) -> Iterator[Change]:
    """Numbers of pieces, each with the batches nearest to the one given."""
    size, micro, ranks = facts.global_batch_size, facts.micro_batch_size, plan.data(world)
    for virtual in range(1, facts.num_units // plan.pipeline + 1 if plan.pipeline > 1 else 2):
        rounds = ranks * (plan.pipeline if virtual > 1 else 1)
        fitting = [n for n in range(max(1, micro // 4), micro + 1) if size % (rounds * n) == 0]
        for smaller in {micro, 1, *fitting[-1:]}:
            below = size // (rounds * smaller)
            for number in (below, below + 1, below + 2):
                if number:
                    whole = number * rounds * smaller
                    yield {"virtual": virtual, "global_batch_size": whole, "micro_batch_size": smaller}


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def _overrides(change: Change) -> str:
    sections = {field: "training" if field in BATCH else "parallel" for field in change}
    values = {field: str(value).lower() if isinstance(value, bool) else str(value) for field, value in change.items()}
    return " ".join(f"{sections[field]}.{field}={values[field]}" for field in change)
