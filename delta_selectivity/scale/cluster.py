"""Start Dask workers on this machine, or connect to a cluster.

    with open_cluster(n_workers=2, gpus=0, scheduler=None) as client:
        client.submit(...)

On this machine a lost worker is started again. On a cluster of others that is its own business; the units of a lost
worker go to another in either case. Dask is imported here and only when workers are wanted.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from delta_selectivity.errors import RequestError
from delta_selectivity.system.processor import cpu_count
from delta_selectivity.system.terminal import NOTE

log = logging.getLogger(__name__)

WAIT_FOR_WORKERS = 120  # s
LOSSES = 3  # workers that a unit may lose: with one more it is taken for the cause (out of memory, say) and given up


@contextmanager
def open_cluster(n_workers: int, gpus: int, scheduler: str | None) -> Iterator[Any]:
    """A `distributed.Client` whose workers do one unit at a time.

    Args:
        n_workers: processes on this machine, if no scheduler is given.
        gpus: how many of them have a GPU, each one of its own; 0: they share the cores of the CPU.
        scheduler: address of a running scheduler, such as ``tcp://10.0.0.7:8786``.

    Raises:
        RequestError: Dask is not installed, or nobody answers at the address.
    """
    if find_spec("distributed") is None:
        raise RequestError(
            'many workers need Dask: pip install "delta-selectivity[scale]", in a clone pip install -e ".[scale]"'
        )
    import dask
    from distributed import Client

    quiet = {
        "distributed.scheduler.allowed-failures": LOSSES,
        "distributed.nanny.pre-spawn-environ": _threads(n_workers if not gpus else 1),
        "distributed.admin.tick.limit": "1h",  # a unit may hold Python's lock for long: no reason to complain
        "distributed.worker.profile.enabled": False,
        "distributed.comm.timeouts.connect": f"{WAIT_FOR_WORKERS}s",
    }
    with dask.config.set(quiet), _environment_kept():
        logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what a user must know, the outcomes tell
        cluster = None if scheduler is not None else _local(n_workers, gpus)
        try:
            with Client(_reach(scheduler) if cluster is None else cluster, set_as_default=False) as client:
                if cluster is not None:
                    client.register_plugin(_ignore_ctrl_c())
                yield client
        finally:
            if cluster is not None:
                cluster.close()


def _reach(scheduler: str | None) -> str:
    """The address, after somebody answered there."""
    from distributed import Client

    assert scheduler is not None
    try:
        with Client(scheduler, timeout=10, set_as_default=False) as client:
            n_workers = len(client.scheduler_info(n_workers=-1)["workers"])
    except (OSError, ValueError) as error:
        raise RequestError(f"`scheduler` {scheduler}: no Dask scheduler answers there ({error})") from error
    if not n_workers:
        log.log(NOTE, "%s has no workers yet: waiting for some", scheduler)
    return scheduler


def _local(n_workers: int, gpus: int) -> Any:
    """Processes on this machine, started again when they are lost."""
    if gpus and find_spec("dask_cuda") is not None:
        from dask_cuda import LocalCUDACluster

        return LocalCUDACluster(n_workers=n_workers, threads_per_worker=1, memory_limit=0, dashboard_address=None)
    if gpus:
        log.warning("dask-cuda is not installed: each worker is pinned to its GPU by CUDA_VISIBLE_DEVICES alone")
    from distributed import Nanny, Scheduler, SpecCluster

    here = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}  # nothing for other machines to reach
    fixed = {"nthreads": 1, "memory_limit": 0, "silence_logs": logging.CRITICAL, **here}
    workers = {
        name: {"cls": Nanny, "options": fixed | {"env": _pinned(name) if gpus else {}}} for name in range(n_workers)
    }
    scheduler = {"cls": Scheduler, "options": {"port": 0, "dashboard": False, **here}}
    return SpecCluster(workers=workers, scheduler=scheduler, silence_logs=logging.CRITICAL)


def _pinned(name: int) -> dict[str, str]:
    """One GPU of those that this process may see."""
    visible = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    return {"CUDA_VISIBLE_DEVICES": visible[name] if visible else str(name)}


def _threads(share: int) -> dict[str, str]:
    """So many workers share the cores: what each of them may start."""
    threads = str(max(1, cpu_count() // share))
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)


@contextmanager
def _environment_kept() -> Iterator[None]:
    """Dask leaves what it sets for its workers in our environment, where the next cluster would take it for ours."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _ignore_ctrl_c() -> Any:
    """Ctrl-C goes to every process of the terminal; it is for the one that was started by hand, which ends the rest."""
    from distributed import WorkerPlugin

    class IgnoreSignals(WorkerPlugin):
        name = "ignore Ctrl-C"

        def setup(self, worker: Any) -> None:
            for number in (signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)):
                signal.signal(number, signal.SIG_IGN)

    return IgnoreSignals()
