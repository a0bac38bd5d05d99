"""Whole-column helpers of the image reader: checks that name an offender, ragged gathers.

Everything here takes columns of offsets and sizes into one ``uint8`` array.  Callers check
ranges before they gather.  No state.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from cfs.errors import FormatError

__all__ = [
    "Bools",
    "Bytes",
    "Ints",
    "check",
    "contains",
    "not_ascending",
    "ranges",
    "starts_of",
]

Bytes = NDArray[np.uint8]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

_KEY_SIZE = 8
# clears the bytes behind the first k of a big-endian key of 8 bytes
_KEEP = np.array([0] + [(2**64 - 1) << 8 * (8 - k) & (2**64 - 1) for k in range(1, 9)], np.uint64)
_ONES = np.uint64(0x0101010101010101)
_TOPS = np.uint64(0x8080808080808080)


def check(ok: Bools, nid: Ints, field: str, expected: str, found: NDArray[np.generic]) -> None:
    """Raise for the first element that is not ok.

    Args:
        ok: ``bool[k]``.
        nid: ``int64[k]``, the inode that each element belongs to.
        field: what was checked, in words of the format.
        expected: what it should have been.
        found: ``[k]``, what it is.

    Raises:
        FormatError: some element of ``ok`` is false.
    """
    if ok.all():
        return
    first = int(np.argmin(ok))
    msg = f"inode {nid[first]}: {field} is {found[first].item()}: expected {expected}"
    raise FormatError(msg)


def starts_of(counts: Ints) -> Ints:
    """Return ``int64[k+1]``: where each of ``k`` runs of ``counts`` elements starts."""
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts


def ranges(offsets: Ints, sizes: Ints) -> Ints:
    """Return ``range(offset, offset + size)`` of all pairs, one after the other."""
    starts = starts_of(sizes)
    return np.repeat(offsets - starts[:-1], sizes) + np.arange(starts[-1])


def _keys(data: Bytes, offsets: Ints, sizes: Ints) -> NDArray[np.uint64]:
    """Return the first 8 bytes of each string as a big-endian number, zero padded.

    ``data`` has at least 8 bytes; keys at its end are read earlier and shifted into place.
    """
    windows = np.ndarray(len(data) - 7, ">u8", data.data, strides=(1,))
    last = len(windows) - 1
    keys = windows[np.minimum(offsets, last)].astype(np.uint64)
    late = offsets > last
    if late.any():
        keys[late] <<= (8 * np.minimum(offsets[late] - last, 7)).astype(np.uint64)
    return keys & _KEEP[np.clip(sizes, 0, 8)]


def _has_zero(keys: NDArray[np.uint64]) -> Bools:
    zeros: Bools = ((keys - _ONES) & ~keys & _TOPS) != 0
    return zeros


def _rounds(data: Bytes, offsets: Ints, sizes: Ints) -> Iterator[tuple[Ints, NDArray[np.uint64]]]:
    """Yield (which strings reach this far, their keys) for every 8 bytes of the longest."""
    which = np.flatnonzero(sizes > 0)
    done = 0
    while which.size:
        left = sizes[which] - done
        yield (
            which,
            _keys(data, offsets[which] + done, left) | (~_KEEP[np.clip(left, 0, 8)] & _ONES),
        )
        done += _KEY_SIZE
        which = which[left > _KEY_SIZE]


def contains(data: Bytes, offsets: Ints, sizes: Ints, byte: int) -> Bools:
    """Tell for each string whether it contains ``byte``; byte 1 cannot be asked for.

    Loops over rounds of 8 bytes, all strings at once; memory does not depend on the sizes.
    """
    result = np.zeros(len(offsets), np.bool_)
    pattern = np.uint64(byte) * _ONES
    for which, keys in _rounds(data, offsets, sizes):
        result[which[_has_zero(keys ^ pattern)]] = True
    return result


def not_ascending(data: Bytes, offsets: Ints, sizes: Ints, pairs: Ints) -> Ints:
    """Return which of the ``pairs`` (i, i + 1) of strings without NUL do not ascend.

    The meaning for one pair is ``not string[i] < string[i + 1]``.  Loops over rounds of 8 bytes
    with the pairs that are still equal; most are decided in the first.
    """
    wrong: list[Ints] = []
    done = 0
    while pairs.size:
        left = _keys(data, offsets[pairs] + done, sizes[pairs] - done)
        right = _keys(data, offsets[pairs + 1] + done, sizes[pairs + 1] - done)
        done += _KEY_SIZE
        equal = left == right
        longer = np.maximum(sizes[pairs], sizes[pairs + 1]) > done
        wrong.append(pairs[(left > right) | (equal & ~longer)])
        pairs = pairs[equal & longer]
    return np.concatenate(wrong) if wrong else np.zeros(0, np.int64)
