"""Megatron-core's layers, schedules and optimizers on ranks, for test_megatron_cpu.py; and the same in plain torch.

A token network: embedding, column-parallel, GELU, row-parallel, a head over the vocabulary, cross-entropy. Activations
are [L, b, width], Megatron's order.
"""

from __future__ import annotations

import gc
import inspect
import sys
from functools import partial
from types import CodeType

import megatron.core
import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.enums import ModelType
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    mappings,
    vocab_parallel_cross_entropy,
)
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from braid.kernels.errors import ConfigError
from braid.parallel import megatron_cpu
from braid.parallel.data_parallel import World
from braid.parallel.mesh import Mesh, build_mesh
from braid.parallel.plan import ParallelConfig

NUM_TOKENS, WIDTH, HIDDEN, LENGTH, BATCH = 48, 16, 32, 8, 3
LEARNING_RATE, CLIPPED_TO = 1e-2, 0.1
EPSILON = 1e-4  # of Adam: large, for it must not blow the rounding of gradients that are almost zero up to whole steps
DIVIDED = {"embedding.weight": 0, "into.weight": 0, "into.bias": 0, "out.weight": 1, "head.weight": 0}
"""Parameters that are divided among the ranks of the tensor axis, and along which dimension."""


def fill(tensor: Tensor) -> None:
    """Numbers that depend on the shape alone, so that every layout begins with the same weights."""
    draw = torch.Generator().manual_seed(tensor.numel())
    with torch.no_grad():
        tensor.copy_(torch.randn(tensor.shape, generator=draw) * 0.2)


def batch(index: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets, int64 [b, L]."""
    draw = torch.Generator().manual_seed(100 + index)
    return tuple(torch.randint(0, NUM_TOKENS, (BATCH, LENGTH), generator=draw) for _ in range(2))


class PlainNetwork(nn.Module):
    """One process, no Megatron."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_TOKENS, WIDTH)
        self.into, self.out = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.head = nn.Linear(WIDTH, NUM_TOKENS, bias=False)
        for parameter in self.parameters():
            fill(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        """Hidden activations [L, b, width]."""
        return self.out(nn.functional.gelu(self.into(self.embedding(tokens.T))))

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of every token, [L, b]."""
        return nn.functional.cross_entropy(self.head(hidden).movedim(-1, 1), targets.T, reduction="none")


class ShardedNetwork(nn.Module):
    """The same, of Megatron's layers."""

    def __init__(self, mesh: Mesh, sequence: bool) -> None:
        super().__init__()
        self.config = config = megatron_config(mesh, sequence_parallel=sequence)
        common = {"config": config, "init_method": fill}
        self.embedding = VocabParallelEmbedding(NUM_TOKENS, WIDTH, reduce_scatter_embeddings=sequence, **common)
        self.into = ColumnParallelLinear(WIDTH, HIDDEN, gather_output=False, **common)
        self.out = RowParallelLinear(HIDDEN, WIDTH, bias=True, input_is_parallel=True, skip_bias_add=False, **common)
        self.head = ColumnParallelLinear(WIDTH, NUM_TOKENS, bias=False, gather_output=False, **common)
        fill(self.out.bias)
        whole = torch.empty(HIDDEN)
        fill(whole)
        with torch.no_grad():
            self.into.bias.copy_(whole.chunk(mesh.tensor.size)[mesh.tensor.rank])

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.embedding(tokens)
        if not self.config.sequence_parallel:  # else the embedding has changed the order itself
            embedded = embedded.transpose(0, 1).contiguous()
        return self.out(nn.functional.gelu(self.into(as_autocast(embedded))[0]))[0]

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return vocab_parallel_cross_entropy(self.head(as_autocast(hidden))[0].float(), targets.T.contiguous())


def as_autocast(hidden: Tensor) -> Tensor:
    """Sequence-parallel layers receive gradients in the type of their inputs, so autocast must not change it inside."""
    return hidden.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else hidden


def megatron_config(mesh: Mesh, **options: object) -> TransformerConfig:
    return TransformerConfig(
        num_layers=mesh.pipeline.size,
        num_attention_heads=mesh.tensor.size,
        hidden_size=HIDDEN,  # of what travels between stages
        tensor_model_parallel_size=mesh.tensor.size,
        pipeline_model_parallel_size=mesh.pipeline.size,
        context_parallel_size=mesh.context.size,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        pipeline_dtype=torch.float32,
        **options,
    )


def run_network(network: nn.Module, bf16: bool) -> dict[str, Tensor]:
    """One forward and backward pass: hidden activations, losses, and gradients by parameter."""
    tokens, targets = batch(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden = network(tokens)
        losses = network.losses(hidden, targets)
    (losses * losses.detach()).sum().backward()
    gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
    return {"hidden": hidden.detach(), "losses": losses.detach()} | gradients


def gather(mesh: Mesh, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """All of the divided ones."""
    return {name: mesh.tensor.all_gather(parameters[name].detach(), dim) for name, dim in DIVIDED.items()}


def run_sharded_network(world: World, sequence: bool, bf16: bool) -> dict[str, Tensor]:
    mesh = build_mesh(world, ParallelConfig(tensor=world.size, sequence=sequence))
    found = run_network(ShardedNetwork(mesh, sequence), bf16)
    if sequence:
        found["hidden"] = mesh.tensor.all_gather(found["hidden"], 0)
        mesh.tensor.all_reduce_sum(found["out.bias"])  # each rank saw its part of the sequence
    found |= gather(mesh, found)
    mesh.close()
    return found


class Stage(nn.Module):
    """One half of a PlainNetwork as Megatron's schedule wants it: the first ends before the GELU, or the second."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        self.config, self.model_type = megatron_config(mesh), ModelType.encoder_or_decoder
        self.network, self.is_first, self.received = PlainNetwork(), mesh.is_first_stage, None

    def set_input_tensor(self, tensors: list[Tensor]) -> None:
        self.received = tensors[0]

    def forward(self, tokens: Tensor) -> Tensor:
        if self.is_first:
            return self.network.into(self.network.embedding(tokens.T))
        return self.network.out(nn.functional.gelu(self.received))


def run_mappings(world: World) -> dict[str, tuple[Tensor, Tensor]]:
    """What moves activations between ranks: of a [3 * size, 4] of this rank's own, the result and the gradient."""
    mesh = build_mesh(world, ParallelConfig(tensor=world.size))
    found = {}
    for move in (
        mappings.gather_from_tensor_model_parallel_region,
        mappings.gather_from_sequence_parallel_region,
        mappings.reduce_scatter_to_sequence_parallel_region,
        partial(mappings.all_to_all, mesh.tensor.group),
    ):
        own = (torch.arange(12.0 * world.size).view(-1, 4) + 100 * world.rank).requires_grad_()
        moved = move(own)
        (moved * (1 + world.rank)).sum().backward()
        found[getattr(move, "func", move).__name__] = (moved.detach(), own.grad)
    mesh.close()
    return found


def run_pipeline(world: World, num_micro_batches: int) -> tuple[list[float], dict[str, Tensor]]:
    """1F1B over two stages: the losses this stage saw, and the gradients of its parameters."""
    mesh = build_mesh(world, ParallelConfig(pipeline=world.size))
    stage = Stage(mesh)

    def forward_step(batches, model):
        tokens, targets = next(batches)

        def loss(hidden):
            total = model.network.losses(hidden, targets).sum()
            return total, {"loss": total.item()}  # the schedule divides `total` in place

        return model(tokens), loss

    seen = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=map(batch, range(num_micro_batches)),
        model=stage,
        num_microbatches=num_micro_batches,
        seq_length=LENGTH,
        micro_batch_size=BATCH,
        forward_only=False,
    )
    mesh.close()
    gradients = {name: parameter.grad for name, parameter in stage.network.named_parameters()}
    return [record["loss"] for record in seen], {name: grad for name, grad in gradients.items() if grad is not None}


def train_with_megatron(world: World, distributed: bool, bf16: bool, num_steps: int) -> tuple[list[float], dict]:
    """Steps of Megatron's AdamW over its DistributedDataParallel, on half of each batch: gradient norms, weights."""
    mesh = build_mesh(world, ParallelConfig(engine="megatron"))
    dtype = torch.bfloat16 if bf16 else torch.float32
    network = PlainNetwork().to(dtype)
    model = DistributedDataParallel(
        megatron_config(mesh),
        DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True),
        network,
    )
    config = OptimizerConfig(
        optimizer="adam", lr=LEARNING_RATE, adam_eps=EPSILON, weight_decay=0.0, clip_grad=CLIPPED_TO,
        use_distributed_optimizer=distributed, bf16=bf16, params_dtype=dtype,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(config, [model])
    norms = []
    for step in range(num_steps):
        optimizer.zero_grad()
        model.zero_grad_buffer()
        tokens, targets = batch(2 * step + mesh.data.rank)
        network.losses(network(tokens), targets).float().mean().backward()
        model.finish_grad_sync()
        norms.append(optimizer.step()[1])
    mesh.close()
    return norms, {name: parameter.detach().float() for name, parameter in network.named_parameters()}


def train_plainly(num_steps: int) -> tuple[list[float], dict]:
    """The same on whole batches in one process, in float32."""
    network = PlainNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, eps=EPSILON, weight_decay=0.0)
    norms = []
    for step in range(num_steps):
        optimizer.zero_grad()
        for half in (0, 1):
            tokens, targets = batch(2 * step + half)
            (network.losses(network(tokens), targets).mean() / 2).backward()
        norms.append(nn.utils.clip_grad_norm_(network.parameters(), CLIPPED_TO).item())
        optimizer.step()
    return norms, {name: parameter.detach() for name, parameter in network.named_parameters()}


def send_together(world: World) -> None:
    """Megatron's three collectives under its manager: right, waited for, and none of them through torch's manager."""
    megatron_cpu.install()
    module, group = sys.modules["megatron.core.distributed.param_and_grad_buffer"], dist.group.WORLD
    own = torch.arange(3.0) + 10 * world.rank
    for later in (False, True):
        wholes, parts = [torch.zeros(6) for _ in range(4)], [torch.zeros(3) for _ in range(4)]
        sums = [own.clone() for _ in range(4)]
        with module._coalescing_manager(group, async_ops=later) as handle:
            for whole, part, total in zip(wholes, parts, sums, strict=True):
                module.dist_all_gather_func(whole, own, group=group, async_op=later)
                module.dist_reduce_scatter_func(part, torch.cat([own, 2 * own]), group=group, async_op=later)
                module.torch.distributed.all_reduce(total, group=group, async_op=later)
            assert not dist.distributed_c10d._world.pg_coalesce_state
            assert len(handle.works) == 12
        if later:
            handle.wait()
        assert not handle.works
        both = torch.arange(3.0), torch.arange(3.0) + 10
        for whole, part, total in zip(wholes, parts, sums, strict=True):
            assert torch.equal(whole, torch.cat(both))
            assert torch.equal(part, (1 + world.rank) * sum(both)) and torch.equal(total, sum(both))
    alone = own.clone()
    assert module.torch.distributed.all_reduce(alone) is None, "without a manager it is torch's"
    assert torch.equal(alone, sum(both))


def install_and_look(world: World) -> None:
    """The stand-in changes the modules it names, and nothing else in this process."""
    before = dict(vars(torch.cuda))
    megatron_cpu.install()
    changed = {f"megatron.core.{name}": sys.modules[f"megatron.core.{name}"] for name in megatron_cpu.MODULES}
    others = [module for name, module in sys.modules.items() if name.startswith("megatron.") and name not in changed]
    assert sum(vars(module).get("torch") is torch for module in others) > 20
    assert all(vars(module).get("torch", torch) is torch for module in others)
    assert vars(torch.cuda) == before
    for missing in (torch.cuda.current_device, torch.cuda.synchronize, lambda: torch.zeros(1, device="cuda")):
        with pytest.raises((AssertionError, RuntimeError), match="(?i)cuda|nvidia"):
            missing()
    assert all(module.torch.cuda.current_device() == torch.device("cpu") for module in changed.values())

    gc.unfreeze()  # else those imported before the fork are not listed
    functions = [value for value in gc.get_objects() if inspect.isfunction(value) and value.__module__ in changed]
    assert len(functions) > 200
    assert [function.__qualname__ for function in functions if speaks_of_cuda(function.__code__)] == []
    codes = [function.__code__ for function in functions]
    megatron_cpu.install()
    assert all(function.__code__ is code for function, code in zip(functions, codes, strict=True))


def speaks_of_cuda(constant: object) -> bool:
    if isinstance(constant, CodeType):
        constant = constant.co_consts
    if isinstance(constant, tuple):
        return any(map(speaks_of_cuda, constant))
    return constant == "cuda" or (isinstance(constant, str) and constant.startswith("torch.cuda."))


def try_other_versions(world: World) -> None:
    """Versions that the stand-in does not know are refused; where there is CUDA it has nothing to say."""
    for version in ("0.17.0", "0.15.3"):
        megatron.core.__version__ = version
        with pytest.raises(ConfigError) as caught:
            megatron_cpu.install()
        assert caught.value.found == version and "pip install 'braid-lm[megatron]'" in caught.value.change
    torch.cuda.is_available = lambda: True
    megatron_cpu.install()
    assert mappings.torch is torch
