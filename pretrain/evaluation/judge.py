"""Judges: causal language models that say how likely a text is, for generative perplexity, and what it resembles.

A text is tokenised with the judge's own tokenizer and read after the judge's BOS, so its first token is scored too.
Scored are the tokens up to and including the first EOS, where the text has an end; a text without any token is empty:
skipped, and counted. A text longer than the judge may read is truncated (its EOS then goes with the rest), not cut into
windows, whose beginnings would be scored without their context.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from braid.data_pipeline.loader import Batch
from braid.kernels.errors import ConfigError, InputError
from braid.pretrain.checkpoint.snapshot import LoadedModel, load_model
from braid.pretrain.objectives.base import Noise
from braid.pretrain.training.precision import autocast

DEFAULT_LENGTH = 1024
"""Tokens of a text, BOS included, that published generative perplexities read (MDLM, Duo, ELF)."""

TOKENS_AT_A_TIME = 8192
"""Of a batch, padding included: a judge's logits of 50,000 entries take 1.6 GB for them."""


@dataclass(frozen=True)
class Judged:
    """What a judge says of n texts."""

    nats: np.ndarray
    """Negative log-likelihood of the scored tokens of each text, float64 [n]; 0 for an empty one."""
    num_tokens: np.ndarray
    """Scored tokens of each text, int64 [n]; 0 for an empty one."""
    ids: list[list[int]]
    """Tokens of each text as read (truncated), without BOS and EOS."""
    features: np.ndarray
    """The judge's last hidden state at the last token of each text that is not empty, float32 [n - empty, W]."""
    num_truncated: int

    @property
    def num_empty(self) -> int:
        return int((self.num_tokens == 0).sum())


class Judge:
    """A causal model with its tokenizer. Subclasses say how texts become ids and what the model makes of rows."""

    kind: str
    prefix: tuple[int, ...]
    """Ids in front of every text; never scored."""
    bos_id: int
    eos_id: int

    def __init__(self, path: str, device: torch.device, precision: str, max_length: int) -> None:
        self.path, self.device, self.precision, self.max_length = path, device, precision, max_length

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, nothing added."""
        raise NotImplementedError

    def read(self, tokens_BL: Tensor, scored_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Nats of the scored positions of each row, float64 [B], and the last hidden states [B, L, W]."""
        raise NotImplementedError

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: which judge, and the conventions its numbers depend on."""
        names = ("path", "kind", "precision", "max_length")
        return {name: getattr(self, name) for name in names}

    @torch.no_grad()
    def judge(
        self,
        texts: Sequence[str],
        ended: Sequence[bool],
        *,
        batch_size: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Judged:
        """Score `texts`; `ended` says whether an EOS follows a text. At most `batch_size` texts are read at a time; it
        changes nothing but rounding."""
        room = self.max_length - len(self.prefix)
        ids, scored, num_truncated = [], [], 0
        for text_ids, has_end in zip(self.encode(texts), ended, strict=True):
            text_ids, has_end = self._text(text_ids, has_end)
            whole = [*text_ids, self.eos_id] if has_end and text_ids else text_ids
            num_truncated += len(whole) > room
            ids.append(text_ids[:room])
            scored.append(whole[:room])
        num_tokens = np.array([len(row) for row in scored], dtype=np.int64)
        nats = np.zeros(len(scored))
        features: dict[int, np.ndarray] = {}
        kept = np.flatnonzero(num_tokens)
        kept = kept[np.argsort(num_tokens[kept], kind="stable")]  # rows of similar length need little padding
        start = 0
        while start < len(kept):
            chosen = kept[start : start + batch_size].tolist()
            while len(chosen) > 1 and len(chosen) * num_tokens[chosen[-1]] > TOKENS_AT_A_TIME:
                chosen.pop()
            nats_B, hidden_BLW = self.read(*self._rows([scored[i] for i in chosen]))
            nats[chosen] = nats_B.cpu().numpy()
            for i, hidden_LW in zip(chosen, hidden_BLW, strict=True):
                features[i] = hidden_LW[len(self.prefix) + len(ids[i]) - 1].float().cpu().numpy()
            start += len(chosen)
            progress(start, len(kept))
        stacked = np.stack([features[i] for i in sorted(features)]) if features else np.zeros((0, 0), np.float32)
        return Judged(nats, num_tokens, ids, stacked, num_truncated)

    def _text(self, ids: list[int], has_end: bool) -> tuple[list[int], bool]:
        """Texts written with their special tokens hold the judge's BOS and EOS as such: the text lies between."""
        if ids[:1] == [self.bos_id]:
            ids = ids[1:]
        if self.eos_id in ids:
            return ids[: ids.index(self.eos_id)], True
        return ids, has_end

    def _rows(self, scored: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Prefix and tokens, padded on the right, int64 [B, L]; and which positions are scored, bool [B, L]."""
        begin = len(self.prefix)
        tokens_BL = torch.full((len(scored), begin + max(map(len, scored))), self.eos_id)
        scored_BL = torch.zeros(tokens_BL.shape, dtype=torch.bool)
        for row, ids in enumerate(scored):
            tokens_BL[row, : begin + len(ids)] = torch.tensor([*self.prefix, *ids])
            scored_BL[row, begin : begin + len(ids)] = True
        return tokens_BL.to(self.device), scored_BL.to(self.device)


class HuggingFaceJudge(Judge):
    """Any causal language model of the transformers library."""

    kind = "huggingface"

    def __init__(self, network: nn.Module, tokenizer: Any, *args: Any) -> None:
        super().__init__(*args)
        self.network, self.tokenizer = network, tokenizer
        bos = tokenizer.bos_token_id
        self.bos_id, self.eos_id = tokenizer.eos_token_id if bos is None else bos, tokenizer.eos_token_id
        self.prefix = (self.bos_id,)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []

    def read(self, tokens_BL: Tensor, scored_BL: Tensor) -> tuple[Tensor, Tensor]:
        # Right padding is invisible to a causal model: every position that is used sees its own text alone.
        output = self.network(tokens_BL, attention_mask=torch.ones_like(tokens_BL), output_hidden_states=True)
        nats_B = [
            F.cross_entropy(logits_LV[:-1].float(), tokens_L[1:], reduction="none").double()[scored_L[1:]].sum()
            for logits_LV, tokens_L, scored_L in zip(output.logits, tokens_BL, scored_BL, strict=True)
        ]  # row by row: a float32 copy of all logits would double the memory
        return torch.stack(nats_B), output.hidden_states[-1]


class BraidJudge(Judge):
    """An autoregressive model trained here; its rows are those it was trained on, the BOS in front included."""

    kind = "braid"

    def __init__(self, model: LoadedModel, *args: Any) -> None:
        super().__init__(*args)
        self.model = model
        self.bos_id, self.eos_id = model.tokenizer.bos_id, model.tokenizer.eos_id
        begins = model.config.data.packing not in ("stream", "paragraph")
        self.prefix = (self.bos_id,) if begins else ()  # the model puts a BOS before it

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [ids.tolist() for ids in self.model.tokenizer.encode_batch(texts)]

    def read(self, tokens_BL: Tensor, scored_BL: Tensor) -> tuple[Tensor, Tensor]:
        objective, ordinals = self.model.objective, torch.arange(len(tokens_BL), device=self.device)
        noise = Noise.evaluation(0, ordinals, 0, 1)  # an exact likelihood draws nothing
        with autocast(self.precision, self.device):
            nats_B = objective.evaluate(Batch(tokens_BL, scored_BL, ordinals), noise)["nll"]
            return nats_B, objective.network.probe(tokens_BL)


def load_judge(path: str, device: torch.device, *, precision: str = "fp32", max_length: int | None = None) -> Judge:
    """The judge at `path`: a run directory or checkpoint of an AR model of Braid's, else a causal language model of the
    transformers library (a local folder with its tokenizer, or a hub name).

    precision: `fp32`, or `bf16` (weights and activations; autocast for Braid's own). max_length: tokens read of a text,
    BOS included; by default 1024, or what the judge was made for if that is less.

    Raises InputError for what cannot be loaded, ConfigError for a model that cannot judge or a length beyond its reach.
    """
    folder = Path(path)
    if (folder / "checkpoints").is_dir() or (folder / "manifest.json").is_file():
        model = load_model(folder, device)
        packing = model.config.data.packing
        if not model.objective.causal or packing == "pairs":
            raise ConfigError(
                "the judge must be an autoregressive model of text",
                found=f"{path} is {model.config.objective.name} on {packing} rows",
                change="give a run of objective.name=ar on ordinary text, or a Hugging Face causal language model",
            )
        length = _length(max_length, model.config.data.sequence_length, path)
        return BraidJudge(model, path, device, precision, length)

    network, tokenizer = _from_transformers(path)
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of the judge {path} has no EOS token", change="choose another judge")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    network = network.to(device=device, dtype=dtype).eval().requires_grad_(False)
    length = _length(max_length, getattr(network.config, "max_position_embeddings", None), path)
    return HuggingFaceJudge(network, tokenizer, path, device, precision, length)


def _length(asked: int | None, limit: int | None, path: str) -> int:
    if asked is not None and not 2 <= asked <= (limit or asked):
        raise ConfigError(
            "the judge cannot read texts of that length",
            found=f"--judge-length {asked}, {path} reads {limit or 'any number of'} tokens",
            change=f"--judge-length between 2 and {limit}" if limit else "--judge-length of at least 2",
        )
    return asked or min(limit or DEFAULT_LENGTH, DEFAULT_LENGTH)


def _from_transformers(path: str) -> tuple[nn.Module, Any]:
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise InputError(
            "a Hugging Face judge needs transformers", found=str(error), change="pip install 'braid-lm[hf]'"
        ) from error
    local = Path(path).is_dir()
    try:
        network = AutoModelForCausalLM.from_pretrained(path, local_files_only=local)
        return network, AutoTokenizer.from_pretrained(path, local_files_only=local)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(
            "the judge cannot be loaded",
            found=f"{path}: {reason}",
            change="give a folder with config.json, weights and tokenizer of a causal language model, a name on the "
            "hub, or a run directory of an AR model",
        ) from error
