"""What all clients together, and those of one user, may make the service hold.

Any thread may call.
"""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["Budget"]


class Budget:
    """An amount of something, shared out to users.

    Root and the user of the service have their own share each, which others cannot use up.
    """

    def __init__(self, *, per_uid: int, total: int, trusted: frozenset[int]) -> None:
        """Make a budget: ``per_uid`` for each user, ``total`` for all that are not trusted."""
        self._per_uid = per_uid
        self._total = total
        self._trusted = trusted
        self._used: Counter[int] = Counter()
        self._condition = threading.Condition()

    def take(self, uid: int, amount: int, *, timeout: float = 0) -> bool:
        """Take some; wait at most ``timeout`` seconds until others gave enough back."""
        deadline = time.monotonic() + timeout
        with self._condition:
            while not self._has(uid, amount):
                remaining = deadline - time.monotonic()
                if remaining <= 0 or not self._condition.wait(remaining):
                    return False
            self._used[uid] += amount
        return True

    def give_back(self, uid: int, amount: int) -> None:
        """Give back what was taken."""
        with self._condition:
            self._used[uid] -= amount
            if not self._used[uid]:
                del self._used[uid]  # as many users as there are must not pile up
            self._condition.notify_all()

    @contextmanager
    def lend(self, uid: int, amount: int, *, timeout: float = 0) -> Iterator[bool]:
        """Take some for a block; yield whether there was enough."""
        is_taken = self.take(uid, amount, timeout=timeout)
        try:
            yield is_taken
        finally:
            if is_taken:
                self.give_back(uid, amount)

    def _has(self, uid: int, amount: int) -> bool:
        if self._used[uid] + amount > self._per_uid:
            return False
        if uid in self._trusted:
            return True
        others = sum(used for user, used in self._used.items() if user not in self._trusted)
        return others + amount <= self._total
