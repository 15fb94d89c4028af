"""The noise contract in NumPy: short, slow, independent of torch.

It is what `braid.kernels.random` and the native kernels are tested against, and what code without torch (the data
pipeline) draws from. The contract itself is stated in `random.py`; the parts that exist once for every implementation
are here: the streams, the version, the folding of keys.
"""

from __future__ import annotations

from enum import IntEnum
from math import prod

import numpy as np
import xxhash

from braid.kernels import normal_table

CONTRACT_VERSION = 1
"""Written into checkpoints. Any change of a bit anywhere below needs a new number."""

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
NUM_ROUNDS = 10
MASK = 0xFFFFFFFF

MAX_DRAWS = 1 << 8
MAX_BLOCKS = 1 << 16
FOLD_TAG = 0x62726169
"""Upper counter word while folding keys: no sample ordinal gets that far, so no noise counter is ever folded."""

LOW_WORDS = "categorical: low words"
"""What is folded into a key for the lower 32 bits of the 64-bit uniforms of the exponential race."""


class Stream(IntEnum):
    """What a number is for. Numbers of different streams never share a counter."""

    TOKEN = 1
    NORMAL = 2
    TIME = 3
    CATEGORICAL = 4
    DROPOUT = 5
    COIN = 6
    INIT = 7
    ORDER = 8


def fold_key(key: int, *words: int | str) -> int:
    """A new 64-bit key from `key` and words (a layer, a sampler step, a parameter's name), folded in one at a time.

    An int (0 <= word < 2^64) enters as it is, a str by the xxh3_64 of its UTF-8 bytes; 1 and "1" differ. Folding
    composes: fold_key(fold_key(key, a), b) == fold_key(key, a, b). Distinct words give independent keys.
    """
    for word in words:
        is_text = isinstance(word, str)
        number = xxhash.xxh3_64_intdigest(word.encode()) if is_text else int(word)
        assert 0 <= number < 1 << 64, f"a folded word must fit in 64 unsigned bits: {word}"
        low, high, _, _ = _philox_of_ints(number & MASK, number >> 32, int(is_text), FOLD_TAG, key)
        key = high << 32 | low
    return key


def _philox_of_ints(c0: int, c1: int, c2: int, c3: int, key: int) -> tuple[int, int, int, int]:
    k0, k1 = key & MASK, key >> 32
    for _ in range(NUM_ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & MASK, p0 >> 32 ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & MASK, (k1 + KEY_INCREMENTS[1]) & MASK
    return c0, c1, c2, c3


def philox(c0, c1, c2, c3, key: int) -> list[np.ndarray]:
    """Philox4x32-10 (Salmon et al., SC 2011): counter words in [0, 2^32), broadcast, to four uint32 arrays."""
    c = [word.astype(np.uint64) for word in np.broadcast_arrays(c0, c1, c2, c3)]
    key_words = [key & MASK, key >> 32]
    for _ in range(NUM_ROUNDS):
        p0, p1 = c[0] * np.uint64(MULTIPLIERS[0]), c[2] * np.uint64(MULTIPLIERS[1])
        k0, k1 = map(np.uint64, key_words)
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & MASK, (p0 >> 32) ^ c[3] ^ k1, p0 & MASK]
        key_words = [(k + increment) & MASK for k, increment in zip(key_words, KEY_INCREMENTS, strict=True)]
    return [word.astype(np.uint32) for word in c]


def words(key: int, stream: Stream, ordinals, positions, *, draw=0, first_block=0, num_blocks=1) -> np.ndarray:
    """uint32 [B, L, num_blocks, 4]: ordinals [B], positions [L] or [B, L]."""
    ordinals, positions = np.asarray(ordinals, np.int64)[:, None, None], np.asarray(positions, np.int64)[..., None]
    blocks = np.arange(first_block, first_block + num_blocks)
    assert 0 <= draw < MAX_DRAWS and 0 <= first_block and first_block + num_blocks <= MAX_BLOCKS
    c1 = stream << 24 | draw << 16 | blocks
    return np.stack(philox(positions & MASK, c1, ordinals & MASK, ordinals >> 32 & MASK, key), -1)


def to_uniform(r: np.ndarray) -> np.ndarray:
    """Words to float32 in [0, 1): the upper 24 bits."""
    return (r >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def to_normal(r: np.ndarray) -> np.ndarray:
    """Words to float32 normals: magnitude from the lower 31 bits by table, sign from the top bit."""
    x = (r << np.uint32(1) | np.uint32(1)).astype(np.float32)
    segment = (x.view(np.uint32) >> np.uint32(23 - normal_table.MANTISSA_BITS)) - np.uint32(normal_table.FIRST_SEGMENT)
    c0, c1 = np.moveaxis(normal_table.load()[segment], -1, 0)
    return ((c0 + c1 * x).view(np.uint32) ^ (r & np.uint32(1 << 31))).view(np.float32)


def uniform(key: int, stream: Stream, ordinals, positions, *, draw=0, word=0) -> np.ndarray:
    """float32 [B, L] in [0, 1)."""
    return to_uniform(words(key, stream, ordinals, positions, draw=draw)[:, :, 0, word])


def integers(key: int, stream: Stream, ordinals, positions, n: int, *, draw=0, word=1) -> np.ndarray:
    """int64 [B, L] in [0, n)."""
    r = words(key, stream, ordinals, positions, draw=draw)[:, :, 0, word]
    return r.astype(np.int64) * n >> 32


def normal(key: int, ordinals, positions, channels: int, *, draw=0, first_channel=0) -> np.ndarray:
    """float32 [B, L, channels]."""
    num_blocks = (first_channel + channels + 3) // 4
    r = words(key, Stream.NORMAL, ordinals, positions, draw=draw, num_blocks=num_blocks)
    return to_normal(r).reshape(*r.shape[:2], -1)[..., first_channel : first_channel + channels]


def noised_tokens(
    key: int,
    tokens,
    ordinals,
    positions,
    *,
    mask_below=None,
    noise_below=None,
    mask_id=-1,
    num_tokens=0,
    keep=False,
    draw=0,
    word=0,
) -> tuple[np.ndarray, np.ndarray]:
    """Joint noising (`noising.py`) of tokens: x_t, int64 [B, L], and its kinds, uint8 [B, L]. Thresholds [B, L]."""
    u = uniform(key, Stream.TOKEN, ordinals, positions, draw=draw, word=word)
    noised, kind = np.array(tokens), np.zeros(np.shape(tokens), np.uint8)
    if noise_below is not None:
        drawn = integers(key, Stream.TOKEN, ordinals, positions, num_tokens, draw=draw)
        replaced = (u < noise_below) & ~np.asarray(keep)
        noised, kind = np.where(replaced, drawn + (drawn >= mask_id), noised), np.where(replaced, 2, kind)
    if mask_below is not None:
        masked = (u < mask_below) & ~np.asarray(keep)
        noised, kind = np.where(masked, mask_id, noised), np.where(masked, 1, kind)
    return noised, kind.astype(np.uint8)


def noised_latents(clean, eps, alpha, sigma) -> np.ndarray:
    """Joint noising of vectors [B, L, D], float32, with coefficients [B, L]: three roundings to float32."""
    alpha, sigma = (np.asarray(x, np.float32)[..., None] for x in (alpha, sigma))
    return alpha * np.asarray(clean, np.float32) + sigma * eps


def coins(key: int, ordinals, *, which: int, draw=0) -> np.ndarray:
    """float64 [B] in (0, 1)."""
    return (words(key, Stream.COIN, ordinals, [which], draw=draw)[:, 0, 0, 0] + 0.5) * 2.0**-32


def categorical(key: int, logits, ordinals, positions, *, draw=0) -> np.ndarray:
    """int64 [N]: the whole exponential race with 64-bit uniforms in float64, for logits [N, V]."""
    logits = np.asarray(logits, np.float64)
    positions, num_blocks = np.asarray(positions)[:, None], (logits.shape[1] + 3) // 4
    high, low = (
        words(k, Stream.CATEGORICAL, ordinals, positions, draw=draw, num_blocks=num_blocks)
        .reshape(len(logits), -1)[:, : logits.shape[1]]
        for k in (key, fold_key(key, LOW_WORDS))
    )  # fmt: skip
    with np.errstate(divide="ignore"):
        race = exponential(high, low) / np.exp(logits - logits.max(axis=1, keepdims=True))
    return race.argmin(axis=1)


def exponential(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """float64 -log(1 - v), v = (high * 2^32 + low + 1/2) / 2^64, taken from the nearer end so that no digit is lost."""
    upper_half = high >= 1 << 31
    high, low = np.where(upper_half, ~high, high), np.where(upper_half, ~low, low)
    nearer = (high * 2.0**32 + low + 0.5) * 2.0**-64
    return np.where(upper_half, -np.log(nearer), -np.log1p(-nearer))


def dropout_keep(key: int, ordinals, positions, channels: int, p: float, *, first_channel=0) -> np.ndarray:
    """bool [B, L, channels]: False with probability round(65536 p) / 65536."""
    r = words(key, Stream.DROPOUT, ordinals, positions, num_blocks=(first_channel + channels + 7) // 8)
    halves = np.stack([r & np.uint32(0xFFFF), r >> np.uint32(16)], -1).reshape(*r.shape[:2], -1)
    return halves[..., first_channel : first_channel + channels] >= round(p * 65536)


def initial_normal(key: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 standard normals of the given shape, keyed by a parameter's name and the flat index."""
    return to_normal(_initial_words(key, name, prod(shape), draw=0)).reshape(shape)


def initial_uniform(key: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 uniforms in [0, 1) of the given shape, keyed by a parameter's name and the flat index."""
    return to_uniform(_initial_words(key, name, prod(shape), draw=1)).reshape(shape)


def _initial_words(key: int, name: str, count: int, *, draw: int) -> np.ndarray:
    block = np.arange((count + 3) // 4)
    c1 = Stream.INIT << 24 | draw << 16
    return np.stack(philox(block & MASK, c1, block >> 32, 0, fold_key(key, name)), -1).reshape(-1)[:count]


def permutation(key: int, *fold: int | str, n: int) -> np.ndarray:
    """int64 [n]: a permutation of range(n); the words in `fold` are folded into the key."""
    block = np.arange((n + 1) // 2)
    r = philox(block & MASK, Stream.ORDER << 24, block >> 32, 0, fold_key(key, *fold))
    r0, r1, r2, r3 = (word.astype(np.int64) for word in r)
    ranks = np.stack([r1 << 32 | r0, r3 << 32 | r2], -1).reshape(-1)[:n]
    return np.argsort(ranks, stable=True)
