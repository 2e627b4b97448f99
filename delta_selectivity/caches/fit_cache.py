"""On-disk cache of the probes of the model's own activations: a second SAE needs only its own probes.

    fits = FitCache.open(folder, limit_gb=50)
    model = fits.fit_model(plan, x, backend, control)     # bit-identical to `selectivity.fit_model`

The cache is content-addressed: the name of a shard (`shard_folder`) is a hash of everything that determines the bits of
a fit: activations, plans, the solver and its settings, library versions, the processor, the number of threads, and the
program's source. Any change of these leads to a new fit.
"""

from __future__ import annotations

import json
import logging
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from delta_selectivity.caches.shard_folder import ShardFolder, digest
from delta_selectivity.probing.folds import FoldPlan
from delta_selectivity.probing.probes import ProbeBackend
from delta_selectivity.probing.selectivity import DEFAULT_CS, ModelFit, ViewFit, control_scores, fit_model
from delta_selectivity.system.processor import prefers_onednn
from delta_selectivity.system.provenance import installed_version, running_program

log = logging.getLogger(__name__)

FOLDER = "probes"  # below the root, next to the models' folders
SOURCES = (
    "caches/fit_cache.py", "errors.py", "probing/__init__.py", "probing/backends/*.py", "probing/c_path.py",
    "probing/folds.py", "probing/probe_statistics.py", "probing/probes.py", "probing/selectivity.py",
    "probing/uncertainty.py",
    "system/compiled.py", "system/gemm.py", "system/out_of_memory.py", "system/processor.py", "system/provenance.py",
)  # fmt: skip
"""`selectivity` and everything of this package that it imports, the solvers, and this module."""

_LIBRARIES = ("torch", "numpy", "numba", "llvmlite", "scipy", "scikit-learn", "cuml-cu13")


class FitCache:
    """Cached fits of the model view and of its control task at `DEFAULT_CS`, for one version of the source."""

    def __init__(self, shards: ShardFolder, program: str) -> None:
        self._shards, self._program = shards, program

    @classmethod
    def open(cls, root: Path, limit_gb: float) -> FitCache:
        """Open the cache below `root`. Raises `RequestError` if it is not writable."""
        return cls(ShardFolder.open(root, FOLDER, limit_gb, "probe fits"), running_program(SOURCES))

    def fit_model(self, plan: FoldPlan, x: Tensor, backend: ProbeBackend, control: FoldPlan | None = None) -> ModelFit:
        """Return `selectivity.fit_model` for x `[rows, d]`, from the cache if possible."""
        name = self._name(plan, x, backend, control)
        stored = self._shards.read(name)
        if stored:
            log.info("read probes of %d rows x %d from %s", *x.shape, self._shards.folder / name)
            return _from_tensors(stored, x, control)
        fit = fit_model(plan, x, backend, control, DEFAULT_CS)
        self._shards.write(name, _to_tensors(fit), {})
        return fit

    def _name(self, plan: FoldPlan, x: Tensor, backend: ProbeBackend, control: FoldPlan | None) -> str:
        """Return the shard name, 32 hex digits. Groups and skipped targets do not affect the fit or the name."""
        facts = {
            "program": self._program,
            "machine": _machine(x.device),
            "solver": repr(backend),
            "cs": repr(DEFAULT_CS),
        }
        tensors = {"x": x.cpu()}
        for task, of in (("probes", plan), ("control", control)):
            if of is not None:
                facts[task] = f"{of.n_folds} folds"
                arrays = {"labels": of.labels, "weights": of.weights, "folds": of.folds}
                tensors |= {f"{task} {part}": torch.from_numpy(array) for part, array in arrays.items()}
        return digest(facts, tensors)


def _machine(device: torch.device) -> str:
    """Return a description of what determines rounding: device, processor, number of threads, libraries."""
    cpu = torch.backends.cpu.get_cpu_capability()
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    threads = torch.get_num_threads()
    return json.dumps([device.type, chip, threads, prefers_onednn(), *map(installed_version, _LIBRARIES)])


def _to_tensors(fit: ModelFit) -> dict[str, Tensor]:
    """Return all tensors of the fit, except x and the arguments."""
    tensors = {"scale": fit.scale}
    tensors |= {part.name: torch.as_tensor(getattr(fit.fit, part.name)) for part in fields(ViewFit)}
    if fit.control is not None:
        tensors["control"] = torch.from_numpy(fit.control.views["model"])
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _from_tensors(stored: dict[str, Tensor], x: Tensor, control: FoldPlan | None) -> ModelFit:
    """Rebuild the fit of x from copies: memory-mapped tensors are unaligned, which changes the rounding of sums."""
    on_host = {name: tensor.clone() for name, tensor in stored.items()}
    on_device = {name: tensor.to(x.device) for name, tensor in on_host.items()}
    view = ViewFit(
        scores=on_device["scores"],
        chosen_c=on_host["chosen_c"].numpy(),
        coef=on_device["coef"],
        intercept=on_device["intercept"],
        n_unconverged=on_host["n_unconverged"].numpy(),
        n_iter=on_host["n_iter"].numpy(),
    )
    scores = None if control is None else control_scores(control, on_host["control"].numpy())
    return ModelFit(x, on_device["scale"], view, DEFAULT_CS, scores)
