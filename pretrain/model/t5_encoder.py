"""What ELF diffuses: a clean latent vector for every token of a text, from a frozen encoder (arXiv 2605.10938).

Which one matters, best first, by the paper's ablation: a pretrained contextual encoder (T5-small) > a contextual one
trained from scratch > the token table of a pretrained one > a frozen Gaussian table > a learned table. The first two
are `T5Latents`. `TableLatents` has the Gaussian one, and two that the paper does not rank: a table built from the
corpus, and the token embeddings another run has learnt. That of a pretrained encoder is not offered, nor one that is
learned with ELF.

Where rows hold a (source, target) pair, the source is the condition. It is read by itself: its latents know nothing of
the target, as at sampling. The target reads everything. For guidance by the source some rows drop it: then the target
must not have read it either, and its own latents are 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from braid.kernels.errors import ConfigError, InputError
from braid.pretrain.model.encoders import Encoder, TableEncoder

T5_TYPES = ("t5", "mt5")


class TextLatents(ABC):
    """Text to clean latents. Deterministic, without gradient, and no nn.Module: nothing of it is trained or saved."""

    latent_dim: int

    @torch.no_grad()
    def encode(
        self, tokens: Tensor, valid: Tensor, condition: Tensor | None = None, drop_condition: Tensor | None = None
    ) -> Tensor:
        """Latents [B, L, D], float32, of tokens int64 [B, L].

        `valid`, bool [B, L]: where there is text; elsewhere the latent is 0 and nothing is read. `condition`, bool
        [B, L]: the source of a pair, a part of what is valid; None: none. `drop_condition`, bool [B]: rows whose
        condition is cut off and has latents 0; None: none.
        """
        if condition is None:
            condition = torch.zeros_like(valid)
        if drop_condition is None:
            drop_condition = valid.new_zeros(len(valid))
        shown_BL = valid & ~(condition & drop_condition[:, None])
        latents_BLD = self.represent(tokens, readable(valid, condition, drop_condition))
        return latents_BLD.masked_fill(~shown_BL[..., None], 0.0)

    @abstractmethod
    def represent(self, tokens_BL: Tensor, readable_BLL: Tensor) -> Tensor:
        """Latents [B, L, D], float32, of which row i may depend on the tokens j with readable[:, i, j] alone."""


class TableLatents(TextLatents):
    """One fixed vector a token, with mean 0 and standard deviation 1 over the vocabulary in each dimension."""

    def __init__(self, table_VD: Tensor) -> None:
        self.latent_dim = table_VD.shape[1]
        self.table = standardised_dimensions(table_VD)

    def represent(self, tokens_BL: Tensor, readable_BLL: Tensor) -> Tensor:
        return F.embedding(tokens_BL, self.table)


class T5Latents(TextLatents):
    """The first `latent_dim` dimensions of a T5 encoder's output over `std`; under bfloat16 autocast on CUDA."""

    def __init__(self, stack: nn.Module, *, latent_dim: int, std: float) -> None:
        self.stack, self.latent_dim, self.std = stack, latent_dim, std
        self._check_that_masks_are_honoured()

    def represent(self, tokens_BL: Tensor, readable_BLL: Tensor) -> Tensor:
        # A mask of its own for every query: 0 where it may look, -inf where not. Four axes are handed through as they
        # are; with fewer, transformers would make them a mask of keys.
        mask_B1LL = torch.zeros(readable_BLL.shape, device=tokens_BL.device).masked_fill(~readable_BLL, -torch.inf)
        with torch.autocast(tokens_BL.device.type, dtype=torch.bfloat16, enabled=tokens_BL.device.type == "cuda"):
            states_BLE = self.stack(input_ids=tokens_BL, attention_mask=mask_B1LL[:, None]).last_hidden_state
        return states_BLE[..., : self.latent_dim].float() / self.std

    def _check_that_masks_are_honoured(self) -> None:
        """Versions of transformers differ in the masks a T5 takes; one that is ignored would tell the source of a pair
        what its target is, and nothing would look wrong."""
        tokens = torch.tensor([[0, 1, 2, 3], [0, 1, 3, 2]], device=next(self.stack.parameters()).device)
        source = torch.tensor([[True, True, False, False]], device=tokens.device).expand(2, -1)
        try:
            latents = self.encode(tokens, torch.ones_like(source), source)
        except (RuntimeError, ValueError, IndexError) as error:
            honoured, found = False, str(error).strip().partition("\n")[0]
        else:
            honoured = torch.equal(latents[0, :2], latents[1, :2]) and not torch.equal(latents[0, 2:], latents[1, 2:])
            found = "the source's representations change with the target"
        if not honoured:
            raise InputError(
                "This version of transformers gives a T5 encoder no mask for each query",
                found=found,
                change="pip install 'transformers>=5'",
            )


def text_latents(encoder: Encoder, *, latent_dim: int, std: float) -> TextLatents:
    """The latents of a frozen encoder. Raises ConfigError for a pretrained one that is no T5."""
    if isinstance(encoder, TableEncoder):
        return TableLatents(encoder.table)
    network = encoder.network
    if network.config.model_type not in T5_TYPES:
        raise ConfigError(
            "ELF reads its latents from a T5 encoder",
            found=f"objective.encoder.path is a model of type {network.config.model_type!r}",
            change="objective.encoder.path=google-t5/t5-small, or objective.encoder.kind=table",
        )
    stack = network.get_encoder() if network.config.is_encoder_decoder else network
    return T5Latents(stack, latent_dim=latent_dim, std=std)


def readable(valid_BL: Tensor, condition_BL: Tensor, drop_condition_B: Tensor) -> Tensor:
    """Which token j a token i may read, bool [B, L, L]: the condition itself alone, the target all that is valid, or
    all but the condition where that is dropped. Padding reads itself, so that no row is empty."""
    from_BL1, to_B1L = condition_BL[:, :, None], condition_BL[:, None, :]
    kept_B11 = ~drop_condition_B[:, None, None]
    itself_LL = torch.eye(valid_BL.shape[1], dtype=torch.bool, device=valid_BL.device)
    return ((from_BL1 == to_B1L) | (to_B1L & kept_B11)) & valid_BL[:, None, :] | itself_LL


def standardised_dimensions(table_VD: Tensor) -> Tensor:
    """Every column with mean 0 and standard deviation 1 over the vocabulary; a constant column stays 0."""
    centred = table_VD.double() - table_VD.double().mean(0)
    std_D = centred.square().mean(0).sqrt()
    return (centred / torch.where(std_D > 0, std_D, 1.0)).float()
