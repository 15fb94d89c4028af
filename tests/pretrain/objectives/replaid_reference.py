"""A small RePlaid, and its loss written out a second time: float64, one row at a time, no hooks, no tricks.

The network itself is float32, so the reference calls the very network with inputs it has computed by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from braid.data_pipeline.loader import Batch
from braid.kernels.random import initial_normal
from braid.pretrain.config.objectives.replaid import RePlaidConfig
from braid.pretrain.config.schema import ModelConfig
from braid.pretrain.model.embedding_network import EmbeddingNetwork
from braid.pretrain.objectives.base import LossTerms, Noise
from braid.pretrain.objectives.replaid import RePlaid

from .conftest import BOS, EOS, MASK, MODEL, VOCAB

DIM = 16


def build_replaid(
    *, randomise: bool = True, model: ModelConfig = MODEL, vocab_size: int = VOCAB, seed: int = 3, **options
):
    """A RePlaid over 16 tokens and a mask, with random non-zero weights everywhere, in the middle of its training."""
    network = EmbeddingNetwork(model, vocab_size=vocab_size, num_dims=DIM, seed=seed)
    if randomise:
        with torch.no_grad():
            for key, parameter in network.named_parameters():
                parameter.add_(0.2 * initial_normal(5, key, tuple(parameter.shape)))
    ids = {"mask_id": MASK, "bos_id": BOS, "eos_id": EOS}
    objective = RePlaid(RePlaidConfig(**options), network, seed=seed, **ids)
    objective.begin_step(5000, 100_000)
    return objective


def with_split(objective: RePlaid, num: int, size: int) -> RePlaid:
    """Give `num` of `size` sequences to reconstruction, through the running moments."""
    objective.split.moments.copy_(torch.tensor([[0.0, (num / (size - num)) ** 2], [0.0, 1.0]]))
    objective.split.weight.fill_(1.0)
    assert int(objective.split.num_reconstructed(size)) == num
    return objective


def run(objective: RePlaid, batch: Batch, noise: Noise) -> tuple[float, LossTerms]:
    """One micro-batch as the loop does it: loss per token, gradients in the parameters."""
    objective.zero_grad()
    corrupted = objective.corrupt(batch, noise)
    terms = objective.loss(objective.predict(corrupted), corrupted)
    (terms.total / terms.count).backward()
    return float(terms.total.detach() / terms.count), terms


def gradients(objective: RePlaid, prefix: str) -> dict[str, Tensor]:
    return {name: p.grad.double().clone() for name, p in objective.named_parameters() if name.startswith(prefix)}


@dataclass
class Reference:
    """Losses of every sequence in nats per token, attached to the parameters."""

    prior: list[Tensor]
    reconstruction: list[Tensor]
    """Of the sequences at t = 0."""
    diffusion: list[Tensor]
    """Of the others, in their order."""
    cross_entropy: list[Tensor]
    """Of the others: -log p of their tokens."""
    times: list[float]

    @property
    def nelbo(self) -> Tensor:
        return sum(torch.stack(part).mean() for part in (self.prior, self.reconstruction, self.diffusion))


def reference(
    objective: RePlaid, batch: Batch, noise: Noise, *, num_reconstructed: int, conditioned: list[bool], kappa: float
) -> Reference:
    """The NELBO's terms for one global batch. `conditioned` rows are shown their own estimate."""
    result = Reference([], [], [], [], [])
    size = len(batch.tokens)
    eps_all = noise.normals(batch.tokens.shape[1], DIM).double()
    for i in range(size):
        index, shift = int(noise.index[i]), float(noise.shift[i])
        reconstructs = index < num_reconstructed
        time = 0.0 if reconstructs else (index - num_reconstructed + shift) / (size - num_reconstructed)
        hold = (lambda value: value.detach()) if conditioned[i] else (lambda value: value)
        raw = objective.network.embedding.raw.double()
        table = hold(raw / (raw.norm(dim=1, keepdim=True) + 1e-8))
        gamma_0, gamma_1 = hold(objective.schedule.gamma_0.double()[0]), hold(objective.schedule.gamma_1.double()[0])
        g, rate = (hold(value) for value in interior(objective, time))
        gamma = gamma_0 if reconstructs else gamma_0 + (gamma_1 - gamma_0) * g
        alpha2, sigma2 = torch.sigmoid(-gamma), torch.sigmoid(gamma)

        tokens, scored = batch.tokens[i], batch.loss_mask[i]
        e = table[tokens]
        z = alpha2.sqrt() * e + sigma2.sqrt() * eps_all[i]
        inputs = z / torch.sqrt(alpha2 / DIM + sigma2)
        z = torch.where(batch.condition[i][:, None], e, z)
        inputs = torch.where(batch.condition[i][:, None], DIM**0.5 * e, inputs)

        def probabilities(estimate: Tensor, inputs=inputs, gamma=gamma, z=z, table=table) -> Tensor:
            readout = objective.network(inputs.float()[None], estimate.float()[None], gamma[None]).whole[0].double()
            logits = readout + kappa * torch.sigmoid(-gamma).sqrt() / torch.sigmoid(gamma) * z @ table.T
            assert MASK == VOCAB - 1
            return F.pad(logits[:, :MASK].softmax(-1), (0, 1))

        estimate = torch.zeros_like(z)
        if conditioned[i]:
            estimate = (probabilities(estimate) @ table).detach()
        predicted = probabilities(estimate)

        nats = -predicted.gather(1, tokens[:, None])[:, 0].log()
        error = (e - predicted @ table).square().sum(-1)
        diffusion = (gamma_1 - gamma_0) * rate * torch.exp(-gamma) / 2 * error
        variance = torch.sigmoid(gamma_1)
        prior = (variance + torch.sigmoid(-gamma_1) * e.square() - 1 - variance.log()).sum(-1) / 2
        result.prior.append(prior[scored].mean())
        if reconstructs:
            result.reconstruction.append(nats[scored].mean())
        else:
            result.diffusion.append(diffusion[scored].mean())
            result.cross_entropy.append(nats[scored].mean())
            result.times.append(time)
    return result


def interior(objective: RePlaid, time: float) -> tuple[Tensor, Tensor]:
    """g and g' of the learned form at one time, the derivative by autograd."""
    network = objective.schedule.interior
    w1, w2 = F.softplus(network.input.double()), 0.01 * F.softplus(network.output.double())

    def raw(t):
        return (w2 * torch.tanh(w1 * (t - 0.5) + network.bias.double())).sum()

    t = torch.tensor(time, dtype=torch.float64, requires_grad=True)
    g = (raw(t) - raw(0.0)) / (raw(1.0) - raw(0.0))
    (rate,) = torch.autograd.grad(g, t, create_graph=True)
    return g, rate
