"""Cross-entropy of rows of logits with its gradient: ours, in place, against torch's with autograd."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from braid.kernels import cross_entropy_eager, dispatch
from braid.kernels.cross_entropy import cross_entropy_

from .measure import as_json, copy_bytes_per_second, interleaved, machine


def run(device: str = "cpu", *, rows: int = 256, vocab: int = 50304, rounds: int = 20) -> dict[str, Any]:
    """Timings of losses and gradient of `rows` rows of float32 logits. What ours finds in place of logits is its last
    gradient, which takes as long. `share_of_copy`: how near reading twice and writing once (12 bytes a logit) comes to
    the bandwidth of a copy."""
    on = torch.device(device)
    generator = torch.Generator(on).manual_seed(0)
    logits = 3 * torch.randn(rows, vocab, device=on, generator=generator)
    targets = torch.randint(vocab, (rows,), device=on, generator=generator)
    weights = torch.rand(rows, device=on, generator=generator)
    used, leaf = logits.clone(), logits.clone().requires_grad_()
    outputs = [torch.empty(rows, dtype=dtype, device=on) for dtype in (torch.float32, torch.float64, torch.float32)]

    def autograd() -> None:
        leaf.grad = None
        (weights * F.cross_entropy(leaf, targets, reduction="none")).sum().backward()

    contenders = {
        "ours": lambda: cross_entropy_(used, targets, weights),
        "eager": lambda: cross_entropy_eager.cross_entropy_into(used, targets, weights, 0.0, -1, True, True, *outputs),
        "autograd": autograd,
    }
    timings = interleaved(contenders, on, rounds=rounds)
    share = 12 * rows * vocab / timings["ours"].median_ms * 1e3 / copy_bytes_per_second(on)
    speedup = {name: timing.median_ms / timings["ours"].median_ms for name, timing in timings.items() if name != "ours"}
    return {
        "machine": machine(on),
        "implementation": dispatch.choose(on.type).name,
        "shape": {"rows": rows, "vocab": vocab},
        "results": as_json(timings) | {"speedup": speedup, "share_of_copy": share},
    }
