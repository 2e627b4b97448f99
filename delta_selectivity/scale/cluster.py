"""Start Dask workers on this machine, or connect to a cluster.

    with open_cluster(n_workers=2, gpus=0, scheduler=None) as client:
        client.submit(...)

Whoever reaches a Dask scheduler or worker can run code in it. So on this machine all of them speak TLS with a key that
is made for the run and never leaves its processes, and serve no web page; other users of the machine are refused.

On this machine a lost worker is started again. On a cluster of others that is its own business; the units of a lost
worker go to another in either case. Dask is imported here and only when workers are wanted.
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
SILENT = 120  # s without a heartbeat after which a worker counts as lost: heartbeats come from a thread of their own
# every half second, also while a unit computes; what holds them up (one call that keeps Python's lock) takes seconds
LOSSES = 3  # workers that a unit may lose: with one more it is taken for the cause (out of memory, say) and given up

INSTALL = 'many workers need Dask: pip install "delta-selectivity[scale]", in a clone pip install -e ".[scale]"'


@dataclass(frozen=True)
class Remote:
    """A running Dask scheduler, and the files that let us in."""

    address: str  # such as tls://10.0.0.7:8786
    tls_ca_file: Path | None = None  # PEM; None: as Dask's own configuration says
    tls_cert: Path | None = None
    tls_key: Path | None = None

    def security(self) -> Any:
        """A `distributed.Security`. Raises `RequestError` if a file is missing or wrong, or the address takes none."""
        from distributed import Security

        given = {name: getattr(self, name) for name in ("tls_ca_file", "tls_cert", "tls_key") if getattr(self, name)}
        if not self.address.startswith("tls://"):
            if given:
                raise RequestError(
                    f"`{next(iter(given))}`: `scheduler` {self.address} is not encrypted; give tls://..."
                )
            if self._is_elsewhere():
                log.warning(
                    "`scheduler` %s is not encrypted: whoever reaches it can run code on its workers, and in this "
                    "process; give tls://... unless you trust everybody on that network",
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
            raise RequestError(f"`scheduler` {self.address}: no certificate and key in {files} ({error})") from error
        return security

    def _is_elsewhere(self) -> bool:
        host = urlsplit(self.address if "://" in self.address else f"tcp://{self.address}").hostname or ""
        try:
            return not ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host != "localhost"


@contextmanager
def open_cluster(n_workers: int, gpus: int, scheduler: Remote | None) -> Iterator[Any]:
    """A `distributed.Client` whose workers do one unit at a time.

    Args:
        n_workers: processes on this machine, if no scheduler is given.
        gpus: how many of them have a GPU, each one of its own; 0: they share the cores of the CPU.
        scheduler: a running scheduler, in place of processes on this machine.

    Raises:
        RequestError: Dask is not installed, nobody answers at the address, or another version of this program.
    """
    if find_spec("distributed") is None or find_spec("cryptography") is None:
        raise RequestError(INSTALL)
    import dask
    from distributed import Client

    quiet = {
        "distributed.scheduler.allowed-failures": LOSSES,
        "distributed.nanny.pre-spawn-environ": _threads(n_workers if not gpus else 1),
        "distributed.admin.tick.limit": "1h",  # a unit may hold Python's lock for long: no reason to complain
        "distributed.worker.profile.enabled": False,
        "distributed.comm.timeouts.connect": f"{WAIT_FOR_WORKERS}s",
        "distributed.scheduler.worker-ttl": f"{SILENT}s",
        "distributed.scheduler.worker-saturation": 1.0,  # a worker holds no unit but the one it measures
        "distributed.scheduler.http.routes": [],  # no dashboard, no metrics, no proxy: its pages have no password
        "distributed.worker.http.routes": [],
    }
    with dask.config.set(quiet), _environment_kept():
        logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what a user must know, the outcomes tell
        if scheduler is not None:
            with _reach(scheduler) as client:
                client.subscribe_topic("scheduler", _tell_silent)
                yield client
            return
        with (
            tempfile.TemporaryDirectory(prefix="delta-selectivity-workers-") as own,
            dask.config.set({"temporary-directory": own}),  # in place of one that any user may have made
            _local(n_workers, gpus) as cluster,
            Client(cluster, set_as_default=False) as client,
        ):
            client.register_plugin(_ignore_ctrl_c())
            client.subscribe_topic("scheduler", _tell_silent)
            yield client


@contextmanager
def _reach(scheduler: Remote) -> Iterator[Any]:
    """A client of a scheduler that answers."""
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


def _tell_silent(event: tuple[float, Any]) -> None:
    """Say that a scheduler has given up workers from which it heard nothing."""
    _, what = event
    if isinstance(what, dict) and what.get("action") == "worker-ttl-timed-out":
        for address in what["workers"]:
            log.warning("worker %s has been silent for %.0f s: its unit goes to another", address, what["ttl"])


def _local(n_workers: int, gpus: int) -> Any:
    """Processes on this machine, started again when they are lost."""
    from distributed import Nanny, Scheduler, Security, SpecCluster

    security, host = Security.temporary(), "127.0.0.1"  # nothing for other machines to reach
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
        log.warning("dask-cuda is not installed: each worker is pinned to its GPU by CUDA_VISIBLE_DEVICES alone")
    here = {"host": host, "protocol": "tls://", "dashboard_address": f"{host}:0", "security": security}
    fixed = {"nthreads": 1, "memory_limit": 0, "silence_logs": logging.CRITICAL, **here}
    workers = {
        name: {"cls": Nanny, "options": fixed | {"env": _pinned(name) if gpus else {}}} for name in range(n_workers)
    }
    scheduler = {"cls": Scheduler, "options": {"port": 0, "dashboard": False, **here}}
    return SpecCluster(workers=workers, scheduler=scheduler, security=security, silence_logs=logging.CRITICAL)


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
