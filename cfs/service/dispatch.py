"""From a request to its replies: introspection, checks, the method, errors.

The PyPI package ``varlink`` finds and calls the method.  It sees parameters that are
checked already, and hands streams back untouched: it would drop what is null in them and
send replies that nobody asked for (spec cli-and-varlink d.2).
"""

import inspect
import logging
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from typing import Any, NamedTuple

from varlink.error import VarlinkError  # type: ignore[import-untyped]
from varlink.server import Service  # type: ignore[import-untyped]

from cfs import __version__
from cfs.errors import CfsError, describe
from cfs.service.call import Call, Replies, close_fds
from cfs.service.errors import MethodError, MethodNotFound, ServiceError, internal_error
from cfs.service.idl import check_parameters, find_method, load_interfaces
from cfs.service.request import Request, encode_reply

__all__ = ["MAX_SENT_SIZE", "SHORT_METHODS", "Dispatcher"]

MAX_SENT_SIZE = 16 << 20  # bytes with NUL; sd-varlink takes less than that
_SERVICE = "org.varlink.service"
_REPOSITORY, _OCI = "org.composefs.Repository", "org.composefs.Oci"
# these neither wait nor compute much, unless file systems or large stores make them
SHORT_METHODS = frozenset(
    f"{interface}.{method}"
    for interface, methods in (
        (_SERVICE, ("GetInfo", "GetInterfaceDescription")),
        (_REPOSITORY, ("OpenRepository", "CloseRepository", "ListMounts")),
        (_REPOSITORY, ("ListImageRefs", "ImageObjects")),
        (_OCI, ("GetInfo", "ListImages", "Inspect", "HasLayer")),
    )
    for method in methods
)
_log = logging.getLogger(__name__)


class _Stream(NamedTuple):
    """The replies of a method that sends several; no generator, so that varlink leaves it."""

    replies: Replies


class _Context(NamedTuple):
    """What goes through the varlink package to a method."""

    call: Call
    parameters: dict[str, Any]


class _Adapter:
    """The methods of an interface, with the signature that the varlink package calls."""

    def __init__(self, implementation: object, interface: Any) -> None:
        for name in interface.members:
            method = getattr(implementation, name, None)
            if callable(method):
                setattr(self, name, _adapt(method))


def _adapt(method: Callable[..., Any]) -> Callable[..., Any]:
    def invoke(*_parameters: Any, _request: _Context) -> Any:
        outcome = method(_request.call, **_request.parameters)
        return _Stream(outcome) if isinstance(outcome, Iterator) else outcome

    # varlink asks for it with every call; finding it takes longer than all else that it does
    invoke.__signature__ = inspect.signature(invoke)  # type: ignore[attr-defined]
    return invoke


def _take_all(
    _parent: str, _type: Any, _namespaced: object, parameters: Any, _kwargs: object
) -> Any:
    """Take parameters as they are: they are checked already."""
    return parameters


class _Service(Service):  # type: ignore[misc]
    """The dispatch of the varlink package; names its own interface last, as 0.9 does."""

    def __init__(self, implementations: Mapping[str, object]) -> None:
        super().__init__(
            vendor="org.composefs",
            product="cfsctl",
            version=__version__,
            url="https://github.com/composefs/composefs-rs",
        )
        for name, interface in load_interfaces().items():
            if name in implementations:
                # varlink would check again, in half of a short call's time
                interface.filter_params = _take_all
                self.interfaces[name] = interface
                self.interfaces_handlers[name] = _Adapter(implementations[name], interface)
        self.interfaces[_SERVICE] = self.interfaces.pop(_SERVICE)

    def start(self, request: Request, context: _Context) -> dict[str, Any] | _Stream:
        """Call a method; return its reply, or its stream.

        Raises:
            MethodError: the method's.
            ServiceError: introspection's.
        """
        message = {"method": request.method, "parameters": dict(context.parameters)}
        outcome = next(self._handle(message, b"", None, context))
        if isinstance(outcome, VarlinkError):
            raise ServiceError(outcome.error().rpartition(".")[2], outcome.parameters())
        reply: dict[str, Any] | _Stream = outcome["parameters"]
        return reply


class Dispatcher:
    """Answers requests; any number of threads may ask at once."""

    def __init__(
        self, implementations: Mapping[str, object], stop: Callable[[], None] = lambda: None
    ) -> None:
        """Take an object per interface, and what ends calls that outlive their clients.

        A method of the IDL is the method of that name: it gets the :class:`Call` and the
        parameters as keywords, and returns the parameters of the reply, or an iterator of
        them with whether more follow.
        """
        self._service = _Service(implementations)
        self.stop = stop

    def answer(self, call: Call, request: Request) -> Generator[bytes, None, None]:
        """Run a call and yield encoded replies, each with its descriptors in the call.

        Closing the iterator early ends the method.
        """
        interface, _, method = request.method.rpartition(".")
        try:
            yield from self._run(call, request, interface, method)
        except MethodError as error:
            yield self._refuse(call, interface, error)
        except (CfsError, OSError) as error:
            yield self._refuse(call, interface, internal_error(describe(error)))
        except Exception as error:  # noqa: BLE001 - no method may end the connection
            _log.exception("%s failed", request.method)
            failure = internal_error(f"{type(error).__name__} in the service")
            yield self._refuse(call, interface, failure)

    def _run(self, call: Call, request: Request, interface: str, method: str) -> Iterator[bytes]:
        parsed = self._service.interfaces.get(interface)
        if parsed is None:
            raise MethodNotFound(request.method)
        has_results = bool(find_method(parsed, method).out_type.fields)
        context = _Context(call, check_parameters(parsed, method, request.parameters))
        outcome = self._service.start(request, context)
        if not isinstance(outcome, _Stream):
            reply = _encode(outcome, has_results=has_results, continues=False)
            del outcome  # the client may take its time
            yield reply
            return
        with closing(outcome.replies) as replies:  # type: ignore[type-var]
            for parameters, continues in replies:
                if call.more or not continues:
                    yield _encode(parameters, has_results=has_results, continues=continues)
                else:
                    close_fds(call.take_reply_fds())
                if not continues:
                    return
        assert call.gone(), "a stream ended without a last reply"

    def _refuse(self, call: Call, interface: str, error: MethodError) -> bytes:
        """Encode an error reply; the descriptors of a reply that will not be are dropped."""
        close_fds(call.take_reply_fds())
        owner = _SERVICE if isinstance(error, ServiceError) else interface
        return encode_reply({"error": f"{owner}.{error.name}", "parameters": error.parameters})


def _encode(parameters: dict[str, Any], *, has_results: bool, continues: bool) -> bytes:
    """Encode a reply.

    Raises:
        MethodError: it is too long to be sent.
    """
    members = {"parameters": parameters} if has_results else {}
    message = encode_reply({**members, "continues": continues})
    if len(message) + 1 >= MAX_SENT_SIZE:
        raise internal_error(f"the reply is too long: {len(message)} bytes")
    return message
