"""A frozen pretrained encoder from Hugging Face transformers, kept from seeing hidden tokens.

Hidden tokens are replaced before the network: by its own mask token where it was trained with one (BERT, RoBERTa), by a
zero input embedding otherwise (Qwen, GPT-2), the rule of LADD (arXiv 2510.18114).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor, nn

from braid.kernels.errors import BraidError, ConfigError, InputError
from braid.kernels.random import initial_normal
from braid.pretrain.config.objectives.encoder import EncoderConfig
from braid.pretrain.model.encoders import Encoder, fingerprint

SAMPLES = (
    "The quick brown fox jumps over the lazy dog.",
    "In 1998, prices rose 3.7% (from $1,024.50)\n\n\tdef f(x): return x**2",
    "Zürich, naïve café: 東京 is far away!",
)


class HuggingFaceEncoder(Encoder):
    """The first `latent_dim` dimensions of one hidden state of a frozen network, under bfloat16 autocast on CUDA."""

    def __init__(
        self,
        network: nn.Module,
        *,
        native_mask_id: int | None,
        layer: int,
        latent_dim: int,
        mask_id: int,
        variance_floor: float,
        leaky: bool,
    ) -> None:
        super().__init__(latent_dim=latent_dim, mask_id=mask_id, variance_floor=variance_floor)
        assert not (leaky and native_mask_id is not None), "an encoder with a mask token has no leaky form"
        self.network, self.native_mask_id, self.layer, self.leaky = network, native_mask_id, layer, leaky
        self.max_length = _max_length(network)
        self.num_parameters = sum(parameter.numel() for parameter in network.parameters())
        settings = f"layer={layer} dim={latent_dim} floor={variance_floor} mask={native_mask_id} leaky={leaky}"
        self.fingerprint = fingerprint(network.state_dict(), settings)

    def represent(self, tokens_BL: Tensor, hidden_BL: Tensor, segments_BL: Tensor | None = None) -> Tensor:
        if tokens_BL.shape[1] > self.max_length:
            raise ConfigError(
                "The sequence is longer than the encoder can read",
                found=f"data.sequence_length={tokens_BL.shape[1]}, the encoder's limit {self.max_length}",
                change="data.sequence_length or objective.encoder.path",
            )
        with torch.autocast(tokens_BL.device.type, dtype=torch.bfloat16, enabled=tokens_BL.device.type == "cuda"):
            output = self.network(
                **self.inputs(tokens_BL, hidden_BL),
                attention_mask=torch.ones_like(tokens_BL) if segments_BL is None else (segments_BL > 0).long(),
                output_hidden_states=self.layer != -1,
            )
        states_BLE = output.last_hidden_state if self.layer == -1 else output.hidden_states[self.layer]
        return states_BLE[..., : self.latent_dim].float()

    def inputs(self, tokens_BL: Tensor, hidden_BL: Tensor) -> dict[str, Tensor]:
        """What the network is fed: ids, or input embeddings with zeros at hidden positions."""
        if self.native_mask_id is not None:
            return {"input_ids": tokens_BL.masked_fill(hidden_BL, self.native_mask_id)}
        if self.leaky:  # the text as it is; a corpus's own mask id, which the network does not know, becomes id 0
            return {"input_ids": tokens_BL.masked_fill(tokens_BL == self.mask_id, 0)}
        embeddings_BLE = self.network.get_input_embeddings()(tokens_BL.masked_fill(hidden_BL, 0))
        return {"inputs_embeds": embeddings_BLE.masked_fill(hidden_BL[..., None], 0.0)}


def load_huggingface_encoder(
    config: EncoderConfig, *, corpus_folder: Path, mask_id: int, key: int, leaky: bool, device: torch.device
) -> HuggingFaceEncoder:
    """Load `config.path` (a local folder, or a hub name) and check it against the corpus's tokenizer. `key` is that of
    random weights.

    Raises ConfigError (nothing to load, dimension or layer out of range, no leaky form), InputError (cannot be loaded,
    other tokenizer).
    """
    try:
        from transformers import AutoConfig, AutoModel, AutoTokenizer
    except ImportError as error:
        raise InputError(
            "A huggingface encoder needs transformers", found=str(error), change="pip install 'braid-lm[hf]'"
        ) from error
    if not config.path:
        change = "objective.encoder.path: a local folder or a hub name"
        raise ConfigError("No encoder is named", found="objective.encoder.path is empty", change=change)
    tokenizer = _load(AutoTokenizer.from_pretrained, config.path)
    if config.random_weights:
        with torch.random.fork_rng(devices=[]):  # what the library draws is replaced
            network = AutoModel.from_config(_load(AutoConfig.from_pretrained, config.path))
        network = randomised(network.float(), key)
    else:
        network = _load(AutoModel.from_pretrained, config.path).float()
    if network.config.is_encoder_decoder:  # a folder of the encoder alone leaves the decoder at random values
        network = network.get_encoder()
    network = network.eval().requires_grad_(False)

    rows, width = network.get_input_embeddings().weight.shape
    _check_vocabulary(tokenizer, rows, corpus_folder, mask_id, config.path)
    num_layers = network.config.num_hidden_layers
    if not -num_layers - 1 <= config.layer <= num_layers:
        raise ConfigError(
            "The encoder has no such layer",
            found=f"objective.encoder.layer={config.layer}",
            change=f"0 (embeddings) to {num_layers}, or -1 for the last",
        )
    width = network.config.hidden_size
    if config.latent_dim > width:
        raise ConfigError(
            "The encoder's representations are narrower than the latents",
            found=f"objective.encoder.latent_dim={config.latent_dim}, width {width}",
            change="objective.encoder.latent_dim",
        )
    native = tokenizer.mask_token_id
    native = native if native is not None and native < rows else None
    if leaky and native is not None:
        raise ConfigError(
            "This encoder has a mask token of its own, so there is no leaky form of it",
            found=f"objective.leaky_encoder=true with {config.path}",
            change="objective.leaky_encoder=false",
        )
    return HuggingFaceEncoder(
        network.to(device),
        native_mask_id=native,
        layer=config.layer,
        latent_dim=config.latent_dim,
        mask_id=mask_id,
        variance_floor=config.variance_floor,
        leaky=leaky,
    )


@torch.no_grad()
def randomised(network: nn.Module, key: int) -> nn.Module:
    """Every matrix drawn anew, a function of (key, name), with variance 1 / (3 times the last dimension): the house's
    rule, under which a layer hears its neighbours at any width. Norms and biases stay as the library starts them."""
    for name, parameter in network.named_parameters():
        if parameter.dim() > 1:
            values = initial_normal(key, f"encoder.{name}", tuple(parameter.shape))
            parameter.copy_(values / math.sqrt(3 * parameter.shape[-1]))
    return network


def _load(from_pretrained: Callable[..., Any], path: str) -> Any:
    try:
        return from_pretrained(path, local_files_only=Path(path).is_dir())
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            "The encoder cannot be loaded",
            found=f"{path}: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}",
            change="objective.encoder.path: a folder with config.json, weights and tokenizer, or a name on the hub",
        ) from error


def _check_vocabulary(tokenizer: Any, rows: int, corpus_folder: Path, mask_id: int, path: str) -> None:
    """The encoder must read the corpus's ids as the same tokens, all but a mask id that was appended for the corpus."""

    def mismatch(found: str) -> BraidError:
        return InputError(
            "The encoder's tokenizer is not the corpus's",
            found=found,
            change=f"prepare the corpus with --tokenizer {path}, or choose an encoder with the corpus's tokenizer",
        )

    file = corpus_folder / "tokenizer" / "tokenizer.json"
    if not file.is_file():
        raise mismatch(f"{file} does not exist")
    ours, theirs = tokenizers.Tokenizer.from_file(str(file)), tokenizer.get_vocab()
    vocabulary = {token: i for token, i in ours.get_vocab().items() if i != mask_id}
    wrong = sorted((i, token) for token, i in vocabulary.items() if theirs.get(token) != i)
    if wrong:
        i, token = wrong[0]
        raise mismatch(
            f"{len(wrong):,} of {len(vocabulary):,} tokens have other ids, first {token!r}: {i} in the corpus, "
            f"{theirs.get(token, 'absent')} in the encoder"
        )
    if max(vocabulary.values()) >= rows:
        raise mismatch(f"ids up to {max(vocabulary.values())}, but the encoder embeds {rows} tokens")
    for text in SAMPLES:
        mine = ours.encode(text, add_special_tokens=False).ids
        if mine != (other := tokenizer(text, add_special_tokens=False)["input_ids"]):
            raise mismatch(f"{text!r} is {mine[:8]}... in the corpus, {other[:8]}... in the encoder")


def _max_length(network: nn.Module) -> float:
    """Positions the network has; RoBERTa's table starts after its padding index."""
    limit = getattr(network.config, "max_position_embeddings", None)
    table = getattr(getattr(network, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    if limit is None:
        return float("inf")
    return limit if padding is None else limit - padding - 1
