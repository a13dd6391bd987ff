"""Where calls run that take long: here one by one, in processes beside each other, or on a ray cluster."""

from __future__ import annotations

import multiprocessing
import os
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any, Self

from prune2deploy.environment import usable_cores
from prune2deploy.errors import DeviceError, one_line

Call = Callable[[], Any]
"""For processes and clusters it can be pickled."""

_KILLED = (
    "a process that ran a trial was killed, most often for want of memory; the same command goes on from there, "
    "with fewer {fewer} if memory was short"
)


class Workers(ABC):
    """Runs calls, some at once, and gives what they return as they finish; a context, which drops those not begun."""

    def __enter__(self) -> Self:
        """Begin."""
        return self

    @abstractmethod
    def __exit__(self, *error: object) -> None:
        """Let what runs end, and drop the rest."""

    @abstractmethod
    def submit(self, name: str, call: Call) -> None:
        """Let a call be run when its turn comes; ``name`` is that of no other."""

    @abstractmethod
    def next(self) -> tuple[str, Any]:
        """Wait for a call that was submitted to end, each once; return its name and what it returned.

        Raises:
            DeviceError: if the process that ran it was killed, for want of memory, say.
        """


class OneByOne(Workers):
    """Runs calls here, each when it is waited for."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[str, Call]] = deque()

    def __exit__(self, *error: object) -> None:
        """Drop what waits."""
        self.waiting.clear()

    def submit(self, name: str, call: Call) -> None:
        """Put the call behind those that wait."""
        self.waiting.append((name, call))

    def next(self) -> tuple[str, Any]:
        """Run the first call that waits."""
        name, call = self.waiting.popleft()
        return name, call()


class Processes(Workers):
    """Runs calls in processes of this machine, ``jobs`` at once; they share its cores unless OMP_NUM_THREADS is set."""

    def __init__(self, jobs: int) -> None:
        from concurrent.futures import Future, ProcessPoolExecutor

        spawn = multiprocessing.get_context("spawn")
        cores = max(1, usable_cores() // jobs)
        self.pool = ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_begin, initargs=(cores,))
        self.running: dict[Future[Any], str] = {}

    def __exit__(self, *error: object) -> None:
        """Let what runs end, and drop the rest."""
        self.pool.shutdown(cancel_futures=True)

    def submit(self, name: str, call: Call) -> None:
        """Hand the call to the pool."""
        self.running[self.pool.submit(call)] = name

    def next(self) -> tuple[str, Any]:
        """Wait for the next call that ends."""
        from concurrent.futures import FIRST_COMPLETED, wait
        from concurrent.futures.process import BrokenProcessPool

        done = next(iter(wait(self.running, return_when=FIRST_COMPLETED).done))
        try:
            return self.running.pop(done), done.result()
        except BrokenProcessPool as error:
            raise DeviceError(_KILLED.format(fewer="--jobs")) from error


def _begin(cores: int) -> None:
    """Share the cores with the other processes, and end with the one that began them all.

    A killed comparison's trials would go on otherwise, with their runs locked.
    """
    from multiprocessing.connection import wait

    os.environ.setdefault("OMP_NUM_THREADS", str(cores))  # torch, which is not imported yet, looks at it

    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Cluster(Workers):
    """Runs calls on a ray cluster, each with so many CPU cores and GPUs; they share a file system with this machine.

    Raises:
        DeviceError: if ray is not installed; on entering, if no cluster answers.
    """

    def __init__(self, address: str, *, cpus: int = 1, gpus: int = 0) -> None:
        self.ray = require_ray()
        self.address = address
        self.resources = {"num_cpus": cpus, "num_gpus": gpus}
        self.running: dict[Any, str] = {}
        self.is_ours = not self.ray.is_initialized()

    def __enter__(self) -> Self:
        """Connect, unless this process is connected already."""
        where = None if self.address == "local" else self.address
        try:
            if self.is_ours:
                self.ray.init(address=where, log_to_driver=False, include_dashboard=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            message = f"no ray cluster answers at '{self.address}' ({one_line(error, 120)}); start one"
            raise DeviceError(message) from error
        return self

    def __exit__(self, *error: object) -> None:
        """Cancel what is left, and let the cluster go."""
        for reference in self.running:
            self.ray.cancel(reference)
        if self.is_ours:
            self.ray.shutdown()

    def submit(self, name: str, call: Call) -> None:
        """Hand the call to the cluster."""
        self.running[self.ray.remote(**self.resources)(_called).remote(call)] = name

    def next(self) -> tuple[str, Any]:
        """Wait for the next call that ends."""
        (done, *_), _ = self.ray.wait(list(self.running), num_returns=1)
        ends = self.ray.exceptions
        try:
            return self.running.pop(done), self.ray.get(done)
        except (ends.WorkerCrashedError, ends.OutOfMemoryError, ends.NodeDiedError) as error:
            raise DeviceError(_KILLED.format(fewer="trials at once")) from error


def _called(call: Call) -> Any:
    return call()


def require_ray() -> Any:
    """Return the module ``ray``.

    Raises:
        DeviceError: if it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise DeviceError("ray is not installed, which --ray needs; pip install 'prune2deploy[sweep]'") from error
    return ray
