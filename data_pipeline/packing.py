"""Packing: fixed-length rows cut from the token stream of a corpus, by arithmetic on stream positions."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from braid.data_pipeline.corpus import TokenCorpus
from braid.kernels.errors import ConfigError, DataExhausted

NUM_SPECIAL = {"wrap": 2, "stream": 0, "pairs": 1}
"""Packing styles and the special tokens each adds around what it takes from the stream."""


class Rows:
    """Rows of `sequence_length` = L tokens over the stream "document EOS document EOS ..." of a corpus.

    packing:
    `wrap`: [BOS] + L-2 stream tokens + [EOS], as MDLM (arXiv 2406.07524) and Duo (arXiv 2506.10892) train on
        OpenWebText and LM1B.
    `stream`: L stream tokens.
    `pairs`: [BOS] source [EOS] target [EOS], filled up with EOS, one row for each pair of a corpus of pairs. BOS, the
        source and the EOS after it are given (`condition`). All else is learnt and scored, the filling too: a model has
        to say where its target ends, and a bound that left those positions out, while what is seen of them in a noised
        row shows how long the target is, would be no bound on the target.

    With `wrap` and `stream`, every stream token is in one row, the last incomplete row is left out, all rows are full
    and attention may cross documents. With `pairs`, `long_pairs` says what becomes of pairs that do not fit a row:
    `stop`, an error which counts them, or `skip`, they are left out; `num_long_pairs` tells how many.

    rows_per_shard: int64 [shards]; a row belongs to the shard of its first stream token, and rows are numbered in the
    order of the stream, so those of shard 0 come first.

    Raises ConfigError for an unknown packing, a length too short for it, a corpus without pairs or with pairs that are
    too long, DataExhausted when there is no whole row.
    """

    def __init__(self, corpus: TokenCorpus, sequence_length: int, packing: str, *, long_pairs: str = "stop") -> None:
        if packing not in NUM_SPECIAL:
            raise ConfigError(
                "the packing is not known", found=f"packing={packing!r}", change=f"use one of {', '.join(NUM_SPECIAL)}"
            )
        if sequence_length <= NUM_SPECIAL[packing]:
            raise ConfigError(
                "no token of the corpus fits a row",
                found=f"sequence_length={sequence_length}, of which {NUM_SPECIAL[packing]} are special",
                change=f"use a sequence_length of at least {NUM_SPECIAL[packing] + 1}",
            )
        self.corpus, self.sequence_length, self.packing = corpus, sequence_length, packing
        room = sequence_length - NUM_SPECIAL[packing]
        self._cuts = _PairCuts(corpus, room, long_pairs) if packing == "pairs" else _EqualCuts(corpus, room)
        self.num_long_pairs = self._cuts.num_long if packing == "pairs" else 0
        if self._cuts.num_rows == 0:
            raise DataExhausted(
                f"the {corpus.split} split of {corpus.folder} is shorter than one row",
                found=f"{corpus.num_stream_tokens} tokens, a row takes {room}",
                change="use a shorter sequence_length or a larger corpus",
            )
        self.rows_per_shard = np.diff([self._cuts.begun(position) for position in corpus.shard_starts])
        self._left_out: dict[int, bool] = {}

    def __len__(self) -> int:
        return self._cuts.num_rows

    def __getitem__(self, i: int) -> np.ndarray:
        """Row `i`: int64 [L]."""
        return self.read([i])[0].astype(np.int64)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Rows `indices` in the dtype they are stored in: [len(indices), L].

        Raises InputError when a row lies in a missing or damaged shard."""
        out = np.full((len(indices), self.sequence_length), self.corpus.eos_id, self.corpus.dtype)
        first = int(self.packing != "stream")
        out[:, :first] = self.corpus.bos_id
        for i, row in zip(np.asarray(indices, np.int64).tolist(), out, strict=True):
            if not 0 <= i < self._cuts.num_rows:
                raise IndexError(f"row {i} of {len(self)}")
            start, stop = self._cuts.span(i)
            self.corpus.read_into(start, row[first : first + stop - start])
        return out

    def condition(self, rows: np.ndarray) -> np.ndarray:
        """Which tokens of these rows are given: bool [n, L] for rows [n, L] as `read` returns them."""
        if self.packing != "pairs":
            return np.zeros(rows.shape, bool)
        # The source holds no EOS, for text never becomes a special id; BOS may be the same id.
        source_ends = 1 + (rows[:, 1:] == self.corpus.eos_id).argmax(1)
        return np.arange(self.sequence_length) <= source_ends[:, None]

    @property
    def bytes_are_exact(self) -> bool:
        """Whether the tokenizer knows the bytes of each token, see `num_bytes`."""
        return self.corpus.tokenizer.token_bytes is not None

    def num_bytes(self, i: int) -> float:
        """UTF-8 bytes of original text in row `i` that is learnt and scored; special tokens count nothing, nor do
        sources. Unless `bytes_are_exact`, the row's text tokens times the mean bytes of a token of the split."""
        rows, corpus = self.read([i]), self.corpus
        scored = rows[~self.condition(rows)]
        if self.bytes_are_exact:
            return float(corpus.tokenizer.token_bytes[scored].sum())
        num_text_tokens = np.count_nonzero((scored != corpus.bos_id) & (scored != corpus.eos_id))
        return num_text_tokens * corpus.num_bytes / corpus.num_tokens

    def is_left_out(self, i: int) -> bool:
        """True when the corpus skips damaged shards and row `i` lies, even in part, in one. The first row met of such
        a shard writes the ledger's line. Shards are checked here, so the answer is the same on every rank."""
        if self.corpus.damaged == "stop":
            return False
        start, stop = self._cuts.span(i)
        first, last = (bisect_right(self.corpus.shard_starts, position) - 1 for position in (start, stop - 1))
        return any([self._is_damaged(shard) for shard in range(first, last + 1)])

    def _is_damaged(self, shard: int) -> bool:
        if shard not in self._left_out:
            reason = self.corpus.damage(shard)
            self._left_out[shard] = reason is not None
            if reason is not None:
                start, stop = self.corpus.shard_starts[shard : shard + 2]
                self.corpus.write_to_ledger(
                    shard=self.corpus.shard_names[shard],
                    rows=[self._cuts.ended(start), self._cuts.begun(stop)],
                    reason=reason,
                    sequence_length=self.sequence_length,
                    packing=self.packing,
                )
        return self._left_out[shard]


class _EqualCuts:
    """The stream in pieces of equal length, one for each row."""

    def __init__(self, corpus: TokenCorpus, length: int) -> None:
        self._length, self.num_rows = length, corpus.num_stream_tokens // length

    def span(self, i: int) -> tuple[int, int]:
        """Where in the stream the tokens of row `i` begin and end."""
        return i * self._length, (i + 1) * self._length

    def begun(self, position: int) -> int:
        """How many rows begin before a stream position."""
        return min(-(-position // self._length), self.num_rows)

    def ended(self, position: int) -> int:
        """How many rows end at or before a stream position."""
        return min(position // self._length, self.num_rows)


class _PairCuts:
    """The stream in pieces of "source EOS target EOS", of at most `room` tokens; the same methods as `_EqualCuts`.

    num_long: pairs that do not fit. Only where there are any, the numbers of the others are held in memory.
    """

    def __init__(self, corpus: TokenCorpus, room: int, long_pairs: str) -> None:
        if corpus.pair_starts is None:
            raise ConfigError(
                f"the corpus {corpus.folder} does not consist of pairs",
                found="packing='pairs'",
                change="prepare it from pairs (`braid prepare --pairs`), or use another packing",
            )
        if long_pairs not in ("stop", "skip"):
            raise ConfigError(
                "what to do about long pairs is not known",
                found=f"long_pairs={long_pairs!r}",
                change="use `stop` or `skip`",
            )
        self._corpus = corpus  # and not its table, which would be pickled whole
        lengths = np.diff(corpus.pair_starts)
        fits = lengths <= room
        self._kept = None if fits.all() else np.flatnonzero(fits)
        self.num_rows = int(np.count_nonzero(fits))
        self.num_long = len(lengths) - self.num_rows
        if self.num_long and (long_pairs == "stop" or not self.num_rows):
            most = int(np.quantile(lengths, 0.99, method="higher"))
            raise ConfigError(
                f"{self.num_long:,} of {len(lengths):,} pairs of the {corpus.split} split do not fit a row",
                found=f"sequence_length={room + 1}; with BOS and two EOS the longest pair takes {lengths.max() + 1:,} "
                f"tokens, and 99 of 100 take at most {most + 1:,}",
                change="use a longer sequence_length, or data.long_pairs=skip to leave the others out",
            )

    def span(self, i: int) -> tuple[int, int]:
        pair = i if self._kept is None else int(self._kept[i])
        return int(self._corpus.pair_starts[pair]), int(self._corpus.pair_starts[pair + 1])

    def begun(self, position: int) -> int:
        return self._rows_among(int(np.searchsorted(self._corpus.pair_starts[:-1], position, "left")))

    def ended(self, position: int) -> int:
        return self._rows_among(int(np.searchsorted(self._corpus.pair_starts[1:], position, "right")))

    def _rows_among(self, num_pairs: int) -> int:
        """How many of the first pairs are rows."""
        return num_pairs if self._kept is None else int(np.searchsorted(self._kept, num_pairs, "left"))
