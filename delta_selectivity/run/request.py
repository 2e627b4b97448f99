"""The class `Request`: the complete specification of a run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from delta_selectivity.errors import RequestError
from delta_selectivity.saes import SaeSource
from delta_selectivity.settings import Settings
from delta_selectivity.tasks import GurneeData, TaskName, UserData


@dataclass(frozen=True)
class Request:
    """What to measure, with which settings, and where to write it."""

    model: str  # hub id, local folder, GGUF file or name of a packaged model
    saes: tuple[str | SaeSource, ...]  # names as `expand_names` takes them, or SAEs in memory
    tasks: tuple[TaskName, ...]
    layers: tuple[int, ...] | None  # None: all layers that the SAE has
    settings: Settings
    output: Path
    device1: str  # of model and SAEs
    device2: str  # of probes
    cache: Path | None = None  # folder of the cache; None: nothing is cached

    def __post_init__(self) -> None:
        if not self.saes:
            raise RequestError("`saes` is empty: give at least one hub id or folder")
        if not self.tasks:
            raise RequestError("`tasks` is empty: give at least one")

    def described(self) -> dict[str, Any]:
        """Return the request for `_run.config` of a result file: flag name -> value."""
        table = next((task for task in self.tasks if isinstance(task, UserData)), UserData(""))
        folders = [str(task.data_dir) for task in self.tasks if isinstance(task, GurneeData)]
        return {
            "model_name": self.model,
            "sae_names": [sae if isinstance(sae, str) else sae.name for sae in self.saes],
            "datasets": [
                task if isinstance(task, str) else task.name for task in self.tasks if not isinstance(task, UserData)
            ],
            "dataset_file": table.path_or_name or None,
            "dataset_split": table.split,
            "dataset_columns": table.columns,
            "data_dir": folders[0] if folders else None,
            "layers": self.layers,
            "output_directory": self.output,
            "device1": self.device1,
            "device2": self.device2,
            "cache_dir": self.cache,
            **asdict(self.settings),
        }


def parse_layers(spec: str) -> tuple[int, ...] | None:
    """Parse '0,1,2', '0-11' or '0,4-6' to sorted layers, and 'all' to None. Raises `RequestError` for anything else."""
    if spec.strip().lower() == "all":
        return None
    layers: set[int] = set()
    for part in spec.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.strip().isdecimal()):
            raise RequestError(f"`layers` {spec!r}: write 0,1,2 or 0-11 or all")
        stop = int(last) if dash else int(first)
        if stop < int(first):
            raise RequestError(f"`layers` {spec!r}: {part.strip()} is descending: write {stop}-{first}")
        if stop > 10_000:
            raise RequestError(f"`layers` {spec!r}: layer {stop} is out of range")
        layers.update(range(int(first), stop + 1))
    return tuple(sorted(layers))


def choose_devices(device1: str | None, device2: str | None) -> tuple[str, str]:
    """Return the devices of model and probes: those requested, else the best available. Raises `RequestError`."""
    n_gpus = torch.cuda.device_count()
    device1 = device1 or ("cuda:0" if n_gpus else "cpu")
    device2 = device2 or ("cuda:1" if n_gpus > 1 and device1 != "cuda:1" else device1)
    if device2 == device1 and device1.startswith("mps"):
        device2 = "cpu"  # probes need float64
    for field, name in (("device1", device1), ("device2", device2)):
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise RequestError(f"`{field}` {name!r} is not a device: use cpu, cuda:0, cuda:1, ...") from error
        if device.type not in {"cpu", "cuda", "mps"}:
            raise RequestError(f"`{field}` {name!r}: only cpu, cuda and mps devices are supported")
        if device.type == "mps" and field == "device2":
            raise RequestError(f"`{field}` {name}: probes need float64, which MPS lacks: use cpu")
        if device.type == "mps" and not torch.backends.mps.is_available():
            raise RequestError(f"`{field}` {name}: this machine has no MPS device")
        if device.type == "cuda" and (device.index or 0) >= n_gpus:
            raise RequestError(
                f"`{field}` {name}: this machine has {n_gpus or 'no'} CUDA device{'s' if n_gpus > 1 else ''}"
            )
    return device1, device2
