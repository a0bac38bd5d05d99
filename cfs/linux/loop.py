"""Loop devices: a file as a block device, for kernels that mount no files.

Linux man page loop(4), ``LOOP_CONFIGURE`` (Linux 5.8).  Needs root and the nodes below /dev.
No shared state: any thread may call.
"""

import errno
import fcntl
import os
import struct

__all__ = ["open_loop_device"]

_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_LO_FLAGS_READ_ONLY = 1
_LO_FLAGS_AUTOCLEAR = 4
_LO_FLAGS_DIRECT_IO = 16
_BLOCK_SIZE = 4096
_NR_RETRIES = 64
# struct loop_config: fd, block_size; of its loop_info64: what we leave alone, lo_flags, and the
# names, keys and reserved fields behind it
_LOOP_CONFIG = struct.Struct("=II52xI176x64x")


def open_loop_device(fd: int) -> int:
    """Make a read-only loop device of a file; return the descriptor of the device.

    The device goes away by itself when nobody has it open or mounted any more.

    Args:
        fd: regular file, open for reading; borrowed.

    Raises:
        OSError: there is no free device, or we may not.
    """
    flags = _LO_FLAGS_READ_ONLY | _LO_FLAGS_AUTOCLEAR | _LO_FLAGS_DIRECT_IO
    request = _LOOP_CONFIG.pack(fd, _BLOCK_SIZE, flags)
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_NR_RETRIES):
            number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
            device = os.open(f"/dev/loop{number}", os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, _LOOP_CONFIGURE, request)
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:  # EBUSY: somebody else was faster
                    raise
            else:
                return device
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), "/dev/loop-control")
