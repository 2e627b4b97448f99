"""Estimates of bytes and seconds of units, from configs only.

    show(render(plan, units))

The estimates are accurate to a factor of about two on a machine like the measured one. That is enough to distinguish
minutes from days, and to decide whether a unit fits into memory. Seconds are always for one CPU core.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from delta_selectivity.reporting.tables import Row, aligned
from delta_selectivity.run.planning import Plan
from delta_selectivity.scale.units import Unit

TOKENS_PER_CHARACTER = 0.28  # for English text and tokenizers like Pythia's


@dataclass(frozen=True)
class Rates:
    """Speed of one worker, per second."""

    forward: float  # FLOP of the model
    sae: float  # FLOP of encoding
    probe: float  # row x dimension x probe x fold, for one view of one site
    start: float  # seconds before a unit's first text: to load texts, tokens, configs and weights


CPU_CORE = Rates(forward=2.3e11, sae=2.2e11, probe=1.1e08, start=2.6)
"""One core of the CPU on which docs/scale.md was measured."""


@dataclass(frozen=True)
class Cost:
    """Memory and time of a unit."""

    model_bytes: int  # weights up to its last layer
    sae_bytes: int  # weights of its SAEs, float32
    row_bytes: int  # collected rows: x, and x̂ of each SAE
    seconds: float  # on one worker

    @property
    def total_bytes(self) -> int:
        """Memory that a worker needs."""
        return self.model_bytes + self.sae_bytes + self.row_bytes


@dataclass(frozen=True)
class Shape:
    """The quantities that determine a unit's cost."""

    tokens: int  # of all texts
    rows: int  # probed positions
    cells: int  # sum over probes of their rows, times the folds of all partitions
    d_model: int
    n_layers: int  # layers of the model that must run
    n_sites: int
    sae_sizes: tuple[tuple[int, int, int], ...]  # d_in, d_sae, d_out of each (SAE, layer)
    dtype_bytes: int  # of the model's weights
    vocabulary: int


def cost(shape: Shape, rates: Rates) -> Cost:
    """Return bytes and seconds."""
    layer = 12 * shape.d_model**2  # weights of a layer: attention 4 d², MLP 8 d²
    forward = 2 * shape.tokens * layer * shape.n_layers / rates.forward
    encode = sum(2 * shape.tokens * d_in * d_sae for d_in, d_sae, _ in shape.sae_sizes) / rates.sae
    probed = shape.n_sites * shape.d_model + sum(d_out for _, _, d_out in shape.sae_sizes)  # x once, each x̂
    return Cost(
        model_bytes=shape.dtype_bytes * (layer * shape.n_layers + shape.vocabulary * shape.d_model),
        sae_bytes=4 * sum((d_in + d_out) * d_sae for d_in, d_sae, d_out in shape.sae_sizes),
        row_bytes=4 * shape.rows * probed,
        seconds=rates.start + forward + encode + shape.cells * probed / rates.probe,
    )


def shape_of(plan: Plan, unit: Unit) -> Shape:
    """Return a unit's quantities, without loading anything; a baseline counts as the SAE that it is derived from."""
    settings = plan.request.settings
    sizes = {
        (sae_id, member.header.layer): (member.header.d_in, member.header.d_sae, member.header.d_out)
        for sae_id, subject in enumerate(plan.saes)
        for member in (subject.source.members if subject.source is not None else ())
    }
    of_unit, widest = [], max(sizes.values())
    for i, layer in sorted(unit.subjects):
        baseline = plan.subjects[i].baseline
        sae_id = i if baseline is None else baseline.sae_id
        of_unit.append((widest[2], 1, widest[2]) if sae_id is None else sizes[sae_id, layer])
    rows = sum(len(probe.mentions) for dataset in plan.texts.datasets for probe in dataset.probes)
    return Shape(
        tokens=round(TOKENS_PER_CHARACTER * sum(len(mention.text) for mention in plan.texts.mentions)),
        rows=len(plan.texts.mentions),
        cells=rows * settings.folds * settings.repeats,
        d_model=plan.info.d_model,
        n_layers=max(unit.layers) + 1,
        n_sites=len(unit.layers),
        sae_sizes=tuple(of_unit),
        dtype_bytes=4 if plan.dtype == "float32" else 2,
        vocabulary=len(plan.info.tokenizer),
    )


def render(plan: Plan, units: Sequence[Unit]) -> str:
    """Return a table with a line per unit, and the totals."""
    costs = [cost(shape_of(plan, unit), CPU_CORE) for unit in units]
    rows: list[Row] = [("unit", "layers", "SAEs", "results", "model", "SAEs' weights", "rows", "seconds")]
    for unit, each in zip(units, costs, strict=True):
        sizes = (each.model_bytes, each.sae_bytes, each.row_bytes)
        layers = ",".join(map(str, unit.layers))
        rows.append(
            (unit.id[-16:], layers, f"{len(unit.request.saes)}", f"{unit.n_probes}", *map(megabytes, sizes),
             f"{each.seconds:.0f}")
        )  # fmt: skip
    seconds = sum(each.seconds for each in costs)
    largest = max(each.total_bytes for each in costs)
    return (
        f"{aligned(rows)}\n\n{len(units)} units, {seconds / 3600:.2f} hours of one CPU core; a worker needs about "
        f"{megabytes(largest)} at most. These are estimates, to a factor of two (docs/scale.md)."
    )


def megabytes(n: int) -> str:
    """Return a number of bytes as text."""
    return f"{n / 1e6:.1f} MB" if n < 1e9 else f"{n / 1e9:.1f} GB"
