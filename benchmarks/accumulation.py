"""Gradient accumulation fused into products, beside a product that is written out and added. One thread is enough:

    python benchmarks/accumulation.py --width 768 --hidden 3072 --rows 256 1024 4096

Prints a table: the median time of both for one weight and one micro-batch, and the ratio. On a GPU, in bf16 too, where
apex's kernel is.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from braid.parallel.accumulation import KERNEL, add_product

ROUNDS, SECONDS = 5, 1.0


def written_out(inputs: Tensor, of_outputs: Tensor, total: Tensor) -> None:
    """As autograd and Megatron's hook do it."""
    gradient = of_outputs.t() @ inputs
    total.add_(gradient)


def seconds(function: Callable[..., None], *tensors: Tensor) -> float:
    """The median of some calls."""
    times, end = [], time.perf_counter() + SECONDS / ROUNDS
    while not times or time.perf_counter() < end:
        begin = time.perf_counter()
        function(*tensors)
        if tensors[0].is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return median(times)


def fused_in(dtype: torch.dtype) -> Callable[..., None]:
    if dtype == torch.float32:
        return add_product
    return importlib.import_module(KERNEL).wgrad_gemm_accum_fp32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--hidden", type=int, default=3072)
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    dtypes = [torch.float32] + [torch.bfloat16] * (given.device == "cuda")
    print("| rows of a micro-batch | dtype | written out, ms | fused, ms | written out / fused |")
    print("| ---: | --- | ---: | ---: | ---: |")
    for dtype in dtypes:
        fused = fused_in(dtype)
        for rows in given.rows:
            inputs = torch.randn(rows, given.width, device=given.device).to(dtype)
            of_outputs = torch.randn(rows, given.hidden, device=given.device).to(dtype)
            total = torch.zeros(given.hidden, given.width, device=given.device)
            ways = {written_out: [], fused: []}
            for way in ways:
                way(inputs, of_outputs, total)
            for _ in range(ROUNDS):  # by turns, so that a busy moment hits both
                for way, found in ways.items():
                    found.append(seconds(way, inputs, of_outputs, total))
            slow, fast = (1e3 * median(found) for found in ways.values())
            print(f"| {rows} | {str(dtype).removeprefix('torch.')} | {slow:.2f} | {fast:.2f} | {slow / fast:.2f} |")


if __name__ == "__main__":
    main()
