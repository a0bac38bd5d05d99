"""What a service says of itself: ``org.varlink.service``."""

from dataclasses import dataclass
from typing import ClassVar

from cfs.client.methods import Method, Result

__all__ = ["Description", "GetInfo", "GetInterfaceDescription", "ServiceInfo"]

_INTERFACE = "org.varlink.service"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceInfo(Result):
    """Who serves, and what."""

    vendor: str
    product: str
    version: str
    url: str
    interfaces: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Description(Result):
    """An interface as text."""

    description: str


@dataclass(frozen=True, slots=True)
class GetInfo(Method[ServiceInfo]):
    """Ask who serves, and what."""

    INTERFACE: ClassVar[str] = _INTERFACE
    RESULT: ClassVar[type[Result]] = ServiceInfo


@dataclass(frozen=True, slots=True)
class GetInterfaceDescription(Method[Description]):
    """Ask for the text of an interface."""

    INTERFACE: ClassVar[str] = _INTERFACE
    RESULT: ClassVar[type[Result]] = Description

    interface: str
