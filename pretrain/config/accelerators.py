"""The section `accelerators`: what is computed by another library's kernels, and when that cannot be right."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from braid.pretrain.config.check import Check
from braid.pretrain.config.packing import DOCUMENT_PACKINGS

if TYPE_CHECKING:
    from braid.pretrain.config.schema import Config

LIBRARIES = {
    "attention": ("torch", "flash-attn", "flash-attn-3"),
    "norms": ("torch", "apex"),
    "optimizer": ("torch", "apex"),
    "linears": ("torch", "transformer-engine"),
}
FP8_MULTIPLE, FLASH_HEAD_DIM = 16, 256
"""What both sides of an fp8 product must be a multiple of; the widest head that flash-attn takes."""


@dataclass(frozen=True, kw_only=True)
class AcceleratorsConfig:
    """Which library computes what, on a GPU. One that is asked for and not there is an error; see `braid doctor`."""

    attention: str = "torch"
    """`torch` (its scaled_dot_product_attention: cuDNN's kernels first from Hopper on, FlashAttention's elsewhere),
    or a package: `flash-attn` (FlashAttention 2), `flash-attn-3` (its successor for Hopper)."""
    norms: str = "torch"
    """LayerNorm and RMSNorm: `torch`, or `apex` (its fused kernels, in float32 as torch's)."""
    optimizer: str = "torch"
    """AdamW: `torch`, or `apex` (its FusedAdam); checkpoints of both are the same."""
    linears: str = "torch"
    """Linear layers of the blocks in training: `torch`, or `transformer-engine` (in fp8, each tensor scaled by its own
    largest value). Weights stay float32; sampling and validation stay bf16."""


def check_accelerators(check: Check, config: Config) -> None:
    """What is wrong whatever the machine is."""
    given = config.accelerators
    for field, libraries in LIBRARIES.items():
        check.one_of(f"accelerators.{field}", getattr(given, field), libraries)
    asked = [
        f"accelerators.{f.name} = {getattr(given, f.name)!r}"
        for f in fields(given)
        if getattr(given, f.name) != "torch"
    ]
    if not asked:
        return
    if config.run.device == "cpu":
        check.add("accelerators are for GPUs", f"{', '.join(asked)}, run.device = 'cpu'", "run.device=cuda, or torch")
    if config.objective.name == "t5" and given.optimizer == "torch":
        check.add("the network of objective.name = 't5' is another library's, which computes it", ", ".join(asked))
    if given.attention != "torch":
        _attention(check, config)
    if given.norms == "apex" and config.model.compile:
        found = "accelerators.norms = 'apex', model.compile = true"
        check.add("compiled blocks have fused norms of their own", found, "accelerators.norms=torch")
    if given.optimizer == "apex":
        _optimizer(check, config)
    if given.linears == "transformer-engine":
        _linears(check, config)


def _attention(check: Check, config: Config) -> None:
    library, model = config.accelerators.attention, config.model
    asked = f"accelerators.attention = {library!r}"
    if config.run.precision != "bf16":
        check.add(
            f"{library} computes in bf16", f"{asked}, run.precision = {config.run.precision!r}", "run.precision=bf16"
        )
    if config.objective.name == "elf":
        found = f"{asked}, objective.name = 'elf'"
        check.add(f"{library} takes no mask, and ELF hides padding by one", found, "accelerators.attention=torch")
    elif config.data.packing in DOCUMENT_PACKINGS:
        found = f"{asked}, data.packing = {config.data.packing!r}"
        change = "accelerators.attention=torch, or data.packing=wrap or stream"
        check.add(f"{library} takes no mask, and rows of documents hide padding and each other by one", found, change)
    if model.num_heads > 0 and model.width > FLASH_HEAD_DIM * model.num_heads:
        found = f"model.width / model.num_heads = {model.width} / {model.num_heads} = {model.width / model.num_heads:g}"
        check.add(f"{library} takes heads of at most {FLASH_HEAD_DIM}", found, "a larger model.num_heads")


def _optimizer(check: Check, config: Config) -> None:
    asked = "accelerators.optimizer = 'apex'"
    if config.optimizer.name != "adamw":
        found = f"{asked}, optimizer.name = {config.optimizer.name!r}"
        check.add("apex has an AdamW, and no Muon", found, "optimizer.name=adamw")
    if config.parallel.engine != "plain":
        found = f"{asked}, parallel.engine = {config.parallel.engine!r}"
        message = "this engine divides the optimizer's state, which is tried with torch's AdamW alone"
        check.add(message, found, "accelerators.optimizer=torch, or parallel.engine=plain")


def _linears(check: Check, config: Config) -> None:
    asked, model, plan = "accelerators.linears = 'transformer-engine'", config.model, config.parallel
    if config.run.precision != "bf16":
        check.add(
            "layers in fp8 take and give bf16",
            f"{asked}, run.precision = {config.run.precision!r}",
            "run.precision=bf16",
        )
    if model.compile:
        check.add("layers in fp8 are not compiled", f"{asked}, model.compile = true", "model.compile=false")
    if plan.tensor > 1:
        found = f"{asked}, parallel.tensor = {plan.tensor}"
        check.add("divided layers are Megatron-core's, which are not in fp8 here", found, "parallel.tensor=1")
    if plan.engine != "plain":
        found = f"{asked}, parallel.engine = {plan.engine!r}"
        check.add("layers in fp8 keep their weights themselves, which this engine lays elsewhere", found)
    experts = getattr(config.objective, "experts", None)
    if getattr(config.objective, "architecture", "") == "moedit" and experts.per_token < experts.num:
        found = f"{asked}, objective.experts.per_token = {experts.per_token} of {experts.num}"
        check.add("the weights of experts that are chosen are stacked, and no layers of their own", found)
    is_elf = config.objective.name == "elf"
    rows = config.training.micro_batch_size
    hidden = int(model.width * model.mlp_ratio * 2 / 3) if is_elf else round(model.width * model.mlp_ratio)
    # Of a stream of positions; slots are one beside the tokens. ELF has twelve tokens before the text.
    lengths = {"positions": config.data.sequence_length + (12 if is_elf else 0)}
    if slots := getattr(config.objective, "num_slots", 0):
        lengths["slots"] = slots
    sizes = {"model.width": model.width, "the width of the MLP": hidden}
    sizes |= {
        f"training.micro_batch_size x {name} of a process": rows * n / plan.context for name, n in lengths.items()
    }
    for what, size in sizes.items():
        if size % FP8_MULTIPLE:
            found = f"{what} = {size:g} = {size // FP8_MULTIPLE:g} x {FP8_MULTIPLE} + {size % FP8_MULTIPLE:g}"
            check.add(f"products in fp8 need sizes that are multiples of {FP8_MULTIPLE}", found)
