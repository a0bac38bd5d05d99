"""Encoded xattrs and the table of those that several inodes share.

Specification: erofs-image section 4 and, for version 2, section 6.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain

from xxhash import xxh32_intdigest

from cfs.erofs.format import (
    XATTR_ENTRY,
    XATTR_FILTER_SEED,
    XATTR_PREFIXES,
    XATTR_REFERENCE,
    ImageVersion,
)

__all__ = ["SharedXattrs", "XattrEncoder"]

_LUSTRE = XATTR_PREFIXES.index(b"lustre.")


class XattrEncoder:
    """Names and pairs of xattrs in the form they have in an image, each computed once."""

    def __init__(self, version: ImageVersion) -> None:
        self.names: dict[bytes, int] = {}  # full name to its bit of the name filter
        self._prefixes = [
            (number, prefix)
            for number, prefix in reversed(list(enumerate(XATTR_PREFIXES)))
            if version == ImageVersion.V2 or number != _LUSTRE
        ]
        self._entries: dict[tuple[bytes, bytes], bytes] = {}
        self._split: dict[bytes, tuple[int, bytes]] = {}

    def filter_of(self, names: Iterable[bytes]) -> int:
        """Return the name filter of an inode with xattrs of these full names."""
        present = 0
        for name in names:
            if name not in self.names:
                self._split_name(name)
            present |= self.names[name]
        return 0xFFFFFFFF ^ present

    def entry(self, name: bytes, value: bytes) -> bytes:
        """Return the padded entry of one pair."""
        pair = (name, value)
        entry = self._entries.get(pair)
        if entry is None:
            number, suffix = self._split.get(name) or self._split_name(name)
            entry = XATTR_ENTRY.pack(len(suffix), number, len(value)) + suffix + value
            entry += bytes(-len(entry) % 4)
            self._entries[pair] = entry
        return entry

    def _split_name(self, name: bytes) -> tuple[int, bytes]:
        number, prefix = next(each for each in self._prefixes if name.startswith(each[1]))
        suffix = name[len(prefix) :]
        self._split[name] = number, suffix
        self.names[name] = 1 << (xxh32_intdigest(suffix, XATTR_FILTER_SEED + number) & 31)
        return number, suffix


class SharedXattrs:
    """The table of the entries that occur more than once, in the order of the format.

    Attributes:
        members: the shared entries.
        size: bytes of the table.
    """

    def __init__(self, inodes: Iterable[Iterable[bytes]], version: ImageVersion) -> None:
        counts = Counter(chain.from_iterable(inodes))
        shared = [entry for entry, nr_inodes in counts.items() if nr_inodes > 1]
        if version == ImageVersion.V2:
            shared.sort(key=_parts)
        else:
            shared.sort(key=_descending_key, reverse=True)
        self.members = frozenset(shared)
        self._table = shared
        self.size = sum(map(len, shared))

    def references(self, table_base_off: int) -> Mapping[bytes, bytes]:
        """Return the encoded reference of each entry.

        Args:
            table_base_off: where the table starts, seen from where references count.
        """
        result = {}
        entry_off = table_base_off
        for entry in self._table:
            result[entry] = XATTR_REFERENCE.pack(entry_off // 4)
            entry_off += len(entry)
        return result

    def encode(self) -> bytes:
        """Return the bytes of the table."""
        return b"".join(self._table)


def _parts(entry: bytes) -> tuple[int, bytes, bytes]:
    """Return prefix number, suffix and value of an encoded entry."""
    suffix_size, number, value_size = XATTR_ENTRY.unpack_from(entry)
    value_off = XATTR_ENTRY.size + suffix_size
    return number, entry[XATTR_ENTRY.size : value_off], entry[value_off : value_off + value_size]


def _descending_key(entry: bytes) -> tuple[bytes, int, bytes]:
    number, suffix, value = _parts(entry)
    return XATTR_PREFIXES[number] + suffix, len(value), value
