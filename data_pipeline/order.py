"""The order of training rows: a pure function of (seed, epoch), computed where it is needed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from braid.kernels.reference import permutation


class ShuffledOrder:
    """An endless order of rows: position -> row index, where each epoch visits every row once.

    In every epoch the shards are permuted and grouped into windows of `window` shards, and the rows of each window are
    permuted: rows mix across a window while only its shards need to be at hand. Permutations come from Philox (stream
    ORDER), keyed by (seed, epoch, window), so any position is reached at once and nothing but it needs to be saved.
    Memory: two numbers per shard and the rows of two windows.

    rows_per_shard: [shards]; rows are numbered shard by shard. 0 <= seed < 2^64. len(order) is the rows of an epoch.
    """

    def __init__(self, rows_per_shard: Sequence[int] | np.ndarray, seed: int, window: int) -> None:
        assert window >= 1 and 0 <= seed < 1 << 64, f"window {window}, seed {seed}"
        self._sizes = np.asarray(rows_per_shard, np.int64)
        self._first_rows = np.cumsum(self._sizes) - self._sizes
        self._num_rows = int(self._sizes.sum())
        assert self._num_rows > 0, "an order needs a row"
        self.seed, self.window = seed, window
        self._epochs: dict[int, tuple[np.ndarray, list[int]]] = {}
        self._windows: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, position: int) -> int:
        """Row at `position` >= 0 of the endless order; the epoch is position // len(order)."""
        return int(self._following(position)[0])

    def span(self, start: int, stop: int) -> np.ndarray:
        """Rows at positions [start, stop): int64."""
        parts = [np.empty(0, np.int64)]
        while start < stop:
            parts.append(self._following(start)[: stop - start])
            start += len(parts[-1])
        return np.concatenate(parts)

    def coming_shards(self, position: int) -> list[list[int]]:
        """The shards of the window that holds `position`, and those of the window after it."""
        epoch, k = divmod(position, self._num_rows)
        _, starts = self._epochs.get(epoch) or self._plan_epoch(epoch)
        window = bisect_right(starts, k) - 1
        following = (epoch, window + 1) if window + 1 < len(starts) else (epoch + 1, 0)
        coming = []
        for e, w in ((epoch, window), following):
            shards, _ = self._epochs.get(e) or self._plan_epoch(e)
            coming.append(shards[w * self.window : (w + 1) * self.window].tolist())
        return coming

    def _following(self, position: int) -> np.ndarray:
        """The rows from `position` to the end of its window."""
        assert position >= 0, f"position {position}"
        epoch, k = divmod(position, self._num_rows)
        _, starts = self._epochs.get(epoch) or self._plan_epoch(epoch)
        window = bisect_right(starts, k) - 1
        rows = self._windows.get((epoch, window))
        if rows is None:
            rows = self._shuffle_window(epoch, window)
        return rows[k - starts[window] :]

    def _plan_epoch(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        """The shards in the order of this epoch, and the position within it at which each window starts."""
        shards = permutation(self.seed, "shards", epoch, n=len(self._sizes))
        sizes = np.add.reduceat(self._sizes[shards], np.arange(0, len(shards), self.window))
        remember(self._epochs, epoch, (shards, [0, *np.cumsum(sizes)[:-1].tolist()]))
        return self._epochs[epoch]

    def _shuffle_window(self, epoch: int, window: int) -> np.ndarray:
        shards, _ = self._epochs[epoch]
        shards = shards[window * self.window : (window + 1) * self.window]
        rows = np.concatenate([self._first_rows[s] + np.arange(self._sizes[s]) for s in shards])
        rows = rows[permutation(self.seed, "rows", epoch, window, n=len(rows))]
        remember(self._windows, (epoch, window), rows)
        return rows


def remember(cache: dict, key: object, value: object) -> None:
    """Keep the newest two: a global batch may reach back over the edge of a window or an epoch."""
    while len(cache) >= 2:
        del cache[next(iter(cache))]
    cache[key] = value
