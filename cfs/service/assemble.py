"""The service put together: one object per interface, over one table of handles and mounts."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from cfs.service.dispatch import Dispatcher
from cfs.service.fuse_mounts import FuseMethods, OciFuseMethods
from cfs.service.handles import Handles, StoreOptions
from cfs.service.oci_interface import OciMethods
from cfs.service.repository_interface import RepositoryMethods

if TYPE_CHECKING:
    from cfs.service.fuse_registry import FuseMounts

__all__ = ["assembled"]


class _Repository(RepositoryMethods, FuseMethods):
    """``org.composefs.Repository``."""

    def __init__(self, handles: Handles, mounts: "FuseMounts") -> None:
        RepositoryMethods.__init__(self, handles)
        FuseMethods.__init__(self, handles, mounts)


class _Oci(OciMethods, OciFuseMethods):
    """``org.composefs.Oci``."""

    def __init__(self, handles: Handles, mounts: "FuseMounts") -> None:
        OciMethods.__init__(self, handles)
        OciFuseMethods.__init__(self, handles, mounts)


@contextmanager
def assembled(options: StoreOptions, mounts: "FuseMounts") -> Iterator[Dispatcher]:
    """Yield the dispatcher of both interfaces; afterwards mounts end and stores are closed.

    Args:
        options: for stores that clients open.
        mounts: the FUSE mounts of the service.
    """
    with ExitStack() as stack:
        handles = Handles(options)
        stack.callback(handles.close_all)
        stack.callback(mounts.close)
        oci = _Oci(handles, mounts)
        stack.callback(oci.close)
        repository = _Repository(handles, mounts)
        interfaces = {"org.composefs.Repository": repository, "org.composefs.Oci": oci}
        yield Dispatcher(interfaces, oci.stop_pulls)
