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


def choose_folder(out: Path, usual: Path, run: Json, wanted: Mapping[str, Json]) -> Path:
    """Return the folder for the result files of one SAE or baseline; log a line if it is not the usual one.

    Args:
        out: The folder of the whole run.
        usual: The SAE's folder if no other SAE uses it: `out` or a folder in it.
        run: `_run` of its files.
        wanted: Name of each of its files -> its key.
    """
    config = run["config"]
    sae, prefix = _sae(config), f"{model_slug(config['model_name'])}_"
    hashed = next(iter(wanted.values())).get("sae")
    places = dict.fromkeys([usual, *_below(out, usual, config)])
    found = {place: dict(_runs_in(place, prefix)) for place in (*places, out)}
    free = [place for place in places if not any(_is_of_another(run, sae, hashed) for run in found[place].values())]
    keys = {name: as_json(key) for name, key in wanted.items()}
    for place in dict.fromkeys((*places, out)):
        runs = {name: found[place][name] for name in wanted if name in found[place]}
        others = any(_is_of_another(run, sae, hashed) for run in runs.values())
        if not others and any(run["key"] == keys[name] for name, run in runs.items()):
            return place
    chosen = free[0] if free else usual
    if chosen != usual:
        other = next(_sae(run["config"]) for run in found[usual].values() if _is_of_another(run, sae, hashed))
        log.log(NOTE, "%s holds the results of %s: those of %s go to %s", usual, other, sae, chosen)
    return chosen


def _below(out: Path, usual: Path, config: Json) -> Iterator[Path]:
    """Return alternative folders: those with the SAE's name, made longer where another SAE has the same name."""
    name = _sae(config)
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    if config.get("baseline"):
        yield usual.with_name(f"{usual.name}_{digest}")
        return
    label = config["sae_label"]
    yield out / label
    yield out / slug("_".join(PurePath(name).parts[-2:]))
    yield out / f"{label}_{digest}"


def _runs_in(folder: Path, prefix: str) -> Iterator[tuple[str, Json]]:
    """Return `_run` of a model's result files directly in a folder, by file name; other files are skipped."""
    for path in sorted(folder.glob("*.json")):
        if path.name.startswith(prefix):
            try:
                yield path.name, read(path)["_run"]
            except RequestError:
                continue


def _sae(config: Json) -> str:
    """Return the name of the SAE of the files, or of the SAE that the baseline is made from."""
    found: str = config.get("baseline_of_sae") or config["sae"]
    return found


def _is_of_another(run: Json, sae: str, hashed: str | None) -> bool:
    """Return whether a run is of an SAE with neither this name nor these weights."""
    return bool(_sae(run["config"]) != sae and (hashed is None or run["key"].get("sae") != hashed))
