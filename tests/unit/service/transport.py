"""A service with one small interface object, for tests of the transport."""
# ruff: noqa: N802 - methods are named as in the IDL

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cfs.service.call import Call
from cfs.service.dispatch import Dispatcher
from cfs.service.errors import MethodError
from tests.varlink_client import serving

REPOSITORY = "org.composefs.Repository"
OCI = "org.composefs.Oci"


@contextmanager
def serving_cleanly(repository: "FakeRepository", path: Path) -> Iterator[None]:
    """Serve within a block; no thread and no descriptor stays."""
    threads = threading.active_count()
    fds = len(os.listdir("/proc/self/fd"))
    with serving(Dispatcher({REPOSITORY: repository}), path):
        yield
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == fds


class FakeRepository:
    """Methods that show what the transport does; ``handle`` says what is wanted."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.gone = threading.Event()
        self.ended = threading.Event()
        self.started = threading.Event()

    def ListImageRefs(self, call: Call, *, handle: int) -> dict[str, Any]:
        """Return the inode numbers of the descriptors that came along."""
        names = [str(os.fstat(fd).st_ino) for fd in call.fds]
        return {"images": [{"name": name, "digest": str(handle)} for name in names]}

    def CloseRepository(self, call: Call, *, handle: int) -> None:
        self.seen.append((handle, call.more, call.oneway))
        if handle == 0:
            raise MethodError("InvalidHandle", handle=handle)
        if handle == 1:
            raise FileNotFoundError(2, "No such file or directory", "x\ny")
        if handle == 2:
            raise ZeroDivisionError

    def Mount(
        self, call: Call, *, handle: int, name: str, options: dict[str, Any]
    ) -> dict[str, Any]:
        """Reply with ``handle`` descriptors, or fail after they were attached."""
        call.reply_fds([os.open(os.devnull, os.O_RDONLY) for _ in range(handle)])
        self.seen.append(options)
        if name == "fail":
            raise MethodError("InternalError", message=name)
        return {"fd_index": 0}

    def WatchMount(self, call: Call, *, mount_id: int) -> Iterator[tuple[dict[str, Any], bool]]:
        """Stream: three replies, or wait for the end of the client."""
        call.on_disconnect(self.gone.set)
        try:
            for number in range(mount_id):
                yield {"mount": {"error": None, "number": number}}, number < mount_id - 1
            if not mount_id:
                self.started.set()
                assert self.gone.wait(60)
                assert call.gone()
        finally:
            self.ended.set()

    def ImageObjects(self, call: Call, *, handle: int, name: str) -> dict[str, Any]:  # noqa: ARG002
        return {"objects": [name * handle]}
