"""Choose the folder of an SAE's result files in an output folder that may hold those of other SAEs.

    out/model_gender.json              an SAE that was measured alone
    out/other/model_gender.json        another one, measured later, or several in one run

A folder with results of the same request is continued, wherever it is. Otherwise an SAE never shares a folder with
another SAE of the same model: it gets a folder with its own name.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath

from delta_selectivity.errors import RequestError
from delta_selectivity.records.result_file import Json, as_json, model_slug, read, slug
from delta_selectivity.system.terminal import NOTE

log = logging.getLogger(__name__)


def choose_folder(out: Path, default: Path, run: Json, keys_by_name: Mapping[str, Json]) -> Path:
    """Return the folder for the result files of one SAE or baseline; log a line if it is not the default.

    Args:
        out: The folder of the whole run.
        default: The SAE's folder if no other SAE uses it: `out` or a folder in it.
        run: `_run` of its files.
        keys_by_name: Name of each of its files -> its key.
    """
    config = run["config"]
    sae, prefix = _sae_name(config), f"{model_slug(config['model_name'])}_"
    weights_hash = next(iter(keys_by_name.values())).get("sae")
    places = dict.fromkeys([default, *_alternative_folders(out, default, config)])
    runs_in = {place: dict(_runs_in(place, prefix)) for place in (*places, out)}
    free = [
        place for place in places if not any(_is_other_sae(run, sae, weights_hash) for run in runs_in[place].values())
    ]
    keys = {name: as_json(key) for name, key in keys_by_name.items()}
    for place in dict.fromkeys((*places, out)):
        runs = {name: runs_in[place][name] for name in keys_by_name if name in runs_in[place]}
        others = any(_is_other_sae(run, sae, weights_hash) for run in runs.values())
        if not others and any(run["key"] == keys[name] for name, run in runs.items()):
            return place
    chosen = free[0] if free else default
    if chosen != default:
        other = next(
            _sae_name(run["config"]) for run in runs_in[default].values() if _is_other_sae(run, sae, weights_hash)
        )
        log.log(NOTE, "%s already holds results of %s; results of %s are written to %s", default, other, sae, chosen)
    return chosen


def _alternative_folders(out: Path, default: Path, config: Json) -> Iterator[Path]:
    """Yield alternative folders: first with the SAE's name, then with longer names that no other SAE has."""
    name = _sae_name(config)
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    if config.get("baseline"):
        yield default.with_name(f"{default.name}_{digest}")
        return
    label = config["sae_label"]
    yield out / label
    yield out / slug("_".join(PurePath(name).parts[-2:]))
    yield out / f"{label}_{digest}"


def _runs_in(folder: Path, prefix: str) -> Iterator[tuple[str, Json]]:
    """Yield (file name, `_run`) of a model's result files directly in a folder; skip other files."""
    for path in sorted(folder.glob("*.json")):
        if path.name.startswith(prefix):
            try:
                yield path.name, read(path)["_run"]
            except RequestError:
                continue


def _sae_name(config: Json) -> str:
    """Return the name of the SAE of the files, or of the SAE that the baseline is made from."""
    name: str = config.get("baseline_of_sae") or config["sae"]
    return name


def _is_other_sae(run: Json, sae: str, weights_hash: str | None) -> bool:
    """Return whether a run is of an SAE with neither this name nor these weights."""
    return bool(_sae_name(run["config"]) != sae and (weights_hash is None or run["key"].get("sae") != weights_hash))
