"""Our Debian package, built in trixie, once for the same sources."""

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.paths import CHECKOUT
from tests.trixie import build_dependencies, get_trixie, run_in
from tests.vm.cache import CACHE, made_once, remove_old


def get_package() -> Path:
    """Return the package.

    Raises:
        Unavailable: programs, rights or network are missing.
    """
    digest = hashlib.sha256()
    for path in _sources():
        digest.update(f"{path.relative_to(CHECKOUT)}\0".encode() + path.read_bytes())
    directory = made_once(CACHE / f"debian-package-{digest.hexdigest()[:16]}", _build)
    remove_old("debian-package", kept=4)
    (package,) = directory.glob("cfs_*.deb")
    return package


def _sources() -> Iterator[Path]:
    """What the package is made of; a change of a test makes no other package."""
    yield from sorted(path for path in CHECKOUT.iterdir() if path.is_file())
    for name in ("cfs", "docs", "packaging", "varlink"):
        for path in sorted((CHECKOUT / name).rglob("*")):
            if path.is_file() and path.suffix != ".so" and "__pycache__" not in path.parts:
                yield path


def _build(target: Path) -> None:
    """Build it; a package that does not build is an error, not a reason to skip."""
    system = get_trixie(build_dependencies())
    script = "/checkout/packaging/debian/build /tmp/build; cp /tmp/build/*.deb /out"
    with tempfile.TemporaryDirectory() as scratch:
        done = run_in(system, Path(scratch), script, {CHECKOUT: "/checkout", target: "/out"})
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
