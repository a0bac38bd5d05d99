"""Unified kernel images: the command line in a PE file.

Format: the PE/COFF specification of Microsoft, and the UKI specification of UAPI.  Every number is
compared with the size of the file before it is used.
"""

import os
import struct

from cfs.errors import FormatError

__all__ = ["read_command_line"]

_DOS_SIZE = 64
_PE_OFF = struct.Struct("<60xI")  # e_lfanew
# signature, machine, number of sections, time, symbols, their number, size of optional header
_PE = struct.Struct("<4s2xH12xH2x")
_SIGNATURE = b"PE\0\0"
# name, size in memory, address, size in the file, offset in the file
_SECTION = struct.Struct("<8sI4xII16x")
_NAME = b".cmdline"
_SIZE_MAX = 1 << 16


def read_command_line(fd: int) -> str:
    """Return the kernel command line of a unified kernel image.

    Args:
        fd: the file, borrowed.

    Raises:
        FormatError: it is no PE file, or has no command line.
        OSError: it cannot be read.
    """
    (start,) = _PE_OFF.unpack(_read(fd, 0, _DOS_SIZE))
    signature, nr_sections, optional_size = _PE.unpack(_read(fd, start, _PE.size))
    if signature != _SIGNATURE:
        msg = f"kernel image: signature is {signature!r}: expected {_SIGNATURE!r}"
        raise FormatError(msg)
    table = _read(fd, start + _PE.size + optional_size, nr_sections * _SECTION.size)
    for name, size, stored_size, off in _SECTION.iter_unpack(table):
        if name == _NAME:
            if size > _SIZE_MAX:
                msg = f"kernel image: command line of {size} bytes: expected at most {_SIZE_MAX}"
                raise FormatError(msg)
            try:  # the file may have padding behind it
                return _read(fd, off, min(size, stored_size)).rstrip(b"\0").decode()
            except UnicodeDecodeError:
                msg = "kernel image: command line is not UTF-8"
                raise FormatError(msg) from None
    msg = "kernel image: no command line in it"
    raise FormatError(msg)


def _read(fd: int, off: int, size: int) -> bytes:
    data = os.pread(fd, size, off)
    if len(data) != size:
        msg = f"kernel image: {len(data)} bytes at {off}: expected {size}"
        raise FormatError(msg)
    return data
