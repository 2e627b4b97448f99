"""The latents that carry a probe, read from the stored file or computed with the model."""

from __future__ import annotations

from typing import Any

from delta_selectivity.records import latents
from delta_selectivity.records.result_file import Json
from delta_selectivity.reporting.groups import dataset_of
from delta_selectivity.reporting.rows import Place


def latents_of(place: Place, source: Any = None, device: Any = None) -> Json:
    """Return the stored latents of a cell, or compute them and store them if its texts may be stored.

    Raises `RequestError` if the model, the SAE or the texts have changed since the measurement.
    """
    (path, content), layer, probe = place
    key = content["_run"]["key"]
    stored = latents.load(path, key, layer, probe)
    if stored is not None:
        return stored
    from delta_selectivity.run.carriers import find_carriers  # imports everything that a run does

    dataset = dataset_of(place.file)
    computed = find_carriers(content, dataset, layer, probe, source, None if device is None else str(device))
    config = content["_run"]["config"]
    is_public = dataset.removeprefix("wikidata_") in (config.get("datasets") or ())
    allowed = config.get("keep_texts", "public")
    if allowed == "all" or (allowed == "public" and is_public):
        latents.keep(path, key, layer, probe, computed)
    return computed
