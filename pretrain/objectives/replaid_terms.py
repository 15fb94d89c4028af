"""Parts of RePlaid's objective that stand on their own: the split of the batch, and the two products of the vocabulary
with the embeddings.

Rows marked `frozen` (the self-conditioned ones) use the embeddings as constants: their gradient goes to the network
alone. Both products are done once for all rows, with the table beside a copy of it that takes no gradient, so that no
second tensor of logits arises. Shape suffixes: B sequences, D embedding dimension, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from braid.parallel.vocabulary import Vocabulary

SPLIT_DECAY = 0.997


class BatchSplit(nn.Module):
    """How many sequences of a global batch are spent on the reconstruction term, the others going to diffusion: in
    proportion to the standard deviations of both losses over sequences, which minimises the variance of the sum
    (Plaid, arXiv 2305.18619)."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("moments", torch.zeros(2, 2, dtype=torch.float64))
        """Running means of the loss and of its square, for reconstruction and for diffusion."""
        self.register_buffer("weight", torch.zeros((), dtype=torch.float64))
        """What the running means must be divided by: 1 - decay^steps."""

    def num_reconstructed(self, batch_size: int) -> Tensor:
        """A whole number from 1 to `batch_size` - 1, float64 scalar; 1 before the first step."""
        first, second = (self.moments / self.weight.clamp(min=1e-12)).unbind(1)
        deviation = (second - first.square()).clamp(min=0).sqrt()
        share = deviation[0] / deviation.sum().clamp(min=1e-12)
        return (batch_size * share).round().clamp(1, batch_size - 1)

    def statistics(self, loss_B: Tensor, reconstructs_B: Tensor) -> Tensor:
        """Number of sequences, sum of their losses, sum of squares: float64 [2, 3]."""
        each = torch.stack([torch.ones_like(loss_B), loss_B, loss_B.square()], -1).double()
        return torch.stack([reconstructs_B, ~reconstructs_B]).double() @ each

    def update(self, statistics: Tensor) -> None:
        """Take in a step, from the sums over its global batch."""
        mean = statistics[:, 1:] / statistics[:, :1]
        self.moments.lerp_(mean, 1 - SPLIT_DECAY)
        self.weight.lerp_(torch.ones_like(self.weight), 1 - SPLIT_DECAY)


class Interior:
    """g(t) and g'(t) of each row, [B], as the schedule's network gave them. From here back, the gradient of a row's
    loss is to become that of its square, 2 loss times as much: what the network follows. Only what lies before g and g'
    is affected; the endpoints, which turn g into gamma, see the gradient of the loss.

    `waits`: the losses are not known when this process computes its part of the gradient, which is then kept here until
    `back_propagate`. Otherwise `follow_mean_square` is called before the backward pass.
    """

    def __init__(self, given: tuple[Tensor, Tensor], *, waits: bool) -> None:
        self.given, self.waits, self.values = given, waits, given
        """`values` are what to compute with."""
        if waits:
            self.values = tuple(tensor.detach().requires_grad_(tensor.requires_grad) for tensor in given)

    def follow_mean_square(self, loss_B: Tensor) -> None:
        """Let the backward pass do it, unless it waits."""
        for tensor in self.given if not self.waits else ():
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: 2 * loss_B * gradient)

    def back_propagate(self, loss_B: Tensor) -> None:
        """Do it with what was kept."""
        kept = [(given, value.grad) for given, value in zip(self.given, self.values, strict=True)]
        kept = [(given, 2 * loss_B * gradient) for given, gradient in kept if gradient is not None]
        if kept:
            torch.autograd.backward(*zip(*kept, strict=True))


def add_output_prior(
    logits: Tensor, z: Tensor, slope: Tensor, embeddings_VD: Tensor, frozen: Tensor, vocabulary: Vocabulary
) -> Tensor:
    """logits + slope <z, E_v>: what the noisy embedding alone says of each token (exact, embeddings being of unit
    length), float32 whatever autocast says. logits [..., V], z [..., D], slope and frozen [...]. Of a divided
    vocabulary, logits and embeddings are this process's part."""
    constant = frozen[..., None]
    said = slope.float()[..., None] * z
    said = vocabulary.shared(torch.cat([said.masked_fill(~constant, 0), said.masked_fill(constant, 0)], -1))
    with torch.autocast(z.device.type, enabled=False):
        flat = torch.addmm(logits.flatten(0, -2), said.flatten(0, -2), _with_constant(embeddings_VD).T)
    return flat.view_as(logits)


def mean_embedding(probabilities: Tensor, embeddings_VD: Tensor, frozen: Tensor) -> Tensor:
    """The embedding that predictions expect, float32 [..., D], for probabilities [..., V] and frozen that broadcasts to
    [...]; of a divided vocabulary what is summed of this process's part."""
    with torch.autocast(probabilities.device.type, enabled=False):
        constant, learning = (probabilities @ _with_constant(embeddings_VD)).chunk(2, -1)
    return torch.where(frozen[..., None], constant, learning)


def _with_constant(embeddings_VD: Tensor) -> Tensor:
    """[V, 2D]: the table as a constant, then the table."""
    return torch.cat([embeddings_VD.detach(), embeddings_VD], -1)
