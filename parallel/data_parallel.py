"""Data parallelism: the one object that knows about ranks, and the sum of gradients over them.

Ranks come from torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). Without it there is one
process and no process group. Host values (flags, objects, counters) travel over gloo on every device, so asking the
peers something never waits for the GPU; CUDA tensors travel over NCCL.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from braid.kernels.errors import ConfigError, TrainingFailed

if TYPE_CHECKING:
    from braid.parallel.mesh import Axis

BUCKET_BYTES = 32 * 2**20
TIMEOUT_S = 600.0
"""Seconds after which a collective that a peer did not join ends the process instead of waiting for ever."""

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among its peers. Every method below but `close` is collective: all ranks call it, in one order.

    A peer that died, or that did not arrive within the timeout, raises TrainingFailed; where the GPU was already
    waiting for it, NCCL's watchdog ends the process instead. Nothing waits for ever.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    grouped: bool
    """There is a process group: torchrun started us, be it with one process."""

    @staticmethod
    def single(device: torch.device | str = "cpu") -> World:
        """One process on its own."""
        return World(rank=0, size=1, local_rank=0, device=torch.device(device), grouped=False)

    def barrier(self) -> None:
        """Wait until every rank is here. Says nothing about work still queued on a GPU."""
        self.any(False)

    def any(self, flag: bool) -> bool:
        """True on every rank when it is true on one."""
        return bool(self.all_reduce_sum(torch.tensor(int(flag))).item())

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """Rank `source`'s value (anything that pickles) on every rank; what the others pass is ignored."""
        if not self.grouped:
            return value
        box = [value]
        with self._named("broadcast"):
            dist.broadcast_object_list(box, src=source, device=torch.device("cpu"))
        return box[0]

    def all_gather_object(self, value: T) -> list[T]:
        """Every rank's value (anything that pickles), by rank."""
        if not self.grouped:
            return [value]
        box: list[T] = [value] * self.size
        with self._named("gather"):
            dist.all_gather_object(box, value)
        return box

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place, of a tensor of one shape and type everywhere; returns it.

        The order of the sum is fixed by the number of ranks, so equal inputs give equal bits, the same on every rank.
        """
        if self.grouped:
            with self._named("sum"):
                dist.all_reduce(tensor)
        return tensor

    @contextmanager
    def watching(self) -> Iterator[None]:
        """In this block a collective that fails inside another library's functions is told as those of this class."""
        try:
            yield
        except RuntimeError as error:
            if not self.grouped or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            raise TrainingFailed(
                f"what {self.size} ranks do together did not complete: another rank died or is stuck",
                found=f"on rank {self.rank}: {str(error).splitlines()[0]}",
                change="look at the logs of the other ranks for the first failure",
            ) from error

    def close(self) -> None:
        """Leave the process group. Safe to call after a failed collective, and twice."""
        if self.grouped and dist.is_initialized():
            dist.destroy_process_group()

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Turn the backend's complaint about a peer into an error that says which rank met it."""
        try:
            yield
        except RuntimeError as error:  # all that gloo and NCCL raise: DistBackendError and the like derive from it
            raise TrainingFailed(
                f"a {what} over {self.size} ranks did not complete: another rank died or is stuck",
                found=f"on rank {self.rank}: {str(error).splitlines()[0]}",
                change="look at the logs of the other ranks for the first failure",
            ) from error


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` (CUDA when there is one), `cpu` or `cuda`, for the process of this index on its machine.

    Raises:
        ConfigError: CUDA is asked for and absent, or there are more processes than GPUs on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if name != "cuda":
        raise ConfigError("unknown device", found=name, change="choose auto, cpu or cuda")
    if not torch.cuda.is_available():
        raise ConfigError("the device is to be cuda, and torch finds no GPU", change="choose cpu or auto")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            "more processes than GPUs on this machine",
            found=f"local rank {local_rank}, {torch.cuda.device_count()} GPUs",
            change=f"start torchrun with --nproc-per-node {torch.cuda.device_count()}",
        )
    return torch.device("cuda", local_rank)


def init_world(device: str, timeout_s: float = TIMEOUT_S) -> World:
    """Join the peers that torchrun started, or be alone. Call once, before anything else touches a GPU.

    Args:
        device: `auto`, `cpu` or `cuda`.
        timeout_s: patience with peers, at the start and in every collective.

    Raises:
        ConfigError: the environment is incomplete, or the device is not there.
        TrainingFailed: the peers did not come together in time.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if "RANK" in missing and "WORLD_SIZE" in missing:
        chosen = pick_device(device)
        _use(chosen)
        return World.single(chosen)
    if missing:
        raise ConfigError(
            "the environment names a rank but is incomplete",
            found=f"without {', '.join(missing)}",
            change="start with torchrun, which sets them all, or unset RANK and WORLD_SIZE",
        )
    rank, size, local_rank = (int(os.environ[name]) for name in names[:3])
    chosen = pick_device(device, local_rank)
    _use(chosen)
    world = World(rank=rank, size=size, local_rank=local_rank, device=chosen, grouped=True)
    with world._named("start"):
        dist.init_process_group(
            "gloo" if chosen.type == "cpu" else "cpu:gloo,cuda:nccl",
            timeout=timedelta(seconds=timeout_s),
            device_id=chosen if chosen.type == "cuda" else None,
        )
    return world


def reduce_gradients(parameters: Iterable[nn.Parameter], world: World | Axis) -> None:
    """Replace every gradient by its sum over the ranks, or those of an axis, by way of float32 buckets of 32 MiB.

    Buckets are cut from the parameters laid end to end in the order given, which must be the same on every rank. They
    depend on nothing else (not on which gradient is ready first), so the same gradients give the same bits in every
    run. A gradient that is None counts as zero, and is zeros afterwards on every rank and in every world size: AdamW
    would treat None and zero differently.
    """
    gradients = []
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
            gradients.append(parameter.grad)
    if world.grouped:
        for bucket in _buckets(gradients, BUCKET_BYTES // 4):
            flat = world.all_reduce_sum(torch.cat([piece.float() for piece in bucket]))
            torch._foreach_copy_(bucket, flat.split([len(piece) for piece in bucket]))


def _buckets(gradients: list[Tensor], num_elements: int) -> Iterator[list[Tensor]]:
    """The gradients laid end to end and cut every `num_elements`: each bucket is a list of flat views of them."""
    bucket: list[Tensor] = []
    room = num_elements
    for gradient in gradients:
        rest = gradient.view(-1)
        while len(rest):
            piece, rest = rest[:room], rest[room:]
            bucket.append(piece)
            room -= len(piece)
            if room == 0:
                yield bucket
                bucket, room = [], num_elements
    if bucket:
        yield bucket


def _use(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
