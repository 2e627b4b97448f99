#!/usr/bin/env python3
"""Does an SAE keep what a language model knows? Probes on activations and on their reconstruction, layer by layer.

    python main.py                 # the bundled demo: tiny-pythia, its SAEs, the Wikidata tasks
    python main.py --help

This file wires the parts together and turns what happens into an exit code: 0 all is on disk, 1 the run failed,
2 the request was wrong, 130 interrupted. Imports that cost seconds wait until they are needed.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take a tenth of a second
    import interrupts

    interrupts.leave_at_once()

import logging
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from command_line import parse_config
from config import RunConfig
from errors import RequestError
from interrupts import leave, like_ctrl_c
from terminal import LineFormatter, show, tell

if TYPE_CHECKING:
    from activations import SaeId
    from baselines import Baseline
    from calibration import SiteSample
    from datasets_wikidata import Mention, ProbeTexts, TokenisedMentions, UserData
    from language_model import ActivationSource, LanguageModel, ModelInfo, Site
    from records import Json, RecordFile
    from sae_loader import Sae, SaeSource, SparseRows

log = logging.getLogger("delta_selectivity")

SETTINGS = ("positions", "folds", "repeats", "seed", "probe", "views", "epsilon")  # flags that change a number
GOES_ON = "finished layers are on disk; the same command goes on from there"
ERROR_SHOWN = 400  # characters of an error in its line: torch appends its C++ stack


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

    @property
    def subjects(self) -> list[SaeSource | Baseline]:
        """All that is measured, by `SaeId`."""
        return [*self.sources, *self.baselines]


def make_plan(config: RunConfig, fetch: bool = True) -> Plan:
    """Open everything that was asked for. Raises `RequestError`, before anything heavy is loaded, if it can't be.

    fetch: also have the SAEs' weights on this machine, and check them; else their configs only.
    """
    from datasets_wikidata import load_probe_texts
    from language_model import Site, open_model
    from probes import check_backend
    from records import prepare_folder
    from sae_loader import expand_names, open_sae

    check_backend(config.probe, config.device2)
    texts = load_probe_texts(
        config.datasets,
        data_dir=config.data_dir,
        user_data=_user_data(config),
        shuffle_select_n=config.shuffle_select_n,
        seed=config.seed,
    )
    info = open_model(config.model_name, config.revision, config.trust_remote_code)
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
                raise RequestError(f"--layers {layer}: {source.name} has SAEs for layers {has} only")
        sites[sae_id] = [Site(layer, source.hookpoint) for layer in layers]
    widths = _check_widths(config, info, sources, sites)
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
    return Plan(texts, info, sources, baselines, sites, widths, prepend_bos, counts_bos, calibration)


def _user_data(config: RunConfig) -> UserData | None:
    from datasets_wikidata import UserData

    if config.dataset_file is None:
        return None
    return UserData(config.dataset_file, config.dataset_split, config.dataset_columns)


def _check_widths(
    config: RunConfig, info: ModelInfo, sources: Sequence[SaeSource], sites: Mapping[SaeId, Sequence[Site]]
) -> dict[Site, int]:
    """The width of every site. Raises `RequestError` if there is no such hook point or an SAE has another width."""
    reads = {sae_id: [site.read_by(sources[sae_id].input_hookpoint) for site in sites[sae_id]] for sae_id in sites}
    widths = info.widths({site for both in (sites, reads) for found in both.values() for site in found})
    for sae_id, source in enumerate(sources):
        for what, width, places in (("d_in", source.d_in, reads), ("d_out", source.d_out, sites)):
            for site in places[sae_id]:
                if widths[site] != width:
                    raise RequestError(
                        f"--sae_name {source.name}: its {what} is {width}, but {site.hookpoint} of {config.model_name} "
                        f"has width {widths[site]}"
                    )
    return widths


def _plan_baselines(
    config: RunConfig,
    sources: Sequence[SaeSource],
    sites: Mapping[SaeId, Sequence[Site]],
    counts_bos: Sequence[bool],
) -> list[Baseline]:
    from baselines import Measured, plan_baselines
    from records import slug

    layers = {sae_id: tuple(site.layer for site in asked) for sae_id, asked in sites.items()}
    measured = [
        Measured(slug(source.name), source.hookpoint, counts_bos[i], layers[i]) for i, source in enumerate(sources)
    ]
    return plan_baselines(config.baselines, measured)


def _calibration_mentions(config: RunConfig, baselines: Sequence[Baseline]) -> list[Mention]:
    """Texts for the baselines that need some: the same whichever datasets and rows of a source are asked for."""
    from baselines import CALIBRATED
    from calibration import draw_mentions
    from datasets_wikidata import load_all_mentions

    if not any(baseline.kind in CALIBRATED for baseline in baselines):
        return []
    return draw_mentions(load_all_mentions(config.datasets, config.data_dir, _user_data(config)), config.seed)


def _refuse_reserved_names(texts: ProbeTexts) -> None:
    """A probe's name is a key of the layer's record, beside the reconstruction figures."""
    from reconstruction import Reconstruction

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
            raise RequestError(f"--bos {asked}: {info.name} has no token that begins a text")
        return asked != "none", [asked == "counted"] * len(sources)
    wishes = {source.prepend_bos for source in sources} - {None}
    if len(wishes) > 1:
        raise RequestError(
            "these SAEs were trained partly with and partly without BOS: measure them in two runs, or decide by --bos"
        )
    return bool(wishes.pop()) if wishes else info.has_bos, [source.counts_bos for source in sources]


def open_files(config: RunConfig, plan: Plan, held: ExitStack) -> dict[tuple[SaeId, int], RecordFile]:
    """A result file for each SAE or baseline and dataset, ours alone until `held` is closed.

    Raises `RequestError` if one on disk was made by something else, or is being written by another run.
    """
    from datasets_wikidata import dataset_fingerprint
    from records import SCHEMA_VERSION, RecordFile, describe_run, prepare_folder, reserve, result_path

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
                raise RequestError(f"--sae_name: two SAEs would be written to {folder}: measure them in two runs")
            held.enter_context(reserve(path))
            files[sae_id, index] = RecordFile.open(path, {**key, "data": data[index]}, run, config.overwrite)
    return files


def _result_folders(config: RunConfig, plan: Plan) -> Iterator[tuple[Path, Json, Json]]:
    """By `SaeId`: the folder, what changes these numbers alone, and what `_run.config` says of the SAE or baseline."""
    from calibration import fingerprint
    from records import slug

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


def measure(config: RunConfig, plan: Plan, files: dict[tuple[SaeId, int], RecordFile]) -> None:
    """Run what is missing, in two threads. Raises whatever stops it; finished layers are on disk by then."""
    import torch

    from activations import Item, Producer, RowTable, plan_blocks, tokens_in_memory
    from bounded_queue import BoundedQueue
    from datasets_wikidata import tokenise
    from pipeline import run, sharing_cores
    from prober import Prober, ProbeSettings, Work
    from progress import ProgressBars, Stopwatch

    missing = missing_work(plan, files)
    if not missing:
        log.warning("everything asked for is on disk already")
        return
    clock, stop = Stopwatch(), threading.Event()
    with clock.stage("tokenise"):
        tokenised = tokenise(
            plan.texts.mentions, plan.info.tokenizer, prepend_bos=plan.prepend_bos, max_length=plan.info.max_length
        )
    with clock.stage("load"):
        model, saes = load_weights(config, plan, missing, files, tokenised)
    rows = RowTable.build(tokenised, config.positions)
    blocks = [block for block in plan_blocks(plan.texts) if block.datasets & missing.keys()]
    queue_bytes = int(config.queue_gb * 1024**3)
    queue: BoundedQueue[Item] = BoundedQueue(queue_bytes, lambda item: item.nbytes)
    settings = ProbeSettings(
        config.folds, config.repeats, config.seed, config.views, config.epsilon, torch.device(config.device2)
    )
    names, codes = [subject.name for subject in plan.subjects], _codes(plan, tokenised)
    latents_of = _with_latents(plan) if "latents" in config.views else frozenset()
    work = Work(plan.texts, rows, plan.widths, files, missing, names, codes, latents_of)
    n_texts = sum(len(block.mentions) for block in blocks)
    max_tokens = tokens_in_memory(model.device, saes) if config.batch_size is None else None
    with ProgressBars(n_texts, work.n_probes, queue, config.quiet) as bars, sharing_cores(config.device1) as workers:
        producer = Producer(
            model, saes, dict(enumerate(plan.counts_bos)), tokenised, rows,
            config.batch_size, max_tokens, workers, clock, latents_of,
        )  # fmt: skip
        prober = Prober(work, blocks, settings, config.probe, queue_bytes, clock, bars.probes, stop)
        run(producer, prober, blocks, queue, bars.texts, stop)


def _with_latents(plan: Plan) -> frozenset[SaeId]:
    """All SAEs, and the baselines that are like them."""
    alike = {i for i, baseline in enumerate(plan.baselines, len(plan.sources)) if baseline.has_latents}
    return frozenset({*range(len(plan.sources)), *alike})


def _codes(plan: Plan, tokenised: TokenisedMentions) -> dict[SaeId, SparseRows]:
    """What probes see of each mention for baselines that reconstruct nothing."""
    from baselines import bag_of_names

    ids = [i for i, baseline in enumerate(plan.baselines, len(plan.sources)) if not baseline.reconstructs]
    return dict.fromkeys(ids, bag_of_names(tokenised)) if ids else {}


def load_weights(
    config: RunConfig,
    plan: Plan,
    missing: dict[int, dict[Site, list[SaeId]]],
    files: dict[tuple[SaeId, int], RecordFile],
    tokenised: TokenisedMentions,
) -> tuple[ActivationSource, dict[Site, dict[SaeId, Sae]]]:
    """The model up to the last layer wanted, and the SAEs and baselines that have something to measure, on device1.

    Raises `RequestError` if an SAE fits something else far better than its site.
    """
    from baselines import SiteBuilder
    from pipeline import sharing_cores

    wanted: dict[Site, set[SaeId]] = {}
    for sites in missing.values():
        for site, sae_ids in sites.items():
            wanted.setdefault(site, set()).update(sae_ids)
    n_sources = len(plan.sources)
    loaded: dict[Site, dict[SaeId, Sae]] = {}
    for site, asked in sorted(wanted.items()):
        baselines = [plan.baselines[i - n_sources] for i in asked if i >= n_sources]
        own = {i for i in asked if i < n_sources} | {b.of for b in baselines if b.of is not None}
        loaded[site] = {i: plan.sources[i].load(site.layer, config.device1) for i in sorted(own)}
    model = _load_fitting(config, plan, loaded, files, tokenised)
    saes: dict[Site, dict[SaeId, Sae]] = {}
    with sharing_cores(config.device1):  # sums by one thread: the same baselines whatever the number of cores
        samples = _calibrate(config, plan, model)
        for site, asked in sorted(wanted.items()):
            builder = SiteBuilder(site, plan.widths[site], config.device1, samples, config.seed)
            saes[site] = {i: sae for i, sae in loaded[site].items() if i in asked}
            for i in sorted(asked - saes[site].keys()):
                baseline = plan.baselines[i - n_sources]
                if baseline.reconstructs:
                    saes[site][i] = builder.build(baseline, None if baseline.of is None else loaded[site][baseline.of])
    return model, saes


def _model_loader(config: RunConfig, info: ModelInfo) -> Callable[[Collection[Site]], ActivationSource]:
    """What loads the model with hooks at given sites; with a cache, when a text is not in it."""
    import torch

    from activation_cache import ActivationCache, CachedModel

    dtype = info.choose_dtype(config.dtype)

    def load(sites: Collection[Site]) -> LanguageModel:
        return info.load(sites, config.device1, dtype)

    if config.cache_dir is None:
        return load
    cache = ActivationCache.open(config.cache_dir, config.cache_gb, info.fingerprint(), dtype)
    return lambda sites: CachedModel(cache, load, sites, torch.device(config.device1))


def _load_fitting(
    config: RunConfig,
    plan: Plan,
    saes: Mapping[Site, Mapping[SaeId, Sae]],
    files: Mapping[tuple[SaeId, int], RecordFile],
    tokenised: TokenisedMentions,
) -> ActivationSource:
    """The model, after a look at whether the SAEs fit it. What is to be known of them goes into their files.

    Raises `RequestError` if one fits something else far better, unless that is to be measured by force.
    """
    from out_of_memory import ERRORS, is_out_of_memory
    from preflight import Preflight, neighbours

    reads = {site.read_by(sae.input_hookpoint) for site, by_id in saes.items() for sae in by_id.values()}
    needed = {site: plan.widths[site] for site in saes.keys() | reads}
    load = _model_loader(config, plan.info)
    try:
        model = load(neighbours(plan.info, needed))
        check = Preflight.sample(model, plan.info, tokenised, config.seed)
    except (ArithmeticError, *ERRORS) as error:
        if not (isinstance(error, ArithmeticError) or is_out_of_memory(error)):
            raise
        log.info("no look at how the SAEs fit: %s", error)  # the run itself will say in which text, or make do
        return load(needed)
    except RequestError:  # some model does not have what the neighbours' names say
        model = load(needed)
        check = Preflight.sample(model, plan.info, tokenised, config.seed)
    fits = {
        (site, sae_id): check.examine(sae, site, plan.counts_bos[sae_id])
        for site, by_id in saes.items()
        for sae_id, sae in by_id.items()
    }
    misfits = [fit for fit in fits.values() if fit.misfits]
    if misfits and not config.force:
        more = f" (and {len(misfits) - 1} more of {len(fits)} SAEs misfit)" if len(misfits) > 1 else ""
        raise RequestError(f"{misfits[0].problem()}{more}; --force measures it as it is")
    told = [(sae_id, fit.problem()) for (_, sae_id), fit in fits.items()]
    told += [(sae_id, _of_another_model(config, source)) for sae_id, source in enumerate(plan.sources)]
    for sae_id, problem in told:
        if problem is not None:
            log.warning("%s", problem)
            for file in (file for (i, _), file in files.items() if i == sae_id and problem not in file.warnings):
                file.warnings.append(problem)
    return model.only(needed)


def _of_another_model(config: RunConfig, source: SaeSource) -> str | None:
    """What to tell if an SAE says that it was trained on a model of another name; folders and owners aside."""
    trained_on, measured = (Path(name or "").name.lower() for name in (source.model_name, config.model_name))
    if not trained_on or trained_on == measured:
        return None
    return f"{source.name} was trained on {source.model_name}, and is measured on {config.model_name}"


def _calibrate(config: RunConfig, plan: Plan, model: ActivationSource) -> dict[Site, SiteSample]:
    from calibration import calibrate
    from datasets_wikidata import tokenise

    if not plan.calibration:
        return {}
    tokenised = tokenise(
        plan.calibration, plan.info.tokenizer, prepend_bos=plan.prepend_bos, max_length=plan.info.max_length
    )
    return calibrate(model, tokenised, config.positions, config.seed)


def inspect(config: RunConfig) -> None:
    """Print what the SAEs are and how well they fit each hook point of the model. Raises `RequestError`."""
    from calibration import draw_mentions
    from datasets_wikidata import tokenise
    from inspection import render
    from preflight import Preflight, neighbours

    plan = make_plan(config)
    info = plan.info
    model = _model_loader(config, info)(neighbours(info, plan.widths, everywhere=True))
    mentions = draw_mentions(plan.texts.mentions, config.seed)
    tokenised = tokenise(mentions, info.tokenizer, prepend_bos=plan.prepend_bos, max_length=info.max_length)
    check = Preflight.sample(model, info, tokenised, config.seed)
    bos = "that begin with BOS" if plan.prepend_bos else "without BOS"
    show(f"{config.model_name} in {info.choose_dtype(config.dtype)}, on some of {len(mentions)} texts {bos}")
    for sae_id, source in enumerate(plan.sources):
        saes = {site: source.load(site.layer, config.device1) for site in plan.sites[sae_id]}
        fits = [check.examine(sae, site, plan.counts_bos[sae_id]) for site, sae in saes.items()]
        show(f"\n{render(source, saes, fits, check)}")


def run(argv: Sequence[str]) -> None:
    """One run. Raises `RequestError` if the request is wrong, anything else if the run fails."""
    config, task = parse_config(argv)
    logging.getLogger().setLevel(logging.INFO if config.verbose else logging.WARNING)
    if task == "inspect":
        inspect(config)
        return
    if task == "list":
        from datasets_wikidata import describe_datasets

        show(describe_datasets(config.datasets, data_dir=config.data_dir, user_data=_user_data(config)))
        return
    from sae_level import settle

    plan = make_plan(config)
    with ExitStack() as held:
        files = open_files(config, plan, held)
        measure(config, plan, files)
        settle(files)  # though nothing was missing: a run may have ended just before
    if not config.quiet:
        import report

        show(report.render(report.load(dict.fromkeys(file.path for file in files.values()))))


def _foreseen(error: Exception) -> bool:
    """Whether the error's own line says enough: disk, memory, NaN."""
    from out_of_memory import is_out_of_memory
    from row_store import NonFiniteError

    return isinstance(error, OSError | NonFiniteError) or is_out_of_memory(error)


def main(argv: Sequence[str] | None = None, job: Callable[[Sequence[str]], None] | None = None) -> int:
    """Run (or do another job with the arguments), and say in one line on stderr what went wrong if something did.

    Returns the exit code.

    An error that nobody foresaw comes with its traceback, that of the thread where it happened; one of disk, memory
    or numbers only with `--verbose`.
    """
    to_stderr = logging.StreamHandler()
    to_stderr.setFormatter(LineFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[to_stderr])
    logging.captureWarnings(True)
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
    try:
        with like_ctrl_c():
            (job or run)(sys.argv[1:] if argv is None else argv)
    except RequestError as error:
        tell(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        tell(f"interrupted: {GOES_ON}")
        return 130
    except Exception as error:
        log.log(logging.INFO if _foreseen(error) else logging.ERROR, "where it failed", exc_info=error)
        tell(f"failed: {type(error).__name__}: {str(error)[:ERROR_SHOWN]}; {GOES_ON}")
        return 1
    return 0


if __name__ == "__main__":
    leave(main())
