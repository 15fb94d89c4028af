from __future__ import annotations

import os

import pytest
from worker_functions import die, refuse, slow_if_even

from braid.data_pipeline.workers import Workers
from braid.kernels.errors import InputError


@pytest.mark.parametrize("num", [1, 3])
def test_results_are_in_order_and_few_items_are_taken_ahead(num):
    taken = 0

    def items():
        nonlocal taken
        for taken in range(30):  # noqa: B007
            yield str(taken)

    with Workers(num) as workers:
        for number, (item, (square, pid)) in enumerate(workers.map(slow_if_even, items(), int)):
            assert (item, square) == (str(number), number * number)
            assert (pid == os.getpid()) == (num == 1)
            assert taken <= number + 2 * num
    assert number == taken == 29


@pytest.mark.parametrize("num", [1, 2])
def test_an_error_comes_back_whole(num):
    with Workers(num) as workers, pytest.raises(InputError) as caught:
        list(workers.map(refuse, iter([7]), int))
    assert (caught.value.what, caught.value.found, caught.value.change) == ("no", "7", "yes")


def test_a_process_that_dies():
    with Workers(2) as workers, pytest.raises(InputError, match="a tokenising process died"):
        list(workers.map(die, iter(range(20)), int))
