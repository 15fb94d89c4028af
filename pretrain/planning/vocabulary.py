"""How many ids the embedding and the head have, where the corpus that says so may be elsewhere. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from braid.data_pipeline.corpus import TOKENIZER_FOLDER, TokenCorpus
from braid.data_pipeline.remote import Fetching, is_url
from braid.data_pipeline.tokenizers import load_tokenizer
from braid.kernels.errors import BraidError, ConfigError
from braid.pretrain.config.schema import Config, DataConfig

VOCABULARIES = {
    "gpt2": 50_258,
    "bert": 30_522,
    "llama2": 32_001,
    "llama3": 128_257,
    "qwen3": 151_670,
    "t5": 32_101,
    "bytes": 259,
}
"""Ids of well-known tokenizers as `braid prepare` leaves them: a mask is appended where there is none."""


@dataclass(frozen=True)
class VocabularySize:
    """A number of ids, and who says so."""

    size: int
    source: str


def find_vocabulary(config: Config, given: str = "") -> VocabularySize:
    """`given` (a number, or a name of VOCABULARIES), else the prepared corpus's tokenizer, else a name of VOCABULARIES
    that is a word of its folder's name. ConfigError where none of them says."""
    names = ", ".join(VOCABULARIES)
    if given.isdecimal() and int(given) > 1:
        return VocabularySize(int(given), "as given")
    if given in VOCABULARIES:
        return VocabularySize(VOCABULARIES[given], f"{given}'s")
    if given:
        raise ConfigError(
            "--vocabulary is neither a size nor a tokenizer known here", found=given, change=f"a number, or {names}"
        )
    folder = config.data.folders[0]  # sources have one tokenizer
    try:
        if size := _size_in(folder, config.data):
            return VocabularySize(size, f"of {folder}")
        missing = f"no {Path(folder) / TOKENIZER_FOLDER}"
    except BraidError as error:  # a store that cannot be reached
        if not is_url(folder):
            raise
        missing = f"{error.what} ({error.found})"
    words = folder.replace("/", "-").split("-")
    for name, size in VOCABULARIES.items():
        if name in words:
            return VocabularySize(size, f"{name}'s, by the name of {folder}, which is not here")
    raise ConfigError(
        "the size of the vocabulary is not known: the prepared corpus is not here",
        found=missing,
        change=f"--vocabulary with a number, or {names}",
    )


def _size_in(folder: str, data: DataConfig) -> int | None:
    """What the corpus says, None where there is none."""
    if is_url(folder):
        fetching = Fetching(data.cache, data.cache_gb, data.retries, data.timeout_s)
        return TokenCorpus.open(folder, "train", fetching=fetching).tokenizer.vocab_size
    tokenizer = Path(folder) / TOKENIZER_FOLDER
    return load_tokenizer(tokenizer).vocab_size if tokenizer.is_dir() else None
