"""PCRE2, the library of regular expressions that SELinux policies are written for.

Manual: pcre2api(3).  Python's ``re`` lacks POSIX classes and options inside of a pattern, and
would take some for something else.  libpcre2-8 is part of any system with libselinux; it is
loaded when a policy is met.  Any thread may match.
"""

import ctypes
import functools
import threading
import weakref

from cfs.errors import FormatError, UnsupportedError

__all__ = ["Pattern"]

_LIBRARY = "libpcre2-8.so.0"
_ANCHORED = 0x80000000
_ENDANCHORED = 0x20000000
_DOLLAR_ENDONLY = 0x10
_DOTALL = 0x20
_ERROR_NOMATCH = -1
_MESSAGE_SIZE = 256  # bytes; what pcre2api(3) recommends


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        msg = f"SELinux labels need {_LIBRARY}, which cannot be loaded"
        raise UnsupportedError(msg) from None
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.pcre2_compile_8.restype = pointer
    library.pcre2_compile_8.argtypes = [
        ctypes.c_char_p,
        size,
        ctypes.c_uint32,
        ctypes.POINTER(ctypes.c_int),
        ctypes.POINTER(size),
        pointer,
    ]
    library.pcre2_code_free_8.argtypes = [pointer]
    library.pcre2_match_data_create_8.restype = pointer
    library.pcre2_match_data_create_8.argtypes = [ctypes.c_uint32, pointer]
    library.pcre2_match_8.argtypes = [
        pointer,
        ctypes.c_char_p,
        size,
        size,
        ctypes.c_uint32,
        pointer,
        pointer,
    ]
    library.pcre2_get_error_message_8.argtypes = [ctypes.c_int, ctypes.c_char_p, size]
    return library


class _MatchData(threading.local):
    """Where a thread's matches are written to; nobody looks at it, so one does for all of them."""

    def __init__(self) -> None:
        data = _library().pcre2_match_data_create_8(1, None)
        if not data:
            raise MemoryError
        self.pointer = int(data)


@functools.cache
def _match_data() -> _MatchData:
    return _MatchData()


class Pattern:
    """A regular expression over bytes.  ``$`` matches at the very end only."""

    def __init__(self, expression: bytes, *, dot_matches_newline: bool) -> None:
        """Compile an expression.

        Raises:
            FormatError: it is malformed.
            UnsupportedError: PCRE2 is not installed.
        """
        options = _ANCHORED | _ENDANCHORED | _DOLLAR_ENDONLY
        if dot_matches_newline:
            options |= _DOTALL
        reason, offset = ctypes.c_int(), ctypes.c_size_t()
        library = _library()
        code = library.pcre2_compile_8(
            expression,
            len(expression),
            options,
            ctypes.byref(reason),
            ctypes.byref(offset),
            None,
        )
        if not code:
            msg = (
                f"regular expression {expression.decode(errors='backslashreplace')!r}: "
                f"{_describe(reason.value)} at offset {offset.value}"
            )
            raise FormatError(msg)
        self._expression = expression
        self._code = code
        self._match = library.pcre2_match_8
        self._match_data = _match_data()
        weakref.finalize(self, library.pcre2_code_free_8, code)

    def matches(self, subject: bytes) -> bool:
        """Whether the expression matches all of ``subject``.

        Raises:
            FormatError: finding out takes more steps or memory than PCRE2 allows.
        """
        match_data = self._match_data.pointer
        found = self._match(self._code, subject, len(subject), 0, 0, match_data, None)
        if found < _ERROR_NOMATCH:
            msg = (
                f"regular expression {self._expression.decode(errors='backslashreplace')!r}: "
                f"{_describe(found)}"
            )
            raise FormatError(msg)
        return bool(found >= 0)


def _describe(reason: int) -> str:
    text = ctypes.create_string_buffer(_MESSAGE_SIZE)
    _library().pcre2_get_error_message_8(reason, text, _MESSAGE_SIZE)
    return text.value.decode(errors="replace")
