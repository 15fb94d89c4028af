"""Output head and cross-entropy, forward and backward: the masked half of the positions against all of them, in chunks
against all logits at once, and against what other libraries have for it where they are installed."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from braid.kernels import dispatch
from braid.kernels.linear_cross_entropy import linear_cross_entropy
from braid.kernels.linear_loss import Rows

from .measure import as_json, interleaved, machine

CONTENDERS = ("masked rows in chunks", "all rows in chunks", "all rows at once")
SIZES = {"cpu": 1024, "cuda": 16384}


def run(
    device: str = "cpu",
    *,
    tokens: int = 0,
    width: int = 768,
    vocab: int = 50304,
    rounds: int = 20,
    seconds: float = 60.0,
) -> dict[str, Any]:
    """Timings and peak memory, in bytes beside hidden states and weights, of `tokens` positions of which half are
    masked; in bf16 on a GPU, as under autocast, in float32 on a CPU. `speedup` is that of masked rows in chunks over
    the others, and `memory_share` what the others need of the memory of all rows at once."""
    on, tokens = torch.device(device), tokens or SIZES[torch.device(device).type]
    shape = {"tokens": tokens, "width": width, "vocab": vocab}
    contenders = _contenders(on, **shape)
    timings = interleaved(contenders, on, rounds=rounds, warmup=1, seconds=seconds)
    peaks = {name: peak_bytes(call, on) for name, call in contenders.items()}
    first, last = CONTENDERS[0], CONTENDERS[-1]
    return {
        "machine": machine(on),
        "implementation": dispatch.choose(on.type).name,
        "shape": shape,
        "results": {
            **as_json(timings),
            "speedup": {name: timings[name].median_ms / timings[first].median_ms for name in timings if name != first},
            "peak_bytes": peaks,
            "memory_share": {name: peaks[name] / peaks[last] for name in peaks if name != last},
        },
    }


def peak_bytes(call: Callable[[], None], device: torch.device) -> int:
    """The most that torch has allocated at once during the call, beside what was there."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes))


def _contenders(device: torch.device, *, tokens: int, width: int, vocab: int) -> dict[str, Callable[[], None]]:
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hidden = torch.randn(tokens, width, device=device, generator=generator).to(dtype).requires_grad_()
    weight = (0.02 * torch.randn(vocab, width, device=device, generator=generator)).requires_grad_()
    bias = torch.zeros(vocab, device=device, requires_grad=True)
    targets = torch.randint(vocab - 1, (tokens,), device=device, generator=generator)
    masked = torch.rand(tokens, device=device, generator=generator) < 0.5
    weights = torch.rand(tokens, device=device, generator=generator) * masked
    leaves = hidden, weight, bias

    def chunked(counts: Tensor) -> None:
        rows = Rows(counts)
        rows.begin()
        total, _ = linear_cross_entropy(*leaves, targets, weights, rows=rows, without=vocab - 1)
        torch.autograd.grad(total, leaves)

    def at_once() -> None:
        logits = F.linear(hidden, weight.to(dtype), bias.to(dtype)).float()
        logits = logits.masked_fill(torch.arange(vocab, device=device) == vocab - 1, -torch.inf)
        torch.autograd.grad((weights * F.cross_entropy(logits, targets, reduction="none")).sum(), leaves)

    everything = torch.ones_like(masked)
    ours = (lambda: chunked(masked), lambda: chunked(everything), at_once)
    contenders = dict(zip(CONTENDERS, ours, strict=True))
    if device.type == "cuda":
        contenders["all rows at once, compiled"] = torch.compile(at_once)

    # They know no token that is left out.
    if hasattr(F, "linear_cross_entropy"):
        options = importlib.import_module("torch.nn").LinearCrossEntropyOptions()

        def torchs() -> None:
            cast = weight.to(dtype), bias.to(dtype)
            nats = F.linear_cross_entropy(
                hidden, cast[0], targets, linear_bias=cast[1], reduction="none", options=options
            )
            torch.autograd.grad((weights * nats).sum(), leaves)

        contenders["torch's linear_cross_entropy"] = torchs
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
        loss = module.LigerFusedLinearCrossEntropyLoss(reduction="none")

        def liger() -> None:
            nats = loss(weight.to(dtype), hidden, targets, bias.to(dtype))
            torch.autograd.grad((weights * nats).sum(), leaves)

        contenders["Liger's"] = liger
    return contenders
