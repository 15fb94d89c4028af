"""Products add gradients to their sums: which do, what is added, and what is refused."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from accumulation_bodies import fuse, train_in_bf16

from braid.kernels.errors import BraidError
from braid.parallel.accumulation import FusedLinear, add_product, fuse_accumulation, is_fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_added_without_rounding_it(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    inputs, of_outputs = (torch.randn(300, width, generator=draw).to(dtype) for width in (24, 40))
    total = torch.randn(40, 24, generator=draw)
    wanted = total.double() + of_outputs.double().t() @ inputs.double()
    place = total.data_ptr()
    add_product(inputs, of_outputs, total)
    assert total.data_ptr() == place
    sizes = of_outputs.double().abs().t() @ inputs.double().abs()  # a sum of n terms is good to n roundings of them
    assert ((total - wanted).abs() <= 301 * 2**-24 * (sizes + 5)).all()
    assert 301 * 2**-24 * sizes.max() < 2**-9 * wanted.abs().max(), "else a product in bfloat16 would do"


@pytest.mark.parametrize(
    "name", ["mdlm", "ccdd-moedit-1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ccdd-mmdit", "elf"))]
)
def test_the_blocks_matrices_and_no_others(ranks, name: str) -> None:
    ranks(fuse, 1, name)


def test_sums_of_bf16_are_nearer_to_the_exact_ones(ranks) -> None:
    """Of many micro-batches with the same activations: float64 sums of the products beside both ways."""
    ((fused, rounded),) = ranks(train_in_bf16, 1)
    assert 0 < fused < rounded / 20


@pytest.mark.parametrize("half", [["blocks.0.matrix.weight"], []])
def test_only_weights_that_are_trained_and_not_cast(half: list[str]) -> None:
    """In bf16 a weight that stays float32 is cast by autocast, and a frozen one has no sum."""

    class Owner(torch.nn.Module):
        divided: ClassVar = {"matrix": None, "float32": None, "frozen": None}

        def __init__(self) -> None:
            super().__init__()
            self.matrix, self.float32, self.frozen = (torch.nn.Linear(2, 2) for _ in range(3))
            self.frozen.requires_grad_(False)

    module = torch.nn.Module()
    module.blocks = torch.nn.ModuleList([Owner()])
    fuse_accumulation(module, torch.device("cpu"), half)
    fused = {name for name, parameter in module.named_parameters() if is_fused(parameter)}
    assert fused == ({"blocks.0.matrix.weight"} if half else {"blocks.0.matrix.weight", "blocks.0.float32.weight"})
    replaced = {f"{name}.weight" for name, layer in module.named_modules() if isinstance(layer, FusedLinear)}
    assert replaced == fused


def test_bf16_on_a_gpu_without_apexs_kernel_is_refused() -> None:
    with pytest.raises(BraidError) as caught:
        fuse_accumulation(torch.nn.Linear(2, 2), torch.device("cuda"), ["weight"])
    assert "fused_weight_gradient_mlp_cuda" in caught.value.found and "=false" in caught.value.change
