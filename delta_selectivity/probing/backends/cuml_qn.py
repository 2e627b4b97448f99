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
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

from delta_selectivity.probing.backends.problem import ProbeFits, ProbeProblem, balanced
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

    def fit(self, problem: ProbeProblem) -> ProbeFits:
        """Fit all probes of the problem on its device; the GPU has finished on return."""
        if problem.x.is_sparse_csr:
            return self._sparse.fit(problem)
        linear_model, cupy = self.setup()
        fits = ProbeFits.empty(problem)
        x = problem.x.to(self.device, torch.float64)
        weights, all_labels = problem.weight.to(self.device), problem.labels.to(self.device)
        divisor = problem.divisor.to(self.device)
        for t, s in product(range(problem.n_targets), range(problem.n_splits)):
            train = weights[s] > 0
            label = all_labels[t][train]
            weight = balanced(label, weights[s][train])
            centre, size = x[train].mean(dim=0), float(weight.mean())
            given = [((x[train] - centre) / divisor[s]).contiguous(), label.double(), weight / size]
            self._synchronise(cupy)  # torch and CuPy work on different streams
            shared = [cupy.from_dlpack(tensor) for tensor in given]
            for i, c in enumerate(problem.cs):
                self._fit_one(linear_model, shared, c * size, fits, (i, t, s), centre, divisor[s])
        self._synchronise(cupy)
        return fits

    def _fit_one(
        self,
        linear_model: Any,
        shared: list[Any],  # features, labels, weights of the training rows, as CuPy arrays
        c: float,
        fits: ProbeFits,
        place: tuple[int, int, int],
        centre: Tensor,
        divisor: Tensor,
    ) -> None:
        """Fit one probe and write it into `fits` in the units of x."""
        features, labels, weights = shared
        probe = linear_model.LogisticRegression(
            penalty="l2",
            C=c,
            fit_intercept=True,
            class_weight=None,
            max_iter=self.max_iter,
            tol=self.tolerance / len(features),
            solver="qn",
        ).fit(features, labels, sample_weight=weights)
        coef = torch.as_tensor(probe.coef_, device=self.device).flatten() / divisor
        intercept = torch.as_tensor(probe.intercept_, device=self.device).flatten()[0] - coef @ centre
        n_iter = int(torch.as_tensor(probe.n_iter_).max())
        fits.coef[place] = coef.to(fits.coef.device)
        fits.intercept[place] = intercept.to(fits.intercept.device)
        fits.n_iter[place] = n_iter
        fits.converged[place] = n_iter < self.max_iter

    def _synchronise(self, cupy: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            cupy.cuda.Device(torch.cuda.current_device()).synchronize()
