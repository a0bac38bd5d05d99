"""The bytes of an image from its numbered and rewritten inodes.

Specification: erofs-image 4.3, 5.6, 5.8 and section 6.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate

from cfs.erofs.format import (
    BLOCK_BITS,
    BLOCK_SIZE,
    CFS_HEADER,
    CFS_HEADER_VERSION,
    CFS_MAGIC,
    CHUNK_FORMAT_BITS,
    CHUNK_HOLE,
    COMPACT_ID_MAX,
    COMPACT_INODE,
    COMPACT_SIZE_MAX,
    DIRENT,
    EROFS_MAGIC,
    EXTENDED_INODE,
    FEATURE_COMPAT,
    SHARED_XATTRS_MAX,
    SLOT_SIZE,
    SUPERBLOCK,
    SUPERBLOCK_OFF,
    XATTR_HEADER,
    XATTR_REFERENCE,
    CfsFlag,
    DataLayout,
    FileType,
    ImageVersion,
)
from cfs.erofs.layout import Record, place, place_v2, round_up, split_dirents
from cfs.erofs.shared_xattrs import SharedXattrs, XattrEncoder
from cfs.tree import Directory, Special

__all__ = ["RecordError", "encode_image"]

_ACL_NAMES = (b"system.posix_acl_access", b"system.posix_acl_default")
_REFERENCES_MAX = 255  # the count is one byte
_UINT64 = (1 << 64) - 1


class RecordError(Exception):
    """An inode has no form in the image; becomes a ``FormatError`` with its path."""

    def __init__(self, record: Record, message: str) -> None:
        super().__init__(message)
        self.record = record


def encode_image(
    queue: Sequence[Record], version: ImageVersion, encoder: XattrEncoder, *, is_rust: bool
) -> bytearray:
    """Return the image of all inodes, which stand in their final order.

    Raises:
        RecordError: an inode has more shared xattrs than can be referred to.
    """
    is_v2 = version == ImageVersion.V2
    shared = SharedXattrs((record.xattr_entries for record in queue), version)
    build_time = (0, 0) if is_v2 else _build_time(queue, is_rust=is_rust)
    _choose_headers(queue, build_time, is_v2=is_v2, is_rust=is_rust)
    _divide_xattrs(queue, shared, _REFERENCES_MAX if is_rust else SHARED_XATTRS_MAX)
    inodes_end_off = place_v2(queue) if is_v2 else place(queue)
    data_off = round_up(inodes_end_off + shared.size, BLOCK_SIZE)
    image = bytearray(data_off + BLOCK_SIZE * sum(record.nr_blocks for record in queue))

    xattr_blk = 0 if is_v2 else inodes_end_off >> BLOCK_BITS
    flags = 0 if is_v2 else _acl_flag(encoder, is_rust=is_rust)
    CFS_HEADER.pack_into(image, 0, CFS_MAGIC, CFS_HEADER_VERSION, flags, version)
    SUPERBLOCK.pack_into(
        image,
        SUPERBLOCK_OFF,
        *(EROFS_MAGIC, 0, FEATURE_COMPAT, BLOCK_BITS, 0),
        *(queue[0].inode_off // SLOT_SIZE, len(queue), *build_time),
        *(len(image) >> BLOCK_BITS, 0, xattr_blk),
    )
    _put_data(image, queue, data_off >> BLOCK_BITS)
    _put_headers(image, queue, is_v2=is_v2)
    _put_xattrs(image, queue, shared.references(inodes_end_off - xattr_blk * BLOCK_SIZE))
    image[inodes_end_off : inodes_end_off + shared.size] = shared.encode()
    return image


def _build_time(queue: Sequence[Record], *, is_rust: bool) -> tuple[int, int]:
    """Return the smallest mtime; composefs-rs takes the seconds as unsigned."""
    times = {(record.inode.mtime_sec, record.inode.mtime_nsec) for record in queue}
    if is_rust:
        return min(times, key=lambda time: (time[0] & _UINT64, time[1]))
    return min(times)


def _choose_headers(
    queue: Sequence[Record], build_time: tuple[int, int], *, is_v2: bool, is_rust: bool
) -> None:
    """Set which header each inode gets, and its size."""
    build_sec, build_nsec = build_time
    for record in queue:
        inode = record.inode
        record.is_compact = (
            not is_v2
            and inode.mtime_sec == build_sec
            and inode.mtime_nsec == build_nsec
            and inode.uid <= COMPACT_ID_MAX
            and inode.gid <= COMPACT_ID_MAX
            and record.nlink <= COMPACT_ID_MAX
            and record.size <= COMPACT_SIZE_MAX
        )
        # C looks at the size that a dumpfile gives to a device, though 0 is stored
        if isinstance(inode, Special) and not is_rust and inode.size > COMPACT_SIZE_MAX:
            record.is_compact = False
        record.head_size = COMPACT_INODE.size if record.is_compact else EXTENDED_INODE.size


def _divide_xattrs(queue: Sequence[Record], shared: SharedXattrs, limit: int) -> None:
    """Divide the xattrs of each inode into references and inline ones."""
    members = shared.members
    for record in queue:
        entries = record.xattr_entries
        if not entries:
            record.references, record.inline_xattrs = (), b""
            continue
        references = [entry for entry in entries if entry in members]
        inline: Sequence[bytes] = ()
        if len(references) > limit:
            if limit == _REFERENCES_MAX:
                msg = f"{len(references)} shared xattrs: expected at most {limit}"
                raise RecordError(record, msg)
            referred = set(references[:limit])
            references = references[:limit]
            inline = [entry for entry in entries if entry not in referred]
        elif len(references) < len(entries):
            inline = [entry for entry in entries if entry not in members]
        record.references = references
        record.inline_xattrs = b"".join(inline)
        record.head_size += (
            XATTR_HEADER.size + XATTR_REFERENCE.size * len(references) + len(record.inline_xattrs)
        )


def _acl_flag(encoder: XattrEncoder, *, is_rust: bool) -> CfsFlag:
    if is_rust:
        has_acl = any(name.startswith(_ACL_NAMES) for name in encoder.names)
    else:
        has_acl = any(name in encoder.names for name in _ACL_NAMES)
    return CfsFlag.HAS_ACL if has_acl else CfsFlag(0)


def _put_data(image: bytearray, queue: Sequence[Record], first_blk: int) -> None:
    """Write tails and data blocks; the first block of an inode goes to its ``i_u``."""
    block_blk = first_blk
    for record in queue:
        tail_off = record.inode_off + record.head_size
        if isinstance(record.inode, Directory):
            _put_dirents(image, record, tail_off, block_blk)
        elif record.nr_blocks:
            data = record.data
            if record.layout == DataLayout.CHUNK_BASED:
                data = CHUNK_HOLE * (BLOCK_SIZE // len(CHUNK_HOLE))
                record.i_u |= block_blk & ~CHUNK_FORMAT_BITS
            else:
                record.i_u = block_blk
            block_off = block_blk << BLOCK_BITS
            first = data[:BLOCK_SIZE]
            image[block_off : block_off + len(first)] = first
            tail = record.data[len(record.data) - record.tail_size :]
            image[tail_off : tail_off + len(tail)] = tail
        elif record.tail_size:
            image[tail_off : tail_off + record.tail_size] = record.data
        block_blk += record.nr_blocks


def _put_dirents(image: bytearray, record: Record, tail_off: int, block_blk: int) -> None:
    names = record.names
    starts = split_dirents(names) if record.size > BLOCK_SIZE else [0]
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(names)], strict=True)):
        dirents = _encode_dirents(names[start:end], record.children[start:end])
        is_block = number < record.nr_blocks
        dirents_off = (block_blk + number) << BLOCK_BITS if is_block else tail_off
        image[dirents_off : dirents_off + len(dirents)] = dirents
    if record.nr_blocks:
        record.i_u = block_blk


_FILE_TYPES = {mode: FileType.of_mode(mode << 12) for mode in range(16)}


def _encode_dirents(names: Sequence[bytes], children: Sequence[Record]) -> bytes:
    name_offs = accumulate(map(len, names), initial=DIRENT.size * len(names))
    nids = [child.inode_off // SLOT_SIZE for child in children]
    types = [_FILE_TYPES[child.mode >> 12] for child in children]
    return b"".join(map(DIRENT.pack, nids, name_offs, types)) + b"".join(names)


def _put_headers(image: bytearray, queue: Sequence[Record], *, is_v2: bool) -> None:
    put_compact, put_extended = COMPACT_INODE.pack_into, EXTENDED_INODE.pack_into
    for number, record in enumerate(queue):
        inode = record.inode
        inode_off = record.inode_off
        if record.is_compact:
            put_compact(
                image,
                inode_off,
                record.layout << 1,
                _xattr_icount(record.head_size - COMPACT_INODE.size),
                *(record.mode, record.nlink, record.size, record.i_u, number),
                *(inode.uid, inode.gid),
            )
        else:
            put_extended(
                image,
                inode_off,
                record.layout << 1 | 1,
                _xattr_icount(record.head_size - EXTENDED_INODE.size),
                *(record.mode, record.size, record.i_u),
                *(inode_off // SLOT_SIZE if is_v2 else number, inode.uid, inode.gid),
                *(inode.mtime_sec, 0 if is_v2 else inode.mtime_nsec, record.nlink),
            )


def _xattr_icount(xattr_size: int) -> int:
    if xattr_size == 0:
        return 0
    return (xattr_size - XATTR_HEADER.size) // XATTR_REFERENCE.size + 1


def _put_xattrs(
    image: bytearray, queue: Sequence[Record], reference_of: Mapping[bytes, bytes]
) -> None:
    reference = reference_of.__getitem__
    for record in queue:
        if not record.xattr_entries:
            continue
        head = XATTR_HEADER.pack(record.xattr_filter, len(record.references))
        xattrs = head + b"".join(map(reference, record.references)) + record.inline_xattrs
        end_off = record.inode_off + record.head_size
        image[end_off - len(xattrs) : end_off] = xattrs
