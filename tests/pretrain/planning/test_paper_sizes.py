"""The two large recipes, as `braid plan` shows them, against arithmetic written out by hand from their sizes.

Closed forms of the papers and of the blocks, that share nothing with the planner: it builds networks and counts.
"""

from __future__ import annotations

import argparse
import json
from math import ceil

import pytest

from braid.pretrain.planning.command import add_arguments, main

PEAK, LINK, CARD = 989e12, 450e9, 50e9  # of an H200: dense bf16 FLOP/s; bytes/s within a node and to other nodes
EFFICIENCY, LINK_SHARE, GIB = 0.45, 0.8, 2**30
TIME = 256  # features of a time


def plan(tmp_path, monkeypatch, *words):
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert main(parser.parse_intermixed_args([*words, "--json", "plan.json"])) == 0
    return json.loads((tmp_path / "plan.json").read_text())


def modulated_linear(inputs, outputs, cond):
    """Norm, shift and scale from the conditioning, linear layer with bias."""
    return inputs + 2 * inputs * (cond + 1) + outputs * (inputs + 1)


def head_bytes(positions, tokens, width, *, copied):
    """A chunk of logits in bf16, the gradients of what the head reads and of its weights, 8192 rows of the
    latter again, and the weights in bf16."""
    row = 64 * ceil(tokens / 64)
    chunk = min(positions, 2**26 // row) * row
    gradients = 2 * positions * width + 4 * tokens * width
    return 2 * chunk + gradients + 4 * min(tokens, 8192) * width + 2 * copied * tokens * width


def test_mdlm_70b_on_512(tmp_path, monkeypatch, capsys):
    found = plan(tmp_path, monkeypatch, "mdlm_70B", "--gpus", "512")
    W, F, H, C, L, V, layers = 8192, 4 * 8192, 64, 256, 4096, 128_257, 84
    t, p, v, d, m = 4, 4, 7, 32, 2048 // 32
    assert 512 == t * p * d and found["num_micro_batches"] == m == 64

    # Parameters: qkv, out and the MLP are divided by t; shift, scale and gate, norms and the last bias are not.
    divided, whole = 4 * W * W + 2 * W * F + F, W + 6 * W * (C + 1) + 2 * W
    time = TIME * C + C + C * C + C
    total = layers * (divided + whole) + V * W + modulated_linear(W, V, C) + time
    assert found["parameters"]["total"] == total
    rows = ceil(V / t)
    block = divided // t + whole
    first, last = 21 * block + time + rows * W, 21 * block + time + modulated_linear(W, rows, C)
    held = [first, 21 * block + time, 21 * block + time, last]
    assert [stage["memory"]["parameters"] for stage in found["stages"]] == held

    # Memory: weights of linear layers in bf16, but for times; all else in float32; gradients 4 bytes, and 4 + 8 + 4
    # divided by d (float32 copies of what is bf16, moments, average); activations as each operation leaves them;
    # (2 (p - 1 - i) + (v - 1) p + 1) / v micro-batches of the interleaved schedule in flight.
    of_block = (4 * W * W + 2 * W * F) // t + 6 * W * C
    matrices = [21 * of_block] * p
    matrices[-1] += 2 * W * C + rows * W
    kept = L * (14 * W + 4 * F + 4 * H) / t + L * (24 * W + 16) / t
    for i, stage in enumerate(found["stages"]):
        memory, weights = stage["memory"], 4 * held[i] - 2 * matrices[i]
        state = weights + 4 * held[i] + (4 * matrices[i] + 12 * held[i]) / d
        activations = 21 * kept * (2 * (p - 1 - i) + (v - 1) * p + 1) / v
        if i == p - 1:
            activations += L * (10 * W + 8) / t
        buffers = 4 * L * W * 4 / t
        assert sum(memory["held"].values()) == pytest.approx(state + buffers, rel=1e-6)
        assert memory["activations"] == pytest.approx(activations, rel=1e-6)
        peak = state + buffers + activations + (head_bytes(L, rows, W, copied=False) if i == p - 1 else 0)
        assert memory["total"] == pytest.approx(peak, rel=2e-3), "a block's gradient is left out here"
        assert peak < 0.92 * 141 * GIB

    # Traffic of the first stage. A block has two sums: a gather and a scatter forward, three of them backward.
    sent = {(each["kind"], each["operation"]): each["sent"] for each in found["stages"][0]["traffic"]}
    tensor = m * 21 * 2 * 5 * (L * W * 2) * (t - 1) / t
    assert sent["tensor", "gather, scatter"] == pytest.approx(tensor)
    assert sent["pipeline", "send, receive"] == pytest.approx(m * (2 * v - 1) * L * W * 4 / t)
    assert sent["gradients", "scatter"] == pytest.approx(4 * held[0] * (d - 1) / d)
    weights = 4 * held[0] - 2 * matrices[0]
    assert sent["weights", "gather"] == pytest.approx(weights * (d - 1) / d)

    # Time: the slowest stage, which has the head, and the others once. Sums within layers are waited for, and of
    # gradients and weights what takes longer than a micro-batch; two of their ring's members share a node.
    speed = t * EFFICIENCY * PEAK
    products = [21 * L * (6 * (4 * W * W + 2 * W * F) + 12 * W * L) / speed] * p
    products[-1] += L * 6 * V * W / 2 / speed  # half of the tokens are masked
    waits = tensor / m / (LINK_SHARE * LINK)
    rest = (4 * held[0] + weights) * (d - 1) / d / (LINK_SHARE * 2 * CARD) - products[0]
    step = m * (products[-1] + waits) + 3 * (products[0] + waits) / v + rest
    assert found["timing"]["step"] == pytest.approx(step, rel=2e-3), "conditioning is left out here"
    assert found["timing"]["bubble"] == pytest.approx((p - 1) / (v * m + p - 1))
    flops = 2048 * L * (layers * (6 * (4 * W * W + 2 * W * F) + 12 * W * L) + 6 * V * W / 2)
    assert found["timing"]["mfu"] == pytest.approx(flops / (step * 512 * PEAK), rel=2e-3)
    assert found["timing"]["total"] == pytest.approx(250_000 * step, rel=2e-3)
    assert found["checkpoint"]["total"] == 16 * total
    shown = capsys.readouterr().out
    for figure in (f"{peak_of(found) / GIB:.2f}", f"{tensor / GIB:.1f}", f"{step:.1f} s", "0.67% of the time"):
        assert figure in shown


def peak_of(found):
    return max(stage["memory"]["total"] for stage in found["stages"])


def test_ccdd_8b_on_64(tmp_path, monkeypatch, capsys):
    found = plan(tmp_path, monkeypatch, "ccdd_8B", "--gpus", "64")
    W, F, H, C, L, V, D, layers, d = 4096, 4 * 4096, 32, 256, 4096, 151_670, 32, 32, 64
    assert found["num_micro_batches"] == 1024 // d == 16
    block = 4 * W * W + 2 * W * F + F + W + 6 * W * (C + 1) + 2 * W
    ports = modulated_linear(W, V, C) + modulated_linear(D, W, C) + modulated_linear(W, D, C)
    total = layers * block + V * W + ports + TIME * C + C + C * C + C
    assert found["parameters"]["total"] == total

    memory = found["stages"][0]["memory"]
    matrices = layers * (4 * W * W + 2 * W * F + 6 * W * C)  # times stay float32
    matrices += 2 * W * C + V * W + 2 * D * C + D * W + 2 * W * C + D * W  # token head, latent input, latent head
    weights = 4 * total - 2 * matrices
    state = weights + 4 * total + (4 * matrices + 12 * total) / d
    assert sum(memory["held"].values()) == pytest.approx(state, rel=1e-6)
    activations = layers * L * (14 * W + 4 * F + 4 * H + 24 * W + 16)
    activations += L * (4 * W + 2 * (6 * W + 8))  # the last state, the norms and inputs of both heads
    assert memory["activations"] == pytest.approx(activations, rel=1e-6)
    peak = state + activations + head_bytes(L, V, W, copied=False)
    assert memory["total"] == pytest.approx(peak, rel=1e-6)

    sent = {each["kind"]: each for each in found["stages"][0]["traffic"]}
    assert sent["gradients"]["sent"] == pytest.approx(4 * total * (d - 1) / d)
    assert sent["weights"]["sent"] == pytest.approx(weights * (d - 1) / d)
    cards = LINK_SHARE * min(8 * CARD, LINK)
    assert sent["gradients"]["seconds"] == pytest.approx(4 * total * (d - 1) / d / cards)

    flops = layers * (6 * (4 * W * W + 2 * W * F) + 12 * W * L) + 6 * 2 * D * W + 6 * V * W / 2
    step = 1024 * L * flops / (64 * EFFICIENCY * PEAK)
    assert found["timing"]["step"] == pytest.approx(step, rel=1e-3), "conditioning is left out here"
    assert found["timing"]["exposed"] == 0 and found["timing"]["bubble"] == 0
    assert found["timing"]["mfu"] == pytest.approx(EFFICIENCY)
    shown = capsys.readouterr().out
    for figure in (f"{memory['total'] / GIB:.2f}", f"{step:.2f} s", f"{sent['gradients']['sent'] / GIB:.2f}"):
        assert figure in shown
