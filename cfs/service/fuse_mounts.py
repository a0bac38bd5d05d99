"""The FUSE methods of both interfaces (spec cli-and-varlink c.2 to c.4).

Names and parameters are those of the IDL.  Any thread may call; state: the handles, the mounts.
"""

import errno
import os
from functools import partial
from typing import TYPE_CHECKING, Any

from cfs.errors import MountError
from cfs.linux.fusedev import fusermount_unmount
from cfs.linux.mountinfo import find_topmost, list_mounts
from cfs.linux.mounts import unmount
from cfs.mount import detach as detach_mount
from cfs.service.call import Replies
from cfs.service.errors import MethodError, internal_error
from cfs.service.fuse_entry import FuseEntry, FuseState
from cfs.service.fuse_registry import FuseMounts
from cfs.service.fuse_serving import FuseWish, serve, wait_for_change

if TYPE_CHECKING:
    from cfs.repository.repository import Repository
    from cfs.service.call import Call
    from cfs.service.handles import Handles

__all__ = ["FuseMethods", "OciFuseMethods"]

_END_SECONDS = 10.0
_DETACH_SECONDS = 0.5  # what is not in use ends at once


class FuseMethods:
    """``FuseServe``, ``ListMounts``, ``Unmount`` and ``WatchMount`` of the repository interface."""

    def __init__(self, handles: "Handles", mounts: FuseMounts) -> None:
        """Share the handles and the mounts with the other interfaces."""
        self._handles = handles
        self._mounts = mounts

    def FuseServe(
        self,
        call: "Call",
        *,
        handle: int,
        image: str | None,
        mountpoint: str | None,
        wait: bool,
        options: dict[str, Any] | None,
    ) -> Replies:
        """Serve an image over FUSE."""
        wish = FuseWish(
            handle=handle, image=image, mountpoint=mountpoint, wait=wait, options=options or {}
        )
        return serve(call, self._handles, self._mounts, wish)

    def ListMounts(self, call: "Call", *, mount_id: int | None) -> dict[str, Any]:
        """List the mounts that the peer may see."""
        entries = self._mounts.visible(call.peer, mount_id)
        return {"mounts": self._mounts.describe(entries)}

    def Unmount(self, call: "Call", *, mount_id: int, detach: bool | None) -> dict[str, Any]:
        """End a mount."""
        (entry,) = self._mounts.visible(call.peer, mount_id)
        if entry.state is FuseState.STARTING:
            raise MethodError("MountBusy", mount_id=mount_id)
        if not entry.state.is_final:
            take_down = self._detach if detach else self._unmount
            try:
                take_down(entry)
            except MountError as error:
                raise internal_error(str(error)) from None
        return {}

    def WatchMount(self, call: "Call", *, mount_id: int) -> Replies:
        """Report the state of a mount, and with more replies each change of it."""
        (entry,) = self._mounts.visible(call.peer, mount_id)
        return self._report(call, entry)

    def _report(self, call: "Call", entry: FuseEntry) -> Replies:
        with self._mounts.watching(entry) as changes:
            while True:
                mount = entry.describe()
                is_last = FuseState(mount["state"]).is_final or not call.more
                yield {"mount": mount}, not is_last
                if is_last:
                    return
                wait_for_change(call, changes)

    def _detach(self, entry: FuseEntry) -> None:
        """Take a mount out of the tree; who uses it may finish, unless it is in no tree of ours."""
        assert entry.mount is not None
        device = entry.mount.device
        places = _places(entry)
        for place in reversed(places):
            detach_mount(os.fsdecode(place), device)
        if _places(entry):  # another mount covers it
            raise MethodError("MountBusy", mount_id=entry.number)
        if not places:
            self._mounts.end(entry)
        self._mounts.wait_ended([entry], _DETACH_SECONDS if places else _END_SECONDS)

    def _unmount(self, entry: FuseEntry) -> None:
        """Unmount a mount that nobody uses."""
        assert entry.mount is not None
        device = entry.mount.device
        places = _places(entry)
        for place in reversed(places):
            topmost = find_topmost(list_mounts(), place)
            if topmost is None or topmost.device != device or not _unmount_place(place, device):
                raise MethodError("MountBusy", mount_id=entry.number)
        # without a place in our tree, or with one elsewhere, others have it
        if not self._mounts.wait_ended([entry], _END_SECONDS if places else 0):
            raise MethodError("MountBusy", mount_id=entry.number)


class OciFuseMethods:
    """``OciFuseMount`` of the OCI interface."""

    def __init__(self, handles: "Handles", mounts: FuseMounts) -> None:
        """Share the handles and the mounts with the other interfaces."""
        self._handles = handles
        self._mounts = mounts

    def OciFuseMount(
        self,
        call: "Call",
        *,
        handle: int,
        image: str,
        mountpoint: str | None,
        bootable: bool,
        wait: bool,
        options: dict[str, Any] | None,
    ) -> Replies:
        """Serve the file system of an OCI image over FUSE."""
        wish = FuseWish(
            handle=handle,
            image=image,
            mountpoint=mountpoint,
            wait=wait,
            options=options or {},
            find=partial(_find, image=image, bootable=bootable),
            invalid="InvalidRequest",
        )
        return serve(call, self._handles, self._mounts, wish)


def _find(repository: "Repository", *, image: str, bootable: bool) -> str:
    from cfs.service.oci_interface import find_image  # noqa: PLC0415 - loads what OCI needs

    return str(find_image(repository, image, bootable=bootable))


def _places(entry: FuseEntry) -> list[bytes]:
    """Return where a mount is, in this mount name space."""
    return [mounted.mountpoint for mounted in list_mounts() if entry.is_mounted_as(mounted)]


def _unmount_place(place: bytes, device: int) -> bool:
    """Unmount; False: it is in use.

    Raises:
        MountError: we may not.
    """
    path = os.fsdecode(place)
    try:
        unmount(path, device)
    except PermissionError:
        try:
            fusermount_unmount(path)
        except MountError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        msg = f"cannot unmount {path}: {error.strerror}"
        raise MountError(msg, error.errno or errno.EIO) from None
    return True
