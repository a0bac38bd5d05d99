"""The store that the global options name (spec cli-and-varlink a.2)."""

from typing import TYPE_CHECKING

import click

from cfs.cli.strict import GlobalOptions, find_global_options
from cfs.errors import InvalidRequestError

if TYPE_CHECKING:
    from cfs.repository.repository import Repository

__all__ = ["open_store", "store_path"]


def store_path(options: GlobalOptions) -> str:
    """Return the path of ``--repo``, ``--user``, ``--system``, or the default.

    Raises:
        InvalidRequestError: it is below the home directory, which nobody names.
    """
    from cfs.repository.repository import default_path

    if options.path is not None:
        return options.path
    return default_path(user=options.is_user, system=options.is_system)


def open_store(ctx: click.Context, *, write: bool = False, wait: bool = True) -> "Repository":
    """Open the store; a context manager closes it.

    Args:
        ctx: of the running command.
        write: fail at once if the store cannot be written.
        wait: wait for a collection, as long as it takes.

    Raises:
        InvalidRequestError: ``--no-repo`` was given, or the store has another hash.
        CfsError: as :meth:`cfs.repository.repository.Repository.open`.
        OSError: likewise.
    """
    from cfs.repository.repository import Repository

    options = find_global_options(ctx)
    if not options.has_repository:
        msg = "--no-repo is only supported for compute-id, compute-karg and create-dumpfile"
        raise InvalidRequestError(msg)
    repository = Repository.open(
        store_path(options),
        algorithm=options.algorithm,
        upgrade=options.upgrade,
        require_verity=options.require_verity,
        insecure=options.insecure,
        erofs_version=options.erofs_version,
        wait=wait,
    )
    if write:
        try:
            repository.check_writable()
        except BaseException:
            repository.close()
            raise
    return repository
