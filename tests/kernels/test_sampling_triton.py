"""Triton's draws: interpreted, token for token those of the reference race, and compiled for three GPUs."""

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
from sampling_cases import KEY, drawn, hybrid_step, law, random_case
from braid.kernels import dispatch, sampling_triton
from braid.kernels.errors import BraidError
from braid.kernels.sampling import draw_tokens

dispatch.functions = lambda operation, device: sampling_triton
NUM = {rows}


def numbers(count, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 1 << 40, count)), torch.from_numpy(rng.integers(0, 1 << 32, count))


def refuses(logits, **options):
    try:
        draw_tokens(KEY, logits, *numbers(len(logits)), **options)
    except BraidError as error:
        return "cannot draw a token" in str(error)


for vocab_size in {sizes}:
    ordinals, positions = numbers(NUM, vocab_size)
    for step in ("none", "uniform", "hybrid", "masked"):
        for seed in range(*{seeds}):
            logits, options = random_case(seed, vocab_size, NUM, step=step)
            p = law(logits, **options)
            possible = p.sum(1) > 0
            tokens = draw_tokens(KEY, logits, ordinals, positions, **options, draw=seed)
            expected = drawn(p[possible], ordinals[possible], positions[possible], seed)
            assert torch.equal(tokens[possible], expected), (vocab_size, step, seed)
            likely = draw_tokens(KEY, logits, ordinals, positions, **options, greedy=True).numpy()
            assert np.all(p[possible, likely[possible]] >= p[possible].max(1) * (1 - 1e-12))
            chosen = torch.tensor([NUM - 1, 0])
            part = {{name: value[chosen] if name == "noisy" else value for name, value in options.items()}}
            some = draw_tokens(KEY, logits, ordinals[chosen], positions[chosen], rows=chosen, draw=seed, **part)
            assert torch.equal(some, tokens[chosen])

ordinals, positions = numbers(3)
tied = torch.tensor([0.0, 1.0, -0.0, -9.0, 0.0, 1.0]).repeat(3, 40)
for top_p in (1e-6, 0.2, 0.9, 1 - 1e-7):
    assert torch.equal(draw_tokens(KEY, tied, ordinals, positions, top_p=top_p),
                       drawn(law(tied, top_p=top_p), ordinals, positions))
for row in (torch.linspace(-300, 300, 2500), torch.linspace(300, -300, 2500), torch.randn(2500) * 1e30):
    p = np.exp(row.double() - row.double().max()).numpy()[None].repeat(3, 0)
    assert torch.equal(draw_tokens(KEY, row.expand(3, -1), ordinals, positions), drawn(p, ordinals, positions))

unread = torch.full((3, 5), torch.nan)
unread[1] = 0
still = draw_tokens(KEY, unread, *numbers(3), left_out=2, step=hybrid_step(0.5, 0.25, 4, 0.0),
                    noisy=torch.tensor([4, 2, 0]))
assert still[0] == 4 and still[2] == 0
for bad in (torch.nan, torch.inf):
    logits = torch.zeros(3, 5)
    logits[1, 3] = bad
    assert refuses(logits) and not refuses(logits, left_out=3)
assert refuses(torch.full((2, 5), -torch.inf))
print("right")
"""

COMPILED = """
import re
import subprocess
import sys
import triton
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from braid.kernels import sampling_triton as ours

kernel = ours.sampling_kernel
POINTERS = {"numbers": "*fp64", "logits": "*bf16"}
NUMBERS = {"guidance": "fp32", "rest": "fp32", "stride": "i64", "size": "i32", "draw": "i32"}
for nucleus, step in ((False, False), (False, True), (True, True)):
    one = {"draw": 1} if nucleus else {}  # Triton makes a constant of a number that is 1
    constants = one | {"NUCLEUS": nucleus, "STEP": step, "GREEDY": False, "BLOCK": ours.MOST_LOGITS, "other": None}
    signature = {name: "constexpr" if name in constants else NUMBERS.get(name, POINTERS.get(name, "*i64"))
                 for name in kernel.arg_names}
    for architecture in (80, 90, 100) if not step else (90,):
        made = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", architecture, 32),
                              options=ours.NO_FUSION)
        assert made.asm["cubin"][:4] == b"\\x7fELF"
        assert "fma.rn.f32" not in re.sub(r"ex2.*", "", made.asm["ptx"]), "a product and a sum were fused"
        cubin = Path(sys.argv[1], "kernel.cubin")
        cubin.write_bytes(made.asm["cubin"])
        dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        said = subprocess.run([dump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
        print(architecture, *re.search(r"STACK:(\\d+) SHARED:(\\d+) LOCAL:(\\d+)", said).groups())
"""


def run(code: str, *words: Path, **environment: str) -> str:
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("sizes", "seeds", "rows"),
    [((2, 530), (0, 2), 2), pytest.param((5, 128, 1100, 4101), (2, 6), 4, marks=pytest.mark.slow)],
    ids=["few", "many"],
)
def test_interpreted_draws_are_those_of_the_reference_race(sizes, seeds, rows):
    code = INTERPRETED.format(tests=str(Path(__file__).parent), sizes=sizes, seeds=seeds, rows=rows)
    assert run(code, TRITON_INTERPRET="1") == "right\n"


def test_compiled_for_three_gpus_nothing_is_spilt_or_fused(tmp_path):
    lines = run(COMPILED, tmp_path, TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    found = [tuple(map(int, line.split())) for line in lines]
    assert [architecture for architecture, *_ in found] == [80, 90, 100, 90, 90]
    assert all(stack == local == 0 and shared < 48 * 1024 for _, stack, shared, local in found)
