"""LADD objectives with random weights, a toy law whose latents are a function of the text, and its Bayes denoiser."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from braid.data_pipeline.loader import Batch
from braid.kernels.random import initial_normal
from braid.pretrain.config.objectives.co_ladd import CoLADDConfig
from braid.pretrain.config.objectives.di_ladd import DiLADDConfig
from braid.pretrain.config.objectives.encoder import EncoderConfig
from braid.pretrain.config.schema import ModelConfig
from braid.pretrain.diffusion.ladd import LatentSchedule
from braid.pretrain.model.codebook import Codebook
from braid.pretrain.model.encoders import TableEncoder
from braid.pretrain.model.gumbel_codebook import GumbelCodebook
from braid.pretrain.model.joint_attention import JointDenoiser, SlotPrediction
from braid.pretrain.model.latent_denoiser import LatentDenoiser
from braid.pretrain.model.latent_encoder import LatentEncoder
from braid.pretrain.model.token_logits import TokenLogits
from braid.pretrain.objectives.base import Noise
from braid.pretrain.objectives.co_ladd import CoLADD
from braid.pretrain.objectives.di_ladd import CODE_WORD, DiLADD
from braid.pretrain.objectives.ladd import LADD

from .conftest import BOS, EOS, MASK, MODEL, VOCAB
from .references import GivenDraws, Network, toy_law

LATENT_DIM, NUM_SLOTS, CODEBOOK_SIZE = 4, 5, 8
IDS = {"mask_id": MASK, "bos_id": BOS, "eos_id": EOS}


def build(
    name: str,
    *,
    model: ModelConfig = MODEL,
    table: torch.Tensor | None = None,
    learned: bool = False,
    randomise: bool = True,
    **options,
) -> LADD:
    """An objective over 16 tokens and a mask, with random non-zero weights everywhere."""
    table = initial_normal(11, "table", (VOCAB, LATENT_DIM)) if table is None else table
    encoder = TableEncoder(table, mask_id=MASK, variance_floor=1e-6)
    kind = EncoderConfig(kind="learned" if learned else "table", latent_dim=encoder.latent_dim)
    options = {"num_slots": NUM_SLOTS, "encoder": kind} | options
    if name == "co_ladd":
        config = CoLADDConfig(**options)
        outputs = encoder.latent_dim
    else:
        config = DiLADDConfig(**({"codebook_size": CODEBOOK_SIZE} | options))
        outputs = config.codebook_size
    common = {"vocab_size": VOCAB, "num_slots": config.num_slots, "latent_dim": encoder.latent_dim}
    network = JointDenoiser(model, **common, latent_outputs=outputs, latent_positions=config.latent_positions,
                            times=config.time_conditioning, masked_latents=name == "di_ladd", seed=3)  # fmt: skip
    if name == "co_ladd":
        latent_encoder = LatentEncoder(model, **common, mask_id=MASK, seed=6) if learned else None
        denoiser = None
        if config.latent_denoiser:
            denoiser = LatentDenoiser(model, num_slots=config.num_slots, latent_dim=encoder.latent_dim, seed=7)
        objective = CoLADD(config, network, None if learned else encoder, latent_encoder, denoiser, **IDS)
    else:
        num_codes, is_gumbel = config.codebook_size - 1, config.quantiser == "gumbel"
        if is_gumbel:
            codebook = GumbelCodebook(num_codes, encoder.latent_dim, seed=4)
        else:
            codebook = Codebook(num_codes, encoder.latent_dim, decay=config.codebook_decay,
                                dead_below=config.codebook_dead_below, settling=config.codebook_settling,
                                seed=4)  # fmt: skip
        outputs = common | ({"latent_dim": num_codes} if is_gumbel else {})
        latent_encoder = LatentEncoder(model, **outputs, mask_id=MASK, seed=6) if learned else None
        objective = DiLADD(config, network, None if learned else encoder, codebook, latent_encoder, **IDS)
    if randomise:
        with torch.no_grad():
            for key, parameter in objective.named_parameters():
                parameter.add_(0.2 * initial_normal(5, key, tuple(parameter.shape)))
    return objective


def part(batch: Batch, noise: Noise, which) -> tuple[Batch, Noise]:
    """Some of the sequences, with what belongs to them."""
    rows = (batch.tokens[which], batch.loss_mask[which], batch.ordinals[which], batch.condition[which])
    return Batch(*rows), replace(
        noise, ordinals=noise.ordinals[which], index=noise.index[which], shift=noise.shift[which]
    )


# -- a toy law: two tokens of a vocabulary of three, and one latent that says which half of the table they are in --

SEQUENCES, LAW = toy_law(length=2, vocabulary=3, seed=0)
ENTROPY = float(-(LAW * LAW.log()).sum())
TOY_TABLE = torch.zeros(VOCAB, 1)
TOY_TABLE[:3, 0] = torch.tensor([1.0, -0.4, 0.3])
SIGNS = TOY_TABLE[SEQUENCES, 0].sum(1).sign()
"""The latent of every sequence: the sign of the mean of its two tokens' vectors."""
CODES = (SIGNS < 0).long()
"""The same as a code: 0 for +1, 1 for -1."""
CODE_ENTROPY = float(-sum(p * p.log() for p in (LAW[CODES == 0].sum(), LAW[CODES == 1].sum())))


def toy(name: str, **options) -> LADD:
    """An objective over the toy law's texts, its codebook (+1, -1); give it a network."""
    options = {"table": TOY_TABLE, "num_slots": 1} | options
    if name == "co_ladd":
        return build(name, **options)
    objective = build(name, codebook_size=3, **options)
    objective.codebook.vectors.copy_(torch.tensor([[1.0], [-1.0]]))
    with torch.no_grad():
        objective.network.latent_mask.zero_()
    return objective


class ToyNetwork(Network):
    """The Bayes denoiser of `law`; `latents_matter=False` leaves the slot out of account.

    The slot shows a code (+1, -1, or 0 when masked), or y_t where `schedule` is given, with its noise at the latents'
    time for q(y_0|x) of deviation `sigma`. It says what the tokens are, and the code, or the mean of the sign. Where no
    text has this code (a step of a sampler can reveal both strands at once), it goes by the tokens.
    """

    def __init__(
        self,
        law: torch.Tensor = LAW,
        *,
        schedule: LatentSchedule | None = None,
        sigma: float = 0.0,
        latents_matter: bool = True,
        num_slots: int = 1,
    ) -> None:
        super().__init__()
        self.law, self.schedule, self.sigma, self.latents_matter = law, schedule, sigma, latents_matter
        self.num_slots, self.latent_dim = num_slots, 1
        self.latent_mask = torch.zeros(1)
        self.indicators = F.one_hot(SEQUENCES, VOCAB).double()
        self.calls: list[tuple] = []

    def weights(self, tokens, latents, latent_times) -> torch.Tensor:
        """p(text | x_t, y_t), float64 [B, 9]."""
        fits = ((tokens[:, None] == MASK) | (tokens[:, None] == SEQUENCES)).all(-1)
        mass = self.law * fits
        if self.latents_matter and self.schedule is None:
            slot = latents[:, 0, 0]
            agreeing = mass * ((slot == 0)[:, None] | (slot[:, None] == SIGNS))
            mass = torch.where(agreeing.any(1, keepdim=True), agreeing, mass)
        elif self.latents_matter:
            alpha, sigma = self.schedule.alpha(latent_times), self.schedule.sigma(latent_times)
            variance = (alpha * self.sigma).square() + sigma.square()
            distance = (latents[:, 0, :].double() - alpha[:, None] * SIGNS).square() / (2 * variance[:, None])
            mass = mass * torch.exp(distance.amin(1, keepdim=True) - distance)
        return mass / mass.sum(1, keepdim=True)

    def forward(self, tokens, latents, times, latent_times, dropout=None) -> SlotPrediction:
        self.calls.append((tokens, latents, times, latent_times))
        weights = self.weights(tokens, latents, latent_times)
        logits = torch.einsum("bs,slv->blv", weights, self.indicators).clamp(min=1e-300).log()
        if self.schedule is not None:
            return SlotPrediction(TokenLogits.known(logits), (weights @ SIGNS.double())[:, None, None])
        codes = torch.stack([weights[:, CODES == code].sum(1) for code in (0, 1)], -1)
        codes = F.pad(codes.clamp(min=1e-300).log(), (0, 1), value=7.0)  # the mask's logit must not count
        return SlotPrediction(TokenLogits.known(logits), codes[:, None])


class BlindDenoiser(torch.nn.Module):
    """The latents' own denoiser: what `network` says of them when it sees no token."""

    def __init__(self, network: ToyNetwork) -> None:
        super().__init__()
        self.network, self.calls = network, 0

    def forward(self, latents, times, dropout=None) -> torch.Tensor:
        self.calls += 1
        return self.network(torch.full((len(latents), 2), MASK), latents, torch.ones_like(times), times).latents


@dataclass(frozen=True)
class ToyNoise(GivenDraws):
    """Given uniforms of the tokens [B, 2] and of the code [B, 1], and a given normal [B] for the latent."""

    token_uniforms: torch.Tensor = None
    code_uniforms: torch.Tensor = None
    normal: torch.Tensor = None

    def uniforms(self, num_positions, *, word=0):
        return {0: self.token_uniforms, CODE_WORD: self.code_uniforms}[word]

    def normals(self, num_positions, num_channels, *, purpose="latent"):
        return self.normal[:, None, None]


def gauss_legendre(num: int) -> list[tuple[float, float]]:
    """Nodes and weights on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(num)
    return list(zip(((nodes + 1) / 2).tolist(), (weights / 2).tolist(), strict=True))


def normal_grid(num: int = 61, largest: float = 6.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Nodes and weights of the trapezoidal rule for a standard normal; exact to rounding for what is smooth."""
    nodes = torch.linspace(-largest, largest, num, dtype=torch.float64)
    weights = torch.exp(-nodes.square() / 2)
    return nodes, weights / weights.sum()


def toy_masks(length: int):
    """All masks of `length` places."""
    return list(itertools.product([False, True], repeat=length))
