"""Megatron-core's DistributedDataParallel and DistributedOptimizer as an engine.

Float32 weights and the optimizer's state are divided among the ranks of the reduction axis; gradients and the weights
of the forward pass are whole on each.

DistributedDataParallel lays the parameters of each type end to end in a buffer, the last one first, and cuts it into
buckets; beside it lie their gradients, summed up in float32. Every rank has an equal piece of every bucket: it gets the
sum of its piece of the gradients, updates its piece of the weights, and gives that to the others. Pieces end anywhere,
in the midst of a parameter too: `held` are the parts of parameters that lie in this rank's pieces, in one dimension.

Weights that `half` names are bfloat16 in the module, as autocast would make them in every use, and float32 in `held`.
All others are float32 in both, and then `held` are views of the module's.

In a pipeline its schedule tells which backward passes are the last (`more_to_come`). What every stage has is reduced
when all of them have ended. Megatron gives the stages after the first one bucket each: they are done sooner than it is.

Two things are ours, because Megatron's way is not safe for models that do not do the same in every pass. Reductions
beside the backward pass are begun bucket after bucket: Megatron begins each when it is full, and waits for ever where
a parameter has no gradient on some rank or in some step. Gathers beside the next forward pass are begun all at once:
Megatron begins each when somebody waits for the one before, which on one rank alone (a sampler's) must not happen.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from braid.kernels.capabilities import require
from braid.parallel.accumulation import fuse_accumulation
from braid.parallel.divided_engine import Cut, DividedEngine, name_groups
from braid.parallel.engine import NotFinite, Part, Receivers, clip_gradients, gradient_norm
from braid.parallel.layers import sum_partial_gradients
from braid.parallel.mesh import Mesh
from braid.parallel.pipeline import sum_replicated_gradients

T = TypeVar("T")


class MegatronEngine(DividedEngine):
    """See the docstring of the module."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        mesh: Mesh,
        *,
        half: Collection[str] = (),
        overlap: bool = True,
        fused: bool = False,
        bucket_size: int | None = None,
    ) -> None:
        """Collective.

        Args:
            module: its parameters become views of Megatron's buffers.
            optimizer: of the parameters that are trained; its groups stay, and hold this rank's parts of theirs.
            half: names of parameters that are to be bfloat16.
            overlap: reduce gradients beside the backward pass, and gather weights beside the next forward pass.
            fused: let products add the gradients of weights to their sums (accumulation.py).
            bucket_size: elements that fill a bucket, where there is overlap; None: 40 million, or a million for each
                rank.
        """
        self.module, self.optimizer, self.mesh, self.overlap = module, optimizer, mesh, overlap
        if fused:
            fuse_accumulation(module, mesh.world.device, half)
        trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        self.names, self._parameters = list(trained), trained
        # Megatron makes its float32 weights out of the bfloat16 ones, which have lost what `held` is to have.
        exact = {name: trained[name].detach().cpu() for name in half}
        for name in half:
            trained[name].data = trained[name].data.bfloat16()
        for parameter in trained.values():
            # To Megatron: let it have a bucket of its own, which the stages of a pipeline then divide alike.
            parameter.shared_embedding = getattr(parameter, "replicated", False)
        name_groups(module, optimizer)
        self.ddp = _wrap(module, overlap, bucket_size)
        self.megatron = _divide(self.ddp, optimizer, bool(half))
        self._ranges = self._find_ranges()
        shards = _shards(self.megatron)
        self.held = [_like_parameter(shards[p], p) for p in trained.values() if p in shards]
        assert self.held, "more ranks than there are weights to divide"
        position = {parameter: index for index, parameter in enumerate(trained.values())}
        replicated = {parameter for parameter in position if getattr(parameter, "replicated", False)}
        self._buckets = sorted(
            self.ddp.bucket_groups,
            key=lambda bucket: (not bucket.params.isdisjoint(replicated), -min(position[p] for p in bucket.params)),
        )
        """In the order in which a backward pass fills them, and last those that are not full before all passes of a
        pipeline have ended; a forward pass needs them the other way round."""
        self._replicated = replicated
        self._needed_at_once: list[Any] = []
        if overlap:
            self._watch_gradients()
            self._watch_weights()
        self._forget()
        with self.writing() as held, torch.no_grad():
            for name, tensor in self._mine(held).items():
                if name in exact:
                    tensor.copy_(self._part(exact[name], name))

    # -- the step ----------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._last = last
        loss.backward()

    @contextmanager
    def more_to_come(self) -> Iterator[None]:
        self._last = False
        yield
        self._last = True

    def step(self, clip_norm: float) -> Tensor:
        self._settle()
        if self.overlap:
            self._reduce_next(len(self._buckets))
        self.ddp.finish_grad_sync()
        self.megatron.prepare_grads()  # those of `held` are parts of the buffers now
        sum_partial_gradients(self.held, self.mesh.tensor)
        sum_replicated_gradients(self.held, self.mesh.pipeline)
        norm = gradient_norm(self.held, self.mesh.tensor, self.mesh.reduction, self.mesh.pipeline)
        finite = math.isfinite(norm.item())
        if finite:
            clip_gradients(self.held, norm, clip_norm)
            self.megatron.step_with_ready_grads()  # without overlap it gathers the weights too
        self._forget()
        if self.overlap:
            self._begin_to_gather()
        if not finite:
            raise NotFinite
        return norm

    def _forget(self) -> None:
        """Gradients are zero, and those of the next step are awaited."""
        self.ddp.zero_grad_buffer()
        self.megatron.zero_grad()
        for bucket in self._buckets:
            bucket.is_last_microbatch = False  # else Megatron would begin reductions itself
        self._last, self._begun = False, 0
        self._missing = [len(bucket.params) for bucket in self._buckets]

    def _watch_gradients(self) -> None:
        """Know when the gradients of a bucket are there in the last backward pass of a step. Runs after Megatron's own
        hook of the parameter, which moves the gradient to the buffer."""
        index = {parameter: i for i, bucket in enumerate(self._buckets) for parameter in bucket.params}
        for parameter, accumulator in zip(self._parameters.values(), self.ddp.grad_accs, strict=True):
            if parameter not in self._replicated:  # pieces and what comes after them may each leave a part
                accumulator.register_hook(functools.partial(self._arrived, index[parameter]))

    def _arrived(self, index: int, *_: object) -> None:
        if self._last:
            self._missing[index] -= 1
            assert self._missing[index] >= 0, "a parameter's gradient came twice in one backward pass"
            full = (i for i in range(self._begun, len(self._buckets)) if self._missing[i])
            self._reduce_next(next(full, len(self._buckets)))

    def _reduce_next(self, stop: int) -> None:
        """Begin the reductions that are due of the buckets before `stop`."""
        for bucket in self._buckets[self._begun : stop]:
            bucket.start_grad_sync()
        self._begun = max(self._begun, stop)

    def _watch_weights(self) -> None:
        """Let blocks wait for their weights. Others are read outside of their modules too, and before the first one
        runs (embeddings, a learned schedule), so a bucket with such a weight is waited for at once."""
        bucket_of = self.ddp.param_to_bucket_group
        blocks = [block for owner in self.module.modules() for block in getattr(owner, "blocks", ())]
        inside = set()
        for block in blocks:
            parameters = [parameter for parameter in block.parameters() if parameter in bucket_of]
            inside.update(parameters)
            needed = list(dict.fromkeys(bucket_of[parameter] for parameter in parameters))
            block.register_forward_pre_hook(functools.partial(_wait_for, needed))
        self._needed_at_once = [bucket for bucket in self._buckets if not bucket.params <= inside]

    def _begin_to_gather(self) -> None:
        for bucket in reversed(self._buckets):
            bucket.start_param_sync()
        _wait_for(self._needed_at_once)

    def _settle(self) -> None:
        """Wait for all weights."""
        _wait_for(self._buckets)

    # -- what is held ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def publish(self) -> None:
        self._settle()
        self.megatron._copy_main_params_to_model_params()
        for bucket in reversed(self._buckets):
            bucket.start_param_sync(force_sync=True)

    @contextmanager
    def writing(self) -> Iterator[list[Tensor]]:
        self._settle()  # `held` may be what is being sent
        with super().writing() as held:
            yield held

    def named(
        self,
        like_held: Sequence[Tensor | None],
        to: Receivers | None = None,
        names: Collection[str] | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        mine = self._mine(like_held)
        for name, parameter in self._parameters.items():
            if (to is not None and name not in to) or (names is not None and name not in names):
                continue
            own = [mine[name]] if name in mine else []
            receiver = None if to is None else to[name]
            whole = self.mesh.reduction.join(self._pieces(name), own, torch.float32, parameter.device, receiver)
            if whole is not None:
                yield name, whole.view(parameter.shape)

    def shapes(self) -> dict[str, torch.Size]:
        return {name: parameter.shape for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def fill(self, like_held: Sequence[Tensor | None], part: Part, names: Collection[str] | None = None) -> None:
        for name, tensor in self._mine(like_held).items():
            if names is None or name in names:
                tensor.copy_(part(name, *self._ranges[name][self.mesh.reduction.rank]))

    def holding(self, names: Collection[str]) -> list[int]:
        return [number for name, number in self._mine(range(len(self.held))).items() if name in names]

    def cuts(self, names: Collection[str], like: Mapping[Tensor, Tensor]) -> Iterator[Cut]:
        mine = self._mine(self.held)
        for name in names:
            own = [like[mine[name]]] if name in mine else []
            yield Cut(self._parameters[name], self._parameters[name].shape, self._pieces(name), own)

    def _pieces(self, name: str) -> list[tuple[int, int, int]]:
        """(rank, start, stop) of each piece of a parameter."""
        return [(rank, start, stop) for rank, (start, stop) in enumerate(self._ranges[name]) if start < stop]

    def untrained(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.module.state_dict().items() if name not in self._parameters}

    def _find_ranges(self) -> dict[str, list[tuple[int, int]]]:
        """Name -> where each rank's part of the parameter begins and ends; both are 0 where it has none."""
        mine = torch.zeros(len(self.names), 2, dtype=torch.int64)
        for row, parameter in zip(mine, self._parameters.values(), strict=True):
            if parameter in self.megatron.model_param_gbuf_map:
                part = self.megatron._get_model_param_range_map(parameter)["param"]
                row[0], row[1] = part.start, part.end
        table = self.mesh.reduction.all_gather(mine.to(self.mesh.world.device)[None], 0)
        rows = table.transpose(0, 1).tolist()
        return {name: [tuple(row) for row in ranks] for name, ranks in zip(self.names, rows, strict=True)}

    def _mine(self, like_held: Sequence[T]) -> dict[str, T]:
        """By the name of their parameter."""
        rank = self.mesh.reduction.rank
        names = [name for name, ranges in self._ranges.items() if ranges[rank][0] < ranges[rank][1]]
        return dict(zip(names, like_held, strict=True))

    def _part(self, whole: Tensor, name: str) -> Tensor:
        """This rank's part of all values of a parameter."""
        start, stop = self._ranges[name][self.mesh.reduction.rank]
        return whole.reshape(-1)[start:stop]


def _core(name: str) -> ModuleType:
    """A module of Megatron-core."""
    return import_module(f"{require('megatron-core').__name__}.{name}")


def _wrap(module: nn.Module, overlap: bool, bucket_size: int | None) -> nn.Module:
    """Megatron's DistributedDataParallel around the module, which is not called through it."""
    distributed = _core("distributed")
    settings = distributed.DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
        bucket_size=bucket_size,
    )
    # With a loss per token gradients are summed and not averaged. It reads nothing else here.
    config = _core("transformer").TransformerConfig(
        num_layers=1, hidden_size=1, num_attention_heads=1, calculate_per_token_loss=True
    )
    ddp = distributed.DistributedDataParallel(config, settings, module)
    if overlap:
        ddp.disable_forward_pre_hook(param_sync=False)
    return ddp


def _divide(ddp: nn.Module, optimizer: torch.optim.Optimizer, half: bool) -> Any:
    """Megatron's DistributedOptimizer around an optimizer, whose groups then hold parts of parameters."""
    config = _core("optimizer").OptimizerConfig(
        optimizer="adam",
        bf16=half,
        params_dtype=torch.bfloat16 if half else torch.float32,
        use_distributed_optimizer=True,
        overlap_param_gather=ddp.ddp_config.overlap_param_gather,
    )
    # It insists on Adam for its own checkpoints' sake, and looks at nothing but the groups.
    of_groups = torch.optim.AdamW(optimizer.param_groups)
    with torch.no_grad():  # else the parts of float32 parameters would be results of theirs
        divided = _core("optimizer.distrib_optimizer").DistributedOptimizer(
            of_groups,
            config,
            grad_scaler=None,
            init_state_fn=None,
            model_chunks=[ddp],
            per_model_buffers={0: ddp.buffers},
            data_parallel_group=ddp.intra_dp_cp_group,
            data_parallel_group_gloo=None,
            data_parallel_group_idx=0,
            distributed_optimizer_instance_id=0,
        )
    optimizer.param_groups = of_groups.param_groups
    divided.optimizer = optimizer
    return divided


def _shards(optimizer: Any) -> dict[nn.Parameter, Tensor]:
    """Parameter -> its part in float32 that this rank updates."""
    pairs = (
        (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
        (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
    )
    return {
        parameter: shard
        for models, mains in pairs
        for group, shards in zip(models, mains, strict=True)
        for parameter, shard in zip(group, shards, strict=True)
    }


def _like_parameter(shard: Tensor, parameter: nn.Parameter) -> Tensor:
    """The part, marked as its parameter is (parallel/layers.py)."""
    for mark in ("shard", "partial", "replicated"):
        if hasattr(parameter, mark):
            setattr(shard, mark, getattr(parameter, mark))
    return shard.requires_grad_()


@torch.compiler.disable
def _wait_for(buckets: Sequence[Any], *_: object) -> None:
    """For the weights of the buckets, where they are on their way."""
    for bucket in buckets:
        if bucket.param_gather_handle is not None:
            bucket.finish_param_sync(skip_next_bucket_dispatch=True)
