"""From a plan to what computes: the SAEs and baselines, and the model, after a look at whether they fit each other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch

from delta_selectivity.caches.activation_cache import ActivationCache, CachedModel
from delta_selectivity.caches.fit_cache import FitCache
from delta_selectivity.errors import RequestError
from delta_selectivity.models.language_model import ActivationSource, LanguageModel, ModelInfo, Site
from delta_selectivity.probing.selectivity import FitModel, fit_model
from delta_selectivity.records.result_file import RecordFile
from delta_selectivity.run.activations import SaeId
from delta_selectivity.run.baselines import SiteBuilder, bag_of_names
from delta_selectivity.run.calibration import SiteSample, calibrate
from delta_selectivity.run.pipeline import sharing_cores
from delta_selectivity.run.planning import Plan
from delta_selectivity.run.preflight import Preflight, neighbours
from delta_selectivity.saes import Sae, SaeSource, SparseRows
from delta_selectivity.settings import RunConfig
from delta_selectivity.system.out_of_memory import ERRORS, is_out_of_memory
from delta_selectivity.tasks import TokenisedMentions

log = logging.getLogger(__name__)


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
    return _apart(model, "run"), saes


def codes_of_names(plan: Plan, tokenised: TokenisedMentions) -> dict[SaeId, SparseRows]:
    """What probes see of each mention for baselines that reconstruct nothing."""
    ids = [i for i, baseline in enumerate(plan.baselines, len(plan.sources)) if not baseline.reconstructs]
    return dict.fromkeys(ids, bag_of_names(tokenised)) if ids else {}


def model_loader(config: RunConfig, info: ModelInfo) -> Callable[[Collection[Site]], ActivationSource]:
    """What loads the model with hooks at given sites; with a cache, when a text is not in it."""
    dtype = info.choose_dtype(config.dtype)

    def load(sites: Collection[Site]) -> LanguageModel:
        return info.load(sites, config.device1, dtype)

    if config.cache_dir is None:
        return load
    cache = ActivationCache.open(config.cache_dir, config.cache_gb, info.fingerprint(), dtype)
    return lambda sites: CachedModel(cache, load, sites, torch.device(config.device1))


def model_fitter(config: RunConfig) -> FitModel:
    """What fits the probes of the model's own activations; with a cache, those that are not in it."""
    if config.cache_dir is None:
        return fit_model
    return FitCache.open(config.cache_dir, config.cache_gb).fit_model


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
    reads = {site.read_by(sae.input_hookpoint) for site, by_id in saes.items() for sae in by_id.values()}
    needed = {site: plan.widths[site] for site in saes.keys() | reads}
    load = model_loader(config, plan.info)
    try:
        model = load(neighbours(plan.info.n_layers, needed, plan.find_widths))
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
        raise RequestError(f"{misfits[0].problem()}{more}; `force` measures it as it is")
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


def _apart(model: ActivationSource, purpose: str) -> ActivationSource:
    """The model, whose cache, if it has one, keeps apart what is run for this purpose."""
    return model.apart(purpose) if isinstance(model, CachedModel) else model


def _calibrate(config: RunConfig, plan: Plan, model: ActivationSource) -> dict[Site, SiteSample]:
    if not plan.calibration:
        return {}
    return calibrate(_apart(model, "baselines"), plan.tokenise(plan.calibration), config.positions, config.seed)
