"""One plane on a socket in place of the FUSE device; see ``test_planes``.

``plane.py python VECTOR DEVICE OBJECTS`` or ``plane.py workers VECTOR DEVICE OBJECTS RELAY``: all
are numbers of descriptors.  Serves until standard input ends, or until it is killed.
"""

import contextlib
import os
import sys

from cfs.fuse.shared import attach


def serve_python(vector_fd: int, device: int, objects: int) -> None:
    import pyfuse3  # noqa: PLC0415 - the other plane needs none of it
    import trio  # noqa: PLC0415

    from cfs.fuse.operations import VectorOperations  # noqa: PLC0415

    operations = VectorOperations(attach(vector_fd), [objects], trio.Event())
    pyfuse3.init(operations, f"/dev/fd/{device}", set())
    trio.run(pyfuse3.main)


def serve_workers(vector_fd: int, device: int, objects: int, relay: int) -> None:
    from cfs.fuse.dataplane import DataPlane  # noqa: PLC0415 - see above

    os.set_blocking(device, False)
    plane = DataPlane(
        table=vector_fd,
        state=os.memfd_create("state"),
        relay=relay,
        devices=[device, os.dup(device)],
        objects=[objects],
    )
    with contextlib.closing(plane):
        plane.start()
        sys.stdin.read()


if __name__ == "__main__":
    serve = serve_python if sys.argv[1] == "python" else serve_workers
    serve(*map(int, sys.argv[2:]))
