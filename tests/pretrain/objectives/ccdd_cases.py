"""CCDD with each of its networks and with encoders of every kind, tiny, with random weights that are nowhere zero."""

from __future__ import annotations

from dataclasses import replace

import torch

from braid.data_pipeline.loader import Batch
from braid.kernels.random import initial_normal
from braid.pretrain.config.objectives.ccdd import CCDDConfig, ExpertsConfig
from braid.pretrain.config.objectives.encoder import EncoderConfig
from braid.pretrain.config.schema import ModelConfig
from braid.pretrain.model.encoders import Encoder, TableEncoder
from braid.pretrain.model.huggingface_encoder import HuggingFaceEncoder, randomised
from braid.pretrain.model.trained_encoder import NormalisedStack
from braid.pretrain.objectives.base import Noise
from braid.pretrain.objectives.ccdd import CCDD, build_network

from .conftest import BOS, EOS, LATENT_DIM, MASK, VOCAB

MODEL = ModelConfig(width=32, num_layers=2, num_heads=2, cond_dim=16)
ARCHITECTURES = {
    "mdit": {"architecture": "mdit"},
    "mmdit": {"architecture": "mmdit"},
    "moedit-1": {"architecture": "moedit", "experts": ExpertsConfig(per_token=1, balance=0.01)},
    "moedit-2": {"architecture": "moedit", "experts": ExpertsConfig(per_token=2)},
}
CONTEXTUAL = ("gpt2", "qwen3", "bert", "roberta", "trained")
NATIVE_MASK = ("bert", "roberta")


def encoder(kind: str = "table", *, leaky: bool = False) -> Encoder:
    """A table, or a tiny random network of a real architecture; BERT's and RoBERTa's, whose positions depend on what
    the tokens are, have the corpus's mask token, the others none. `trained` is a T5 encoder as one of our own runs has
    it."""
    if kind == "table":
        made = TableEncoder(initial_normal(11, "table", (VOCAB, LATENT_DIM)), mask_id=MASK, variance_floor=1e-6)
        made.leaky = leaky
        return made
    import transformers as tf

    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "max_position_embeddings": 32}
    settings = {
        "bert": lambda: tf.BertConfig(**sizes, pad_token_id=1),
        "roberta": lambda: tf.RobertaConfig(**sizes, pad_token_id=1),
        "trained": lambda: tf.T5Config(vocab_size=VOCAB - 1, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2),
        "gpt2": lambda: tf.GPT2Config(vocab_size=VOCAB - 1, n_embd=16, n_layer=2, n_head=2, n_positions=32),
        "qwen3": lambda: tf.Qwen3Config(**sizes | {"vocab_size": VOCAB - 1}, num_key_value_heads=1, head_dim=8),
    }[kind]()
    model = tf.T5EncoderModel(settings).encoder if kind == "trained" else tf.AutoModel.from_config(settings)
    network = randomised(model.float().eval().requires_grad_(False), key=7)
    with torch.no_grad():  # tiny networks hardly look at their neighbours; make them
        for name, parameter in network.named_parameters():
            if parameter.dim() == 2 and "embed" not in name and "wte" not in name:
                parameter.mul_(4)
    if kind == "trained":
        network = NormalisedStack(network, initial_normal(8, "mean", (16,)), initial_normal(8, "std", (16,)).exp())
    native = MASK if kind in NATIVE_MASK else None
    return HuggingFaceEncoder(
        network, native_mask_id=native, layer=-1, latent_dim=LATENT_DIM, mask_id=MASK, variance_floor=1e-6, leaky=leaky
    )


def make(
    architecture: str = "mdit",
    kind: str = "table",
    *,
    randomise: bool = True,
    leaky: bool = False,
    conditional: bool = True,
    model: ModelConfig = MODEL,
    **options,
) -> CCDD:
    config = CCDDConfig(encoder=EncoderConfig(latent_dim=LATENT_DIM), **ARCHITECTURES[architecture] | options)
    separate = config.latent_times != "shared"
    network = build_network(config, model, vocab_size=VOCAB, latent_dim=LATENT_DIM, separate_times=separate, seed=3)
    if randomise:
        with torch.no_grad():
            for key, parameter in network.named_parameters():
                parameter.add_(0.2 * initial_normal(5, key, tuple(parameter.shape)))
    ids = {"mask_id": MASK, "bos_id": BOS, "eos_id": EOS}
    return CCDD(config, network, encoder(kind, leaky=leaky), conditional=conditional, **ids)


def with_condition(batch: Batch, length: int) -> Batch:
    """The first `length` positions given: neither noised nor scored."""
    condition = torch.zeros_like(batch.loss_mask)
    condition[:, :length] = True
    return replace(batch, loss_mask=batch.loss_mask & ~condition, condition=condition)


def rows(batch: Batch, noise: Noise, chosen: torch.Tensor) -> tuple[Batch, Noise]:
    """Some sequences of a batch with the noise they have in it."""
    parts = (batch.tokens, batch.loss_mask, batch.ordinals, batch.condition)
    index, shift = noise.index[chosen], noise.shift[chosen]
    return Batch(*(part[chosen] for part in parts)), replace(
        noise, ordinals=noise.ordinals[chosen], index=index, shift=shift
    )


def recorded_calls(ccdd: CCDD) -> list[dict]:
    """What the network is given from now on, call by call."""
    calls, forward = [], ccdd.network.forward

    def recording(tokens, times, latents, dropout=None, **own):
        calls.append({"tokens": tokens, "times": times, "latents": latents, **own})
        return forward(tokens, times, latents, dropout, **own)

    ccdd.network.forward = recording
    return calls
