"""What holds for the project as a whole."""

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.paths import CHECKOUT

MODULES = sorted((CHECKOUT / "cfs").rglob("*.py"))
HEAVY = "{'numpy', 'pyfuse3', 'trio', 'cffi'}"
TEXT = {"", ".py", ".md", ".toml", ".c", ".h"}
LIST_HEAVY = f"import sys; print(sorted({HEAVY} & set(sys.modules)))"


def own_texts() -> Iterator[Path]:
    """What people write here; test data holds paths of the trees that it describes."""
    for pattern in (
        "*",
        ".ci/*",
        "scripts/*",
        "docs/**/*",
        "packaging/**/*",
        "bench/**/*",
        "cfs/**/*",
        "tests/**/*.py",
    ):
        for path in CHECKOUT.glob(pattern):
            if path.is_file() and path.suffix in TEXT:
                yield path


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_no_module_is_longer_than_500_lines(module: Path) -> None:
    assert len(module.read_text().splitlines()) <= 500


def test_no_paths_of_one_machine() -> None:
    words = [f"/{name}/" for name in ("work", "home", "root")]
    found = [
        f"{path.relative_to(CHECKOUT)}:{number}: {line.strip()}"
        for path in own_texts()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if any(word in line for word in words)
    ]
    assert found == []


def test_every_package_is_installed_and_declared() -> None:
    settings = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    packages = {
        ".".join(path.parent.relative_to(CHECKOUT).parts)
        for path in MODULES
        if path.name == "__init__.py"
    }
    assert set(settings["tool"]["setuptools"]["packages"]) == packages


def test_importing_the_library_is_light() -> None:
    assert python(f"import cfs; {LIST_HEAVY}") == "[]\n"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["fuse-serve", "--help"]])
def test_help_of_the_command_is_light(arguments: list[str]) -> None:
    code = f"""
import sys
from cfs.cli.main import main
sys.argv = ["cfsctl", *{arguments}]
try:
    main()
except SystemExit as end:
    assert not end.code
{LIST_HEAVY}
"""
    assert python(code).splitlines()[-1] == "[]"
