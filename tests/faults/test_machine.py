"""Effects of the machine and other programs: vanishing folders, kills, another user, no /proc."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from runs import ROOT, Request, files, left_over, numbers
from test_lock import holder
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from delta_selectivity.caches.shard_folder import ShardFolder
from delta_selectivity.cli import scale
from delta_selectivity.cli.sweep import Sweep
from delta_selectivity.errors import RequestError
from delta_selectivity.system import whole_file
from delta_selectivity.system.file_lock import exclusive
from delta_selectivity.tasks import Mention, data_wheel
from delta_selectivity.tasks.tokens import tokenise


@pytest.mark.parametrize("when", [1, 2, 5])
def test_deleting_the_cache_during_a_run_changes_no_number(with_cache, tmp_path, monkeypatch, caplog, when):
    assert with_cache.into(tmp_path / "before").run() == 0
    shutil.rmtree(tmp_path / "cache")
    calls, lock, write, read = [0], threading.Lock(), ShardFolder.write, ShardFolder.read

    def deleting(function):
        def call(*args):
            with lock:
                calls[0] += 1
                if calls[0] == when:
                    shutil.rmtree(tmp_path / "cache")
            return function(*args)

        return call

    monkeypatch.setattr(ShardFolder, "write", deleting(write))
    monkeypatch.setattr(ShardFolder, "read", deleting(read))
    caplog.clear()
    assert with_cache.run() == 0
    assert calls[0] >= when
    assert numbers(with_cache.out) == numbers(tmp_path / "before")
    told = [record.getMessage() for record in caplog.records if "`cache`" in record.getMessage()]
    assert len(told) <= 3, "once for each kind of what is kept"


def test_a_killed_cache_writer_does_not_block_the_next(tmp_path, monkeypatch):
    """The killed process holds the lock of evictions and has written half a file."""
    name, tensors = "a" * 32, {"x": torch.arange(1000.0)}
    pid = os.fork()
    if pid == 0:
        shards = ShardFolder.open(tmp_path, "fits", 1.0, "things")
        with exclusive(tmp_path / "eviction"), whole_file.replacing(shards._path(name), "wb") as file:
            file.write(b"half")
            file.flush()
            (tmp_path / "in").touch()
            signal.pause()
    while not (tmp_path / "in").exists():
        pass
    waiting = ShardFolder.open(tmp_path, "fits", 1.0, "things")
    assert waiting.write("b" * 32, tensors, {}), "it does not wait for the lock"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert waiting.read(name) == {}, "half a file is none"
    assert waiting.write(name, tensors, {})
    again = ShardFolder.open(tmp_path, "fits", 1.0, "things")
    assert torch.equal(again.read(name)["x"], tensors["x"])


def test_workers_reject_a_folder_that_main_is_writing(tiny_model, tiny_saes, people_csv, tmp_path, capsys):
    asked = Request(tiny_model, (tiny_saes,), people_csv, tmp_path / "out").plus("--layers", "0")
    (tmp_path / "out").mkdir()
    with holder(tmp_path / "out" / "pythia-tiny_women.json") as process:
        assert scale.main([*asked.argv, "--workers", "1"]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "another run is writing this file" in line
        process.kill()
    assert files(asked.out) == []


def test_a_missing_proc_is_one_line(tiny_model, tiny_saes, people_csv, tmp_path, capsys, monkeypatch):
    is_dir = Path.is_dir
    monkeypatch.setattr(Path, "is_dir", lambda self: not str(self).startswith("/proc") and is_dir(self))
    assert Request(tiny_model, (tiny_saes,), people_csv, tmp_path / "out").run() == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "/proc is not mounted" in line


def test_a_tokenizer_with_a_runaway_regex_is_rejected(tiny_model):
    content = json.loads((tiny_model / "tokenizer.json").read_text("utf-8"))
    pattern = {"Regex": "(.*a){20}$"}
    content["pre_tokenizer"] = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    text = "a" * 60 + "b"
    with pytest.raises(RequestError, match="fails on a text"):
        tokenise([Mention(text, 0, 4, "somebody")], tokenizer, prepend_bos=False, max_length=128)


ODD = ["../../x", "__proto__", "<b>", "a\u202eb", "\u0000", "CON", "x" * 300, "=1+1", "-rf", "~", "/etc"]


@pytest.mark.parametrize("value", ODD)
def test_folders_of_a_sweep_have_safe_names_inside_its_folder(tmp_path, value):
    path = tmp_path / "sweep.toml"
    path.write_text(f'output_directory = "out"\n[[grid]]\nsae_name = [{json.dumps(value)}, "plain"]\n', "utf-8")
    folders = [Path(request["output_directory"]) for request in Sweep.read(path).requests]
    assert len(folders) == 2
    for folder in folders:
        assert folder.parent == Path("out")
        assert folder.name.startswith("sae_name_") and folder.name.isprintable() and len(folder.name) < 200
        assert not set(folder.name) & set("<>=/\\~")


AS_NOBODY = """
set -e
mount --make-rprivate /
mount -t tmpfs -o size=1m,mode=1777 tmpfs /dev/shm
for hidden in $(printf "%s\\n" {hidden} | sort -u); do                    # which others may not enter
    mkdir /dev/shm/python && mount --bind {python} /dev/shm/python      # of this namespace, gone with it
    mount -t tmpfs tmpfs $hidden && chmod 755 $hidden
    mkdir -p {python} && mount --bind /dev/shm/python {python}
done
umask 077
exec setpriv --reuid 65534 --regid 65534 --clear-groups "$@"
"""


@pytest.fixture
def in_the_open(with_cache):
    """Return the request on copies in a folder that every user can read."""
    folder = Path(tempfile.mkdtemp())
    shutil.copytree(with_cache.model, folder / "model")
    shutil.copytree(with_cache.saes[0], folder / "saes")
    shutil.copytree(data_wheel.fetch().parent, folder / "data")
    shutil.copy(with_cache.data, folder / "women.csv")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (folder / "own").mkdir()
    os.chown(folder / "own", 65534, 65534)
    yield folder, Request(folder / "model", (folder / "saes",), folder / "women.csv", folder)
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("program", ["main.py", "compute_selectivity.py"])
def test_another_user_with_umask_077_and_a_megabyte_of_shared_memory(in_the_open, program):
    """The run succeeds where it may write; elsewhere it fails with one line."""
    folder, asked = in_the_open
    python = Path(sys.base_prefix)
    hidden = [parent for parent in python.parents if not parent.stat().st_mode & 0o001]
    script = AS_NOBODY.format(hidden=" ".join(map(str, hidden)), python=python)
    env = {**os.environ, "HOME": "/nonexistent", "PYTHONPATH": str(ROOT), "DELTA_SELECTIVITY_DATA": f"{folder}/data"}

    def run(out: Path, *more: str) -> tuple[int, str]:
        words = [sys.executable, str(ROOT / program), *asked.into(out).argv, *more]
        command = ["unshare", "-m", "bash", "-c", script, "bash", *words]
        done = subprocess.run(command, env=env, cwd=folder / "own", capture_output=True, text=True, timeout=120)
        return done.returncode, done.stderr

    code, told = run(folder / "own" / "out", "--cache_dir", str(folder / "own" / "cache"))
    if "unshare" in told and "not permitted" in told:
        pytest.skip("no mount namespaces here")
    assert code == 0, told
    assert all(path.stat().st_mode & 0o077 == 0 for path in (folder / "own").rglob("*"))
    assert left_over(folder / "own" / "out") == []
    code, told = run(folder / "not_ours")
    assert code == 2, told
    assert told.startswith("error: --output_directory") and told.count("\n") == 1 and "Permission denied" in told
    code, told = run(folder / "own" / "out2", "--cache_dir", str(folder / "not_ours"))
    assert code == 2, told
    assert told.startswith("error: --cache_dir") and told.count("\n") == 1 and "Permission denied" in told
