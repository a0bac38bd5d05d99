"""Capabilities of this process, capabilities(7)."""

from enum import IntEnum
from pathlib import Path

__all__ = ["Capability", "has_capability"]


class Capability(IntEnum):
    """``CAP_*``."""

    DAC_READ_SEARCH = 2
    SYS_ADMIN = 21


def has_capability(capability: Capability) -> bool:
    """Whether the calling thread has a capability in effect, in its user name space."""
    for line in Path("/proc/thread-self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> capability & 1)
    return False
