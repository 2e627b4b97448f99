"""Write the probed rows of one layer to a file: a run without its probes.

    extract(request, Path("rows.safetensors"))

Texts are batched as in `measure`, so that activations equal those of a run bit by bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from delta_selectivity.errors import RequestError
from delta_selectivity.models.language_model import Site
from delta_selectivity.probing.arrays import check_views
from delta_selectivity.records.result_file import describe_run
from delta_selectivity.records.rows_file import RowProbe, Rows, RowText, check_target, save
from delta_selectivity.run.activations import Item, LayerRows, Producer, SaeId, plan_blocks
from delta_selectivity.run.loading import load_weights
from delta_selectivity.run.planning import Cell, Plan, make_plan
from delta_selectivity.run.prober import describe_non_finite
from delta_selectivity.run.request import Request
from delta_selectivity.run.row_store import NonFiniteError, RowStore
from delta_selectivity.run.rows import RowTable
from delta_selectivity.run.task_set import text_ranks
from delta_selectivity.run.token_sample import TokenSample
from delta_selectivity.saes import Sae
from delta_selectivity.system.cores import sharing_cores
from delta_selectivity.system.memory import as_bytes
from delta_selectivity.system.startup import resume_garbage_collection
from delta_selectivity.system.stopwatch import Stopwatch

HOST = torch.device("cpu")


def extract(request: Request, path: Path, on_texts: Callable[[int, int], None] = lambda done, total: None) -> Rows:
    """Write the probed rows of one layer, and return them.

    Args:
        request: One layer, and SAEs of one hook point; `output` and `device2` are not used.
        path: The file to write, by `records.rows_file.save`.
        on_texts: Called with the number of processed texts and the total number.

    Raises:
        RequestError: The request is wrong, or includes something that such a file does not store.
    """
    if request.layers is None or len(request.layers) != 1:
        layers = "all" if request.layers is None else ",".join(map(str, request.layers))
        raise RequestError(f"`layers` {layers}: a file of rows stores one layer: give one")
    check_views(request.settings)
    check_target(path)
    plan = make_plan(request)
    if without_recon := [subject.name for subject in plan.subjects if not subject.reconstructs]:
        raise RequestError(f"`baselines` {without_recon[0]}: it has no reconstruction to write: choose other baselines")
    sites = {site for subject in plan.subjects for site in subject.sites}
    if len(sites) > 1:
        places = ", ".join(sorted(site.hookpoint for site in sites))
        raise RequestError(f"`saes`: a file of rows stores one hook point, but these SAEs have {places}")
    (site,) = sites
    rows = _rows(plan, site, on_texts)
    save(path, rows)
    return rows


class Probed(NamedTuple):
    """The probed rows of a plan at one site, in memory."""

    table: RowTable
    store: RowStore
    saes: Mapping[SaeId, Sae]


@contextmanager
def probed_rows(
    plan: Plan,
    site: Site,
    device: torch.device,
    whole_tokens: int | None,
    latents_of: Collection[SaeId] = (),
    on_texts: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Probed]:
    """Run the texts of a plan through model and SAEs, and yield the rows of one site on a device.

    whole_tokens: tokens of each dataset for whole-text figures, which SAEs encode in the same batches.
    latents_of: the SAEs whose codes are stored too.
    Raises ArithmeticError, which quotes the text, for activations or reconstructions with NaN or Inf.
    """
    tokenised = plan.tokenise(plan.texts.mentions)
    table = RowTable.build(tokenised, plan.request.settings.positions)
    ids = range(len(plan.subjects))
    cells = [Cell(index, site, i) for index in range(len(plan.texts.datasets)) for i in ids]
    loaded = load_weights(plan, cells, {}, tokenised)
    resume_garbage_collection()
    settings, blocks = plan.request.settings, plan_blocks(plan.texts)
    total = sum(len(block.mentions) for block in blocks)
    counts_bos = {i: subject.counts_bos for i, subject in enumerate(plan.subjects)}
    done = 0

    def count(n: int) -> None:
        nonlocal done
        done += n
        on_texts(done, total)

    widths = dict.fromkeys([(site, None), *((site, i) for i in ids)], plan.widths[site])
    with RowStore(widths, len(table), device, as_bytes(settings.queue_gb)) as store:
        with sharing_cores(plan.request.device1) as cores:
            sample = TokenSample.draw(tokenised, plan.texts, whole_tokens, settings.seed)
            producer = Producer(
                loaded.model, loaded.saes, counts_bos, tokenised, table, settings.batch_size, cores, Stopwatch(),
                sample, loaded.scales, latents_of,
            )  # fmt: skip
            producer.run(blocks, lambda item: _store_item(item, store, plan), count)
        yield Probed(table, store, loaded.saes[site])


def _rows(plan: Plan, site: Site, on_texts: Callable[[int, int], None]) -> Rows:
    with probed_rows(plan, site, HOST, plan.whole_tokens, on_texts=on_texts) as (table, store, _):
        all_rows = torch.arange(len(table))
        ids = (None, *range(len(plan.subjects)))
        x, *recons = (store.get(site, i, all_rows, HOST).numpy() for i in ids)
    mentions, about = [plan.texts.mentions[m] for m in table.mention], _provenance(plan, site)
    return Rows(
        x=x,
        recons=dict(zip(about["saes"], recons, strict=True)),
        probes=tuple(_probes(plan, table)),
        groups=plan.texts.persons[table.mention],
        weights=table.weight,
        tokens=table.token,
        order=text_ranks(plan.texts, table, np.arange(len(table))),
        texts=[RowText(mention.text, mention.start, mention.end, mention.person) for mention in mentions],
        about=about,
    )


def _store_item(item: Item, store: RowStore, plan: Plan) -> None:
    if not isinstance(item, LayerRows):
        return  # a file of rows has no whole-text sums
    try:
        store.put(item)
    except NonFiniteError as error:
        names = [subject.name for subject in plan.subjects]
        raise ArithmeticError(describe_non_finite(error, plan.texts, names)) from error


def _probes(plan: Plan, table: RowTable) -> Sequence[RowProbe]:
    """Return the probes of all datasets; a name that several datasets use is prefixed by the dataset's name."""
    times = Counter(probe.name for dataset in plan.texts.datasets for probe in dataset.probes)
    return [
        RowProbe(
            name=probe.name if times[probe.name] == 1 else f"{dataset.slug}.{probe.name}",
            rows=table.ids_of(probe.mentions),
            labels=np.repeat(probe.labels, table.count(probe.mentions)),
            dataset=dataset.slug,
        )
        for dataset in plan.texts.datasets
        for probe in dataset.probes
    ]


def _provenance(plan: Plan, site: Site) -> dict[str, Any]:
    """Return the description of where the rows come from."""
    run = describe_run({"model": plan.request.model, "saes": [subject.name for subject in plan.subjects]})
    saes = {
        subject.label: {
            "name": name,
            "sha256": None if subject.source is None else subject.source.fingerprint(),
            "baseline": None if subject.baseline is None else subject.baseline.kind,
        }
        for name, subject in zip(run["config"]["saes"], plan.subjects, strict=True)
    }
    return {
        "model": run["config"]["model"],
        "model_fingerprint": plan.info.fingerprint(),
        "dtype": plan.dtype,
        "bos": plan.prepend_bos,
        "layer": site.layer,
        "hookpoint": site.hookpoint,
        "saes": saes,
        "settings": asdict(plan.request.settings),
        "versions": run["versions"],
        "commit": run["commit"],
    }
