"""What the parts of ``org.composefs.Oci`` have in common."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cfs.errors import InvalidRequestError
from cfs.oci.reference import parse_digest
from cfs.service.errors import MethodError

if TYPE_CHECKING:
    from cfs.repository.repository import Repository
    from cfs.service.call import Call
    from cfs.service.handles import Handles

__all__ = ["OciBase", "checked_digest"]


class OciBase:
    """The open stores.  Any thread may call."""

    def __init__(self, handles: "Handles") -> None:
        self._handles = handles

    @contextmanager
    def _repository(self, call: "Call", handle: int) -> Iterator["Repository"]:
        """Use a store, with the rights of who opened it, for the duration of a block.

        Raises:
            MethodError: ``InvalidHandle``.
        """
        with self._handles.get(call, handle) as store:
            yield store.repository


def checked_digest(text: str) -> str:
    """Return a digest as it is.

    Raises:
        MethodError: ``InvalidDigest``: it is none.
    """
    try:
        return parse_digest(text)
    except InvalidRequestError as error:
        raise MethodError("InvalidDigest", message=str(error)) from None
