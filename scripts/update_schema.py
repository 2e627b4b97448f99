"""Write docs/results.schema.json from the dataclasses of result files and from docs/numbers.md.

    python -m scripts.update_schema           # rewrite the schema
    python -m scripts.update_schema --check   # exit code 1 if it is not up to date

Names and types come from `ProbeResult`, `Reconstruction` and `Downstream`, their meaning from the page's tables. JSON
Schema, draft 2020-12: https://json-schema.org/draft/2020-12. docs/how_to/read_a_result.md shows how to check a file
against it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from delta_selectivity.probing.selectivity import OPTIONAL, ProbeResult
from delta_selectivity.records.result_file import SCHEMA_VERSION
from delta_selectivity.run.downstream_figures import Downstream
from delta_selectivity.run.reconstruction import Reconstruction

PROJECT = Path(__file__).resolve().parent.parent

Schema = dict[str, Any]

NUMBERS = PROJECT / "docs" / "numbers.md"
TARGET = PROJECT / "docs" / "results.schema.json"
LAYER = "^layer_(0|[1-9][0-9]*)$"
TYPES = {float: "number", int: "integer", bool: "boolean", NoneType: "null"}
LATER = (
    "mse_whole_se",
    "fvu_whole_se",
    "fvu_ordinary",
    "outliers",
    "dead_se",
    "n_tokens_all",
    "n_people_effective",
    "n_outliers",
)
"""Figures that files of earlier versions do not have; add new figures here."""
Q_VALUES = ("q_value", "transfer_q_value")  # present once the run is complete
REQUIRED_WITHOUT_NUMBERS = (
    "n_rows",
    "n_people",
    "n_people_effective",
    "n_pos",
)  # of a probe that cannot be measured
NON_NEGATIVE = re.compile(
    r"n_\w+|ce_(model|sae|mean|zero)|mse_\w+|fvu_\w+|l0|l1|dead|dead_se|outliers|C|C_sae|(model|sae|transfer|error|latent|k[0-9]+)_(sel|auc)"
)
"""Figures that cannot be negative. None has an upper bound: a share is a sum, and rounding may take it above 1."""


def build() -> Schema:
    """Return the schema of a result file."""
    definition = definitions(NUMBERS.read_text(encoding="utf-8"))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A result file of Delta Selectivity",
        "description": "One SAE, or baseline, on one dataset. docs/numbers.md defines the numbers at length.",
        **_object({"_run": {"$ref": "#/$defs/run"}}),
        "patternProperties": {LAYER: {"$ref": "#/$defs/layer"}},
        "if": {"properties": {"_run": {"properties": {"complete": {"const": True}}}}},
        "then": {"patternProperties": {LAYER: {"additionalProperties": {"$ref": "#/$defs/settled"}}}},
        "$defs": {
            "layer": _layer(definition),
            "probe": {
                "description": "One yes/no question at this layer: its numbers, or why there are none.",
                "if": {"required": ["reason"]},
                "then": {"$ref": "#/$defs/unmeasured"},
                "else": {"$ref": "#/$defs/measured"},
            },
            "measured": _measured(definition),
            "unmeasured": _unmeasured(definition),
            "settled": {
                "description": "In a complete file every probe has its q values.",
                "if": {"required": ["delta_sel"]},
                "then": {"required": list(Q_VALUES)},
            },
            "run": _run(),
            "sae_level": _sae_level(),
        },
    }


def definitions(page: str) -> dict[str, str]:
    """Return key -> description, from the tables of docs/numbers.md; prefer rows with the key in the first cell."""
    meanings: dict[str, str] = {}
    rows = re.findall(r"^\| (.+?) \| (.+) \|$", page, re.MULTILINE)
    for place in (0, 1):
        for row in rows:
            for key in re.findall(r"`(\w+)`", row[place]):
                meanings.setdefault(key, row[1] if row[0] == f"`{key}`" else f"{row[0]}: {row[1]}")
    return meanings


def _layer(definition: dict[str, str]) -> Schema:
    figures = get_type_hints(Reconstruction) | get_type_hints(Downstream)
    optional = {*LATER, *get_type_hints(Downstream)}
    return {
        "description": "The reconstruction figures of one layer, and a record for each probe by its name.",
        **_object({name: _figure(name, kind, definition) for name, kind in figures.items()}, optional),
        "additionalProperties": {"$ref": "#/$defs/probe"},
    }


def _measured(definition: dict[str, str]) -> Schema:
    kinds = get_type_hints(ProbeResult) | {Q_VALUES[0]: float, Q_VALUES[1]: float | None}
    known = {name: _figure(name, kind, definition) for name, kind in kinds.items()}
    return _object(known, optional=OPTIONAL | set(Q_VALUES) | set(LATER))


def _unmeasured(definition: dict[str, str]) -> Schema:
    kinds = get_type_hints(ProbeResult)
    counted = {name: _figure(name, kinds[name], definition) for name in REQUIRED_WITHOUT_NUMBERS}
    null = {name: {"type": "null"} for name in kinds if name not in counted.keys() | OPTIONAL}
    reason = {"reason": {"type": "string", "description": definition["reason"]}}
    return _object(
        {**counted, **reason, **null, **{name: {"type": "null"} for name in Q_VALUES}}, optional=Q_VALUES + LATER
    )


def _figure(name: str, kind: Any, definition: dict[str, str]) -> Schema:
    """Return the schema of a number, from its annotation."""
    known = [TYPES[part] for part in (get_args(kind) or (kind,))]
    schema: Schema = {"type": known[0] if len(known) == 1 else known}
    if NON_NEGATIVE.fullmatch(name):
        schema["minimum"] = 0
    if name.endswith(("p_value", "q_value")):
        schema |= {"minimum": 0, "maximum": 1}
    return {**schema, "description": definition[name]}


def _run() -> Schema:
    seconds = {"type": "object", "additionalProperties": {"type": "number", "minimum": 0}}
    texts = {"type": "array", "items": {"type": "string"}}
    return {
        "description": "How the results came about.",
        **_object(
            {
                "schema_version": {"const": SCHEMA_VERSION},
                "config": {
                    "description": "The flags of the run, by name, and which SAE or baseline this file is of.",
                    "type": "object",
                    "required": ["model_name", "sae"],
                    "properties": {
                        "model_name": {"type": "string"},
                        "sae": {"type": "string", "description": "the name as typed, or what tables call the baseline"},
                        "sae_label": {
                            "type": "string",
                            "description": "what tables call it; absent for a baseline",
                        },
                        "d_sae": {
                            "description": "latents of the SAE by layer; absent for a baseline, and before 1.0",
                            "type": "object",
                            "additionalProperties": {"type": "integer", "minimum": 1},
                        },
                        "baseline": {"type": "string", "description": "its kind; absent for an SAE"},
                        "baseline_of_sae": {
                            "type": "string",
                            "description": "that SAE as typed; absent if none",
                        },
                        "baseline_of": {"type": "string", "description": "the SAE or hook point that it belongs to"},
                    },
                },
                "versions": {
                    "description": "Of Python and the packages that matter; null: not installed.",
                    "type": "object",
                    "required": ["python"],
                    "additionalProperties": {"type": ["string", "null"]},
                },
                "commit": {
                    "description": "Of this program, with +changes if its code differed; null outside of a checkout.",
                    "type": ["string", "null"],
                },
                "started": {"type": "string", "format": "date-time"},
                "positive_class": {
                    "description": "By probe: the label that counts as 1, as the task spells it.",
                    "type": "object",
                    "additionalProperties": {"type": "string"},
                },
                "task": {
                    "description": "What the dataset asks for (null: a task of the user's), and what its texts are "
                    "drawn from: tasks that share it tend to agree.",
                    **_object({"family": {"type": ["string", "null"]}, "source": {"type": "string"}}),
                },
                "key": {
                    "description": "Everything that changes a number: only a run with the same key continues a file.",
                    "type": "object",
                },
                "q_family": {**texts, "description": "The files over whose results the q values are."},
                "sae_level": {"$ref": "#/$defs/sae_level"},
                "results_sha256": {
                    "description": "Of the layers and sae_level: tells a file that was edited by hand.",
                    "type": "string",
                    "pattern": "^[0-9a-f]{64}$",
                },
                "warnings": {**texts, "description": "What a reader of the numbers must know."},
                "seconds": {**seconds, "description": "By stage, of the run that wrote the file last."},
                "resources": {**seconds, "description": "Likewise: peak memory in GB."},
                "complete": {"type": "boolean", "description": "Whether everything asked for is there."},
            },
            optional=("positive_class", "task"),  # files before 0.5 lack both, those before 1.0 the second
        ),
    }


def _sae_level() -> Schema:
    alone = _difference("delta_sel") | _with_interval("transfer_r2")
    alone["n_cells"] = {"type": ["integer", "null"], "minimum": 1}
    compared = {
        "description": "By name of another SAE of the run: this one's figures minus the other's, paired.",
        "type": "object",
        "additionalProperties": _object(
            {**_difference("delta_sel"), **_difference("transfer_r2"), "tasks": _over_tasks(False)}, optional=("tasks",)
        ),
    }
    return {
        "description": "Means over the datasets, layers and probes of the run; null where stored scores were gone, "
        "absent before the run is at its end.",
        **_object({**alone, "tasks": _over_tasks(), "compared": compared}, optional={*alone, "tasks"}),
        "dependentRequired": {name: sorted(alone) for name in alone},
    }


def _over_tasks(by_family: bool = True) -> Schema:
    counts = {name: {"type": "integer", "minimum": 1} for name in ("n_tasks", "n_sources")}
    scores = _with_interval("delta_sel") | _with_interval("transfer_r2")
    spreads = {f"{name}_spread": {"type": ["number", "null"], "minimum": 0} for name in ("delta_sel", "transfer_r2")}
    level = _object(counts | scores | spreads)
    if not by_family:
        return {"description": "The paired difference's means over tasks, likewise.", **level}
    families = {"description": "The same by family.", "type": "object", "additionalProperties": level}
    return {
        "description": "Means over tasks, each counting alike, with tasks drawn as people are; absent where there is "
        "one task. An end or a spread is null where all tasks are of one source.",
        **level,
        "properties": {**level["properties"], "families": families},
        "required": [*level["required"], "families"],
    }


def _difference(name: str) -> Schema:
    """Return the schema of a difference with its interval and the test that it is 0."""
    p_value = {"type": ["number", "null"], "minimum": 0, "maximum": 1}
    detectable = {"type": ["number", "null"], "minimum": 0}
    return _with_interval(name) | {f"{name}_p_value": p_value, f"{name}_detectable": detectable}


def _with_interval(name: str) -> Schema:
    return {key: {"type": ["number", "null"]} for key in (name, f"{name}_ci_low", f"{name}_ci_high")}


def _object(properties: Schema, optional: Collection[str] = ()) -> Schema:
    """Return the schema of an object with these properties and no others; all but the optional ones are required."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


def as_text(schema: Schema) -> str:
    """Return the schema as text, as stored in docs/."""
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the schema, or compare it with `--check`."""
    parser = argparse.ArgumentParser(description="Keep docs/results.schema.json equal to what the code writes.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if the file is out of date")
    check = parser.parse_args(argv).check
    fresh = as_text(build())
    if check and TARGET.read_text(encoding="utf-8") != fresh:
        print("docs/results.schema.json is out of date: python -m scripts.update_schema")
        return 1
    if not check:
        TARGET.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
