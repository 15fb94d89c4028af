"""Joint noising on this machine's CPU, by the compiled and the eager implementation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from braid.kernels import dispatch
from braid.kernels.noising import joint_noising

from .noising_cases import assert_same, expected, random_case


@pytest.fixture(params=["compiled", "eager"])
def implementation(request, monkeypatch) -> Iterator[str]:
    """Each of them in turn."""
    found = dispatch.choose("cpu")
    if request.param == "compiled" and found.name != "compiled":
        pytest.skip(f"there is no compiled library: {found.reason}")
    monkeypatch.setattr(dispatch, "choose", lambda device_type: dispatch.Choice(request.param, "a test"))
    dispatch._functions.cache_clear()
    yield request.param
    dispatch._functions.cache_clear()


def test_every_implementation_has_the_bits_of_numpy(implementation):
    for seed in range(150):
        case = random_case(seed)
        assert_same(joint_noising(*case.arguments, **case.options), expected(case))
