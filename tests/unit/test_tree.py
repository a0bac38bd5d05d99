import stat

from cfs.tree import Directory, Link, Regular, Special, count_links, walk


def small_tree() -> tuple[Directory, Regular]:
    file = Regular(mode=stat.S_IFREG | 0o644, content=b"x", size=1)
    inner = Directory(mode=stat.S_IFDIR | 0o755, children={b"b": file, b"a": Link(file)})
    return Directory(mode=stat.S_IFDIR, children={b"z": Link(file), b"d": inner}), file


def test_walk_is_depth_first_in_name_order() -> None:
    root, _ = small_tree()
    assert [path for path, _ in walk(root)] == [b"/", b"/d", b"/d/a", b"/d/b", b"/z"]


def test_walk_of_a_very_deep_tree_does_not_recurse() -> None:
    root = leaf = Directory(mode=stat.S_IFDIR)
    for _ in range(5000):
        below = Directory(mode=stat.S_IFDIR)
        leaf.children[b"d"] = below
        leaf = below
    assert sum(1 for _ in walk(root)) == 5001


def test_count_links_counts_every_name() -> None:
    root, file = small_tree()
    count_links(root)
    assert file.nlink == 3


def test_only_a_character_device_0_0_is_a_whiteout() -> None:
    assert Special(mode=stat.S_IFCHR).is_whiteout
    assert not Special(mode=stat.S_IFCHR, rdev=1).is_whiteout
    assert not Special(mode=stat.S_IFBLK).is_whiteout
