"""The embedded cluster: no other user gets access, and a hanging worker is reported and replaced."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from distributed import Security

from delta_selectivity.errors import RequestError
from delta_selectivity.scale import cluster
from delta_selectivity.scale.cluster import Remote
from delta_selectivity.scale.same_program import check

STRANGER = '''
"""Try every port as another user, in every way; prints a line a try: refused, or what was got."""
import asyncio, http.client, itertools, os, ssl, sys
from concurrent.futures import ThreadPoolExecutor
from distributed import Client, Security
from distributed.core import rpc

async def talk(address, security):
    async with rpc(address, connection_args=security.get_connection_args("client"), timeout=2) as remote:
        return await asyncio.wait_for(remote.identity(), 3)

def dask(address, security):
    return asyncio.run(talk(address, security))

def no_certificate(port):
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    http_ = http.client.HTTPSConnection("127.0.0.1", port, timeout=3, context=context)
    http_.request("GET", "/")
    return http_.getresponse().status

def page(port, path):
    http_ = http.client.HTTPConnection("127.0.0.1", port, timeout=3)
    http_.request("GET", path)
    answer = http_.getresponse()
    if answer.status == 404 or path == "/sitemap.json" and answer.read() == b'{"paths": ["/sitemap.json"]}':
        raise OSError("nothing there")
    return answer.status

own = Security.temporary()
ports = [int(port) for port in sys.argv[1:]]
try:
    dask("tls://127.0.0.1:1", own)  # imports what it needs: the other user may not read Python's folder
except OSError:
    pass
if os.getuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
ways = {
    "plain": lambda port: dask(f"tcp://127.0.0.1:{port}", Security()),
    "a key of its own": lambda port: dask(f"tls://127.0.0.1:{port}", own),
    "no certificate": no_certificate,
    **{path: lambda port, path=path: page(port, path) for path in
       ("/", "/status", "/health", "/info/main/workers.html", "/json/counts.json", "/metrics", "/sitemap.json")},
}
def attempt(port, way):
    try:
        return f"{way}: got {ways[way](port)}"
    except Exception as error:
        return f"{way}: refused"

with ThreadPoolExecutor(32) as at_once:
    print(*at_once.map(attempt, *zip(*itertools.product(ports, ways))), sep="\\n")
'''


def listening() -> list[int]:
    """Return the TCP ports on which this process and its children listen."""
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    found = [c.laddr for process in family for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert {address.ip for address in found} == {"127.0.0.1"}
    return sorted(address.port for address in found)


def strangers_luck(ports: list[int]) -> list[str]:
    """Return what another user achieves who tries every port in every way."""
    command = [sys.executable, "-c", STRANGER, *map(str, ports)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.splitlines()
    assert len(told) == 10 * len(ports)
    return [line for line in told if not line.endswith("refused")]


def test_another_user_of_this_machine_is_refused_at_every_port():
    with cluster.open_cluster(1, 0, None) as client:
        client.wait_for_workers(1)
        ports = listening()
        assert len(ports) >= 3  # of the scheduler, of the worker, and of the nanny that restarts it
        assert strangers_luck(ports) == []
        assert client.submit(os.getuid, pure=False).result(timeout=20) == os.getuid(), "we are let in"


def test_another_user_gets_into_a_cluster_without_keys():
    from distributed import LocalCluster

    with LocalCluster(n_workers=0, host="127.0.0.1", dashboard_address=None) as open_to_all:
        port = int(open_to_all.scheduler_address.rpartition(":")[2])
        (line,) = strangers_luck([port])
    assert line.startswith("plain: got {'type': 'Scheduler'")


def test_files_of_dask_are_in_a_private_folder_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with cluster.open_cluster(1, 0, None) as client:
        client.wait_for_workers(1)
        (folder,) = tmp_path.iterdir()
        assert folder.stat().st_mode & 0o077 == 0
        (path,) = client.run(lambda dask_worker: dask_worker.local_directory).values()
        assert folder in Path(path).parents
    assert list(tmp_path.iterdir()) == []


def test_a_hanging_worker_is_reported_and_its_unit_is_reassigned(monkeypatch, caplog):
    monkeypatch.setattr(cluster, "WORKER_TIMEOUT", 1)  # Dask waits for at least ten heartbeats: 5 s
    with cluster.open_cluster(2, 0, None) as client:
        client.wait_for_workers(2)
        where = client.submit(lambda: (os.getpid(), time.sleep(1))[0], pure=False, key="unit")
        victim = None
        while victim is None:
            victim = next((w for w, keys in client.processing().items() if "unit" in keys), None)
        pid = client.run(os.getpid, workers=[victim])[victim]
        os.kill(pid, signal.SIGSTOP)
        caplog.clear()
        assert where.result(timeout=60) not in (pid, None)
        assert not psutil.pid_exists(pid)
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert told == [f"worker {victim} did not respond for 5 s: another worker gets its unit"]


def other_version() -> None:
    """Pretend, in a worker, that the package is older."""
    from distributed import versions

    versions.get_package_info.__globals__["_version_cached"] = {"delta-selectivity": "0.0.9"}.get


def other_source() -> None:
    """Pretend, in a worker, that a line of the source differs."""
    from delta_selectivity.scale import same_program

    same_program.own_digest = lambda: "0" * 64


def test_a_different_program_on_a_worker_is_rejected_before_any_unit():
    with cluster.open_cluster(2, 0, None) as client:
        client.wait_for_workers(2)
        check(client)
        one, two = client.scheduler_info()["workers"]
        client.run(other_source, workers=[one])
        with pytest.raises(RequestError, match=f"worker {one} runs different source code of delta-selectivity"):
            check(client)
        client.run(other_version, workers=[two])
        with pytest.raises(
            RequestError, match=rf"worker {two} has delta-selectivity 0.0.9, this process has delta-sel"
        ):
            check(client)


@pytest.fixture
def files(tmp_path):
    """Create a certificate and its key, as an administrator provides them."""
    made = Security.temporary()
    found = {"tls_ca_file": made.tls_ca_file, "tls_cert": made.tls_client_cert, "tls_key": made.tls_client_key}
    for name, content in found.items():
        (tmp_path / f"{name}.pem").write_text(content)
    return {name: tmp_path / f"{name}.pem" for name in found}


def test_tls_files_are_passed_to_dask(files):
    security = Remote("tls://10.0.0.7:8786", **files).security()
    assert security.require_encryption
    assert security.get_tls_config_for_role("client") == {
        "ca_file": str(files["tls_ca_file"]),
        "cert": str(files["tls_cert"]),
        "key": str(files["tls_key"]),
        "ciphers": None,
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tls_ca_file": None}, "`tls_ca_file` is needed"),
        ({"tls_cert": None}, "`tls_cert` is needed"),
        ({"tls_cert": Path("/no/such.pem")}, "cannot use the TLS files .*/no/such.pem"),
        ({"tls_key": Path(__file__)}, "cannot use the TLS files .*test_cluster.py"),
        ({"address": "tcp://10.0.0.7:8786"}, "`tls_ca_file`: `scheduler` tcp://10.0.0.7:8786 does not use TLS"),
    ],
)
def test_wrong_tls_files_are_rejected_with_one_line(files, change, words):
    with pytest.raises(RequestError, match=words) as told:
        Remote(**({"address": "tls://10.0.0.7:8786", **files} | change)).security()
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("address", "warned"),
    [("tcp://10.0.0.7:8786", True), ("10.0.0.7:8786", True), ("tcp://head:8786", True), ("tcp://[fe80::1]:80", True),
     ("tcp://127.0.0.1:8786", False), ("tcp://localhost:8786", False), ("tcp://[::1]:8786", False),
     ("127.0.0.1:8786", False)],
)  # fmt: skip
def test_an_unencrypted_connection_to_another_machine_is_warned_of(address, warned, caplog):
    assert Remote(address).security() is None
    assert [("not encrypted" in record.getMessage()) for record in caplog.records] == [True] * warned
