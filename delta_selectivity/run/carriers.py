"""Attribute a probe of a result file to latents, by running the model over the texts of one cell again.

    found = find_carriers(file, layer=4, probe="gender", device="cpu")
    found["latents"][0]["share"]

The result is stored beside the scores (`records.latents`) and read from there the next time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from delta_selectivity.errors import RequestError
from delta_selectivity.models.language_model import Site
from delta_selectivity.probing.latents import Carriers, carriers
from delta_selectivity.probing.probes import choose_backend
from delta_selectivity.probing.selectivity import ModelFit, fit_model
from delta_selectivity.records.result_file import PROJECT, Json
from delta_selectivity.records.texts import Text
from delta_selectivity.run.extraction import probed_rows
from delta_selectivity.run.planning import Plan, make_plan
from delta_selectivity.run.request import Request, choose_devices
from delta_selectivity.run.row_store import RowStore
from delta_selectivity.run.rows import RowTable
from delta_selectivity.run.task_set import TaskSet, task_sets
from delta_selectivity.saes import Sae, SaeSource, SparseRows
from delta_selectivity.settings import Settings
from delta_selectivity.settings import fields as setting_fields
from delta_selectivity.tasks import TaskName, UserData, dataset_fingerprint, name_task

EXAMPLES = 3  # example texts of each latent
CHUNK = 4096  # latents that are decoded at once
NEURONPEDIA = "https://www.neuronpedia.org"


def find_carriers(
    results: Mapping[str, Any], dataset: str, layer: int, probe: str, sae: Any = None, device: str | None = None
) -> Json:
    """Return the latents that carry the model's probe in one cell, as JSON values that `docs/numbers.md` defines.

    Args:
        results: The content of the result file.
        dataset: The name in the name of the result file.
        layer: Layer of the cell.
        probe: Name of the cell's probe.
        sae: The SAE, if it was in memory and cannot be found by its name.
        device: Device of model, SAE and probes; by default as in a run.

    Raises:
        RequestError: The model, the SAE or the texts are not available, or have changed since the run.
    """
    plan = make_plan(_request(results["_run"], dataset, layer, sae, device))
    _check(plan, results["_run"]["key"])
    names = [known.name for known in plan.texts.datasets[0].probes]
    if probe not in names:
        raise RequestError(f"`rows` {probe}: there is no such probe; there are {', '.join(names)}")
    (site,) = plan.subjects[0].sites
    device2, settings = torch.device(plan.request.device2), plan.request.settings
    with probed_rows(plan, site, device2, whole_tokens=1, latents_of={0}) as (table, store, saes):
        sets = task_sets(plan.texts, plan.texts.datasets[0], table, settings, {})
        (task_set,) = (one for one in sets if probe in one.names)
        return _attribute(plan, table, task_set, site, probe, saes[0], store)


def _attribute(
    plan: Plan, table: RowTable, task_set: TaskSet, site: Site, probe: str, sae: Sae, store: RowStore
) -> Json:
    device = torch.device(plan.request.device2)
    place = task_set.names.index(probe)
    if place not in task_set.plan.kept:
        raise RequestError(f"{probe} was not measured: {task_set.plan.skipped[place].reason}")
    t = list(task_set.plan.kept).index(place)
    backend, _ = choose_backend(plan.request.settings.probe, device)
    model = task_set.fit_model(site, store, backend, device, fit_model)
    recon = store.get(site, 0, task_set.row_ids, device)
    codes = store.get_latents(site, 0, task_set.row_ids, device)
    fired = torch.arange(sae.d_sae) if sae.d_sae <= 2 * CHUNK else torch.unique(codes.col_indices()).cpu()
    found = carriers(
        probe_weights(model, t), model.x, recon, codes, decoder_directions(sae, fired), fired, task_set.plan.labels[t],
        task_set.plan.weights,
    )  # fmt: skip
    mentions = [plan.texts.mentions[m] for m in table.mention[task_set.row_ids.numpy()]]
    texts = [Text(m.text, m.start, m.end, m.person) for m in mentions]
    return as_json(found, codes, texts, neuronpedia(plan, site.layer))


def probe_weights(model: ModelFit, target: int) -> Tensor:
    """Return the weights on x of a target's probe, averaged over all splits: float64 [d]."""
    return model.fit.coef[target].mean(dim=0)


def decoder_directions(sae: Sae, latents: Tensor) -> Tensor:
    """Return the decoder's output for each latent at 1 minus that for no latent: float32 [latents, d_out]."""
    found = []
    for part in latents.to(torch.int64).split(CHUNK):
        n = len(part)
        codes = SparseRows(torch.arange(n + 1), part, torch.ones(n), sae.d_sae).to(sae.device)
        empty = SparseRows(torch.zeros(2, dtype=torch.int64), part[:0], torch.ones(0), sae.d_sae).to(sae.device)
        zeros = torch.zeros(n, sae.d_in, device=sae.device)  # input of a skip connection
        found.append((sae.decode(codes, zeros) - sae.decode(empty, zeros[:1])).cpu())
    return torch.cat(found)


def neuronpedia(plan: Plan, layer: int) -> str | None:
    """Return the URL of the SAE's latents on Neuronpedia, if its config has an id for it."""
    source = plan.subjects[0].source
    configs = [m.header.config for m in ([] if source is None else source.members) if m.header.layer == layer]
    for config in configs:
        for part in (config, config.get("metadata")):
            named = part.get("neuronpedia_id") if isinstance(part, dict) else None
            if isinstance(named, str) and named and all(c.isalnum() or c in "-_./" for c in named):
                return f"{NEURONPEDIA}/{named.strip('/')}"
    return None


def as_json(found: Carriers, codes: Tensor, texts: Sequence[Text], address: str | None) -> Json:
    """Return the attribution as JSON values: the latents with the texts on which they fire most, and other shares."""
    return {
        "gap": found.gap,
        "others": found.others,
        "error": found.error,
        "rest": found.rest,
        "latents": [
            {
                "latent": int(latent),
                "share": float(found.share[i]),
                "dropped": float(found.dropped[i]),
                "alignment": float(found.alignment[i]),
                "difference": float(found.difference[i]),
                "rate_0": float(found.rate[0, i]),
                "rate_1": float(found.rate[1, i]),
                "auc": float(found.auc[i]),
                "examples": [[t.text, t.start, t.end] for t in _examples(codes, int(latent), texts)],
                "address": None if address is None else f"{address}/{int(latent)}",
            }
            for i, latent in enumerate(found.latents)
        ],
    }


def _examples(codes: Tensor, latent: int, texts: Sequence[Text]) -> list[Text]:
    """Return the distinct texts on which a latent fires most."""
    at = torch.nonzero(codes.col_indices() == latent)[:, 0]
    rows = torch.searchsorted(codes.crow_indices(), at, right=True) - 1
    order = torch.argsort(codes.values()[at], descending=True, stable=True)
    found = [texts[int(rows[i])] for i in order[: 4 * EXAMPLES] if codes.values()[at[i]] > 0]
    return list(dict.fromkeys(found))[:EXAMPLES]


def _request(run: Json, dataset: str, layer: int, sae: Any, device: str | None) -> Request:
    """Return the request of the result file, for one dataset and layer."""
    config = run["config"]
    if config.get("baseline"):
        raise RequestError(f"{config['sae']} is a baseline, whose latents are not attributed")
    known = {field.name: config[field.name] for field, _, _ in setting_fields() if field.name in config}
    others = {"baselines": (), "views": ("model", "sae"), "overwrite": False, "dtype": run["key"].get("dtype", "auto")}
    device1, device2 = choose_devices(device or config.get("device1"), device or config.get("device2"))
    return Request(
        model=_resolve_path(str(config["model_name"])),
        saes=(sae if isinstance(sae, SaeSource) else _resolve_path(str(config["sae"])),),
        tasks=(_task(config, dataset),),
        layers=(layer,),
        settings=Settings(**{**known, **others}),
        output=Path(),
        device1=device1,
        device2=device2,
    )


def _task(config: Json, dataset: str) -> TaskName:
    name = dataset.removeprefix("wikidata_")
    if name in (config.get("datasets") or ()):
        return name_task(name, data_dir=config.get("data_dir"))
    columns = tuple((str(ours), str(theirs)) for ours, theirs in config.get("dataset_columns") or ())
    return UserData(_resolve_path(str(config.get("dataset_file"))), config.get("dataset_split"), columns)


def _resolve_path(name: str) -> str:
    """Resolve a path that result files store relative to the repository."""
    return str(PROJECT / name) if not Path(name).exists() and (PROJECT / name).exists() else name


def _check(plan: Plan, key: Json) -> None:
    """Raise `RequestError` unless model, SAE and texts are those of the result file."""
    source = plan.subjects[0].source
    found = {
        "model": plan.info.fingerprint(),
        "sae": None if source is None else source.fingerprint(),
        "data": dataset_fingerprint(plan.texts, plan.texts.datasets[0]),
        "bos": plan.prepend_bos,
    }
    for name, value in found.items():
        if key.get(name) != value:
            raise RequestError(f"{name}: not the one that was measured; it has changed, or another one has this name")
