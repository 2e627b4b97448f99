"""Result files of any shape for tests of reports: those of the demo with other names, layers, settings and SAEs."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from delta_selectivity.records.result_file import RecordFile
from delta_selectivity.reporting import results as report_files

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "results" / "demo"


def demo_files():
    """Return (path, results) of the first SAE of the demo, one for each dataset."""
    return report_files.load(report_files.result_files(DEMO / "tiny-pythia-saes-k32"))


def write_set(
    folder, saes=("one",), layers=range(3), datasets=("gender",), baselines=(), edit=lambda cells: cells, **changes
):
    """Write result files of these SAEs as one run; return the folder. `changes` are fields of each `RecordFile`.

    The numbers differ by SAE and layer in a fixed way. `baselines`: (kind, SAE that owns it or None). `edit` maps the
    probes of a layer, by name, to others.
    """
    sources = [
        (path, found) for path, found in demo_files() if path.stem.removeprefix("tiny-pythia_wikidata_") in datasets
    ]
    for number, name in enumerate(saes):
        told = {"sae": name}
        for path, found in sources:
            target = folder / f"sae-{number:02}" / path.name
            _write(target, found, layers, told, -0.004 * number, _level(number, saes), edit, changes)
    for number, (kind, owner) in enumerate(baselines, len(saes)):
        told = {"sae": f"baseline: {kind} of {owner or 'resid_post'}", "baseline": kind, "baseline_of": owner}
        for path, found in sources:
            target = folder / "baselines" / f"{number:02}_{kind}" / path.name
            _write(target, found, layers, told, -0.02 * (number + 1), _level(number, saes), edit, changes)
    return folder


def _write(path, found, layers, told, shift, level, edit, changes):
    path.parent.mkdir(parents=True, exist_ok=True)
    run = copy.deepcopy(found["_run"])
    run["config"] = {key: value for key, value in run["config"].items() if key != "sae_label"} | told
    kept = {name: run[name] for name in ("config", "versions", "commit", "started")}
    fields = {
        "seconds": run["seconds"], "resources": run["resources"], "q_family": run["q_family"], "sae_level": level,
        "complete": True, **changes,
    }  # fmt: skip
    RecordFile(path, run["key"], kept, **fields).write({layer: _layer(found, layer, shift, edit) for layer in layers})


def _layer(found, layer, shift, edit):
    figures = copy.deepcopy(found[f"layer_{layer % 6}"])
    cells = {name: figures.pop(name) for name in list(figures) if isinstance(figures[name], dict)}
    for cell in cells.values():
        for key in ("sae_sel", "sae_ci_low", "sae_ci_high", "delta_sel", "ci_low", "ci_high"):
            cell[key] += shift
    figures["l0"] *= 1 - 10 * shift
    return {**figures, **edit(cells)}


def _level(number, saes):
    def estimate(score, value):
        ends = {f"{score}_ci_low": value - 0.003, f"{score}_ci_high": value + 0.003}
        return {score: value, **ends, f"{score}_p_value": 0.01, f"{score}_detectable": 0.005}

    def both(shift, r2):
        return estimate("delta_sel", shift) | estimate("transfer_r2", r2)

    others = {name: both(0.004 * (i - number), 0.01 * (i - number)) for i, name in enumerate(saes) if i != number}
    return {**both(-0.03 - 0.004 * number, 0.8 - 0.01 * number), "n_cells": 1, "compared": others}


def write_changed(source, target, key=None, config=None, level=None):
    """Write a result file to another path as made by another request, with changed `_run.key` and `_run.config`."""
    found = json.loads(source.read_text("utf-8"))
    run = found.pop("_run")
    run["key"] |= key or {}
    run["config"] |= config or {}
    kept = {name: run[name] for name in ("config", "versions", "commit", "started")}
    names = ("warnings", "complete", "seconds", "resources", "q_family", "sae_level")
    fields = {name: run[name] for name in names} | ({} if level is None else {"sae_level": level})
    target.parent.mkdir(parents=True, exist_ok=True)
    RecordFile(target, run["key"], kept, **fields).write({int(name[6:]): layer for name, layer in found.items()})
    return target
