"""Tokenizers: text <-> ids. One class over the Hugging Face `tokenizers` library, whatever the tokenizer came from.

Two promises that raw tokenizer files do not make:

- Text never becomes a special id. Diffusion gives the mask id a meaning, packing gives BOS and EOS one; a page that
  quotes "[MASK]" or "</s>" is encoded as the ordinary characters it consists of.
- There is always a mask id. A tokenizer without a mask token gets one appended after its last id.

No torch here: preparing a corpus needs none.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers as hf
import xxhash

from braid.kernels.errors import InputError

ROLES = ("bos", "eos", "pad", "mask")
"""The special ids every tokenizer here has. Several roles may share one id (GPT-2: BOS is EOS)."""

CONFIGURED = {
    "bos": ("bos_token", "cls_token"),
    "eos": ("eos_token", "sep_token"),
    "pad": ("pad_token",),
    "mask": ("mask_token",),
}
"""Keys of tokenizer_config.json and special_tokens_map.json that name each role, best first."""

WELL_KNOWN = {
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[CLS]"),
    "eos": ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "[SEP]"),
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|endofpad|>"),
    "mask": ("<|mask|>", "[MASK]", "<mask>", "<|mdm_mask|>"),
}
"""Names taken for each role when no file says; they count only where they are special tokens."""

UNKNOWN = ("<unk>", "[UNK]", "<|unk|>")
OWN_FILE = "braid_tokenizer.json"
END, PAD, MASK = "<|endoftext|>", "<|pad|>", "<|mask|>"
"""Special tokens of the tokenizers made here; END serves as BOS and EOS."""
TEXT8 = {letter: i for i, letter in enumerate(" abcdefghijklmnopqrstuvwxyz")}
"""The 27 symbols of the benchmark text8, which scores bits per character."""


class Tokenizer:
    """Text to ids and back.

    `vocab_size` counts every id a model may meet, the mask included, so ids lie in [0, vocab_size). `bos_id`, `eos_id`,
    `pad_id` and `mask_id` are below it; `dtype` (uint16 up to 65,536 ids, else uint32) holds them all. `hash` is equal
    for two tokenizers exactly when their definition and special ids are.
    """

    def __init__(self, definition: dict, special: dict[str, int], origin: str | Path = "the tokenizer") -> None:
        """`definition`: the content of a tokenizer.json; `special`: an id for each of ROLES; `origin`: for errors."""
        self._definition, self._special = definition, special
        self._backend = _backend(definition, origin)
        # Not part of the definition: a switch of the library that treats special tokens met in text as text.
        self._backend.encode_special_tokens = True
        self.bos_id, self.eos_id, self.pad_id, self.mask_id = (special[role] for role in ROLES)
        self._size = max(_vocabulary(definition).values()) + 1  # ids may have gaps
        self.vocab_size = max(self._size, self.mask_id + 1)
        self.dtype = np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)
        canonical = json.dumps([definition, special], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        self.hash = xxhash.xxh3_128_hexdigest(canonical.encode("utf-8", "surrogatepass"))

        marked = {entry["id"] for entry in _added(definition) if entry["special"] and not _is_unknown(entry["content"])}
        self._dropped = frozenset(marked | set(special.values()))
        self._forbidden = np.zeros(self.vocab_size, dtype=bool)
        self._forbidden[list(self._dropped)] = True
        self._is_bytes = definition["model"].get("vocab") == _byte_vocabulary()
        self._is_text8 = definition["model"].get("vocab") == TEXT8

    def __reduce__(self) -> tuple:
        return Tokenizer, (self._definition, self._special)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, one 1-D array of `dtype` per text, without BOS, EOS or any other special id. The tokenizer
        `text8` raises InputError for a text with other characters than its own."""
        if self._is_bytes:
            return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(self.dtype) for text in texts]
        if self._is_text8:  # the library would drop other characters without a word
            return [_text8_ids(text).astype(self.dtype) for text in texts]
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        rows = [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]
        return [self._spelt_out(ids) if self._forbidden[ids].any() else ids for ids in rows]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; special tokens are dropped, invalid UTF-8 becomes U+FFFD."""
        kept = [i for i in map(int, ids) if i not in self._dropped and i < self._size]
        return self._backend.decode(kept, skip_special_tokens=False)

    def _spelt_out(self, ids: np.ndarray) -> np.ndarray:
        """Replace special ids by the ids of their characters. Unigram models hold "</s>" as an ordinary piece, so they
        can produce its id from text although special tokens are switched off."""
        result: list[int] = []
        for i in ids.tolist():
            result.extend(self._spelling(i) if self._forbidden[i] else (i,))
        return np.array(result, dtype=self.dtype)

    def _spelling(self, special: int) -> Iterator[int]:
        for character in self._backend.id_to_token(special):
            found = self._backend.token_to_id(character)
            ids = [found] if found is not None else self._backend.encode(character, add_special_tokens=False).ids
            yield from (i for i in ids if not self._forbidden[i])

    @property
    def is_special(self) -> np.ndarray:
        """Which ids `encode_batch` never gives: bool [vocab_size]."""
        return self._forbidden

    @cached_property
    def token_bytes(self) -> np.ndarray | None:
        """UTF-8 bytes each id stands for, int32 [vocab_size], 0 for special ids; None when the sum over a text's ids
        would not be exactly the bytes of the text: the tokenizer normalises, adds spaces or is not byte-level."""
        if self._is_text8:
            return (~self._forbidden).astype(np.int32)
        if not _keeps_every_byte(self._definition):
            return None
        sizes = np.zeros(self.vocab_size, dtype=np.int32)
        for token, i in self._definition["model"]["vocab"].items():
            sizes[i] = len(token)  # the byte-level alphabet writes one character per byte
        for entry in _added(self._definition):
            sizes[entry["id"]] = len(entry["content"].encode("utf-8"))
        sizes[list(self._dropped)] = 0
        # A pre-tokenizer may still drop characters by a regular expression; only trying tells.
        probe = _probe()
        return sizes if int(sizes[self.encode_batch([probe])[0]].sum()) == len(probe.encode("utf-8")) else None

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json (usable by the Hugging Face libraries) and the special ids; `load_tokenizer` reads it
        back to an equal tokenizer."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "tokenizer.json", self._definition)
        _write_json(folder / OWN_FILE, {"version": 1, "vocab_size": self.vocab_size, **self._special})


def load_tokenizer(source: str | Path) -> Tokenizer:
    """`bytes`; `text8` (a to z and the space); a tokenizer.json file; a Hugging Face tokenizer folder (tokenizer.json,
    or vocab.json and merges.txt, or vocab.txt); or a folder written by `Tokenizer.save`.

    Raises InputError when there is none or it cannot serve: broken, or without any token to end a document with.
    """
    if str(source) == "bytes":
        return _byte_tokenizer()
    if str(source) == "text8":
        return _text8_tokenizer()
    path = Path(source)
    if not path.exists():
        raise InputError(
            f"there is no tokenizer {source}",
            change="give `bytes`, `text8`, a tokenizer.json file or a local folder with one; names on the Hugging Face "
            "hub are not fetched: download first (`hf download NAME --include 'tokenizer*' --local-dir FOLDER`)",
        )
    folder = path if path.is_dir() else path.parent
    if path.is_file() or (path / "tokenizer.json").is_file():
        definition = _read_definition(path if path.is_file() else path / "tokenizer.json")
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        definition = _gpt2_definition(folder)
    elif (folder / "vocab.txt").is_file():
        definition = _bert_definition(folder)
    else:
        raise _nothing_readable(folder)
    definition = {**definition, "truncation": None, "padding": None}
    if definition["model"].get("dropout") is not None:  # merges left out at random: not repeatable
        definition["model"] = {**definition["model"], "dropout": None}
    special = _special_ids(definition, folder)
    return Tokenizer(_mark_special(definition, special), special, path)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE learnt from `texts`, the same for the same texts. `vocab_size` counts all ids: 256 bytes, three
    special tokens, merges. Short texts may not have enough repeated pairs to reach it; see the result's `vocab_size`.
    """
    check_bpe_size(vocab_size)
    backend = hf.Tokenizer(hf.models.BPE())
    backend.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = hf.decoders.ByteLevel()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD, MASK],
        initial_alphabet=sorted(hf.pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _own_tokenizer(backend)


def check_bpe_size(vocab_size: int) -> None:
    """Raise InputError for a vocabulary that cannot hold all bytes and the special tokens."""
    smallest = 256 + 3
    if vocab_size < smallest:
        raise InputError(
            "the vocabulary is too small for a byte-level BPE",
            found=f"{vocab_size} ids",
            change=f"use at least {smallest}: 256 bytes and 3 special tokens; or the tokenizer `bytes`",
        )


def _byte_tokenizer() -> Tokenizer:
    """Id b is byte b; the special tokens follow."""
    backend = hf.Tokenizer(hf.models.BPE(vocab=_byte_vocabulary(), merges=[]))
    backend.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = hf.decoders.ByteLevel()
    backend.add_special_tokens([END, PAD, MASK])
    return _own_tokenizer(backend)


def _text8_tokenizer() -> Tokenizer:
    """An id for each of the 27 symbols; the special tokens follow."""
    backend = hf.Tokenizer(hf.models.BPE(vocab=TEXT8, merges=[]))
    backend.decoder = hf.decoders.Fuse()
    backend.add_special_tokens([END, PAD, MASK])
    return _own_tokenizer(backend)


def _text8_ids(text: str) -> np.ndarray:
    """uint8 [number of characters]; InputError where one has no id."""
    data = np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
    is_letter = (data >= ord("a")) & (data <= ord("z"))
    if not (is_letter | (data == ord(" "))).all():
        others = sorted(set(text) - TEXT8.keys())
        where = min(map(text.index, others))
        raise InputError(
            "the text has characters that the tokenizer `text8` has no ids for",
            found=f"{''.join(others[:10])!r}, the first after {text[max(0, where - 20) : where]!r}",
            change="give text8 itself, text in its form (a to z and single spaces), or --tokenizer bytes",
        )
    return np.where(is_letter, data - (ord("a") - 1), 0)


def _own_tokenizer(backend: hf.Tokenizer) -> Tokenizer:
    names = {"bos": END, "eos": END, "pad": PAD, "mask": MASK}
    return Tokenizer(json.loads(backend.to_str()), {role: backend.token_to_id(names[role]) for role in ROLES})


def _byte_vocabulary() -> dict[str, int]:
    """The byte-level alphabet in byte order. Printable Latin-1 bytes are written as themselves, the others, in order,
    as the characters from U+0100 on."""
    alphabet = set(hf.pre_tokenizers.ByteLevel.alphabet())
    shifted = iter(sorted(character for character in alphabet if ord(character) > 255))
    return {(chr(byte) if chr(byte) in alphabet else next(shifted)): byte for byte in range(256)}


def _backend(definition: dict, origin: str | Path) -> hf.Tokenizer:
    try:
        return hf.Tokenizer.from_str(json.dumps(definition))
    except Exception as error:  # the library raises nothing narrower
        found = f"{error} (tokenizers {hf.__version__})"
        raise InputError(f"{origin} cannot be used", found=found, change="a newer `tokenizers` may read it") from error


def _read_definition(path: Path) -> dict:
    change = "give a tokenizer.json as written by the Hugging Face `tokenizers` library (decompress a .gz first)"
    definition = _read_json(path, change)
    model = definition.get("model") if isinstance(definition, dict) else None
    if not isinstance(model, dict) or not model.get("vocab"):
        raise InputError(f"{path} is not a tokenizer.json", found="no `model` with a `vocab` in it", change=change)
    return definition


def _gpt2_definition(folder: Path) -> dict:
    """vocab.json and merges.txt: byte-level BPE (GPT-2, RoBERTa)."""
    vocabulary, merges = hf.models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    if not _byte_vocabulary().keys() <= vocabulary.keys() or any(token.endswith("</w>") for token in vocabulary):
        raise InputError(
            f"{folder} holds a BPE that is not byte-level in the manner of GPT-2",
            change="let its own library write a tokenizer.json: AutoTokenizer.from_pretrained(..).save_pretrained(..)",
        )
    backend = hf.Tokenizer(hf.models.BPE(vocab=vocabulary, merges=merges))
    spaced = bool(_configuration(folder).get("add_prefix_space", False))
    backend.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=spaced)
    backend.decoder = hf.decoders.ByteLevel()
    # What a merge makes is text, even when it looks like a special token.
    made = {left + right for left, right in merges}
    backend.add_special_tokens([name for name in _candidates(folder) if name in vocabulary and name not in made])
    return json.loads(backend.to_str())


def _bert_definition(folder: Path) -> dict:
    """vocab.txt: WordPiece with BERT's normaliser, lowercasing unless tokenizer_config.json says otherwise."""
    vocabulary = hf.models.WordPiece.read_file(str(folder / "vocab.txt"))
    unknown = next((name for name in UNKNOWN if name in vocabulary), None)
    if unknown is None:
        change = "WordPiece needs a token for unknown words"
        raise InputError(f"{folder / 'vocab.txt'} has no [UNK]", found=f"{len(vocabulary)} tokens", change=change)
    settings = _configuration(folder)
    backend = hf.Tokenizer(hf.models.WordPiece(vocab=vocabulary, unk_token=unknown))
    backend.normalizer = hf.normalizers.BertNormalizer(
        lowercase=bool(settings.get("do_lower_case", True)),
        strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=bool(settings.get("tokenize_chinese_chars", True)),
    )
    backend.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
    backend.decoder = hf.decoders.WordPiece()
    backend.add_special_tokens([name for name in _candidates(folder) if name in vocabulary])
    return json.loads(backend.to_str())


def _nothing_readable(folder: Path) -> InputError:
    models = [path.name for name in ("spiece.model", "*.model") for path in sorted(folder.glob(name))]
    if models:
        return InputError(
            f"{folder} holds a SentencePiece model only",
            found=models[0],
            change="convert it once, where `transformers` and `sentencepiece` are installed: "
            f"AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}') writes the tokenizer.json",
        )
    return InputError(
        f"{folder} holds no tokenizer",
        found=", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "an empty folder",
        change="it should hold tokenizer.json, or vocab.json and merges.txt, or vocab.txt (decompress a .gz first)",
    )


def _configuration(folder: Path) -> dict:
    """tokenizer_config.json over special_tokens_map.json; empty where neither exists."""
    merged: dict = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            content = _read_json(folder / name, "repair or remove it")
            merged.update({key: value for key, value in content.items() if value is not None})
    return merged


def _configured_names(folder: Path, role: str) -> list[str]:
    """Token texts the folder's files give for a role; an entry is a text or a table with its `content`."""
    entries = [_configuration(folder).get(key) for key in CONFIGURED[role]]
    return [entry["content"] if isinstance(entry, dict) else entry for entry in entries if entry]


def _candidates(folder: Path) -> list[str]:
    """Every text that would be a special token if it is in the vocabulary, without repeats."""
    names = [name for role in ROLES for name in (*_configured_names(folder, role), *WELL_KNOWN[role])]
    return list(dict.fromkeys([*names, *UNKNOWN]))


def _special_ids(definition: dict, folder: Path) -> dict[str, int]:
    """An id for each role: what Braid wrote, else what the folder's files name, else well-known names, else one role
    serves another, and the mask is appended."""
    own = folder / OWN_FILE
    if own.is_file():
        stored = _read_json(own, "copy the tokenizer's folder again")
        return {role: stored[role] for role in ROLES}
    vocabulary = _vocabulary(definition)
    marked = {entry["content"]: entry["id"] for entry in _added(definition) if entry["special"]}
    found: dict[str, int] = {}
    for role in ROLES:
        configured = (vocabulary.get(name) for name in _configured_names(folder, role))
        known = (marked.get(name) for name in WELL_KNOWN[role])
        found[role] = next((i for i in (*configured, *known) if i is not None), -1)
    if found["eos"] < 0:
        unclaimed = [i for name, i in marked.items() if i not in found.values() and not _is_unknown(name)]
        # A tokenizer with one special token uses it to part documents, whatever its name.
        found["eos"] = unclaimed[0] if len(unclaimed) == 1 else found["bos"]
    if found["eos"] < 0:
        raise InputError(
            "the tokenizer has no token that can end a document",
            found=f"special tokens: {', '.join(marked) or 'none'}",
            change='name one of its tokens in a tokenizer_config.json beside it: {"eos_token": "..."}',
        )
    found["bos"] = found["bos"] if found["bos"] >= 0 else found["eos"]
    found["pad"] = found["pad"] if found["pad"] >= 0 else found["eos"]
    found["mask"] = found["mask"] if found["mask"] >= 0 else max(vocabulary.values()) + 1
    return found


def _mark_special(definition: dict, special: dict[str, int]) -> dict:
    """Flag the tokens of the special ids as special: some files list their control tokens as ordinary added ones,
    which text could then produce."""
    ids = set(special.values())
    added = [{**entry, "special": entry["special"] or entry["id"] in ids} for entry in _added(definition)]
    return {**definition, "added_tokens": added}


def _keeps_every_byte(definition: dict) -> bool:
    """True when encoding maps every byte of a text to exactly one token, as far as the definition shows."""
    splitter = definition.get("pre_tokenizer") or {}
    steps = splitter.get("pretokenizers", [splitter])
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    return (
        definition["model"].get("type") == "BPE"
        and definition.get("normalizer") is None
        and len(byte_level) == 1
        and not byte_level[0]["add_prefix_space"]
        and all(step.get("type") in ("ByteLevel", "Split", "Digits", "Punctuation") for step in steps)
        and _byte_vocabulary().keys() <= definition["model"]["vocab"].keys()
        and not any(entry["lstrip"] or entry["rstrip"] for entry in _added(definition) if not entry["special"])
    )


def _probe() -> str:
    """Every character up to U+2FFF, a sample of the others, and runs of white space."""
    common = [chr(code) for code in range(0x3000)]
    rare = [chr(code) for code in range(0x3000, 0x110000, 97) if not 0xD800 <= code < 0xE000]
    return " \n\n\t  x ".join(["".join(common), "".join(rare), " ".join(common[:0x600])])


def _added(definition: dict) -> list[dict]:
    return definition.get("added_tokens") or []


def _vocabulary(definition: dict) -> dict[str, int]:
    """Ids of all tokens, added ones included. Unigram models list [piece, score], others map pieces to ids."""
    pieces = definition["model"]["vocab"]
    known = dict(pieces) if isinstance(pieces, dict) else {piece: i for i, (piece, _) in enumerate(pieces)}
    return known | {entry["content"]: entry["id"] for entry in _added(definition)}


def _is_unknown(token: str) -> bool:
    return token in UNKNOWN


def _read_json(path: Path, change: str) -> dict:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not JSON", found=str(error), change=change) from error


def _write_json(path: Path, content: dict) -> None:
    """Written through to the disk: a prepared corpus that was interrupted continues with this tokenizer."""
    with open(path, "wb") as file:
        file.write((json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode("utf-8", "surrogatepass"))
        file.flush()
        os.fsync(file.fileno())
