"""Start of Dask workers on this machine, or connection to a running cluster.

    with open_cluster(n_workers=2, gpus=0, scheduler=None) as client:
        client.submit(...)

Anyone who can connect to a Dask scheduler or worker can run code in it. Local workers therefore use TLS, with a key
that is created for the run and never leaves its processes, and serve no web pages; other users of the machine are
rejected.

Local workers are restarted when lost; on a remote cluster that is up to the cluster. In both cases the units of a lost
worker go to another one. Dask is imported only in this package, and only when it is used.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from delta_selectivity.errors import RequestError
from delta_selectivity.scale.same_program import check
from delta_selectivity.system.processor import cpu_count
from delta_selectivity.system.terminal import NOTE

log = logging.getLogger(__name__)

WAIT_FOR_WORKERS = 120  # s
WORKER_TIMEOUT = 120
"""Seconds without a heartbeat after which a worker counts as lost. Heartbeats come from a separate thread every half
second, also while a unit computes; a call that holds the GIL delays them by seconds only."""
ALLOWED_LOSSES = 3  # lost workers per unit; after one more, the unit is assumed to be the cause and fails

INSTALL = 'several workers need Dask: pip install "delta-selectivity[scale]", in a clone pip install -e ".[scale]"'


@dataclass(frozen=True)
class Remote:
    """A running Dask scheduler, and the TLS files for connecting to it."""

    address: str  # such as tls://10.0.0.7:8786
    tls_ca_file: Path | None = None  # PEM; None: from Dask's configuration, as for the next two
    tls_cert: Path | None = None
    tls_key: Path | None = None

    def security(self) -> Any:
        """Return a `distributed.Security`. Raises `RequestError` if a file is missing, invalid or not applicable."""
        from distributed import Security

        given = {name: getattr(self, name) for name in ("tls_ca_file", "tls_cert", "tls_key") if getattr(self, name)}
        if not self.address.startswith("tls://"):
            if given:
                raise RequestError(
                    f"`{next(iter(given))}`: `scheduler` {self.address} does not use TLS: give tls://..."
                )
            if self._is_remote():
                log.warning(
                    "`scheduler` %s is not encrypted: everyone who can connect to it can run code on its workers and "
                    "in this process; give tls://... unless you trust everyone on that network",
                    self.address,
                )
            return None
        names = {"tls_ca_file": "tls_ca_file", "tls_cert": "tls_client_cert", "tls_key": "tls_client_key"}
        security = Security(require_encryption=True, **{names[name]: str(path) for name, path in given.items()})
        for name in ("tls_ca_file", "tls_cert"):
            if getattr(security, names[name]) is None:
                raise RequestError(f"`{name}` is needed for `scheduler` {self.address}")
        try:
            security.get_connection_args("client")
        except (OSError, ssl.SSLError) as error:
            files = ", ".join(str(getattr(security, name)) for name in names.values() if getattr(security, name))
            raise RequestError(f"`scheduler` {self.address}: cannot use the TLS files {files} ({error})") from error
        return security

    def _is_remote(self) -> bool:
        host = urlsplit(self.address if "://" in self.address else f"tcp://{self.address}").hostname or ""
        try:
            return not ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host != "localhost"


@contextmanager
def open_cluster(n_workers: int, gpus: int, scheduler: Remote | None) -> Iterator[Any]:
    """Open a `distributed.Client` whose workers process one unit at a time.

    Args:
        n_workers: processes on this machine, if no scheduler is given.
        gpus: how many of them have their own GPU; 0: they share the CPU cores.
        scheduler: a running scheduler, used in place of processes on this machine.

    Raises:
        RequestError: Dask is not installed, the scheduler does not answer, or it runs another version of this program.
    """
    if find_spec("distributed") is None or find_spec("cryptography") is None:
        raise RequestError(INSTALL)
    import dask
    from distributed import Client

    config = {
        "distributed.scheduler.allowed-failures": ALLOWED_LOSSES,
        "distributed.nanny.pre-spawn-environ": _threads(n_workers if not gpus else 1),
        "distributed.admin.tick.limit": "1h",  # a unit may hold the GIL for long; do not warn
        "distributed.worker.profile.enabled": False,
        "distributed.comm.timeouts.connect": f"{WAIT_FOR_WORKERS}s",
        "distributed.scheduler.worker-ttl": f"{WORKER_TIMEOUT}s",
        "distributed.scheduler.worker-saturation": 1.0,  # a worker queues no further units
        "distributed.scheduler.http.routes": [],  # no dashboard, metrics or proxy, since their pages have no password
        "distributed.worker.http.routes": [],
    }
    with dask.config.set(config), _restore_environment():
        logging.getLogger("distributed").setLevel(logging.CRITICAL)  # the outcomes report what users need
        if scheduler is not None:
            with _connect(scheduler) as client:
                client.subscribe_topic("scheduler", _log_lost_workers)
                yield client
            return
        with (
            tempfile.TemporaryDirectory(prefix="delta-selectivity-workers-") as folder,
            dask.config.set({"temporary-directory": folder}),  # not a shared one that another user may have created
            _local(n_workers, gpus) as cluster,
            Client(cluster, set_as_default=False) as client,
        ):
            client.register_plugin(_ignore_ctrl_c())
            client.subscribe_topic("scheduler", _log_lost_workers)
            yield client


@contextmanager
def _connect(scheduler: Remote) -> Iterator[Any]:
    """Open a client of a scheduler, after checking that it answers and runs the same program."""
    from distributed import Client

    security = scheduler.security()
    try:
        client = Client(scheduler.address, security=security, timeout=10, set_as_default=False)
    except (OSError, ValueError) as error:
        raise RequestError(f"`scheduler` {scheduler.address}: no Dask scheduler answers there ({error})") from error
    with client:
        check(client)
        if not client.scheduler_info(n_workers=-1)["workers"]:
            log.log(NOTE, "%s has no workers yet: waiting for some", scheduler.address)
        yield client


def _log_lost_workers(event: tuple[float, Any]) -> None:
    """Log which workers the scheduler has given up because their heartbeats stopped."""
    _, what = event
    if isinstance(what, dict) and what.get("action") == "worker-ttl-timed-out":
        for address in what["workers"]:
            log.warning("worker %s did not respond for %.0f s: another worker gets its unit", address, what["ttl"])


def _local(n_workers: int, gpus: int) -> Any:
    """Return a cluster of processes on this machine, which are restarted when lost."""
    from distributed import Nanny, Scheduler, Security, SpecCluster

    security, host = Security.temporary(), "127.0.0.1"  # not reachable from other machines
    if gpus and find_spec("dask_cuda") is not None:
        from dask_cuda import LocalCUDACluster

        return LocalCUDACluster(
            n_workers=n_workers,
            threads_per_worker=1,
            memory_limit=0,
            dashboard_address=None,
            host=host,
            protocol="tls://",
            security=security,
        )
    if gpus:
        log.warning("dask-cuda is not installed: each worker is pinned to its GPU only by CUDA_VISIBLE_DEVICES")
    common = {"host": host, "protocol": "tls://", "dashboard_address": f"{host}:0", "security": security}
    fixed = {"nthreads": 1, "memory_limit": 0, "silence_logs": logging.CRITICAL, **common}
    workers = {
        name: {"cls": Nanny, "options": fixed | {"env": _pinned(name) if gpus else {}}} for name in range(n_workers)
    }
    scheduler = {"cls": Scheduler, "options": {"port": 0, "dashboard": False, **common}}
    return SpecCluster(workers=workers, scheduler=scheduler, security=security, silence_logs=logging.CRITICAL)


def _pinned(name: int) -> dict[str, str]:
    """Return the environment that pins a worker to one of the visible GPUs."""
    visible = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    return {"CUDA_VISIBLE_DEVICES": visible[name] if visible else str(name)}


def _threads(share: int) -> dict[str, str]:
    """Return the environment that limits the threads of each worker, for ``share`` workers on the same cores."""
    threads = str(max(1, cpu_count() // share))
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)


@contextmanager
def _restore_environment() -> Iterator[None]:
    """Restore the environment afterwards, because Dask leaves its workers' variables in it for the next cluster."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _ignore_ctrl_c() -> Any:
    """Return a plugin that makes workers ignore Ctrl-C, which reaches all of a terminal's processes.

    The main process handles it and ends the workers.
    """
    from distributed import WorkerPlugin

    class IgnoreSignals(WorkerPlugin):
        name = "ignore Ctrl-C"

        def setup(self, worker: Any) -> None:
            for number in (signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)):
                signal.signal(number, signal.SIG_IGN)

    return IgnoreSignals()
