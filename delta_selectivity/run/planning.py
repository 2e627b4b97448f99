"""Check and plan a request: open data, model, SAEs and result files without loading weights.

plan = adopt_existing_choices(make_plan(request))
files = open_files(plan, locks)
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
from delta_selectivity.probing.folds import MAX_FOLDS, reason_to_skip
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
from delta_selectivity.run.baselines import CALIBRATED, Baseline, MeasuredSae, plan_baselines
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
    folder: Path  # for its result files, unless it has those of another SAE
    sites: tuple[Site, ...]  # in order of layers
    counts_bos: bool  # whether its whole-text figures include BOS
    source: SaeSource | None  # the SAE, or the SAE that a baseline is derived from; None: it is derived from none
    baseline: Baseline | None = None

    @property
    def reconstructs(self) -> bool:
        """Whether it has a reconstruction; `names` does not."""
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
    widths: dict[Site, int]  # of the activations, also at the inputs of transcoders
    prepend_bos: bool
    modules: dict[str, str]  # module path -> hook point, from `ModelInfo.names_of_modules`
    calibration: list[Mention]  # texts that baselines are fitted to; empty if none needs them
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

    fetch: whether to download and check the SAEs' weights; otherwise only their configs.
    labels: SAE name -> label, if this is a part of a larger request; by default from `distinct_slugs`.
    """
    settings = request.settings
    check_proc()
    check_backend(settings.probe, request.device2)
    texts = load_probe_texts(request.tasks, shuffle_select_n=settings.shuffle_select_n, seed=settings.seed)
    files = Pretrained.find(request.model, settings.revision, settings.trust_remote_code)
    setup = SetupCache() if request.cache is None else SetupCache.open(request.cache, settings.cache_gb)
    info = setup.model(files)
    _refuse_reserved_names(texts)
    sources = open_sources(request)
    modules = setup.names_of_modules(info)
    sources = [resolve_hookpoint(source, modules) for source in sources]
    sites = [_sites(request, info, source) for source in sources]
    widths = _check_widths(info, setup, sources, sites)
    for site in (site for of_source in sites if settings.downstream for site in of_source):
        check_replaceable(site)
    for source, of_source in zip(sources if fetch else (), sites, strict=False):
        source.prepare([site.layer for site in of_source])
    prepend_bos, counts_bos = _decide_bos(settings.bos, info, sources)
    names = [source.name for source in sources]
    labels = labels or dict(zip(names, distinct_slugs(names), strict=True))
    subjects = _plan_subjects(request, sources, [labels[name] for name in names], sites, counts_bos)
    calibration: list[Mention] = []
    if any(subject.baseline is not None and subject.baseline.kind in CALIBRATED for subject in subjects):
        calibration = draw_mentions(load_all_mentions(request.tasks), settings.seed)
    dtype = info.choose_dtype(settings.dtype, request.device1)
    return Plan(
        request, texts, info, subjects, widths, prepend_bos, modules, calibration, setup, dtype, settings.whole_tokens
    )


def adopt_existing_choices(plan: Plan) -> Plan:
    """Return the plan with the dtype and the token sample of the results that already exist.

    `auto` can resolve differently on another machine, and existing figures may be exact where new ones would be
    sampled. All numbers in a folder use the same choices.
    """
    settings = plan.request.settings
    found = (read_key(path) for path in (() if settings.overwrite else _paths(plan)))
    keys = [key for key in found if key is not None and key["model"] == plan.info.fingerprint()]
    dtypes, samples = {key["dtype"] for key in keys}, {key.get("whole_tokens") for key in keys}
    if settings.dtype == "auto" and len(dtypes) == 1 and dtypes != {plan.dtype}:
        (dtype,) = dtypes
        log.log(NOTE, "the model computes in %s, as in the existing results; `auto` would be %s", dtype, plan.dtype)
        plan = replace(plan, dtype=dtype)
    if len(samples) == 1 and settings.whole_tokens is not None:
        (whole_tokens,) = samples
        if whole_tokens is None or whole_tokens > settings.whole_tokens:
            log.info(
                "`whole_tokens` is %s, as in the existing results", "all" if whole_tokens is None else whole_tokens
            )
            plan = replace(plan, whole_tokens=whole_tokens)
    return plan


def _paths(plan: Plan) -> Iterator[Path]:
    """Yield the paths of the result files of a plan, whether or not they exist."""
    out = plan.request.output
    usual = [subject.folder for subject in plan.subjects]
    for folder in dict.fromkeys([*usual, out, *(out / subject.label for subject in plan.saes)]):
        for dataset in plan.texts.datasets:
            yield result_path(folder, plan.request.model, dataset.slug)


def open_sources(request: Request) -> list[SaeSource]:
    """Open the SAEs of a request, by name or in memory. Raises `RequestError` if one is not available."""
    found: dict[str, SaeSource] = {}
    seen: set[str] = set()
    for sae in request.saes:
        for name in [sae] if isinstance(sae, SaeSource) else expand_names([sae]):
            if isinstance(name, str) and same_path(name) in seen:
                continue
            seen.update([same_path(name)] if isinstance(name, str) else [])
            source = name if isinstance(name, SaeSource) else open_sae(name, request.settings.hookpoint)
            if found.setdefault(source.name, source) is not source:
                how = "with wrap_sae" if isinstance(sae, SaeSource) else "such as my_name=folder"
                raise RequestError(f"`saes`: two have the name {source.name!r}: give each its own name, {how}")
    return list(found.values())


def resolve_hookpoint(source: SaeSource, modules: Mapping[str, str]) -> SaeSource:
    """Return the source with this model's name of its hook point, such as `mlp_out` for an MLP that is added unchanged.

    modules: from `ModelInfo.names_of_modules`. Its paths may differ from the SAE's in the names of the list of blocks
    and of the attention module.
    """
    found = source.config_hookpoint
    if source.requested_hookpoint is None:
        in_block = without_wrappers(found).split(".")[0] in BLOCKS and is_module_path(found)
        names = (name for path, name in modules.items() if in_block and same_place(path, found))
        return source.with_hookpoint(next(names, found))
    if not same_place(source.requested_hookpoint, found):
        log.warning(
            "%s: its config says %s, but it is measured at `hookpoint` %s",
            source.name,
            found,
            source.requested_hookpoint,
        )
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
    reads = [
        [site.read_by(source.input_hookpoint) for site in of_source]
        for source, of_source in zip(sources, sites, strict=True)
    ]
    widths = setup.widths(info, {site for places in (*sites, *reads) for site in places})
    for source, written, read in zip(sources, sites, reads, strict=True):
        for what, width, places in (("d_in", source.d_in, read), ("d_out", source.d_out, written)):
            for site in places:
                if widths[site] != width:
                    raise RequestError(
                        f"`saes` {source.name}: {what} is {width}, but {site.hookpoint} of {info.name} "
                        f"has width {widths[site]}"
                    )
    return widths


def _decide_bos(requested: str, info: ModelInfo, sources: Sequence[SaeSource]) -> tuple[bool, list[bool]]:
    """Decide whether texts begin with BOS, and for each SAE whether it counts in the whole-text figures.

    Without a request, this follows the SAEs' training; if that is unknown, texts begin with BOS if the model has one.
    """
    if requested != "auto":
        if requested != "none" and info.opening_token_id is None:
            raise RequestError(f"`bos` {requested}: {info.name} has neither a BOS nor an EOS token")
        return requested != "none", [requested == "counted"] * len(sources)
    in_training = {source.prepend_bos for source in sources} - {None}
    if len(in_training) > 1:
        raise RequestError(
            "some of these SAEs were trained with BOS and some without: measure them in two runs, or set `bos`"
        )
    prepend = bool(in_training.pop()) if in_training else info.has_bos
    if prepend and not info.has_bos:
        log.warning("%s has no BOS token: texts begin with EOS, as in TransformerLens", info.name)
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
        Subject(source.name, label, folder, of_source, counts, source)
        for source, label, folder, of_source, counts in zip(sources, labels, folders, sites, counts_bos, strict=True)
    ]
    measured = [
        MeasuredSae(subject.label, source.hookpoint, subject.counts_bos, tuple(site.layer for site in subject.sites))
        for subject, source in zip(subjects, sources, strict=True)
    ]
    for baseline in plan_baselines(request.settings.baselines, measured):
        folder = out / "baselines" / slug(baseline.slug)
        of_baseline = tuple(Site(layer, baseline.hookpoint) for layer in baseline.layers)
        source = None if baseline.sae_id is None else sources[baseline.sae_id]
        name = baseline.name
        subjects.append(Subject(name, name, folder, of_baseline, baseline.counts_bos, source, baseline))
    return tuple(subjects)


def _refuse_reserved_names(texts: ProbeTexts) -> None:
    """Raise `RequestError` if a probe has the name of a figure, since both are keys of the layer's record."""
    reserved = {field.name for field in (*fields(Reconstruction), *fields(Downstream))}
    for probe in (probe for dataset in texts.datasets for probe in dataset.probes):
        if probe.name in reserved:
            raise RequestError(
                f"a task may not have the name {probe.name!r}, which is a figure of the record: rename it"
            )


def _refuse_unmeasurable(texts: ProbeTexts, n_folds: int) -> None:
    """Raise `RequestError` if no probe can be measured; if some can, the results of the others have a reason."""
    if n_folds > MAX_FOLDS:
        raise RequestError(f"`folds` must be at most {MAX_FOLDS}, got {n_folds}")
    probes = [probe for dataset in texts.datasets for probe in dataset.probes]
    found = {p.name: reason_to_skip(p.labels, texts.persons[p.mentions], n_folds) for p in probes}
    reasons = [f"{name}: {skipped.reason}" for name, skipped in found.items() if skipped is not None]
    if len(reasons) == len(found):
        raise RequestError(
            f"none of the probes can be measured ({reasons[0]}): add rows of more groups (people or other "
            "units, column group), or set fewer `folds`"
        )


def open_files(plan: Plan, locks: ExitStack) -> dict[tuple[SaeId, int], RecordFile]:
    """Open a result file for each subject and dataset, locked until `locks` is closed.

    Raises `RequestError` if an existing file has another key, or another run is writing it.
    """
    request = plan.request
    _refuse_unmeasurable(plan.texts, request.settings.folds)
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
        subject_key, subject_config = _subject_key_and_config(plan, subject, hashes)
        run = describe_run({**config, **subject_config})
        names = [result_path(Path(), request.model, dataset.slug).name for dataset in plan.texts.datasets]
        keys = [{**shared, **subject_key, "data": of_dataset} for of_dataset in data]
        folder = choose_folder(request.output, subject.folder, run, dict(zip(names, keys, strict=True)))
        prepare_folder(folder)
        for index, (name, key) in enumerate(zip(names, keys, strict=True)):
            path = folder / name
            if any(file.path == path for file in files.values()):
                raise RequestError(f"`tasks`: two have the result file {path}: rename one, or measure them in two runs")
            locks.enter_context(reserve(path))
            refuse_link(scores.folder_of(path))
            dataset = plan.texts.datasets[index]
            about = {
                "positive_class": {probe.name: probe.positive for probe in dataset.probes},
                "task": {"family": dataset.family, "source": dataset.source or dataset.slug},
            }
            files[sae_id, index] = RecordFile.open(path, key, {**run, **about}, request.settings.overwrite)
    return files


def _subject_key_and_config(plan: Plan, subject: Subject, hashes: Mapping[str, str]) -> tuple[Json, Json]:
    """Return the subject's own entries of the key and of `_run.config`."""
    source, baseline = subject.source, subject.baseline
    sae_hash = None if source is None else hashes[source.name]
    if baseline is not None:
        config = {"sae": baseline.name, "baseline": baseline.kind, "baseline_of": baseline.owner}
        if source is not None:
            config["baseline_of_sae"] = source.name
        return baseline.key(sae_hash, fingerprint(plan.calibration)), config
    assert source is not None
    key: Json = {"sae": sae_hash, "hookpoint": source.hookpoint}
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
    """Return site -> the subjects of its cells, each once; sites are in order of layers."""
    found: dict[Site, set[SaeId]] = {}
    for cell in cells:
        found.setdefault(cell.site, set()).add(cell.subject)
    return {site: sorted(found[site]) for site in sorted(found)}
