"""Shares of users."""

import threading

from cfs.service.budget import Budget

OTHER, ANOTHER = 1000, 1001


def make_budget() -> Budget:
    return Budget(per_uid=10, total=15, trusted=frozenset({0}))


def test_limits() -> None:
    budget = make_budget()
    assert budget.take(OTHER, 10)
    assert not budget.take(OTHER, 1)
    assert not budget.take(ANOTHER, 6)
    assert budget.take(ANOTHER, 5)
    assert budget.take(0, 10)  # others cannot use up what is root's
    assert not budget.take(0, 1)
    budget.give_back(OTHER, 10)
    assert budget.take(ANOTHER, 5)


def test_waits_for_others() -> None:
    budget = make_budget()
    assert budget.take(OTHER, 10)
    timer = threading.Timer(0.01, budget.give_back, (OTHER, 10))
    timer.start()
    assert budget.take(OTHER, 1, timeout=60)
    timer.join()
    with budget.lend(OTHER, 9) as has_room:
        assert has_room
        with budget.lend(OTHER, 1) as has_more:
            assert not has_more
    assert budget.take(OTHER, 9)
