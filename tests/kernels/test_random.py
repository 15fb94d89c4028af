"""torch's draws: the bits of the NumPy reference, frozen, and the same however the work is cut."""

import hashlib

import numpy as np
import pytest
import torch

from braid.kernels import random, reference
from braid.kernels.errors import BraidError
from braid.kernels.random import Stream

KEY = 0x9E3779B97F4A7C15
FAR = 2**40
ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [  # Random123's kat_vectors, philox4x32 10: counter, key words, output
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def bits(values) -> np.ndarray:
    """As unsigned integers, so that -0.0 and 0.0 differ."""
    values = np.ascontiguousarray(values)
    return values.view(f"u{values.dtype.itemsize}")


def assert_same_bits(ours, expected):
    ours = ours.numpy() if isinstance(ours, torch.Tensor) else ours
    assert ours.shape == expected.shape and ours.dtype.itemsize == expected.dtype.itemsize
    assert np.array_equal(bits(ours), bits(expected))


def sample(rng, rows, length, by_row):
    """Ordinals on both sides of 2^32 and near 2^40, positions up to 2^32 - 1."""
    ordinals = np.concatenate([rng.integers(0, 2**33, rows - rows // 2), FAR + rng.integers(-9, 9, rows // 2)])
    return ordinals, rng.integers(0, 2**32, (rows, length) if by_row else length)


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    key = key[1] << 32 | key[0]
    assert tuple(int(word) for word in random.philox(*map(torch.tensor, counter), key)) == expected
    assert tuple(int(word) for word in reference.philox(*counter, key)) == expected
    assert reference._philox_of_ints(*counter, key) == expected


@pytest.mark.parametrize("seed", range(8))
def test_every_kind_of_draw_has_the_bits_of_the_reference(seed):
    rng = np.random.default_rng(seed)
    key = int(rng.integers(0, 2**64, dtype=np.uint64))
    rows, length, width, first = (int(rng.integers(low, high)) for low, high in [(1, 6), (1, 9), (1, 40), (0, 300)])
    ordinals, positions = sample(rng, rows, length, by_row=bool(seed % 2))
    o, p = torch.from_numpy(ordinals), torch.from_numpy(positions)
    draw, word = int(rng.integers(256)), int(rng.integers(4))
    stream = Stream(int(rng.integers(1, 9)))

    options = dict(draw=draw, first_block=first, num_blocks=width)
    expected = reference.words(key, stream, ordinals, positions, **options)
    assert np.array_equal(random.words(key, stream, o, p, **options).numpy(), expected)
    options = dict(draw=draw, word=word)
    assert_same_bits(
        random.uniform(key, stream, o, p, **options), reference.uniform(key, stream, ordinals, positions, **options)
    )
    drawn = random.integers(key, stream, o, p, 50257, **options)
    assert_same_bits(drawn, reference.integers(key, stream, ordinals, positions, 50257, **options))
    options = dict(draw=draw, first_channel=first)
    assert_same_bits(
        random.normal(key, o, p, width, **options), reference.normal(key, ordinals, positions, width, **options)
    )
    options = dict(p=0.1 + 0.1 * seed, first_channel=first)
    drawn = random.dropout_keep(key, o, p, width, **options)
    assert_same_bits(drawn, reference.dropout_keep(key, ordinals, positions, width, **options))
    assert_same_bits(random.coins(key, o, which=seed, draw=draw), reference.coins(key, ordinals, which=seed, draw=draw))
    shape = (rows, length, width)
    assert_same_bits(random.initial_normal(key, "block.0", shape), reference.initial_normal(key, "block.0", shape))
    assert_same_bits(random.initial_uniform(key, "block.0", shape), reference.initial_uniform(key, "block.0", shape))
    n = rows * length * width
    assert_same_bits(random.permutation(key, "step", seed, n=n), reference.permutation(key, "step", seed, n=n))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("vocab_size", [1, 3, 257, 5001])
def test_categorical_is_the_reference_race(dtype, vocab_size):
    rows = 200
    rng = np.random.default_rng(vocab_size)
    ordinals, positions = sample(rng, rows, rows, by_row=False)
    logits = torch.from_numpy(rng.normal(0, 4, (rows, vocab_size))).to(dtype)
    before = logits.clone()
    tokens = random.categorical(KEY, logits, torch.from_numpy(ordinals), torch.from_numpy(positions), draw=2)
    expected = reference.categorical(KEY, logits.double().numpy(), ordinals, positions, draw=2)
    assert_same_bits(tokens, expected)
    assert torch.equal(logits, before)


def test_categorical_decides_close_races_by_the_lower_words(monkeypatch):
    """Upper words cut to 12 bits leave almost every race among 5000 equals a draw that the lower words decide."""
    rows, vocab_size = 64, 5000
    numbers, logits = np.arange(rows), np.zeros((rows, vocab_size))

    def coarse(words, upper_key):
        def cut(key, *arguments, **options):
            drawn = words(key, *arguments, **options)
            return drawn & 0xFFF00000 if key == upper_key else drawn

        return cut

    monkeypatch.setattr(random, "words", coarse(random.words, KEY))
    monkeypatch.setattr(reference, "words", coarse(reference.words, KEY))
    o = torch.arange(rows)
    tokens = random.categorical(KEY, torch.from_numpy(logits), o, o)
    assert_same_bits(tokens, reference.categorical(KEY, logits, numbers, numbers))
    high = random.words(KEY, Stream.CATEGORICAL, o, o[:, None], num_blocks=vocab_size // 4).flatten(1)
    tied = (high == high.amin(dim=1, keepdim=True)).sum(dim=1)
    assert (tied > 1).sum() > 20 and (tokens != high.argmin(dim=1)).sum() > 10


def test_categorical_never_draws_what_is_excluded():
    logits = torch.full((500, 33), -torch.inf)
    logits[torch.arange(500), torch.arange(500) % 33] = -1e30
    rows = torch.arange(500)
    assert torch.equal(random.categorical(KEY, logits, rows, rows), rows % 33)
    logits = torch.zeros(2000, 9).masked_fill_(torch.tensor([1, 0, 0, 1, 0, 1, 0, 0, 1]).bool(), -torch.inf)
    rows = torch.arange(2000)
    assert random.categorical(KEY, logits, rows, rows).unique().tolist() == [1, 2, 4, 6, 7]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_categorical_refuses_rows_without_a_distribution(bad):
    logits = torch.zeros(3, 5)
    logits[1] = bad
    with pytest.raises(BraidError, match="cannot draw a token"):
        random.categorical(KEY, logits, torch.arange(3), torch.arange(3))


def test_categorical_refuses_a_vocabulary_beyond_the_counter():
    row = torch.zeros(1, dtype=torch.int64)
    largest = torch.full((1, 262_144), -torch.inf)
    largest[0, -1] = 0
    assert random.categorical(KEY, largest, row, row).item() == 262_143
    with pytest.raises(BraidError, match="too large"):
        random.categorical(KEY, torch.zeros(1, 262_145), row, row)


def digest(values) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]


CONTRACT_1 = {
    "words": "a8ed218b3ed9b494",
    "uniform": "3542bd5da43093a7",
    "integers": "4220877218491b0b",
    "normal": "dc106f5684929252",
    "coins": "9cd10c72ae0f5655",
    "categorical": "0fdb2257abd02062",
    "dropout_keep": "59a66f1e9af8353c",
    "initial_normal": "c127b684bd8beb62",
    "initial_uniform": "1052da49c8dc1dc9",
    "permutation": "73516fb57ea5305b",
    "fold_key": "9cea10ff1e31e3b3",
}


@pytest.mark.parametrize("implementation", [random, reference])
def test_contract_1_is_frozen(implementation):
    """If this fails, checkpoints of older versions no longer resume with the noise they began with."""
    numpy = implementation is reference
    convert = (lambda a: np.asarray(a)) if numpy else (lambda a: torch.as_tensor(np.asarray(a)))
    o, p = convert([0, 1, FAR + 5]), convert([0, 1, 1023, 2**31, 2**32 - 1])
    logits = np.sin(np.arange(3 * 1000).reshape(3, 1000) ** 1.5) * 5
    k = implementation.fold_key(KEY, "golden", 17)
    drawn = {
        "words": implementation.words(k, Stream.TOKEN, o, p, draw=255, first_block=65535),
        "uniform": implementation.uniform(k, Stream.TOKEN, o, p, draw=3, word=0),
        "integers": implementation.integers(k, Stream.TOKEN, o, p, 50257),
        "normal": implementation.normal(k, o, p, 37, draw=1, first_channel=2),
        "coins": implementation.coins(k, o, which=4, draw=5),
        "categorical": implementation.categorical(k, convert(logits), o, p[:3]),
        "dropout_keep": implementation.dropout_keep(k, o, p, 61, 0.25),
        "initial_normal": implementation.initial_normal(k, "blocks.3.attention.weight", (7, 13)),
        "initial_uniform": implementation.initial_uniform(k, "blocks.3.attention.weight", (7, 13)),
        "permutation": implementation.permutation(k, "epoch", 2, n=99),
        "fold_key": np.array([k], np.uint64),
    }
    drawn["words"] = np.asarray(drawn["words"]).astype(np.uint32)
    assert implementation.CONTRACT_VERSION == 1
    assert {name: digest(values) for name, values in drawn.items()} == CONTRACT_1


def test_a_draw_does_not_depend_on_how_the_work_is_cut():
    o, p = torch.arange(FAR, FAR + 12), torch.arange(64)
    z = random.normal(KEY, o, p, 48)
    assert torch.equal(z, torch.cat([random.normal(KEY, part, p, 48) for part in o.split([1, 4, 7])])), "micro-batches"
    assert torch.equal(z, torch.cat([random.normal(KEY, o, part, 48) for part in p.split(16)], 1)), "sequence shards"
    for widths in ([16, 32], [1, 2, 45], [5, 40, 3]):
        starts = np.cumsum([0, *widths[:-1]]).tolist()
        shards = [random.normal(KEY, o, p, w, first_channel=s) for s, w in zip(starts, widths, strict=True)]
        assert torch.equal(z, torch.cat(shards, -1)), "channel shards"
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(z[shuffled], random.normal(KEY, o[shuffled], p, 48)), "another order of the samples"
    by_row = torch.stack([p.roll(i) for i in range(12)])
    rolled = torch.stack([z[i].roll(i, 0) for i in range(12)])
    assert torch.equal(rolled, random.normal(KEY, o, by_row, 48)), "positions of each row"

    keep = random.dropout_keep(KEY, o, p, 48, 0.3)
    parts = [random.dropout_keep(KEY, o, p, w, 0.3, first_channel=s) for s, w in [(0, 11), (11, 5), (16, 32)]]
    assert torch.equal(keep, torch.cat(parts, -1))

    logits = torch.randn(24, 130, generator=torch.Generator().manual_seed(1)).repeat_interleave(64, 0)
    rows, columns = torch.arange(FAR, FAR + 24).repeat_interleave(64), torch.arange(64).repeat(24)
    tokens = random.categorical(KEY, logits, rows, columns)
    for size in (1, 7, 500):
        chosen = slice(3, 3 + size)
        assert torch.equal(tokens[chosen], random.categorical(KEY, logits[chosen], rows[chosen], columns[chosen]))


def test_a_draw_does_not_depend_on_internal_chunks(monkeypatch):
    o, p = torch.arange(7), torch.arange(33)
    logits = torch.randn(7, 301, generator=torch.Generator().manual_seed(0))

    def draw_all():
        return [
            random.normal(KEY, o, p, 22),
            random.dropout_keep(KEY, o, p, 22, 0.5),
            random.initial_normal(KEY, "w", (31, 7)),
            random.categorical(KEY, logits, o, p[:7]),
        ]

    whole = draw_all()
    for chunk in (1, 5, 64):
        monkeypatch.setattr(random, "CPU_CHUNK", chunk)
        assert all(torch.equal(a, b) for a, b in zip(whole, draw_all(), strict=True))


def test_a_larger_initialisation_begins_like_a_smaller_one():
    """The flat index is the counter, so a vocabulary padded at its end keeps its rows."""
    assert torch.equal(random.initial_normal(KEY, "w", (5, 6)), random.initial_normal(KEY, "w", (9, 6))[:5])


def test_defaults_of_torch_do_not_reach_the_draws():
    """A model is often built under another default type, or on the meta device."""
    expected = [
        random.initial_normal(KEY, "w", (5, 6)),
        random.permutation(KEY, n=9),
        random.coins(KEY, torch.arange(3), which=0),
    ]
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            drawn = [random.initial_normal(KEY, "w", (5, 6)), random.permutation(KEY, n=9)]
        drawn.append(random.coins(KEY, torch.arange(3), which=0))
        z = random.normal(KEY, torch.arange(2), torch.arange(2), 4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert z.dtype == torch.float32
    for ours, plain in zip(drawn, expected, strict=True):
        assert_same_bits(ours, plain.numpy())


def test_impossible_arguments_are_refused():
    o = p = torch.arange(2)
    for call in (
        lambda: random.words(KEY, Stream.TOKEN, o, p, draw=256),
        lambda: random.words(KEY, Stream.TOKEN, o, p, first_block=65536),
        lambda: random.words(-1, Stream.TOKEN, o, p),
        lambda: random.dropout_keep(KEY, o, p, 4, 1.0),
    ):
        with pytest.raises(AssertionError):
            call()


def test_a_compiler_does_not_see_the_two_roundings():
    """Inside torch.compile a normal is drawn by the eager kernels: fused into one rounding it would have other bits."""
    o, p, x = torch.arange(3), torch.arange(5), torch.ones(3, 5, 8)
    captured = []

    def capture(graph, _):
        captured.append(graph.code)
        return graph.forward

    def noised(x):
        return x * 2 + random.normal(KEY, o, p, 8)

    assert torch.equal(torch.compile(noised, backend=capture)(x), noised(x))
    assert captured and not any("index_select" in code for code in captured)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_draws_the_bits_of_the_cpu():
    o, p = torch.arange(FAR - 3, FAR + 5), torch.arange(1000)
    gpu = dict(o=o.cuda(), p=p.cuda())
    assert torch.equal(random.normal(KEY, o, p, 129), random.normal(KEY, gpu["o"], gpu["p"], 129).cpu())
    for draw in (random.words, random.uniform):
        assert torch.equal(draw(KEY, Stream.TOKEN, o, p), draw(KEY, Stream.TOKEN, gpu["o"], gpu["p"]).cpu())
    keep = random.dropout_keep(KEY, gpu["o"], gpu["p"], 129, 0.1).cpu()
    assert torch.equal(random.dropout_keep(KEY, o, p, 129, 0.1), keep)
    assert torch.equal(random.coins(KEY, o, which=1), random.coins(KEY, gpu["o"], which=1).cpu())
    logits = torch.randn(8, 50304, generator=torch.Generator().manual_seed(0))
    tokens = random.categorical(KEY, logits.cuda(), gpu["o"], gpu["p"][:8]).cpu()
    assert torch.equal(tokens, random.categorical(KEY, logits, o, p[:8]))
