"""The inodes of an image to be written: their order, sizes and places.

Specification: erofs-image 3.2, 5.5 to 5.7 and section 6.
"""

from bisect import insort
from collections.abc import Mapping, Sequence

from cfs.erofs.format import (
    BLOCK_SIZE,
    DIRENT,
    FIRST_INODE_OFF,
    INLINE_TAIL_MAX,
    SLOT_SIZE,
    DataLayout,
)
from cfs.tree import Child, Directory, Inode, Link, Symlink, inode_of

__all__ = [
    "Record",
    "Replacements",
    "at_first_names",
    "breadth_first",
    "depth_first",
    "measure_directory",
    "place",
    "place_v2",
    "round_up",
    "split_dirents",
]

Replacements = dict[int, dict[bytes, Child]]
"""Children that stand for those of the directory with this ``id``."""


class Record:
    """One inode of the image.

    Attributes:
        inode: the caller's inode, never changed.
        parent: record of the directory it is in; the root is its own.
        names, children: all dirents of a directory, sorted, ``.`` and ``..`` among them.
        mode, nlink, size, i_u: as they will be stored.
        layout: where the data is.
        data: content, link target or chunk map.
        xattr_entries, xattr_filter: encoded xattrs in their order, and the name filter.
        references: the shared ones among them.
        inline_xattrs: the others, joined.
        is_compact: which header it has.
        head_size: bytes of header and xattrs.
        nr_blocks: data blocks.
        tail_size: bytes of data behind the xattrs.
        inode_off: where the header is.
    """

    __slots__ = (
        "children",
        "data",
        "head_size",
        "i_u",
        "inline_xattrs",
        "inode",
        "inode_off",
        "is_compact",
        "layout",
        "mode",
        "names",
        "nlink",
        "nr_blocks",
        "parent",
        "references",
        "size",
        "tail_size",
        "xattr_entries",
        "xattr_filter",
    )

    names: list[bytes]
    children: "list[Record]"
    xattr_entries: Sequence[bytes]
    references: Sequence[bytes]
    inline_xattrs: bytes
    xattr_filter: int
    is_compact: bool
    head_size: int
    inode_off: int

    def __init__(self, inode: Inode, parent: "Record | None") -> None:
        self.inode = inode
        self.parent = parent or self
        self.mode = inode.mode & 0xFFFF
        self.nlink = inode.nlink
        self.size = 0
        self.i_u = 0
        self.layout = DataLayout.FLAT_PLAIN
        self.data = b""
        self.nr_blocks = 0
        self.tail_size = 0


def round_up(offset: int, alignment: int) -> int:
    """Return the next multiple of ``alignment``."""
    return -(-offset // alignment) * alignment


def at_first_names(root: Directory) -> tuple[Replacements, dict[int, int]]:
    """Move each leaf to its first name in depth-first order, as composefs-rs numbers it.

    Returns:
        The children of the directories where that changes something, and the number of
        names of each leaf by ``id``.
    """
    replacements: Replacements = {}
    nr_names: dict[int, int] = {}
    pending = [(root, sorted(root.children, reverse=True))]
    while pending:
        directory, names = pending[-1]
        if not names:
            pending.pop()
            continue
        name = names.pop()
        child = directory.children[name]
        if isinstance(child, Directory):
            pending.append((child, sorted(child.children, reverse=True)))
            continue
        leaf = inode_of(child)
        is_first = id(leaf) not in nr_names
        nr_names[id(leaf)] = nr_names.get(id(leaf), 0) + 1
        if is_first == isinstance(child, Link):
            children = replacements.setdefault(id(directory), dict(directory.children))
            children[name] = leaf if is_first else Link(leaf)
    return replacements, nr_names


class _Numbering:
    """The records made so far, and how a directory gets its dirents."""

    def __init__(self, root: Directory, replacements: Replacements) -> None:
        self.root = Record(root, None)
        self.replacements = replacements
        self._records = {id(root): self.root}

    def enter(self, record: Record, directory: Directory) -> list[Record]:
        """Return records of the inodes that stand in ``directory``, in name order."""
        children = self.children_of(directory)
        records = self._records
        result = []
        nlink = 2
        names = record.names = sorted(children)
        for name in names:
            child = children[name]
            if isinstance(child, Link):
                continue
            if isinstance(child, Directory):
                nlink += 1
            below = records[id(child)] = Record(child, record)
            result.append(below)
        record.nlink = nlink
        return result

    def children_of(self, directory: Directory) -> Mapping[bytes, Child]:
        if self.replacements:
            return self.replacements.get(id(directory), directory.children)
        return directory.children

    def resolve(self, queue: list[Record]) -> list[Record]:
        """Give each directory of the complete ``queue`` its dirents."""
        records = self._records
        for record in queue:
            if isinstance(record.inode, Directory):
                below = {b".": record, b"..": record.parent}
                for name, child in self.children_of(record.inode).items():
                    below[name] = records[id(child.inode if isinstance(child, Link) else child)]
                insort(record.names, b".")
                insort(record.names, b"..")
                record.children = [below[name] for name in record.names]
        return queue


def breadth_first(root: Directory, replacements: Replacements) -> list[Record]:
    """Return all inodes, level by level: the order of versions 0 and 1."""
    numbering = _Numbering(root, replacements)
    queue = [numbering.root]
    for record in queue:
        if isinstance(record.inode, Directory):
            queue += numbering.enter(record, record.inode)
    return numbering.resolve(queue)


def depth_first(root: Directory, replacements: Replacements) -> list[Record]:
    """Return all inodes, each directory before what is below it: the order of version 2."""
    numbering = _Numbering(root, replacements)
    queue = []
    stack = [numbering.root]
    while stack:
        record = stack.pop()
        queue.append(record)
        if isinstance(record.inode, Directory):
            stack += reversed(numbering.enter(record, record.inode))
    return numbering.resolve(queue)


def split_dirents(names: Sequence[bytes]) -> list[int]:
    """Return where each block of dirents starts, as an index into ``names``."""
    starts = [0]
    block_size = 0
    for index, name in enumerate(names):
        dirent_size = DIRENT.size + len(name)
        block_size += dirent_size
        if block_size > BLOCK_SIZE:
            starts.append(index)
            block_size = dirent_size
    return starts


def measure_directory(record: Record) -> None:
    """Set size, blocks, tail and layout of a directory from its names."""
    names = record.names
    tail_size = DIRENT.size * len(names) + sum(map(len, names))
    nr_blocks = 0
    if tail_size > BLOCK_SIZE:
        starts = split_dirents(names)
        nr_blocks = len(starts) - 1
        tail_size = sum(DIRENT.size + len(name) for name in names[starts[-1] :])
    if tail_size > INLINE_TAIL_MAX:
        nr_blocks += 1
        tail_size = 0
    record.nr_blocks = nr_blocks
    record.tail_size = tail_size
    record.size = nr_blocks * BLOCK_SIZE + tail_size
    record.layout = DataLayout.FLAT_INLINE if tail_size else DataLayout.FLAT_PLAIN


def place(queue: Sequence[Record]) -> int:
    """Set ``inode_off`` of all inodes, versions 0 and 1; return where their area ends.

    What does not fit behind its inode moves into a data block.
    """
    end_off = FIRST_INODE_OFF
    for record in queue:
        inode_off = (end_off + SLOT_SIZE - 1) & -SLOT_SIZE
        if record.tail_size:
            inode_off = _keep_together(record, inode_off)
        record.inode_off = inode_off
        end_off = inode_off + record.head_size + record.tail_size
    return round_up(end_off, SLOT_SIZE)


def _keep_together(record: Record, inode_off: int) -> int:
    """Return where to put an inode so that its tail stays inside one block."""
    tail_size = record.tail_size
    if isinstance(record.inode, Symlink):
        total_size = record.head_size + tail_size
        if total_size >= BLOCK_SIZE:
            record.nr_blocks, record.tail_size = 1, 0
            record.layout = DataLayout.FLAT_PLAIN
        if inode_off // BLOCK_SIZE != (inode_off + total_size - 1) // BLOCK_SIZE:
            return round_up(inode_off, BLOCK_SIZE)
        return inode_off
    tail_off = inode_off + record.head_size
    room = BLOCK_SIZE - tail_off % BLOCK_SIZE
    if room >= tail_size:
        return inode_off
    pad_size = round_up(room, SLOT_SIZE)
    if tail_size <= BLOCK_SIZE - (tail_off + pad_size) % BLOCK_SIZE:
        return inode_off + pad_size
    record.nr_blocks, record.tail_size = record.nr_blocks + 1, 0
    return round_up(inode_off, BLOCK_SIZE)


def place_v2(queue: Sequence[Record]) -> int:
    """Set ``inode_off`` of all inodes, version 2; return where their area ends."""
    inode_off = FIRST_INODE_OFF
    for record in queue:
        if record.layout == DataLayout.FLAT_INLINE:
            last_off = inode_off + record.head_size - 1
            rest_size = record.size % BLOCK_SIZE
            if last_off // BLOCK_SIZE != (last_off + 1 + rest_size) // BLOCK_SIZE:
                inode_off = round_up(inode_off + BLOCK_SIZE - last_off % BLOCK_SIZE, SLOT_SIZE)
        record.inode_off = inode_off
        inode_off = round_up(inode_off + record.head_size + record.tail_size, SLOT_SIZE)
    return inode_off
