"""Counter-based random numbers: a draw is a pure function of (key, stream, draw, sample ordinal, position, channel).

So noise is the same whatever the batching, the layout, the order of computation and the device, nothing of it needs to
be stored, and any part of it can be drawn alone. torch on any device, bit for bit equal to `reference.py` (NumPy).

The contract, version 1
-----------------------
Generator   Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): 128-bit counter
            (c0, c1, c2, c3) and 64-bit key to four 32-bit words.
Counter     c0 = position modulo 2^32                       position of the token in its row, not in its shard
            c1 = stream << 24 | draw << 16 | block          8, 8 and 16 bits
            c2, c3 = lower and upper half of the ordinal    the sample's place in the endless global training order
            `draw` counts repetitions (Monte-Carlo draws of one sample), `block` four channels (or four vocabulary
            entries, or eight dropout elements).
Key         the run's seed. What the counter has no room for (layer, sampler step, parameter name, ...) is folded into
            the key: `fold_key(key, word)` = Philox(counter (word_lo, word_hi, is_str, 0x62726169), key), first two
            words, the first one low; a str word is the xxh3_64 of its UTF-8 bytes.
Streams     TOKEN 1, NORMAL 2, TIME 3, CATEGORICAL 4, DROPOUT 5, COIN 6, INIT 7, ORDER 8.

Numbers from words r in [0, 2^32); block 0 where none is named
uniform     float32 (r >> 8) * 2^-24, in [0, 1). By convention word 0 of TOKEN decides whether a token is corrupted.
integer     (r * n) >> 32, in [0, n). By convention word 1 of TOKEN is the replacement of a corrupted token.
normal      channel c is word c % 4 of block c / 4. x = float32((r << 1 | 1) mod 2^32),
            segment = (bits(x) >> 17) - (127 << 6), z = c0[segment] + c1[segment] * x with the product and the sum
            each rounded to float32 (no fused multiply-add), and the top bit of r flips the sign. The table is
            `normal_table.inc`; largest value 6.34, largest distance to the exact quantile 6.6e-6.
coin        float64 (r + 1/2) * 2^-32 of word 0, position = which coin: one number for a whole sequence.
categorical token id i has the 64-bit uniform v = (h * 2^32 + l + 1/2) * 2^-64: h is word i % 4 of block i / 4 under the
            key, l the same word under fold_key(key, "categorical: low words"). The token with the least
            -log(1 - v) / p wins, p = exp(logit - largest logit), in float64.
dropout     element c is 16 bits: half c % 2 (lower first) of word (c % 8) / 2 of block c / 8; dropped if less than
            round(65536 p), so p has a granularity of 2^-16.
initial     flat element i of a parameter: word i % 4 of block b = i / 4, with b in (position, ordinal) as
            (b mod 2^32, b >> 32), key folded with the parameter's name, draw 0 for normals and 1 for uniforms.
order       element i is ranked by a signed 64-bit integer: words (1, 0) or (3, 2), upper half first, as i is even or
            odd, of block i / 2, which sits in (position, ordinal) as above; key folded with what names the
            permutation; ties keep their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from math import prod

import torch
from torch import Tensor

from braid.kernels import normal_table, normals
from braid.kernels.errors import BraidError
from braid.kernels.reference import (
    CONTRACT_VERSION,
    KEY_INCREMENTS,
    LOW_WORDS,
    MASK,
    MAX_BLOCKS,
    MAX_DRAWS,
    MULTIPLIERS,
    NUM_ROUNDS,
    Stream,
    fold_key,
)

__all__ = [
    "CONTRACT_VERSION", "Stream", "categorical", "coins", "dropout_keep", "fold_key", "initial_normal",
    "initial_uniform", "integers", "normal", "permutation", "philox", "uniform", "words",
]  # fmt: skip

CPU_CHUNK = 1 << 15
"""Philox blocks drawn at a time by one CPU thread: the half dozen int64 temporaries stay in its cache."""

DEVICE_CHUNK = 1 << 21
"""Philox blocks drawn at a time on an accelerator: temporaries of a few hundred MB, and few launches."""


def philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, key: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of int64 counter words in [0, 2^32), broadcast against each other; int64 words in [0, 2^32).

    Operands keep their own shapes until the rounds mix them: with position, block and ordinal on three axes the first
    two rounds cost next to nothing. After four rounds every word depends on all of the counter, so all have the full
    shape, and the rest runs in the buffers at hand (fresh ones would cost a third more, in page faults).
    int64 products wrap modulo 2^64, so both their halves are right once the sign that >> extends is masked away; lower
    halves are masked only after they are mixed in.
    """
    assert 0 <= key < 1 << 64, f"a key has 64 unsigned bits: {key}"
    k0, k1 = key & MASK, key >> 32
    spare0 = spare1 = None
    for number in range(NUM_ROUNDS):
        full = number >= 4
        p0 = torch.mul(c0, MULTIPLIERS[0], out=spare0)
        p1 = torch.mul(c2, MULTIPLIERS[1], out=spare1)
        mixed0 = _mix(p1, c1, k0, out=c2 if full else None)
        mixed1 = _mix(p0, c3, k1, out=c0 if full else None)
        if full:
            spare0, spare1 = c1, c3
        c0, c1, c2, c3 = mixed0, p1, mixed1, p0
        k0, k1 = (k0 + KEY_INCREMENTS[0]) & MASK, (k1 + KEY_INCREMENTS[1]) & MASK
    return c0, c1.bitwise_and_(MASK), c2, c3.bitwise_and_(MASK)


def _mix(product: Tensor, word: Tensor, key_word: int, out: Tensor | None) -> Tensor:
    high = torch.bitwise_right_shift(product, 32, out=out)
    return torch.bitwise_xor(high, word, out=out).bitwise_xor_(key_word).bitwise_and_(MASK)


def _draw(
    key: int, stream: Stream, ordinals: Tensor, positions: Tensor, draw: int, first_block: int, num_blocks: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words, each int64 [B, L, num_blocks]."""
    assert 0 <= draw < MAX_DRAWS, f"draw has 8 bits: {draw}"
    assert 0 <= first_block and first_block + num_blocks <= MAX_BLOCKS, "block has 16 bits"
    blocks = torch.arange(first_block, first_block + num_blocks, device=ordinals.device) | stream << 24 | draw << 16
    ordinals = ordinals[:, None, None]
    return philox(positions[..., None] & MASK, blocks, ordinals & MASK, ordinals >> 32 & MASK, key)


def words(
    key: int,
    stream: Stream,
    ordinals: Tensor,
    positions: Tensor,
    *,
    draw: int = 0,
    first_block: int = 0,
    num_blocks: int = 1,
) -> Tensor:
    """Raw words in [0, 2^32), int64 [B, L, num_blocks, 4], for ordinals int64 [B] and positions int64 [L] or [B, L]."""
    return torch.stack(_draw(key, stream, ordinals, positions, draw, first_block, num_blocks), -1)


def uniform(key: int, stream: Stream, ordinals: Tensor, positions: Tensor, *, draw: int = 0, word: int = 0) -> Tensor:
    """float32 [B, L] in [0, 1), a multiple of 2^-24; `word` 0 to 3 are independent."""
    return _to_uniform(_draw(key, stream, ordinals, positions, draw, 0, 1)[word].squeeze(-1))


def integers(
    key: int, stream: Stream, ordinals: Tensor, positions: Tensor, n: int, *, draw: int = 0, word: int = 1
) -> Tensor:
    """int64 [B, L] in [0, n), n < 2^31; a value's probability is off by a factor of at most 1 + n / 2^32."""
    assert 0 < n < 1 << 31
    return _draw(key, stream, ordinals, positions, draw, 0, 1)[word].squeeze(-1) * n >> 32


def normal(
    key: int | Tensor, ordinals: Tensor, positions: Tensor, channels: int, *, draw: int = 0, first_channel: int = 0
) -> Tensor:
    """Standard normals, float32 [B, L, channels]; a shard of the channels passes the first one it holds."""
    assert 0 <= draw < MAX_DRAWS, f"draw has 8 bits: {draw}"
    assert 0 <= first_channel and first_channel + channels <= 4 * MAX_BLOCKS, "block has 16 bits"
    return torch.ops.braid.normal(normals.as_key(key), ordinals, positions, channels, first_channel, draw)


def normals_into(out: Tensor, key: Tensor, ordinals: Tensor, positions: Tensor, first_channel: int, draw: int) -> None:
    """The eager implementation of `normal` (see `dispatch`): fills `out`."""
    first_block, skipped = divmod(first_channel, 4)
    rows, length, channels = out.shape
    num_blocks = (skipped + channels + 3) // 4
    z = torch.empty(rows, length, num_blocks, 4, dtype=torch.float32, device=ordinals.device)
    seed = normals.as_int(key)
    for row, column in _tiles(rows, length, num_blocks, ordinals.device):
        part = _part(positions, row, column)
        drawn = _draw(seed, Stream.NORMAL, ordinals[row], part, draw, first_block, num_blocks)
        for word, r in enumerate(drawn):
            z[row, column, :, word] = _to_normal(r)
    out.copy_(z.view(rows, length, -1)[..., skipped : skipped + channels])


def coins(key: int, ordinals: Tensor, *, which: int, draw: int = 0) -> Tensor:
    """One number per sequence, float64 [B] in (0, 1); `which` tells a sequence's coins apart."""
    position = torch.tensor([which], device=ordinals.device)
    return (_draw(key, Stream.COIN, ordinals, position, draw, 0, 1)[0].flatten().double() + 0.5) * 2.0**-32


def categorical(key: int, logits: Tensor, ordinals: Tensor, positions: Tensor, *, draw: int = 0) -> Tensor:
    """Token ids int64 [N] from softmax(logits), for logits [N, V], ordinals int64 [N] and positions int64 [N].

    Exact: an exponential race (argmin E / p, the same as argmax of logit plus Gumbel noise) whose uniforms have 64 bits
    and full relative precision at both ends, decided in float64. Rare tokens are neither lost nor favoured: the grid
    near 0 is 2^-64, so even p = 1e-15 is right to four digits; -inf never wins; a tie needs some 50 equal bits. Every
    row is drawn by itself, so the result depends neither on the batch nor on the device, unless the two best tokens
    agree to 15 digits.

    Raises BraidError if V > 262,144 or if a row has NaN, +inf or nothing but -inf.
    """
    num_rows, vocab_size = logits.shape
    check_vocabulary_size(vocab_size)
    logits = logits.detach()
    tokens = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    for rows, _ in _tiles(num_rows, 1, (vocab_size + 3) // 4, logits.device):
        tokens[rows] = _race(key, logits[rows].double(), ordinals[rows], positions[rows], draw)
    return tokens


def check_vocabulary_size(vocab_size: int) -> None:
    """Raises BraidError where a token's block has no room in the counter."""
    if vocab_size > 4 * MAX_BLOCKS:
        raise BraidError(
            "the vocabulary is too large for the noise contract's counter",
            found=f"{vocab_size} entries",
            change=f"use a tokenizer of at most {4 * MAX_BLOCKS} entries",
        )


def no_distribution(largest: float) -> BraidError:
    """What to raise for a row of logits with NaN, +inf or nothing but -inf."""
    return BraidError("cannot draw a token from these logits", found=f"a row whose largest is {largest}")


def _race(key: int, logits: Tensor, ordinals: Tensor, positions: Tensor, draw: int) -> Tensor:
    """Decide by the upper words where they suffice, and draw the lower words only for tokens that could still win."""
    largest = logits.amax(dim=1, keepdim=True)
    if not largest.isfinite().all():
        row = int((~largest.isfinite()).flatten().nonzero()[0])
        raise no_distribution(float(largest[row]))
    probability = (logits - largest).exp_()
    num_blocks = (logits.shape[1] + 3) // 4
    high = words(key, Stream.CATEGORICAL, ordinals, positions[:, None], draw=draw, num_blocks=num_blocks)
    high = high.flatten(1)[:, : logits.shape[1]]
    # As if all lower words were ones: no token finishes later than this. Away from both ends of the 32 bits the lower
    # words change a time by a factor below 1 + 2^-10; the 2048 values at the ends are always looked at.
    latest = (high + 1).double().mul_(-(2.0**-32)).log1p_().neg_().div_(probability)
    may_win = (latest <= latest.amin(dim=1, keepdim=True) * (1 + 2.0**-9)) | ((high + 1024) & MASK < 2048)
    row, token = may_win.logical_and_(probability > 0).nonzero(as_tuple=True)
    block = token >> 2 | Stream.CATEGORICAL << 24 | draw << 16
    ordinal = ordinals[row]
    low = philox(positions[row] & MASK, block, ordinal & MASK, ordinal >> 32 & MASK, fold_key(key, LOW_WORDS))
    low = torch.stack(low, -1).gather(1, (token & 3)[:, None])[:, 0]
    exact = latest.fill_(torch.inf)
    exact[row, token] = _exponential(high[row, token], low) / probability[row, token]
    return exact.argmin(dim=1)


def _exponential(high: Tensor, low: Tensor) -> Tensor:
    """float64 -log(1 - v), v = (high * 2^32 + low + 1/2) / 2^64, taken from the nearer end so that no digit is lost."""
    upper_half = high >= 1 << 31
    high, low = torch.where(upper_half, MASK - high, high), torch.where(upper_half, MASK - low, low)
    nearer = (high.double() * 2.0**32 + low + 0.5) * 2.0**-64
    return torch.where(upper_half, -nearer.log(), -(-nearer).log1p())


def dropout_keep(
    key: int, ordinals: Tensor, positions: Tensor, channels: int, p: float, *, first_channel: int = 0
) -> Tensor:
    """What dropout keeps, bool [B, L, channels]; `p` is rounded to a multiple of 2^-16. Fold the layer into the key."""
    assert 0 <= p < 1, f"a dropout probability lies in [0, 1): {p}"
    first_block, skipped = divmod(first_channel, 8)
    num_blocks = (skipped + channels + 7) // 8
    threshold = round(p * 65536)
    rows, length = len(ordinals), positions.shape[-1]
    keep = torch.empty(rows, length, num_blocks, 4, 2, dtype=torch.bool, device=ordinals.device)
    for row, column in _tiles(rows, length, num_blocks, ordinals.device):
        drawn = _draw(key, Stream.DROPOUT, ordinals[row], _part(positions, row, column), 0, first_block, num_blocks)
        for word, r in enumerate(drawn):
            keep[row, column, :, word, 0] = r & 0xFFFF >= threshold
            keep[row, column, :, word, 1] = r >> 16 >= threshold
    return keep.view(rows, length, -1)[..., skipped : skipped + channels].contiguous()


def initial_normal(key: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """Standard normals for the parameter `name`, float32 on the CPU, in its whole shape (a shard slices it)."""
    return _initial(key, name, shape, 0, _to_normal)


def initial_uniform(key: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """Uniforms in [0, 1) for the parameter `name`, float32 on the CPU, in its whole shape."""
    return _initial(key, name, shape, 1, _to_uniform)


def _initial(key: int, name: str, shape: tuple[int, ...], draw: int, convert: Callable[[Tensor], Tensor]) -> Tensor:
    count = prod(shape)
    num_blocks = (count + 3) // 4
    values = torch.empty(num_blocks, 4, dtype=torch.float32, device="cpu")
    key = fold_key(key, name)
    for start in range(0, num_blocks, CPU_CHUNK):
        stop = min(start + CPU_CHUNK, num_blocks)
        for word, r in enumerate(_flat(key, Stream.INIT, draw, start, stop)):
            values[start:stop, word] = convert(r)
    return values.flatten()[:count].view(shape)


def permutation(key: int, *fold: int | str, n: int) -> Tensor:
    """A random permutation of range(n), int64 [n] on the CPU; the words in `fold` (a step, an epoch) name it."""
    r0, r1, r2, r3 = _flat(fold_key(key, *fold), Stream.ORDER, 0, 0, (n + 1) // 2)
    ranks = torch.stack([r1 << 32 | r0, r3 << 32 | r2], -1).flatten()[:n]
    return ranks.argsort(stable=True)


def _flat(key: int, stream: Stream, draw: int, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The words of blocks start to stop, which may pass 2^16: their number takes the place of position and ordinal."""
    block = torch.arange(start, stop, device="cpu")
    upper, none = torch.tensor([stream << 24 | draw << 16, 0], device="cpu")
    return philox(block & MASK, upper, block >> 32, none, key)


def _to_uniform(r: Tensor) -> Tensor:
    return (r >> 8).float().mul_(2.0**-24)


@cache
def _normal_table(device: torch.device) -> tuple[Tensor, Tensor]:
    """c0 and c1, each padded in front so that the top bits of x index it without a subtraction."""
    table = torch.from_numpy(normal_table.load()).to(device)
    padded = torch.cat([table.new_zeros(normal_table.FIRST_SEGMENT, 2), table])
    return padded[:, 0].contiguous(), padded[:, 1].contiguous()


def _to_normal(r: Tensor) -> Tensor:
    """Uses up r."""
    # A compiler may fuse the product and the sum into one rounding. This makes torch.compile leave the function alone.
    assert not torch.compiler.is_compiling()
    c0, c1 = _normal_table(r.device)
    sign = r.int().bitwise_and_(-(1 << 31))
    x = r.bitwise_left_shift_(1).bitwise_or_(1).bitwise_and_(MASK).float()
    segment = (x.view(torch.int32) >> 23 - normal_table.MANTISSA_BITS).flatten()
    z = c1.index_select(0, segment).view_as(x).mul_(x).add_(c0.index_select(0, segment).view_as(x))
    z.view(torch.int32).bitwise_xor_(sign)
    return z


def _tiles(rows: int, length: int, num_blocks: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Cut [rows, length, num_blocks] into (rows, columns) pieces of bounded size."""
    chunk = CPU_CHUNK * torch.get_num_threads() if device.type == "cpu" else DEVICE_CHUNK
    columns = max(1, min(length, chunk // max(1, num_blocks)))
    height = max(1, chunk // max(1, columns * num_blocks))
    for top in range(0, rows, height):
        for left in range(0, length, columns):
            yield slice(top, top + height), slice(left, left + columns)


def _part(positions: Tensor, row: slice, column: slice) -> Tensor:
    return positions[column] if positions.ndim == 1 else positions[row, column]
