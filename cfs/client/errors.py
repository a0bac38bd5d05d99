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
    "InterfaceNotFoundError",
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

    Its text is meant for people; what it is, say its class and:

    Attributes:
        name: with its interface, ``org.composefs.Repository.NoSuchRef``.
        parameters: of the error, as they came.
    """

    kind: ClassVar[str] = ""
    text: ClassVar[str] = "{message}"  # with the parameters that the interfaces declare

    def __init__(self, name: str, parameters: Mapping[str, Any]) -> None:
        self.name = name
        self.parameters = dict(parameters)
        super().__init__(self._describe())

    def _describe(self) -> str:
        """Return one line."""
        kind = self.name.rpartition(".")[2]
        try:
            text = self._fill(kind)
        except RecursionError:  # arrays in arrays
            text = ""
        return (text if len(text) <= _MAX_TEXT_SIZE else text[:_MAX_TEXT_SIZE] + "…") or kind

    def _fill(self, kind: str) -> str:
        """Return the text, or name and parameters if these are others than declared."""
        try:
            return self.text.format_map(self.parameters)
        except KeyError:
            values = json.dumps(self.parameters, ensure_ascii=False) if self.parameters else ""
            return f"{kind} {values}".rstrip()


class RepoNotFoundError(VarlinkError):
    """The store could not be found or opened."""

    kind = "RepoNotFound"


class InvalidHandleError(VarlinkError):
    """No open store of ours has this handle."""

    kind = "InvalidHandle"
    text = "no open store has handle {handle}"


class InvalidSpecError(VarlinkError):
    """Arguments that contradict each other, are incomplete or cannot be parsed."""

    kind = "InvalidSpec"


class InvalidRequestRefusedError(VarlinkError):
    """As :class:`InvalidSpecError`, of the OCI interface."""

    kind = "InvalidRequest"


class NoSuchRefError(VarlinkError):
    """The store has no image of this name."""

    kind = "NoSuchRef"
    text = "image not found: {reference}"


class NoSuchImageError(VarlinkError):
    """There is no such tag or manifest."""

    kind = "NoSuchImage"
    text = "no such image: {image}"


class NoSuchLayerError(VarlinkError):
    """The layer is not in the store."""

    kind = "NoSuchLayer"
    text = "Layer {diff_id} not found"


class InvalidDigestError(VarlinkError):
    """A digest that cannot be parsed."""

    kind = "InvalidDigest"


class DiffIdMismatchError(VarlinkError):
    """The data sent is not the layer that was announced."""

    kind = "DiffIdMismatch"
    text = "layer integrity failed: expected {expected}, got {actual}"


class FdLimitExceededError(VarlinkError):
    """The descriptors of a layer do not fit into one reply."""

    kind = "FdLimitExceeded"
    text = "{fd_count} descriptors: a reply takes {max_per_frame}"


class BootImageMismatchError(VarlinkError):
    """No boot image has the digest that was expected."""

    kind = "BootImageMismatch"
    text = (
        "No boot image configuration matched expected digest {expected} "
        "(tried {tried} mode/version combinations)"
    )


class FuseUnavailableError(VarlinkError):
    """FUSE cannot be used there."""

    kind = "FuseUnavailable"


class MountFailedError(VarlinkError):
    """Preparing or attaching the mount failed, or it broke."""

    kind = "MountFailed"


class NoSuchMountError(VarlinkError):
    """No FUSE mount of ours has this number."""

    kind = "NoSuchMount"
    text = "no mount has number {mount_id}"


class MountBusyError(VarlinkError):
    """The mount is in use."""

    kind = "MountBusy"
    text = "mount {mount_id} is in use"


class InternalError(VarlinkError):
    """Anything else that went wrong."""

    kind = "InternalError"


class PermissionDeniedError(VarlinkError):
    """The service does not do this for us."""

    kind = "PermissionDenied"
    text = "the service does not let this user do that"


class MethodNotFoundError(VarlinkError):
    """The service has no such method; composefs-rs 0.9 closes the connection instead."""

    kind = "MethodNotFound"
    text = "the service has no method {method}"


class InterfaceNotFoundError(VarlinkError):
    """It is another service, or an older one."""

    kind = "InterfaceNotFound"
    text = "the service has no interface {interface}"


class InvalidParameterError(VarlinkError):
    """A parameter is missing or of the wrong kind."""

    kind = "InvalidParameter"
    text = "the service does not take this value of {parameter}"


_CLASSES = {each.kind: each for each in VarlinkError.__subclasses__()}
_INTERFACES = ("org.composefs.Repository", "org.composefs.Oci", "org.varlink.service")


def make_error(name: str, parameters: Mapping[str, Any]) -> VarlinkError:
    """Return the error that a reply tells of, of its own class if the interfaces declare it."""
    interface, _, kind = name.rpartition(".")
    found = _CLASSES.get(kind, VarlinkError) if interface in _INTERFACES else VarlinkError
    return found(name, parameters)
