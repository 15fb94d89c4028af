"""For processes with uniform noise: objectives over a small vocabulary, Bayes denoisers of a toy law, chosen x_t."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from braid.data_pipeline.loader import Batch
from braid.kernels.random import initial_normal
from braid.pretrain.config.objectives.duo import DuoConfig
from braid.pretrain.config.objectives.gidd import GIDDConfig
from braid.pretrain.config.schema import ModelConfig
from braid.pretrain.model.backbone import Backbone, Prediction
from braid.pretrain.model.token_logits import TokenLogits
from braid.pretrain.objectives.base import Noise
from braid.pretrain.objectives.duo import Duo
from braid.pretrain.objectives.gidd import GIDD

from ..diffusion.chains import Chain
from .references import GivenDraws, Network

CLASSES = {"duo": (Duo, DuoConfig), "gidd": (GIDD, GIDDConfig)}
MODEL = ModelConfig(width=32, num_layers=2, num_heads=2, cond_dim=16)


def chain_of(name: str, vocab_size: int, mask_id: int, p_uniform: float = 0.2) -> Chain:
    return Chain(vocab_size, mask_id, p_uniform=None if name == "duo" else p_uniform)


def build(name: str, chain: Chain, network: torch.nn.Module | None = None, *, randomise: bool = True, **options):
    """An objective over the chain's tokens; without a network, with a backbone of random non-zero weights."""
    if network is None:
        network = Backbone(MODEL, vocab_size=chain.vocab_size, causal=False, time_conditioned=True, seed=3)
        if randomise:
            with torch.no_grad():
                for key, parameter in network.named_parameters():
                    parameter.add_(0.2 * initial_normal(5, key, tuple(parameter.shape)))
    if name == "gidd":
        options = {"p_uniform": chain.p_uniform, "gamma": chain.gamma} | options
    cls, config = CLASSES[name]
    return cls(config(**options), network, mask_id=chain.mask_id, bos_id=0, eos_id=0)


def real_batch(chain: Chain, num: int, length: int, *, padding: int = 0, given: int = 0) -> Batch:
    """Random rows without the mask: the first `given` positions are conditions, the last `padding` do not count."""
    generator = torch.Generator().manual_seed(num)
    tokens = torch.tensor(chain.real)[torch.randint(0, len(chain.real), (num, length), generator=generator)]
    position = torch.arange(length).expand(num, -1)
    loss_mask = (position >= given) & (position < length - padding)
    return Batch(tokens, loss_mask, torch.arange(num), position < given)


class Bayes(Network):
    """The Bayes denoiser of a known law under a chain: p(x_0^l | x_t without l), or with it: p(x_0^l | x_t)."""

    def __init__(self, chain: Chain, sequences: torch.Tensor, law: torch.Tensor, *, leave_one_out: bool = True) -> None:
        super().__init__()
        self.chain, self.vocab_size = chain, chain.vocab_size
        self.sequences, self.law, self.leave_one_out = sequences, law, leave_one_out
        self.indicators = F.one_hot(sequences, chain.vocab_size).double()  # [S, L, V]

    def forward(self, tokens, times, dropout=None, segments=None) -> Prediction:
        if tokens.is_floating_point():
            tokens = tokens.argmax(-1)
        moments, of_row = times.unique(return_inverse=True)
        matrix = torch.stack([self.chain.marginal(t) for t in moments.tolist()])[of_row]  # [B, V, V]
        batch = torch.arange(len(tokens))[:, None, None]
        likelihood = matrix[batch, self.sequences[None], tokens[:, None]]  # [B, S, L]
        if self.leave_one_out:
            others = torch.stack([likelihood.index_fill(2, torch.tensor([l]), 1.0).prod(2)
                                  for l in range(tokens.shape[1])], 2)  # fmt: skip
        else:
            others = likelihood.prod(2, keepdim=True).expand_as(likelihood)
        mass = torch.einsum("bsl,s,slv->blv", others, self.law, self.indicators)
        law = mass / mass.sum(-1, keepdim=True).clamp(min=1e-300)
        return Prediction(TokenLogits.known(law.clamp(min=1e-300).log()))


class SoftTable(Network):
    """Logits that depend on the token at each place and on the time: weights [B, L, V] of soft tokens count too."""

    def __init__(self, chain: Chain, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.randn(chain.vocab_size, chain.vocab_size, generator=generator, dtype=torch.float64)
        self.slope = torch.randn(chain.vocab_size, generator=generator, dtype=torch.float64)
        self.vocab_size = chain.vocab_size

    def forward(self, tokens, times, dropout=None, segments=None) -> Prediction:
        weights = tokens.double() if tokens.is_floating_point() else F.one_hot(tokens, self.vocab_size).double()
        return Prediction(TokenLogits.known(weights @ self.table + times[:, None, None] * self.slope))


@dataclass(frozen=True)
class Wanted(GivenDraws):
    """Noise that makes x_t what is `wanted` [B, L] of `clean` tokens [B, L], at any time where that can happen."""

    chain: Chain = None
    wanted: torch.Tensor = None
    clean: torch.Tensor = None
    at: torch.Tensor = None
    """The times [B] the objective will draw (only to hit GIDD's interval of uniform noise)."""

    def integers(self, num_positions, n):
        assert n == len(self.chain.real)
        return self.wanted - (self.wanted > self.chain.mask_id).long()

    def uniforms(self, num_positions, *, word=0):
        if self.chain.p_uniform is None:
            return torch.zeros(self.wanted.shape)
        noise = [self.chain.coefficients(t)[1] for t in self.at.tolist()]
        mask = torch.stack([law[self.chain.mask_id] for law in noise])[:, None]
        middle = mask + torch.stack([law[self.chain.real].sum() for law in noise])[:, None] / 2
        real = torch.where(self.wanted == self.clean, 1 - 2.0**-24, middle)
        return torch.where(self.wanted == self.chain.mask_id, 0.0, real).float()


def exact_figure(objective, chain: Chain, sequences: torch.Tensor, times_of, figure: str = "bound", nodes: int = 24):
    """E over all x_t and by quadrature over the stratum u of one draw of a figure: float64 [num sequences].

    `times_of(u)` are the times the objective makes of strata. u is a polynomial of v that is flat at both ends: it
    tames a logarithm at u = 0 and a root at 1.
    """
    x, weights = np.polynomial.legendre.leggauss(nodes)
    v, dv = torch.tensor((x + 1) / 2), torch.tensor(weights / 2)
    states = range(chain.vocab_size) if chain.p_uniform is not None else chain.real
    noised = torch.cartesian_prod(*[torch.tensor(list(states))] * sequences.shape[1])
    total = torch.zeros(len(sequences), dtype=torch.float64)
    for u, weight in zip(
        (v**3 * (10 - 15 * v + 6 * v**2)).tolist(), (30 * (v * (1 - v)) ** 2 * dv).tolist(), strict=True
    ):
        t = times_of(torch.tensor([u], dtype=torch.float64))
        probability = chain.marginal(float(t))[sequences[:, None], noised[None]].prod(-1)  # [S, X]
        possible = probability > 0
        which, state = possible.nonzero(as_tuple=True)
        num = len(which)
        clean, wanted = sequences[which], noised[state]
        strata = torch.full((num,), u, dtype=torch.float64)
        noise = Wanted(0, torch.arange(num), torch.zeros(num, dtype=torch.int64), strata, 1, chain=chain,
                       wanted=wanted, clean=clean, at=t.expand(num))  # fmt: skip
        batch = Batch(clean, torch.ones_like(clean, dtype=torch.bool), torch.arange(num))
        values = objective.evaluate(batch, noise)[figure].detach()
        total.index_add_(0, which, weight * probability[possible] * values)
    return total


def law_of_samples(chain: Chain, network: torch.nn.Module, sequences: torch.Tensor, steps: int) -> torch.Tensor:
    """The law of what ancestral sampling gives in that many steps, by enumeration of all states: [num sequences]."""
    length = sequences.shape[1]
    states = torch.cartesian_prod(*[torch.arange(chain.vocab_size)] * length)
    start = torch.full((chain.vocab_size,), 1 / len(chain.real), dtype=torch.float64)
    start[chain.mask_id] = 0
    if chain.p_uniform is not None:
        start = chain.clean(chain.mask_id)
    mass = start[states].prod(1)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    for t, s in zip(times[:-1], times[1:], strict=True):
        predicted = network(states, torch.full((len(states),), t, dtype=torch.float64)).logits.softmax(-1)
        before, mass = mass, torch.zeros_like(mass)
        for number in before.nonzero()[:, 0].tolist():
            kernels = [chain.reverse(s, t, int(states[number, l]), predicted[number, l]) for l in range(length)]
            mass += before[number] * torch.stack([kernels[l][states[:, l]] for l in range(length)]).prod(0)
    place = torch.tensor([chain.vocab_size**l for l in reversed(range(length))])
    assert abs(float(mass.sum()) - 1) < 1e-9
    return mass[(sequences * place).sum(1)]


def rows(batch: Batch, noise: Noise, which: torch.Tensor) -> tuple[Batch, Noise]:
    """Some of the samples."""
    parts = {name: getattr(noise, name)[which] for name in ("ordinals", "index", "shift")}
    chosen = Batch(batch.tokens[which], batch.loss_mask[which], batch.ordinals[which], batch.condition[which])
    return chosen, replace(noise, **parts)
