"""What a request is cut into: units, each the same request for a group of layers and a group of SAEs.

    units = plan_units(config, plan, layers_per_unit=1, saes_per_unit=8)

A unit is an ordinary run of `main`, in a folder of its own that is named after what it measures: the same unit of a
later run finds what an interrupted one has finished. That is why its size does not follow from the number of workers.
The SAEs of a unit share the forward pass and the probes of the model's own activations, so many of them at a layer
are cheap together; layers share only the forward pass.

A baseline of an SAE is measured where the SAE is; one of a hook point in exactly one of the units at its layer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

from delta_selectivity.run.baselines import Baseline
from delta_selectivity.run.planning import Plan
from delta_selectivity.settings import RunConfig

FOLDER = ".units"  # inside the output directory, while not all is merged

T = TypeVar("T")
_HOW = ("output_directory", "device1", "device2", "batch_size", "queue_gb", "cache_dir", "cache_gb", "overwrite",
        "quiet", "verbose")  # flags that say how to run, not what to measure  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """A part of a request."""

    config: RunConfig  # narrowed to its SAEs and layers, and to a folder of its own
    shared_layers: tuple[int, ...]  # where it also measures the baselines that belong to the hook point
    prepend_bos: bool  # as decided over all SAEs of the request
    n_probes: int  # results that it gives: (probe, layer, SAE or baseline)
    subjects: frozenset[tuple[int, int]]  # (SAE or baseline, layer); the former by its number in the whole request

    @property
    def id(self) -> str:
        """Its layers, and 16 hexadecimal digits of a hash of what it measures."""
        what = {name: value for name, value in asdict(self.config).items() if name not in _HOW}
        what |= {"shared_layers": self.shared_layers, "prepend_bos": self.prepend_bos}
        digest = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
        return f"layers_{'_'.join(map(str, self.layers))}_{digest[:16]}"

    @property
    def layers(self) -> tuple[int, ...]:
        """Of the model."""
        assert self.config.layers is not None
        return self.config.layers

    @property
    def folder(self) -> Path:
        """Where its results are until they are merged."""
        return self.config.output_directory


def plan_units(config: RunConfig, plan: Plan, layers_per_unit: int, saes_per_unit: int) -> list[Unit]:
    """Units that together measure all of the request, each part once; lower layers first."""
    return sorted(_cut(config, plan, layers_per_unit, saes_per_unit), key=lambda unit: unit.layers)


def _cut(config: RunConfig, plan: Plan, layers_per_unit: int, saes_per_unit: int) -> Iterator[Unit]:
    layers_of = {sae_id: tuple(site.layer for site in plan.sites[sae_id]) for sae_id in range(len(plan.sources))}
    places: dict[tuple[str, bool], list[int]] = {}  # as baselines are shared: (hook point, counts BOS) -> SAEs
    for sae_id, source in enumerate(plan.sources):
        places.setdefault((source.hookpoint, plan.counts_bos[sae_id]), []).append(sae_id)
    for sae_ids in places.values():
        for layers in _chunks(sorted({layer for sae_id in sae_ids for layer in layers_of[sae_id]}), layers_per_unit):
            without_baselines = set(layers)
            by_layers: dict[tuple[int, ...], list[int]] = {}
            for sae_id in sae_ids:
                by_layers.setdefault(tuple(layer for layer in layers if layer in layers_of[sae_id]), []).append(sae_id)
            for own, alike in by_layers.items():
                for group in _chunks(alike, saes_per_unit) if own else ():
                    shared = tuple(layer for layer in own if layer in without_baselines)
                    without_baselines.difference_update(shared)
                    yield _unit(config, plan, own, group, shared)


def _unit(
    config: RunConfig, plan: Plan, layers: tuple[int, ...], sae_ids: Sequence[int], shared: tuple[int, ...]
) -> Unit:
    subjects = {(sae_id, layer) for sae_id in sae_ids for layer in layers}
    first = plan.sources[sae_ids[0]]
    for subject, baseline in enumerate(plan.baselines, len(plan.sources)):
        if baseline.of in sae_ids:
            subjects |= {(subject, layer) for layer in layers}
        elif baseline.of is None and _place(baseline) == (first.hookpoint, plan.counts_bos[sae_ids[0]]):
            subjects |= {(subject, layer) for layer in shared}
    names = tuple(plan.sources[sae_id].name for sae_id in sae_ids)
    narrowed = replace(config, sae_names=names, layers=layers, overwrite=False, quiet=True)
    n_probes = len(subjects) * sum(len(dataset.probes) for dataset in plan.texts.datasets)
    unit = Unit(narrowed, shared, plan.prepend_bos, n_probes, frozenset(subjects))
    return replace(unit, config=replace(narrowed, output_directory=config.output_directory / FOLDER / unit.id))


def _place(baseline: Baseline) -> tuple[str, bool]:
    return baseline.hookpoint, baseline.counts_bos


def _chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
