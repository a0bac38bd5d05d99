"""What ``Mount`` and ``OciMount`` have in common: an image as a mount of the kernel."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cfs.repository.repository import Repository
    from cfs.service.call import Call

__all__ = ["find_wrong_fds", "reply_mount"]

_CHANGES = ("upper directory", "work directory")


def find_wrong_fds(call: "Call", options: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the number of descriptors of a call, None if nothing is.

    Args:
        call: carries upper and work directory if ``options`` ask for an overlay.
        options: ``MountParams`` of the IDL.
    """
    expected = len(_CHANGES) if options["overlay"] else 0
    if len(call.fds) == expected:
        return None
    return f"Mount expects {expected} fds for the requested options, got {len(call.fds)}"


def reply_mount(
    call: "Call", repository: "Repository", name: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Mount an image nowhere and return the reply, whose descriptor is the mount.

    Args:
        call: with the right descriptors; its peer may mount.
        repository: has the image.
        name: of the image.
        options: ``MountParams`` of the IDL.

    Raises:
        CfsError: as :func:`cfs.mounting.image.create_stored_mount`.
        OSError: likewise.
    """
    from cfs.mounting.choice import MountRequest  # noqa: PLC0415 - few calls mount
    from cfs.mounting.image import create_stored_mount  # noqa: PLC0415

    changes = [f"/proc/self/fd/{fd}" for fd in call.fds]
    request = MountRequest(
        upperdir=changes[0] if changes else None,
        workdir=changes[1] if changes else None,
        read_write=bool(changes and options["read_write"]),
    )
    call.reply_fds([create_stored_mount(repository, name, request)])
    return {"fd_index": 0}
