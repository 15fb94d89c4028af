"""Frozen encoders: what is hidden is not seen, on every path, with real (tiny) transformers."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers as hf
import torch
from torch import nn

from braid.data_pipeline.tokenizers import load_tokenizer
from braid.kernels.errors import ConfigError, InputError
from braid.pretrain.config.objectives.encoder import EncoderConfig
from braid.pretrain.model.encoders import Encoder, TableEncoder, build_encoder, standardise

WORDS = "the a cat dog fox sat ran ate on under mat log big red old small and then quickly home".split()
CAUSAL, BIDIRECTIONAL = ("gpt2", "qwen3"), ("bert", "roberta")
D = 8


def word_tokenizer(special: list[str], words: list[str] = WORDS) -> hf.Tokenizer:
    vocabulary = {token: i for i, token in enumerate([*special, *words])}
    tokenizer = hf.Tokenizer(hf.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(special)
    return tokenizer


def save_encoder(folder: Path, kind: str, words: list[str] = WORDS, seed: int = 0, extra_rows: int = 0) -> Path:
    """A tiny random pretrained encoder of a real architecture, with its tokenizer."""
    import transformers as tf

    if kind in CAUSAL:
        names = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>", "unk_token": "[UNK]"}
    else:
        names = {"cls_token": "[CLS]", "pad_token": "[PAD]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
        names["mask_token"] = "[MASK]"
    tokenizer = word_tokenizer(list(names.values()), words)
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    rows = tokenizer.get_vocab_size() + extra_rows
    sizes = {"vocab_size": rows, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 48}
    config = {
        "bert": lambda: tf.BertConfig(**sizes, max_position_embeddings=64, pad_token_id=1),
        "roberta": lambda: tf.RobertaConfig(**sizes, max_position_embeddings=66, pad_token_id=1),
        "gpt2": lambda: tf.GPT2Config(vocab_size=rows, n_embd=32, n_layer=3, n_head=2, n_positions=64),
        "qwen3": lambda: tf.Qwen3Config(**sizes, num_key_value_heads=1, head_dim=16, max_position_embeddings=64),
    }[kind]()
    torch.manual_seed(seed)
    model = tf.AutoModel.from_config(config)
    with torch.no_grad():  # tiny random networks hardly look at their neighbours; make them
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name and "wte" not in name:
                parameter.mul_(10)
    model.save_pretrained(folder)
    return folder


class Prepared:
    """An encoder's folder and a corpus prepared with its tokenizer."""

    def __init__(self, kind: str, folder: Path, prepare_documents) -> None:
        self.path = save_encoder(folder / "encoder", kind)
        documents = ["the cat sat on the mat", "a big old dog ran home and ate"] * 20
        self.corpus = prepare_documents(folder / "corpus", documents, self.path)
        tokenizer = load_tokenizer(self.corpus / "tokenizer")
        self.vocab_size, self.mask_id = tokenizer.vocab_size, tokenizer.mask_id
        self.config = EncoderConfig(kind="huggingface", path=str(self.path), latent_dim=D)

    def encoder(self, **changes) -> Encoder:
        leaky = changes.pop("leaky", False)
        return build_encoder(
            replace(self.config, **changes),
            corpus_folder=self.corpus, vocab_size=self.vocab_size, mask_id=self.mask_id, key=3, leaky=leaky,
        )  # fmt: skip


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, prepare_documents):
    made: dict[str, Prepared] = {}

    def get(kind: str) -> Prepared:
        if kind not in made:
            made[kind] = Prepared(kind, tmp_path_factory.mktemp(kind), prepare_documents)
        return made[kind]

    return get


def make(prepared, kind: str, **changes) -> Encoder:
    """`table` and `random` on the GPT-2-like corpus, else the transformer of that name."""
    if kind in ("table", "random"):
        return prepared("gpt2").encoder(kind=kind, path="", window=2, **changes)
    return prepared(kind).encoder(**changes)


KINDS = ("table", "random", *CAUSAL, *BIDIRECTIONAL)


def example(encoder: Encoder, length: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Words only (no special token), about a third hidden; the first position of row 0 is hidden, of row 1 visible."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(6, 6 + len(WORDS) - 3, (4, length), generator=generator)
    hidden = torch.rand(4, length, generator=generator) < 0.35
    hidden[0, 0], hidden[1, 0] = True, False
    return tokens, hidden


def other_words(tokens: torch.Tensor) -> torch.Tensor:
    return 6 + (tokens - 6 + 1) % (len(WORDS) - 3)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_tokens_change_no_bit_and_visible_ones_do(prepared, kind):
    encoder = make(prepared, kind)
    tokens, hidden = example(encoder)
    z = encoder.encode(tokens, hidden)
    assert torch.equal(encoder.encode(torch.where(hidden, other_words(tokens), tokens), hidden), z)
    changed = encoder.encode(torch.where(hidden, tokens, other_words(tokens)), hidden)
    assert ((changed != z).any(-1) == ~hidden).all()
    assert not encoder.leaky


@pytest.mark.parametrize("kind", KINDS)
def test_representations_are_standardised_and_zero_where_hidden(prepared, kind):
    encoder = make(prepared, kind)
    tokens, hidden = example(encoder)
    z = encoder.encode(tokens, hidden)
    assert z.shape == (4, 12, D) and z.dtype == torch.float32 and encoder.latent_dim == D and not z.requires_grad
    assert torch.equal(z[hidden], torch.zeros(int(hidden.sum()), D))
    assert not encoder.encode(tokens, torch.ones_like(hidden)).any()
    torch.testing.assert_close(z[~hidden].mean(-1), torch.zeros(int((~hidden).sum())), atol=1e-5, rtol=0)
    torch.testing.assert_close(z[~hidden].square().sum(-1), torch.full_like(z[~hidden][:, 0], D), rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_token_is_hidden_whatever_the_caller_says(prepared, kind):
    encoder = make(prepared, kind)
    tokens, hidden = example(encoder)
    masked = tokens.masked_fill(hidden, encoder.mask_id)
    assert torch.equal(encoder.encode(masked, torch.zeros_like(hidden)), encoder.encode(tokens, hidden))


@pytest.mark.parametrize("kind", [*CAUSAL, *BIDIRECTIONAL])
def test_padding_is_not_read(prepared, kind):
    encoder = make(prepared, kind)
    tokens, hidden = example(encoder)
    segments = torch.ones_like(tokens, dtype=torch.int32)
    segments[:, 9:] = 0
    padded = torch.where(segments > 0, tokens, other_words(tokens))
    z = encoder.encode(tokens, hidden, segments)[:, :9]
    torch.testing.assert_close(encoder.encode(padded, hidden, segments)[:, :9], z)
    torch.testing.assert_close(encoder.encode(tokens[:, :9], hidden[:, :9]), z, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", [*CAUSAL, *BIDIRECTIONAL])
def test_hiding_a_token_changes_what_its_neighbours_say(prepared, kind):
    """It is hidden from the encoder, not only from its output."""
    encoder = make(prepared, kind)
    tokens, _ = example(encoder)
    nothing, one = torch.zeros(4, 12, dtype=torch.bool), torch.zeros(4, 12, dtype=torch.bool)
    one[:, 5] = True
    difference = (encoder.encode(tokens, one) - encoder.encode(tokens, nothing)).abs().amax(dim=(0, 2))
    assert (difference[6:] > 1e-3).all()
    assert (difference[:5] > 1e-3).all() == (kind in BIDIRECTIONAL)


@pytest.mark.parametrize("kind", CAUSAL)
def test_leaky_form_is_the_released_one_and_leaks(prepared, kind):
    encoder, leaky = make(prepared, kind), make(prepared, kind, leaky=True)
    tokens, hidden = example(encoder)
    nothing = torch.zeros_like(hidden)
    z = leaky.encode(tokens, hidden)
    clean = encoder.encode(tokens, nothing)
    torch.testing.assert_close(z, clean.masked_fill(hidden[..., None], 0))
    changed = leaky.encode(torch.where(hidden, other_words(tokens), tokens), hidden)
    after_a_hidden_one = (hidden.cumsum(1) > 0) & ~hidden
    assert ((changed - z).abs().amax(-1) > 1e-3)[after_a_hidden_one].all(), "visible positions read hidden tokens"
    assert leaky.leaky and leaky.fingerprint != encoder.fingerprint
    masked = tokens.masked_fill(hidden, encoder.mask_id)  # an id the network does not have must not crash it
    assert not leaky.encode(masked, nothing)[hidden].any()


@pytest.mark.parametrize("kind", ["table", "random", *BIDIRECTIONAL])
def test_leaky_form_is_refused_where_there_is_none(prepared, kind):
    with pytest.raises(ConfigError, match="no leaky form"):
        make(prepared, kind, leaky=True)


@pytest.mark.parametrize("kind", [*CAUSAL, *BIDIRECTIONAL])
@pytest.mark.parametrize("layer", [-1, 0, 2])
def test_layer_and_first_dimensions_of_the_hidden_state(prepared, kind, layer):
    import transformers

    encoder = make(prepared, kind, layer=layer)
    tokens, hidden = example(encoder)
    network = transformers.AutoModel.from_pretrained(prepared(kind).path).eval()
    with torch.no_grad():
        states = network(input_ids=tokens, output_hidden_states=True).hidden_states[layer][..., :D]
    expected = (states - states.mean(-1, keepdim=True)) / (states.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    torch.testing.assert_close(encoder.encode(tokens, torch.zeros_like(hidden)), expected, atol=1e-4, rtol=1e-4)


def test_bert_sees_its_own_mask_token(prepared):
    encoder = make(prepared, "bert")
    tokens, hidden = example(encoder)
    fed = encoder.inputs(tokens, hidden)["input_ids"]
    native = load_tokenizer(prepared("bert").path).mask_id
    assert (fed[hidden] == native).all() and torch.equal(fed[~hidden], tokens[~hidden])
    assert encoder.mask_id == native


def test_gpt2_sees_zero_embeddings(prepared):
    encoder = make(prepared, "gpt2")
    tokens, hidden = example(encoder)
    fed = encoder.inputs(tokens, hidden)["inputs_embeds"]
    assert not fed[hidden].any() and fed[~hidden].any(-1).all()
    assert encoder.mask_id == encoder.network.get_input_embeddings().num_embeddings, "the mask was appended"


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprint_is_that_of_the_encoder(prepared, kind, tmp_path):
    encoder = make(prepared, kind)
    assert encoder.fingerprint == make(prepared, kind).fingerprint
    others = {make(prepared, kind, latent_dim=D - 1).fingerprint, make(prepared, kind, variance_floor=1e-3).fingerprint}
    if kind not in ("table", "random"):
        others.add(make(prepared, kind, layer=1).fingerprint)
        others.add(make(prepared, kind, path=str(save_encoder(tmp_path, kind, seed=1))).fingerprint)
        assert len(others) == 4
    assert encoder.fingerprint not in others


def test_encoder_is_no_part_of_the_model(prepared):
    class Objective(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = make(prepared, "bert")

    objective = Objective()
    assert not objective.state_dict() and not list(objective.parameters())
    assert not any(parameter.requires_grad for parameter in objective.encoder.network.parameters())
    assert not objective.encoder.network.training


def test_random_table_is_a_function_of_the_key():
    config = EncoderConfig(kind="random", latent_dim=D)
    tables = [
        build_encoder(config, corpus_folder="nowhere", vocab_size=99, mask_id=98, key=key).table for key in (1, 1, 2)
    ]
    assert torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])
    assert tables[0].shape == (99, D)


def test_tokens_that_never_occur_get_rows_too(prepared):
    encoder = make(prepared, "table")
    assert isinstance(encoder, TableEncoder)
    tokens = torch.arange(encoder.mask_id)[None]
    z = encoder.encode(tokens, torch.zeros_like(tokens, dtype=torch.bool))
    torch.testing.assert_close(z.square().sum(-1), torch.full_like(z[..., 0], D), rtol=1e-3, atol=0)


def test_standardise_keeps_a_constant_at_zero():
    assert torch.equal(standardise(torch.full((2, 4), 3.0), 1e-6), torch.zeros(2, 4))


# What does not fit is refused, with what to change.


def test_unknown_kind():
    with pytest.raises(ConfigError, match="Unknown encoder"):
        build_encoder(EncoderConfig(kind="bert"), corpus_folder="x", vocab_size=9, mask_id=8, key=0)


def test_transformers_missing(prepared, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"needs transformers[\s\S]*braid-lm\[hf\]"):
        make(prepared, "bert")


@pytest.mark.parametrize("content", [None, "{}", "not json"])
def test_folder_that_holds_no_encoder(prepared, tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(InputError, match="cannot be loaded"):
        make(prepared, "bert", path=str(tmp_path))


def test_no_path(prepared):
    with pytest.raises(ConfigError, match="No encoder is named"):
        make(prepared, "bert", path="")


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_ranges(prepared, kind):
    for layer in (4, -5):
        with pytest.raises(ConfigError, match="no such layer"):
            make(prepared, kind, layer=layer)
    with pytest.raises(ConfigError, match="narrower than the latents"):
        make(prepared, kind, latent_dim=33)


@pytest.mark.parametrize("kind", ["gpt2", "bert", "roberta"])
def test_longest_sequence(prepared, kind):
    encoder = make(prepared, kind)
    tokens = torch.full((1, 65), 7)
    hidden = torch.zeros_like(tokens, dtype=torch.bool)
    assert encoder.encode(tokens[:, :64], hidden[:, :64]).shape == (1, 64, D)
    with pytest.raises(ConfigError, match="longer than the encoder can read"):
        encoder.encode(tokens, hidden)


def test_other_ids(prepared, tmp_path):
    swapped = save_encoder(tmp_path, "gpt2", words=["a", "the", *WORDS[2:]])
    with pytest.raises(InputError, match=r"2 of \d+ tokens have other ids, first 'the': 3 in the corpus, 4"):
        make(prepared, "gpt2", path=str(swapped))


def test_smaller_vocabulary(prepared, tmp_path):
    smaller = save_encoder(tmp_path, "gpt2", words=WORDS[:-1])
    with pytest.raises(InputError, match=r"1 of \d+ tokens have other ids, first 'home': \d+ in the corpus, absent"):
        make(prepared, "gpt2", path=str(smaller))


def test_fewer_embeddings_than_tokens(prepared, tmp_path):
    with pytest.raises(InputError, match="the encoder embeds"):
        make(prepared, "gpt2", path=str(save_encoder(tmp_path, "gpt2", extra_rows=-2)))


def test_padded_embedding_table_is_fine(prepared, tmp_path):
    assert make(prepared, "gpt2", path=str(save_encoder(tmp_path, "gpt2", extra_rows=5))).latent_dim == D


def test_same_vocabulary_split_otherwise(prepared, tmp_path):
    folder = save_encoder(tmp_path, "gpt2")
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(InputError, match="in the corpus, .* in the encoder"):
        make(prepared, "gpt2", path=str(folder))


def test_corpus_of_another_tokenizer(prepared, prepare_documents, tmp_path):
    corpus = prepare_documents(tmp_path / "corpus", ["the cat sat", "on the mat"])
    bert = prepared("bert")
    with pytest.raises(InputError, match="not the corpus's"):
        build_encoder(bert.config, corpus_folder=corpus, vocab_size=259, mask_id=258, key=0)
