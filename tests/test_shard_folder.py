"""Folders of shards: one size limit for all of them, no files of others touched, and no damaged data read."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from delta_selectivity.caches.shard_folder import ShardFolder
from delta_selectivity.system.whole_file import replacing

TENSORS = {"coef": torch.arange(1000.0)}


def name(i: int) -> str:
    return f"{i:032x}"


def opened(root: Path, folder: str = "a", n_bytes: int = 10**6) -> ShardFolder:
    return ShardFolder.open(root, folder, n_bytes / 1024**3, "things")


def written(root: Path, folder: str, *numbers: int) -> int:
    """Write the shards of a finished run, the first one read longest ago; return the size of each."""
    for i in numbers:
        assert opened(root, folder).write(name(i), TENSORS, {})
        os.utime(root / folder / f"{name(i)}.safetensors", (1000 + i, 1000 + i))
    return (root / folder / f"{name(numbers[0])}.safetensors").stat().st_size


def there(root: Path) -> set[tuple[str, int]]:
    return {(path.parent.name, int(path.stem, 16)) for path in root.glob("*/*.safetensors")}


def test_one_size_limit_covers_all_folders(tmp_path):
    size = written(tmp_path, "a", 1, 3)
    written(tmp_path, "b", 2, 4)
    assert opened(tmp_path, "b").read(name(2)), "read just now: the last to go"
    small = opened(tmp_path, "c", 4 * size + 10)
    assert small.write(name(5), TENSORS, {})
    assert there(tmp_path) == {("a", 3), ("b", 2), ("b", 4), ("c", 5)}
    assert small.write(name(6), TENSORS, {})
    assert there(tmp_path) == {("b", 2), ("b", 4), ("c", 5), ("c", 6)}


def test_files_of_others_count_towards_the_limit(tmp_path):
    size = written(tmp_path, "a", 1)
    ours, others = opened(tmp_path, "a", 6 * size), opened(tmp_path, "b", 10**6)
    for i in range(2, 5):
        assert ours.write(name(i), TENSORS, {})
        assert others.write(name(i + 10), TENSORS, {})
    assert not ours.write(name(5), TENSORS, {})
    assert len(there(tmp_path)) == 6


def test_shards_read_by_this_run_are_not_evicted(tmp_path, caplog):
    size = written(tmp_path, "a", 1, 2)
    shards = opened(tmp_path, "a", 2 * size)
    assert shards.read(name(1))
    assert shards.read(name(2))
    assert not shards.write(name(3), TENSORS, {})
    assert not shards.write(name(4), TENSORS, {})
    assert there(tmp_path) == {("a", 1), ("a", 2)}
    assert caplog.text.count("full at") == 1


def test_files_dated_in_the_future_are_evicted_first(tmp_path):
    """The clock was set back since they were written."""
    size = written(tmp_path, "a", 1, 2, 3)
    ahead = time.time() + 10**6
    os.utime(tmp_path / "a" / f"{name(2)}.safetensors", (ahead, ahead))
    shards = opened(tmp_path, "a", 3 * size + 10)
    assert shards.write(name(4), TENSORS, {})
    assert there(tmp_path) == {("a", 1), ("a", 3), ("a", 4)}


def test_setting_the_clock_back_during_a_run(tmp_path):
    """Shards of this run stay, whatever their date; those of others are evicted."""
    size = written(tmp_path, "a", 1, 2)
    shards = opened(tmp_path, "a", 3 * size + 10)
    assert shards.write(name(3), TENSORS, {})
    for i in (1, 2, 3):
        ahead = time.time() + 10**6 + i
        os.utime(tmp_path / "a" / f"{name(i)}.safetensors", (ahead, ahead))
    assert shards.write(name(4), TENSORS, {})
    assert shards.write(name(5), TENSORS, {})
    assert not shards.write(name(6), TENSORS, {}), "there is nothing left that may go"
    assert there(tmp_path) == {("a", 3), ("a", 4), ("a", 5)}


def test_unknown_files_below_the_root_are_kept(tmp_path):
    strangers = [
        tmp_path / "model" / "model.safetensors",
        tmp_path / f"{name(7)}.safetensors",
        tmp_path / "a" / "notes",
    ]
    for path in strangers:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"0" * 10**5)
        os.utime(path, (1, 1))
    written(tmp_path, "a", 1)
    assert not opened(tmp_path, "a", 10).write(name(2), TENSORS, {})
    assert all(path.exists() for path in strangers)
    assert opened(tmp_path, "a").names() == []


@pytest.mark.parametrize("part", ["header", "dtype"])
def test_the_checksum_covers_the_header(tmp_path, caplog, part):
    """The header says which tensors these are and how to read the bytes, and can be damaged as well."""
    shards = opened(tmp_path)
    shards.write(name(1), TENSORS, {"stops": json.dumps([3, 7])})
    path = tmp_path / "a" / f"{name(1)}.safetensors"
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    if part == "header":
        save_file(TENSORS, path, {**header, "stops": json.dumps([2, 7])})
    else:
        save_file({"coef": TENSORS["coef"].view(torch.int32)}, path, header)
    assert opened(tmp_path).read(name(1)) == {}
    assert "is damaged" in caplog.text
    assert not path.exists()


def test_a_shard_name_depends_on_its_content(tmp_path):
    written(tmp_path, "a", 1)
    assert opened(tmp_path).read(name(1))
    (tmp_path / "a" / f"{name(1)}.safetensors").rename(tmp_path / "a" / f"{name(2)}.safetensors")
    assert opened(tmp_path).read(name(2)) == {}


def test_two_concurrent_writers_of_one_file(tmp_path):
    path = tmp_path / "shard"
    with replacing(path, "wb", sync=False) as one, replacing(path, "wb", sync=False) as other:
        one.write(b"whole")
        other.write(b"whole")
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


def test_files_of_killed_runs_are_removed_but_not_active_ones(tmp_path):
    folder = opened(tmp_path).folder
    with replacing(folder / f"{name(1)}.safetensors", "wb") as file:
        old = folder / f".{name(2)}.safetensors.0123abcd.tmp"
        old.write_bytes(b"half")
        os.utime(old, (time.time() - 10**4,) * 2)
        opened(tmp_path)
        file.write(b"all")
    assert [path.name for path in folder.iterdir()] == [f"{name(1)}.safetensors"]


def test_shards_are_read_back_unchanged(tmp_path):
    tensors = {"none": torch.empty(0, 3), "half": torch.randn(2, 3).half(), "flags": torch.tensor([True, False])}
    assert opened(tmp_path).write(name(1), tensors, {"of": "these"})
    for _ in range(2):
        found = opened(tmp_path).read(name(1))
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], tensors[key]) and found[key].dtype == tensors[key].dtype for key in tensors)
    assert load_file(tmp_path / "a" / f"{name(1)}.safetensors").keys() == tensors.keys()
