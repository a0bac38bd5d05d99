"""Errors that methods answer with, and the end of a connection that breaks the protocol.

::

    MethodError            an error of the interface that was called
     +-- ServiceError      an error of org.varlink.service
          +-- InvalidParameter, MethodNotFound, PermissionDenied
    ProtocolError          the connection cannot go on
"""

from collections.abc import Mapping
from typing import Any

__all__ = [
    "InvalidParameter",
    "MethodError",
    "MethodNotFound",
    "PermissionDenied",
    "ProtocolError",
    "ServiceError",
    "internal_error",
]

_MAX_NAME_SIZE = 1 << 10  # of what nobody has; longer ones are cut


class MethodError(Exception):
    """An error reply; whoever calls the method puts the interface in front of the name.

    Attributes:
        name: without interface, ``InvalidHandle``.
        parameters: members of the reply, as the IDL declares them.
    """

    def __init__(
        self, name: str, parameters: Mapping[str, Any] | None = None, /, **more: Any
    ) -> None:
        """Make an error from its parameters, as a mapping or as keywords."""
        self.name = name
        self.parameters = {**(parameters or {}), **more}
        super().__init__(f"{name} {self.parameters}")


def internal_error(message: str) -> MethodError:
    """Return ``InternalError``, which each interface has for all that has no error of its own."""
    return MethodError("InternalError", message=message)


class ServiceError(MethodError):
    """An error reply of the interface ``org.varlink.service``."""


class InvalidParameter(ServiceError):  # noqa: N818 - the name on the wire
    """A parameter is missing or of the wrong kind."""

    def __init__(self, parameter: str) -> None:
        super().__init__("InvalidParameter", parameter=parameter)


class MethodNotFound(ServiceError):  # noqa: N818 - the name on the wire
    """There is no such method, or no such interface."""

    def __init__(self, method: str) -> None:
        super().__init__("MethodNotFound", method=method[:_MAX_NAME_SIZE])


class PermissionDenied(ServiceError):  # noqa: N818 - the name on the wire
    """The peer's user may not do that."""

    def __init__(self) -> None:
        super().__init__("PermissionDenied")


class ProtocolError(Exception):
    """The peer broke the framing or a limit: its connection is closed without a reply."""
