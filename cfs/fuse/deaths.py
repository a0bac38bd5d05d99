"""When a session that dies is not to be started again."""

from collections import deque

__all__ = ["Deaths", "describe_status"]

_KILLED = -9  # somebody, or the kernel for want of memory: no fault of the session
_MAX_CRASHES = 5
_CRASH_SECONDS = 30.0
_MAX_IDLE_DEATHS = 20


class Deaths:
    """The deaths of the sessions of one mount.

    Hopeless are five crashes within 30 seconds, a crash being any end but by SIGKILL, and twenty
    deaths in a row of whatever kind without one more answer in between.
    """

    def __init__(self) -> None:
        self._crashes: deque[float] = deque(maxlen=_MAX_CRASHES)
        self._nr_idle = 0
        self._nr_answered = 0

    def is_hopeless(self, status: int, nr_answered: int, now: float) -> bool:
        """Count a death and tell whether it was one too many.

        Args:
            status: as of ``subprocess``, negative: a signal.
            nr_answered: requests answered so far by all sessions.
            now: seconds of a steady clock.
        """
        if nr_answered != self._nr_answered:
            self._nr_idle = 0
        self._nr_answered = nr_answered
        self._nr_idle += 1
        if status != _KILLED:
            self._crashes.append(now)
        is_crashing = (
            len(self._crashes) == _MAX_CRASHES and now - self._crashes[0] <= _CRASH_SECONDS
        )
        return is_crashing or self._nr_idle >= _MAX_IDLE_DEATHS


def describe_status(status: int) -> str:
    """Return how a process ended."""
    return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
