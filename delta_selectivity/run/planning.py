"""What a request takes: data, model and SAEs opened, nothing heavy loaded; and the files that it will fill.

plan = make_plan(config)
files = open_files(config, plan, held)
missing_work(plan, files)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from delta_selectivity.caches.setup_cache import SetupCache
from delta_selectivity.errors import RequestError
from delta_selectivity.models.language_model import ModelInfo, Pretrained, Site
from delta_selectivity.probing.probes import check_backend
from delta_selectivity.records.result_file import (
    SCHEMA_VERSION,
    Json,
    RecordFile,
    describe_run,
    prepare_folder,
    reserve,
    result_path,
    slug,
)
from delta_selectivity.run.activations import SaeId
from delta_selectivity.run.baselines import CALIBRATED, Baseline, Measured, plan_baselines
from delta_selectivity.run.calibration import draw_mentions, fingerprint
from delta_selectivity.run.reconstruction import Reconstruction
from delta_selectivity.saes import SaeSource, expand_names, open_sae
from delta_selectivity.settings import RunConfig
from delta_selectivity.tasks import (
    Mention,
    ProbeTexts,
    TokenisedMentions,
    UserData,
    dataset_fingerprint,
    load_all_mentions,
    load_probe_texts,
)

SETTINGS = ("positions", "folds", "repeats", "seed", "probe", "views", "epsilon")  # flags that change a number


@dataclass(frozen=True)
class Plan:
    """A request that was found to be possible: data, model and SAEs opened, nothing heavy loaded."""

    texts: ProbeTexts
    info: ModelInfo
    sources: list[SaeSource]
    baselines: list[Baseline]  # counted on from the sources: the first one's id is their number
    sites: dict[SaeId, list[Site]]  # in order of layers; of sources and baselines
    widths: dict[Site, int]  # of the activations, also where transcoders read
    prepend_bos: bool
    counts_bos: list[bool]  # of each subject: whether BOS counts in its whole-text figures
    calibration: list[Mention]  # texts that baselines are fitted to; none if none is
    setup: SetupCache

    @property
    def subjects(self) -> list[SaeSource | Baseline]:
        """All that is measured, by `SaeId`."""
        return [*self.sources, *self.baselines]

    @property
    def with_latents(self) -> frozenset[SaeId]:
        """All SAEs, and the baselines that are like them."""
        alike = {i for i, baseline in enumerate(self.baselines, len(self.sources)) if baseline.has_latents}
        return frozenset({*range(len(self.sources)), *alike})

    def find_widths(self, sites: Collection[Site]) -> dict[Site, int]:
        """The width of each site of the model. Raises `RequestError` as `ModelInfo.widths`."""
        return self.setup.widths(self.info, sites)

    def tokenise(self, mentions: Sequence[Mention]) -> TokenisedMentions:
        """Texts as the model is shown them. Raises `RequestError` for a name that has no token or does not fit."""
        return self.setup.tokens(mentions, self.info, prepend_bos=self.prepend_bos)


def make_plan(config: RunConfig, fetch: bool = True) -> Plan:
    """Open everything that was asked for. Raises `RequestError`, before anything heavy is loaded, if it can't be.

    fetch: also have the SAEs' weights on this machine, and check them; else their configs only.
    """
    check_backend(config.probe, config.device2)
    texts = load_probe_texts(
        config.datasets,
        data_dir=config.data_dir,
        user_data=user_data(config),
        shuffle_select_n=config.shuffle_select_n,
        seed=config.seed,
    )
    files = Pretrained.find(config.model_name, config.revision, config.trust_remote_code)
    setup = SetupCache() if config.cache_dir is None else SetupCache.open(config.cache_dir, config.cache_gb)
    info = setup.model(files)
    _refuse_reserved_names(texts)
    sources = [open_sae(name, config.hookpoint) for name in expand_names(config.sae_names)]
    sites: dict[SaeId, list[Site]] = {}
    for sae_id, source in enumerate(sources):
        layers = config.layers if config.layers is not None else source.layers
        for layer in layers:
            if layer >= info.n_layers:
                raise RequestError(f"layer {layer}: {config.model_name} has layers 0 to {info.n_layers - 1}")
            if layer not in source.layers:
                has = ",".join(map(str, source.layers))
                raise RequestError(f"`layers` {layer}: {source.name} has SAEs for layers {has} only")
        sites[sae_id] = [Site(layer, source.hookpoint) for layer in layers]
    widths = _check_widths(config, info, setup, sources, sites)
    for sae_id, source in enumerate(sources if fetch else ()):
        source.prepare([site.layer for site in sites[sae_id]])
    prepend_bos, counts_bos = _decide_bos(config.bos, info, sources)
    baselines = _plan_baselines(config, sources, sites, counts_bos)
    counts_bos += [baseline.counts_bos for baseline in baselines]
    sites |= {
        sae_id: [Site(layer, baseline.hookpoint) for layer in baseline.layers]
        for sae_id, baseline in enumerate(baselines, len(sources))
    }
    prepare_folder(config.output_directory)
    calibration = _calibration_mentions(config, baselines)
    return Plan(texts, info, sources, baselines, sites, widths, prepend_bos, counts_bos, calibration, setup)


def user_data(config: RunConfig) -> UserData | None:
    if config.dataset_file is None:
        return None
    return UserData(config.dataset_file, config.dataset_split, config.dataset_columns)


def _check_widths(
    config: RunConfig,
    info: ModelInfo,
    setup: SetupCache,
    sources: Sequence[SaeSource],
    sites: Mapping[SaeId, Sequence[Site]],
) -> dict[Site, int]:
    """The width of every site. Raises `RequestError` if there is no such hook point or an SAE has another width."""
    reads = {sae_id: [site.read_by(sources[sae_id].input_hookpoint) for site in sites[sae_id]] for sae_id in sites}
    widths = setup.widths(info, {site for both in (sites, reads) for found in both.values() for site in found})
    for sae_id, source in enumerate(sources):
        for what, width, places in (("d_in", source.d_in, reads), ("d_out", source.d_out, sites)):
            for site in places[sae_id]:
                if widths[site] != width:
                    raise RequestError(
                        f"`saes` {source.name}: its {what} is {width}, but {site.hookpoint} of {config.model_name} "
                        f"has width {widths[site]}"
                    )
    return widths


def _plan_baselines(
    config: RunConfig,
    sources: Sequence[SaeSource],
    sites: Mapping[SaeId, Sequence[Site]],
    counts_bos: Sequence[bool],
) -> list[Baseline]:
    layers = {sae_id: tuple(site.layer for site in asked) for sae_id, asked in sites.items()}
    measured = [
        Measured(slug(source.name), source.hookpoint, counts_bos[i], layers[i]) for i, source in enumerate(sources)
    ]
    return plan_baselines(config.baselines, measured)


def _calibration_mentions(config: RunConfig, baselines: Sequence[Baseline]) -> list[Mention]:
    """Texts for the baselines that need some: the same whichever datasets and rows of a source are asked for."""
    if not any(baseline.kind in CALIBRATED for baseline in baselines):
        return []
    return draw_mentions(load_all_mentions(config.datasets, config.data_dir, user_data(config)), config.seed)


def _refuse_reserved_names(texts: ProbeTexts) -> None:
    """A probe's name is a key of the layer's record, beside the reconstruction figures."""
    reserved = {field.name for field in fields(Reconstruction)}
    for probe in (probe for dataset in texts.datasets for probe in dataset.probes):
        if probe.name in reserved:
            raise RequestError(f"a task may not be called {probe.name!r}: that is a figure of the record; rename it")


def _decide_bos(asked: str, info: ModelInfo, sources: Sequence[SaeSource]) -> tuple[bool, list[bool]]:
    """Whether texts begin with BOS, and for each SAE whether it counts in the whole-text figures.

    As the SAEs were trained, unless something else is asked for; where their format is silent, if the model has one.
    """
    if asked != "auto":
        if asked != "none" and not info.has_bos:
            raise RequestError(f"`bos` {asked}: {info.name} has no token that begins a text")
        return asked != "none", [asked == "counted"] * len(sources)
    wishes = {source.prepend_bos for source in sources} - {None}
    if len(wishes) > 1:
        raise RequestError(
            "these SAEs were trained partly with and partly without BOS: measure them in two runs, or decide by `bos`"
        )
    return bool(wishes.pop()) if wishes else info.has_bos, [source.counts_bos for source in sources]


def open_files(config: RunConfig, plan: Plan, held: ExitStack) -> dict[tuple[SaeId, int], RecordFile]:
    """A result file for each SAE or baseline and dataset, ours alone until `held` is closed.

    Raises `RequestError` if one on disk was made by something else, or is being written by another run.
    """
    data = [dataset_fingerprint(plan.texts, dataset) for dataset in plan.texts.datasets]
    shared = {
        "schema": SCHEMA_VERSION,
        "model": plan.info.fingerprint(),
        "bos": plan.prepend_bos,
        "dtype": plan.info.choose_dtype(config.dtype),
        **{name: getattr(config, name) for name in SETTINGS},
    }
    files: dict[tuple[SaeId, int], RecordFile] = {}
    for sae_id, (folder, own_key, told) in enumerate(_result_folders(config, plan)):
        prepare_folder(folder)
        key = {**shared, **own_key}
        run = describe_run({**asdict(config), **told})
        for index, dataset in enumerate(plan.texts.datasets):
            path = result_path(folder, config.model_name, dataset.slug)
            if any(file.path == path for file in files.values()):
                raise RequestError(f"`saes`: two SAEs would be written to {folder}: measure them in two runs")
            held.enter_context(reserve(path))
            files[sae_id, index] = RecordFile.open(path, {**key, "data": data[index]}, run, config.overwrite)
    return files


def _result_folders(config: RunConfig, plan: Plan) -> Iterator[tuple[Path, Json, Json]]:
    """By `SaeId`: the folder, what changes these numbers alone, and what `_run.config` says of the SAE or baseline."""
    out, hashes = config.output_directory, [source.fingerprint() for source in plan.sources]
    for source, own_hash, counts_bos in zip(plan.sources, hashes, plan.counts_bos, strict=False):
        folder = out / slug(source.name) if len(plan.sources) > 1 else out
        key: Json = {"sae": own_hash, "hookpoint": source.hookpoint}
        if counts_bos != source.counts_bos:
            key["counts_bos"] = counts_bos
        yield folder, key, {"sae": source.name}
    for baseline in plan.baselines:
        of = None if baseline.of is None else hashes[baseline.of]
        told = {"sae": baseline.name, "baseline": baseline.kind, "baseline_of": baseline.owner}
        yield out / "baselines" / slug(baseline.slug), baseline.key(of, fingerprint(plan.calibration)), told


def missing_work(plan: Plan, files: dict[tuple[SaeId, int], RecordFile]) -> dict[int, dict[Site, list[SaeId]]]:
    """Dataset index -> sites in order of layers -> SAEs whose result is not on disk."""
    missing: dict[int, dict[Site, list[SaeId]]] = {}
    for (sae_id, index), file in sorted(files.items(), key=lambda item: item[0][::-1]):
        for site in plan.sites[sae_id]:
            if site.layer not in file.layers:
                missing.setdefault(index, {}).setdefault(site, []).append(sae_id)
    return {index: dict(sorted(sites.items())) for index, sites in missing.items()}
