"""One page of figures for people, and the same figures as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from braid.pretrain.config.schema import Config

from .estimate import Estimate, Machine, Stage
from .hardware import GIB
from .memory import USABLE
from .traffic import LINK_EFFICIENCY, Axis

WIDTH = 80
"""Columns of the page, for a file too."""
UNKNOWN = "n/a"
SHARED = {
    "tensor": "heads, MLP columns, vocabulary",
    "context": "the positions of a sequence",
    "data": "the rows of the global batch",
    "pipeline": "the blocks",
}
MOST_COLUMNS = 4


def as_json(recipe: str, machine: Machine, estimate: Estimate) -> dict[str, Any]:
    """Every figure of the page. Bytes, seconds, FLOPs."""
    figures = asdict(estimate)
    for stage, found in zip(figures["stages"], estimate.stages, strict=True):
        stage["memory"]["total"] = found.memory.total
    return {"recipe": recipe, "estimates": True, "machine": asdict(machine), **figures, "fits": estimate.fits}


def print_page(recipe: str, config: Config, machine: Machine, estimate: Estimate) -> None:
    """Print the page."""
    console = Console(highlight=False, width=WIDTH)
    gpu = machine.gpu
    nodes = -(-machine.num_gpus // machine.gpus_per_node)
    where = f"{nodes} nodes" if nodes > 1 else "one node"
    console.print(Text(f"{recipe}: {config.objective.name} on {machine.num_gpus} x {gpu.name}, {where}, "
                       f"{config.run.precision}", "bold"))  # fmt: skip
    console.print(Text("Estimates, nothing was run. Formulas and sources: pydoc braid.pretrain.planning", "dim"))
    for table in (
        _model(config, estimate),
        _layout(estimate),
        _plan(config, estimate),
        _memory(config, estimate),
        _traffic(estimate),
        _time(config, machine, estimate),
    ):
        console.print()
        console.print(table)
    for note in estimate.notes:
        console.print(Text(f"note: {note}", "yellow"))


def _model(config: Config, estimate: Estimate) -> Table:
    table = _pairs("model")
    parts = ", ".join(f"{name} {_count(n)}" for name, n in estimate.parameters.items() if n and name != "total")
    table.add_row("parameters", f"{_count(estimate.parameters['total'])}: {parts}")
    if config.parallel.tensor > 1:
        table.add_row("", f"{estimate.copies_share:.1%} of what the tensor axis holds are copies or padding")
    table.add_row("vocabulary", f"{estimate.vocabulary.size:,} ({estimate.vocabulary.source})")
    training, rows = config.training, config.data.sequence_length
    ranks = estimate.axes["data"].size
    table.add_row(
        "batch",
        f"{training.global_batch_size:,} rows of {rows:,} tokens = {_count(training.global_batch_size * rows)} tokens: "
        f"{estimate.num_micro_batches} micro-batches of {training.micro_batch_size} on {ranks} data-parallel ranks",
    )
    return table


def _layout(estimate: Estimate) -> Table:
    table = _table("layout")
    for column in ("axis", "size", "first group of ranks", "where", "what they share"):
        table.add_column(column, justify="right" if column == "size" else "left", header_style="dim")
    for name, what in SHARED.items():
        axis = estimate.axes[name]
        table.add_row(name, str(axis.size), _ranks(axis), _where(axis), what if axis.size > 1 else "")
    return table


def _plan(config: Config, estimate: Estimate) -> Table:
    """The rest of the plan: what no axis says."""
    plan, table = config.parallel, _pairs("")
    engine = plan.engine + (f", ZeRO {plan.zero}" if plan.engine == "deepspeed" else "")
    engine += f", offload to {plan.offload}" if plan.offload != "none" else ""
    table.add_row("engine", f"{engine}: {_divided(config, estimate)}")
    if plan.sequence:
        table.add_row("sequence parallel", "divides the activations between sharded layers along the positions")
    for index, stage in enumerate(estimate.stages if plan.pipeline > 1 else []):
        blocks = ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in stage.blocks)
        table.add_row(f"blocks of stage {index}", blocks)
    return table


def _memory(config: Config, estimate: Estimate) -> Table:
    """A column for each stage; of many, for the first, the fullest in between, and the last."""
    shown = estimate.stages
    if len(shown) > MOST_COLUMNS:
        fullest = max(shown[1:-1], key=lambda stage: stage.memory.total or 0.0)
        shown = [shown[0], fullest, shown[-1]]
    table = _table("memory of a process, GiB")
    table.add_column("")
    for stage in shown:
        table.add_column(f"stage {stage.memory.stage}" if len(estimate.stages) > 1 else "", justify="right")
    table.add_row("parameters it works with", *(_count(stage.memory.parameters) for stage in shown))
    for name in dict.fromkeys(name for stage in shown for name in stage.memory.held):
        table.add_row(name, *(_gib(stage.memory.held.get(name, 0.0)) for stage in shown))
    kept = "activations kept" + (", inputs of blocks" if config.model.activation_checkpointing == "block" else "")
    table.add_row(kept, *(_gib(stage.memory.activations) for stage in shown))
    block = "a block run again and differentiated" if config.model.activation_checkpointing == "block" else (
        "a block differentiated")  # fmt: skip
    for name, field in (("head and loss (1)", "head"), (f"{block} (1)", "block"), ("optimizer's step (2)", "step")):
        table.add_row(Text(name, "dim"), *(Text(_gib(getattr(stage.memory, field)), "dim") for stage in shown))
    table.add_row(Text("at the fullest moment", "bold"), *(_total(stage, estimate) for stage in shown))
    built = (Text(_gib(stage.memory.start), "dim") for stage in shown)
    table.add_row(Text("before, while the model is built", "dim"), *built)
    table.add_row(f"usable, {USABLE:.0%} of the GPU's", *(_gib(estimate.usable_memory) for _ in shown))
    host = max(stage.memory.host for stage in estimate.stages)
    if host:
        table.add_row("in the node's memory or disks", *(_gib(stage.memory.host) for stage in shown))
    table.caption = "(1) one of them at a time, beside the activations; (2) instead of activations and (1)"
    return table


def _traffic(estimate: Estimate) -> Table:
    table = _table("sent by a process in a step")
    for column in ("kind", "operation", "axis", "where", "GiB", "seconds", ""):
        table.add_column(column, justify="right" if column in ("GiB", "seconds") else "left", header_style="dim")
    busiest: dict[tuple[str, str], Any] = {}
    for traffic in (traffic for stage in estimate.stages for traffic in stage.traffic):
        key = (traffic.kind, traffic.operation)
        if key not in busiest or traffic.sent > busiest[key].sent:
            busiest[key] = traffic
    for traffic in busiest.values():
        axis = estimate.axes[traffic.axis]
        over = axis.name
        if over == "reduction":
            over = "data, context" if estimate.axes["context"].size > 1 else "data"
        hidden = "(3)" if traffic.hidden else ""
        table.add_row(
            traffic.kind, traffic.operation, over, _where(axis), _gib(traffic.sent), _seconds(traffic.seconds), hidden
        )
    if not busiest:
        table.add_row("nothing", "", "", "", "", "", "")
    if any(traffic.hidden for traffic in busiest.values()):
        table.caption = "(3) beside computation, where that takes long enough"
    return table


def _time(config: Config, machine: Machine, estimate: Estimate) -> Table:
    table, timing = _pairs("time and disk"), estimate.timing
    table.add_row("model FLOPs of a step", f"{estimate.model_flops:.3g}")
    if estimate.needed_flops != estimate.model_flops:
        table.add_row("with the head where it is scored", f"{estimate.needed_flops:.3g}")
    again = ", recomputation included" if config.model.activation_checkpointing == "block" else ""
    at = f"at {machine.efficiency:.0%} of the bf16 peak{again}"
    table.add_row("matrix products", f"{_seconds(timing.products)} s {at}")
    if config.parallel.pipeline > 1:
        waits = f"{timing.bubble:.2%} of the time; with these stages, which differ, {timing.waiting_share:.2%}"
        table.add_row("bubble of the pipeline", waits)
    links = f"at {LINK_EFFICIENCY:.0%} of the links' speed"
    table.add_row("communication not hidden", f"{_seconds(timing.exposed)} s {links}")
    speed = UNKNOWN if timing.tokens_per_second is None else f"{_count(timing.tokens_per_second)} tokens/s"
    utilisation = UNKNOWN if timing.mfu is None else f"{timing.mfu:.1%}"
    table.add_row("a step", f"{_seconds(timing.step)} s, {speed}, MFU {utilisation}")
    days = UNKNOWN if timing.total is None else (
        f"{timing.total / 86400:.3g} days, {timing.total * machine.num_gpus / 3600:,.0f} GPU hours")  # fmt: skip
    table.add_row(f"{config.training.steps:,} steps", days)
    groups = ", ".join(f"{name} {_gib(size)}" for name, size in estimate.checkpoint.items() if size and name != "total")
    table.add_row("a checkpoint", f"{_gib(estimate.checkpoint['total'])} GiB on disk: {groups}")
    keep = config.checkpoint.keep
    if keep:
        most = estimate.checkpoint["total"] * (keep + 1)
        table.add_row("", f"{_gib(most)} GiB with {keep} kept while the next is written")
    return table


def _table(title: str) -> Table:
    return Table(
        title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False,
        caption_justify="left", caption_style="dim",
    )  # fmt: skip


def _pairs(title: str) -> Table:
    table = _table(title)
    table.show_header = False
    table.add_column("", min_width=22)
    table.add_column("", overflow="fold")
    return table


def _divided(config: Config, estimate: Estimate) -> str:
    plan, ranks = config.parallel, estimate.axes["reduction"].size
    what = {
        "plain": "every rank has all of the optimizer's state",
        "megatron": f"optimizer state divided by {ranks}",
    }
    kinds = ("nothing", "optimizer state", "optimizer state, gradients", "optimizer state, gradients, weights")
    return what.get(plan.engine, f"{kinds[plan.zero]} divided by {ranks}")


def _total(stage: Stage, estimate: Estimate) -> Text:
    total = stage.memory.total
    if total is None or estimate.usable_memory is None:
        return Text(_gib(total), "bold")
    return Text(_gib(total), "bold green" if total <= estimate.usable_memory else "bold red")


def _where(axis: Axis) -> str:
    if axis.size == 1:
        return ""
    return f"{axis.in_node} in a node" if axis.crosses_nodes else "one node"


def _ranks(axis: Axis) -> str:
    ranks = axis.ranks
    if len(ranks) > 5:
        return f"{ranks[0]} {ranks[1]} {ranks[2]} ... {ranks[-1]}"
    return " ".join(map(str, ranks))


def _gib(size: float | None) -> str:
    return UNKNOWN if size is None else f"{size / GIB:,.2f}" if size < 100 * GIB else f"{size / GIB:,.1f}"


def _seconds(seconds: float | None) -> str:
    return UNKNOWN if seconds is None else f"{seconds:.3g}"


def _count(number: float) -> str:
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"
