"""Packing: fixed-length rows cut from the token stream of a corpus, by arithmetic on stream positions."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from braid.data_pipeline.corpus import TokenCorpus
from braid.kernels.errors import ConfigError, DataExhausted

NUM_SPECIAL = {"wrap": 2, "stream": 0}
"""Packing styles and the special tokens each adds around a row."""


class Rows:
    """Rows of `sequence_length` = L tokens over the stream "document EOS document EOS ..." of a corpus.

    packing: `wrap`: [BOS] + L-2 stream tokens + [EOS], as MDLM (arXiv 2406.07524) and Duo (arXiv 2506.10892) train on
    OpenWebText and LM1B; `stream`: L stream tokens. Every stream token is in one row; the last incomplete row is left
    out. All rows are full and attention may cross documents.

    rows_per_shard: int64 [shards]; a row belongs to the shard of its first stream token, and rows are numbered in the
    order of the stream, so those of shard 0 come first.

    Raises ConfigError for an unknown packing or a length too short for it, DataExhausted when there is no whole row.
    """

    def __init__(self, corpus: TokenCorpus, sequence_length: int, packing: str) -> None:
        if packing not in NUM_SPECIAL:
            raise ConfigError(
                "the packing is not known", found=f"packing={packing!r}", change=f"use {' or '.join(NUM_SPECIAL)}"
            )
        self._stride = sequence_length - NUM_SPECIAL[packing]
        if self._stride < 1:
            raise ConfigError(
                "no token of the corpus fits a row",
                found=f"sequence_length={sequence_length}, of which {NUM_SPECIAL[packing]} are special",
                change=f"use a sequence_length of at least {NUM_SPECIAL[packing] + 1}",
            )
        self.corpus, self.sequence_length, self.packing = corpus, sequence_length, packing
        self._num_rows = corpus.num_stream_tokens // self._stride
        if self._num_rows == 0:
            raise DataExhausted(
                f"the {corpus.split} split of {corpus.folder} is shorter than one row",
                found=f"{corpus.num_stream_tokens} tokens, a row takes {self._stride}",
                change="use a shorter sequence_length or a larger corpus",
            )
        starts = np.array(corpus.shard_starts)
        self.rows_per_shard = np.diff(np.minimum(-(-starts // self._stride), self._num_rows))
        self._left_out: dict[int, bool] = {}

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, i: int) -> np.ndarray:
        """Row `i`: int64 [L]."""
        return self.read([i])[0].astype(np.int64)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Rows `indices` in the dtype they are stored in: [len(indices), L].

        Raises InputError when a row lies in a missing or damaged shard."""
        out = np.empty((len(indices), self.sequence_length), self.corpus.dtype)
        body = out
        if self.packing == "wrap":
            out[:, 0], out[:, -1], body = self.corpus.bos_id, self.corpus.eos_id, out[:, 1:-1]
        for i, row in zip(indices, body, strict=True):
            if not 0 <= i < self._num_rows:
                raise IndexError(f"row {i} of {self._num_rows}")
            self.corpus.read_into(int(i) * self._stride, row)
        return out

    @property
    def bytes_are_exact(self) -> bool:
        """Whether the tokenizer knows the bytes of each token, see `num_bytes`."""
        return self.corpus.tokenizer.token_bytes is not None

    def num_bytes(self, i: int) -> float:
        """UTF-8 bytes of original text in row `i`; special tokens count nothing. Unless
        `bytes_are_exact`, the row's text tokens times the mean bytes of a token of the split."""
        row, corpus = self.read([i])[0], self.corpus
        if self.bytes_are_exact:
            return float(corpus.tokenizer.token_bytes[row].sum())
        num_text_tokens = np.count_nonzero((row != corpus.bos_id) & (row != corpus.eos_id))
        return num_text_tokens * corpus.num_bytes / corpus.num_tokens

    def is_left_out(self, i: int) -> bool:
        """True when the corpus skips damaged shards and row `i` lies, even in part, in one. The first row met of such
        a shard writes the ledger's line. Shards are checked here, so the answer is the same on every rank."""
        if self.corpus.damaged == "stop":
            return False
        starts = self.corpus.shard_starts
        first, last = (bisect_right(starts, p) - 1 for p in (i * self._stride, (i + 1) * self._stride - 1))
        return any([self._is_damaged(shard) for shard in range(first, last + 1)])

    def _is_damaged(self, shard: int) -> bool:
        if shard not in self._left_out:
            reason = self.corpus.damage(shard)
            self._left_out[shard] = reason is not None
            if reason is not None:
                start, stop = self.corpus.shard_starts[shard : shard + 2]
                rows = [start // self._stride, min(-(-stop // self._stride), self._num_rows)]
                self.corpus.write_to_ledger(
                    shard=self.corpus.shard_names[shard],
                    rows=rows,
                    reason=reason,
                    sequence_length=self.sequence_length,
                    packing=self.packing,
                )
        return self._left_out[shard]
