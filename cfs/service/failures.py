"""The error of an interface for everything that has none of its own."""

from cfs.service.errors import MethodError

__all__ = ["internal_error"]


def internal_error(message: str) -> MethodError:
    """Return ``InternalError``."""
    return MethodError("InternalError", message=message)
