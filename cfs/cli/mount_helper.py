"""What ``mount.composefs`` and ``mount.fuse.composefs`` take (spec cli-and-varlink a.13).

Both are started by users and by mount(8), which puts the arguments first and adds flags of its
own: ``mount.TYPE IMAGE DIR [-sfnv] [-o OPTIONS] [-t TYPE]``.
"""

import getopt
import os
import stat
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

from cfs.cli.report import run_reporting
from cfs.digest import Digest
from cfs.errors import FormatError, IntegrityError, InvalidRequestError, NotFoundError
from cfs.linux.mounts import MountAttr

__all__ = ["HelperArguments", "HelperUsageError", "open_image_file", "run_helper"]

_USAGE = """\
Usage: {tool} [-t TYPE] [-o OPTION[,OPTION...]] IMAGE DIRECTORY
or:    mount -t {fstype} -o OPTION[,OPTION...] IMAGE DIRECTORY
Options:
  basedir=DIR[:DIR...]  directories of objects
  upperdir=DIR          directory that gets the changes
  workdir=DIR           empty directory on the same file system
  digest=HEX            fs-verity digest that the image must have; implies verity
  verity                every file must have the fs-verity digest that the image tells
  ro, rw                read-only, or writable if there is an upper directory
{more}"""

_VALUES = ("basedir", "digest", "upperdir", "workdir")
_FLAGS = ("verity", "ro", "rw")
# of mount(8) and fstab; what is not about the mount itself is for others to obey
_NONE = MountAttr.NONE
_ATIME = MountAttr.NOATIME | MountAttr.STRICTATIME  # both at once mean nothing
_ATTRIBUTES = {  # bits that an option decides, and how
    "suid": (MountAttr.NOSUID, _NONE), "nosuid": (MountAttr.NOSUID, MountAttr.NOSUID),
    "dev": (MountAttr.NODEV, _NONE), "nodev": (MountAttr.NODEV, MountAttr.NODEV),
    "exec": (MountAttr.NOEXEC, _NONE), "noexec": (MountAttr.NOEXEC, MountAttr.NOEXEC),
    "atime": (MountAttr.NOATIME, _NONE), "noatime": (_ATIME, MountAttr.NOATIME),
    "relatime": (_ATIME, _NONE), "norelatime": (_NONE, _NONE),
    "strictatime": (_ATIME, MountAttr.STRICTATIME),
    "nostrictatime": (MountAttr.STRICTATIME, _NONE),
    "diratime": (MountAttr.NODIRATIME, _NONE),
    "nodiratime": (MountAttr.NODIRATIME, MountAttr.NODIRATIME),
    "symfollow": (MountAttr.NOSYMFOLLOW, _NONE),
    "nosymfollow": (MountAttr.NOSYMFOLLOW, MountAttr.NOSYMFOLLOW),
}  # fmt: skip
_IGNORED = (
    "defaults", "auto", "noauto", "nofail", "_netdev", "silent", "loud",
    "user", "nouser", "users", "owner", "group",
)  # fmt: skip
_IGNORED_PREFIXES = ("x-", "X-", "comment=", "user=")


class HelperUsageError(InvalidRequestError):
    """The command line itself is wrong: show how it has to be."""


@dataclass(slots=True, kw_only=True)
class HelperArguments:
    """A parsed command line.

    Attributes:
        image: path.
        mountpoint: path.
        is_fake: mount nothing.
        values: of the options with a value; the last one counts.
        flags: those that were given.
        others: words for the caller, as they were given.
        attributes: of the mount.
    """

    image: str = ""
    mountpoint: str = ""
    is_fake: bool = False
    values: dict[str, str] = field(default_factory=dict)
    flags: set[str] = field(default_factory=set)
    others: list[str] = field(default_factory=list)
    attributes: MountAttr = MountAttr.NONE

    @classmethod
    def parse(
        cls,
        arguments: Sequence[str],
        fstype: str,
        *,
        values: Collection[str] = (),
        flags: Collection[str] = (),
        others: Collection[str] = (),
    ) -> Self:
        """Parse the words behind the program name.

        Args:
            arguments: the words.
            fstype: the type that is ours.
            values: more options with a value.
            flags: more options without.
            others: options for the caller to parse, with or without value.

        Raises:
            HelperUsageError: an unknown flag, or an argument is missing.
            InvalidRequestError: an option is unknown or lacks its value.
        """
        parsed = cls()
        try:
            found, words = getopt.gnu_getopt(list(arguments), "t:o:fnsv")
        except getopt.GetoptError as error:
            raise HelperUsageError(error.msg) from None
        for name, text in found:
            if name == "-t" and text != fstype:
                msg = f"Unsupported fs type '{text}'"
                raise InvalidRequestError(msg)
            if name == "-o":
                for item in _split(text):
                    parsed._add(item, (*_VALUES, *values), (*_FLAGS, *flags), others)
            parsed.is_fake |= name == "-f"
        if len(words) < 2:  # noqa: PLR2004 - IMAGE and DIRECTORY
            msg = "No mount path specified" if words else "No source path specified"
            raise HelperUsageError(msg)
        parsed.image, parsed.mountpoint = words[:2]
        if ("upperdir" in parsed.values) != ("workdir" in parsed.values):
            msg = "Both workdir and upperdir must be specified if used"
            raise InvalidRequestError(msg)
        return parsed

    def _add(
        self,
        item: str,
        values: Collection[str],
        flags: Collection[str],
        others: Collection[str],
    ) -> None:
        """Add one option; later ones overrule earlier ones."""
        key, equals, text = item.partition("=")
        if key in values:
            if not equals:
                msg = f"No value specified for {key} option"
                raise InvalidRequestError(msg)
            self.values[key] = _unescape(text)
        elif key in flags:
            self.flags -= {"ro", "rw"} if key in ("ro", "rw") else set()
            self.flags.add(key)
        elif key in others:
            self.others.append(item)
        elif key in _ATTRIBUTES:
            decided, value = _ATTRIBUTES[key]
            self.attributes = self.attributes & ~decided | value
        elif item and key not in _IGNORED and not item.startswith(_IGNORED_PREFIXES):
            msg = f"Unsupported option {key}"
            raise InvalidRequestError(msg)

    @property
    def basedirs(self) -> list[str]:
        """The objects directories, at least one.

        Raises:
            HelperUsageError: the option is missing.
            InvalidRequestError: it names none.
        """
        if "basedir" not in self.values:
            msg = "No object dirs specified"
            raise HelperUsageError(msg)
        directories = [name for name in self.values["basedir"].split(":") if name]
        if not directories:
            msg = "Value for basedir option has incorrect format"
            raise InvalidRequestError(msg)
        return directories

    @property
    def wants_verity(self) -> bool:
        """Whether all file data must have fs-verity."""
        return "verity" in self.flags or "digest" in self.values

    def check_image(self, fd: int) -> None:
        """Check that an image has the fs-verity digest that was given, if one was.

        Raises:
            InvalidRequestError: what was given is no digest.
            IntegrityError: the image has no fs-verity, or another digest.
        """
        text = self.values.get("digest")
        if text is None:
            return
        from cfs.fsverity import measure

        try:
            expected = Digest.parse(text)
        except FormatError as error:
            msg = f"Invalid digest value: {error}"
            raise InvalidRequestError(msg) from None
        found = measure(fd)
        if found != expected:
            msg = f"Image has {'wrong' if found else 'no'} fs-verity"
            raise IntegrityError(msg)

    @property
    def is_writable(self) -> bool:
        """Whether there is an upper directory, and ``ro`` was not said."""
        return "upperdir" in self.values and "ro" not in self.flags


def run_helper(
    fstype: str,
    more: str,
    arguments: Sequence[str],
    parse: Callable[[Sequence[str]], HelperArguments],
    mount: Callable[[HelperArguments, Sequence[str]], None],
) -> int:
    """Run a helper and return its status.

    Args:
        fstype: its type.
        more: usage lines of the options that only this one has.
        arguments: of the command line.
        parse: parses them.
        mount: mounts what they say, with these objects directories.
    """
    usage = _USAGE.format(tool=f"mount.{fstype}", fstype=fstype, more=more)
    if "-h" in arguments:
        print(usage, end="", file=sys.stderr)
        return 0

    def parse_and_mount() -> int:
        try:
            parsed = parse(arguments)
            basedirs = parsed.basedirs
        except HelperUsageError as error:
            print(f"{error}\n{usage}", end="", file=sys.stderr)
            return 1
        mount(parsed, basedirs)
        return 0

    return run_reporting(f"mount.{fstype}", parse_and_mount)


def open_image_file(path: str) -> int:
    """Open an image file or device and return its descriptor.

    Raises:
        NotFoundError: it cannot be opened.
        InvalidRequestError: it is something else.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as error:
        msg = f"Failed to open {path}: {error.strerror}"
        raise NotFoundError(msg) from None
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        os.close(fd)
        msg = f"Failed to open {path}: not a file"
        raise InvalidRequestError(msg)
    return fd


def _split(text: str) -> Iterator[str]:
    """Yield the items between commas; a backslash protects the next character."""
    start = off = 0
    while off < len(text):
        if text[off] == ",":
            yield text[start:off]
            start = off + 1
        off += 2 if text[off] == "\\" else 1
    yield text[start:]


def _unescape(text: str) -> str:
    characters = iter(text)
    return "".join(next(characters, "") if char == "\\" else char for char in characters)
