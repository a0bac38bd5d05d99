"""Processes told apart by number, start time and boot."""

import os
import re
import subprocess
import sys

import pytest

from cfs.linux.processes import boot_id, is_running, start_time
from tests.paths import CHECKOUT


def test_boot_id_is_a_uuid() -> None:
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", boot_id())


def test_start_time_is_that_of_ps() -> None:
    mine = start_time(os.getpid())
    assert mine is not None
    assert is_running(os.getpid(), mine)
    assert not is_running(os.getpid(), mine + 1)  # the number means another process by now


def test_name_with_parentheses_is_no_obstacle() -> None:
    code = "import os; open('/proc/self/comm', 'w').write('a) Z 1 2'); print('x'); input()"
    with subprocess.Popen(
        ["python3", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdin
        assert child.stdout
        child.stdout.readline()
        mine, theirs = start_time(os.getpid()), start_time(child.pid)
        assert mine is not None
        assert theirs is not None
        assert mine <= theirs
        child.stdin.close()


def test_zombie_has_ended() -> None:
    child = subprocess.Popen(["true"])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert start_time(child.pid) is None
    child.wait()
    assert start_time(child.pid) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_hidden_process_is_not_seen() -> None:
    """With ``hidepid=1`` reading is refused."""
    script = (
        "mount -t proc -o hidepid=1 none /proc && "
        "setpriv --reuid=65534 --regid=65534 --clear-groups "
        '--inh-caps=-all,+dac_read_search --ambient-caps=-all,+dac_read_search "$@" || exit 9'
    )
    code = "from cfs.linux.processes import start_time; print(start_time(1))"
    unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script, "sh"]
    done = subprocess.run(
        [*unshare, sys.executable, "-c", code],
        cwd=CHECKOUT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "unshare: " in done.stderr or "mount: " in done.stderr:
        pytest.skip(f"no private /proc: {done.stderr}")
    assert (done.stdout, done.stderr) == ("None\n", "")
