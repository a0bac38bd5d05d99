"""The statistics of a mount as text."""

from cfs.fuse.dataplane import Statistics, read_statistics

__all__ = ["describe_state", "format_statistics"]


def format_statistics(statistics: Statistics) -> str:
    """Return one line for each number that is not 0, names first; no end of line at the end."""
    numbers = {f"requests {name}": count for name, count in sorted(statistics.requests.items())}
    numbers |= {name.replace("_", " "): count for name, count in statistics.counters.items()}
    numbers["restarts"] = max(0, statistics.sessions - 1)
    shown = {name: count for name, count in numbers.items() if count or name == "restarts"}
    return "\n".join(f"{name}: {count}" for name, count in shown.items())


def describe_state(state_fd: int) -> str:
    """Return the statistics in a state memfd as text."""
    return format_statistics(read_statistics(state_fd))
