"""What a network's blocks keep for the backward pass, and what they send: counted operation by operation.

Follows the code of the blocks (model/blocks.py and its siblings) as autograd runs it: a tensor is counted once, with
the bytes of its storage, in float32 or, under bf16 autocast, as each operation leaves it: norms, modulation and the
residual stream float32, what linear layers and attention take and give bfloat16. Attention is a fused kernel that keeps
its operands, its output and a log-sum per head and query, no scores. Vectors per sequence (adaLN) are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from torch import nn

from braid.pretrain.model.blocks import Block
from braid.pretrain.model.elf_network import NUM_PREFIX, ELFBlock, ELFNetwork, swiglu_width
from braid.pretrain.model.joint import JointNetwork, hidden_width
from braid.pretrain.model.joint_attention import JointBlock, JointDenoiser
from braid.pretrain.model.mixture_of_experts import TILES, MixtureBlock
from braid.pretrain.model.network import Network
from braid.pretrain.model.two_stream import PrivateBlocks, TwoStreamBlock

FLOAT, HALF = 4, 2


@dataclass(frozen=True)
class Cost:
    """Of one block and one micro-batch on a process that divides nothing."""

    state: float = 0.0
    """Bytes of the block's input: what recomputation keeps, and what travels between pipeline processes."""
    outside: float = 0.0
    """Bytes kept between the layers that the tensor axis divides, the input among them; sequence parallelism divides
    them."""
    inside: float = 0.0
    """Bytes kept in divided layers."""
    reduced: float = 0.0
    """Elements of the outputs of divided layers, which the tensor axis sums in the forward pass."""
    attended: float = 0.0
    """Elements of the queries of all attentions; keys, values and outputs are as many each."""
    fixed: float = 0.0
    """Bytes in divided layers that do not depend on the number of positions."""
    widest: float = 0.0
    """Bytes of the widest tensor of a divided layer, whose gradient the backward pass holds."""

    def __add__(self, other: Cost) -> Cost:
        sums = (getattr(self, field.name) + getattr(other, field.name) for field in fields(Cost))
        return replace(Cost(*sums), widest=max(self.widest, other.widest))

    @property
    def kept(self) -> float:
        """Bytes kept altogether."""
        return self.outside + self.inside + self.fixed


@dataclass(frozen=True)
class Sizes:
    """What the costs of a block depend on."""

    sequences: int
    """Of the micro-batch."""
    length: int
    num_slots: int
    width: int
    hidden: int
    """Width of the MLP's hidden layer."""
    num_heads: int
    num_bytes: int
    """Of a number in linear layers and attention."""
    dropout: bool

    @property
    def positions(self) -> int:
        return self.sequences * self.length


def block_costs(network: Network, *, sequences: int, length: int, half: bool) -> list[Cost] | None:
    """The cost of each block for a micro-batch of `sequences` rows of `length` tokens; `half` is bf16 autocast. None
    for a network whose blocks are another library's."""
    if not hasattr(network, "blocks"):
        return None
    model, is_elf = network.config, isinstance(network, ELFNetwork)
    sizes = Sizes(
        sequences=sequences,
        length=length + (NUM_PREFIX if is_elf else 0),
        num_slots=getattr(network, "num_slots", 0),
        width=model.width,
        hidden=swiglu_width(model) if is_elf else hidden_width(model),
        num_heads=model.num_heads,
        num_bytes=HALF if half else FLOAT,
        dropout=model.dropout > 0,
    )
    return [_block(block, sizes) for block in network.blocks]


def head_bytes(network: Network, costs: list[Cost], *, sequences: int, length: int, half: bool) -> float:
    """Bytes that the heads keep beside logits: the state after the last block, and of each head its norm and what its
    linear layer takes."""
    n, width, num_bytes = sequences * length, network.config.width, HALF if half else FLOAT
    if isinstance(network, ELFNetwork):  # the norm of one head in float32, the hidden layer of the other
        own_input = HALF if half else 0
        return costs[-1].state + n * (width * (FLOAT + own_input) + 2 * network.latent_dim * num_bytes)
    read = n
    if isinstance(network, JointNetwork):
        read += n
    elif isinstance(network, JointDenoiser):
        read += sequences * network.num_slots
    return costs[-1].state + read * (width * (FLOAT + num_bytes) + 2 * FLOAT)


def _block(block: nn.Module, sizes: Sizes) -> Cost:
    n = sizes.positions
    match block:
        case Block():
            return _plain(n, sizes)
        case PrivateBlocks():
            return _plain(n, sizes) + _plain(n, sizes)
        case JointBlock():
            return _plain(n, sizes) + _plain(sizes.sequences * sizes.num_slots, sizes)
        case TwoStreamBlock():
            exchange = _entry(n, sizes) + _attention(n, sizes, rotated=False) + _exit(n, sizes)
            stream = _plain(n, sizes) + exchange
            return stream + stream
        case MixtureBlock():
            return _mixture(block, 2 * n, sizes)
        case ELFBlock():
            return _elf(n, sizes)
    raise AssertionError(type(block))


def _plain(n: int, sizes: Sizes) -> Cost:
    """Attention and MLP over `n` positions, each between adaLN and gate."""
    attention = _entry(n, sizes) + _attention(n, sizes) + _exit(n, sizes)
    mlp = _entry(n, sizes) + _hidden(n, sizes) + _exit(n, sizes)
    return Cost(state=n * sizes.width * FLOAT) + attention + mlp


def _entry(n: int, sizes: Sizes) -> Cost:
    """The residual stream, its mean and deviation, its norm, and the modulated norm as a linear layer takes it."""
    return Cost(outside=n * (sizes.width * (2 * FLOAT + sizes.num_bytes) + 2 * FLOAT))


def _exit(n: int, sizes: Sizes) -> Cost:
    """What the gate multiplies, and the dropout's mask."""
    return Cost(outside=n * sizes.width * (sizes.num_bytes + sizes.dropout), reduced=n * sizes.width)


def _attention(n: int, sizes: Sizes, rotated: bool = True) -> Cost:
    """The matrix of queries, keys and values (values stay in it), rotated queries and keys, the output, and its copy in
    the order of the next linear layer (spared where nothing is rotated, and by some kernels)."""
    tensors = 7 if rotated else 4
    inside = n * (tensors * sizes.width * sizes.num_bytes + sizes.num_heads * FLOAT)
    return Cost(inside=inside, attended=n * sizes.width)


def _hidden(n: int, sizes: Sizes, tensors: int = 2) -> Cost:
    """The hidden layer before its nonlinearity and after."""
    size = n * sizes.hidden * sizes.num_bytes
    return Cost(inside=tensors * size, widest=size)


def _mixture(block: MixtureBlock, n: int, sizes: Sizes) -> Cost:
    """Joint attention over both strands, then a router and experts."""
    width, hidden, num_bytes, experts = sizes.width, sizes.hidden, sizes.num_bytes, block.experts
    state = Cost(state=n * width * FLOAT)
    attention = _entry(n, sizes) + _attention(n, sizes) + _exit(n, sizes)
    # The router reads float32; what the experts leave is weighed, and summed, in float32.
    entry = Cost(outside=n * (3 * FLOAT * width + 2 * FLOAT))
    # Each answer is summed over the tensor axis by itself, before it is weighed.
    exit = Cost(outside=n * width * (FLOAT + sizes.dropout), reduced=n * width * experts.per_token)
    if experts.per_token == experts.num:
        own_input = num_bytes if num_bytes != FLOAT else 0
        answers = Cost(inside=experts.num * n * width * num_bytes, outside=experts.num * n * width * own_input)
        return state + attention + entry + _hidden(n, sizes, 2 * experts.num) + answers + exit
    num_tiles = TILES + experts.num - 1
    rows = n * experts.per_token
    padded = rows * num_tiles // TILES
    answers = Cost(outside=(padded + rows) * width * num_bytes, fixed=2 * num_tiles * width * hidden * num_bytes)
    return state + attention + entry + _hidden(padded, sizes) + answers + exit


def _elf(n: int, sizes: Sizes) -> Cost:
    """RMSNorm without modulation, queries and keys normalised in float32, SwiGLU, no gates."""
    width, num_bytes = sizes.width, sizes.num_bytes
    entry = Cost(outside=n * (width * (2 * FLOAT + num_bytes) + FLOAT))
    normed = FLOAT if num_bytes == FLOAT else 2 * FLOAT
    norms = Cost(inside=2 * n * (normed * width + FLOAT * sizes.num_heads))
    attention = entry + _attention(n, sizes) + norms + Cost(reduced=n * width)
    mlp = entry + _hidden(n, sizes, 4) + Cost(reduced=n * width)
    return Cost(state=n * width * FLOAT) + attention + mlp
