"""SELinux labels, set as the policy in the tree itself says.

Specification: repository 6.7.  Labels that were there before are lost.
"""

import stat
from dataclasses import dataclass, field, replace

from cfs.errors import NotFoundError
from cfs.transform.contents import (
    Path,
    ReadContent,
    find_directory,
    find_regular,
    format_path,
    parse_path,
    read_text,
)
from cfs.transform.file_contexts import BLANKS, FileContexts, parse_substitutions
from cfs.tree import Child, Directory, Inode, Link, inode_of, settle_links, walk

__all__ = ["apply_labels"]

_LABEL = b"security.selinux"
_SELINUX = (b"etc", b"selinux")
_CONFIG = b"config"
_TYPE_KEY = "selinuxtype"
_CONTEXT_FILES = (b"file_contexts", b"file_contexts.local", b"file_contexts.homedirs")
_SUBSTITUTION_FILES = (b"file_contexts.subs", b"file_contexts.subs_dist")
_KINDS = {
    stat.S_IFDIR: b"d",
    stat.S_IFREG: b"-",
    stat.S_IFLNK: b"l",
    stat.S_IFCHR: b"c",
    stat.S_IFBLK: b"b",
    stat.S_IFIFO: b"p",
    stat.S_IFSOCK: b"s",
}


@dataclass(slots=True)
class _Policy:
    """A policy.

    Attributes:
        contexts: which path gets which label.
        substitutions: what to look up in place of a path.
    """

    contexts: FileContexts = field(default_factory=FileContexts)
    substitutions: dict[bytes, bytes] = field(default_factory=dict)

    def label(self, path: bytes, inode: Inode) -> bytes | None:
        return self.contexts.find(path, _KINDS[stat.S_IFMT(inode.mode)])


def apply_labels(root: Directory, read_content: ReadContent) -> None:
    """Set the label of every inode; without a policy, remove them all.

    Names of one file that are to have different labels become files of their own.

    Raises:
        NotFoundError: the policy lacks a file.
        FormatError: the policy is malformed, or is no plain file or directory.
        IntegrityError: a file of it is not what the tree says.
        UnsupportedError: PCRE2 is not installed.
        OSError: it cannot be read.
    """
    policy = _load_policy(root, read_content)
    if policy is not None:
        _set_labels(root, policy)
        settle_links(root)
        return
    for _, child in walk(root):
        inode_of(child).xattrs.pop(_LABEL, None)


def _load_policy(root: Directory, read_content: ReadContent) -> _Policy | None:
    """Return the policy that ``/etc/selinux/config`` names, if any."""
    selinux = find_directory(root, _SELINUX)
    if selinux is None or _CONFIG not in selinux.children:
        return None
    path = (*_SELINUX, _CONFIG)
    name = _parse_type(read_text(find_regular(root, path), path, read_content))
    if name is None:
        return None
    place = (*_SELINUX, *parse_path(name.encode() + b"/contexts/files"))
    directory = find_directory(root, place)
    if directory is None or _CONTEXT_FILES[0] not in directory.children:
        msg = f"{format_path((*place, _CONTEXT_FILES[0]))} does not exist"
        raise NotFoundError(msg)

    def texts(names: tuple[bytes, ...]) -> list[tuple[str, str]]:
        paths: list[Path] = [(*place, name) for name in names if name in directory.children]
        return [
            (read_text(find_regular(root, path), path, read_content), format_path(path))
            for path in paths
        ]

    policy = _Policy()
    for text, where in texts(_CONTEXT_FILES):
        policy.contexts.add(text, where)
    for text, where in texts(_SUBSTITUTION_FILES):
        policy.substitutions |= parse_substitutions(text, where)
    return policy


def _parse_type(config: str) -> str | None:
    """Return the name of the policy; the first line that has one counts."""
    for line in config.split("\n"):
        key, equals, value = line.partition("=")
        if equals and key.strip(BLANKS).lower() == _TYPE_KEY:
            return value.strip(BLANKS)
    return None


def _set_labels(root: Directory, policy: _Policy) -> None:
    """Walk depth-first in name order: the first name of a leaf decides its label.

    The path that is looked up is kept apart from the real one, because an alias is the base of
    all that is below it.
    """
    _set_label(root, policy.label(b"/", root))
    labels: dict[int, bytes | None] = {}
    stack: list[tuple[bytes, Directory, bytes]] = []

    def push(path: bytes, directory: Directory) -> None:
        stack.extend((path, directory, name) for name in sorted(directory.children, reverse=True))

    push(b"", root)
    while stack:
        parent_path, parent, name = stack.pop()
        path = parent_path + b"/" + name
        path = policy.substitutions.get(path, path)
        inode = inode_of(parent.children[name])
        label = policy.label(path, inode)
        if isinstance(inode, Directory):
            _set_label(inode, label)
            push(path, inode)
        elif id(inode) not in labels:
            labels[id(inode)] = label
            _set_label(inode, label)
            parent.children[name] = inode
        else:
            parent.children[name] = _further_name(inode, label, is_same=labels[id(inode)] == label)


def _further_name(inode: Inode, label: bytes | None, *, is_same: bool) -> Child:
    if is_same:
        return Link(inode)
    copy = replace(inode, xattrs=dict(inode.xattrs))
    _set_label(copy, label)
    return copy


def _set_label(inode: Inode, label: bytes | None) -> None:
    if label is None:
        inode.xattrs.pop(_LABEL, None)
    else:
        inode.xattrs[_LABEL] = label
