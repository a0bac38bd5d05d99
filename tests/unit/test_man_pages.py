"""Manual pages: one for each command, with all its options, and nothing that troff warns of."""

import re
import shutil
import subprocess
import sys

import click
import pytest

from cfs.cli.cfsctl import cfsctl
from cfs.cli.connect import REMOTES
from tests.paths import CHECKOUT

MAN = CHECKOUT / "packaging" / "man"
TOOLS = ("mkcomposefs.1", "composefs-info.1", "mount.composefs.8", "mount.fuse.composefs.8")
INTERFACES = ("org.composefs.Repository", "org.composefs.Oci")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The text of all pages by file name."""
    directory = tmp_path_factory.mktemp("man")
    build = [sys.executable, str(MAN / "build.py"), str(directory)]
    subprocess.run(build, check=True, cwd=CHECKOUT, env={"PYTHONPATH": str(CHECKOUT)})
    return {path.name: path.read_text() for path in directory.iterdir()}


def commands(command: click.Command, name: str) -> dict[str, click.Command]:
    """All commands that help shows, by the names of their pages."""
    found = {f"{name}.1": command}
    if isinstance(command, click.Group):
        ctx = click.Context(command)
        for word in command.list_commands(ctx):
            below = command.get_command(ctx, word)
            assert below is not None
            if word != "help":
                found |= commands(below, f"{name}-{word}")
    return found


def test_there_is_a_page_for_everything_and_no_other(pages: dict[str, str]) -> None:
    expected = {*commands(cfsctl, "cfsctl"), *TOOLS, *(f"{name}.7" for name in INTERFACES)}
    assert set(pages) == expected
    assert {path.name for path in (MAN / "notes").iterdir()} <= {name[:-2] for name in expected}


def test_the_commands_of_a_service_are_named(pages: dict[str, str]) -> None:
    section = pages["cfsctl.1"].partition("A service can do")[2].partition("\n.SH ")[0]
    own, _, oci = section.replace("\\-", "-").partition("commands")
    lines = {"": own, "oci ": oci}
    found = {
        f"{group}{word}"
        for group, text in lines.items()
        for line in re.findall(r"^\.BR (.*)$", text, re.MULTILINE)
        for word in re.sub(r'", "|[;.]', " ", line).split()
    }
    assert found == set(REMOTES) - {"list-images"}


def test_pages_have_exactly_the_options_of_the_commands(pages: dict[str, str]) -> None:
    for page, command in commands(cfsctl, "cfsctl").items():
        options = [p for p in command.params if isinstance(p, click.Option) and not p.hidden]
        expected = {name for option in options for name in option.opts} | {"-h", "--help"}
        section = pages[page].partition(".SH OPTIONS\n")[2].partition("\n.SH ")[0]
        terms = re.findall(r"^\.TP\n\\fB(.*)\\fR$", section, re.MULTILINE)
        found = {
            word.partition("=")[0].rstrip(",")
            for term in terms
            for word in term.replace(r"\-", "-").split(" ")
            if word.startswith("-")
        }
        assert found == expected, page


def test_pages_of_interfaces_have_every_member(pages: dict[str, str]) -> None:
    for name in INTERFACES:
        text = (CHECKOUT / "varlink" / f"{name}.varlink").read_text()
        members = re.findall(r"^(?:method|type|error) (\w+)", text, re.MULTILINE)
        assert sorted(re.findall(r"^\.SS (.*)$", pages[f"{name}.7"], re.MULTILINE)) == sorted(
            members
        )


@pytest.mark.skipif(not shutil.which("groff"), reason="groff is missing")
def test_troff_finds_nothing_wrong(pages: dict[str, str]) -> None:
    for name, text in pages.items():
        done = subprocess.run(
            ["groff", "-man", "-ww", "-Tutf8", "-z"],
            input=text,
            capture_output=True,
            text=True,
            check=True,
        )
        assert (name, done.stderr) == (name, "")


def test_references_lead_to_pages(pages: dict[str, str]) -> None:
    others = {"skopeo.1", "varlinkctl.1", "mount.8", "fstab.5"}
    for name, text in pages.items():
        plain = text.replace(r"\-", "-").replace(r"\fR", "").replace(r"\fB", "")
        found = {f"{page}.{section}" for page, section in re.findall(r"([\w.-]+)\((\d)\)", plain)}
        assert found <= {*pages, *others}, name
