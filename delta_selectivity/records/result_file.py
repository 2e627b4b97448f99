"""The JSON result files: schema, atomic writes, and the check that a file may be continued.

One file per SAE and dataset. Keys `layer_N` are results; `_run` records how they were computed. `_run.key` holds
everything that changes a number (model, SAE and data by hash, seed, settings). A run continues a file only if the key
is the same. Otherwise it stops with an error and never overwrites the file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import subprocess
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any

from delta_selectivity.errors import RequestError
from delta_selectivity.records import figures
from delta_selectivity.records.differences import differences
from delta_selectivity.system.file_lock import Locked, exclusive
from delta_selectivity.system.provenance import installed_version
from delta_selectivity.system.whole_file import replacing, sweep, temporary_name

PROJECT = Path(__file__).resolve().parents[2]
SCHEMA_VERSION = 2
PACKAGES = ("torch", "transformers", "sae-lens", "gguf", "datasets", "numpy", "scikit-learn", "sae-probes", "cuml-cu13")

Json = dict[str, Any]
TEXT_ENTRIES = ("model_name", "sae_label", "baseline", "baseline_of", "baseline_of_sae")
"""Optional string entries of `_run.config`."""


@dataclass
class RecordFile:
    """The results of one SAE on one dataset, on disk after every `write`."""

    path: Path
    key: Json  # everything that changes a number
    run: Json  # the rest of `_run`: config, versions, commit, started, positive_class, task
    layers: dict[int, Json] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)  # warnings about the numbers, for their reader
    complete: bool = False
    seconds: Json = field(default_factory=dict)  # by stage, of the last run that wrote the file
    resources: Json = field(default_factory=dict)  # peak memory and the like, of the same run
    q_family: list[str] = field(default_factory=list)  # names of the files whose results share one q-value correction
    sae_level: Json = field(default_factory=lambda: {"compared": {}})  # the SAE's means, and comparisons with others

    @classmethod
    def open(cls, path: Path, key: Json, run: Json, overwrite: bool) -> RecordFile:
        """Open a file for writing, with the layers of an earlier file of the same key.

        Raises `RequestError` if the file on disk was made by something else or is no result file.
        """
        record_file = cls(path, as_json(key), run)
        if overwrite or not path.exists():
            return record_file
        try:
            content = read(path)
        except RequestError as error:
            raise RequestError(f"{error}: `overwrite` replaces it") from error
        if content["_run"]["key"] != record_file.key:
            differs = "; ".join(
                differences(content["_run"], {"key": record_file.key, "config": as_json(run["config"])})
            )
            raise RequestError(f"{path} was made with other settings ({differs}): `overwrite` replaces it")
        record_file.layers = {
            int(name.removeprefix("layer_")): value for name, value in content.items() if name != "_run"
        }
        run_before = content["_run"]
        record_file.warnings, record_file.complete = list(run_before["warnings"]), run_before["complete"]
        record_file.seconds, record_file.resources = run_before["seconds"], run_before["resources"]
        record_file.q_family, record_file.sae_level = list(run_before["q_family"]), run_before["sae_level"]
        return record_file

    @property
    def is_baseline(self) -> bool:
        """Whether the results are those of a baseline and not of an SAE."""
        return bool(self.run["config"].get("baseline"))

    def write(self, layers: Mapping[int, Json]) -> None:
        """Replace the file atomically by one with `layers` and the other fields."""
        self.layers = {layer: as_json(layers[layer]) for layer in sorted(layers)}
        results: Json = {f"layer_{layer}": self.layers[layer] for layer in sorted(self.layers)}
        run = {
            "schema_version": SCHEMA_VERSION,
            **self.run,
            "key": self.key,
            "q_family": self.q_family,
            "sae_level": self.sae_level,
            "results_sha256": _digest(results, self.sae_level),
            "warnings": self.warnings,
            "seconds": self.seconds,
            "resources": self.resources,
            "complete": self.complete,
        }
        write_json(self.path, {**results, "_run": run})


@contextmanager
def reserve(path: Path) -> Iterator[None]:
    """Lock `path` for writing inside the context, and remove temporary files of killed runs.

    Raises `RequestError` if another run holds the lock.
    """
    try:
        with exclusive(path):
            sweep(path.parent, path.name)
            yield
    except Locked as error:
        raise RequestError(
            f"{path}: another run is writing this file: wait until it ends, or choose another `output`"
        ) from error


def read(path: Path) -> Json:
    """Read and check a result file. Raises `RequestError` if it is not one, is truncated, or was edited by hand."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        run = content["_run"]
        results = {name: value for name, value in content.items() if name != "_run"}
        known = run["schema_version"] == SCHEMA_VERSION and _is_run(run)
        wrong = figures.fault(results, run["sae_level"])
        intact = run["results_sha256"] == _digest(results, run["sae_level"])
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RequestError(f"{path} is not a result file of this program") from error
    if not known:
        raise RequestError(f"{path} is not a result file of schema {SCHEMA_VERSION}")
    if not intact:
        raise RequestError(f"{path} was changed after it was written")
    if wrong is not None:
        raise RequestError(f"{path} is not a result file of this program: {wrong}")
    return content


def read_key(path: Path) -> Json | None:
    """Return `_run.key` of a result file; None if the file is missing or cannot be read."""
    try:
        return read(path)["_run"]["key"] if path.exists() else None
    except RequestError:
        return None


def _is_run(run: Json) -> bool:
    """Return whether `_run` has the entries that its readers need."""
    measured = [*run["seconds"].values(), *run["resources"].values()]
    names = [run["config"].get(name) for name in TEXT_ENTRIES]
    classes = run.get("positive_class", {})  # absent before version 0.5
    task = run.get("task", {})  # absent before version 1.0
    texts = [run.get("commit"), *run.get("versions", {}).values(), *names]
    return (
        isinstance(run["key"], dict)
        and isinstance(run["config"]["sae"], str)
        and all(text is None or isinstance(text, str) for text in texts)
        and isinstance(run["started"], str)
        and isinstance(run["complete"], bool)
        and all(isinstance(run[name], list) for name in ("warnings", "q_family"))
        and all(isinstance(line, str) for line in [*run["warnings"], *run["q_family"]])
        and all(figures.is_number(figure) for figure in measured)
        and all(isinstance(text, str) for text in [*classes, *classes.values()])
        and all(isinstance(task.get(name), str | None) for name in ("family", "source"))
    )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def write_json(path: Path, content: Json) -> None:
    """Replace the file atomically."""
    with replacing(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, allow_nan=False)
        file.write("\n")


def prepare_folder(folder: Path) -> None:
    """Create the folder and check that it is writable. Raises `RequestError` if it is not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary_name(folder / "writable").touch()
        sweep(folder, "writable")  # the file above, and those of killed runs
    except OSError as error:
        raise RequestError(f"`output` {folder}: cannot write there: {error.strerror}") from error


def result_path(folder: Path, model_name: str, dataset_slug: str) -> Path:
    """Return `{model}_{dataset}.json` with names made safe."""
    return folder / f"{model_slug(model_name)}_{slug(dataset_slug)}.json"


def model_slug(name: str) -> str:
    """Return a model name for use in a file name. A hub id has at most two parts; of a longer path, use the last."""
    return slug(PurePath(name).name if len(PurePath(name).parts) > 2 else name)


def slug(name: str) -> str:
    """Return a name for use in a file name: letters of any script, digits, `.`, `-`, `_`; not empty.

    The result depends on the name alone, not on the current directory. It has at most 100 bytes and does not start like
    a hidden file or a flag. Of a path that is absolute or begins with `~`, `.` or `assets`, only the last part is used.
    Any other path may be a hub id or a release and is used whole.
    """
    path = PurePath(name)
    if path.is_absolute() or name.startswith(("~", ".")) or path.parts[:1] == ("assets",):
        name = path.name if path.name not in ("", "..") else Path(os.path.abspath(name)).name  # noqa: PTH100
    return _safe(name)


def distinct_slugs(names: Sequence[str]) -> list[str]:
    """Return a distinct slug for each of several names, independent of the files on the disk.

    Paths with the same last part get the parts in which they differ as a prefix: `x/a/trainer_0` and `x/b/trainer_0`
    become `a_trainer_0` and `b_trainer_0`.
    """
    slugs = [slug(name) for name in names]
    for same in (text for text, n in Counter(slugs).items() if n > 1):
        alike = [i for i, text in enumerate(slugs) if text == same]
        for i, text in zip(alike, _distinct_tails([names[i] for i in alike]), strict=True):
            slugs[i] = text
    seen = Counter(slugs)
    return [
        text if seen[text] == 1 else f"{text}_{_short_hash(name, 8)}" for name, text in zip(names, slugs, strict=True)
    ]


def _distinct_tails(names: Sequence[str]) -> list[str]:
    """Return the last part of each path, preceded by as few differing parts as make the results distinct."""
    paths = [PurePath(os.path.normpath(name)).parts for name in names]
    longest = max(map(len, paths))
    depth = next((n for n in range(2, longest) if len({path[-n:] for path in paths}) == len(paths)), longest)
    differ = [n for n in range(2, depth + 1) if len({path[-n] if n <= len(path) else "" for path in paths}) > 1]
    return [
        _safe("_".join([*(path[-n] for n in reversed(differ) if n <= len(path)), path[-1] if path else ""]))
        for path in paths
    ]


def _safe(name: str) -> str:
    """Return the characters of a name that are safe in file names, with a hash in place of those removed."""
    name = unicodedata.normalize("NFC", name)
    kept = "".join(c if c in ".-" or unicodedata.category(c)[0] in "LMN" else "_" for c in name)
    safe = re.sub("_+", "_", kept).lstrip("._-").rstrip("._")
    if not safe:
        return f"unnamed_{_short_hash(name, 8)}"
    data = safe.encode()
    return safe if len(data) <= 100 else f"{data[:83].decode(errors='ignore')}_{_short_hash(safe, 16)}"


def _short_hash(name: str, digits: int) -> str:
    return hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:digits]


def describe_run(config: Json) -> Json:
    """Return the entries of `_run` about the program and the machine."""
    from delta_selectivity.system.processor import describe  # imports torch, which readers do not need

    packages = {name: installed_version(name) for name in PACKAGES}
    return {
        "config": _portable(as_json(config)),
        "versions": {"python": platform.python_version(), **packages, "processor": describe()},
        "commit": _commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _portable(value: Any) -> Any:
    """Make paths relative to the repository, so that files do not reveal where it was cloned to."""
    if isinstance(value, dict):
        return {name: _portable(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_portable(item) for item in value]
    return value.removeprefix(f"{PROJECT}{os.sep}") if isinstance(value, str) else value


@functools.cache  # cached: the loaded code does not change during a run
def _commit() -> str | None:
    """Return this program's commit, with `+changes` if the working tree differs; None outside a checkout."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(PROJECT), *words], capture_output=True, text=True, check=True, timeout=10
        )
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+changes" if changed else commit


def as_json(value: Any) -> Any:
    """Return the value after a JSON round trip, so that it compares equal to what was written."""
    return json.loads(json.dumps(value, default=str))


def _digest(results: Json, sae_level: Json) -> str:
    return hashlib.sha256(json.dumps([results, sae_level], sort_keys=True).encode()).hexdigest()
