"""What a service says of itself: ``org.varlink.service``."""

from dataclasses import dataclass

from cfs.client.methods import Result, ServiceMethod

__all__ = ["Description", "GetInfo", "GetInterfaceDescription", "ServiceInfo"]


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
class GetInfo(ServiceMethod[ServiceInfo]):
    """Ask who serves, and what."""


@dataclass(frozen=True, slots=True)
class GetInterfaceDescription(ServiceMethod[Description]):
    """Ask for the text of an interface."""

    interface: str
