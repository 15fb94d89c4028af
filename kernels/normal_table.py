"""The table behind every Gaussian draw: a piecewise-linear inverse of the normal distribution function.

A 32-bit word r becomes x = float32((r << 1) | 1), an odd number (rounded, where it has more than 24 bits) in
[1, 2^32], whose tail probability is u = x / 2^33 in (0, 1/2]. The segments are (exponent of x, top 6 bits of its
mantissa): 32 * 64 of them, and one more for x = 2^32, which float32 may round up to. Inside a segment the magnitude is
c0 + c1 * x. So a draw costs one look-up, one multiplication and one addition, each rounded once, and has the same bits
on every IEEE machine.

`normal_table.inc` is the committed table, one `{c0, c1},` in hexadecimal floats per line: C++ includes it, Python
parses it. It is part of the noise contract and is never generated at build time; `python -m braid.kernels.normal_table`
prints it anew, and a test compares the two.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

MANTISSA_BITS = 6
NUM_SEGMENTS = (32 << MANTISSA_BITS) + 1
FIRST_SEGMENT = 127 << MANTISSA_BITS
"""Top bits (sign, exponent, 6 of the mantissa) of float32(1): what is subtracted to index the table."""

FILE = Path(__file__).with_name("normal_table.inc")
SAMPLES_PER_SEGMENT = 257


@cache
def load() -> np.ndarray:
    """float32 [2049, 2]: c0 and c1 of each segment, from the committed file."""
    rows = [line.strip(" {},\n").split(",") for line in FILE.read_text(encoding="ascii").splitlines()]
    table = np.array([[float.fromhex(number.strip().removesuffix("f")) for number in row] for row in rows], np.float32)
    assert table.shape == (NUM_SEGMENTS, 2), f"{FILE.name} is damaged: it holds {table.shape} numbers"
    return table


def generate() -> np.ndarray:
    """float32 [2049, 2]: the best linear fit (least maximum error) of the normal quantile over each segment."""
    table = np.zeros((NUM_SEGMENTS, 2), np.float32)
    for segment in range(NUM_SEGMENTS - 1):
        exponent, mantissa = divmod(segment, 1 << MANTISSA_BITS)
        low = 2.0**exponent * (1 + mantissa / 2**MANTISSA_BITS)
        high = low + 2.0 ** (exponent - MANTISSA_BITS)
        table[segment] = _fit(_odd_numbers(low, high))
    return table  # the last segment is x = 2^32, u = 1/2: z = 0


def _odd_numbers(low: float, high: float) -> np.ndarray:
    """The odd integers of [low, high), thinned out evenly, both ends kept."""
    first = int(np.ceil(low)) | 1
    last = (int(np.ceil(high)) - 2) | 1
    if first > last:
        return np.empty(0)
    count = min(SAMPLES_PER_SEGMENT, (last - first) // 2 + 1)
    return np.linspace(first, last, count)


def _fit(x: np.ndarray) -> tuple[np.float32, np.float32]:
    """The quantile is convex in x here, so the best slope is the secant's and the best offset halves the error."""
    from scipy.special import ndtri

    if not x.size:
        return np.float32(0), np.float32(0)  # no odd number falls here: never looked up
    z = -ndtri(x * 2.0**-33)
    slope = np.float32((z[-1] - z[0]) / (x[-1] - x[0]) if x.size > 1 else 0.0)
    residual = z - float(slope) * x
    return np.float32((residual.max() + residual.min()) / 2), slope


def render(table: np.ndarray) -> str:
    """The text of `normal_table.inc`."""
    return "".join(f"{{{_hexadecimal(c0)}, {_hexadecimal(c1)}}},\n" for c0, c1 in table)


def _hexadecimal(number: np.float32) -> str:
    """A C literal: 0x1.8p+1f, without the trailing zeros of float.hex."""
    mantissa, exponent = float(number).hex().split("p")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{mantissa if not mantissa.endswith('x') else mantissa + '0'}p{exponent}f"


if __name__ == "__main__":
    print(render(generate()), end="")
