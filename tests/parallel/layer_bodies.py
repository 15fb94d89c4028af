"""What runs on the ranks of test_layers.py and test_vocabulary.py: divided layers beside torch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from braid.kernels import linear_loss as chunked
from braid.kernels.errors import ConfigError
from braid.kernels.linear_loss import linear_loss
from braid.parallel.data_parallel import World
from braid.parallel.layers import (
    Columns,
    OutputLinear,
    Region,
    Rows,
    mark_parameters,
    set_whole,
    shard_layers,
    shared,
    sum_partial_gradients,
    whole_shape,
)
from braid.parallel.mesh import Axis, build_mesh
from braid.parallel.plan import ParallelConfig
from braid.parallel.vocabulary import Vocabulary

B, L, W, HIDDEN, ROWS = 3, 8, 6, 10, 13


def tensor_axis(world: World) -> Axis:
    return build_mesh(world, ParallelConfig(tensor=world.size)).tensor


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Model(nn.Module):
    """A table, two pairs of divided layers around things that are replicated, and a divided head."""

    divided = {
        "table": Rows(), "input": Columns(), "output": Rows(), "pair": Columns(parts=2), "back": Rows(),
        "head": Columns(), "outside": Columns(outside=True),
    }  # fmt: skip
    per_head = ("gain",)

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(ROWS, W)
        self.input, self.output = nn.Linear(W, HIDDEN), nn.Linear(HIDDEN, W)
        self.norm = nn.LayerNorm(W)
        self.pair, self.back = nn.Linear(W, 2 * HIDDEN, bias=False), nn.Linear(HIDDEN, W, bias=False)
        self.gain = nn.LayerNorm(1, bias=False)
        self.head, self.outside = nn.Linear(W, ROWS), nn.Linear(W, ROWS)

    def forward(self, tokens: Tensor, c_BW: Tensor, region: Region) -> tuple[Tensor, Tensor, Tensor]:
        """This process's part of two sets of logits [B, L, ROWS], and hidden states [B, L, W]."""
        c_BW = region.condition(c_BW)
        x = self.table(tokens)
        x = x + self.output(F.gelu(self.input(self.norm(x) * c_BW[:, None])))
        # Four dimensions, whose gradient comes back expanded.
        first, second = self.pair(x[:, :, None].expand(-1, -1, 2, -1)).chunk(2, -1)
        x = x + self.back(first.sigmoid() * second * self.gain.weight).sum(2)
        everywhere = region.leave(x)
        return self.head(x), self.outside(everywhere), everywhere


def build(region: Region) -> Model:
    """The model with random values, those of a rank's part where it is divided."""
    with torch.device("meta"):
        model = Model()
    if region.size > 1:
        shard_layers(model, region)
    model.to_empty(device="cpu")
    if region.size > 1:
        mark_parameters(model, region, {"output", "norm"})
    for seed, parameter in enumerate(model.parameters()):
        set_whole(parameter, normal(seed, *whole_shape(parameter)))
    return model


def run(region: Region) -> tuple[Model, Tensor, list[Tensor]]:
    """The model after a backward pass, the gradient of the condition, and what the model said, of all logits."""
    model, c_BW = build(region), normal(100, B, W).requires_grad_()
    tokens = torch.randint(0, ROWS, (B, L), generator=torch.Generator().manual_seed(101))
    vocabulary = Vocabulary(ROWS, region.axis)
    *logits, hidden = model(tokens, c_BW, region)
    # Every process goes on from its own logits alone, so what it says of the loss is one part of a sum.
    loss = sum(vocabulary.sum((each * vocabulary.columns(normal(102, B, L, ROWS))).sum()) for each in logits)
    (loss + hidden.sum()).backward()  # the gradient of a sum is expanded
    return model, c_BW.grad, [vocabulary.gather(each) for each in logits] + [hidden]


def layers_beside_torch(world: World, sequence: bool) -> None:
    axis = tensor_axis(world)
    reference, c_gradient, expected = run(Region())
    model, divided_c_gradient, outputs = run(Region(axis, sequence))
    for output, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(divided_c_gradient, c_gradient, rtol=1e-5, atol=1e-5)
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    assert {name for name, p in model.named_parameters() if getattr(p, "partial", False)} == (
        {"gain.weight", "norm.weight", "norm.bias", "output.bias"} if sequence else {"gain.weight"}
    )
    sum_partial_gradients(model.parameters(), axis)
    for name, parameter in model.named_parameters():
        wanted = parameter.shard.cut(gradients[name]) if hasattr(parameter, "shard") else gradients[name]
        error = float((parameter.grad - wanted).abs().max() / wanted.abs().max())
        assert error < 1e-5, (name, error)


def shared_gradients(world: World) -> None:
    """What is shared has the sum of all gradients, though it comes expanded, and from one that others use too."""
    axis = tensor_axis(world)
    x = torch.ones(2, 3, requires_grad=True)
    shared(x, axis).sum().backward()
    assert torch.equal(x.grad, torch.full((2, 3), float(axis.size)))
    x.grad, other = None, torch.ones(2, 3, requires_grad=True)
    # One tensor is the gradient of both terms of a sum: Megatron, which adds up in place, must not be given it.
    ((shared(x, axis) + other) * (axis.rank + 1)).sum().backward()
    assert torch.equal(x.grad, torch.full((2, 3), axis.size * (axis.size + 1) / 2))
    assert torch.equal(other.grad, torch.full((2, 3), axis.rank + 1.0))


def regions(world: World) -> str:
    """What a region does to positions, and what it says of a length that does not divide."""
    axis = tensor_axis(world)
    region = Region(axis, sequence=True)
    x = normal(0, B, L, W).requires_grad_()
    mine = region.enter(x)
    assert mine.shape == (B, L // axis.size, W) and region.length(mine) == L
    assert torch.equal(mine, x.chunk(axis.size, 1)[axis.rank])
    assert torch.equal(region.positions(torch.arange(L)), torch.arange(L).chunk(axis.size)[axis.rank])
    back = region.leave(mine)
    assert torch.equal(back, x)
    weights = normal(1, B, L, W)
    (back * weights).sum().backward()
    assert torch.equal(x.grad, weights)
    for kind in (torch.bool, torch.int64):
        assert torch.equal(region.leave(region.enter(x.detach() > 0).to(kind)), (x.detach() > 0).to(kind))
    with torch.no_grad():  # nothing is kept, so nothing is divided
        assert region.enter(x) is x and region.length(x) == L
    whole = Region(axis)
    assert whole.enter(x) is x and whole.leave(x) is x and whole.condition(x) is x
    try:
        region.enter(x[:, :-1])
    except ConfigError as error:
        return str(error)
    return ""


def vocabularies(world: World, size: int) -> None:
    """Every method beside torch's own on the whole vocabulary, with its gradients."""
    axis = tensor_axis(world)
    divided, whole = Vocabulary(size, axis), Vocabulary(size)
    without = size // 2
    raw, table, x = normal(0, B, L, size) * 3, normal(1, size, W), normal(2, B, L, W)
    targets = torch.randint(0, size - 1, (B, L), generator=torch.Generator().manual_seed(3))
    targets += targets >= without  # never the token that is left out
    places, weights = torch.stack([targets, targets.flip(0)], -1), normal(4, B, L)

    def differentiable(vocabulary: Vocabulary, logits: Tensor, table: Tensor, x: Tensor) -> dict[str, Tensor]:
        logits = vocabulary.logits(1 * logits)
        rows = vocabulary.rows(table)
        log_probabilities = vocabulary.log_softmax(vocabulary.without(logits, without))
        again = vocabulary.softmax(vocabulary.without_(logits.clone(), without))
        product = vocabulary.softmax(logits + vocabulary.shared(x) @ rows.T)
        return {
            "log_softmax": vocabulary.take(log_probabilities, places).sum(-1),
            "softmax": vocabulary.take(again, places).prod(-1),
            "sum": vocabulary.sum(again.square().sum(-1)),
            "mean": vocabulary.sum(product @ rows).square().sum(-1),
            "gather": vocabulary.gather(vocabulary.softmax(logits)).square().sum(-1),
        }

    def run(vocabulary: Vocabulary) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
        gradients = {}
        leaves = [vocabulary.columns(raw).clone(), table.clone(), x.clone()]
        for name in differentiable(vocabulary, *leaves):
            inputs = [leaf.clone().requires_grad_() for leaf in leaves]
            values = differentiable(vocabulary, *inputs)
            (values[name] * weights).sum().backward()
            logits, *others = [torch.zeros_like(each) if each.grad is None else each.grad for each in inputs]
            gradients[name] = [logits, *others]
        return values, gradients

    values, gradients = run(divided)
    expected, expected_gradients = run(whole)
    for name, wanted in expected.items():
        torch.testing.assert_close(values[name], wanted, rtol=2e-6, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")
        logits, *others = expected_gradients[name]
        for got, wanted in zip(gradients[name], [divided.columns(logits), *others], strict=True):
            error = float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))
            assert error < 1e-5, (name, error)
    for name in ("softmax_", "add_"):
        made = [
            vocabulary.softmax_(vocabulary.logits(vocabulary.columns(raw).clone()))
            if name == "softmax_"
            else vocabulary.add_(vocabulary.columns(raw).clone(), places, places.float())
            for vocabulary in (divided, whole)
        ]
        torch.testing.assert_close(divided.gather(made[0]), made[1], rtol=2e-6, atol=2e-6)
    assert torch.equal(divided.gather(divided.logits(divided.columns(raw))), raw)
    padding = divided.logits(divided.columns(raw))[..., max(size - divided.first, 0) :]
    assert padding.isinf().all() and (padding < 0).all()


def cross_entropies(world: World, size: int, sequence: bool) -> None:
    """The cross-entropy of a divided output layer's logits at some rows, and its gradients, beside one process's; and
    with logits that are there already."""
    axis = tensor_axis(world)
    without, generator = size // 2, torch.Generator().manual_seed(3)
    targets = torch.randint(0, size - 1, (B, L), generator=generator)
    targets += targets >= without
    rows, weights = chunked.Rows(torch.rand(B, L, generator=generator) < 0.6), torch.rand(B, L, generator=generator)

    def run(region: Region, known: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
        vocabulary, x = Vocabulary(size, region.axis), normal(0, B, L, W).requires_grad_()
        with torch.device("meta"):
            model = nn.Sequential(OutputLinear(W, size))
        if region.size > 1:
            model[0] = Columns().divide(model[0], region)
        model.to_empty(device="cpu")
        if region.size > 1:
            mark_parameters(model, region, ())
        for seed, parameter in enumerate(model.parameters()):
            set_whole(parameter, normal(seed + 1, *whole_shape(parameter)))
        row_loss = vocabulary.cross_entropy(targets, weights, without=without, z_loss=0.01)
        entered = region.enter(x)
        if known:
            logits = vocabulary.logits(model[0](entered))
            total, nats = linear_loss(logits.flatten(0, 1), None, None, rows, row_loss)
        else:
            total, nats = model[0](entered, loss=lambda h, w, b: linear_loss(h.flatten(0, 1), w, b, rows, row_loss))
        (2 * total).backward()
        parameters = [(each, getattr(each, "shard", None)) for each in model.parameters()]
        return total.detach(), nats, [x.grad, *((each.grad, shard) for each, shard in parameters)]

    expected_total, expected_nats, (expected_x, *expected) = run(Region(), False)
    for known in (False, True):
        total, nats, (of_x, *gradients) = run(Region(axis, sequence), known)
        torch.testing.assert_close(total, expected_total, rtol=1e-6, atol=0)
        torch.testing.assert_close(nats, expected_nats, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(of_x, expected_x, rtol=1e-5, atol=1e-5)
        for (gradient, shard), (wanted, _) in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient, shard.cut(wanted), rtol=1e-5, atol=1e-5)
