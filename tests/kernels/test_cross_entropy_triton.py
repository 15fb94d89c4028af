"""The Triton kernel: interpreted, against float64, and compiled for an H100."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

INTERPRETED = """
import sys
import numpy as np
import torch
sys.path.insert(0, {tests!r})
from test_cross_entropy import case, reference
from braid.kernels import cross_entropy, cross_entropy_triton, dispatch

dispatch.functions = lambda operation, device: cross_entropy_triton
for seed, vocab_size in enumerate((1, 30, 4101)):
    for dtype, tolerance in ((torch.float32, 4e-6), (torch.bfloat16, 2**-7)):  # the interpreter cuts off
        logits, targets, weights = case(vocab_size, rows=5, seed=seed)
        left_out = vocab_size // 2 if vocab_size > 2 else None
        targets[targets == left_out] = 0
        logits = logits.to(dtype)
        nll, lse, _, gradient = reference(logits, targets, weights, 1e-3, left_out)
        whole = logits.clone()
        ours = cross_entropy.cross_entropy_(whole, targets, weights, 1e-3, left_out=left_out)
        halves = logits.clone()
        again = cross_entropy.cross_entropy_(halves, targets, weights, 1e-3, True, lambda *each: each, left_out)
        assert torch.equal(whole, halves) and all(map(torch.equal, ours, again))
        assert np.allclose(ours[0], nll, rtol=4e-6, atol=2e-6) and np.allclose(ours[1], lse, rtol=4e-6)
        assert np.allclose(whole.double().numpy(), gradient, rtol=tolerance, atol=1e-6)
print("right")
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from braid.kernels.cross_entropy_triton import cross_entropy_kernel as kernel

signature = {"logits": "*bf16", "targets": "*i64", "total_out": "*fp64", "stride": "i64",
             "left_out": "i64", "z_loss": "fp32"}
constants = {"SIZE": 50304, "STATISTICS": True, "GRADIENT": True, "BLOCK": 4096}
signature = {name: "constexpr" if name in constants else signature.get(name, "*fp32") for name in kernel.arg_names}
made = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32),
                      options={"num_warps": 8})
assert made.asm["cubin"][:4] == b"\\x7fELF"
print("compiled")
"""


def run(code: str, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_interpreter_is_right():
    assert run(INTERPRETED.format(tests=str(Path(__file__).parent)), TRITON_INTERPRET="1") == "right\n"


def test_it_compiles_without_a_gpu():
    assert run(COMPILED) == "compiled\n"
