"""Splitting of a request into units, each for a group of layers and a group of SAEs.

    units = plan_units(plan, layers_per_unit=1, saes_per_unit=8)

A unit is an ordinary run in its own folder, which is named after what it measures, so that a later run finds what an
interrupted one has finished. For this reason the size of units does not depend on the number of workers. The SAEs of a
unit share the forward pass and the probes of the model's own activations, so many SAEs at one layer are cheap together;
layers share only the forward pass.

A baseline of an SAE is measured with the SAE; a baseline of a hook point in exactly one unit at its layer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from delta_selectivity.models.language_model import Site
from delta_selectivity.run.activations import SaeId
from delta_selectivity.run.planning import Plan, Subject
from delta_selectivity.run.request import Request

FOLDER = ".units"  # in the output directory, until all units are merged

T = TypeVar("T")
_HOW = ("output_directory", "device1", "device2", "batch_size", "queue_gb", "cache_dir", "cache_gb", "overwrite")
"""Options that do not affect the results."""


@dataclass(frozen=True)
class Unit:
    """A part of a request."""

    request: Request  # restricted to its SAEs and layers, with its own folder
    places: frozenset[tuple[str, Site]]  # (name of an SAE or baseline, site) to measure, on all datasets
    prepend_bos: bool  # decided for all SAEs of the request
    dtype: str  # of the model's activations; decided once, since workers' processors may differ
    labels: dict[str, str]  # of its SAEs, unique in the whole request
    whole_tokens: int | None  # as in existing results, if there are any
    subjects: frozenset[tuple[SaeId, int]]  # `places` as (subject of the whole request, layer)
    n_probes: int  # number of results: (probe, layer, SAE or baseline)

    @property
    def id(self) -> str:
        """The unit's layers, and 16 hexadecimal digits of a hash of what it measures."""
        what = {name: value for name, value in self.request.described().items() if name not in _HOW}
        what |= {
            "places": sorted(self.places),
            "prepend_bos": self.prepend_bos,
            "dtype": self.dtype,
            "whole_tokens": self.whole_tokens,
        }
        digest = hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
        return f"layers_{'_'.join(map(str, self.layers))}_{digest[:16]}"

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of the model."""
        assert self.request.layers is not None
        return self.request.layers

    @property
    def folder(self) -> Path:
        """Folder of the results until they are merged."""
        return self.request.output


def plan_units(plan: Plan, layers_per_unit: int, saes_per_unit: int) -> list[Unit]:
    """Return units that together measure the whole request, each part once, sorted by layers."""
    return sorted(_split(plan, layers_per_unit, saes_per_unit), key=lambda unit: unit.layers)


def _split(plan: Plan, layers_per_unit: int, saes_per_unit: int) -> Iterator[Unit]:
    layers_of = [{site.layer for site in subject.sites} for subject in plan.saes]
    groups: dict[tuple[str, bool], list[SaeId]] = {}  # (hook point, counts BOS) -> SAEs, which share baselines
    for sae_id, subject in enumerate(plan.saes):
        groups.setdefault(_place(subject), []).append(sae_id)
    for sae_ids in groups.values():
        for layers in _chunks(sorted({layer for sae_id in sae_ids for layer in layers_of[sae_id]}), layers_per_unit):
            without_baselines = set(layers)
            by_layers: dict[tuple[int, ...], list[SaeId]] = {}
            for sae_id in sae_ids:
                by_layers.setdefault(tuple(layer for layer in layers if layer in layers_of[sae_id]), []).append(sae_id)
            for unit_layers, members in by_layers.items():
                for group in _chunks(members, saes_per_unit) if unit_layers else ():
                    shared = without_baselines.intersection(unit_layers)
                    without_baselines -= shared
                    yield _unit(plan, unit_layers, group, shared)


def _unit(plan: Plan, layers: tuple[int, ...], sae_ids: Sequence[SaeId], shared: set[int]) -> Unit:
    """Build a unit; at the layers in ``shared`` it also measures the baselines of the hook point."""
    subjects = {(sae_id, layer) for sae_id in sae_ids for layer in layers}
    for i, subject in enumerate(plan.subjects):
        if subject.baseline is None:
            continue
        if subject.baseline.sae_id in sae_ids:
            subjects |= {(i, layer) for layer in layers}
        elif subject.baseline.sae_id is None and _place(subject) == _place(plan.subjects[sae_ids[0]]):
            subjects |= {(i, layer) for layer in shared}
    sites = {(i, site.layer): site for i, subject in enumerate(plan.subjects) for site in subject.sites}
    request = replace(
        plan.request,
        saes=tuple(_reopen_name(plan.subjects[sae_id]) for sae_id in sae_ids),
        layers=layers,
        settings=replace(plan.request.settings, overwrite=False),
    )
    unit = Unit(
        request=request,
        places=frozenset((plan.subjects[i].name, sites[i, layer]) for i, layer in subjects),
        prepend_bos=plan.prepend_bos,
        dtype=plan.dtype,
        labels={plan.subjects[sae_id].name: plan.subjects[sae_id].label for sae_id in sae_ids},
        whole_tokens=plan.whole_tokens,
        subjects=frozenset(subjects),
        n_probes=len(subjects) * sum(len(dataset.probes) for dataset in plan.texts.datasets),
    )
    return replace(unit, request=replace(request, output=plan.request.output / FOLDER / unit.id))


def _reopen_name(subject: Subject) -> str:
    """Return the name by which `open_sae` finds the SAE."""
    assert subject.source is not None
    return subject.source.opened_as or subject.name


def _place(subject: Subject) -> tuple[str, bool]:
    return subject.sites[0].hookpoint, subject.counts_bos


def _chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
