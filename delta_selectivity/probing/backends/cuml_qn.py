"""Logistic regression by cuML's quasi-Newton solver on an NVIDIA GPU, one fit at a time.

cuML and CuPy are imported at the first fit, in the thread that calls it: their settings and handles are per thread.

Two things differ from scikit-learn (cuML 26.10, cpp/src/glm/qn): the loss is a mean over rows, so `tol` is divided by
the number of rows; and the weighted loss is divided by the sum of the weights while the penalty is divided by
the number of rows, so the weights are scaled to mean 1 and C is multiplied by their mean.

Sparse features use torch's solver: `qn` fits one probe at a time and stores vectors as long as the number of latents.
"""

from __future__ import annotations

import importlib
import threading
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from delta_selectivity.probing.backends.problem import Path, ProbeFits, ProbeProblem, balanced
from delta_selectivity.probing.backends.torch_lbfgs import TorchLbfgs


@dataclass(frozen=True)
class CumlQn:
    """cuML's `qn` solver in float64 on one device."""

    device: torch.device
    tolerance: float = 1e-4  # of the gradient of the summed loss
    max_iter: int = 5000
    name: str = field(default="cuml", init=False)
    _sparse: TorchLbfgs = field(default_factory=TorchLbfgs, init=False, repr=False, compare=False)
    _thread: threading.local = field(default_factory=threading.local, init=False, repr=False, compare=False)

    def setup(self) -> tuple[Any, Any]:
        """Return the modules (cuml.linear_model, cupy), set to the device and to CuPy output in this thread."""
        if not hasattr(self._thread, "modules"):
            cupy, cuml = importlib.import_module("cupy"), importlib.import_module("cuml")
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
                cupy.cuda.Device(torch.cuda.current_device()).use()
            cuml.set_global_output_type("cupy")
            self._thread.modules = (importlib.import_module("cuml.linear_model"), cupy)
        return self._thread.modules

    def fit(self, problem: ProbeProblem, path: Path | None = None) -> ProbeFits:
        """Fit the probes (see `ProbeBackend`) on this device; the GPU has finished on return."""
        if problem.x.is_sparse_csr:
            return self._sparse.fit(problem, path)
        fits = ProbeFits.empty(problem)
        on_device = replace(
            problem,
            x=problem.x.to(self.device, torch.float64),
            labels=problem.labels.to(self.device),
            weight=problem.weight.to(self.device),
            scale=problem.scale.to(self.device),
        )
        for t in range(problem.n_targets):
            if path is not None:
                path.begin(slice(t, t + 1))
            index = torch.arange(problem.n_splits, device=fits.coef.device) + t * problem.n_splits
            for i in range(len(problem.cs)):
                margins = [self._fit_one(on_device, fits, (i, t, s)) for s in range(problem.n_splits)]
                fits.fitted[i, t] = True
                if path is not None:
                    path.record(index, torch.stack(margins))
                    if not bool(path.advance()):
                        break
        return fits

    def _fit_one(self, problem: ProbeProblem, fits: ProbeFits, place: tuple[int, int, int]) -> Tensor:
        """Fit one probe, write it into `fits` in the units of x, and return its scores of all rows: float64 [rows]."""
        linear_model, cupy = self.setup()
        i, t, s = place
        train, divisor = problem.weight[s] > 0, problem.divisor[s]
        rows, label = problem.x[train], problem.labels[t][train]
        weight = balanced(label, problem.weight[s][train])
        centre, size = rows.mean(dim=0), float(weight.mean())
        given = [((rows - centre) / divisor).contiguous(), label.double(), weight / size]
        self._synchronise(cupy)  # torch and CuPy work on different streams
        features, labels, weights = (cupy.from_dlpack(tensor) for tensor in given)
        probe = linear_model.LogisticRegression(
            penalty="l2",
            C=problem.cs[i] * size,
            fit_intercept=True,
            class_weight=None,
            max_iter=self.max_iter,
            tol=self.tolerance / len(rows),
            solver="qn",
        ).fit(features, labels, sample_weight=weights)
        self._synchronise(cupy)
        coef = torch.as_tensor(probe.coef_, device=self.device).flatten() / divisor
        intercept = torch.as_tensor(probe.intercept_, device=self.device).flatten()[0] - coef @ centre
        n_iter = int(torch.as_tensor(probe.n_iter_).max())
        fits.coef[place] = coef.to(fits.coef.device)
        fits.intercept[place] = intercept.to(fits.intercept.device)
        fits.n_iter[place] = n_iter
        fits.converged[place] = n_iter < self.max_iter
        return (problem.x @ coef + intercept).to(fits.coef.device)

    def _synchronise(self, cupy: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            cupy.cuda.Device(torch.cuda.current_device()).synchronize()
