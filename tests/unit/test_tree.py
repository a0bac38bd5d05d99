import stat

from cfs.tree import Directory, Link, Regular, Special, settle_links, walk


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


def test_only_a_character_device_0_0_is_a_whiteout() -> None:
    assert Special(mode=stat.S_IFCHR).is_whiteout
    assert not Special(mode=stat.S_IFCHR, rdev=1).is_whiteout
    assert not Special(mode=stat.S_IFBLK).is_whiteout


def test_settle_links_moves_a_leaf_to_its_first_name() -> None:
    file = Regular(mode=stat.S_IFREG, nlink=9)
    below = Directory(mode=stat.S_IFDIR)
    below.children = {b"z": file, b"c": Link(file)}
    root = Directory(mode=stat.S_IFDIR)
    root.children = {b"e": Link(file), b"d": below}
    settle_links(root)
    assert below.children[b"c"] is file
    for link in (below.children[b"z"], root.children[b"e"]):
        assert isinstance(link, Link)
        assert link.inode is file
    assert file.nlink == 3


def test_settle_links_gives_a_place_to_a_leaf_that_has_lost_its_own() -> None:
    file = Regular(mode=stat.S_IFREG)
    root = Directory(mode=stat.S_IFDIR)
    root.children = {b"a": Link(file)}
    settle_links(root)
    assert root.children[b"a"] is file
    assert file.nlink == 1
