"""What all methods and their results have in common."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import ClassVar, Generic, Self, TypeVar, get_args

from cfs.client.convert import LOCAL
from cfs.client.errors import InvalidReplyError

__all__ = [
    "Descriptors",
    "Method",
    "Nothing",
    "OciMethod",
    "RepositoryMethod",
    "Result",
    "ServiceMethod",
    "WithDescriptors",
    "result_class",
]


class Descriptors:
    """Open descriptors; a context manager that closes them, except those taken away.

    They are close-on-exec.  An instance that is forgotten closes them, too.
    """

    def __init__(self, fds: Sequence[int] = ()) -> None:
        """Own descriptors from now on."""
        self._fds = list(fds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._fds)

    def __getitem__(self, index: int) -> int:
        """Return a descriptor, borrowed; -1 if it was taken."""
        return self._fds[index]

    def take(self, index: int) -> int:
        """Return a descriptor that the caller closes.

        Raises:
            InvalidReplyError: there is no such, or it was taken before.
        """
        fd = self._fds[index] if 0 <= index < len(self._fds) else -1
        if fd < 0:
            msg = f"the service sent no descriptor {index}"
            raise InvalidReplyError(msg)
        self._fds[index] = -1
        return fd

    def close(self) -> None:
        """Close what was not taken."""
        while self._fds:
            fd = self._fds.pop()
            if fd >= 0:
                with suppress(OSError):
                    os.close(fd)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A reply."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nothing(Result):
    """The reply of methods that answer nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WithDescriptors(Result):
    """A reply that brings descriptors; a context manager that closes them.

    Attributes:
        descriptors: all of its message, in their order.
    """

    descriptors: Descriptors = field(
        default_factory=Descriptors, metadata=LOCAL, compare=False, repr=False
    )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptors that were not taken."""
        self.descriptors.close()


_R_co = TypeVar("_R_co", bound=Result, covariant=True)


@dataclass(frozen=True, slots=True)
class Method(Generic[_R_co]):
    """A call: its fields are the parameters.

    Its name is that of the class, and its reply the class that this base has as its parameter.

    Attributes:
        INTERFACE: where the method is declared.
        fds: descriptors to send along, borrowed until the call has returned.
    """

    INTERFACE: ClassVar[str]

    fds: Sequence[int] = field(default=(), metadata=LOCAL, kw_only=True, repr=False)

    @property
    def full_name(self) -> str:
        """Name with its interface."""
        return f"{self.INTERFACE}.{type(self).__name__}"


@dataclass(frozen=True, slots=True)
class RepositoryMethod(Method[_R_co]):
    """A call of ``org.composefs.Repository``."""

    INTERFACE: ClassVar[str] = "org.composefs.Repository"


@dataclass(frozen=True, slots=True)
class OciMethod(Method[_R_co]):
    """A call of ``org.composefs.Oci``."""

    INTERFACE: ClassVar[str] = "org.composefs.Oci"


@dataclass(frozen=True, slots=True)
class ServiceMethod(Method[_R_co]):
    """A call of ``org.varlink.service``, which every service has."""

    INTERFACE: ClassVar[str] = "org.varlink.service"


def result_class(method: type[Method[_R_co]]) -> type[_R_co]:
    """Return the class of a method's reply."""
    (base,) = method.__orig_bases__  # type: ignore[attr-defined]
    result: type[_R_co] = get_args(base)[0]
    return result
