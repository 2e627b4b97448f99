"""Check and plan a request: open data, model, SAEs and result files without loading weights.

plan = go_on(make_plan(request))
files = open_files(plan, held)
missing_cells(plan, files)
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

from delta_selectivity.caches.setup_cache import SetupCache
from delta_selectivity.errors import RequestError
from delta_selectivity.models.language_model import ModelInfo, Pretrained, Site
from delta_selectivity.models.places import BLOCKS, check_replaceable, without_wrappers
from delta_selectivity.probing.folds import MOST_FOLDS, too_few_people
from delta_selectivity.probing.probes import check_backend
from delta_selectivity.records import scores
from delta_selectivity.records.result_file import (
    SCHEMA_VERSION,
    Json,
    RecordFile,
    describe_run,
    distinct_slugs,
    prepare_folder,
    read_key,
    reserve,
    result_path,
    slug,
)
from delta_selectivity.records.result_folder import choose_folder
from delta_selectivity.run.activations import SaeId
from delta_selectivity.run.baselines import CALIBRATED, Baseline, Measured, plan_baselines
from delta_selectivity.run.calibration import draw_mentions, fingerprint
from delta_selectivity.run.downstream_figures import Downstream
from delta_selectivity.run.reconstruction import Reconstruction
from delta_selectivity.run.request import Request
from delta_selectivity.saes import SaeSource, expand_names, open_sae, same_path
from delta_selectivity.saes.hookpoints import is_module_path, same_place
from delta_selectivity.settings import fields as setting_fields
from delta_selectivity.system.processor import check_proc
from delta_selectivity.system.terminal import NOTE
from delta_selectivity.system.whole_file import refuse_link
from delta_selectivity.tasks import (
    Mention,
    ProbeTexts,
    TokenisedMentions,
    dataset_fingerprint,
    load_all_mentions,
    load_probe_texts,
)

log = logging.getLogger(__name__)

Files = Mapping[tuple[SaeId, int], RecordFile]  # (subject, dataset index) -> its file


class Cell(NamedTuple):
    """One unit of work: the probes of a dataset at a site, for one subject."""

    dataset: int  # index into ProbeTexts.datasets
    site: Site
    subject: SaeId  # index into Plan.subjects


@dataclass(frozen=True)
class Subject:
    """An SAE, or a baseline of an SAE or of a hook point."""

    name: str
    label: str  # its name in tables, folders and files of rows; unique in the run
    folder: Path  # of its result files, unless another SAE's lie there
    sites: tuple[Site, ...]  # in order of layers
    counts_bos: bool  # whether its whole-text figures include BOS
    source: SaeSource | None  # itself; of a baseline, the SAE it is made from, if it is made from one
    baseline: Baseline | None = None

    @property
    def reconstructs(self) -> bool:
        """Whether it has a reconstruction; `names` has none."""
        return self.baseline is None or self.baseline.reconstructs

    @property
    def has_latents(self) -> bool:
        """Whether its codes are sparse latents that can be probed."""
        return self.baseline is None or self.baseline.has_latents


@dataclass(frozen=True)
class Plan:
    """A checked request: data, model and SAEs are open, but no weights are loaded."""

    request: Request
    texts: ProbeTexts
    info: ModelInfo
    subjects: tuple[Subject, ...]  # by `SaeId`: first the SAEs, then the baselines
    widths: dict[Site, int]  # of the activations, also where transcoders read
    prepend_bos: bool
    modules: dict[str, str]  # paths of parts of the model, and the hook points that they are
    calibration: list[Mention]  # texts that baselines are fitted to; none if none is
    setup: SetupCache
    dtype: str  # of the model's activations
    whole_tokens: int | None  # of each dataset, for whole-text figures; None: all

    @property
    def saes(self) -> list[Subject]:
        """The subjects that are not baselines."""
        return [subject for subject in self.subjects if subject.baseline is None]

    def find_widths(self, sites: Collection[Site]) -> dict[Site, int]:
        """Return the width of each site of the model. Raises `RequestError` as `ModelInfo.widths`."""
        return self.setup.widths(self.info, sites)

    def tokenise(self, mentions: Sequence[Mention]) -> TokenisedMentions:
        """Tokenise texts for the model. Raises `RequestError` for a name that has no token or does not fit."""
        last_only = self.request.settings.positions == "last"
        return self.setup.tokens(mentions, self.info, prepend_bos=self.prepend_bos, last_only=last_only)


def make_plan(request: Request, fetch: bool = True, labels: Mapping[str, str] | None = None) -> Plan:
    """Open everything in the request. Raises `RequestError`, before weights are loaded, if that fails.

    fetch: also have the SAEs' weights on this machine, and check them; else their configs only.
    labels: of the SAEs, by their names, where this is a part of a request that has more; else by `distinct_slugs`.
    """
    asked = request.settings
    check_proc()
    check_backend(asked.probe, request.device2)
    texts = load_probe_texts(request.tasks, shuffle_select_n=asked.shuffle_select_n, seed=asked.seed)
    files = Pretrained.find(request.model, asked.revision, asked.trust_remote_code)
    setup = SetupCache() if request.cache is None else SetupCache.open(request.cache, asked.cache_gb)
    info = setup.model(files)
    _refuse_reserved_names(texts)
    sources = open_sources(request)
    modules = setup.names_of_modules(info)
    sources = [in_model(source, modules) for source in sources]
    sites = [_sites(request, info, source) for source in sources]
    widths = _check_widths(info, setup, sources, sites)
    for site in (site for own in sites if asked.downstream for site in own):
        check_replaceable(site)
    for source, own in zip(sources if fetch else (), sites, strict=False):
        source.prepare([site.layer for site in own])
    prepend_bos, counts_bos = _decide_bos(asked.bos, info, sources)
    names = [source.name for source in sources]
    labels = labels or dict(zip(names, distinct_slugs(names), strict=True))
    subjects = _plan_subjects(request, sources, [labels[name] for name in names], sites, counts_bos)
    calibration: list[Mention] = []
    if any(subject.baseline is not None and subject.baseline.kind in CALIBRATED for subject in subjects):
        calibration = draw_mentions(load_all_mentions(request.tasks), asked.seed)
    dtype = info.choose_dtype(asked.dtype, request.device1)
    return Plan(
        request, texts, info, subjects, widths, prepend_bos, modules, calibration, setup, dtype, asked.whole_tokens
    )


def go_on(plan: Plan) -> Plan:
    """Return the plan with the choices of the results that already exist.

    `auto` can resolve differently on another machine, and existing figures may be exact where new ones would be
    sampled. All numbers in a folder use the same choices.
    """
    asked = plan.request.settings
    found = (read_key(path) for path in (() if asked.overwrite else _paths(plan)))
    keys = [key for key in found if key is not None and key["model"] == plan.info.fingerprint()]
    dtypes, samples = {key["dtype"] for key in keys}, {key.get("whole_tokens") for key in keys}
    if asked.dtype == "auto" and len(dtypes) == 1 and dtypes != {plan.dtype}:
        (dtype,) = dtypes
        log.log(NOTE, "the model computes in %s, as for the results that are there; `auto` is %s", dtype, plan.dtype)
        plan = replace(plan, dtype=dtype)
    if len(samples) == 1 and asked.whole_tokens is not None:
        (whole_tokens,) = samples
        if whole_tokens is None or whole_tokens > asked.whole_tokens:
            told = "all" if whole_tokens is None else whole_tokens
            log.info("`whole_tokens` is %s, as for the results that are there", told)
            plan = replace(plan, whole_tokens=whole_tokens)
    return plan


def _paths(plan: Plan) -> Iterator[Path]:
    """Return the paths of the result files of a plan, whether or not they exist."""
    out = plan.request.output
    usual = [subject.folder for subject in plan.subjects]
    for folder in dict.fromkeys([*usual, out, *(out / subject.label for subject in plan.saes)]):
        for dataset in plan.texts.datasets:
            yield result_path(folder, plan.request.model, dataset.slug)


def open_sources(request: Request) -> list[SaeSource]:
    """Open the SAEs that the request names or holds. Raises `RequestError` if one is not available."""
    found: dict[str, SaeSource] = {}
    seen: set[str] = set()
    for sae in request.saes:
        for name in [sae] if isinstance(sae, SaeSource) else expand_names([sae]):
            if isinstance(name, str) and same_path(name) in seen:
                continue
            seen.update([same_path(name)] if isinstance(name, str) else [])
            source = name if isinstance(name, SaeSource) else open_sae(name, request.settings.hookpoint)
            if found.setdefault(source.name, source) is not source:
                how = "by wrap_sae" if isinstance(sae, SaeSource) else "such as my_name=folder"
                raise RequestError(f"`saes`: two are called {source.name!r}: give each a name of its own {how}")
    return list(found.values())


def in_model(source: SaeSource, modules: Mapping[str, str]) -> SaeSource:
    """Return the source with the model's name of its site: an MLP's output is `mlp_out` only if added unchanged.

    modules: of `ModelInfo.names_of_modules`. `layers` and `attention` stand for the model's own names of these.
    """
    own = source.own_hookpoint
    if source.asked is None:
        of_model = without_wrappers(own).split(".")[0] in BLOCKS
        names = (name for path, name in modules.items() if of_model and same_place(path, own) and is_module_path(own))
        return source.at(next(names, own))
    if not same_place(source.asked, own):
        log.warning("%s says that it is of %s; it is measured at %s, as asked", source.name, own, source.asked)
    return source


def _sites(request: Request, info: ModelInfo, source: SaeSource) -> tuple[Site, ...]:
    layers = request.layers if request.layers is not None else source.layers
    for layer in layers:
        if layer >= info.n_layers:
            raise RequestError(f"`layers` {layer}: {request.model} has layers 0 to {info.n_layers - 1}")
        if layer not in source.layers:
            has = ",".join(map(str, source.layers))
            raise RequestError(f"`layers` {layer}: {source.name} has SAEs for layers {has} only")
    return tuple(Site(layer, source.hookpoint) for layer in layers)


def _check_widths(
    info: ModelInfo, setup: SetupCache, sources: Sequence[SaeSource], sites: Sequence[Sequence[Site]]
) -> dict[Site, int]:
    """Return the width of every site. Raises `RequestError` if a hook point is missing or an SAE's width differs."""
    reads = [[site.read_by(source.input_hookpoint) for site in own] for source, own in zip(sources, sites, strict=True)]
    widths = setup.widths(info, {site for places in (*sites, *reads) for site in places})
    for source, written, read in zip(sources, sites, reads, strict=True):
        for what, width, places in (("d_in", source.d_in, read), ("d_out", source.d_out, written)):
            for site in places:
                if widths[site] != width:
                    raise RequestError(
                        f"`saes` {source.name}: its {what} is {width}, but {site.hookpoint} of {info.name} "
                        f"has width {widths[site]}"
                    )
    return widths


def _decide_bos(asked: str, info: ModelInfo, sources: Sequence[SaeSource]) -> tuple[bool, list[bool]]:
    """Decide whether texts begin with BOS, and for each SAE whether it counts in the whole-text figures.

    Follows the SAEs' training unless the request says otherwise. Formats that do not say: BOS if the model has it.
    """
    if asked != "auto":
        if asked != "none" and info.opening_token_id is None:
            raise RequestError(f"`bos` {asked}: {info.name} has no token that begins a text")
        return asked != "none", [asked == "counted"] * len(sources)
    wishes = {source.prepend_bos for source in sources} - {None}
    if len(wishes) > 1:
        raise RequestError(
            "these SAEs were trained partly with and partly without BOS: measure them in two runs, or decide by `bos`"
        )
    prepend = bool(wishes.pop()) if wishes else info.has_bos
    if prepend and not info.has_bos:
        log.warning("%s has no BOS token: texts begin with EOS, as those of TransformerLens do", info.name)
    return prepend, [source.counts_bos for source in sources]


def _plan_subjects(
    request: Request,
    sources: Sequence[SaeSource],
    labels: Sequence[str],
    sites: Sequence[tuple[Site, ...]],
    counts_bos: Sequence[bool],
) -> tuple[Subject, ...]:
    """Return the SAEs and then their baselines, each with its own folder if there are several."""
    out = request.output
    folders = [out / label if len(sources) > 1 else out for label in labels]
    subjects = [
        Subject(source.name, label, folder, own, counts, source)
        for source, label, folder, own, counts in zip(sources, labels, folders, sites, counts_bos, strict=True)
    ]
    measured = [
        Measured(subject.label, source.hookpoint, subject.counts_bos, tuple(site.layer for site in subject.sites))
        for subject, source in zip(subjects, sources, strict=True)
    ]
    for baseline in plan_baselines(request.settings.baselines, measured):
        folder = out / "baselines" / slug(baseline.slug)
        own = tuple(Site(layer, baseline.hookpoint) for layer in baseline.layers)
        made_from = None if baseline.of is None else sources[baseline.of]
        name = baseline.name
        subjects.append(Subject(name, name, folder, own, baseline.counts_bos, made_from, baseline))
    return tuple(subjects)


def _refuse_reserved_names(texts: ProbeTexts) -> None:
    """Raise `RequestError` if a probe has the name of a figure: both are keys of the layer's record."""
    reserved = {field.name for field in (*fields(Reconstruction), *fields(Downstream))}
    for probe in (probe for dataset in texts.datasets for probe in dataset.probes):
        if probe.name in reserved:
            raise RequestError(f"a task may not be called {probe.name!r}: that is a figure of the record; rename it")


def _refuse_too_few_people(texts: ProbeTexts, n_folds: int) -> None:
    """Raise `RequestError` if none of the probes can be measured; where some can, the others say why not."""
    if n_folds > MOST_FOLDS:
        raise RequestError(f"`folds` {n_folds}: {MOST_FOLDS} at most")
    probes = [probe for dataset in texts.datasets for probe in dataset.probes]
    found = {p.name: too_few_people(p.labels, texts.persons[p.mentions], n_folds) for p in probes}
    reasons = [f"{name}: {skipped.reason}" for name, skipped in found.items() if skipped is not None]
    if len(reasons) == len(found):
        raise RequestError(
            f"none of the probes can be measured ({reasons[0]}): give rows of more people (column group), "
            "or set fewer `folds`"
        )


def open_files(plan: Plan, held: ExitStack) -> dict[tuple[SaeId, int], RecordFile]:
    """Open a result file for each subject and dataset, locked until `held` is closed.

    Raises `RequestError` if one on disk was made by something else, or is being written by another run.
    """
    request = plan.request
    _refuse_too_few_people(plan.texts, request.settings.folds)
    data = [dataset_fingerprint(plan.texts, dataset) for dataset in plan.texts.datasets]
    shared = {
        "schema": SCHEMA_VERSION,
        "model": plan.info.fingerprint(),
        "bos": plan.prepend_bos,
        "dtype": plan.dtype,
        **{field.name: getattr(request.settings, field.name) for field, _, rule in setting_fields() if rule.in_key},
    }
    if plan.whole_tokens is not None:  # absent from older files, which used all tokens
        shared["whole_tokens"] = plan.whole_tokens
    if request.settings.downstream:  # absent from older files, and where not requested
        shared["downstream"] = True
    hashes = {subject.name: subject.source.fingerprint() for subject in plan.saes if subject.source is not None}
    config = request.described()
    if plan.info.quantisation is not None:
        config["quantisation"] = plan.info.quantisation
    files: dict[tuple[SaeId, int], RecordFile] = {}
    for sae_id, subject in enumerate(plan.subjects):
        own_key, told = _what_is_its_own(plan, subject, hashes)
        run = describe_run({**config, **told})
        names = [result_path(Path(), request.model, dataset.slug).name for dataset in plan.texts.datasets]
        keys = [{**shared, **own_key, "data": of_dataset} for of_dataset in data]
        folder = choose_folder(request.output, subject.folder, run, dict(zip(names, keys, strict=True)))
        prepare_folder(folder)
        for index, (name, key) in enumerate(zip(names, keys, strict=True)):
            path = folder / name
            if any(file.path == path for file in files.values()):
                raise RequestError(f"`tasks`: two would be written to {path}: rename one, or measure them in two runs")
            held.enter_context(reserve(path))
            refuse_link(scores.folder_of(path))
            dataset = plan.texts.datasets[index]
            about = {
                "positive_class": {probe.name: probe.positive for probe in dataset.probes},
                "task": {"family": dataset.family, "source": dataset.source or dataset.slug},
            }
            files[sae_id, index] = RecordFile.open(path, key, {**run, **about}, request.settings.overwrite)
    return files


def _what_is_its_own(plan: Plan, subject: Subject, hashes: Mapping[str, str]) -> tuple[Json, Json]:
    """Return the key entries of this subject alone, and its entries of `_run.config`."""
    source, baseline = subject.source, subject.baseline
    own_hash = None if source is None else hashes[source.name]
    if baseline is not None:
        told = {"sae": baseline.name, "baseline": baseline.kind, "baseline_of": baseline.owner}
        if source is not None:
            told["baseline_of_sae"] = source.name
        return baseline.key(own_hash, fingerprint(plan.calibration)), told
    assert source is not None
    key: Json = {"sae": own_hash, "hookpoint": source.hookpoint}
    if subject.counts_bos != source.counts_bos:
        key["counts_bos"] = subject.counts_bos
    widths = {str(site.layer): source.d_sae[site.layer] for site in subject.sites}
    return key, {"sae": source.name, "sae_label": subject.label, "d_sae": widths}


def missing_cells(plan: Plan, files: Files) -> list[Cell]:
    """Return the cells that are not on disk, by dataset and then by site in order of layers."""
    return sorted(
        Cell(index, site, sae_id)
        for (sae_id, index), file in files.items()
        for site in plan.subjects[sae_id].sites
        if site.layer not in file.layers
    )


def by_site(cells: Iterable[Cell]) -> dict[Site, list[SaeId]]:
    """Return sites in order of layers -> the subjects that have something to measure there, each once."""
    found: dict[Site, set[SaeId]] = {}
    for cell in cells:
        found.setdefault(cell.site, set()).add(cell.subject)
    return {site: sorted(found[site]) for site in sorted(found)}
