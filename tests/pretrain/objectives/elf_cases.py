"""ELF over 16 tokens: random non-zero weights, rows with and without a source, networks whose answers are known."""

from __future__ import annotations

from collections.abc import Callable

import torch

from braid.data_pipeline.loader import Batch
from braid.kernels.random import fold_key, initial_normal
from braid.pretrain.config.objectives.elf import ELFConfig
from braid.pretrain.config.objectives.encoder import EncoderConfig
from braid.pretrain.config.schema import ModelConfig
from braid.pretrain.model.elf_network import ELFNetwork, ELFPrediction
from braid.pretrain.model.encoders import TableEncoder
from braid.pretrain.model.token_logits import TokenLogits
from braid.pretrain.objectives.base import Noise
from braid.pretrain.objectives.elf import ELF

from .conftest import BOS, EOS, MASK, VOCAB
from .references import Network

DIM, LENGTH = 6, 10
MODEL = ModelConfig(width=16, num_layers=2, num_heads=2)
SOURCE, PADDING = slice(0, 3), slice(8, 10)


def build_elf(*, paired: bool = False, randomise: bool = True, model: ModelConfig = MODEL, **options) -> ELF:
    network = ELFNetwork(model, vocab_size=VOCAB, latent_dim=DIM, bottleneck=4, seed=3)
    if randomise:
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.add_(0.2 * initial_normal(5, name, tuple(parameter.shape)))
    encoder = TableEncoder(initial_normal(11, "table", (VOCAB, DIM)), mask_id=MASK, variance_floor=1e-6)
    config = ELFConfig(encoder=EncoderConfig(latent_dim=DIM), **options)
    return ELF(config, network, encoder, paired=paired, mask_id=MASK, bos_id=BOS, eos_id=EOS)


def rows(num: int = 8, *, source: bool = False, padding: bool = False, seed: int = 0) -> Batch:
    """Random rows; of a pair the first three tokens are given; the last two positions may be padding."""
    tokens = torch.randint(0, MASK, (num, LENGTH), generator=torch.Generator().manual_seed(seed))
    loss_mask, condition = torch.ones(2, num, LENGTH, dtype=torch.bool)
    condition &= False
    if source:
        condition[:, SOURCE], loss_mask[:, SOURCE] = True, False
    if padding:
        loss_mask[:, PADDING] = False
    return Batch(tokens, loss_mask, torch.arange(num), condition)


def training_noise(num: int = 8, key: int = 1) -> Noise:
    return Noise.training(fold_key(key, "train"), 0, num, torch.arange(num))


class Says(Network):
    """A network without weights: says(z, tau) of the latents, nothing of the tokens."""

    latent_dim = DIM

    def __init__(self, says: Callable[[torch.Tensor, float], torch.Tensor]) -> None:
        super().__init__()
        self.says = says

    def forward(self, z, estimate, tau, guidance, decode, valid, *, heads) -> ELFPrediction:
        return ELFPrediction(self.says(z, float(tau[0])), TokenLogits.known(torch.zeros(*z.shape[:2], VOCAB)))


class Recorder(Network):
    """Hands every call on and keeps what was asked and said."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network, self.latent_dim = network, network.latent_dim
        self.calls: list[dict] = []

    def forward(self, z, estimate, tau, guidance, decode, valid, *, heads=("denoise", "decode")) -> ELFPrediction:
        prediction = self.network(z, estimate, tau, guidance, decode, valid, heads=heads)
        given = {"z": z, "shown": estimate, "tau": tau, "guidance": guidance, "decode": decode, "valid": valid}
        given = {name: value.clone() for name, value in given.items()}
        said = {"latents": prediction.latents, "logits": prediction.logits}
        self.calls.append(given | said | {"heads": heads, "gradient": torch.is_grad_enabled()})
        return prediction
