"""Joint noising by its implementations on this machine's CPU: compiled, eager, and the CUDA kernels in an emulator."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from braid.kernels import dispatch, noising, noising_eager, random, reference, toolchain
from braid.kernels.noising import joint_noising

from .emulated import Emulated
from .noising_cases import assert_same, expected, expected_gradients, gradients, random_case


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> Emulated:
    try:
        toolchain.find()
    except toolchain.BuildError as error:
        pytest.skip(str(error))
    return Emulated(tmp_path_factory.mktemp("emulator"))


@pytest.fixture(params=["compiled", "eager", "emulated"])
def functions(request, monkeypatch) -> Iterator[Any]:
    """Each implementation in turn, as the one that operations use. Tensors start as NaN or the largest integer."""
    found = dispatch.choose("cpu")
    if request.param == "compiled" and found.name != "compiled":
        pytest.skip(f"there is no compiler: {found.reason}")
    if request.param == "emulated":
        chosen = {"noising": request.getfixturevalue("emulated")} | {"normals": request.getfixturevalue("emulated")}
    elif request.param == "compiled":
        chosen = {"noising": torch.ops.braid, "normals": torch.ops.braid}
    else:
        chosen = {"noising": noising_eager, "normals": random}
    monkeypatch.setattr(dispatch, "functions", lambda operation, device: chosen[operation])
    torch.use_deterministic_algorithms(True)
    yield chosen["noising"]
    torch.use_deterministic_algorithms(False)


def test_all_implementations_have_the_bits_of_numpy(functions):
    for seed in range(150):
        case = random_case(seed)
        assert_same(joint_noising(*case.arguments, **case.options), expected(case))


def test_all_implementations_draw_the_normals_of_numpy(functions):
    rng = np.random.default_rng(5)
    for channels, first in ((1, 0), (4, 2), (64, 0), (65, 3), (200, 1021), (7, 262137)):
        ordinals, positions = rng.integers(0, 1 << 40, 3), rng.integers(0, 1 << 32, 5)
        drawn = random.normal(
            77, torch.from_numpy(ordinals), torch.from_numpy(positions), channels, draw=9, first_channel=first
        )
        wanted = reference.normal(77, ordinals, positions, channels, draw=9, first_channel=first)
        assert np.array_equal(drawn.numpy().view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize("ordered", [True, False])
def test_gradients_against_float64(functions, ordered):
    """Each implementation's backward pass by itself, with bfloat16 where it is asked for."""
    if not ordered and functions is torch.ops.braid:
        pytest.skip("the host's sums are always ordered")
    for seed in range(1000, 1100):
        case = random_case(seed)
        if case.vectors is None:
            continue
        of_latents = torch.randn(*case.shape(), case.vectors.shape[-1], generator=torch.Generator().manual_seed(seed))
        of_latents = of_latents.to(case.options["dtype"])
        found = gradients(functions, case, of_latents, ordered=ordered)
        for ours, exact in zip(found, expected_gradients(case, of_latents), strict=True):
            tolerance = 1e-6 if ours.dtype == torch.float32 else 2**-8
            assert (ours.double() - exact).abs().max() <= tolerance * max(1.0, float(exact.abs().max()))


def test_long_sums_over_one_row_of_the_table(functions):
    """The row of the mask is in half the positions: its sum crosses many of a device's pieces."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 5, (3, 700), generator=generator)
    tokens[:, ::2] = 2
    case = random_case(0)
    case.tokens, case.vectors = tokens, torch.randn(6, 10, generator=generator)
    case.ordinals, case.positions = torch.arange(3), torch.arange(700)
    alpha = torch.rand(3, 700, generator=generator)
    case.options = {"alpha": alpha, "sigma": alpha, "first_channel": 0, "draw": 0, "embed": "clean",
                    "dtype": torch.float32, "return_eps": False}  # fmt: skip
    of_latents = torch.randn(3, 700, 10, generator=generator)
    found = gradients(functions, case, of_latents, ordered=True)[0]
    torch.testing.assert_close(found.double(), expected_gradients(case, of_latents)[0], rtol=2e-6, atol=1e-4)
    assert torch.equal(found, gradients(functions, case, of_latents, ordered=True)[0])
    assert not found[5].any()


# -- the operation, as this machine runs it ------------------------------------------------------------------------


def example(rows: int = 6, length: int = 11, channels: int = 24, vocab: int = 30, **options):
    """Arguments and options with everything in use; vectors, alpha and sigma want gradients."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, vocab, (rows, length), generator=generator)
    table = torch.randn(vocab + 1, channels, generator=generator, requires_grad=True)
    alpha, sigma, alpha_corrupted, sigma_corrupted = torch.rand(4, rows, generator=generator).unbind()
    options = {
        "mask_below": torch.full((rows,), 0.3), "noise_below": torch.full((rows,), 0.7), "mask_id": vocab,
        "num_tokens": vocab, "alpha": alpha.requires_grad_(), "sigma": sigma.requires_grad_(),
        "alpha_corrupted": alpha_corrupted.requires_grad_(), "sigma_corrupted": sigma_corrupted.requires_grad_(),
        "embed": "noised", "weights_by_kind": torch.rand(rows, 3, generator=generator),
    } | options  # fmt: skip
    return (tokens, table, 99, torch.arange(rows) + (1 << 33), torch.arange(length)), options


def test_autograd_reaches_all_that_wants_a_gradient():
    (tokens, table, *rest), options = example()
    names = ("alpha", "sigma", "alpha_corrupted", "sigma_corrupted")
    made = joint_noising(tokens, table, *rest, return_eps=True, **options)
    of_latents = torch.randn(made.latents.shape, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad(made.latents, (table, *(options[name] for name in names)), of_latents)

    exact = [x.detach().double().requires_grad_() for x in (table, *(options[name] for name in names))]
    kept = (made.kind == 0)[..., None]
    a, s, a_other, s_other = (x[:, None, None] for x in exact[1:])
    z = torch.where(kept, a, a_other) * exact[0][made.tokens] + torch.where(kept, s, s_other) * made.eps.double()
    for ours, theirs in zip(found, torch.autograd.grad(z, exact, of_latents.double()), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-6 * float(theirs.abs().max()))
    assert not any(x.requires_grad for x in (made.tokens, made.kind, made.eps, made.weights))


def test_no_gradient_is_computed_for_what_wants_none():
    (tokens, table, *rest), options = example()
    options |= {name: options[name].detach() for name in options if name.startswith(("alpha", "sigma"))}
    made = joint_noising(tokens, table.detach(), *rest, **options)
    assert not made.latents.requires_grad
    options["alpha"].requires_grad_()
    joint_noising(tokens, table.detach(), *rest, **options).latents.sum().backward()
    assert options["alpha"].grad.shape == options["alpha"].shape and options["sigma"].grad is None


def test_parts_of_a_batch_are_parts_of_the_whole():
    """Rows, positions and channels, each cut in two, and rows in another order."""
    (tokens, table, key, ordinals, positions), options = example(channels=23)
    made = joint_noising(tokens, table, key, ordinals, positions, **options)
    of_rows = [name for name, x in options.items() if isinstance(x, torch.Tensor)]
    for rows in ([0, 1, 2], [5, 3, 4]):
        picked = options | {name: options[name][rows] for name in of_rows}
        part = joint_noising(tokens[rows], table, key, ordinals[rows], positions, **picked)
        assert_same(part, type(made)(*(None if x is None else x[rows] for x in made)))
    for cut in (slice(0, 4), slice(4, 11)):
        part = joint_noising(tokens[:, cut], table, key, ordinals, positions[cut], **options)
        assert_same(part, type(made)(*(None if x is None else x[:, cut] for x in made)))
    for first, last in ((0, 5), (5, 23)):
        part = joint_noising(tokens, table[:, first:last], key, ordinals, positions, first_channel=first, **options)
        assert torch.equal(part.latents, made.latents[..., first:last])


def test_a_token_without_a_row_is_an_error():
    (tokens, table, *rest), options = example()
    with pytest.raises((RuntimeError, IndexError)):
        joint_noising(tokens, table[:-1], *rest, **options)


THREADS = """
import hashlib, sys, torch
from braid.kernels import random
from braid.kernels.noising import joint_noising
torch.set_num_threads(int(sys.argv[1]))
g = torch.Generator().manual_seed(0)
tokens = torch.randint(0, 9, (40, 100), generator=g)
table, of_latents = torch.randn(10, 70, generator=g).requires_grad_(), torch.randn(40, 100, 70, generator=g)
a, s = torch.rand(40, generator=g).requires_grad_(), torch.rand(40, generator=g).requires_grad_()
p = torch.full((40,), 0.4)
made = joint_noising(tokens, table, 7, torch.arange(40), torch.arange(100), mask_below=p, noise_below=2 * p, mask_id=9,
                     num_tokens=9, alpha=a, sigma=s, embed="noised", return_eps=True)
made.latents.backward(of_latents)
normals = random.normal(8, torch.arange(40), torch.arange(100), 70)
print(hashlib.sha256(b"".join(x.detach().numpy().tobytes() for x in
      (made.tokens, made.kind, made.latents, made.eps, table.grad, a.grad, s.grad, normals))).hexdigest())
"""


def test_neither_threads_nor_instruction_sets_change_a_bit():
    """Forward, and the gradients too."""
    if dispatch.choose("cpu").name != "compiled":
        pytest.skip("there is no compiler")
    hashes = {
        subprocess.run(
            [sys.executable, "-c", THREADS, threads],
            env=os.environ | {"BRAID_KERNELS_ISA": instruction_set},
            check=True, capture_output=True, text=True,
        ).stdout
        for threads, instruction_set in (("1", "avx512"), ("2", "avx2"), ("2", "generic"))
    }  # fmt: skip
    assert len(hashes) == 1 and len(hashes.pop()) == 65


def operation_arguments(**changes):
    (tokens, table, key, ordinals, positions), o = example(4, 5, 8)
    coefficients = [o[name].detach()[:, None].requires_grad_() for name in ("alpha", "sigma")]
    options = {"embed_noised": False, "dtype": torch.float32, "return_eps": True} | changes
    thresholds = [o[name][:, None] for name in ("mask_below", "noise_below")]
    return (
        tokens, table, torch.tensor(key), ordinals, positions, torch.zeros_like(tokens, dtype=torch.bool),
        o["weights_by_kind"], *thresholds, *coefficients, None, None, 30, 30, 0, 0, 0, *options.values(),
    )  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"embed_noised": True, "dtype": torch.bfloat16, "return_eps": False}])
def test_torch_finds_nothing_wrong_with_the_operations(changes):
    arguments = operation_arguments(**changes)
    torch.library.opcheck(torch.ops.braid.joint_noising.default, arguments)
    tokens, table, key, ordinals, positions = (x.detach() for x in arguments[:5])
    alpha, kind = torch.rand(4, 5), torch.zeros(4, 5, dtype=torch.uint8)
    backward = (torch.randn(4, 5, 8), tokens, kind, table, key, ordinals, positions, alpha, None, 0, 0)
    torch.library.opcheck(torch.ops.braid.joint_noising_backward.default, (*backward, [True, True, False]))
    torch.library.opcheck(torch.ops.braid.normal.default, (key, ordinals, positions, 7, 3, 0))


def test_a_compiled_graph_holds_for_all_keys_and_ordinals():
    (tokens, table, _, ordinals, positions), options = example()

    def step(key, ordinals, alpha):
        made = joint_noising(tokens, table * 2, key, ordinals, positions, **options | {"alpha": alpha})
        return (made.latents * made.weights[..., None]).square().sum(), made

    counter = CompileCounter()
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    alpha = options["alpha"]
    for number in (1, 2, 1 << 40):
        key = torch.tensor(number)
        (loss, made), (wanted_loss, wanted) = (f(key, ordinals + number, alpha) for f in (compiled, step))
        assert_same(made, wanted)
        assert torch.equal(*(torch.autograd.grad(x, alpha)[0] for x in (loss, wanted_loss)))
    assert counter.frame_count == 1


def test_rates_of_corruption_and_moments_of_the_noise():
    """20 rows at each of two thresholds; five standard deviations."""
    rows, length, vocab = 40, 1000, 50
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    mask_below = torch.tensor([0.1, 0.5]).repeat_interleave(20)
    made = joint_noising(
        tokens, torch.zeros(vocab, 16), 3, torch.arange(rows), torch.arange(length), mask_below=mask_below,
        noise_below=mask_below + 0.3, mask_id=7, num_tokens=vocab - 1, alpha=torch.ones(rows), sigma=torch.ones(rows),
    )  # fmt: skip
    for kind, shares in ((1, (0.1, 0.5)), (2, (0.3, 0.3))):
        for half, p in zip(made.kind.view(2, -1), shares, strict=True):
            assert abs((half == kind).double().mean() - p) < 5 * (p * (1 - p) / half.numel()) ** 0.5
    replaced = made.tokens[made.kind == 2].bincount(minlength=vocab)
    assert replaced[7] == 0
    mean = replaced.sum() / (vocab - 1)
    assert ((replaced - mean).double() ** 2 / mean).sum() - mean < (vocab - 2) + 5 * (2 * (vocab - 2)) ** 0.5
    z = made.latents.double()
    assert abs(z.mean()) < 5 / z.numel() ** 0.5 and abs(z.var() - 1) < 5 * (2 / z.numel()) ** 0.5


def test_impossible_arguments_are_refused():
    (tokens, table, *rest), options = example()
    for changes in (
        {"alpha": None}, {"alpha_corrupted": None}, {"dtype": torch.float16}, {"num_tokens": 0}, {"draw": 256},
        {"first_channel": 262144},
    ):  # fmt: skip
        with pytest.raises(AssertionError):
            joint_noising(tokens, table, *rest, **options | changes)
    with pytest.raises(AssertionError):
        joint_noising(None, None, *rest)


def test_sums_by_halves():
    x = torch.arange(21.0).view(3, 7)
    assert noising._reduce(x, torch.Size((3, 1))).tolist() == x.sum(1, keepdim=True).tolist()
