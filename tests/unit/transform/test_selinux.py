"""SELinux labels; where the policy stands and what is no policy is in ``boot.json``, too."""

import stat

import pytest

from cfs.errors import FormatError, NotFoundError, UnsupportedError
from cfs.transform import pcre
from cfs.transform.selinux import apply_labels
from cfs.tree import Directory, Inode, Link, Regular, Special, Symlink, inode_of, walk

LABEL = b"security.selinux"
FILES = b"/etc/selinux/t/contexts/files/file_contexts"


def regular(content: bytes = b"") -> Regular:
    return Regular(mode=stat.S_IFREG, size=len(content), content=content)


def put(root: Directory, path: bytes, inode: Inode | Link) -> None:
    *parents, name = path.strip(b"/").split(b"/")
    directory = root
    for parent in parents:
        below = directory.children.setdefault(parent, Directory(mode=stat.S_IFDIR))
        assert isinstance(below, Directory)
        directory = below
    directory.children[name] = inode


def make_tree(contexts: bytes, **files: bytes) -> Directory:
    root = Directory(mode=stat.S_IFDIR)
    put(root, b"/etc/selinux/config", regular(b"SELINUXTYPE=t\n"))
    put(root, FILES, regular(contexts))
    for name, content in files.items():
        put(root, FILES + b"." + name.encode(), regular(content))
    return root


def read_nothing(path: bytes, file: Regular) -> bytes:
    raise AssertionError(path, file)


def labels(root: Directory) -> dict[bytes, bytes | None]:
    """Return the labels of what is not the policy."""
    return {
        path: inode_of(child).xattrs.get(LABEL)
        for path, child in walk(root)
        if not path.startswith(b"/etc")
    }


def test_every_type_has_its_letter() -> None:
    kinds = {
        b"/b": Special(mode=stat.S_IFBLK),
        b"/c": Special(mode=stat.S_IFCHR, rdev=1),
        b"/d": Directory(mode=stat.S_IFDIR),
        b"/l": Symlink(mode=stat.S_IFLNK, target=b"x"),
        b"/p": Special(mode=stat.S_IFIFO),
        b"/s": Special(mode=stat.S_IFSOCK),
        b"/-": regular(),
    }
    text = b"".join(b"/. -%s is%s\n" % (path[1:], path[1:]) for path in kinds)
    root = make_tree(text)
    for path, inode in kinds.items():
        put(root, path, inode)
    apply_labels(root, read_nothing)
    assert labels(root) == {b"/": None} | {path: b"is" + path[1:] for path in kinds}


def test_no_match_and_none_remove_a_label() -> None:
    root = make_tree(b"/a <<none>>\n")
    for path in (b"/a", b"/b"):
        inode = regular()
        inode.xattrs = {LABEL: b"old", b"user.x": b"kept"}
        put(root, path, inode)
    apply_labels(root, read_nothing)
    for name in (b"a", b"b"):
        assert inode_of(root.children[name]).xattrs == {b"user.x": b"kept"}


def test_without_a_policy_all_labels_go() -> None:
    root = Directory(mode=stat.S_IFDIR, xattrs={LABEL: b"x"})
    put(root, b"/d/f", regular())
    for _, child in walk(root):
        inode_of(child).xattrs[LABEL] = b"old"
    apply_labels(root, read_nothing)
    assert set(labels(root).values()) == {None}


def test_names_with_other_labels_become_files_of_their_own() -> None:
    root = make_tree(b"/.* x\n/b y\n/d y\n")
    file = regular(b"text")
    file.xattrs[b"user.a"] = b"1"
    put(root, b"/e", file)
    for name in (b"/a", b"/b", b"/c", b"/d"):
        put(root, name, Link(file))
    apply_labels(root, read_nothing)
    nodes = {name: inode_of(root.children[name]) for name in (b"a", b"b", b"c", b"d", b"e")}
    assert nodes[b"a"] is nodes[b"c"] is nodes[b"e"] is file
    assert file.nlink == 3
    assert root.children[b"a"] is file
    assert nodes[b"b"] is not nodes[b"d"]  # copies are not shared
    for name in (b"b", b"d"):
        copy = nodes[name]
        assert isinstance(copy, Regular)
        assert (copy.content, copy.nlink) == (b"text", 1)
        assert copy.xattrs == {b"user.a": b"1", LABEL: b"y"}


def test_an_alias_is_the_base_of_all_below_it() -> None:
    root = make_tree(b"/.* x\n/b/f y\n/c z\n", subs=b"/a /b\n/b/g /q\n", subs_dist=b"/b/g /c\n")
    put(root, b"/a/f", regular())
    put(root, b"/a/g", regular())
    apply_labels(root, read_nothing)
    assert labels(root) == {b"/": b"x", b"/a": b"x", b"/a/f": b"y", b"/a/g": b"z"}


def test_depth_has_no_limit() -> None:
    root = make_tree(b"/.* x\n")
    put(root, b"/d" * 2000, regular())
    apply_labels(root, read_nothing)
    assert set(labels(root).values()) == {b"x"}


@pytest.mark.parametrize("config", [b"SELINUXTYPE=u\n", b"SELINUXTYPE=\n"])
def test_a_policy_that_is_named_has_to_be_there(config: bytes) -> None:
    root = make_tree(b"")
    put(root, b"/etc/selinux/config", regular(config))
    with pytest.raises(NotFoundError, match="file_contexts does not exist"):
        apply_labels(root, read_nothing)


def test_errors_say_where() -> None:
    with pytest.raises(FormatError, match=f"{FILES.decode()}.local:2: "):
        apply_labels(make_tree(b"", local=b"\n/x\n"), read_nothing)
    with pytest.raises(FormatError, match=f"{FILES.decode()}: byte 1 is not UTF-8"):
        apply_labels(make_tree(b"/\xff a\n"), read_nothing)


def test_without_pcre_there_are_no_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pcre, "_LIBRARY", "libnothing.so.0")
    pcre._library.cache_clear()
    try:
        with pytest.raises(UnsupportedError, match=r"labels need libnothing\.so\.0"):
            apply_labels(make_tree(b"/x a\n"), read_nothing)
        apply_labels(Directory(mode=stat.S_IFDIR), read_nothing)
    finally:
        pcre._library.cache_clear()
