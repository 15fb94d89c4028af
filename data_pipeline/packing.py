"""Packing: fixed-length rows cut from the token stream of a corpus, by arithmetic on stream positions where that tells
where rows begin, by a table (row_table.py) where the lengths of documents decide."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from braid.data_pipeline.corpus import TokenCorpus
from braid.data_pipeline.row_table import RowTable
from braid.kernels.errors import ConfigError, DataExhausted


class Style(NamedTuple):
    """How a row is made of pieces of the stream."""

    begins: bool
    """BOS before each piece."""
    ends: bool
    """EOS after the last one."""
    by_documents: bool
    """Documents decide which pieces there are: a table, padding, segments."""


STYLES = {
    "wrap": Style(begins=True, ends=True, by_documents=False),
    "stream": Style(begins=False, ends=False, by_documents=False),
    "pairs": Style(begins=True, ends=False, by_documents=False),
    "document": Style(begins=True, ends=False, by_documents=True),
    "best_fit": Style(begins=True, ends=False, by_documents=True),
    "paragraph": Style(begins=False, ends=True, by_documents=True),
}


SINGLE = "corpus"
"""What the source of a run is called that has only one."""


class Packed(NamedTuple):
    """Rows as they are read."""

    tokens: np.ndarray
    """In the dtype they are stored in, [n, L]."""
    segments: np.ndarray | None
    """int32 [n, L]: positions of the same number may see each other, 0 is padding; None: all see all."""


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
    `document`: [BOS] document [EOS], one row for each, as MDLM trains on LM1B's sentences.
    `best_fit`: ([BOS] document [EOS]) several times, none sees another (`Packed.segments`). Documents that begin in one
        shard are packed together, best-fit decreasing (arXiv 2404.10830): what is held in memory, and what a damaged
        shard concerns, stays one shard.
    `paragraph`: as ELF (arXiv 2605.10938) fills its rows: paragraph after paragraph, across the borders of documents,
        without a token between them; where the next does not fit, one EOS closes the row. All see all. Paragraphs end
        with a line break; tokenizers that keep none (T5's) leave documents, which then should be prepared so.

    The last three fill the rest of a row with the tokenizer's padding token, which is neither scored nor seen, so what
    it says does not matter. They need a table of rows, made by one pass over the corpus at the first start. A document
    of no tokens makes no piece.

    With `wrap` and `stream`, every stream token is in one row, the last incomplete row is left out, all rows are full
    and attention may cross documents. Where documents decide, every token of theirs is in one row. `oversized` says
    what becomes of a document (paragraph, pair) that does not fit a row: `cut` into pieces, of which each has the
    row's BOS and the last the document's EOS, unless that alone would be left; `skip`, left out; `stop`, an error which
    counts them. `auto` cuts all but pairs, which stop. `num_oversized` tells how many there are. Of a pair, `cut` keeps
    one row: the first tokens of its target, as many as fit beside the source but `target_tokens` (EOS included; 0: half
    the row) in any case, and the first of its source, as many as fit then.

    rows_per_shard: int64 [shards]; a row belongs to the shard of its first stream token, and rows are numbered in the
    order of the stream, so those of shard 0 come first. table_hash: names the table of rows, None without one.
    target_tokens: what a target keeps where pairs are cut, None where none is.

    Raises ConfigError for an unknown packing, a length too short for it, a corpus without pairs or with documents that
    are too long, DataExhausted when there is no whole row, InputError where a table can be neither read nor made.
    """

    def __init__(
        self,
        corpus: TokenCorpus,
        sequence_length: int,
        packing: str,
        *,
        oversized: str = "auto",
        target_tokens: int = 0,
    ) -> None:
        if packing not in STYLES:
            raise ConfigError(
                "the packing is not known", found=f"packing={packing!r}", change=f"use one of {', '.join(STYLES)}"
            )
        style = self._style = STYLES[packing]
        num_special = style.begins + style.ends
        if sequence_length <= num_special:
            raise ConfigError(
                "no token of the corpus fits a row",
                found=f"sequence_length={sequence_length}, of which {num_special} are special",
                change=f"use a sequence_length of at least {num_special + 1}",
            )
        self.corpus, self.sequence_length, self.packing = corpus, sequence_length, packing
        room = sequence_length - num_special
        if oversized == "auto":
            oversized = "stop" if packing == "pairs" else "cut"
        self._oversized = oversized
        if style.by_documents:
            self._cuts = _TableCuts(corpus, sequence_length, packing, oversized)
        elif packing == "pairs":
            self._cuts = _PairCuts(corpus, room, oversized, target_tokens or sequence_length // 2)
        else:
            self._cuts = _EqualCuts(corpus, room)
        self.num_oversized = self._cuts.num_long
        are_cut = packing == "pairs" and oversized == "cut" and self.num_oversized > 0
        self.target_tokens = (target_tokens or sequence_length // 2) if are_cut else None
        if self._cuts.num_rows == 0:
            raise DataExhausted(
                f"the {corpus.split} split of {corpus.source} is shorter than one row",
                found=f"{corpus.num_stream_tokens} tokens, a row takes {room}",
                change="use a shorter sequence_length or a larger corpus",
            )
        self.rows_per_shard = self._cuts.rows_per_shard
        self.table_hash = self._cuts.table.hash if style.by_documents else None
        self._left_out: dict[int, bool] = {}

    def __len__(self) -> int:
        return self._cuts.num_rows

    @property
    def parts(self) -> dict[str, Rows]:
        """The sources these rows come from."""
        return {SINGLE: self}

    @property
    def about_oversized(self) -> str:
        """What became of what does not fit a row, in words."""
        kind = {"pairs": "pairs", "paragraph": "paragraphs"}.get(self.packing, "documents")
        cut = "cut" if self.packing == "pairs" else "cut into pieces"
        became = "left out" if self._oversized == "skip" else cut
        return f"{self.num_oversized:,} {kind} are longer than a row and {became}"

    def __getitem__(self, i: int) -> np.ndarray:
        """Row `i`: int64 [L]."""
        return self.read([i])[0].astype(np.int64)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """The tokens that `load` gives: [len(indices), L]."""
        return self.load(indices).tokens

    def load(self, indices: Sequence[int]) -> Packed:
        """Rows `indices`. Raises InputError when a row lies in a missing or damaged shard."""
        corpus, style, length = self.corpus, self._style, self.sequence_length
        filling = corpus.tokenizer.pad_id if style.by_documents else corpus.eos_id
        tokens = np.full((len(indices), length), filling, corpus.dtype)
        segments = np.zeros(tokens.shape, np.int32) if style.by_documents else None
        for n, i in enumerate(np.asarray(indices, np.int64).tolist()):
            self._check(i)
            row, end = tokens[n], 0
            for number, (start, stop) in enumerate(self._cuts.spans(i), 1):
                begin = end
                if style.begins:
                    row[end] = corpus.bos_id
                    end += 1
                end += self._cuts.read_into(start, stop, row[end:])
                if style.by_documents:
                    segments[n, begin:end] = 1 if style.ends else number
            if style.ends:
                row[end] = corpus.eos_id
                if style.by_documents:
                    segments[n, end] = 1
        return Packed(tokens, segments)

    def num_real(self, indices: Sequence[int] | np.ndarray) -> int:
        """Tokens in these rows that are no padding."""
        if not self._style.by_documents:
            return len(indices) * self.sequence_length
        each, once = int(self._style.begins), int(self._style.ends)
        spans = [self._cuts.spans(i) for i in np.asarray(indices, np.int64).tolist()]
        return sum(once + sum(each + stop - start for start, stop in row) for row in spans)

    def condition(self, rows: np.ndarray) -> np.ndarray:
        """Which tokens of these rows are given: bool [n, L] for rows [n, L] as `read` returns them."""
        if self.packing != "pairs":
            return np.zeros(rows.shape, bool)
        # The source holds no EOS, for text never becomes a special id; BOS may be the same id.
        source_ends = 1 + (rows[:, 1:] == self.corpus.eos_id).argmax(1)
        return np.arange(self.sequence_length) <= source_ends[:, None]

    def target(self, i: int) -> list[int]:
        """The whole target of the pair of row `i`, cut there or not, as ids without EOS."""
        return self._cuts.target(i)

    @property
    def bytes_are_exact(self) -> bool:
        """Whether the tokenizer knows the bytes of each token, see `num_bytes`."""
        return self.corpus.tokenizer.token_bytes is not None

    def num_bytes(self, i: int) -> float:
        """UTF-8 bytes of original text in row `i` that is learnt and scored; special tokens count nothing, nor do
        sources. Unless `bytes_are_exact`, the row's text tokens times the mean bytes of a token of the split."""
        (rows, segments), corpus = self.load([i]), self.corpus
        is_scored = ~self.condition(rows) if segments is None else segments > 0
        scored = rows[is_scored]
        if self.bytes_are_exact:
            return float(corpus.tokenizer.token_bytes[scored].sum())
        num_text_tokens = np.count_nonzero((scored != corpus.bos_id) & (scored != corpus.eos_id))
        return num_text_tokens * corpus.num_bytes / corpus.num_tokens

    def is_left_out(self, i: int) -> bool:
        """True when the corpus skips damaged shards and row `i` lies, even in part, in one. The first row met of such
        a shard writes the ledger's line. Shards are checked here, so the answer is the same on every rank."""
        if self.corpus.damaged == "stop":
            return False
        shards: set[int] = set()
        for start, stop in self._cuts.spans(i):
            first, last = (bisect_right(self.corpus.shard_starts, position) - 1 for position in (start, stop - 1))
            shards.update(range(first, last + 1))
        return any([self._is_damaged(shard) for shard in sorted(shards)])

    def _check(self, i: int) -> None:
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")

    def _is_damaged(self, shard: int) -> bool:
        if shard not in self._left_out:
            reason = self.corpus.damage(shard)
            self._left_out[shard] = reason is not None
            if reason is not None:
                self.corpus.write_to_ledger(
                    shard=self.corpus.shard_names[shard],
                    **self._cuts.concerned(shard),
                    reason=reason,
                    sequence_length=self.sequence_length,
                    packing=self.packing,
                )
        return self._left_out[shard]


class _Cuts:
    """Base of cuts whose rows are one piece of the stream each, in its order."""

    num_rows: int
    num_long = 0

    def __init__(self, corpus: TokenCorpus) -> None:
        self._corpus = corpus

    @property
    def rows_per_shard(self) -> np.ndarray:
        """int64 [shards]."""
        return np.diff([self.begun(position) for position in self._corpus.shard_starts])

    def spans(self, i: int) -> list[tuple[int, int]]:
        """Where in the stream the pieces of row `i` begin and end."""
        raise NotImplementedError

    def read_into(self, start: int, stop: int, out: np.ndarray) -> int:
        """Write a piece to the begin of `out`; how many tokens these are."""
        self._corpus.read_into(start, out[: stop - start])
        return stop - start

    def begun(self, position: int) -> int:
        """How many rows begin before a stream position."""
        raise NotImplementedError

    def ended(self, position: int) -> int:
        """How many rows end at or before a stream position."""
        raise NotImplementedError

    def concerned(self, shard: int) -> dict[str, list[int]]:
        """Which rows have something of a shard, for the ledger: the first, and the first after them."""
        start, stop = self._corpus.shard_starts[shard : shard + 2]
        return {"rows": [self.ended(start), self.begun(stop)]}


class _EqualCuts(_Cuts):
    """The stream in pieces of equal length."""

    def __init__(self, corpus: TokenCorpus, length: int) -> None:
        super().__init__(corpus)
        self._length, self.num_rows = length, corpus.num_stream_tokens // length

    def spans(self, i: int) -> list[tuple[int, int]]:
        return [(i * self._length, (i + 1) * self._length)]

    def begun(self, position: int) -> int:
        return min(-(-position // self._length), self.num_rows)

    def ended(self, position: int) -> int:
        return min(position // self._length, self.num_rows)


class _TableCuts(_Cuts):
    """Pieces of documents or paragraphs, several in a row, as a table says.

    num_long: documents or paragraphs that do not fit a row.
    """

    def __init__(self, corpus: TokenCorpus, sequence_length: int, packing: str, oversized: str) -> None:
        super().__init__(corpus)
        if oversized not in ("cut", "skip", "stop"):
            raise ConfigError(
                "what to do about documents that do not fit a row is not known",
                found=f"oversized={oversized!r}",
                change="use `auto`, `cut`, `skip` or `stop`",
            )
        # An error is raised before its rows are asked for, so they may as well be those of `cut`.
        table = RowTable.open(corpus, sequence_length, packing, "skip" if oversized == "skip" else "cut")
        if table.num_long and (oversized == "stop" or not table.num_rows):
            kind = "paragraphs" if packing == "paragraph" else "documents"
            raise ConfigError(
                f"{table.num_long:,} of {table.num_units:,} {kind} of the {corpus.split} split do not fit a row",
                found=f"sequence_length={sequence_length}; the longest has {table.longest:,} tokens, BOS and EOS apart",
                change="use a longer sequence_length, or data.oversized=cut (or skip, to leave them out)",
            )
        self.table, self.num_long, self.num_rows = table, table.num_long, table.num_rows
        for shard, reason in table.left_out.items():
            first, _ = table.rows_of(shard)
            corpus.write_to_ledger(
                shard=corpus.shard_names[shard],
                rows=[first, first],
                reason=f"{reason} when the rows were made: its documents are in none of them",
                sequence_length=sequence_length,
                packing=packing,
            )

    @property
    def rows_per_shard(self) -> np.ndarray:
        return self.table.rows_per_shard

    def spans(self, i: int) -> list[tuple[int, int]]:
        return self.table.spans(i)

    def concerned(self, shard: int) -> dict[str, list[int]]:
        """Rows of earlier shards that reach into this one need not follow each other, and are named one by one."""
        reaching = self.table.reaching(shard, self._corpus.shard_starts[shard])
        return {"rows": list(self.table.rows_of(shard))} | ({"earlier_rows": reaching} if reaching else {})


class _PairCuts(_Cuts):
    """The stream in pieces of "source EOS target EOS", of which a row takes at most `room` tokens.

    num_long: pairs that do not fit. Only where such are left out, the numbers of the others are held in memory.
    """

    def __init__(self, corpus: TokenCorpus, room: int, oversized: str, target_tokens: int) -> None:
        super().__init__(corpus)  # and not its table, which would be pickled whole
        self._room, self._target_tokens = room, target_tokens
        if corpus.pair_starts is None:
            raise ConfigError(
                f"the corpus {corpus.source} does not consist of pairs",
                found="packing='pairs'",
                change="prepare it from pairs (`braid prepare --pairs`), or use another packing",
            )
        if oversized not in ("cut", "skip", "stop"):
            raise ConfigError(
                "what to do about pairs that do not fit a row is not known",
                found=f"oversized={oversized!r}",
                change="use `auto`, `cut`, `skip` or `stop`",
            )
        if oversized == "cut" and not 2 <= target_tokens <= room - 1:
            raise ConfigError(
                "a row that is cut has no place for its source or its target",
                found=f"target_tokens={target_tokens}, sequence_length={room + 1}",
                change=f"use target_tokens from 2 to {room - 1}, or a longer sequence_length",
            )
        lengths = np.diff(corpus.pair_starts)
        fits = lengths <= room
        self.num_long = len(lengths) - int(np.count_nonzero(fits))
        self._kept = np.flatnonzero(fits) if self.num_long and oversized == "skip" else None
        self.num_rows = len(lengths) if self._kept is None else len(self._kept)
        if self.num_long and (oversized == "stop" or not self.num_rows):
            most = int(np.quantile(lengths, 0.99, method="higher"))
            raise ConfigError(
                f"{self.num_long:,} of {len(lengths):,} pairs of the {corpus.split} split do not fit a row",
                found=f"sequence_length={room + 1}; with BOS and two EOS the longest pair takes {lengths.max() + 1:,} "
                f"tokens, and 99 of 100 take at most {most + 1:,}",
                change="use a longer sequence_length, or data.oversized=cut (or skip, to leave these pairs out)",
            )

    def spans(self, i: int) -> list[tuple[int, int]]:
        pair = i if self._kept is None else int(self._kept[i])
        return [(int(self._corpus.pair_starts[pair]), int(self._corpus.pair_starts[pair + 1]))]

    def read_into(self, start: int, stop: int, out: np.ndarray) -> int:
        if stop - start <= self._room:
            return super().read_into(start, stop, out)
        source, target = self._sides(start, stop)
        target = target[: max(self._target_tokens - 1, self._room - 2 - len(source))]
        source = source[: self._room - 2 - len(target)]
        eos = [self._corpus.eos_id]
        out[: self._room] = np.concatenate([source, eos, target, eos])
        return self._room

    def target(self, i: int) -> list[int]:
        return self._sides(*self.spans(i)[0])[1].tolist()

    def _sides(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and target of a pair, without their EOS, which are the only ones: text never becomes a special id."""
        pair = np.empty(stop - start, self._corpus.dtype)
        self._corpus.read_into(start, pair)
        end = int((pair == self._corpus.eos_id).argmax())
        return pair[:end], pair[end + 1 : -1]

    def begun(self, position: int) -> int:
        return self._rows_among(int(np.searchsorted(self._corpus.pair_starts[:-1], position, "left")))

    def ended(self, position: int) -> int:
        return self._rows_among(int(np.searchsorted(self._corpus.pair_starts[1:], position, "right")))

    def _rows_among(self, num_pairs: int) -> int:
        """How many of the first pairs are rows."""
        return num_pairs if self._kept is None else int(np.searchsorted(self._kept, num_pairs, "left"))
