"""T5's encoder-decoder (arXiv 1910.10683) out of transformers' blocks, over the ids of any corpus.

Stacks of pre-norm blocks with RMSNorm, relative position biases that the layers of a stack share, attention without a
scale, ReLU and no biases; one table embeds both sides and, over the square root of the width, is the head. At width
512, 6 layers and 8 heads this is T5-small (60.5M parameters at its 32,128 ids, 35.3M of them the encoder's).

The ids of the sentinels that stand for left out spans are not the tokenizer's, for a general one has none. They
lie above the vocabulary, vocab_size + i for span i, and above them the one id that starts the decoder.

Shape suffixes: B sequences, L tokens of a row, I of the encoder's input, T of the target, W width, V ids.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from braid.kernels.errors import InputError
from braid.parallel.accumulation import autocast_dtype
from braid.parallel.layers import Loss, T
from braid.parallel.vocabulary import Vocabulary
from braid.pretrain.config.schema import ModelConfig
from braid.pretrain.model.flops import TrainingFlops
from braid.pretrain.model.network import Network
from braid.pretrain.model.token_logits import TokenLogits


class TiedEmbedding(nn.Embedding):
    """A table that is the head, too: ids are looked up, hidden states multiplied with it. As an `OutputLinear` it may
    be asked for a loss."""

    def forward(self, x: Tensor, loss: Loss[T] | None = None) -> Tensor | T:
        if loss is not None:
            return loss(x, self.weight, None)
        return F.linear(x, self.weight.to(x.dtype)) if x.is_floating_point() else super().forward(x)


class T5Network(Network):
    """Rows of which `num_noised` tokens in `num_spans` spans are replaced by sentinels, to the tokens left out.

    Raises InputError where transformers is not installed.
    """

    parts: ClassVar[dict[str, str]] = {"encoder": "blocks", "decoder": "blocks", "embedding": "embedding"}

    def __init__(self, model: ModelConfig, *, vocab_size: int, num_noised: int, num_spans: int, seed: int) -> None:
        super().__init__()
        self.config, self.vocab_size = model, vocab_size
        self.num_noised, self.num_spans = num_noised, num_spans
        self.start_id = vocab_size + num_spans
        device = torch.get_default_device()
        with torch.device("meta"):  # no values yet: the library's own initialisation draws from the global generator
            self.embedding = TiedEmbedding(self.start_id + 1, model.width)
            self.encoder, self.decoder = _stack(model, is_decoder=False), _stack(model, is_decoder=True)
        self.materialise(device, seed)

    def forward(self, inputs_BI: Tensor, targets_BT: Tensor) -> TokenLogits:
        """From ids with sentinels for what is left out, int64 [B, I], and the target, int64 [B, T], of which position i
        is predicted from those before it, to logits [B, T, V]; V counts the vocabulary, the sentinels and the start.
        Runs under the caller's autocast."""
        states_BIW = self.encode(inputs_BI)
        shifted_BT = F.pad(targets_BT[:, :-1], (1, 0), value=self.start_id)
        x_BTW = self.decoder(inputs_embeds=self.embedding(shifted_BT), encoder_hidden_states=states_BIW)[0]
        hidden_BTW = (x_BTW * self.config.width**-0.5).to(autocast_dtype(x_BTW))
        return TokenLogits(hidden_BTW, self.embedding, Vocabulary(self.start_id + 1), z_loss=self.config.z_loss)

    def encode(self, tokens_BL: Tensor) -> Tensor:
        """The encoder's output [B, L, W]."""
        return self.encoder(inputs_embeds=self.embedding(tokens_BL))[0]

    def probe(self, tokens_BL: Tensor) -> Tensor:
        return self.encode(tokens_BL)

    def initial_rule(self, name: str, shape: torch.Size) -> float | None:
        """T5's own: variance 1 / fan_in, which for queries makes up for the scale that attention does not have, and
        embeddings of variance 1, which the head divides by the width."""
        if name == "embedding.weight":
            return 1.0
        if len(shape) == 1:
            return None
        if "relative_attention_bias" in name:
            return self.config.width**-0.5
        head_dim = self.config.width // self.config.num_heads
        return (shape[-1] * (head_dim if name.endswith(".q.weight") else 1)) ** -0.5

    def training_flops(self, sequence_length: int) -> TrainingFlops:
        """Per token of a row, by the rule of flops.py: the encoder runs over I = L - noised + spans tokens, the decoder
        over T = noised + spans, and its keys and values of the encoder's output are of I."""
        model = self.config
        width, layers = model.width, model.num_layers
        inputs, targets = sequence_length - self.num_noised + self.num_spans, self.num_noised + self.num_spans
        attention, mlp = 4 * width**2, 2 * width * _mlp_width(model)
        encoder = inputs * (attention + mlp)
        decoder = targets * (attention + mlp) + (targets + inputs) * attention // 2
        pairs = inputs**2 + targets**2 + targets * inputs
        return TrainingFlops(
            linear=6 * layers * (encoder + decoder) / sequence_length,
            attention=12 * layers * width * pairs / sequence_length,
            conditioning=0.0,
            head=6 * self.embedding.num_embeddings * width * targets / sequence_length,
        )


def _mlp_width(model: ModelConfig) -> int:
    return round(model.width * model.mlp_ratio)


def _stack(model: ModelConfig, *, is_decoder: bool) -> Any:
    """Blocks and final norm of one side, without a table of its own."""
    try:
        from transformers import T5Config
        from transformers.models.t5.modeling_t5 import T5Stack
    except ImportError as error:
        raise InputError(
            "objective.name = 't5' needs transformers", found=str(error), change="pip install 'braid-lm[hf]'"
        ) from error
    stack = T5Stack(
        T5Config(
            d_model=model.width,
            d_kv=model.width // model.num_heads,
            d_ff=_mlp_width(model),
            num_layers=model.num_layers,
            num_heads=model.num_heads,
            dropout_rate=0.0,
            is_decoder=is_decoder,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
    stack.embed_tokens = None  # the two sides share one, and it is saved once
    return stack
