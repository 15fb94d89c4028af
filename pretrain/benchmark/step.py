"""A whole training step of masked diffusion: Braid's against the one that plain PyTorch is written in a page of.

All contenders train the same backbone on the same tokens with AdamW: forward and backward passes, clipping and update.

    plain       torch's own random numbers, logits of all positions, torch's default attention and optimizer
    compiled    the same, the whole network by torch.compile (on a GPU; `compile_plain` elsewhere)
    braid       what `braid pretrain` does: keyed noise, the head at masked positions alone, attention and update as it
                picks them, blocks compiled where the recipe or `compile_blocks` says so
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from braid.data_pipeline.loader import Batch
from braid.kernels.attention import use_attention
from braid.kernels.bench.measure import as_json, interleaved, machine
from braid.kernels.errors import ConfigError
from braid.parallel.data_parallel import World
from braid.parallel.mesh import Mesh, build_mesh
from braid.parallel.plan import ParallelConfig
from braid.pretrain.config.load import load_config
from braid.pretrain.config.schema import Config
from braid.pretrain.model.backbone import Backbone
from braid.pretrain.model.flops import TrainingFlops, mfu
from braid.pretrain.objectives.base import Noise
from braid.pretrain.objectives.build import build_objective
from braid.pretrain.objectives.mdlm import MDLM
from braid.pretrain.training.engines import build_engine
from braid.pretrain.training.gradients import Gradients
from braid.pretrain.training.optimizer import set_learning_rate
from braid.pretrain.training.precision import autocast

CPU_SIZES = ("model.width=128", "model.num_layers=4", "model.num_heads=4", "data.sequence_length=128")
"""What a CPU can step in reasonable time; a GPU gets the recipe as it is."""


def run(
    device: str = "cpu",
    *,
    recipe: str = "mdlm_small",
    overrides: tuple[str, ...] = (),
    vocab: int = 0,
    rows: int = 0,
    rounds: int = 20,
    seconds: float = 60.0,
    compile_blocks: bool | None = None,
    compile_plain: bool | None = None,
) -> dict[str, Any]:
    """Timings, tokens per second and model FLOPs utilisation of every contender, and the ratios to Braid's.

    Args:
        vocab: tokens, the mask among them; 0: 50,258 on a GPU, 4,096 elsewhere.
        rows: sequences of a step; 0: the recipe's micro-batch on a GPU, 4 elsewhere.
        compile_blocks, compile_plain: None: on a GPU alone.

    Raises ConfigError for a recipe that is not masked diffusion.
    """
    on = torch.device(device)
    compile_plain = on.type == "cuda" if compile_plain is None else compile_plain
    config, tokens, vocab = sized(recipe, overrides, on, vocab, rows, compile_blocks)
    rows, length = tokens.shape

    contenders = {"plain": plain_step(config, tokens, vocab, on, compiled=False)}
    if compile_plain:
        contenders["compiled"] = plain_step(config, tokens, vocab, on, compiled=True)
    contenders["braid"], flops = braid_step(config, tokens, vocab, build_mesh(World.single(on), config.parallel))
    timings = interleaved(contenders, on, rounds=rounds, warmup=3, seconds=seconds)
    peaks = {name: _peak_memory(contender, on) for name, contender in contenders.items()}
    use_attention("torch")
    speeds = {name: rows * length / timing.median_ms * 1e3 for name, timing in timings.items()}
    return {
        "machine": machine(on),
        "sizes": {"recipe": recipe, "overrides": list(overrides), **sizes(config, tokens, vocab)},
        "timings": as_json(timings),
        "tokens_per_second": speeds,
        "speedup": {name: speeds["braid"] / speed for name, speed in speeds.items() if name != "braid"},
        "mfu": {name: _utilisation(speed, flops, on) for name, speed in speeds.items()},
        "peak_memory_bytes": peaks,
    }


def sized(
    recipe: str, overrides: tuple[str, ...], on: torch.device, vocab: int, rows: int, compile_blocks: bool | None
) -> tuple[Config, torch.Tensor, int]:
    """The recipe at the sizes that are asked for, or that suit the device; tokens of that size, and their number."""
    is_gpu = on.type == "cuda"
    config = load_config(recipe, (*(() if is_gpu else (*CPU_SIZES, "run.precision=fp32")), *overrides))
    if config.objective.name != "mdlm":
        raise ConfigError(
            "the step benchmark compares masked diffusion",
            found=f"objective.name={config.objective.name}",
            change="a recipe of MDLM, such as mdlm_small or mdlm_8B",
        )
    vocab, rows = vocab or (50_258 if is_gpu else 4096), rows or (config.training.micro_batch_size if is_gpu else 4)
    compile_blocks = (is_gpu or config.model.compile) if compile_blocks is None else compile_blocks
    # Dropout is compared by nobody: plain torch and Braid would draw it by different means.
    config = replace(
        config,
        model=replace(config.model, dropout=0.0, compile=compile_blocks),
        parallel=ParallelConfig(),
        run=replace(config.run, device=on.type),
        training=replace(config.training, global_batch_size=rows, micro_batch_size=rows, ema_decay=0.0),
    )
    generator = torch.Generator().manual_seed(0)
    return config, torch.randint(vocab - 1, (rows, config.data.sequence_length), generator=generator), vocab


def sizes(config: Config, tokens: torch.Tensor, vocab: int) -> dict[str, Any]:
    """What was stepped."""
    return {
        "width": config.model.width,
        "layers": config.model.num_layers,
        "vocab": vocab,
        "rows": tokens.shape[0],
        "length": tokens.shape[1],
        "precision": config.run.precision,
        "compiled_blocks": config.model.compile,
    }


def plain_step(config: Config, tokens: torch.Tensor, vocab: int, device: torch.device, *, compiled: bool) -> Callable:
    """One step of a masked diffusion model as one writes it down: no more than torch, and all of the logits."""
    model, mask_id = replace(config.model, compile=False), vocab - 1
    with device:
        network = Backbone(model, vocab_size=vocab, causal=False, time_conditioned=False, seed=0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0)
    tokens = tokens.to(device)

    def logits(noised: torch.Tensor) -> torch.Tensor:
        return network(noised, None).logits

    predict = torch.compile(logits) if compiled else logits

    def step() -> None:
        use_attention("torch")  # in torch's own order
        times = torch.rand(len(tokens), 1, device=device).clamp(min=1e-3)
        masked = torch.rand(tokens.shape, device=device) < times
        with autocast(config.run.precision, device):
            found = predict(torch.where(masked, mask_id, tokens))
        nats = F.cross_entropy(found.flatten(0, 1).float(), tokens.flatten(), reduction="none").view_as(tokens)
        ((nats * masked / times).sum() / tokens.numel()).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def braid_step(
    config: Config, tokens: torch.Tensor, vocab: int, mesh: Mesh
) -> tuple[Callable[[], None], TrainingFlops]:
    """The training loop's step with the engine of `config`, in one process, and what its network counts as FLOPs of a
    token."""
    device = mesh.world.device
    special = SimpleNamespace(vocab_size=vocab, mask_id=vocab - 1, bos_id=0, eos_id=1)
    with device:
        objective = build_objective(config, special, None, device)
    objective.train()
    engine = build_engine(config, objective, mesh)
    set_learning_rate(engine.optimizer, 1.0)
    gradients = Gradients(objective, engine, config.run.precision, None)
    rows, consumed = len(tokens), 0

    def step() -> None:
        nonlocal consumed
        use_attention(config.accelerators.attention, device)
        ordinals = torch.arange(consumed, consumed + rows)
        noise = Noise.training(config.run.seed, consumed, rows, ordinals)
        batch = Batch(tokens, torch.ones_like(tokens, dtype=torch.bool), ordinals)
        consumed += rows
        pieces = [(batch.to(device), noise.to(device))]
        count = sum(objective.num_scored(*piece) for piece in pieces)
        sums = gradients.add_up(pieces, count)
        sums.reduce(mesh.reduction, mesh.data, mesh.pipeline)
        engine.step(config.optimizer.clip_norm)

    return step, objective.network.training_flops(config.data.sequence_length)


def _utilisation(tokens_per_second: float, flops: TrainingFlops, device: torch.device) -> dict[str, float | None]:
    """By both conventions; None where the device's peak is not known."""
    if device.type != "cuda":
        return {"full_head": None, "needed": None}
    name = torch.cuda.get_device_name(device)
    return {
        "full_head": mfu(tokens_per_second, flops.total, device_name=name),
        "needed": mfu(tokens_per_second, flops.needed(MDLM.token_share), device_name=name),
    }


def _peak_memory(step: Callable[[], None], device: torch.device) -> int | None:
    """Bytes that one step had allocated at most, beside what all contenders keep; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    kept = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device) - kept
