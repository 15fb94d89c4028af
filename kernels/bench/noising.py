"""Joint noising against the same in plain torch operations, with torch's own random numbers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from braid.kernels import dispatch
from braid.kernels.noising import joint_noising

from .measure import as_json, copy_bytes_per_second, interleaved, machine

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROWS = {"cpu": 8, "cuda": 512}


def run(
    device: str = "cpu",
    *,
    rows: int = 0,
    length: int = 1024,
    channels: int = 768,
    vocab: int = 50304,
    rounds: int = 20,
    compiled: bool | None = None,
) -> dict[str, Any]:
    """Timings, forward, for a table and z of each type; masks half the tokens.

    `share_of_copy` is how near reading a vector and writing z once comes to the bandwidth of a copy. `compiled`: time
    the plain operations under torch.compile too; None: on a GPU alone.
    """
    on, results = torch.device(device), {}
    rows, compiled = rows or ROWS[on.type], on.type == "cuda" if compiled is None else compiled
    bandwidth = copy_bytes_per_second(on)
    generator = torch.Generator(on).manual_seed(0)
    tokens = torch.randint(vocab - 1, (rows, length), device=on, generator=generator)
    ordinals, positions = torch.arange(rows, device=on), torch.arange(length, device=on)
    half, alpha, sigma = (torch.full((rows,), x, device=on) for x in (0.5, 0.8, 0.6))
    for name, dtype in DTYPES.items():
        table = torch.randn(vocab, channels, device=on, generator=generator).to(dtype)

        def fused(table: Tensor = table, dtype: torch.dtype = dtype) -> object:
            return joint_noising(
                tokens, table, 1, ordinals, positions, mask_below=half, mask_id=vocab - 1, alpha=alpha, sigma=sigma,
                dtype=dtype,
            )  # fmt: skip

        def eager(table: Tensor = table, dtype: torch.dtype = dtype) -> object:
            masked = torch.rand(rows, length, device=on) < half[:, None]
            noised = torch.where(masked, vocab - 1, tokens)
            clean, eps = F.embedding(tokens, table), torch.randn(rows, length, channels, device=on, dtype=dtype)
            return noised, alpha.to(dtype)[:, None, None] * clean + sigma.to(dtype)[:, None, None] * eps

        contenders = {"fused": fused, "eager": eager} | ({"compiled": torch.compile(eager)} if compiled else {})
        timings = interleaved(contenders, on, rounds=rounds)
        took = timings["fused"].median_ms
        speedup = {other: timings[other].median_ms / took for other in timings if other != "fused"}
        share = 2 * dtype.itemsize * rows * length * channels / took * 1e3 / bandwidth
        results[name] = as_json(timings) | {"speedup": speedup, "share_of_copy": share}
    return {
        "machine": machine(on),
        "implementation": dispatch.choose(on.type).name,
        "shape": {"rows": rows, "length": length, "channels": channels, "vocab": vocab},
        "results": results,
    }
