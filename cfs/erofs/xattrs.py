"""Extended attributes to columns; names in full, each kept once.

Specification: erofs-image section 4; checks of 9.3.  Names differ after unescaping if they do
before: the views drop ``trusted.overlay.x`` and take ``overlay.`` out of
``trusted.overlay.overlay.x``, which is unique on what is left.
"""

from dataclasses import dataclass

import numpy as np

from cfs.erofs.arrays import Bools, Bytes, Ints, check, ranges, starts_of
from cfs.erofs.format import XATTR_ENTRY, XATTR_HEADER, XATTR_NAME_SIZE_MAX, XATTR_PREFIXES
from cfs.erofs.headers import Image, Inodes

__all__ = ["ESCAPED_PREFIX", "NameTable", "Xattrs", "load_xattrs"]

ESCAPED_PREFIX = b"trusted.overlay.overlay."


@dataclass(frozen=True, slots=True, eq=False)
class NameTable:
    """Distinct names, one after the other in ``data``; row ``i`` is ``start[i]:start[i+1]``."""

    data: Bytes
    start: Ints

    @property
    def size(self) -> Ints:
        """``int64[k]``, bytes of each name."""
        return self.start[1:] - self.start[:-1]

    def starts_with(self, text: bytes) -> Bools:
        """Tell which names start with ``text``."""
        result: Bools = self.size >= len(text)
        which = np.flatnonzero(result)
        found = self.data[self.start[which, None] + np.arange(len(text))]
        result[which] = (found == np.frombuffer(text, np.uint8)).all(axis=1)
        return result

    def equal(self, name: bytes) -> Bools:
        """Tell which names (one at most) equal ``name``."""
        result: Bools = self.starts_with(name) & (self.size == len(name))
        return result


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Xattrs:
    """Xattrs of all inodes, those in the inode first, then the references, as stored.

    Attributes:
        start: ``int64[n+1]``, slice of the other columns.
        name: row of ``names``.
        value_off, value_size: in the image.
        names: distinct full names.
    """

    start: Ints
    name: Ints
    value_off: Ints
    value_size: Ints
    names: NameTable


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Entries:
    """Entries in the image, each once; ``nid`` is one inode that has it."""

    nid: Ints
    off: Ints
    prefix: Ints
    suffix_size: Ints
    value_size: Ints

    @property
    def size(self) -> Ints:
        return XATTR_ENTRY.size + self.suffix_size + self.value_size


def load_xattrs(image: Image, inodes: Inodes) -> Xattrs:
    """Parse the xattrs of inodes whose areas do not overlap.

    Raises:
        FormatError: a check of spec 9.3 failed.
    """
    row = np.flatnonzero(inodes.xattr_size)
    nid, area = inodes.nid[row], inodes.xattr_off[row]
    area_size = inodes.xattr_size[row]
    nr_shared = image.data[area + 4].astype(np.int64)
    found = XATTR_HEADER.size + 4 * nr_shared
    check(found <= area_size, nid, "size of shared xattr references", "room for them", found)

    inline_of, inline_off, order = _find_inline(image, nid, area + found, area + area_size)
    nr_inline = np.bincount(inline_of, minlength=len(row))
    shared_off, shared_entry, shared_owner = _find_shared(image, nid, area, nr_shared)
    entries = _load_entries(
        image,
        np.concatenate([nid[inline_of], nid[shared_owner]]),
        np.concatenate([inline_off, shared_off]),
    )
    _check_shared(image, entries, len(inline_off))

    count = np.zeros(len(inodes.nid), np.int64)
    count[row] = nr_inline + nr_shared
    start = starts_of(count)
    entry = np.empty(start[-1], np.int64)
    entry[start[row][inline_of] + order] = np.arange(len(inline_of))
    entry[ranges(start[row] + nr_inline, nr_shared)] = len(inline_of) + shared_entry
    names, name_of = _intern_names(image, entries)
    xattrs = Xattrs(
        start=start,
        name=name_of[entry],
        value_off=(entries.off + XATTR_ENTRY.size + entries.suffix_size)[entry],
        value_size=entries.value_size[entry],
        names=names,
    )
    _check_unique(inodes, xattrs)
    return xattrs


def _find_inline(image: Image, nid: Ints, pos: Ints, end: Ints) -> tuple[Ints, Ints, Ints]:
    """Return (index of the inode, offset, number within the inode) of the inline entries.

    One round per k-th entry, all inodes at once: where an entry starts is known only from the
    one before it.  An inode has at most 65,535 words, which bounds the rounds.
    """
    which = np.flatnonzero(pos < end)
    rounds: list[tuple[Ints, Ints]] = [(which[:0], pos[:0])]
    pos, end = pos[which], end[which]
    while which.size:
        rounds.append((which, pos))
        word = image.words[pos >> 2].astype(np.int64)
        pos = pos + (XATTR_ENTRY.size + (word & 0xFF) + (word >> 16) + 3 & ~3)
        check(pos <= end, nid[which], "end of an xattr", "inside the inode's xattrs", pos)
        more = np.flatnonzero(pos < end)
        which, pos, end = which[more], pos[more], end[more]
    owner = np.concatenate([part[0] for part in rounds])
    off = np.concatenate([part[1] for part in rounds])
    order = np.repeat(np.arange(len(rounds)) - 1, [len(part[0]) for part in rounds])
    return owner, off, order


def _find_shared(image: Image, nid: Ints, area: Ints, nr_shared: Ints) -> tuple[Ints, Ints, Ints]:
    """Return (offset of the distinct entries, entry of each reference, inode of each entry)."""
    owner = np.repeat(np.arange(len(nid)), nr_shared)
    reference = image.words[ranges((area + XATTR_HEADER.size) // 4, nr_shared)].astype(np.int64)
    off = image.xattr_off + 4 * reference
    check(
        off + XATTR_ENTRY.size <= len(image.data),
        nid[owner],
        "shared xattr",
        "inside the image",
        reference,
    )
    distinct, first, entry = np.unique(off, return_index=True, return_inverse=True)
    return distinct, entry, owner[first]


def _load_entries(image: Image, nid: Ints, off: Ints) -> _Entries:
    word = image.words[off >> 2].astype(np.int64)
    prefix = word >> 8 & 0xFF
    check(prefix < len(XATTR_PREFIXES), nid, "xattr name prefix", "0 to 6", prefix)
    suffix_size = word & 0xFF
    check((prefix > 0) | (suffix_size > 0), nid, "size of an xattr name", "at least 1", suffix_size)
    return _Entries(nid=nid, off=off, prefix=prefix, suffix_size=suffix_size, value_size=word >> 16)


def _check_shared(image: Image, entries: _Entries, first: int) -> None:
    """Check the entries from ``first`` on, sorted by offset: inside the image, not overlapping.

    No writer lets them overlap, and it keeps all names together smaller than the image.
    """
    nid, off = entries.nid[first:], entries.off[first:]
    end = off + entries.size[first:]
    limit = len(image.data)
    check(end <= limit, nid, "end of a shared xattr", f"at most {limit}", end)
    check(end[:-1] <= off[1:], nid[:-1], "end of a shared xattr", "before the next one", end[:-1])


def _intern_names(image: Image, entries: _Entries) -> tuple[NameTable, Ints]:
    """Return the distinct full names and the name of each entry.

    Loops over the pairs of prefix and suffix size that occur: at most 7 * 256.
    """
    group = entries.prefix << 8 | entries.suffix_size
    by_group = np.argsort(group, kind="stable")
    ends = np.flatnonzero(np.diff(group[by_group], append=-1)) + 1
    name_of = np.empty(len(group), np.int64)
    parts: list[Bytes] = []
    sizes: list[Ints] = []
    nr_names = 0
    for members in np.split(by_group, ends[:-1]) if len(group) else []:
        prefix = np.frombuffer(XATTR_PREFIXES[entries.prefix[members[0]]], np.uint8)
        size = int(entries.suffix_size[members[0]])
        suffixes = image.data[entries.off[members, None] + (XATTR_ENTRY.size + np.arange(size))]
        first, distinct = _distinct(suffixes)
        names = np.hstack([np.broadcast_to(prefix, (len(first), len(prefix))), suffixes[first]])
        _check_full_names(names, entries.nid[members[first]])
        name_of[members] = nr_names + distinct
        nr_names += len(first)
        parts.append(names.ravel())
        sizes.append(np.full(len(first), names.shape[1]))
    data = np.concatenate([np.zeros(0, np.uint8), *parts])
    return NameTable(data, starts_of(np.concatenate([np.zeros(0, np.int64), *sizes]))), name_of


def _distinct(rows: Bytes) -> tuple[Ints, Ints]:
    """Return (index of one of each distinct row, which of these each row equals)."""
    if not rows.shape[1] or (rows == rows[0]).all():
        return np.zeros(1, np.int64), np.zeros(len(rows), np.int64)
    strings = np.ascontiguousarray(rows).view(f"V{rows.shape[1]}").ravel()
    _, first, distinct = np.unique(strings, return_index=True, return_inverse=True)
    return first, distinct


def _check_full_names(names: Bytes, nid: Ints) -> None:
    has_nul: Bools = (names == 0).any(axis=1)
    check(~has_nul, nid, "xattr name with a nul at", "none", names.argmin(axis=1))
    size = np.full(len(names), names.shape[1])
    escape = np.frombuffer(ESCAPED_PREFIX, np.uint8)
    if names.shape[1] >= len(escape):
        size[(names[:, : len(escape)] == escape).all(axis=1)] -= len(b"overlay.")
    check(
        size <= XATTR_NAME_SIZE_MAX,
        nid,
        "size of an xattr name",
        f"at most {XATTR_NAME_SIZE_MAX}",
        size,
    )


def _check_unique(inodes: Inodes, xattrs: Xattrs) -> None:
    owner = np.repeat(np.arange(len(inodes.nid)), np.diff(xattrs.start))
    pairs = np.sort(owner * len(xattrs.names.start) + xattrs.name)
    twice = np.flatnonzero(pairs[1:] == pairs[:-1])
    nid = inodes.nid[pairs[:-1] // len(xattrs.names.start)]
    ok = np.ones(len(nid), np.bool_)
    ok[twice] = False
    name = pairs[:-1] % len(xattrs.names.start)
    check(ok, nid, "xattr name that occurs twice, size", "different names", xattrs.names.size[name])
