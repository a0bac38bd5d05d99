"""Arguments of the mount helpers (spec cli-and-varlink a.13)."""

import os
from pathlib import Path

import pytest

from cfs.cli.mount_helper import HelperArguments, HelperUsageError, open_image_file
from cfs.errors import IntegrityError, InvalidRequestError, NotFoundError
from cfs.linux.mounts import MountAttr


def parse(*words: str) -> HelperArguments:
    return HelperArguments.parse(
        words, "composefs", values=["idmap"], flags=["tryverity"], others=["workers", "allow-other"]
    )


def parse_options(*texts: str) -> HelperArguments:
    options = [word for text in texts for word in ("-o", text)]
    return parse("image", "dir", *options)


def test_as_mount_8_starts_it() -> None:
    parsed = parse("/image", "/dir", "-n", "-s", "-v", "-o", "rw,basedir=a", "-t", "composefs")
    assert (parsed.image, parsed.mountpoint, parsed.is_fake) == ("/image", "/dir", False)
    assert parsed.basedirs == ["a"]
    assert parse("-f", "/image", "/dir").is_fake


def test_options_may_stand_before_the_arguments() -> None:
    assert parse("-t", "composefs", "-obasedir=a:b", "i", "d").basedirs == ["a", "b"]


def test_several_lists_are_one_and_the_last_value_counts() -> None:
    parsed = parse_options("basedir=a,digest=1", "verity", "basedir=b")
    assert parsed.basedirs == ["b"]
    assert parsed.values["digest"] == "1"
    assert parsed.flags == {"verity"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", ["a"]),
        ("a:b:", ["a", "b"]),
        ("::a", ["a"]),
        ("a=b", ["a=b"]),
        (r"a\,b", ["a,b"]),
        (r"a\\\,b", ["a\\,b"]),
        (r"a\=b", ["a=b"]),
    ],
)
def test_values(text: str, expected: list[str]) -> None:
    assert parse_options(f"basedir={text},verity").basedirs == expected
    assert parse_options(f"verity,basedir={text}").basedirs == expected


def test_backslash_at_the_end_protects_nothing() -> None:
    assert parse_options("basedir=a\\").basedirs == ["a"]


@pytest.mark.parametrize(
    ("text", "counts"),
    [("", "rw"), ("ro", "ro"), ("ro,rw", "rw"), ("rw,ro", "ro"), ("ro,rw,ro", "ro")],
)
def test_last_of_ro_and_rw_counts(text: str, counts: str) -> None:
    parsed = parse_options("upperdir=u,workdir=w", text)
    assert parsed.is_writable == (counts == "rw")


def test_without_an_upper_directory_nothing_is_writable() -> None:
    assert not parse_options("rw").is_writable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nosuid,nodev,noexec", MountAttr.NOSUID | MountAttr.NODEV | MountAttr.NOEXEC),
        ("nosuid,suid,nodev", MountAttr.NODEV),
        ("noatime,relatime", MountAttr.NONE),
        ("noatime", MountAttr.NOATIME),
        ("noatime,norelatime,strictatime", MountAttr.STRICTATIME),
        ("strictatime,noatime,nodiratime", MountAttr.NOATIME | MountAttr.NODIRATIME),
        ("strictatime,relatime", MountAttr.NONE),
        ("strictatime,nostrictatime,noatime,atime", MountAttr.NONE),
        ("nosymfollow", MountAttr.NOSYMFOLLOW),
        ("defaults,_netdev,nofail,noauto,user,x-systemd.automount,comment=x", MountAttr.NONE),
    ],
)
def test_options_of_every_mount(text: str, expected: MountAttr) -> None:
    assert parse_options(text).attributes == expected


def test_options_for_the_caller_are_handed_on() -> None:
    assert parse_options("workers=2,ro,allow-other").others == ["workers=2", "allow-other"]


@pytest.mark.parametrize("text", ["digest=x", "verity", "digest=x,tryverity"])
def test_a_digest_implies_verity(text: str) -> None:
    assert parse_options(text).wants_verity
    assert not parse_options("tryverity").wants_verity


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nope", "Unsupported option nope"),
        ("nope=1", "Unsupported option nope"),
        ("context=x", "Unsupported option context"),
        ("basedir", "No value specified for basedir option"),
        ("digest", "No value specified for digest option"),
        ("idmap", "No value specified for idmap option"),
        ("upperdir=u", "Both workdir and upperdir must be specified if used"),
        ("workdir=w", "Both workdir and upperdir must be specified if used"),
    ],
)
def test_wrong_options(text: str, message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_options(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "No source path specified"),
        (("image",), "No mount path specified"),
        (("-x", "image", "dir"), "option -x not recognized"),
        (("-N", "ns", "image", "dir"), "option -N not recognized"),
        (("image", "dir", "-o"), "option -o requires argument"),
    ],
)
def test_wrong_words(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(HelperUsageError, match=message):
        parse(*words)


def test_other_type() -> None:
    with pytest.raises(InvalidRequestError, match="Unsupported fs type 'foo'"):
        parse("-t", "foo", "image", "dir")


def test_objects_directories_are_needed() -> None:
    with pytest.raises(HelperUsageError, match="No object dirs specified"):
        _ = parse_options("ro").basedirs
    for text in ("basedir=", "basedir=::"):
        with pytest.raises(InvalidRequestError, match="incorrect format"):
            _ = parse_options(text).basedirs


def test_image_is_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in ("fifo", "."):
        with pytest.raises(InvalidRequestError, match="not a file"):
            open_image_file(str(tmp_path / name))
    with pytest.raises(NotFoundError, match=r"Failed to open .*/none: No such file or directory"):
        open_image_file(str(tmp_path / "none"))


def test_image_without_verity_has_no_digest(tmp_path: Path) -> None:
    (tmp_path / "image").touch()
    fd = open_image_file(str(tmp_path / "image"))
    try:
        parse_options("ro").check_image(fd)
        with pytest.raises(IntegrityError, match="Image has no fs-verity"):
            parse_options(f"digest={'0' * 64}").check_image(fd)
        with pytest.raises(InvalidRequestError, match="Invalid digest value"):
            parse_options("digest=xy").check_image(fd)
    finally:
        os.close(fd)
