"""`RunConfig`: everything that was asked for, checked at construction. Only `main` sees it.

Rules that need a file, a model or a device are checked where those are opened; here are the rules that the
values alone can break. `None` means off or "choose for me", never -1 or "".
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from delta_selectivity.errors import RequestError

POSITIONS = ("last", "mean", "all")
PROBE_BACKENDS = ("auto", "torch", "cuml", "sklearn")
DTYPES = ("auto", "float32", "bfloat16", "float16")
BASELINES = ("identity", "random", "pca", "mean", "shuffled", "names")
VIEWS = ("model", "sae", "error", "latents")
BOS = ("auto", "counted", "excluded", "none")


@dataclass(frozen=True)
class RunConfig:
    """One run of `main.py`."""

    model_name: str  # hub id or local folder
    revision: str | None  # branch, tag or commit of a hub model
    trust_remote_code: bool
    sae_names: tuple[str, ...]  # each a hub id, a local folder, release/sae_id of SAE Lens, or a pattern of those
    datasets: tuple[str, ...]  # names of Wikidata datasets; empty with dataset_file alone
    dataset_file: str | None  # a file, a folder, or a dataset on the Hub
    dataset_split: str | None  # None: train, or the only one
    dataset_columns: tuple[tuple[str, str], ...]  # (our name, the file's name)
    data_dir: Path | None
    layers: tuple[int, ...] | None  # None: every layer that the SAE has
    hookpoint: str | None  # None: what the SAE says of itself
    positions: str
    bos: str  # whether texts begin with BOS, and whether it counts in whole-text figures
    output_directory: Path
    device1: str  # model and SAE
    device2: str  # probes
    batch_size: int | None  # texts in a forward pass; None: chosen from free memory
    shuffle_select_n: int | None  # rows per dataset at most; None: all
    probe: str
    views: tuple[str, ...]
    baselines: tuple[str, ...]  # kinds of baselines to measure beside the SAEs
    epsilon: float  # differences of selectivity within +-this count as preserved
    dtype: str  # of the model; SAEs compute in float32, probes in float64
    folds: int
    repeats: int
    seed: int
    queue_gb: float
    cache_dir: Path | None  # None: neither activations nor fits are kept
    cache_gb: float
    overwrite: bool
    force: bool  # measure SAEs that do not seem to fit
    quiet: bool
    verbose: bool

    def __post_init__(self) -> None:
        _one_of("`positions`", self.positions, POSITIONS)
        _one_of("`probe`", self.probe, PROBE_BACKENDS)
        _one_of("`dtype`", self.dtype, DTYPES)
        _one_of("`bos`", self.bos, BOS)
        for view in self.views:
            _one_of("`views`", view, VIEWS)
        for baseline in self.baselines:
            _one_of("`baselines`", baseline, BASELINES)
        _at_least("`folds`", self.folds, 3)  # C for a fold is chosen on the others: two at least
        _at_least("`repeats`", self.repeats, 1)
        _at_least("`seed`", self.seed, 0)
        if self.batch_size is not None:
            _at_least("`batch_size`", self.batch_size, 1)
        if self.shuffle_select_n is not None:
            _at_least("`shuffle_select_n`", self.shuffle_select_n, 1)
        if not 0 < self.epsilon < 1:
            raise RequestError(f"`epsilon` must be between 0 and 1, got {self.epsilon}")
        if not self.queue_gb > 0:
            raise RequestError(f"`queue_gb` must be positive, got {self.queue_gb}")
        if not self.cache_gb > 0:
            raise RequestError(f"`cache_gb` must be positive, got {self.cache_gb}")
        if not self.sae_names:
            raise RequestError("`saes` is empty: give a hub id, a folder, or several with commas")
        if self.dataset_file is None and (self.dataset_split or self.dataset_columns):
            raise RequestError("`split` and `columns` say how to read `dataset_file`, which is missing")


def parse_layers(spec: str) -> tuple[int, ...] | None:
    """'0,1,2', '0-11', '0,4-6' -> sorted layers; 'all' -> None. Raises `RequestError` on anything else."""
    if spec.strip().lower() == "all":
        return None
    layers: set[int] = set()
    for part in spec.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.strip().isdecimal()):
            raise RequestError(f"`layers` {spec!r}: write 0,1,2 or 0-11 or all")
        stop = int(last) if dash else int(first)
        if stop < int(first):
            raise RequestError(f"`layers` {spec!r}: {part.strip()} counts down; write it as {stop}-{first}")
        if stop > 10_000:
            raise RequestError(f"`layers` {spec!r}: no model has a layer {stop}")
        layers.update(range(int(first), stop + 1))
    return tuple(sorted(layers))


def _one_of(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise RequestError(f"{flag} {value!r} is not one of {', '.join(allowed)}")


def _at_least(flag: str, value: int, least: int) -> None:
    if value < least:
        raise RequestError(f"{flag} must be at least {least}, got {value}")
