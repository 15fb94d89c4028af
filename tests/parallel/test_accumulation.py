"""Products add gradients to their sums: which do, what is added, and what is refused."""

from __future__ import annotations

import pytest
import torch
from accumulation_bodies import fuse, train_in_bf16

from braid.kernels.errors import BraidError
from braid.parallel.accumulation import add_product, fuse_accumulation


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


def test_bf16_on_a_gpu_without_apexs_kernel_is_refused() -> None:
    with pytest.raises(BraidError) as caught:
        fuse_accumulation(torch.nn.Linear(2, 2), torch.device("cuda"), half=True)
    assert "fused_weight_gradient_mlp_cuda" in caught.value.found and "=false" in caught.value.change
