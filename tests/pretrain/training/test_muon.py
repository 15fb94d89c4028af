"""Muon against optax's numbers, a float64 NumPy reference in the other layout, and singular values in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from braid.parallel.engine import PlainEngine
from braid.parallel.mesh import Mesh
from braid.pretrain.training.muon import COEFFICIENTS, NUM_ITERATIONS, Muon, orthogonalised

SHAPES = [(5, 5), (24, 9), (9, 24), (1, 7), (7, 1), (64, 64)]


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def polynomial(x: np.ndarray) -> np.ndarray:
    """What becomes of a singular value."""
    a, b, c = COEFFICIENTS
    for _ in range(NUM_ITERATIONS):
        x = a * x + b * x**3 + c * x**5
    return x


# -- orthogonalisation ----------------------------------------------------------------------------------------------


def reference_orthogonalised(x: np.ndarray) -> np.ndarray:
    """Through the singular value decomposition, float64."""
    u, s, v = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    return u @ np.diag(polynomial(s / (np.linalg.norm(x.astype(np.float64)) + 1e-8))) @ v


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_it_is_the_polynomial_of_the_singular_values(shape: tuple[int, int], scale: float) -> None:
    x = matrix(*shape) * scale
    found = orthogonalised(x)
    assert found.dtype == torch.float32 and found.shape == shape
    np.testing.assert_allclose(found.numpy(), reference_orthogonalised(x.numpy()), atol=1e-5, rtol=0)


def test_singular_values_end_in_a_band_around_one() -> None:
    """All that are not tiny beside the norm: the band is that of the polynomial on [0.005, 1]."""
    band = polynomial(np.linspace(0.005, 1, 100_000))
    assert 0.6 < band.min() < 0.75 and 1.1 < band.max() < 1.25
    for shape in SHAPES:
        x = matrix(*shape, seed=3)
        s = torch.linalg.svdvals(x.double()) / x.double().norm()
        found = torch.linalg.svdvals(orthogonalised(x).double())[s > 0.005]
        assert len(found) and band.min() - 1e-5 < found.min() <= found.max() < band.max() + 1e-5


def test_zero_stays_zero_and_transposes_commute() -> None:
    assert torch.equal(orthogonalised(torch.zeros(3, 4)), torch.zeros(3, 4))
    x = matrix(6, 3)
    assert torch.equal(orthogonalised(x.mT), orthogonalised(x).mT)


def test_a_stack_is_its_matrices() -> None:
    stack = matrix(4, 6, 3)
    each = torch.stack([orthogonalised(x) for x in stack])
    torch.testing.assert_close(orthogonalised(stack), each, atol=1e-6, rtol=0)


def test_shards_have_to_be_gathered() -> None:
    """The rows of a matrix on two ranks: gathered they give what the whole gives, one by one they do not."""
    whole = matrix(8, 6)
    shards = whole.chunk(2)
    assert torch.equal(orthogonalised(torch.cat(shards)), orthogonalised(whole))
    alone = torch.cat([orthogonalised(shard) for shard in shards])
    assert (alone - orthogonalised(whole)).abs().max() > 0.1


def test_bfloat16_is_refused() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(AssertionError, match="autocast"):
        orthogonalised(matrix(3, 3))


# -- steps ----------------------------------------------------------------------------------------------------------

GRADIENTS = ([[1, 2, 0, -1], [0, 1, 3, 1]], [[-2, 1, 1, 0], [1, -1, 0, 2]], [[0, 3, -1, 1], [2, 0, 1, -1]])
OPTAX_2_IN_4_OUT = [
    [0.055864617, -0.317320108, -0.021331863, 0.042212784],
    [-0.131146148, -0.008067757, -0.261789680, -0.165967792],
]
OPTAX_4_IN_2_OUT = [
    [0.039502256, -0.092734337],
    [-0.224379212, -0.005704768],
    [-0.015083905, -0.185113266],
    [0.029848944, -0.117356949],
]
OPTAX_VECTOR = [-0.037632331, -0.357574224, -0.072980747, 0.138364196]
"""Where optax.contrib.muon(0.1) of optax 0.2.8 is after these three gradients from zero; its matrices are [in, out]."""


@pytest.mark.parametrize(
    ("kind", "gradient_of", "expected"),
    [
        ("matrix", lambda g: g.mT, torch.tensor(OPTAX_2_IN_4_OUT).mT),
        ("matrix", lambda g: g, torch.tensor(OPTAX_4_IN_2_OUT).mT),
        ("table", lambda g: g, torch.tensor(OPTAX_2_IN_4_OUT)),
        ("table", lambda g: g.mT, torch.tensor(OPTAX_4_IN_2_OUT)),
        ("other", lambda g: g[0], torch.tensor(OPTAX_VECTOR)),
    ],
)
def test_three_steps_are_those_of_optax(kind: str, gradient_of, expected: torch.Tensor) -> None:
    parameter = nn.Parameter(torch.zeros_like(expected))
    optimizer = Muon([{"params": [parameter], "kind": kind}], lr=0.1)
    for gradient in GRADIENTS:
        parameter.grad = gradient_of(torch.tensor(gradient, dtype=torch.float32)).contiguous()
        optimizer.step()
    # optax takes 1 - 0.999^t in float32, good to five digits.
    torch.testing.assert_close(parameter.detach(), expected, atol=1e-6, rtol=3e-5 if kind == "other" else 0)


def reference_steps(weight, gradients, rates, kind, decay, *, momentum=0.9, beta1=0.85, beta2=0.95, eps=1e-8):
    """float64, matrices in the layout [in, out], everything written out."""
    flip = (lambda x: x.T) if kind == "matrix" else (lambda x: x)
    w = flip(weight.numpy().astype(np.float64))
    first, second = np.zeros_like(w), np.zeros_like(w)
    beta = beta1 if kind == "other" else momentum
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        g = flip(gradient.numpy().astype(np.float64))
        first = beta * first + (1 - beta) * g
        second = beta2 * second + (1 - beta2) * g**2
        ahead = beta * first / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
        if kind == "other":
            update = ahead / (np.sqrt(second / (1 - beta2**t)) + eps)
        else:
            update = math.sqrt(max(1, w.shape[1] / w.shape[0])) * reference_orthogonalised(ahead)
        w = w - rate * (update + decay * w)
    return flip(w)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("matrix", (12, 5)), ("matrix", (5, 12)), ("table", (12, 5)), ("table", (5, 12)), ("other", (7,)), ("other", ())],
)
def test_steps_with_decay_and_changing_rates(kind: str, shape: tuple[int, ...]) -> None:
    start, rates = matrix(*shape, seed=9), [0.01, 0.03, 0.02, 0.05, 0.0, 0.01]
    parameter = nn.Parameter(start.clone())
    group = {"params": [parameter], "kind": kind, "weight_decay": 0.3}
    optimizer = Muon([group], lr=1.0, momentum=0.9, betas=(0.85, 0.95))
    gradients = [matrix(*shape, seed=seed) for seed in range(len(rates))]
    for gradient, rate in zip(gradients, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        parameter.grad = gradient.clone()
        optimizer.step()
    expected = reference_steps(start, gradients, rates, kind, 0.3)
    np.testing.assert_allclose(parameter.detach().numpy(), expected, atol=2e-6, rtol=1e-5)


def test_a_stack_of_experts_steps_like_its_matrices() -> None:
    stack = nn.Parameter(matrix(3, 6, 2))
    each = [nn.Parameter(part.clone()) for part in stack.detach()]
    optimizer = Muon([{"params": [stack, *each], "kind": "matrix"}], lr=0.1)
    for seed in range(3):
        stack.grad = matrix(3, 6, 2, seed=seed)
        for part, gradient in zip(each, stack.grad, strict=True):
            part.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(stack.detach(), torch.stack([part.detach() for part in each]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("kind", "shape"), [("matrix", (4, 3)), ("table", (4, 3)), ("other", (4,))])
def test_no_gradient_is_the_gradient_zero(kind: str, shape: tuple[int, ...]) -> None:
    """It moves on by its momentum, and a parameter that never had a gradient stays where it is."""
    twins = [nn.Parameter(matrix(*shape)) for _ in range(2)]
    idle = nn.Parameter(matrix(*shape))
    optimizer = Muon([{"params": [*twins, idle], "kind": kind}], lr=0.1)
    for step in range(3):
        for parameter in twins:
            parameter.grad = matrix(*shape, seed=step)
        if step == 1:
            twins[0].grad, twins[1].grad = None, torch.zeros(shape)
            before = twins[0].detach().clone()
        optimizer.step()
        if step == 1:
            assert not torch.equal(twins[0].detach(), before)
    assert torch.equal(twins[0].detach(), twins[1].detach())
    assert torch.equal(idle.detach(), matrix(*shape))
    assert set(optimizer.state[twins[0]]) == ({"step", "exp_avg", "exp_avg_sq"} if kind == "other" else
                                              {"step", "momentum"})  # fmt: skip


# -- training -------------------------------------------------------------------------------------------------------


class Regression(nn.Module):
    """A small network on a fixed problem: embedding, matrices and biases."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(13, 8, _weight=matrix(13, 8, seed=1))
        self.hidden, self.out = nn.Linear(8, 16), nn.Linear(16, 4)
        for seed, parameter in enumerate([*self.hidden.parameters(), *self.out.parameters()]):
            parameter.data = 0.3 * matrix(*parameter.shape, seed=seed)

    def loss(self) -> torch.Tensor:
        found = self.out(torch.tanh(self.hidden(self.table(torch.arange(13)))))
        return (found - matrix(13, 4, seed=5)).square().mean()

    def optimizer(self, lr: float) -> Muon:
        groups = [
            {"params": [self.hidden.weight, self.out.weight], "kind": "matrix"},
            {"params": [self.table.weight], "kind": "table"},
            {"params": [self.hidden.bias, self.out.bias], "kind": "other"},
        ]
        return Muon(groups, lr=lr)

    def train_steps(self, optimizer: Muon, num_steps: int) -> list[float]:
        losses = []
        for _ in range(num_steps):
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses


def test_it_trains() -> None:
    model, control = Regression(), Regression()
    losses = model.train_steps(model.optimizer(0.02), 60)
    assert losses[-1] < 0.05 * losses[0]
    assert len(set(control.train_steps(control.optimizer(0.0), 3))) == 1


def test_twice_is_the_same_and_so_is_going_on_from_the_saved_state() -> None:
    straight, again = Regression(), Regression()
    assert straight.train_steps(straight.optimizer(0.02), 12) == again.train_steps(first := again.optimizer(0.02), 12)
    resumed = Regression()
    resumed.load_state_dict(again.state_dict())
    optimizer = resumed.optimizer(0.02)
    saved = {name: value.clone() for name, value in PlainEngine(again, first, Mesh.single()).optimizer_state()}
    PlainEngine(resumed, optimizer, Mesh.single()).load_optimizer_state(saved.keys(), saved.__getitem__)
    assert resumed.train_steps(optimizer, 8) == again.train_steps(first, 8)
    for (name, parameter), other in zip(again.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(parameter, other), name
