"""Workers: what they give back in which order, and that what has not begun is dropped."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from prune2deploy.errors import DeviceError
from prune2deploy.workers import Cluster, OneByOne, Processes, Workers


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


def test_one_by_one_runs_when_it_is_waited_for_in_the_order_of_submission() -> None:
    ran: list[str] = []
    with OneByOne() as workers:
        for name in "abc":
            workers.submit(name, partial(ran.append, name))
        assert ran == []
        assert workers.next() == ("a", None)
        workers.submit("d", lambda: 4)
        assert workers.next() == ("b", None)
        assert ran == ["a", "b"]
    assert not workers.waiting


def test_processes_give_back_first_what_ends_first_and_drop_what_has_not_begun(tmp_path: Path) -> None:
    with Processes(1) as workers:
        workers.submit("first", partial(len, "four"))
        assert workers.next() == ("first", 4)
        for name in "abcdef":
            workers.submit(name, partial(time.sleep, 0.3))
        workers.submit("last", partial(Path.touch, tmp_path / "last"))
    assert not (tmp_path / "last").exists()
    with Processes(2) as workers:
        workers.submit("slow", partial(wait_for, tmp_path / "go"))
        workers.submit("quick", partial(len, "abc"))
        assert workers.next() == ("quick", 3)
        workers.submit("later", partial(len, "ab"))
        assert workers.next() == ("later", 2)
        (tmp_path / "go").touch()
        assert workers.next() == ("slow", None)


def test_a_process_that_was_killed_is_said() -> None:
    with Processes(1) as workers:
        workers.submit("killed", partial(os._exit, 9))
        with pytest.raises(DeviceError, match="was killed, most often for want of memory"):
            workers.next()


KILLED = """
import os, sys, time
from functools import partial
from pathlib import Path
from prune2deploy.workers import Processes

def work(path):
    Path(path).write_text(str(os.getpid()))
    os.replace(path, path + ".pid")
    time.sleep(600)

if __name__ == "__main__":
    with Processes(1) as workers:
        workers.submit("long", partial(work, sys.argv[1]))
        workers.next()
"""


def is_running(process: int) -> bool:
    """Whether a process runs; one that has ended may wait for whom it fell to to collect it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the state of processes from /proc")
def test_processes_end_with_the_one_that_began_them_even_if_it_is_killed(tmp_path: Path) -> None:
    (tmp_path / "killed.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "killed.py"), str(tmp_path / "at")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as parent:
        wait_for(tmp_path / "at.pid")
        worker = int((tmp_path / "at.pid").read_text())
        assert is_running(worker)
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = is_running(worker)
    if left:
        os.kill(worker, signal.SIGKILL)
    assert not left


@pytest.mark.slow
def test_a_cluster_does_so_too() -> None:
    pytest.importorskip("ray")
    with Cluster("local") as workers:
        check: Workers = workers
        check.submit("one", partial(len, "abc"))
        check.submit("two", partial(len, "ab"))
        assert {check.next(), check.next()} == {("one", 3), ("two", 2)}
        check.submit("killed", partial(os._exit, 9))
        with pytest.raises(DeviceError, match="was killed, most often for want of memory"):
            check.next()


def test_a_cluster_that_does_not_answer_is_said() -> None:
    pytest.importorskip("ray")
    with pytest.raises(DeviceError, match="no ray cluster answers at 'nonsense'"), Cluster("nonsense"):
        pass
