"""Runs in the guest: does what the host asks for, one line of JSON for each command.

Request: id, argv, input, seconds, env.  Answer: id, status, stdout, stderr; input and output in
base64.  A command ``@MODULE`` is the ``main`` of that module, called in a fork of this process,
which has loaded cfs by then: emulated, loading takes seconds.

Standard library only, and one thread, because it forks.
"""

import base64
import fcntl
import importlib
import json
import os
import pkgutil
import select
import signal
import sys
import tempfile
import traceback
from typing import Any, NoReturn

_TIMEOUT_STATUS = 124  # that of timeout(1)
_PRELOADED = ("cfs.cli", "cfs.erofs", "cfs.mounting", "cfs.repository", "cfs.transform")


def _preload() -> None:
    for package in _PRELOADED:
        path = importlib.import_module(package).__path__
        for module in pkgutil.iter_modules(path, f"{package}."):
            importlib.import_module(module.name)


def _call_main(argv: list[str]) -> NoReturn:
    name = argv[0].removeprefix("@")
    sys.argv = [name.rpartition(".")[2], *argv[1:]]
    status = 1
    try:
        status = importlib.import_module(name).main() or 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - what the interpreter would do
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _become(request: dict[str, Any], files: list[Any]) -> NoReturn:
    """Be the command, in a session of its own."""
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file.fileno(), number)
    os.environ.update(request["env"])
    argv = request["argv"]
    if argv[0].startswith("@"):
        _call_main(argv)
    try:
        os.execvp(argv[0], argv)
    except OSError as error:
        os.write(2, f"{argv[0]}: {error.strerror}\n".encode())
    os._exit(127)


def _run(request: dict[str, Any]) -> dict[str, Any]:
    # output goes to files: a pipe would not end before the last daemon that a command leaves
    files = [tempfile.TemporaryFile(dir="/run") for _ in range(3)]  # noqa: SIM115 - ends with us
    files[0].write(base64.b64decode(request["input"]))
    files[0].seek(0)
    pid = os.fork()
    if not pid:
        _become(request, files)
    pidfd = os.pidfd_open(pid)
    in_time = bool(select.select([pidfd], [], [], request["seconds"])[0])
    if not in_time:
        os.killpg(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    output = []
    for file in files[1:]:
        file.seek(0)
        output.append(base64.b64encode(file.read()).decode())
    return {
        "id": request["id"],
        "status": status if in_time else _TIMEOUT_STATUS,
        "stdout": output[0],
        "stderr": output[1],
    }


def _send(port: int, answer: dict[str, Any]) -> None:
    rest = json.dumps(answer).encode() + b"\n"
    with open("/run/agent.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # each command answers from a process of its own
        while rest:
            rest = rest[os.write(port, rest) :]


def _serve(port: int, line: bytes) -> None:
    request = json.loads(line)
    if request["argv"][0].startswith("@"):
        _preload()
    if not os.fork():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _send(port, _run(request))
        os._exit(0)


def main() -> None:
    """Serve the port named in the first argument until the host closes it."""
    port = os.open(sys.argv[1], os.O_RDWR | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    _send(port, {"id": 0})
    pending = b""
    while received := os.read(port, 65536):
        *lines, pending = (pending + received).split(b"\n")
        for line in lines:
            _serve(port, line)


if __name__ == "__main__":
    main()
