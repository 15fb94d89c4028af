"""Joint noising on a CUDA device: the bits of NumPy, and gradients in a fixed order, by every implementation there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from braid.kernels import dispatch
from braid.kernels.noising import PIECE, joint_noising

from .noising_cases import assert_same, expected, expected_gradients, random_case

pytestmark = pytest.mark.gpu


def on_device(x: Any) -> Any:
    return x.cuda() if isinstance(x, torch.Tensor) else x


def test_the_bits_of_numpy(on_gpu):
    for seed in range(60):
        case = random_case(seed)
        key = torch.tensor(case.key - (1 << 64) if case.key >> 63 else case.key)
        keys = (case.key, key.cuda())  # by value, and from memory
        tokens, vectors, _, ordinals, positions = map(on_device, case.arguments)
        options = {name: on_device(x) for name, x in case.options.items()}
        made = joint_noising(tokens, vectors, keys[seed % 2], ordinals, positions, **options)
        assert_same(type(made)(*(None if x is None else x.cpu() for x in made)), expected(case))


@pytest.mark.parametrize("deterministic", [True, False])
def test_gradients(on_gpu, deterministic):
    torch.use_deterministic_algorithms(deterministic)
    generator = torch.Generator().manual_seed(0)
    for seed in range(1000, 1040):
        case = random_case(seed)
        if case.vectors is None:
            continue
        options = {name: on_device(x) for name, x in case.options.items()}
        rows, length = case.shape()
        for name in ("alpha", "sigma", "alpha_corrupted", "sigma_corrupted"):
            if name in options:
                x = options[name]
                options[name] = (x if x.ndim == 2 else x[:, None].expand(rows, length)).clone().requires_grad_()
        tokens, vectors, key, ordinals, positions = map(on_device, case.arguments)
        vectors.requires_grad_()
        made = joint_noising(tokens, vectors, key, ordinals, positions, **options)
        of_latents = torch.randn(made.latents.shape, generator=generator).to(made.latents.dtype)
        made.latents.backward(of_latents.cuda())
        exact = expected_gradients(case, of_latents)
        found = [vectors.grad]
        for name in ("alpha", "sigma"):
            other = options.get(f"{name}_corrupted")
            found.append(options[name].grad + (0 if other is None else other.grad))
        for ours, theirs in zip(found, exact, strict=True):
            tolerance = 1e-6 if ours.dtype == torch.float32 else 2**-8
            assert (ours.cpu().double() - theirs).abs().max() <= tolerance * max(1.0, float(theirs.abs().max()))


def test_a_hot_row_is_summed_in_the_same_order_every_time(on_gpu):
    """Half the tokens are one token, over many pieces."""
    tokens = torch.randint(0, 500, (8, 40 * PIECE), device="cuda")
    tokens[:, ::2] = 3
    half = torch.full((8,), 0.5, device="cuda")

    def gradient() -> torch.Tensor:
        table = torch.ones(500, 96, device="cuda", requires_grad=True)
        made = joint_noising(
            tokens, table, 1, torch.arange(8, device="cuda"), torch.arange(40 * PIECE, device="cuda"), alpha=half,
            sigma=half,
        )  # fmt: skip
        made.latents.square().sum().backward()
        return table.grad

    first = gradient()
    assert all(torch.equal(gradient(), first) for _ in range(5))


def test_a_graph_follows_its_key():
    """Captured once, replayed with another key and other ordinals."""
    table, half = torch.randn(50, 64, device="cuda"), torch.full((4,), 0.5, device="cuda")
    tokens, positions = torch.randint(0, 49, (4, 32), device="cuda"), torch.arange(32, device="cuda")
    key, ordinals = torch.tensor(1, device="cuda"), torch.arange(4, device="cuda")
    if dispatch.choose("cuda").name == "eager":
        pytest.skip("eager operations read the key on the host")

    def step():
        return joint_noising(
            tokens, table, key, ordinals, positions, mask_below=half, mask_id=49, alpha=half, sigma=half
        )

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step()
    for number in (5, 6):
        key.fill_(number)
        ordinals.add_(100)
        graph.replay()
        assert_same(made, step())
