"""A connection to a service, without waiting: what both clients are made of.

What takes time is a generator that yields the poll(2) event to wait for, and returns its result at
its end.  A call that breaks in the middle, for whatever reason, ends the connection, because what
comes next would answer something else; an error that the service replies does not.
"""

import json
import select
import socket
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

from cfs.client.convert import decode, encode, parse_object
from cfs.client.errors import ConnectionLostError, InvalidReplyError, VarlinkError, make_error
from cfs.client.methods import Descriptors, Method, Result, WithDescriptors, result_class
from cfs.errors import FormatError, InvalidRequestError
from cfs.linux.framing import EndOfMessages, Message, MessageReader, MessageWriter
from cfs.linux.sockets import peer_credentials

__all__ = ["Connection", "Steps"]

_MAX_REPLY_SIZE = 100 << 20  # bytes; spec cli-and-varlink b.5
_R = TypeVar("_R", bound=Result)
_T = TypeVar("_T")
Steps = Generator[int, None, _T]


class Connection:
    """One connection; one thread at a time, one call at a time.

    Args:
        channel: connected; owned from now on.

    Attributes:
        is_lost: the service has closed it.
    """

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._reader = MessageReader(channel, _MAX_REPLY_SIZE)
        self._writer = MessageWriter(channel)
        self._is_streaming = False
        self.is_lost = False

    @property
    def is_free(self) -> bool:
        """Whether it is open, and takes a call."""
        return self.fd >= 0 and not self._is_streaming

    @property
    def fd(self) -> int:
        """Descriptor to wait for; -1 once the connection is closed."""
        return self._channel.fileno()

    @property
    def peer_uid(self) -> int:
        """User who the service ran as when it began to listen.

        Raises:
            OSError: the connection is closed.
        """
        return peer_credentials(self._channel)[1]

    def close(self) -> None:
        """Close it, with the descriptors of replies that were not complete."""
        self._reader.close()
        self._channel.close()

    def call(self, method: Method[_R], *, oneway: bool = False) -> Steps[_R | None]:
        """Call a method that replies once; None for one that nobody replies to.

        Raises:
            VarlinkError: the service replied with an error.
            InvalidReplyError: the reply is none to this call.
            ConnectionLostError: the connection ended before it.
            InvalidRequestError: a stream is under way.
        """
        with self._breakable(during_stream=False):
            yield from self._send(method, oneway=oneway)
            if oneway:
                return None
            result, continues = yield from self._receive(method)
            if continues:
                _close(result)
                msg = f"{method.full_name}: the service sent several replies for one"
                raise InvalidReplyError(msg)
            return result

    def start_stream(self, method: Method[_R]) -> Steps[None]:
        """Call a method that replies more than once; errors as for :meth:`call`."""
        with self._breakable(during_stream=False):
            yield from self._send(method, more=True)
            self._is_streaming = True

    def next_reply(self, method: Method[_R]) -> Steps[tuple[_R, bool]]:
        """Return the next reply of the stream, and whether others follow; errors as for a call."""
        with self._breakable(during_stream=True):
            try:
                result, self._is_streaming = yield from self._receive(method)
            except VarlinkError:
                self._is_streaming = False
                raise
            return result, self._is_streaming

    @contextmanager
    def _breakable(self, *, during_stream: bool) -> Iterator[None]:
        if self.fd < 0:
            msg = "the connection to the service is closed"
            raise ConnectionLostError(msg)
        if self._is_streaming is not during_stream:
            msg = "a stream is under way on this connection: use another one"
            raise InvalidRequestError(msg)
        try:
            yield
        except VarlinkError:
            raise
        except BaseException:
            self.close()
            raise

    def _send(self, method: Method[_R], *, more: bool = False, oneway: bool = False) -> Steps[None]:
        flags = {name: True for name, is_set in (("more", more), ("oneway", oneway)) if is_set}
        call = {"method": method.full_name, **flags}
        # services of composefs-rs 0.9 refuse parameters where there are none
        if parameters := encode(method):
            call["parameters"] = parameters
        try:
            data = json.dumps(call, ensure_ascii=False).encode()
            self._writer.start(data, method.fds)
        except (UnicodeEncodeError, FormatError) as error:
            msg = f"{method.full_name}: {error}"
            raise InvalidRequestError(msg) from None
        try:
            while not self._writer.send():
                yield select.POLLOUT
        except (BrokenPipeError, ConnectionResetError):
            return  # what the service said before tells more

    def _receive(self, method: Method[_R]) -> Steps[tuple[_R, bool]]:
        message = yield from self._read()
        return _parse(method, message)

    def _read(self) -> Steps[Message]:
        while True:
            try:
                message = self._reader.read()
            except (EndOfMessages, ConnectionResetError):
                self.is_lost = True
                msg = "the service has closed the connection"
                raise ConnectionLostError(msg) from None
            except FormatError as error:
                raise InvalidReplyError(str(error)) from None
            if message is not None:
                return message
            yield select.POLLIN


def _parse(method: Method[_R], message: Message) -> tuple[_R, bool]:
    """Return the result of a reply, and whether others follow."""
    descriptors = Descriptors(message.fds)
    try:
        reply = parse_object(message.data)
        parameters = reply.get("parameters")
        if parameters is None:
            parameters = {}
        if not isinstance(parameters, dict):
            msg = f"{method.full_name}: the reply has no parameters"
            raise InvalidReplyError(msg)
        if isinstance(name := reply.get("error"), str):
            raise make_error(name, parameters)
        result = decode(result_class(type(method)), parameters, method.full_name)
        if isinstance(result, WithDescriptors):
            result = replace(result, descriptors=descriptors)
            descriptors = Descriptors()
    finally:
        descriptors.close()
    return result, reply.get("continues") is True


def _close(result: Result) -> None:
    if isinstance(result, WithDescriptors):
        result.close()
