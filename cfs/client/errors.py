"""What a service answers instead of a result, one class for each error of the interfaces."""

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from cfs.errors import CfsError

__all__ = [
    "BootImageMismatchError",
    "ConnectionLostError",
    "DiffIdMismatchError",
    "FdLimitExceededError",
    "FuseUnavailableError",
    "InternalError",
    "InvalidDigestError",
    "InvalidHandleError",
    "InvalidParameterError",
    "InvalidReplyError",
    "InvalidRequestRefusedError",
    "InvalidSpecError",
    "MethodNotFoundError",
    "MountBusyError",
    "MountFailedError",
    "NoSuchImageError",
    "NoSuchLayerError",
    "NoSuchMountError",
    "NoSuchRefError",
    "PermissionDeniedError",
    "RepoNotFoundError",
    "VarlinkError",
    "make_error",
]

_MAX_TEXT_SIZE = 2048


class ConnectionLostError(CfsError):
    """The service has closed the connection, or cannot be reached."""


class InvalidReplyError(CfsError):
    """The service sent what is no reply to the call."""


class VarlinkError(CfsError):
    """The service refused a call, or the call failed there.

    Attributes:
        name: with its interface, ``org.composefs.Repository.NoSuchRef``.
        parameters: of the error, as they came.
    """

    kind: ClassVar[str] = ""

    def __init__(self, name: str, parameters: Mapping[str, Any]) -> None:
        self.name = name
        self.parameters = dict(parameters)
        super().__init__(_describe(name, self.parameters))


def _describe(name: str, parameters: Mapping[str, Any]) -> str:
    """Return one line."""
    kind = name.rpartition(".")[2]
    if isinstance(message := parameters.get("message"), str):
        text = message
    else:
        text = ", ".join(
            f"{key} {json.dumps(value, ensure_ascii=False)}" for key, value in parameters.items()
        )
    if len(text) > _MAX_TEXT_SIZE:
        text = text[:_MAX_TEXT_SIZE] + "…"
    return f"{kind}: {text}" if text else kind


class RepoNotFoundError(VarlinkError):
    """The store could not be found or opened."""

    kind = "RepoNotFound"


class InvalidHandleError(VarlinkError):
    """No open store of ours has this handle."""

    kind = "InvalidHandle"


class InvalidSpecError(VarlinkError):
    """Arguments that contradict each other, are incomplete or cannot be parsed."""

    kind = "InvalidSpec"


class InvalidRequestRefusedError(VarlinkError):
    """As :class:`InvalidSpecError`, of the OCI interface."""

    kind = "InvalidRequest"


class NoSuchRefError(VarlinkError):
    """The store has no image of this name."""

    kind = "NoSuchRef"


class NoSuchImageError(VarlinkError):
    """There is no such tag or manifest."""

    kind = "NoSuchImage"


class NoSuchLayerError(VarlinkError):
    """The layer is not in the store."""

    kind = "NoSuchLayer"


class InvalidDigestError(VarlinkError):
    """A digest that cannot be parsed."""

    kind = "InvalidDigest"


class DiffIdMismatchError(VarlinkError):
    """The data sent is not the layer that was announced."""

    kind = "DiffIdMismatch"


class FdLimitExceededError(VarlinkError):
    """The descriptors of a layer do not fit into one reply."""

    kind = "FdLimitExceeded"


class BootImageMismatchError(VarlinkError):
    """No boot image has the digest that was expected."""

    kind = "BootImageMismatch"


class FuseUnavailableError(VarlinkError):
    """FUSE cannot be used there."""

    kind = "FuseUnavailable"


class MountFailedError(VarlinkError):
    """Preparing or attaching the mount failed, or it broke."""

    kind = "MountFailed"


class NoSuchMountError(VarlinkError):
    """No FUSE mount of ours has this number."""

    kind = "NoSuchMount"


class MountBusyError(VarlinkError):
    """The mount is in use."""

    kind = "MountBusy"


class InternalError(VarlinkError):
    """Anything else that went wrong."""

    kind = "InternalError"


class PermissionDeniedError(VarlinkError):
    """The service does not do this for us."""

    kind = "PermissionDenied"


class MethodNotFoundError(VarlinkError):
    """The service has no such method; composefs-rs 0.9 closes the connection instead."""

    kind = "MethodNotFound"


class InvalidParameterError(VarlinkError):
    """A parameter is missing or of the wrong kind."""

    kind = "InvalidParameter"


_CLASSES = {each.kind: each for each in VarlinkError.__subclasses__()}
_INTERFACES = ("org.composefs.Repository", "org.composefs.Oci", "org.varlink.service")


def make_error(name: str, parameters: Mapping[str, Any]) -> VarlinkError:
    """Return the error that a reply tells of, of its own class if the interfaces declare it."""
    interface, _, kind = name.rpartition(".")
    found = _CLASSES.get(kind, VarlinkError) if interface in _INTERFACES else VarlinkError
    return found(name, parameters)
