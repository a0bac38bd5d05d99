"""The guest's disks: what it boots from, made of this machine's files, and empty ones.

The system disk mirrors this Python, the packages that cfs needs and a few commands, at the paths
that they have here.  The package disk holds cfs itself; it is small, because each change of a
source makes another one.
"""

import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tests.paths import CHECKOUT
from tests.vm.cache import CACHE, Unavailable, made_once, remove_old
from tests.vm.kernel import Kernel

PACKAGE_DIRECTORY = "/opt/cfs"
NO_SYNC = f"{PACKAGE_DIRECTORY}/nosync.so"
COMMANDS = ("busybox", "mount", "umount", "fusermount3", "fsverity")
_LEFT_OUT = {
    "test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3", "site-packages",
    "dist-packages", "pydoc_data",
}  # fmt: skip
_SECONDS = 300
_HERE = Path(__file__).parent
INIT = """#!/bin/busybox sh
export PATH=/bin
busybox mount -t devtmpfs none /dev
exec </dev/console >/dev/console 2>&1
for module in /modules/*; do busybox insmod $module; done
busybox mount -t erofs /dev/vda /new && busybox mount --move /dev /new/dev
exec busybox switch_root /new /init
"""
_SYSTEM_INIT = """#!/bin/sh
mount -t proc none /proc; mount -t sysfs none /sys
for name in tmp run; do mount -t tmpfs none /$name; done
mkdir /run/data /dev/shm; mount -t tmpfs none /dev/shm
mount -t erofs /dev/vdb {package}
ln -s /proc/self/fd /dev/fd; ifconfig lo up
export PATH={package}/bin:/usr/bin:/bin HOME=/tmp LC_ALL=C.UTF-8 OPENBLAS_NUM_THREADS=1
export PYTHONHOME={prefix} PYTHONPATH={package}:{sites} XDG_RUNTIME_DIR=/run
for port in /dev/vport*; do {python} {package}/agent.py $port; done
echo the agent has ended; poweroff -f
"""


def made_disk(size: int, path: Path) -> Path:
    """Make a sparse disk with an empty ext4 that can do fs-verity; the size is in bytes."""
    with path.open("wb") as file:
        file.truncate(size)
    options = ["-O", "verity", "-b", "4096", "-E", "lazy_itable_init=1,root_owner=0:0"]
    _call(find_command("mkfs.ext4"), "-q", "-F", *options, path)
    return path


def find_command(name: str) -> str:
    """Return the path of a command, those of root included.

    Raises:
        Unavailable: it is not installed.
    """
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        raise Unavailable(f"no {name}")
    return found


def get_initramfs(kernel: Kernel, init: str = INIT) -> Path:
    """Return the archive with the modules, and the script that changes to the system disk."""

    def make(target: Path) -> None:
        root = target / "root"
        for name in ("bin", "dev", "new", "modules"):
            (root / name).mkdir(parents=True)
        shutil.copy(find_command("busybox"), root / "bin/busybox")
        for module in kernel.modules.iterdir():
            shutil.copy(module, root / "modules")
        _write_program(root / "init", init)
        names = "".join(f"{path.relative_to(root)}\n" for path in sorted(root.rglob("*")))
        with (target / "initramfs").open("wb") as archive:
            _call("busybox", "cpio", "-o", "-H", "newc", cwd=root, stdin=names, stdout=archive)
        shutil.rmtree(root)

    return cached("initramfs", [init, kernel.image.stat().st_mtime_ns], make)


def get_system_disk() -> Path:
    """Return the disk with Python, libraries and commands."""
    packages = _required_packages()
    inputs = [sys.version, sys.base_prefix, _SYSTEM_INIT, *COMMANDS]
    inputs += [
        f"{package.name} {package.version} {package.locate_file('')}" for package in packages
    ]

    def make(target: Path) -> None:
        root = target / "root"
        root.mkdir()
        for source in _system_files(packages):
            _mirror(source, root)
        _add_libraries(root)
        for name in ("proc", "sys", "dev", "tmp", "run", "mnt", PACKAGE_DIRECTORY[1:]):
            (root / name).mkdir(parents=True, exist_ok=True)
        (root / "etc").mkdir(exist_ok=True)
        (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
        (root / "etc/group").write_text("root:x:0:\n")
        (root / "etc/mtab").symlink_to("../proc/self/mounts")
        _add_busybox(root)
        sites = dict.fromkeys(str(package.locate_file("")) for package in packages)
        script = _SYSTEM_INIT.format(
            package=PACKAGE_DIRECTORY,
            prefix=sys.base_prefix,
            python=_python(),
            sites=":".join(sites),
        )
        _write_program(root / "init", script)
        make_erofs(root, target / "system", "--all-root")

    return cached("system", inputs, make)


def get_package_disk() -> Path:
    """Return the disk with cfs, its commands, and what the harness runs in the guest."""
    sources = sorted(
        path
        for path in (CHECKOUT / "cfs").rglob("*")
        if path.suffix in {".py", ".so"} or path.name == "py.typed"
    )
    helpers = [_HERE / "agent.py", _HERE / "nosync.c"]
    inputs = [content for path in (*sources, *helpers) for content in (path, path.read_bytes())]

    def make(target: Path) -> None:
        root = target / "root"
        (root / "bin").mkdir(parents=True)
        for source in sources:
            copy = root / source.relative_to(CHECKOUT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, copy)
        shutil.copy(helpers[0], root)
        _call(find_command("gcc"), "-shared", "-fPIC", "-O2", "-o", root / "nosync.so", helpers[1])
        for name, module in _console_scripts():
            lines = f"import sys\nfrom {module} import main\nsys.exit(main())\n"
            _write_program(root / "bin" / name, f"#!{_python()} -P\n{lines}")
        mode = "--invalidation-mode=unchecked-hash"
        _call(
            sys.executable,
            "-m",
            "compileall",
            "-q",
            mode,
            "-s",
            root,
            "-p",
            PACKAGE_DIRECTORY,
            root,
        )
        make_erofs(root, target / "package", "--all-root")

    return cached("package", inputs, make)


def _console_scripts() -> Iterator[tuple[str, str]]:
    lines = (CHECKOUT / "pyproject.toml").read_text().partition("[project.scripts]\n")[2]
    for line in lines.split("\n\n")[0].splitlines():
        name, _, target = line.replace('"', "").partition(" = ")
        yield name, target.removesuffix(":main")


def cached(
    name: str, inputs: Iterable[object], make: Callable[[Path], None], *, kept: int = 4
) -> Path:
    """Return the file that ``make`` leaves below this name, made once for the same inputs."""
    digest = hashlib.sha256(repr([*inputs, Path(__file__).read_bytes()]).encode()).hexdigest()[:16]
    directory = made_once(CACHE / f"{name}-{digest}", make)
    os.utime(directory)
    remove_old(name, kept)
    return directory / name


def _call(*command: str | Path, **options: object) -> None:
    stdin = options.pop("stdin", None)
    done = subprocess.run(  # type: ignore[call-overload]
        command,
        input=stdin.encode() if isinstance(stdin, str) else None,
        stderr=subprocess.PIPE,
        check=False,
        timeout=_SECONDS,
        **{"stdout": subprocess.DEVNULL, **options},
    )
    if done.returncode:
        raise Unavailable(f"{Path(command[0]).name}: {done.stderr.decode().strip()}")


def _python() -> str:
    return os.path.realpath(sys.executable)


def _required_packages() -> list[importlib.metadata.Distribution]:
    """What cfs[fuse] needs, and what that needs, as far as it is installed here."""
    found: dict[str, importlib.metadata.Distribution] = {}
    project = (CHECKOUT / "pyproject.toml").read_text()
    (dependencies,) = re.findall(r"^dependencies = \[(.*?)\]", project, re.DOTALL | re.MULTILINE)
    (fuse,) = re.findall(r"^fuse = \[(.*?)\]", project, re.MULTILINE)
    wanted = re.findall(r'"([\w.-]+)', dependencies + fuse)
    while wanted:
        name = wanted.pop()
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if package.name not in found:
            found[package.name] = package
            required = (text for text in package.requires or [] if "extra ==" not in text)
            wanted += [re.split(r"[^\w.-]", text)[0] for text in required]
    return [found[name] for name in sorted(found)]


def _system_files(packages: Iterable[importlib.metadata.Distribution]) -> Iterator[Path]:
    yield Path(_python())
    yield from (Path(os.path.realpath(find_command(name))) for name in COMMANDS)
    for name in ("stdlib", "platstdlib"):
        yield from _walk(
            Path(
                sysconfig.get_path(
                    name,
                    vars={
                        "base": sys.base_prefix,
                        "platbase": sys.base_prefix,
                        "installed_base": sys.base_prefix,
                        "installed_platbase": sys.base_prefix,
                    },
                )
            )
        )
    for package in packages:
        for file in package.files or []:
            path = Path(str(package.locate_file(file)))
            if not _LEFT_OUT.intersection(file.parts) and path.suffix != ".pyi" and path.is_file():
                yield path


def _walk(top: Path) -> Iterator[Path]:
    for directory, names, files in os.walk(top):
        names[:] = [name for name in names if name not in _LEFT_OUT and "config-" not in name]
        yield from (Path(directory, name) for name in files if not name.endswith(".a"))


def _mirror(source: Path, root: Path) -> None:
    target = root / os.path.normpath(source).lstrip("/")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)  # with times: Python compares them with those in its caches


def _add_libraries(root: Path) -> None:
    """Add the shared libraries of all that was mirrored, and those loaded by name."""
    programs = []
    for path in root.rglob("*"):
        if path.is_file() and (
            path.suffix == ".so" or ".so." in path.name or path.stat().st_mode & 0o111
        ):
            with path.open("rb") as file:
                if file.read(4) == b"\x7fELF":
                    programs.append(f"/{path.relative_to(root)}")
    done = subprocess.run(
        ["ldd", *programs, *map(str, (CHECKOUT / "cfs").rglob("*.so"))],
        capture_output=True, text=True, check=False, timeout=_SECONDS,
    )  # fmt: skip
    libraries = set(re.findall(r"(/\S+) \(0x", done.stdout))
    libc = next(Path(name) for name in libraries if Path(name).name == "libc.so.6")
    for library in (*map(Path, sorted(libraries)), libc.with_name("libgcc_s.so.1")):
        _mirror(library, root)


def _add_busybox(root: Path) -> None:
    path = Path(os.path.realpath(find_command("busybox")))
    listed = subprocess.run([path, "--list"], capture_output=True, text=True, check=True)
    (root / "bin").mkdir(exist_ok=True)
    for name in listed.stdout.split():
        if not (root / "bin" / name).exists():
            (root / "bin" / name).symlink_to(path)
    (root / "sbin").mkdir(exist_ok=True)


def _write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def make_erofs(root: Path, image: Path, *options: str) -> None:
    """Make an image of a directory, which is removed."""
    _call(find_command("mkfs.erofs"), "--quiet", *options, image, root)
    shutil.rmtree(root)
