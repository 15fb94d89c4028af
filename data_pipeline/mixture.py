"""Several corpora as the sources of one run: which source each sample comes from, and the rows of all of them as one.

Samples are dealt to the sources in blocks. With shares p_1, p_2, ... the first n samples hold

    floor(n (p_1 + ... + p_i)) - floor(n (p_1 + ... + p_(i-1)))

of source i wherever n is the end of a block: they add up to n, each is within one of n p_i, and what was rounded off
is carried on. Inside a block the sources are in a random order, a Philox permutation of its own. So the number of
samples that a source has given before any position is found by arithmetic and by counting in one block, however far
the run has come, and the source's own endless order (`order.py`) says which rows they were: every row of a source once
per epoch of that source.

The shares may change from stage to stage of a run (a curriculum). A stage has blocks of its own, from its first sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np

from braid.data_pipeline.order import ShuffledOrder, remember
from braid.data_pipeline.packing import Packed, Rows
from braid.kernels.errors import CheckpointError, ConfigError, InputError
from braid.kernels.reference import permutation

BLOCK = 256
"""Samples in a block, where every source has at least one of them; else the next power of two that gives it one."""
MAX_BLOCK = 1 << 20
DIGITS = Context(prec=17)  # powers in decimal are the same on every machine, those of its C library are not


@dataclass(frozen=True)
class Stage:
    """From sample `first` of a run on, until the next stage, source s gives `shares[s]` of every `sum(shares.values())`
    samples. Shares are whole numbers above 0 without a common divisor, by name in alphabetical order."""

    first: int
    shares: dict[str, int]

    @classmethod
    def weighted(cls, first: int, weights: Mapping[str, float], temperature: float = 1.0) -> Stage:
        """Shares in proportion to weight^(1 / temperature), with weights taken as the decimals they are written as.

        Weights are at least 0 and not all 0; temperature > 0: above 1 shares become more equal. Raises ConfigError for
        a share of less than one in MAX_BLOCK samples.
        """
        assert first >= 0 and temperature > 0 and min(weights.values()) >= 0 < max(weights.values()), weights
        exact = {name: Fraction(repr(weight)) for name, weight in sorted(weights.items()) if weight > 0}
        if temperature != 1:
            largest = max(exact.values())
            exponent = DIGITS.divide(1, Decimal(repr(temperature)))
            exact = {name: _power(weight / largest, exponent) for name, weight in exact.items()}
        if min(exact.values()) * MAX_BLOCK < sum(exact.values()):
            rarest = min(exact, key=exact.get)
            raise ConfigError(
                f"the weight of source {rarest} is too small: it would give less than one in {MAX_BLOCK:,} samples",
                found=f"{float(exact[rarest] / sum(exact.values())):.3g} of the samples",
                change="raise its weight, or set it to 0",
            )
        scale = math.lcm(*(weight.denominator for weight in exact.values()))
        whole = {name: int(weight * scale) for name, weight in exact.items()}
        return cls(first, {name: share // math.gcd(*whole.values()) for name, share in whole.items()})

    @cached_property
    def block(self) -> int:
        """Samples in a block of this stage."""
        rarest = -(-sum(self.shares.values()) // min(self.shares.values()))
        return max(BLOCK, 1 << (rarest - 1).bit_length())

    def fraction(self, name: str) -> Fraction:
        """The share of a source, 0 to 1."""
        return Fraction(self.shares.get(name, 0), sum(self.shares.values()))

    @property
    def fractions(self) -> dict[str, float]:
        """The shares of the sources that have one, adding up to 1."""
        return {name: float(self.fraction(name)) for name in self.shares}

    def quotas(self, num: int) -> np.ndarray:
        """How many of the stage's first `num` samples, whole blocks, each source of `shares` has given: int64."""
        edges = accumulate(self.shares.values(), initial=0)
        total = sum(self.shares.values())
        return np.diff(np.array([num * edge // total for edge in edges], np.int64))


def _power(base: Fraction, exponent: Decimal) -> Fraction:
    quotient = DIGITS.divide(Decimal(base.numerator), Decimal(base.denominator))
    return Fraction(DIGITS.power(quotient, exponent))


class MixedRows:
    """The rows of several corpora, numbered one source after the other in alphabetical order of their names; what is
    asked of `packing.Rows` can be asked of it.

    parts: name -> Rows, all of one sequence length and packing. Raises InputError unless all corpora have the same
    tokenizer.
    """

    def __init__(self, parts: Mapping[str, Rows]) -> None:
        self.parts = dict(sorted(parts.items()))
        (first_name, first), *others = self.parts.items()
        for name, rows in others:
            assert (rows.sequence_length, rows.packing) == (first.sequence_length, first.packing)
            hashes = [each.corpus.tokenizer.hash for each in (first, rows)]
            if hashes[0] != hashes[1]:
                raise InputError(
                    f"the sources {first_name} and {name} were tokenised with different tokenizers",
                    found=f"{first.corpus.source}: hash {hashes[0][:16]}; {rows.corpus.source}: hash {hashes[1][:16]}",
                    change=f"prepare one of them again with the other's: --tokenizer {first.corpus.source}/tokenizer",
                )
        self.sequence_length, self.packing = first.sequence_length, first.packing
        tables = {name: rows.table_hash for name, rows in self.parts.items()}
        self.table_hash = tables if first.table_hash else None
        self.bytes_are_exact = first.bytes_are_exact
        self.first_rows = np.cumsum([0, *map(len, self.parts.values())])
        self._rows = list(self.parts.values())

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    def __getitem__(self, i: int) -> np.ndarray:
        return self.read([i])[0].astype(np.int64)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """The tokens that `load` gives: [len(indices), L]."""
        return self.load(indices).tokens

    def load(self, indices: Sequence[int]) -> Packed:
        """Rows `indices`."""
        indices = np.asarray(indices, np.int64)
        sources = self.source(indices)
        tokens = np.empty((len(indices), self.sequence_length), self._rows[0].corpus.dtype)
        segments = np.empty(tokens.shape, np.int32) if self.table_hash else None
        for source in np.unique(sources).tolist():
            chosen = sources == source
            found = self._rows[source].load(indices[chosen] - self.first_rows[source])
            tokens[chosen] = found.tokens
            if segments is not None:
                segments[chosen] = found.segments
        return Packed(tokens, segments)

    def source(self, indices: np.ndarray) -> np.ndarray:
        """The numbers of the sources that rows come from: int64 of the same shape."""
        return np.searchsorted(self.first_rows, indices, "right") - 1

    def condition(self, rows: np.ndarray) -> np.ndarray:
        """Which tokens of these rows are given: bool [n, L]."""
        return self._rows[0].condition(rows)

    def target(self, i: int) -> list[int]:
        """The whole target of the pair of row `i`."""
        rows, i = self._locate(i)
        return rows.target(i)

    def num_bytes(self, i: int) -> float:
        """UTF-8 bytes of original text in row `i` that is learnt and scored."""
        rows, i = self._locate(i)
        return rows.num_bytes(i)

    def is_left_out(self, i: int) -> bool:
        """Whether row `i` lies in a damaged shard of a corpus that skips those."""
        rows, i = self._locate(i)
        return rows.is_left_out(i)

    def _locate(self, i: int) -> tuple[Rows, int]:
        source = int(self.source(np.array(i)))
        return self._rows[source], i - int(self.first_rows[source])


class MixedOrder:
    """An endless order of the rows of `MixedRows`, a pure function of (seed, stages, position).

    orders: name -> the order of each source. stages: the first begins at sample 0, the others follow in order; each
    gives its samples in the stated shares, without those that change nothing. 0 <= seed < 2^64. Memory: that of the
    sources' orders and two blocks. len(order) is the number of rows of all sources.
    """

    def __init__(self, orders: Mapping[str, ShuffledOrder], stages: Sequence[Stage], seed: int) -> None:
        self.names, self._orders = sorted(orders), [orders[name] for name in sorted(orders)]
        self.first_rows = np.cumsum([0, *map(len, self._orders)])
        self.seed, self.window = seed, self._orders[0].window
        assert stages[0].first == 0 and all(a.first < b.first for a, b in pairwise(stages)), stages
        assert all(stage.shares.keys() <= orders.keys() for stage in stages), (stages, self.names)
        self.stages = [stages[0], *(b for a, b in pairwise(stages) if a.shares != b.shares)]
        self._blocks: dict[tuple[int, int], np.ndarray] = {}

    @classmethod
    def of_one(cls, name: str, order: ShuffledOrder) -> MixedOrder:
        """The order of a single source."""
        return cls({name: order}, [Stage(0, {name: 1})], order.seed)

    def __len__(self) -> int:
        return int(self.first_rows[-1])

    def sources(self, start: int, stop: int) -> np.ndarray:
        """Numbers of the sources (places in `names`) of samples [start, stop): int64."""
        if len(self.names) == 1:
            return np.zeros(stop - start, np.int64)
        parts = [np.empty(0, np.int64)]
        for stage, first, last in self._within(start, stop):
            while first < last:
                number, offset = divmod(first, stage.block)
                parts.append(self._block(stage, number)[offset : offset + last - first])
                first += len(parts[-1])
        return np.concatenate(parts)

    def given(self, num: int) -> np.ndarray:
        """How many of the first `num` samples of the run come from each source: int64 [sources]."""
        if len(self.names) == 1:
            return np.array([num])
        counts = np.zeros(len(self.names), np.int64)
        for stage, _, last in self._within(0, num):
            number, offset = divmod(last, stage.block)
            counts[self._numbers(stage)] += stage.quotas(number * stage.block)
            if offset:
                counts += np.bincount(self._block(stage, number)[:offset], minlength=len(counts))
        return counts

    def places(self, start: int, stop: int, left_out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of samples [start, stop), the sources and the positions in the sources' own orders, where each source had to
        leave out so many rows (int64 [sources]) before them and none among them: two of int64."""
        sources = self.sources(start, stop)
        positions, firsts = np.empty(len(sources), np.int64), self.given(start) + left_out
        for source, chosen in self.of_each(sources):
            positions[chosen] = firsts[source] + np.arange(len(sources[chosen]))
        return sources, positions

    def rows(self, sources: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """The rows at increasing positions of the sources' own orders: int64."""
        rows = np.empty(len(sources), np.int64)
        for source, chosen in self.of_each(sources):
            own = positions[chosen]
            first = int(own[0])
            rows[chosen] = self.first_rows[source] + self._orders[source].span(first, int(own[-1]) + 1)[own - first]
        return rows

    def coming_shards(self, source: int, position: int) -> list[list[int]]:
        """Of a source: the shards of the window that holds `position`, and those of the window after it."""
        return self._orders[source].coming_shards(position)

    def of_each(self, sources: np.ndarray) -> Iterator[tuple[int, np.ndarray | slice]]:
        """Each source that is among `sources`, and where."""
        if len(self.names) == 1:
            yield 0, slice(None)
            return
        for source in range(len(self.names)):
            chosen = np.flatnonzero(sources == source)
            if len(chosen):
                yield source, chosen

    def row(self, source: int, position: int) -> int:
        """The row at `position` of a source's own order."""
        return int(self.first_rows[source]) + self._orders[source][position]

    def stage(self, position: int) -> Stage:
        """The stage that the sample at `position` belongs to."""
        return [stage for stage in self.stages if stage.first <= position][-1]

    def begun(self, consumed: int) -> list[Stage]:
        """The stages that have given samples to a run which consumed so many, or would give it its first."""
        return [stage for stage in self.stages if stage.first < max(consumed, 1)]

    def continue_from(self, begun: Sequence[Stage], consumed: int) -> bool:
        """Go on with a run that went through the stages `begun`. Where the shares in force at `consumed` are not those
        of its last stage, a new stage begins there: what was consumed stays what it was. Returns whether one does that
        was not planned to.

        Raises CheckpointError when a source is gone which has given samples.
        """
        gone = sorted({name for stage in begun for name in stage.shares} - set(self.names))
        if gone:
            raise CheckpointError(
                f"the checkpoint's data cannot be continued: the source {', '.join(gone)} is gone",
                found=f"sources {', '.join(self.names)}",
                change="name it in data.sources, with weight 0 where it is to give no more",
            )
        ahead = [stage for stage in self.stages if stage.first > consumed]
        now = self.stage(consumed)
        begins = [Stage(consumed, now.shares)] if begun[-1].shares != now.shares else []
        self.stages = [*begun, *begins, *ahead]
        self._blocks.clear()
        return bool(begins) and now.first != consumed

    def _within(self, start: int, stop: int) -> Iterator[tuple[Stage, int, int]]:
        """The stages of samples [start, stop), and which samples of the stage those are."""
        ends = [*(stage.first for stage in self.stages[1:]), stop]
        for stage, end in zip(self.stages, ends, strict=True):
            first, last = max(start, stage.first), min(stop, end)
            if first < last:
                yield stage, first - stage.first, last - stage.first

    def _numbers(self, stage: Stage) -> np.ndarray:
        return np.array([self.names.index(name) for name in stage.shares])

    def _block(self, stage: Stage, number: int) -> np.ndarray:
        """The sources of the samples of a block: int64 [stage.block]."""
        block = self._blocks.get((stage.first, number))
        if block is None:
            start, size = number * stage.block, stage.block
            block = np.repeat(self._numbers(stage), stage.quotas(start + size) - stage.quotas(start))
            block = block[permutation(self.seed, "mixture", stage.first, number, n=size)]
            remember(self._blocks, (stage.first, number), block)
        return block
