"""When the supervisor gives up."""

import pytest

from cfs.fuse.deaths import Deaths, describe_status

KILLED, CRASHED, FAILED = -9, -11, 1


@pytest.mark.parametrize("status", [CRASHED, FAILED])
def test_five_crashes_within_30_seconds(status: int) -> None:
    deaths = Deaths()
    assert [deaths.is_hopeless(status, n, 7.0 * n) for n in range(1, 6)] == [False] * 4 + [True]


def test_crashes_far_apart_are_borne() -> None:
    deaths = Deaths()
    assert not any(deaths.is_hopeless(CRASHED, n, 8.0 * n) for n in range(1, 100))


def test_being_killed_is_borne_as_long_as_requests_are_answered() -> None:
    deaths = Deaths()
    assert not any(deaths.is_hopeless(KILLED, n // 10, 0.01 * n) for n in range(1, 200))


def test_twenty_deaths_without_an_answer() -> None:
    deaths = Deaths()
    deaths.is_hopeless(KILLED, 5, 0)
    assert [deaths.is_hopeless(KILLED, 5, 100.0 * n) for n in range(19)] == [False] * 18 + [True]


def test_how_it_ended() -> None:
    assert describe_status(-11) == "was ended by signal 11"
    assert describe_status(1) == "ended with status 1"
