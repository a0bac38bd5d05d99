"""``cfsctl oci pull`` (spec cli-and-varlink a.6)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from cfs.cli.report import escape
from cfs.cli.store import open_store
from cfs.cli.strict import StrictCommand
from cfs.compat import override
from cfs.errors import FormatError, InvalidRequestError

if TYPE_CHECKING:
    from cfs.digest import Algorithm, Digest
    from cfs.oci.pull import Pulled

__all__ = ["PulledText", "check_expected", "print_pulled", "pull"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PulledText:
    """What is printed of a pull; ``boot``: digest, xattr mode and version."""

    manifest_digest: str
    config_digest: str
    verity: str
    tag: str | None
    statistics: str
    boot: tuple[str, str, str] | None


class _PullCommand(StrictCommand):
    """A command with ``--tls-verify``, whose value may be missing, as podman has it.

    Click would take the next word for the value.
    """

    @override
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, once the option has a value."""
        return super().parse_args(ctx, _with_values(args))


def _with_values(args: Sequence[str]) -> list[str]:
    end = args.index("--") if "--" in args else len(args)
    options = ["--tls-verify=true" if word == "--tls-verify" else word for word in args[:end]]
    return [*options, *args[end:]]


@click.command(cls=_PullCommand)
@click.option("--bootable", is_flag=True, help="Make a boot image as well.")
@click.option(
    "--expected-digest",
    metavar="HEX",
    help="Digest that the boot image must have; needs --bootable.",
)
@click.option(
    "--local-fetch",
    type=click.Choice(["disabled", "auto", "zerocopy"]),
    default="disabled",
    show_default=True,
    help="Whether to read containers-storage without skopeo; zerocopy: and copy no file.",
)
@click.option("--arch", metavar="ARCH", help="Architecture to choose, in place of this machine's.")
@click.option("--os", metavar="OS", help="Operating system to choose.")
@click.option("--variant", metavar="VARIANT", help="Variant of the architecture to choose.")
@click.option(
    "--tls-verify", type=bool, metavar="[=true|false]",
    help="Whether a registry must have TLS and a good certificate.",
)  # fmt: skip
@click.option("--authfile", metavar="PATH", help="File with credentials for registries.")
@click.option("--creds", metavar="USER[:PASSWORD]", help="Credentials for the registry.")
@click.option("--cert-dir", metavar="DIR", help="Directory of certificates for the registry.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress, print the digest only.")
@click.argument("image")
@click.argument("name", required=False)
@click.pass_context
def pull(
    ctx: click.Context,
    /,
    *,
    image: str,
    name: str | None,
    bootable: bool,
    expected_digest: str | None,
    quiet: bool,
    local_fetch: str,
    **source: Any,
) -> None:
    """Pull IMAGE (oci:PATH[:TAG], docker://...) into the store; tag it NAME, by default IMAGE."""
    check_expected(ctx, expected_digest, bootable=bootable)
    from cfs.cli.oci.progress import PullProgress
    from cfs.oci.pull import link_boot
    from cfs.oci.pull import pull as pull_image
    from cfs.oci.sources import LocalFetch, SourceOptions

    options = SourceOptions(local_fetch=LocalFetch[local_fetch.upper()], **source)
    with open_store(ctx, write=True) as repository:
        expected = _parse_digest(expected_digest, repository.algorithm)
        with PullProgress(quiet=quiet) as progress:
            pulled = pull_image(
                repository, image, options,
                name=image if name is None else name, bootable=bootable, report=progress,
            )  # fmt: skip
        try:
            if bootable:
                pulled = link_boot(repository, pulled, expected)
        finally:  # the image is stored, boot image or not
            print_pulled(_describe(pulled), quiet=quiet, is_expected=expected is not None)


def check_expected(ctx: click.Context, digest: str | None, *, bootable: bool) -> None:
    """Refuse to expect what is not asked for.

    Raises:
        click.UsageError: there is a digest, and no boot image.
    """
    if digest is not None and not bootable:
        msg = "--expected-digest needs --bootable"
        raise click.UsageError(msg, ctx)


def _parse_digest(text: str | None, algorithm: "Algorithm") -> "Digest | None":
    from cfs.digest import Digest

    if text is None:
        return None
    try:
        digest = Digest.parse(text)
    except FormatError as error:
        msg = f"Parsing --expected-digest: {error}"
        raise InvalidRequestError(msg) from None
    if digest.algorithm is not algorithm:
        msg = (
            f"Parsing --expected-digest: digest of {len(text)} hex digits: "
            f"expected {algorithm.digest_size * 2}"
        )
        raise InvalidRequestError(msg)
    return digest


def _describe(pulled: "Pulled") -> PulledText:
    boot = pulled.boot
    return PulledText(
        manifest_digest=pulled.manifest_digest,
        config_digest=pulled.config_digest,
        verity=str(pulled.manifest_stream),
        tag=pulled.tag,
        statistics=pulled.statistics.format(),
        boot=None if boot is None else (str(boot.digest), boot.mode.value, f"V{boot.version}"),
    )


def print_pulled(pulled: PulledText, *, quiet: bool, is_expected: bool) -> None:
    """Print what a pull has stored; how a boot image was made only if one was expected."""
    if quiet:
        print(escape(pulled.manifest_digest))
        return
    print(f"manifest {escape(pulled.manifest_digest)}")
    print(f"config   {escape(pulled.config_digest)}")
    print(f"verity   {escape(pulled.verity)}")
    if pulled.tag is not None:
        print(f"tagged   {escape(pulled.tag)}")
    print(f"objects  {escape(pulled.statistics)}")
    if pulled.boot is not None:
        digest, mode, version = pulled.boot
        how = f" (xattr-mode={mode}, format-version={version})"
        print(escape(f"Boot image: {digest}{how if is_expected else ''}"))
