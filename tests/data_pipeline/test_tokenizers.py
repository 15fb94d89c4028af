from __future__ import annotations

import gzip
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf

from braid.data_pipeline.tokenizers import Tokenizer, load_tokenizer, train_bpe
from braid.kernels.errors import InputError

SHARED = Path(__file__).parents[3] / "shared" / "data" / "tokenizers"
ODD = (
    "Ünï 𝔘𝔫𝔦 \x00\x7f\x80 \ufeff \u200d👩‍👩‍👧‍👦 \r\n\n\n\t  spaces   é e\u0301 ﬁ \u2028\u00a0 \U0010ffff "
    "العربية 中文字 1234567 don't   "
)
QUOTED = "a <|endoftext|> b</s><s> c <pad>[PAD] [MASK]<mask><|mask|> [CLS] [SEP] <extra_id_0> <|endoftext_R9VQqF0Ag7|>"


def assert_text_is_kept_apart_from_special_ids(tokenizer):
    special = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id}
    for text in (QUOTED, *QUOTED.split(" ")):
        ids = tokenizer.encode_batch([text])[0]
        assert ids.dtype == tokenizer.dtype and len(ids) > 0
        assert not special & set(ids.tolist()), text
        assert ids.max() < tokenizer.vocab_size


def byte_level_file(folder: Path, *, added=("<|endoftext|>",), special=True, **changes) -> Path:
    """A small byte-level BPE without a mask token, written as tokenizer.json."""
    backend = hf.Tokenizer(hf.models.BPE())
    backend.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = hf.decoders.ByteLevel()
    alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        ["the cat and the hat and the bat"] * 9,
        hf.trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False),
    )
    tokens = [hf.AddedToken(name, special=special, normalized=False) for name in added]
    (backend.add_special_tokens if special else backend.add_tokens)(tokens)
    folder.mkdir(parents=True, exist_ok=True)
    definition = json.loads(backend.to_str()) | changes
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    return folder / "tokenizer.json"


# --- bytes ---


def test_bytes_are_the_ids():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.vocab_size == 259 and tokenizer.dtype == np.uint16
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id) == (256, 256, 257, 258)
    for text, ids in zip([ODD, "", QUOTED], tokenizer.encode_batch([ODD, "", QUOTED]), strict=True):
        assert ids.tolist() == list(text.encode())
        assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes.tolist() == [1] * 256 + [0] * 3


def test_bytes_without_the_short_cut_are_the_same(tmp_path):
    # The saved file is a complete tokenizer: the library itself must give these ids, not only the short cut.
    load_tokenizer("bytes").save(tmp_path)
    library = hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert library.encode(ODD).ids == list(ODD.encode())
    assert library.token_to_id("<|mask|>") == 258


def test_text8_has_an_id_for_each_of_its_27_symbols_and_refuses_others(tmp_path):
    tokenizer = load_tokenizer("text8")
    assert (tokenizer.vocab_size, tokenizer.mask_id) == (30, 29) and tokenizer.is_special.sum() == 3
    text = " anarchism  originated as a term of abuse zxqjv"
    ids = tokenizer.encode_batch([text, ""])
    assert ids[0].tolist() == ["abcdefghijklmnopqrstuvwxyz".find(c) + 1 for c in text] and len(ids[1]) == 0
    assert tokenizer.decode(ids[0]) == text and tokenizer.token_bytes.tolist() == [1] * 27 + [0] * 3
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).encode_batch([text])[0].tolist() == ids[0].tolist()
    assert hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids == ids[0].tolist()
    for bad, found in (("the Cat", "'C', the first after 'the '"), ("a\nb", r"'\n'")):
        with pytest.raises(InputError) as caught:
            load_tokenizer(tmp_path).encode_batch([text, bad])
        assert found in str(caught.value)


def test_decode_drops_special_ids_and_survives_broken_utf8():
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.decode([256, 104, 258, 105, 257, 256]) == "hi"
    assert tokenizer.decode(np.array([104, 0xE2, 0x82, 105])) == "h\ufffdi"


# --- training ---


def texts_to_learn_from() -> list[str]:
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdeé語 \n"), rng.integers(1, 9))) for _ in range(400)]
    return [" ".join(rng.choice(words, 200)) for _ in range(20)]


def test_trained_bpe_has_the_size_asked_for_and_loses_nothing():
    texts = texts_to_learn_from()
    tokenizer = train_bpe(texts, 512)
    assert tokenizer.vocab_size == 512 and tokenizer.bos_id == tokenizer.eos_id
    assert len({tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id}) == 3
    for text, ids in zip([*texts, ODD], tokenizer.encode_batch([*texts, ODD]), strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert sum(map(len, tokenizer.encode_batch(texts))) < 0.6 * sum(len(text.encode()) for text in texts)
    assert_text_is_kept_apart_from_special_ids(tokenizer)


def test_training_twice_in_different_processes_gives_the_same_tokenizer(tmp_path):
    (tmp_path / "texts.json").write_text(json.dumps(texts_to_learn_from()))
    program = (
        "import json, sys; from braid.data_pipeline.tokenizers import train_bpe;"
        "t = train_bpe(json.load(open(sys.argv[1])), 700); t.save(sys.argv[2]); print(t.hash)"
    )
    hashes = set()
    for number, threads in enumerate(("false", "true", "true")):
        command = [sys.executable, "-c", program, str(tmp_path / "texts.json"), str(tmp_path / str(number))]
        environment = os.environ | {"TOKENIZERS_PARALLELISM": threads, "PYTHONHASHSEED": str(number)}
        hashes.add(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert len(hashes) == 1
    assert len({(tmp_path / str(number) / "tokenizer.json").read_bytes() for number in range(3)}) == 1


def test_vocabulary_too_small_for_all_bytes():
    with pytest.raises(InputError, match="too small for a byte-level BPE") as caught:
        train_bpe(["text"], 258)
    assert "259" in caught.value.change


def test_short_text_gives_a_smaller_vocabulary():
    assert train_bpe(["ab"], 1000).vocab_size == 259


# --- saving, hashing, pickling ---


def test_saved_and_pickled_tokenizers_are_equal(tmp_path):
    tokenizer = load_tokenizer(byte_level_file(tmp_path / "given"))
    tokenizer.save(tmp_path / "saved")
    for other in (load_tokenizer(tmp_path / "saved"), pickle.loads(pickle.dumps(tokenizer))):
        assert other.hash == tokenizer.hash and other.vocab_size == tokenizer.vocab_size
        assert other.mask_id == tokenizer.mask_id and (other.token_bytes == tokenizer.token_bytes).all()
        for text in (ODD, QUOTED):  # the switch that keeps special ids out of text must survive as well
            assert (other.encode_batch([text])[0] == tokenizer.encode_batch([text])[0]).all()


def test_hash_tells_content_and_special_ids_apart(tmp_path):
    first = load_tokenizer(byte_level_file(tmp_path / "a", added=("<|endoftext|>", "<|pad|>")))
    same = load_tokenizer(byte_level_file(tmp_path / "b", added=("<|endoftext|>", "<|pad|>")))
    other_content = load_tokenizer(byte_level_file(tmp_path / "c", added=("<|endoftext|>", "<|padding|>")))
    path = byte_level_file(tmp_path / "d", added=("<|endoftext|>", "<|pad|>"))
    (path.parent / "tokenizer_config.json").write_text('{"eos_token": "<|pad|>"}')
    other_roles = load_tokenizer(path)
    assert first.hash == same.hash
    assert len({first.hash, other_content.hash, other_roles.hash}) == 3


# --- special ids ---


def test_mask_is_appended_where_there_is_none(tmp_path):
    tokenizer = load_tokenizer(byte_level_file(tmp_path))
    assert tokenizer.mask_id == tokenizer.vocab_size - 1
    assert tokenizer.eos_id == tokenizer.bos_id == tokenizer.pad_id == tokenizer.vocab_size - 2
    assert tokenizer.decode([tokenizer.mask_id, tokenizer.eos_id]) == ""


def test_mask_is_appended_after_the_largest_id_where_ids_have_gaps(tmp_path):
    path = byte_level_file(tmp_path)
    definition = json.loads(path.read_text())
    definition["model"]["vocab"] = {token: 3 * i for token, i in definition["model"]["vocab"].items()}
    definition["added_tokens"][0]["id"] = 1
    path.write_text(json.dumps(definition))
    tokenizer = load_tokenizer(path)
    assert tokenizer.mask_id == max(definition["model"]["vocab"].values()) + 1 == tokenizer.vocab_size - 1
    assert tokenizer.token_bytes[tokenizer.encode_batch([ODD])[0]].sum() == len(ODD.encode())


@pytest.mark.parametrize("as_table", [False, True])
def test_roles_are_read_from_the_configuration(tmp_path, as_table):
    path = byte_level_file(tmp_path, added=("<one>", "<two>", "<three>", "<four>"))
    names = {"bos_token": "<one>", "eos_token": "<two>", "pad_token": "<three>", "mask_token": "<four>"}
    entries = {key: {"content": name, "special": True} if as_table else name for key, name in names.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(entries))
    tokenizer = load_tokenizer(path)
    ids = [hf.Tokenizer.from_file(str(path)).token_to_id(name) for name in names.values()]
    assert [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id] == ids
    assert tokenizer.vocab_size == max(ids) + 1


def test_control_tokens_listed_as_ordinary_ones_are_kept_out_of_text(tmp_path):
    path = byte_level_file(tmp_path, added=("<stop>", "<hole>", "<word>"), special=False)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<stop>", "mask_token": "<hole>"}')
    tokenizer = load_tokenizer(path)
    text = "a<stop>b<hole>c<word>d"
    ids = tokenizer.encode_batch([text])[0]
    assert not {tokenizer.eos_id, tokenizer.mask_id} & set(ids.tolist())
    assert hf.Tokenizer.from_file(str(path)).token_to_id("<word>") in ids  # an added token that means nothing special
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text)


def test_a_piece_that_spells_a_special_token_is_spelt_out():
    # A Unigram model holds its special tokens as pieces and finds them in text by itself.
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((character, -2.0) for character in "</s>ab ")]
    backend = hf.Tokenizer(hf.models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.add_special_tokens(["<unk>", "</s>"])
    backend.encode_special_tokens = True
    assert 1 in backend.encode("a</s>b").ids  # the trap is there
    special = {"bos": 1, "eos": 1, "pad": 1, "mask": 9}
    tokenizer = Tokenizer(json.loads(backend.to_str()), special)
    ids = tokenizer.encode_batch(["a</s>b"])[0]
    assert tokenizer.decode(ids).replace(" ", "") == "a</s>b"
    assert 1 not in ids and [backend.id_to_token(i) for i in ids] == list("a</s>b")


def test_truncation_padding_and_dropout_of_the_file_are_off(tmp_path):
    path = byte_level_file(tmp_path)
    definition = json.loads(path.read_text())
    definition["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    definition["padding"] = {
        "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "!",
    }  # fmt: skip
    definition["model"]["dropout"] = 0.5
    path.write_text(json.dumps(definition))
    tokenizer = load_tokenizer(path)
    text = "the cat and the hat " * 20
    ids = [tokenizer.encode_batch([text])[0].tolist() for _ in range(3)]
    assert ids[0] == ids[1] == ids[2] and tokenizer.decode(ids[0]) == text
    assert len(tokenizer.encode_batch(["a"])[0]) == 1


# --- exact bytes ---


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": "\\s"}, "behavior": "Removed", "invert": False},
                    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
                ],
            }
        },
        {"pre_tokenizer": {"type": "Whitespace"}},
    ],
    ids=["normalises", "adds a space", "removes white space", "not byte-level"],
)
def test_no_byte_counts_where_they_would_not_be_exact(tmp_path, changes):
    assert load_tokenizer(byte_level_file(tmp_path / "exact")).token_bytes is not None
    assert load_tokenizer(byte_level_file(tmp_path / "changed", **changes)).token_bytes is None


# --- folders of other libraries ---


def test_gpt2_files(tmp_path):
    reference = load_tokenizer(byte_level_file(tmp_path / "json"))
    definition = json.loads((tmp_path / "json" / "tokenizer.json").read_text())
    folder = tmp_path / "gpt2"
    folder.mkdir()
    vocabulary = definition["model"]["vocab"] | {"<|endoftext|>": reference.eos_id}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = [" ".join(pair) for pair in definition["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_id, tokenizer.mask_id) == (reference.eos_id, reference.mask_id)
    for text in (ODD, QUOTED, "the cat and the hat"):
        assert (tokenizer.encode_batch([text])[0] == reference.encode_batch([text])[0]).all()
    assert (tokenizer.token_bytes == reference.token_bytes).all()


@pytest.mark.parametrize("lowercase", [True, False])
def test_bert_files(tmp_path, lowercase):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "mask", "MASK", "[", "]", "un", "##aff", "Un", "a", "b", "c"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lowercase}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id) == (2, 3, 0, 4)
    assert tokenizer.vocab_size == len(words) and tokenizer.token_bytes is None
    ids = tokenizer.encode_batch(["Unaff [MASK] zzz"])[0].tolist()
    assert [words[i] for i in ids] == (
        ["un", "##aff", "[", "mask", "]", "[UNK]"] if lowercase else ["Un", "##aff", "[", "MASK", "]", "[UNK]"]
    )


# --- errors ---


def test_errors_name_the_place_and_the_way_out(tmp_path):
    def error(source) -> str:
        with pytest.raises(InputError) as caught:
            load_tokenizer(source)
        return str(caught.value)

    assert "gpt2" in error("gpt2") and "not fetched" in error("gpt2")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no tokenizer" in error(empty) and "empty folder" in error(empty)
    (empty / "spiece.model").write_bytes(b"x")
    assert "SentencePiece model only" in error(empty) and "save_pretrained" in error(empty)
    (tmp_path / "broken.json").write_text("{")
    assert "broken.json is not JSON" in error(tmp_path / "broken.json")
    (tmp_path / "other.json").write_text('{"a": 1}')
    assert "no `model`" in error(tmp_path / "other.json")
    (tmp_path / "strange.json").write_text('{"model": {"type": "Nonsense", "vocab": {"</s>": 0}}, "added_tokens": []}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert "strange.json cannot be used" in error(tmp_path / "strange.json")
    none = byte_level_file(tmp_path / "none", added=())
    assert "no token that can end a document" in error(none) and "tokenizer_config.json" in error(none)
    (none.parent / "tokenizer_config.json").write_text("not json")
    assert "tokenizer_config.json is not JSON" in error(none)


# --- published tokenizers ---

PUBLISHED = {
    # name: (vocabulary with the mask, BOS, EOS, pad, mask, are byte counts exact?)
    "gpt2": (50258, 50256, 50256, 50256, 50257, True),
    "bert_base_uncased": (30522, 101, 102, 0, 103, False),
    "t5_v1_1": (32101, 1, 1, 0, 32100, False),
    "gpt_neox_20b": (50278, 0, 0, 1, 50277, False),
    "olmo_dolma2": (100279, 100257, 100257, 100277, 100278, True),
    "plaid_owt2_32k": (32769, 0, 0, 0, 32768, True),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_tokenizers(name, tmp_path):
    if not (SHARED / name).is_dir():
        pytest.skip("the published tokenizers are not on this machine")
    for path in (SHARED / name).iterdir():
        if path.suffix == ".gz":
            (tmp_path / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
        else:
            shutil.copy(path, tmp_path)
    vocab_size, bos, eos, pad, mask, exact = PUBLISHED[name]
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == vocab_size
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id) == (bos, eos, pad, mask)
    assert tokenizer.dtype == (np.uint32 if vocab_size > 65536 else np.uint16)
    assert_text_is_kept_apart_from_special_ids(tokenizer)
    assert (tokenizer.token_bytes is not None) == exact
    if exact:
        ids = tokenizer.encode_batch([ODD])[0]
        assert tokenizer.token_bytes[ids].sum() == len(ODD.encode()) and tokenizer.decode(ids) == ODD
    plain = "plain words, nothing else. " * 100
    assert tokenizer.decode(tokenizer.encode_batch([plain])[0]).split() == plain.split()
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").hash == tokenizer.hash


def test_no_torch():
    program = "import sys, braid.data_pipeline.prepare; print('torch' in sys.modules, 'pyarrow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"]
