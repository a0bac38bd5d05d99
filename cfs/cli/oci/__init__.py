"""``cfsctl oci``: the group of the commands for OCI images (spec cli-and-varlink a.6)."""

import click

from cfs.cli.group import Entry, LazyGroup

__all__ = ["oci"]

_COMMANDS = {
    "pull": Entry("oci.pull", "pull", "Pull an image into the store"),
    "images": Entry("oci.images", "images", "List the tagged images"),
    "inspect": Entry("oci.images", "inspect", "Show manifest and configuration of an image"),
    "tag": Entry("oci.images", "tag", "Give an image a name"),
    "untag": Entry("oci.images", "untag", "Remove a name"),
    "mount": Entry("oci.mount", "mount", "Mount an image"),
    "layer": Entry("oci.layers", "layer", "Print a layer"),
    "import-layer": Entry("oci.layers", "import_layer", "Store a layer from stdin"),
    "dump": Entry("oci.trees", "dump", "Print the files of an image as a dumpfile"),
    "compute-id": Entry("oci.trees", "compute_id", "Print the digest of an image"),
    "prepare-boot": Entry("oci.boot", "prepare_boot", "Write a boot entry of an image"),
    "copy": Entry("oci.copy", "copy", "Copy an image from another store"),
    "fsck": Entry("oci.fsck", "fsck", "Check the store and its images"),
    "varlink": Entry("varlink", "varlink", "Serve stores and images over varlink"),
    "help": Entry("group", "show_help", "Print help of a command"),
}


@click.group(cls=LazyGroup, entries=_COMMANDS, no_args_is_help=False)
def oci() -> None:
    """Pull, inspect and mount OCI images."""
