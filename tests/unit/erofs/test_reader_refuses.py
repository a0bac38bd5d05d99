"""What the image reader refuses: one damage per field, and the message that names it."""

import re
import stat
import struct
from collections.abc import Callable

import numpy as np
import pytest

from cfs.erofs import open_image, read_image
from cfs.errors import FormatError
from tests.unit.erofs.images import load_zst
from tests.unit.reference.slow_reader import SlowInode, SlowReader


@pytest.fixture(scope="module")
def kinds() -> bytes:
    """An image with every kind of inode, format 0."""
    return load_zst("kinds.cfs.zst")


def read(image: bytes | bytearray) -> None:
    read_image(np.frombuffer(bytes(image), np.uint8))


HEADERS = {
    "short": (None, 0, b"", "image: size is 100: expected 4096"),
    "magic": (0, 4, b"\x01", "composefs header: magic is 0x1: expected 0xd078629a"),
    "version": (4, 4, b"\x02", "composefs header: version is 0x2: expected 0x1"),
    "composefs_version": (12, 4, b"\x03", "composefs_version is 3: expected 0, 1 or 2"),
    "erofs-magic": (1024, 4, b"\x01", "superblock: magic is 0x1: expected 0xe0f5e1e2"),
    "feature_compat": (1032, 4, b"\x07", "feature_compat is 0x7: expected no bits but 0x6"),
    "blkszbits": (1036, 1, b"\x09", "superblock: blkszbits is 0x9: expected 0xc"),
    "sb_extslots": (1037, 1, b"\x01", "superblock: sb_extslots is 0x1: expected 0x0"),
    "root_nid": (1038, 2, b"\x23", "inode 35: root_nid is 35: expected 36 to"),
    "root-outside": (1038, 2, b"\xff\xff", "inode 65535: root_nid is 65535: expected 36 to"),
    "blocks": (1060, 4, b"\xff\xff", "superblock: blocks is 65535: expected at most 136"),
    "no-blocks": (1060, 4, b"\0", "superblock: blocks is 0: expected at least 1"),
    "meta_blkaddr": (1064, 4, b"\x01", "superblock: meta_blkaddr is 0x1: expected 0x0"),
    "xattr_blkaddr": (1068, 4, b"\xff\xff", "xattr_blkaddr is 65535: expected at most 135"),
    "feature_incompat": (1104, 4, b"\x08", "feature_incompat is 0x8: expected no bits but 0x4"),
    "compression": (1108, 2, b"\x01", "available_compr_algs is 0x1: expected 0x0"),
    "extra_devices": (1110, 2, b"\x01", "extra_devices is 0x1: expected 0x0"),
    "dirblkbits": (1114, 1, b"\x01", "dirblkbits is 0x1: expected 0x0"),
    "xattr_prefix_count": (1115, 1, b"\x01", "xattr_prefix_count is 0x1: expected 0x0"),
    "packed_nid": (1120, 8, b"\x01", "packed_nid is 0x1: expected 0x0"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_refused_header(kinds: bytes, name: str) -> None:
    off, size, value, message = HEADERS[name]
    image = bytearray(kinds)
    if off is None:
        del image[100:]
    else:
        image[off : off + size] = value.ljust(size, b"\0")
    with pytest.raises(FormatError, match=re.escape(message)):
        read(image)


class Patient:
    """The image with its inodes at hand, to damage one field."""

    def __init__(self, image: bytes) -> None:
        self.image = bytearray(image)
        self.inodes = SlowReader(image).breadth_first()

    def find(self, wanted: Callable[[SlowInode], object]) -> SlowInode:
        return next(inode for inode in self.inodes if wanted(inode))

    def off(self, inode: SlowInode) -> int:
        return 32 * inode.nid

    def is_extended(self, inode: SlowInode) -> int:
        return self.image[self.off(inode)] & 1

    def layout(self, inode: SlowInode) -> int:
        return self.image[self.off(inode)] >> 1

    def get(self, inode: SlowInode, off: int, code: str) -> int:
        return int(struct.unpack_from("<" + code, self.image, self.off(inode) + off)[0])

    def put(self, inode: SlowInode, off: int, code: str, value: int) -> None:
        struct.pack_into("<" + code, self.image, self.off(inode) + off, value)

    def put_size(self, inode: SlowInode, value: int) -> None:
        self.put(inode, 8, "Q" if self.is_extended(inode) else "I", value)

    def put_nlink(self, inode: SlowInode, value: int) -> None:
        self.put(inode, *((44, "I") if self.is_extended(inode) else (6, "H")), value)

    def xattrs_off(self, inode: SlowInode) -> int:
        return self.off(inode) + (64 if self.is_extended(inode) else 32)

    def first_inline(self, inode: SlowInode) -> int:
        off = self.xattrs_off(inode)
        return off + 12 + 4 * self.image[off + 4]

    def find_inline(self) -> SlowInode:
        """An inode whose first xattr in the inode has a long name and a short value."""

        def is_good(inode: SlowInode) -> bool:
            if not inode.xattrs or self.first_inline(inode) == self.body(inode):
                return False
            name, value = inode.xattrs[0]
            return len(name) > 20 and len(value) < 1000

        return self.find(is_good)

    def in_blocks(self) -> list[SlowInode]:
        """Leaves that have data blocks."""
        leaves = [i for i in self.inodes if i.content and not i.entries]
        return [i for i in leaves if self.get(i, 16, "I") and not stat.S_ISDIR(i.mode)]

    def body(self, inode: SlowInode) -> int:
        icount = self.get(inode, 2, "H")
        return self.xattrs_off(inode) + (4 * icount + 8 if icount else 0)

    def tail_directory(self) -> SlowInode:
        """A directory with three or more entries of its own, all in the tail."""
        return self.find(lambda i: len(i.entries) > 5 and i.size < 2048 and self.layout(i) == 2)

    def entry(self, directory: SlowInode, name: bytes) -> int:
        """Offset of an entry in a directory that is all tail."""
        names = [entry[0] for entry in directory.entries]
        return self.body(directory) + 12 * names.index(name)

    def own_entry(self, directory: SlowInode, number: int) -> int:
        names = [name for name, _, _ in directory.entries if name not in (b".", b"..")]
        return self.entry(directory, names[number])

    def name_off(self, entry: int, directory: SlowInode) -> int:
        return self.body(directory) + int(struct.unpack_from("<H", self.image, entry + 8)[0])


def is_regular(inode: SlowInode) -> bool:
    return stat.S_ISREG(inode.mode)


def is_directory(inode: SlowInode) -> bool:
    return stat.S_ISDIR(inode.mode)


def is_link(inode: SlowInode) -> bool:
    return stat.S_ISLNK(inode.mode)


def root_is_no_directory(p: Patient) -> str:
    p.put(p.inodes[0], 4, "H", 0o100644)
    return "i_mode of the root is 33188: expected a directory"


def format_bits(p: Patient) -> str:
    p.put(p.inodes[5], 0, "H", 0x10)
    return f"inode {p.inodes[5].nid}: i_format is 16: expected layout 0, 2 or 4"


def compressed(p: Patient) -> str:
    p.put(p.inodes[5], 0, "H", 2)
    return "i_format is 2: expected layout 0, 2 or 4"


def file_type(p: Patient) -> str:
    p.put(p.inodes[5], 4, "H", 0o644)
    return f"inode {p.inodes[5].nid}: i_mode is 420: expected a valid file type"


def chunked_link(p: Patient) -> str:
    link = p.find(is_link)
    p.put(link, 0, "H", 8 | p.is_extended(link))
    return f"inode {link.nid}: layout is 4: expected 0 or 2"


def empty_link(p: Patient) -> str:
    link = p.find(is_link)
    p.put_size(link, 0)
    return f"inode {link.nid}: i_size is 0: expected 1 to 4095 for a link"


def long_link(p: Patient) -> str:
    link = p.find(is_link)
    p.put_size(link, 4096)
    return "i_size is 4096: expected 1 to 4095 for a link"


def nul_in_link(p: Patient) -> str:
    link = p.find(lambda i: is_link(i) and i.size > 20 and p.layout(i) == 2)
    p.image[p.body(link) + 17] = 0
    return f"inode {link.nid}: i_size is {link.size}: expected a link target without nul"


def long_content(p: Patient) -> str:
    file = p.find(lambda i: is_regular(i) and p.layout(i) == 2)
    p.put_size(file, 5001)
    return "i_size is 5001: expected at most 5000 for content in the image"


def negative_size(p: Patient) -> str:
    file = p.find(lambda i: is_regular(i) and p.layout(i) == 4 and p.is_extended(i))
    p.put_size(file, 1 << 63)
    return f"inode {file.nid}: i_size is {1 << 63}: expected at most {(1 << 63) - 1} for a file"


def small_directory(p: Patient) -> str:
    directory = p.tail_directory()
    p.put_size(directory, 26)
    return f"inode {directory.nid}: i_size is 26: expected at least 27 for a directory"


def huge_directory(p: Patient) -> str:
    directory = p.find(lambda i: is_directory(i) and p.is_extended(i))
    p.put_size(directory, 1 << 63)
    return f"inode {directory.nid}: i_size is {1 << 63}: expected at most {len(p.image)}"


def sized_device(p: Patient) -> str:
    device = p.find(lambda i: stat.S_ISFIFO(i.mode))
    p.put_size(device, 1)
    return f"inode {device.nid}: i_size is 1: expected 0 for a special file"


def linked_whiteout(p: Patient) -> str:
    stub = p.find(lambda i: stat.S_ISCHR(i.mode) and i.rdev == 0)
    p.put_nlink(stub, 2)
    return f"inode {stub.nid}: i_nlink is 2: expected 1 for a whiteout"


def blocks_outside(p: Patient) -> str:
    file = p.in_blocks()[0]
    p.put(file, 16, "I", 0xFFFFFFFF)
    return f"inode {file.nid}: end of the data blocks is"


def shared_blocks(p: Patient) -> str:
    first, second = [i for i in p.inodes if is_directory(i) and i.size >= 4096][:2]
    p.put(first, 16, "I", p.get(second, 16, "I"))
    return "end of the data blocks is"


def cut(p: Patient) -> str:
    blocks = len(p.image) // 4096 - 40
    struct.pack_into("<I", p.image, 1060, blocks)
    return f": expected at most {blocks * 4096}"


def overlapping_inodes(p: Patient) -> str:
    file = p.find(lambda i: is_regular(i) and i.size == 0 and not i.xattrs)
    p.put(file, 0, "H", 4 | p.is_extended(file))
    p.put_size(file, 900)
    return f"inode {file.nid}: end of the inode is"


def shared_count(p: Patient) -> str:
    file = p.find_inline()
    p.image[p.xattrs_off(file) + 4] = 255
    return f"inode {file.nid}: size of shared xattr references is 1032: expected room"


def inline_past_end(p: Patient) -> str:
    file = p.find_inline()
    struct.pack_into("<H", p.image, p.first_inline(file) + 2, 0xFFFF)
    return f"inode {file.nid}: end of an xattr is"


def prefix(p: Patient) -> str:
    file = p.find_inline()
    p.image[p.first_inline(file) + 1] = 7
    return f"inode {file.nid}: xattr name prefix is 7: expected 0 to 6"


def long_prefix(p: Patient) -> str:
    file = p.find_inline()
    p.image[p.first_inline(file) + 1] = 0x84
    return f"inode {file.nid}: xattr name prefix is 132: expected 0 to 6"


def nul_in_xattr(p: Patient) -> str:
    file = p.find_inline()
    p.image[p.first_inline(file) + 6] = 0
    return f"inode {file.nid}: xattr name with a nul at is 10: expected none"


def no_xattr_name(p: Patient) -> str:
    file = p.find_inline()
    entry = p.first_inline(file)
    suffix, value = p.image[entry], struct.unpack_from("<H", p.image, entry + 2)[0]
    struct.pack_into("<BBH", p.image, entry, 0, 0, suffix + value)
    return f"inode {file.nid}: size of an xattr name is 0: expected at least 1"


def xattr_twice(p: Patient) -> str:
    inode = p.find(lambda i: p.image[p.xattrs_off(i) + 4] >= 2 and i.xattrs)
    off = p.xattrs_off(inode) + 12
    p.image[off : off + 4] = p.image[off + 4 : off + 8]
    return f"inode {inode.nid}: xattr name that occurs twice, size is"


def reference(p: Patient) -> str:
    inode = p.find(lambda i: i.xattrs and p.image[p.xattrs_off(i) + 4] >= 1)
    struct.pack_into("<I", p.image, p.xattrs_off(inode) + 12, 0xFFFFFFFF)
    return f"inode {inode.nid}: shared xattr is 4294967295: expected inside the image"


def record(field: int, text: str) -> Callable[[Patient], str]:
    def damage(p: Patient) -> str:
        file = p.find(lambda i: any(len(v) == 36 and n.endswith(b"metacopy") for n, v in i.xattrs))
        value = dict(file.xattrs)[b"trusted.overlay.metacopy"]
        at = p.image.index(value, p.first_inline(file))
        p.image[at + field] = 9
        return f"inode {file.nid}: {text} of a digest record is 9: expected"

    return damage


def nul_in_redirect(p: Patient) -> str:
    file = p.find(lambda i: b"trusted.overlay.redirect" in dict(i.xattrs))
    value = dict(file.xattrs)[b"trusted.overlay.redirect"]
    p.image[p.image.index(value, p.off(file)) + 5] = 0
    return f"inode {file.nid}: offset of a redirect is"


def first_nameoff(p: Patient) -> str:
    directory = p.tail_directory()
    struct.pack_into("<H", p.image, p.body(directory) + 8, 13)
    return f"inode {directory.nid}: first nameoff is 13: expected a multiple of 12"


def no_entries(p: Patient) -> str:
    directory = p.tail_directory()
    struct.pack_into("<H", p.image, p.body(directory) + 8, 0)
    return f"inode {directory.nid}: first nameoff is 0: expected"


def nameoff(p: Patient) -> str:
    directory = p.tail_directory()
    struct.pack_into("<H", p.image, p.body(directory) + 20, 5)
    return f"inode {directory.nid}: nameoff is"


def long_name(p: Patient) -> str:
    directory = p.find(lambda i: i.size > 3000 and is_directory(i) and i is not p.inodes[0])
    start = 4096 * p.get(directory, 16, "I")
    struct.pack_into("<H", p.image, start + 8, 12)
    p.image[start + 12 : start + 312] = b"x" * 300
    return f"inode {directory.nid}: size of a name is 4084: expected 1 to 255"


def slash(p: Patient) -> str:
    directory = p.tail_directory()
    p.image[p.name_off(p.own_entry(directory, 1), directory)] = ord("/")
    return f"inode {directory.nid}: offset of a name is"


def nul_in_name(p: Patient) -> str:
    directory = p.tail_directory()
    p.image[p.name_off(p.own_entry(directory, 0), directory)] = 0
    return f"inode {directory.nid}: offset of a name is"


def descending(p: Patient) -> str:
    directory = p.tail_directory()
    p.image[p.name_off(p.own_entry(directory, 0), directory)] = 0xFF
    return "expected a name greater than the one before"


def entry_nid(p: Patient) -> str:
    directory = p.tail_directory()
    struct.pack_into("<Q", p.image, p.own_entry(directory, 0), 1 << 63)
    return f"inode {directory.nid}: nid of an entry is {1 << 63}: expected 36 to"


def entry_type(p: Patient) -> str:
    directory = p.tail_directory()
    p.image[p.own_entry(directory, 0) + 10] ^= 7
    return "file type of its entry is"


def dot(p: Patient) -> str:
    directory = p.tail_directory()
    struct.pack_into("<Q", p.image, p.entry(directory, b"."), p.inodes[0].nid)
    return f"inode {directory.nid}: nid of entry . is {p.inodes[0].nid}: expected the directory"


def dotdot(p: Patient) -> str:
    directory = p.tail_directory()
    struct.pack_into("<Q", p.image, p.entry(directory, b".."), directory.nid)
    return f"inode {directory.nid}: nid of entry .. is {directory.nid}: expected the parent"


def no_dotdot(p: Patient) -> str:
    directory = p.tail_directory()
    entry, leaf = p.entry(directory, b".."), p.find(is_regular)
    p.image[p.name_off(entry, directory) + 1] = ord("!")
    struct.pack_into("<Q", p.image, entry, leaf.nid)
    p.image[entry + 10] = 1
    return f"inode {directory.nid}: number of entry .. is 0: expected 1"


def linked_directory(p: Patient) -> str:
    holders = [i for i in p.inodes[1:] if len(i.entries) > 3 and i.size < 2048]
    inside = {nid: name for name, nid, code in holders[0].entries if code == 2}
    entry = p.own_entry(holders[0], 0)
    other = p.find(lambda i: is_directory(i) and i.nid not in inside and i is not p.inodes[0])
    struct.pack_into("<Q", p.image, entry, other.nid)
    p.image[entry + 10] = 2
    return "names of the directory is 2: expected 1"


def directory_nlink(p: Patient) -> str:
    directory = p.tail_directory()
    p.put_nlink(directory, 77)
    return f"inode {directory.nid}: i_nlink is 77: expected 2 + subdirectories"


DAMAGES = {
    f.__name__: f
    for f in (
        root_is_no_directory, format_bits, compressed, file_type, chunked_link, empty_link,
        long_link, nul_in_link, long_content, negative_size, small_directory, huge_directory,
        sized_device, linked_whiteout, blocks_outside, shared_blocks, cut, overlapping_inodes,
        shared_count, inline_past_end, prefix, long_prefix, nul_in_xattr, no_xattr_name,
        xattr_twice, reference, nul_in_redirect, first_nameoff, no_entries, nameoff, long_name,
        slash, nul_in_name, descending, entry_nid, entry_type, dot, dotdot, no_dotdot,
        linked_directory, directory_nlink,
    )
} | {
    f"record_{text}": record(field, text)
    for field, text in enumerate(("version", "length", "flags", "algorithm"))
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_refused_image(kinds: bytes, name: str) -> None:
    patient = Patient(kinds)
    message = DAMAGES[name](patient)
    with pytest.raises(FormatError, match=re.escape(message)):
        read(patient.image)


def test_a_device_without_end_is_read_to_the_limit_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cfs.erofs.images.MAX_IMAGE_SIZE", 8192)
    with pytest.raises(FormatError, match=r"/dev/zero: size is 8193: expected at most 8192"):
        open_image("/dev/zero")
