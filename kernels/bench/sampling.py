"""Draws of tokens from logits: exact ones against the same decided in float64 throughout, and against torch's own."""

from __future__ import annotations

from typing import Any

import torch

from braid.kernels import dispatch, sampling_eager
from braid.kernels.sampling import ReverseStep, draw_tokens

from .measure import as_json, copy_bytes_per_second, interleaved, machine

ROWS = {"cpu": 64, "cuda": 4096}


def run(device: str = "cpu", *, rows: int = 0, vocab: int = 50257, rounds: int = 20) -> dict[str, Any]:
    """Timings of one draw for each of `rows` rows of logits: of the token itself, with a nucleus, and of the reverse
    step of the uniform process. torch's draws (softmax and multinomial; the argmax of logits and Gumbel noise) have the
    resolution of float32 and depend on the batch. `share_of_copy`: how near reading the logits once comes to the
    bandwidth of a copy."""
    on = torch.device(device)
    rows, bandwidth = rows or ROWS[on.type], copy_bytes_per_second(on)
    generator = torch.Generator(on).manual_seed(0)
    logits = 3 * torch.randn(rows, vocab, device=on, generator=generator)
    ordinals, positions = torch.arange(rows, device=on), torch.zeros(rows, dtype=torch.int64, device=on)
    noisy = torch.randint(vocab - 1, (rows,), device=on, generator=generator)
    mask, ratio = vocab - 1, 0.9
    arrives = (1 - ratio) / mask
    step = ReverseStep(0.5, 0.5 / mask, 0.0, ratio, arrives, arrives)

    def eager(top_p: float = 1.0, reverse: ReverseStep | None = None) -> torch.Tensor:
        law = sampling_eager.tempered(logits, 1.0, top_p, mask)
        if reverse is not None:
            law = sampling_eager.log_posterior(law.softmax(-1), noisy, mask, *vars(reverse).values())
        return sampling_eager.random.categorical(1, law, ordinals, positions)

    def ours(**options: Any) -> torch.Tensor:
        return draw_tokens(1, logits, ordinals, positions, left_out=mask, **options)

    contenders = {
        "token": {
            "ours": ours,
            "float64": eager,
            "multinomial": lambda: torch.multinomial(logits.softmax(-1), 1),
            "gumbel": lambda: (logits - torch.empty_like(logits).exponential_().log_()).argmax(-1),
        },
        "nucleus": {"ours": lambda: ours(top_p=0.9), "float64": lambda: eager(0.9)},
        "reverse step": {
            "ours": lambda: ours(step=step, noisy=noisy),
            "float64": lambda: eager(reverse=step),
        },
    }
    results = {}
    for name, each in contenders.items():
        timings = interleaved(each, on, rounds=rounds)
        fastest = {other: timings[other].median_ms / timings["ours"].median_ms for other in timings if other != "ours"}
        share = 4 * rows * vocab / timings["ours"].median_ms * 1e3 / bandwidth
        results[name] = as_json(timings) | {"speedup": fastest, "share_of_copy": share}
    return {
        "machine": machine(on),
        "implementation": dispatch.choose(on.type).name,
        "shape": {"rows": rows, "vocab": vocab},
        "results": results,
    }
