"""The runner of the other tests here: results by rank, and no waiting for ranks that fail, hang or die."""

from __future__ import annotations

import os
import time

import pytest
import rank_bodies


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_results_come_by_rank_from_processes_of_their_own(ranks) -> None:
    found = ranks(rank_bodies.introduce, 3, {"an": "argument"})
    assert [answer["rank"] for answer in found] == [0, 1, 2]
    assert len({answer["pid"] for answer in found}) == 3 and not any(alive(answer["pid"]) for answer in found)
    assert all(answer["argument"] == {"an": "argument"} for answer in found)
    assert all((answer["threads"], answer["gpus"], answer["omp"]) == (1, 0, "1") for answer in found)


def test_a_failing_rank_shows_its_traceback_at_once_and_ends_the_others(ranks, tmp_path) -> None:
    started = time.monotonic()
    with pytest.raises(
        AssertionError, match=r"(?s)rank 1 failed with exit code 1.*in fail_on_one.*ValueError: it broke"
    ):
        ranks(rank_bodies.fail_on_one, 3, tmp_path)
    assert time.monotonic() - started < 20, "the others were about to wait for a minute"
    assert not any(alive(int(file.name)) for file in tmp_path.iterdir()) and len(list(tmp_path.iterdir())) == 3


def test_ranks_that_hang_are_killed_and_say_where_they_stood(ranks, tmp_path) -> None:
    with pytest.raises(AssertionError) as caught:
        ranks(rank_bodies.hang, 2, tmp_path, timeout_s=3)
    text = str(caught.value)
    assert "after 3 s these ranks were still running" in text
    assert "in barrier" in text.partition("rank 1:")[0] and "in hang" in text.partition("rank 1:")[2]
    assert not any(alive(int(file.name)) for file in tmp_path.iterdir()) and len(list(tmp_path.iterdir())) == 2


def test_ranks_that_may_be_lost_are_not_waited_for(ranks) -> None:
    assert ranks(rank_bodies.leave_one_behind, 3, lost={2}) == [0, 1, None]


def test_a_rank_that_ends_without_a_word_is_a_failure(ranks) -> None:
    with pytest.raises(AssertionError, match="rank 0 failed with exit code 7"):
        ranks(rank_bodies.vanish, 1)
