"""``cfsctl oci prepare-boot``: write a boot entry of an image (spec cli-and-varlink a.6)."""

import os

import click

from cfs.cli.oci.trees import add_config_arguments, open_config
from cfs.cli.store import store_path
from cfs.cli.strict import StrictCommand, find_global_options
from cfs.oci.reference import Reference

__all__ = ["prepare_boot"]

_STATE = "state/deploy"
_STATE_DIRECTORIES = ("var", "etc/upper", "etc/work")


@add_config_arguments
@click.command(cls=StrictCommand)
@click.option(
    "--bootdir", metavar="DIR", default="/boot", show_default=True, help="The boot partition."
)
@click.option("--entry-id", metavar="ID", help="Name of the entry, in place of the image's.")
@click.option("--cmdline", metavar="ARG", multiple=True, help="One more argument for the kernel.")
@click.pass_context
def prepare_boot(
    ctx: click.Context,
    /,
    *,
    reference: Reference,
    stream: str | None,
    bootdir: str,
    entry_id: str | None,
    cmdline: tuple[str, ...],
) -> None:
    """Write a boot entry of an image, and make its state directories next to the store.

    REF is a tag, or @DIGEST of a config.
    """
    from cfs.oci import boot_entries

    with open_config(ctx, reference, stream, write=True) as (repository, config, verify):
        image = boot_entries.prepare_boot(
            repository, config, bootdir, entry_id=entry_id, arguments=cmdline, verify=verify
        )
    place = os.path.dirname(store_path(find_global_options(ctx)).rstrip("/"))
    for name in _STATE_DIRECTORIES:
        os.makedirs(os.path.join(place, _STATE, str(image.digest), name), exist_ok=True)
