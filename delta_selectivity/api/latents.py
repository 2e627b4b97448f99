"""The latents that carry a probe: from the file that keeps them, or found again with the model."""

from __future__ import annotations

from typing import Any

from delta_selectivity.records import latents
from delta_selectivity.records.result_file import Json
from delta_selectivity.reporting.groups import dataset_of
from delta_selectivity.reporting.rows import Place


def latents_of(place: Place, source: Any = None, device: Any = None) -> Json:
    """Return what is kept of a cell, or else find it and keep it, if its texts may be kept.

    Raises `RequestError` if the model, the SAE or the texts are no longer what was measured.
    """
    (path, found), layer, probe = place
    key = found["_run"]["key"]
    kept = latents.load(path, key, layer, probe)
    if kept is not None:
        return kept
    from delta_selectivity.run.carriers import find_carriers  # it imports all that a run does

    dataset = dataset_of(place.file)
    new = find_carriers(found, dataset, layer, probe, source, None if device is None else str(device))
    config = found["_run"]["config"]
    is_public = dataset.removeprefix("wikidata_") in (config.get("datasets") or ())
    allowed = config.get("keep_texts", "public")
    if allowed == "all" or (allowed == "public" and is_public):
        latents.keep(path, key, layer, probe, new)
    return new
