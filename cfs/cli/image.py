"""``cfsctl create-image``, ``compute-id``, ``compute-karg``, ``create-dumpfile``: of a directory.

Specification: cli-and-varlink a.5, repository 7.  All but the first never open the store, and
only ask which hash it has.  They read what a conversion needs from the directory itself, by the
same rules as from the store, so that they agree with ``create-image``: unlike composefs-rs, they
follow no symlinks there.
"""

import errno
import gc
import os
import sys
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import click

from cfs.cli.conversion import DEFAULT_XATTRS, bootable_option, xattrs_option
from cfs.cli.store import open_store, store_path
from cfs.cli.strict import GlobalOptions, StrictCommand, find_global_options
from cfs.digest import Algorithm
from cfs.errors import InvalidRequestError, NotFoundError
from cfs.linux.files import naming, openat2

if TYPE_CHECKING:
    from collections.abc import Callable

    from cfs.digest import Digest
    from cfs.directory import ScanOptions
    from cfs.transform import ReadContent
    from cfs.tree import Directory, Regular

__all__ = ["compute_id", "compute_karg", "create_dumpfile", "create_image"]

_DEFAULT_VERSION = 1  # whatever the store says (spec repository 7)
_C = TypeVar("_C", bound=click.Command)


class _Conversion(NamedTuple):
    """What to do to the tree of a directory."""

    is_bootable: bool
    is_oci: bool
    xattrs: str


def _add_conversion(command: _C) -> _C:
    """Give a command the options that say what to do to the tree."""
    command.params += [bootable_option(), _KEEP_ROOT, xattrs_option()]
    return command


_KEEP_ROOT = click.Option(
    ["--no-propagate-usr-to-root", "keep_root"],
    is_flag=True,
    help="Do not convert as for OCI images: for a directory that is no root of a system.",
)


@_add_conversion
@click.command(cls=StrictCommand)
@click.argument("path")
@click.argument("name", required=False)
@click.pass_context
def create_image(
    ctx: click.Context,
    /,
    *,
    path: str,
    name: str | None,
    bootable: bool,
    keep_root: bool,
    xattrs: str,
) -> None:
    """Store the directory PATH as an image, under NAME if that is given."""
    from cfs.cli.progress import Progress
    from cfs.directory import ScanOptions
    from cfs.repository.images import check_image_name, commit_image
    from cfs.transform import check_boot_resources

    conversion = _Conversion(bootable, not keep_root, xattrs)
    with open_store(ctx, write=True) as repository:
        if name is not None:
            check_image_name(name)  # before the work, not after it
        objects = repository.objects
        with Progress("Storing") as progress:
            options = ScanOptions(
                hardlinks=True,
                algorithm=repository.algorithm,
                objects=objects,
                progress=progress.advance,
            )
            root = _scan(path, options)

        def read_content(_: bytes, file: "Regular") -> bytes:
            assert file.digest is not None
            with open(objects.open_object(file.digest), "rb") as stream:
                return stream.read(file.size)

        _convert(root, conversion, read_content, check=check_boot_resources)
        digest = commit_image(repository, root, name)
    click.echo(f"{digest.algorithm.name.lower()}:{digest}")


@_add_conversion
@click.command(cls=StrictCommand)
@click.argument("path")
@click.pass_context
def compute_id(
    ctx: click.Context, /, path: str, bootable: bool, keep_root: bool, xattrs: str
) -> None:
    """Print the digest of the image of the directory PATH."""
    options = find_global_options(ctx)
    click.echo(_compute_id(options, path, _Conversion(bootable, not keep_root, xattrs)))


@click.command(cls=StrictCommand, params=[_KEEP_ROOT])
@click.argument("path")
@click.pass_context
def compute_karg(ctx: click.Context, /, path: str, keep_root: bool) -> None:
    """Print the kernel argument that boots the directory PATH."""
    from cfs.repository.boot_argument import format_argument

    options = find_global_options(ctx)
    digest = _compute_id(options, path, _Conversion(True, not keep_root, DEFAULT_XATTRS))
    version = _DEFAULT_VERSION if options.erofs_version is None else options.erofs_version
    click.echo(format_argument(digest, version, is_secure=not options.insecure))


@_add_conversion
@click.command(cls=StrictCommand)
@click.argument("path")
@click.pass_context
def create_dumpfile(
    ctx: click.Context, /, path: str, bootable: bool, keep_root: bool, xattrs: str
) -> None:
    """Print the directory PATH as a dumpfile."""
    from cfs.dumpfile import format_tree

    options = find_global_options(ctx)
    root = _read_tree(options, path, _Conversion(bootable, not keep_root, xattrs))
    sys.stdout.buffer.writelines(format_tree(root))


def _compute_id(options: GlobalOptions, path: str, conversion: _Conversion) -> "Digest":
    from cfs.erofs.writer import Rules, write_image
    from cfs.fsverity import compute_digest

    root = _read_tree(options, path, conversion)
    version = _DEFAULT_VERSION if options.erofs_version is None else options.erofs_version
    image = write_image(root, min_version=version, max_version=version, rules=Rules.RUST)
    return compute_digest(image, _choose_algorithm(options))


def _choose_algorithm(options: GlobalOptions) -> Algorithm:
    """Return the hash: no trouble with the store is an error here, as in composefs-rs."""
    from cfs.repository.repository import probe_algorithm

    if options.algorithm is not None:
        return options.algorithm
    if options.has_repository:
        try:
            found = probe_algorithm(store_path(options))
        except InvalidRequestError:
            found = None
        if found is not None:
            return found
    return Algorithm.SHA512


def _read_tree(options: GlobalOptions, path: str, conversion: _Conversion) -> "Directory":
    """Return the converted tree of a directory without a store."""
    from cfs.directory import ScanOptions

    root = _scan(path, ScanOptions(hardlinks=True, algorithm=_choose_algorithm(options)))

    def read_content(file_path: bytes, file: "Regular") -> bytes:
        directory = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
            fd = openat2(directory, file_path.lstrip(b"/"), flags)
        finally:
            os.close(directory)
        with naming(file_path), open(fd, "rb") as stream:
            return stream.read(file.size)

    _convert(root, conversion, read_content)
    return root


def _scan(path: str, options: "ScanOptions") -> "Directory":
    """Return the tree of a directory, which must not be named by a symlink."""
    from cfs.directory import scan

    gc.disable()  # all that is made lives to the end; looking for garbage costs a third of the time
    if os.path.islink(path):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
    return scan(path, options=options)


def _convert(
    root: "Directory",
    conversion: _Conversion,
    read_content: "ReadContent",
    *,
    check: "Callable[[Directory, ReadContent], None] | None" = None,
) -> None:
    from cfs.transform import XattrMode, apply_boot, apply_oci

    if conversion.is_oci:
        try:
            apply_oci(root, XattrMode(conversion.xattrs))
        except NotFoundError as error:
            msg = f"{error} ({_KEEP_ROOT.opts[0]} stores a directory as it is)"
            raise NotFoundError(msg) from None
    if conversion.is_bootable:
        if check is not None:
            check(root, read_content)
        apply_boot(root, read_content)
