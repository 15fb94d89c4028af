"""Shards and regions by themselves, and divided layers beside torch's own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_bodies import layers_beside_torch, regions, shared_gradients
from tensor_cases import CASES, build
from torch import nn

from braid.kernels.errors import ConfigError
from braid.parallel.layers import ALONE, Region, Shard, set_whole, whole_shape
from braid.parallel.mesh import Axis
from braid.pretrain.config.objectives.t5 import T5Config
from braid.pretrain.config.schema import Config
from braid.pretrain.model.network import parameter_counts
from braid.pretrain.objectives.build import build_objective


def axes(size: int) -> list[Axis]:
    """The axis as each of `size` processes sees it, without anybody to talk to."""
    return [Axis("tensor", rank, size, None) for rank in range(size)]


@settings(max_examples=100, deadline=None, database=None)
@given(st.data())
def test_pieces_of_all_processes_are_the_whole(data):
    parts, size, per_part = (data.draw(st.integers(1, n)) for n in (3, 5, 7))
    shape = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    dim = data.draw(st.integers(0, len(shape) - 1))
    shape[dim] = parts * per_part
    full = torch.arange(1, 1 + int(torch.Size(shape).numel())).reshape(shape)
    shards = [Shard(dim, parts, rank, size, parts * per_part) for rank in range(size)]
    cut = [shard.cut(full) for shard in shards]
    assert len({piece.shape for piece in cut}) == 1, "all have the same shape"
    assert cut[0].shape[dim] == parts * -(-per_part // size)
    assert all(torch.equal(shard.join(cut), full) for shard in shards)
    assert all(torch.equal(shard.pad(shard.trim(piece)), piece) for shard, piece in zip(shards, cut, strict=True))
    assert sum(shard.trim(piece).numel() for shard, piece in zip(shards, cut, strict=True)) == full.numel()
    # What is not of the whole is zero: every element is in one piece once.
    assert sum(int(piece.sum()) for piece in cut) == int(full.sum())
    assert sum(int((piece == 0).sum()) for piece in cut) == sum(piece.numel() for piece in cut) - full.numel()
    parameter = nn.Parameter(torch.empty(cut[-1].shape))
    parameter.shard = shards[-1]
    set_whole(parameter, full.float())
    assert torch.equal(parameter, cut[-1].float()) and whole_shape(parameter) == full.shape


def test_each_process_has_its_heads_queries_keys_and_values():
    num_heads, head_dim = 4, 2
    qkv = torch.arange(3 * num_heads * head_dim).view(3, num_heads, head_dim)
    for rank in range(2):
        mine = Shard(0, 3, rank, 2, qkv.numel()).cut(qkv.flatten()).view(3, 2, head_dim)
        assert torch.equal(mine, qkv[:, 2 * rank : 2 * rank + 2])


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_initial_values_are_those_of_one_process_bit_for_bit(name, size):
    whole, divided = build(name, randomise=False), [build(name, axis, randomise=False) for axis in axes(size)]
    states = [dict(objective.named_parameters()) for objective in divided]
    num_shards = 0
    for key, parameter in whole.named_parameters():
        of_ranks = [state[key] for state in states]
        if hasattr(of_ranks[0], "shard"):
            num_shards += 1
            assert of_ranks[0].numel() < parameter.numel(), key
            joined = of_ranks[0].shard.join(of_ranks)
        else:
            assert all(torch.equal(each, of_ranks[0]) for each in of_ranks), key
            joined = of_ranks[0]
        assert torch.equal(joined, parameter), key
        assert whole_shape(of_ranks[-1]) == parameter.shape
    assert all(list(state) == list(dict(whole.named_parameters())) for state in states), "names and their order"
    assert num_shards >= 4 * 2 + 1, "the layers of two blocks and the vocabulary"
    assert parameter_counts(divided[0].network) == parameter_counts(whole.network)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_layers_are_torchs(ranks, size, sequence):
    ranks(layers_beside_torch, size, sequence)


def test_what_is_shared_has_the_sum_of_all_gradients(ranks):
    ranks(shared_gradients, 2)


def test_regions_divide_and_join_positions(ranks):
    for message in ranks(regions, 2):
        assert "7 positions / 2 processes = 3.50" in message and "data.sequence_length" in message


def test_on_one_process_a_region_does_nothing():
    x = torch.ones(2, 3, 4, requires_grad=True)
    for region in (ALONE, Region(Axis("tensor", 0, 1, None), sequence=True)):
        for method in ("enter", "leave", "spread", "collect", "condition", "positions"):
            assert getattr(region, method)(x) is x
        assert region.size == 1 and not region.divided and region.length(x) == 3


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match=r"model.num_heads=4 / 3 processes = 1.33"):
        build("mdlm", axes(3)[0])


def test_t5_is_not_divided():
    with pytest.raises(ConfigError, match=r"objective.name=t5, 2 processes"):
        build_objective(Config(objective=T5Config()), None, None, torch.device("cpu"), axes(2)[0])


def test_one_process_does_without_megatron():
    code = (
        f"import sys; sys.path += {[path for path in sys.path if path.endswith('parallel')]!r}\n"
        "from tensor_cases import CASES, build, step\n"
        "for name in ('mdlm', 'ccdd-moedit-1', 'replaid', 'elf'): step(build(name))\n"
        "sys.exit(any(name.startswith('megatron') for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
