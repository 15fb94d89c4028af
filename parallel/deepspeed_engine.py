"""DeepSpeed as an engine: ZeRO divides optimizer state, gradients and weights among the ranks of the reduction axis.

    stage   divided                          `held` by each of N ranks
    0       nothing                          all parameters
    1       optimizer state                  a float32 copy of 1/N of each group's parameters laid end to end
    2       and gradients                    the same
    3       and weights                      of every parameter 1/N, laid end to end by group

Weights are float32 at every stage and in every precision: `run.precision=bf16` is autocast, as without DeepSpeed, so
that what the networks compute in float32 (times, norms, losses) stays so, and a step is that of one process.
DeepSpeed's own bf16 would turn every weight into bf16.

With stage 3 a process has the whole of a weight only while a module that reads it runs, or while `forward` does where
the weight is read outside its module (DeepSpeed finds out when it happens). All ranks gather together, so all must do
the same: as many passes, in one order. A model that is larger than a device is never whole there: `Shares` divides each
module as soon as it has its first values.

At stage 3 DeepSpeed takes means over ranks and not sums, so the loss is multiplied by the number of ranks first.

In a pipeline (stages 0 and 1 alone) gradients come from its schedule, and are left alone until `step`. Every process of
the pipeline divides what it holds by itself, so that the copies of a replicated parameter are cut differently. To stay
equal they need the same bits from DeepSpeed's sum, whose order depends on the cut: it is given one gradient, that is
whole already, and zeros from all ranks but the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from braid.kernels.capabilities import require
from braid.parallel.data_parallel import reduce_gradients
from braid.parallel.deepspeed_disk import compile_writing
from braid.parallel.divided_engine import COUNTER, Cut, DividedEngine, name_groups
from braid.parallel.engine import Engine, NotFinite, Part, PlainEngine, Receivers, clip_gradients, gradient_norm
from braid.parallel.layers import whole_shape
from braid.parallel.mesh import Axis, Mesh
from braid.parallel.mpu import join_deepspeed
from braid.parallel.pipeline import counts_here, sum_replicated_gradients
from braid.parallel.plan import ParallelConfig

T = TypeVar("T")

LARGEST_BUCKET = 500_000_000
"""Elements that are reduced or gathered at a time (DeepSpeed's default)."""
SMALL_PARAMETER = 100_000
"""Elements up to which stage 3 keeps a weight whole on every rank between uses (DeepSpeed's default)."""


def deepspeed_settings(plan: ParallelConfig, num_elements: int, *, pinned: bool) -> dict[str, Any]:
    """DeepSpeed's configuration for a plan. `num_elements` is the size of the module on this process; `pinned` memory
    makes copies between CPU and GPU fast."""
    bucket = 2 * math.ceil(min(LARGEST_BUCKET, num_elements) / 2)
    zero: dict[str, Any] = {
        "stage": plan.zero,
        # At stage 1 nothing is reduced before the last backward pass has ended.
        "overlap_comm": plan.overlap and plan.zero > 1,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    if plan.zero == 3:
        zero["stage3_param_persistence_threshold"] = SMALL_PARAMETER
    if plan.offload != "none":
        place = {"device": plan.offload, "nvme_path": plan.offload_dir or None, "pin_memory": pinned}
        zero["offload_optimizer"] = place
    if plan.offload != "none" and plan.zero == 3:
        zero["offload_param"] = {"device": "cpu", "pin_memory": pinned}
    return {
        "train_micro_batch_size_per_gpu": 1,  # says nothing here, but has to be given
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # a step ends when `step` is called
        "gradient_clipping": 0.0,  # set at every step
        "gradient_allreduce_op": "mean" if plan.zero == 3 else "sum",  # at stage 3 there is no other
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW: nothing is compiled
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


class Shares:
    """A `Store` of layers.Region for stage 3: a module's own parameters are divided on the reduction axis, and each
    rank keeps its share, where the plan says. Collective."""

    def __init__(self, mesh: Mesh, plan: ParallelConfig) -> None:
        mpu = join_deepspeed(mesh)
        settings = deepspeed_settings(plan, 2, pinned=mesh.world.device.type == "cuda")
        self.init = require("deepspeed").zero.Init(
            module=nn.Module(), data_parallel_group=mpu.get_data_parallel_group(), config_dict_or_path=settings, mpu=mpu
        )

    def __call__(self, module: nn.Module) -> None:
        self.init._convert_to_zero_parameters(module.parameters(recurse=False))


def build_deepspeed_engine(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    mesh: Mesh,
    plan: ParallelConfig,
    half: Collection[str] = (),
) -> Engine:
    """DeepSpeed with the plan's stage around `module`, whose weights are there already, whole or as `Shares` leaves
    them. `half` names the weights that every use casts to bfloat16, as which stage 3 gathers them. Collective.

    Raises BraidError where DeepSpeed is not installed, and ConfigError where it cannot write to a disk.
    """
    for name, parameter in module.named_parameters():
        assert whole_shape(parameter), "DeepSpeed cannot divide what has no dimension"
        if name in half:
            parameter.comm_dtype = torch.bfloat16
        # For the norm. DeepSpeed counts what is not marked on the first rank of the tensor axis and on every stage. The
        # marks: on every rank of the tensor axis; and not on this stage, because the first one does.
        parameter.tensor_model_parallel = hasattr(parameter, "shard")
        parameter.ds_pipe_replicated = not counts_here(parameter, mesh.pipeline)
        if getattr(parameter, "partial", False) and mesh.tensor.grouped:
            # Before DeepSpeed takes the gradient, at every backward pass.
            parameter.register_hook(lambda gradient: mesh.tensor.all_reduce_sum(gradient.contiguous().clone()))
    name_groups(module, optimizer)
    mpu = join_deepspeed(mesh)
    if plan.offload == "nvme":
        compile_writing()
    num_elements = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters())
    settings = deepspeed_settings(plan, num_elements, pinned=mesh.world.device.type == "cuda")
    ours = _Calculation(module)
    engine, *_ = require("deepspeed").initialize(model=ours, optimizer=optimizer, config=settings, mpu=mpu)
    kinds = {0: WholeEngine, 1: ZeroEngine, 2: ZeroEngine, 3: Zero3Engine}
    factor = mesh.reduction.size if plan.zero == 3 else 1
    return kinds[plan.zero](module, optimizer, mesh, _DeepSpeed(engine, ours, factor))


class _Calculation(nn.Module):
    """What DeepSpeed takes for the model: its forward pass is any calculation with the module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.result: Any = None

    def forward(self, compute: Callable[[], Any]) -> dict[str, Tensor]:
        """The tensors of the result that can be differentiated, by field; it is kept in `result`."""
        self.result = compute()
        parts = {"": self.result}
        if is_dataclass(self.result):
            parts = {field.name: getattr(self.result, field.name) for field in fields(self.result)}
        return {name: part for name, part in parts.items() if isinstance(part, Tensor) and part.requires_grad}


@dataclass(frozen=True)
class _DeepSpeed:
    """DeepSpeed's engine around a `_Calculation`; losses are multiplied by `factor`."""

    engine: Any
    calculation: _Calculation
    factor: int

    def forward(self, compute: Callable[[], T]) -> T:
        outputs = self.engine(compute)
        result, self.calculation.result = self.calculation.result, None
        return replace(result, **outputs) if is_dataclass(result) else outputs.get("", result)

    def go_back(self, loss: Tensor) -> None:
        self.engine.backward(loss * self.factor)


class WholeEngine(PlainEngine):
    """Stage 0: every process holds all of its parameters, and DeepSpeed sums their gradients."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh, deepspeed: _DeepSpeed) -> None:
        super().__init__(module, optimizer, mesh)
        self.deepspeed = deepspeed
        self.clip_norm = 0.0
        optimizer.register_step_pre_hook(lambda *_: self._judge())

    def forward(self, compute: Callable[[], T]) -> T:
        return self.deepspeed.forward(compute)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.deepspeed.go_back(loss)

    def step(self, clip_norm: float) -> Tensor:
        self.clip_norm = clip_norm
        self.deepspeed.engine.step()
        if not math.isfinite(self.norm.item()):
            raise NotFinite
        return self.norm

    def _judge(self) -> None:
        """Between DeepSpeed's sum and the optimizer's step, which does nothing where there are no gradients."""
        sum_replicated_gradients(self.held, self.mesh.pipeline)
        self.norm = gradient_norm(self.held, self.mesh.tensor, None, self.mesh.pipeline)
        if math.isfinite(self.norm.item()):
            clip_gradients(self.held, self.norm, self.clip_norm)
        else:
            self.optimizer.zero_grad(set_to_none=True)


class Span(NamedTuple):
    """Where a piece of a parameter is held."""

    rank: int
    """On the reduction axis."""
    place: int
    """Of the first element in that rank's tensor."""
    start: int
    """Of the first element in the parameter."""
    length: int


class Place(NamedTuple):
    """Where the pieces of a parameter are held."""

    name: str
    shape: torch.Size
    number: int
    """Of the tensor among those held, the same on every rank."""
    spans: list[Span]

    @property
    def pieces(self) -> list[tuple[int, int, int]]:
        """(rank, start, stop) of each."""
        return [(span.rank, span.start, span.start + span.length) for span in self.spans]

    def own(self, tensor: Tensor, rank: int) -> list[Tensor]:
        """Those of a rank, in the tensor that holds them."""
        return [tensor[span.place : span.place + span.length] for span in self.spans if span.rank == rank]


class ZeroEngine(DividedEngine):
    """Stages 1 and 2."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh, deepspeed: _DeepSpeed) -> None:
        self.module, self.optimizer, self.mesh, self.deepspeed = module, optimizer, mesh, deepspeed
        self.zero = deepspeed.engine.optimizer
        self._name_of = {id(parameter): name for name, parameter in module.named_parameters()}
        self.held, self.places = self._held(), list(self._places())
        self.names = [place.name for place in self.places]
        if mesh.pipeline.grouped:
            self._add_norms_of_stages()

    def _add_norms_of_stages(self) -> None:
        """DeepSpeed adds norms up over the stages of a pipeline group by group, and waits for ever where stages have
        different groups (only the first may have a table, which is one under Muon): let it add those of this stage, and
        then add all stages' at once."""
        norm_of_stage = self.zero.scaled_global_norm

        def norm() -> Tensor:
            group, self.zero.model_parallel_group = self.zero.model_parallel_group, None
            square = norm_of_stage().square()
            self.zero.model_parallel_group = group
            return self.mesh.model.all_reduce_sum(square).sqrt()

        self.zero.scaled_global_norm = norm

    def _held(self) -> list[Tensor]:
        return self.zero.single_partition_of_fp32_groups

    def _places(self) -> Iterator[Place]:
        """A group's parameters lie end to end and are cut into equal pieces, one a rank."""
        zero = self.zero
        for number, parameters in enumerate(zero.round_robin_bit16_groups):
            size = zero.partition_size[number]
            for parameter, first in zip(parameters, zero.round_robin_bit16_offsets[number], strict=True):
                spans = []
                for rank in range(first // size, (first + parameter.numel() - 1) // size + 1):
                    start, stop = max(first, rank * size), min(first + parameter.numel(), (rank + 1) * size)
                    spans.append(Span(rank, start - rank * size, start - first, stop - start))
                yield Place(self._name_of[id(parameter)], parameter.shape, number, spans)

    def forward(self, compute: Callable[[], T]) -> T:
        return self.deepspeed.forward(compute)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.deepspeed.go_back(loss)

    def step(self, clip_norm: float) -> Tensor:
        if self.mesh.pipeline.grouped:
            self._finish_replicated_gradients()
        self.zero.clip_grad = clip_norm
        self.deepspeed.engine.step()
        if not self.deepspeed.engine.was_step_applied():  # DeepSpeed looks at the norm, and has the gradient forgotten
            raise NotFinite
        norm = self.deepspeed.engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self.mesh.world.device)

    def _finish_replicated_gradients(self) -> None:
        """Of the parameters that every process of the pipeline has: whole on the first rank of the reduction axis, and
        zero on the others."""
        replicated = [parameter for parameter in self.module.parameters() if getattr(parameter, "replicated", False)]
        reduce_gradients(replicated, self.mesh.reduction)
        sum_replicated_gradients(replicated, self.mesh.pipeline)
        for parameter in replicated:
            if parameter.requires_grad and self.mesh.reduction.rank > 0:
                parameter.grad.zero_()

    def publish(self) -> None:
        self.zero.update_lp_params()

    def named(
        self,
        like_held: Sequence[Tensor | None],
        to: Receivers | None = None,
        names: Collection[str] | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        places = [place for place in self.places if names is None or place.name in names]
        yield from _joined(places, like_held, self.mesh.reduction, self.mesh.world.device, to)

    def shapes(self) -> dict[str, torch.Size]:
        return {place.name: place.shape for place in self.places}

    def holding(self, names: Collection[str]) -> list[int]:
        return sorted({place.number for place in self.places if place.name in names})

    def cuts(self, names: Collection[str], like: Mapping[Tensor, Tensor]) -> Iterator[Cut]:
        parameters = dict(self.module.named_parameters())
        by_number = {number: like[weight] for number, weight in enumerate(self.held) if weight in like}
        for place in self.places:
            if place.number in by_number:
                own = place.own(by_number[place.number], self.mesh.reduction.rank)
                yield Cut(parameters[place.name], place.shape, place.pieces, own)

    @torch.no_grad()
    def fill(self, like_held: Sequence[Tensor | None], part: Part, names: Collection[str] | None = None) -> None:
        for tensor in like_held:
            if tensor is not None:
                tensor.zero_()  # what lies between parameters, and after the last, is stepped too
        places = [place for place in self.places if names is None or place.name in names]
        _put(places, like_held, self.mesh.reduction.rank, part)

    def untrained(self) -> dict[str, Tensor]:
        trained = set(self.names)
        return {name: tensor for name, tensor in self.module.state_dict().items() if name not in trained}


class Zero3Engine(ZeroEngine):
    """Stage 3. What is offloaded to a disk comes into memory group by group: of `held` and what is like it, tensors are
    empty elsewhere."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh, deepspeed: _DeepSpeed) -> None:
        super().__init__(module, optimizer, mesh, deepspeed)
        _gather_what_is_read_elsewhere(self.zero, deepspeed.calculation)
        frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
        self.frozen = [parameter.ds_tensor for parameter in frozen]
        self.frozen_places = [self._place(parameter, number, 0) for number, parameter in enumerate(frozen)]
        self.shown: dict[str, Tensor] = {}
        """Frozen parameters as `untrained` gave them last, to be taken over by `publish`."""

    def _held(self) -> list[Tensor]:
        return self.zero.fp32_partitioned_groups_flat

    def _places(self) -> Iterator[Place]:
        for number, parameters in enumerate(self.zero.fp16_groups):
            first = 0
            for parameter in parameters:
                yield self._place(parameter, number, first)
                first += parameter.partition_numel()

    def _place(self, parameter: nn.Parameter, number: int, first: int) -> Place:
        """Every parameter is cut into equal pieces, one a rank; the last ones may be short or empty."""
        size, total = parameter.partition_numel(), parameter.ds_numel
        starts = range(0, total, size)
        spans = [Span(rank, first, start, min(size, total - start)) for rank, start in enumerate(starts)]
        return Place(self._name_of[id(parameter)], parameter.ds_shape, number, spans)

    def present(self) -> Iterator[list[int]]:
        if not any(map(self.zero._swappable_optimizer_subgroup, range(len(self.held)))):
            yield from super().present()
            return
        for number in range(len(self.held)):
            with self._present(number):
                yield [number]

    @contextmanager
    def _present(self, number: int) -> Iterator[list[Place]]:
        """Weights and optimizer state of a group are in memory; what is written there stays."""
        on_disk = self.zero._swappable_optimizer_subgroup(number)
        if on_disk:
            self.zero._optimizer_states_and_gradient_swap_in(number)
        yield [place for place in self.places if place.number == number]
        if on_disk:
            self.zero._optimizer_states_and_gradient_swap_out(number)

    def named(
        self,
        like_held: Sequence[Tensor | None],
        to: Receivers | None = None,
        names: Collection[str] | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        for number in range(len(self.held)) if names is None else self.holding(names):
            with self._present(number) as places:
                yield from _joined(places, like_held, self.mesh.reduction, self.mesh.world.device, to)

    @torch.no_grad()
    def fill(self, like_held: Sequence[Tensor | None], part: Part, names: Collection[str] | None = None) -> None:
        for number in range(len(self.held)) if names is None else self.holding(names):
            with self._present(number) as places:
                like_held[number].zero_()  # the ends of parameters that do not divide
                _put(places, like_held, self.mesh.reduction.rank, part)

    def load_optimizer_state(self, keys: Iterable[str], part: Part) -> None:
        self.optimizer.state.clear()
        if getattr(self.zero, "swap_optimizer", False):
            self.zero.optimizer_swapper.purge_state()
        states_of: dict[str, list[str]] = {}
        for key in sorted(keys):
            name, _, state = key.rpartition("/")
            states_of.setdefault(name, []).append(state)
        for number, weight in enumerate(self.held):
            with self._present(number) as places:
                for name in states_of[places[0].name]:
                    if name == COUNTER:
                        value = part(f"{places[0].name}/{name}").clone()
                    else:
                        value = torch.zeros_like(weight, requires_grad=False)
                        rank = self.mesh.reduction.rank
                        _put(places, {number: value}, rank, lambda key, *at, n=name: part(f"{key}/{n}", *at))
                    self.optimizer.state[weight][name] = value

    def publish(self) -> None:
        zero = self.zero
        zero.empty_partition_cache()  # nothing is gathered any more, so that all will be gathered anew
        for number in range(len(self.held)):
            with self._present(number):
                zero._reassign_or_swap_out_partitioned_parameters(number)
        if self.shown:
            _put(self.frozen_places, self.frozen, self.mesh.reduction.rank, self._shown_between)
            self.shown = {}
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def _shown_between(self, name: str, start: int, stop: int) -> Tensor:
        return self.shown[name].reshape(-1)[start:stop]

    def untrained(self) -> dict[str, Tensor]:
        self.shown = dict(_joined(self.frozen_places, self.frozen, self.mesh.reduction, self.mesh.world.device))
        of_parameters = set(self._name_of.values())
        buffers = {name: value for name, value in self.module.state_dict().items() if name not in of_parameters}
        return buffers | self.shown


def _gather_what_is_read_elsewhere(zero: Any, model: nn.Module) -> None:
    """DeepSpeed gathers a weight when it is read outside its module, and from then on with the module that reads it.
    But once it has learnt in which order weights are needed and fetches them ahead, such a weight may be on its way,
    and is read as empty; or the order it has learnt is not right any more, which is an error (0.19.8). So let it learn
    the order again."""
    from deepspeed.runtime.zero import parameter_offload

    coordinator, available = zero.parameter_offload.get_param_coordinator(), parameter_offload.ZeroParamStatus.AVAILABLE

    class Parameters(parameter_offload.ZeROOrderedDict):
        def __getitem__(self, name: str) -> nn.Parameter | None:
            parameter = dict.__getitem__(self, name)
            absent = self._in_forward and parameter is not None and parameter.ds_status != available
            if absent and coordinator.is_complete_trace():
                coordinator._invalidate_trace()  # waits for what is on its way
            return super().__getitem__(name)

    for each in model.modules():
        each._parameters.__class__ = Parameters


def _joined(
    places: Sequence[Place],
    tensors: Sequence[Tensor],
    axis: Axis,
    device: torch.device,
    to: Receivers | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Every parameter whole, on every rank of the axis or on that it goes `to`, one after the other: each rank sends
    the pieces it holds."""
    for place in places:
        if to is not None and place.name not in to:
            continue
        tensor = tensors[place.number]
        receiver = None if to is None else to[place.name]
        whole = axis.join(place.pieces, place.own(tensor, axis.rank), tensor.dtype, device, receiver)
        if whole is not None:
            yield place.name, whole.view(place.shape)


@torch.no_grad()
def _put(
    places: Sequence[Place],
    tensors: Sequence[Tensor] | Mapping[int, Tensor],
    rank: int,
    part: Part,
) -> None:
    """Inverse of `_joined`, for one rank: its pieces of each tensor."""
    for place in places:
        tensor = tensors[place.number]
        for span in place.spans:
            if span.rank == rank:
                piece = part(place.name, span.start, span.start + span.length)
                tensor[span.place : span.place + span.length].copy_(piece)
