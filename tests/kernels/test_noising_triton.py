"""The Triton kernels: interpreted, with the bits of NumPy, and compiled for an H100 without fused multiply-adds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

INTERPRETED = """
import sys
import torch
sys.path.insert(0, {tests!r})
from noising_cases import assert_same, expected, expected_gradients, gradients, random_case
from braid.kernels import dispatch, noising_triton, random
from braid.kernels.noising import joint_noising

dispatch.functions = lambda operation, device: noising_triton
torch.use_deterministic_algorithms(True)
for seed in range({first}, {last}):
    case = random_case(seed)
    assert_same(joint_noising(*case.arguments, **case.options), expected(case))
    if case.vectors is None:
        continue
    of_latents = torch.randn(*case.shape(), case.vectors.shape[-1]).to(case.options["dtype"])
    for ordered in (True, False):
        found = gradients(noising_triton, case, of_latents, ordered=ordered)
        for ours, exact in zip(found, expected_gradients(case, of_latents)):
            tolerance = 1e-6 if ours.dtype == torch.float32 else 2**-8
            assert (ours.double() - exact).abs().max() <= tolerance * max(1.0, float(exact.abs().max())), seed
print("right")
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from braid.kernels import noising_triton as ours

POINTERS = {{
    **dict.fromkeys(("tokens", "key", "ordinals", "positions", "noised_tokens", "sources"), "*i64"),
    **dict.fromkeys(("keep", "kinds"), "*u8"), "vectors": "*bf16", "latents": "*bf16", "latents_gradient": "*bf16",
    "vectors_gradient": "*bf16",
}}
NUMBERS = {{"word": "i32", "draw": "i32", "mask_id": "i64", "num_tokens": "i64"}}
CONSTANTS = {{"FROM_TABLE": True, "EMBED_NOISED": False, "IN_BFLOAT16": True, "BLOCKS": 64}}
INTEGERS = ("_row", "_column", "_stride", "length", "channels", "first_channel")
ONE = {{"draw": 1}} if {draw_is_one} else {{}}  # Triton makes a constant of a number that is 1
for kernel in (ours.normals_kernel, ours.noising_kernel, ours.noising_backward_kernel):
    signature, constants = {{}}, {{}}
    for name in kernel.arg_names:
        if name in CONSTANTS | ONE:
            signature[name], constants[name] = "constexpr", (CONSTANTS | ONE)[name]
        elif name in NUMBERS or name.endswith(INTEGERS):
            signature[name] = NUMBERS.get(name, "i64")
        else:
            signature[name] = POINTERS.get(name, "*fp32")
    source = ASTSource(kernel, signature, constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=ours.NO_FUSION)
    assert made.asm["cubin"][:4] == b"\\x7fELF"
    assert "fma.rn.f32" not in made.asm["ptx"], "a product and a sum were fused"
    print(kernel.__name__)
"""


def run(code: str, **environment: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("first, last", [(3, 5), pytest.param(5, 25, marks=pytest.mark.slow)], ids=["few", "many"])
def test_the_interpreter_has_the_bits_of_numpy(first, last):
    code = INTERPRETED.format(tests=str(Path(__file__).parent), first=first, last=last)
    assert run(code, TRITON_INTERPRET="1") == "right\n"


@pytest.mark.parametrize("draw_is_one", [False, True])
def test_compiled_for_an_h100_nothing_is_fused(tmp_path, draw_is_one):
    printed = run(COMPILED.format(draw_is_one=draw_is_one), TRITON_CACHE_DIR=str(tmp_path))
    assert printed.split() == ["normals_kernel", "noising_kernel", "noising_backward_kernel"]
