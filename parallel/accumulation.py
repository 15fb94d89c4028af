"""Gradient accumulation fused into products: a weight's gradient is added to its sum by the product that makes it.

Megatron's engine sums up the gradients of a step in float32, in `main_grad` of each parameter. A weight's gradient is a
product of two matrices, and is otherwise written out once for each micro-batch, and read again to be added. Megatron's
function of a linear layer can do both at once (its flag `gradient_accumulation_fusion`), if it is given the product:
apex's kernel where apex was built with it, and torch's `addmm_` where both matrices are float32 as the sum is.

That is done for the layers that hold most of a network's weights, those of its blocks' attention and MLP. The gradient
is not rounded to bfloat16 before it is added, so that a run in bf16 is not to the bit what it is without.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Collection
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from braid.kernels.errors import BraidError

KERNEL = "fused_weight_gradient_mlp_cuda"
"""apex's extension: its module, and what Megatron-core calls it."""


def fuse_accumulation(module: nn.Module, device: torch.device, half: Collection[str]) -> None:
    """Let the weights of the blocks' linear layers add their gradients themselves. Called once, before Megatron's
    DistributedDataParallel takes the parameters.

    Args:
        half: names of the parameters that will be bfloat16. Where there are any, only these: autocast may cast others,
            and the gradient of a cast does not come to the weight itself.

    Raises:
        BraidError: on a GPU in bf16 without apex's kernel.
    """
    _provide_kernel(device, half=bool(half))
    names = {parameter: name for name, parameter in module.named_parameters() if parameter.requires_grad}
    for network in list(module.modules()):
        for owner in [each for block in getattr(network, "blocks", ()) for each in block.modules()]:
            for name in getattr(owner, "divided", {}):
                layer = owner.get_submodule(name)
                if layer.weight not in names or (half and names[layer.weight] not in half):
                    continue
                if type(layer) is nn.Linear:
                    owner.set_submodule(name, FusedLinear(layer))
                layer.weight.fused = True


def is_fused(weight: Tensor) -> bool:
    """Whether products add the gradient of this weight to its `main_grad`. Autograd gets another tensor in its place,
    without meaning, so that the weight must not be used in any other way."""
    return getattr(weight, "fused", False)


class FusedLinear(nn.Module):
    """A linear layer with the parameters of `whole`, on one process of the tensor axis."""

    def __init__(self, whole: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = whole.in_features, whole.out_features
        self.weight = whole.weight
        self.register_parameter("bias", whole.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = fused_product(x, self.weight)
        return x if self.bias is None else x + self.bias.to(x.dtype)


@torch.compiler.disable
def fused_product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T of a fused weight, in the dtype that a linear layer would compute it in."""
    rows = x.flatten(0, -2).to(autocast_dtype(x)).contiguous()
    return fused_linear(rows, weight).unflatten(0, x.shape[:-1])


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    allreduce: bool = False,
    sequence: bool = False,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """Megatron's function of a linear layer, with its flag set. x is rows of features, or [positions, others, features]
    with `sequence`; all are of one dtype.

    Args:
        allreduce: the gradient of x is summed over the group.
        sequence: the positions of x are divided among the group, and gathered.
    """
    # A weight that is cast is another tensor, and its gradient would come by another way: that of this use only.
    assert weight.dtype == x.dtype, f"a weight in {weight.dtype} is used in {x.dtype}"
    return _fused_function().apply(x, weight, bias, True, allreduce, sequence, None, None, group)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer computes x in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@functools.cache
def _layers() -> ModuleType:
    return importlib.import_module("megatron.core.tensor_parallel.layers")


@functools.cache
def _fused_function() -> type[Function]:
    """Megatron's, in whose backward pass the weight is the parameter itself: out of a checkpoint (recomputation) it
    comes as another tensor, which has no `main_grad`."""
    megatron = _layers().LinearWithGradAccumulationAndAsyncCommunication

    class Context:
        def __init__(self, ctx: Any) -> None:
            self.ctx = ctx
            self.saved_tensors = ctx.saved_tensors[0], ctx.weight

        def __getattr__(self, name: str) -> Any:
            return getattr(self.ctx, name)

    class Fused(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, *options: Any) -> Tensor:
            ctx.weight = weight
            return megatron.forward(ctx, x, weight, *options)

        @staticmethod
        def backward(ctx: Any, of_output: Tensor) -> tuple[Tensor | None, ...]:
            return megatron.backward(Context(ctx), of_output)

    return Fused


def _provide_kernel(device: torch.device, *, half: bool) -> None:
    """Give Megatron's function the product that it asks for, where apex's is not there."""
    if isinstance(getattr(_layers(), KERNEL, None), ModuleType):  # and not what stands in for it
        return
    if half and device.type == "cuda":
        raise BraidError(
            "parallel.fused_accumulation in bf16 needs apex's kernel on a GPU",
            found=f"no module {KERNEL}",
            change="build NVIDIA's apex with --cpp_ext --cuda_ext, or parallel.fused_accumulation=false",
        )
    setattr(_layers(), KERNEL, SimpleNamespace(wgrad_gemm_accum_fp32=add_product))


def add_product(inputs_NI: Tensor, of_outputs_NO: Tensor, total_OI: Tensor) -> None:
    """total += of_outputs^T @ inputs, in place. Matrices in bfloat16 are widened first: a CPU has no such product."""
    total_OI.addmm_(of_outputs_NO.t().to(total_OI.dtype), inputs_NI.to(total_OI.dtype))
