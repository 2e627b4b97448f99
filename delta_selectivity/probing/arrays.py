"""The metric on arrays: activations of any model, their reconstruction, labels and groups.

    probe_selectivity(x, x_hat, labels, groups).delta_sel

`records.rows_file` uses `measure_rows` as well.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from delta_selectivity.errors import RequestError
from delta_selectivity.probing.folds import FoldPlan, Skipped, control_plan
from delta_selectivity.probing.probes import ProbeBackend, choose_backend
from delta_selectivity.probing.selectivity import ProbeResult, fit_model, measure, out_of_fold
from delta_selectivity.settings import LATENT_VIEWS, Settings
from delta_selectivity.system.cores import sharing_cores
from delta_selectivity.system.person_ids import group_key, person_ids
from delta_selectivity.system.torch_modes import default_modes

INT64 = np.iinfo(np.int64)


@dataclass(frozen=True, eq=False)
class Targets:
    """Binary labels of the same rows, which share folds and fits."""

    labels: NDArray[np.bool_]  # [targets, rows]
    groups: NDArray[np.int64]  # [rows], person ids; a split never separates the rows of a person
    weights: NDArray[np.floating[Any]] | None = None  # [rows]; None: 1 each
    tokens: NDArray[np.int64] | None = None  # [rows], token types of the control task; None: no control task
    order: NDArray[np.int64] | None = None  # [rows], row order for the control task's folds; None: as given


@default_modes()
def probe_selectivity(
    x: Any, reconstruction: Any, labels: Any, groups: Any, *, settings: Settings | None = None
) -> ProbeResult:
    """Compare the selectivity of probes on activations with that of probes on a reconstruction.

    Inputs are not modified. Values are compared in float32. Probes are fitted in float64 on the device of `x` (the CPU
    for NumPy) by one thread, so the results do not depend on the number of cores.

    Args:
        x: Activations ``[rows, d]``, NumPy or torch, of any float dtype and on any device.
        reconstruction: The autoencoder's output for `x`, ``[rows, d]``.
        labels: The binary label of each row ``[rows]``: bool, or 0 and 1.
        groups: The person or thing each row is about ``[rows]``: integers, strings or other hashable values. A split
            never separates rows of equal groups. 1, 1.0 and "1" are equal, and so are the Unicode forms of a name
            (`system.person_ids`). Give each row its own group only if rows are independent.
        settings: Only `folds`, `repeats`, `seed`, `epsilon`, `probe` and ``error`` in `views` have an effect here.

    Returns:
        Selectivities, their differences with intervals, and how the probes were fitted. `memorisation` is None, because
        it needs token types.

    Raises:
        RequestError: A shape does not fit, a value is not finite, labels are not binary, or there are too few groups
            for the folds; the message names the argument.
        ArithmeticError: `reconstruction` is larger than the variation of `x` by a factor of about 1e18.

    Example:
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> labels = rng.random(400) < 0.5
        >>> x = rng.normal(size=(400, 8)) + labels[:, None]
        >>> probe_selectivity(x, x, labels, groups=np.arange(400)).delta_sel
        0.0
    """
    settings = settings or Settings()
    check_views(settings)
    matrix = _matrix(x, "x")
    recon = _matrix(reconstruction, "reconstruction").to(matrix.device)
    if recon.shape != matrix.shape:
        raise RequestError(f"`reconstruction` has shape {list(recon.shape)}, but `x` has {list(matrix.shape)}")
    n = len(matrix)
    targets = Targets(_binary(labels, n)[None], _group_ids(groups, n))
    with sharing_cores(matrix.device):
        backend, _ = choose_backend(settings.probe, matrix.device)
        ((result,),) = measure_rows(matrix, [recon], targets, settings, backend)
    if isinstance(result, Skipped):
        raise RequestError(f"`labels` cannot be measured: {result.reason}")
    return result


def measure_rows(
    x: Tensor, recons: Iterable[Tensor], targets: Targets, settings: Settings, backend: ProbeBackend
) -> Iterator[list[ProbeResult | Skipped]]:
    """Measure reconstructions of the same activations and yield, for each, one result per target in order.

    Args:
        x: Activations, float32 ``[rows, d]``.
        recons: Reconstructions of them, each float32 ``[rows, d]`` on the device of `x`.
        targets: Labels and groups of the rows.
        settings: As for `probe_selectivity`.
        backend: Solver of the probes.
    """
    plan = FoldPlan.build(
        targets.labels, targets.groups, targets.weights, settings.folds, settings.repeats, settings.seed
    )
    model = fit_model(plan, x, backend, _control(targets, settings))
    for recon in recons:
        yield measure(out_of_fold(plan, model, recon, backend, "error" in settings.views), settings.epsilon)


def check_views(settings: Settings) -> None:
    """Raise `RequestError` for latent views or `downstream`: stored rows have neither latents nor a model."""
    if settings.downstream:
        raise RequestError("`downstream`: rows have no model to run with a reconstruction")
    for view in LATENT_VIEWS.intersection(settings.views):
        raise RequestError(f"`views` {view}: rows have activations and reconstructions, but no latents")


def _control(targets: Targets, settings: Settings) -> FoldPlan | None:
    if targets.tokens is None:
        return None
    order = np.arange(len(targets.tokens)) if targets.order is None else targets.order
    _, rank = np.unique(order, return_inverse=True)
    return control_plan(targets.tokens, rank, targets.weights, settings.folds, settings.seed)


def _matrix(values: Any, field: str) -> Tensor:
    """Return values as a finite float32 matrix ``[rows, d]``. Raises `RequestError` if they are not one."""
    matrix = values.detach() if isinstance(values, Tensor) else _to_torch(_array(values, field), field)
    if matrix.layout != torch.strided or matrix.is_complex() or matrix.dtype == torch.bool:
        raise RequestError(
            f"`{field}` has layout {matrix.layout} and dtype {matrix.dtype}: give a dense array of real numbers"
        )
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise RequestError(f"`{field}` has shape {list(matrix.shape)}: give [rows, d], with at least 1 of each")
    if matrix.device.type not in {"cpu", "cuda"}:
        matrix = matrix.cpu()  # other devices lack float64
    matrix = matrix.to(torch.float32)
    finite = torch.isfinite(matrix).all(dim=1)
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0, 0])
        raise RequestError(f"`{field}`: row {row} has NaN, infinity, or a number too large for float32")
    return matrix


def _to_torch(found: NDArray[Any], field: str) -> Tensor:
    if found.dtype.kind not in "fiu":
        raise RequestError(f"`{field}` has dtype {found.dtype}: give real numbers")
    with np.errstate(over="ignore"):  # `_matrix` rejects infinite values
        single = np.ascontiguousarray(found, dtype=np.float32)
    return torch.from_numpy(single if single.flags.writeable else single.copy())


def _array(values: Any, field: str) -> NDArray[Any]:
    if isinstance(values, Tensor):
        found = values.detach().cpu()
        values = found.float() if found.is_floating_point() else found
    try:
        return np.asarray(values)
    except (TypeError, ValueError) as error:  # rows of different lengths
        raise RequestError(f"`{field}` is not an array: {error}") from error


def _binary(labels: Any, n: int) -> NDArray[np.bool_]:
    found = _array(labels, "labels")
    _check_length(found.shape, n, "labels")
    if found.dtype.kind not in "biuf":
        raise RequestError(f"`labels` have dtype {found.dtype}: give bool, or 0 and 1")
    others = found[(found != 0) & (found != 1)]
    if len(others):
        raise RequestError(f"`labels` contain {others[0]}: give 0 and 1, or False and True")
    return found.astype(bool)


def _group_ids(groups: Any, n: int) -> NDArray[np.int64]:
    """Return int64 group ids [rows]: integers as they are, the hash of the key for other values."""
    if isinstance(groups, Tensor):
        groups = _array(groups, "groups")
    if isinstance(groups, np.ndarray):
        _check_length(groups.shape, n, "groups")
        if groups.dtype.kind in "biu":
            return groups.astype(np.int64)  # uint64 keeps its bits, so equal groups stay equal
        groups = groups.tolist()
    try:
        listed = list(groups)
    except TypeError as error:
        raise RequestError(f"`groups` is a {type(groups).__name__}: give a value for each row") from error
    _check_length((len(listed),), n, "groups")
    for row, group in enumerate(listed):
        if _is_missing(group):
            raise RequestError(f"`groups`: row {row} has {group!r}: give its group")
    if all(isinstance(group, numbers.Real) and _is_int64(group) for group in listed):
        return np.array([int(group) for group in listed], dtype=np.int64)
    if all(isinstance(group, str | numbers.Number) for group in listed):
        return person_ids(listed)
    known: dict[Any, int] = {}
    return np.array([known.setdefault(_key(group), len(known)) for group in listed], dtype=np.int64)


def _is_int64(value: Any) -> bool:
    return math.isfinite(value) and value == int(value) and INT64.min <= int(value) <= INT64.max


def _key(group: Any) -> Any:
    """Return a key that is equal for equal groups; for a tuple, the tuple of its items' keys."""
    if isinstance(group, tuple):
        return tuple(_key(item) for item in group)
    return group_key(group) if isinstance(group, str | numbers.Number) else group


def _is_missing(group: Any) -> bool:
    """Return whether a value is None or, like NaN, unequal to itself. Raises `RequestError` if it is not hashable."""
    try:
        hash(group)
    except TypeError as error:
        raise RequestError(f"`groups`: {group!r:.60} is not hashable: use numbers, strings or tuples") from error
    try:
        return group is None or not bool(group == group)
    except (TypeError, ValueError):  # pandas's NA
        return True


def _check_length(shape: tuple[int, ...], n: int, field: str) -> None:
    if shape != (n,):
        raise RequestError(f"`{field}` has shape {list(shape)}, but `x` has {n} rows: give shape [{n}]")
