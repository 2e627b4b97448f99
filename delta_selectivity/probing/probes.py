"""Selection of the solver for probes, which are weighted logistic regressions.

    backend, reason = choose_backend("auto", "cpu")
    fits = backend.fit(ProbeProblem(x, labels, weight, scale, cs=(0.01, 0.1)))
    scores = x.double() @ fits.coef[0, target, split] + fits.intercept[0, target, split]

The solvers live in `probing.backends`; scikit-learn's is the reference for the others.
"""

from __future__ import annotations

import importlib.util

import torch

from delta_selectivity.errors import RequestError
from delta_selectivity.probing.backends.problem import ProbeBackend, ProbeFits, ProbeProblem

__all__ = ["BACKENDS", "ProbeBackend", "ProbeFits", "ProbeProblem", "check_backend", "choose_backend", "disagreement"]

BACKENDS = ("auto", "torch", "cuml", "sklearn")
_MAX_DIFFERENCE = 1e-3  # largest disagreement with torch at which `auto` chooses cuML


def choose_backend(name: str, device: torch.device | str) -> tuple[ProbeBackend, str]:
    """Return the solver for `name` (one of `BACKENDS`) on `device`, and the reason for the choice.

    `auto` is torch; on a CUDA device it is cuML if that is installed and solves a small problem like torch.
    Call this in the thread that will fit, because cuML's settings are per thread.

    Raises RequestError for an unknown name, and for `cuml` if it is not installed or the device is not a GPU.
    """
    from delta_selectivity.probing.backends.torch_lbfgs import TorchLbfgs

    device = torch.device(device)
    if name == "torch":
        return TorchLbfgs(), "requested"
    if name == "sklearn":
        from delta_selectivity.probing.backends.sklearn_reference import SklearnReference

        return SklearnReference(), "requested"
    if name == "cuml":
        return _cuml(device), "requested"
    if name != "auto":
        raise RequestError(f"`probe` {name}: choose one of {', '.join(BACKENDS)}")
    if device.type != "cuda":
        return TorchLbfgs(), f"the device is {device}"
    return _best_on_cuda(device, TorchLbfgs())


def check_backend(name: str, device: torch.device | str) -> None:
    """Raise RequestError if the solver `name` is not available on `device`, without importing it."""
    if name == "cuml" and importlib.util.find_spec("cuml") is None:
        raise RequestError(
            '`probe` cuml: not installed: pip install "delta-selectivity[gpu]", in a clone pip install -e ".[gpu]"'
        )
    if name == "cuml" and torch.device(device).type != "cuda":
        raise RequestError(f"`probe` cuml: runs on an NVIDIA GPU, not on {device}; use `probe` auto")


def disagreement(backend: ProbeBackend, reference: ProbeBackend, problem: ProbeProblem) -> float:
    """Return the largest relative difference of coefficients, |a - b| / |b|, over the problem's probes."""
    a, b = backend.fit(problem).coef, reference.fit(problem).coef
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).max())


def _cuml(device: torch.device) -> ProbeBackend:
    check_backend("cuml", device)
    from delta_selectivity.probing.backends.cuml_qn import CumlQn

    return CumlQn(device)


def _best_on_cuda(device: torch.device, torch_backend: ProbeBackend) -> tuple[ProbeBackend, str]:
    if importlib.util.find_spec("cuml") is None:
        return torch_backend, "cuML is not installed"
    try:
        cuml = _cuml(device)
        difference = disagreement(cuml, torch_backend, _small_problem(device))
    except Exception as error:  # a broken cuML or driver can raise anything; torch still works
        return torch_backend, f"cuML failed its self-check: {type(error).__name__}: {error}"
    if difference > _MAX_DIFFERENCE:
        return torch_backend, f"cuML differs from torch by {difference:.1e} in its self-check"
    return cuml, f"cuML agrees with torch to {difference:.1e}"


def _small_problem(device: torch.device) -> ProbeProblem:
    """Return a small problem: 400 rows, 16 features, two splits, unequal classes and weights."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(400, 16, generator=random, dtype=torch.float32)
    labels = (x[:, 0] + torch.randn(400, generator=random, dtype=torch.float32) > 0.5)[None]
    weight = 0.5 + torch.rand(2, 400, generator=random, dtype=torch.float32)
    weight[0, :100] = 0
    weight[1, 300:] = 0
    scale = torch.stack([x[100:].std(dim=0), x[:300].std(dim=0)])
    return ProbeProblem(x.to(device), labels.to(device), weight.to(device), scale.to(device), cs=(0.01, 1.0))
