"""The C library, for system calls that Python lacks.

Loaded when first used.  No shared state: any thread may call.
"""

import ctypes
import functools

__all__ = ["libc"]


@functools.cache
def libc() -> ctypes.CDLL:
    """Return the C library; ``ctypes.get_errno`` tells why a call failed."""
    return ctypes.CDLL(None, use_errno=True)
