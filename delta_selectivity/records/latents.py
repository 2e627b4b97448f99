"""Stored attributions of probes to latents, saved beside the scores of a result file.

load(Path("results/demo/k8/tiny-pythia_wikidata_gender.json"), layer=4, probe="gender")
"""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path

from delta_selectivity.records.figures import is_number
from delta_selectivity.records.result_file import Json, as_json
from delta_selectivity.records.scores import folder_of, key_digest
from delta_selectivity.system.whole_file import refuse_link, replacing, sweep

FORMAT = 1
LATENT_NUMBERS = ("share", "dropped", "alignment", "difference", "rate_0", "rate_1", "auc")
CELL_NUMBERS = ("gap", "others", "error", "rest")


def path_of(result_file: Path, layer: int) -> Path:
    """Return the path of the latents of one layer."""
    return folder_of(result_file) / f"latents_{layer}.json.gz"  # not .json, which is for result files


def keep(result_file: Path, key: Json, layer: int, probe: str, latents: Json) -> None:
    """Add the latents of one cell to the layer's file. Raises OSError, or `RequestError` if the folder is a link."""
    path = path_of(result_file, layer)
    refuse_link(path.parent)
    path.parent.mkdir(exist_ok=True)
    sweep(path.parent, path.name)
    content = {"format": FORMAT, "key": key_digest(key), "probes": {**_read_probes(path, key), probe: as_json(latents)}}
    with replacing(path, "wb") as file:
        file.write(gzip.compress(json.dumps(content, allow_nan=False).encode(), mtime=0))


def load(result_file: Path, key: Json, layer: int, probe: str) -> Json | None:
    """Return the stored latents of a cell; None if they are missing, damaged or from another run."""
    latents = _read_probes(path_of(result_file, layer), key).get(probe)
    return latents if latents is not None and _is_valid(latents) else None


def _read_probes(path: Path, key: Json) -> Json:
    try:
        content = json.loads(gzip.decompress(path.read_bytes()))
        if content["format"] == FORMAT and content["key"] == key_digest(key) and isinstance(content["probes"], dict):
            probes: Json = content["probes"]
            return probes
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, RecursionError):
        pass
    return {}


def _is_valid(latents: Json) -> bool:
    try:
        return all(is_number(latents[name]) for name in CELL_NUMBERS) and all(
            isinstance(one["latent"], int)
            and all(is_number(one[name]) for name in LATENT_NUMBERS)
            and isinstance(one["address"], str | None)
            and all(isinstance(t, str) and isinstance(a, int) and isinstance(b, int) for t, a, b in one["examples"])
            for one in latents["latents"]
        )
    except (KeyError, TypeError, ValueError):
        return False
