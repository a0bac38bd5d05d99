"""What pip installs, as a wheel and editable: it works away from the checkout, data included."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.paths import CHECKOUT

# all that is needed to install
SOURCES = ("cfs", "varlink", "packaging/completion")
FILES = ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input")
OFFLINE = ("--no-deps", "--no-index", "--no-build-isolation")
# what is installed at the first argument is imported, with the files of the second; the third has
# the packages needed, but nothing that is installed editable there counts
CHECK = """
import os, site, sys
from pathlib import Path
place, source, others = map(Path, sys.argv[1:])
site.addsitedir(str(place))
sys.path.append(str(others))
import cfs
import cfs.fsverity
import cfs.fuse
from cfs.cli import completion
from cfs.service.idl import load_interfaces
assert any(Path(cfs.__file__).is_relative_to(path) for path in (place, source)), cfs.__file__
for path in (source / "varlink").iterdir():
    assert load_interfaces()[path.stem].description == path.read_text(), path
os.environ["COMPLETE"] = "zsh"
sys.exit(completion.run([]))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources: building writes into them."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools 77 is missing")
    directory = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "_libfsverity.c", "_worker.c")
    for name in SOURCES:
        shutil.copytree(CHECKOUT / name, directory / name, symlinks=True, ignore=ignored)
    for name in FILES:
        shutil.copyfile(CHECKOUT / name, directory / name)
    return directory


def python(*arguments: str | Path) -> str:
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check(place: Path, source: Path) -> None:
    script = (CHECKOUT / "packaging" / "completion" / "_cfsctl").read_text()
    others = sysconfig.get_path("purelib")
    assert python("-S", "-c", CHECK, place, source, others) == script


def test_wheel(source: Path, tmp_path: Path) -> None:
    python(*PIP, "wheel", *OFFLINE, "--wheel-dir", tmp_path, source)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "place")
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    kinds = {Path(name).suffix for name in names}
    assert kinds == {".py", ".so", ".typed", ".varlink", "", ".bash", ".fish"}
    check(tmp_path / "place", source)


def test_editable(source: Path, tmp_path: Path) -> None:
    python(*PIP, "install", *OFFLINE, "--target", tmp_path / "place", "--editable", source)
    check(tmp_path / "place", source)
