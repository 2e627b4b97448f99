"""Load the model, the SAEs and the baselines of a plan, and check that they fit each other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from delta_selectivity.caches.activation_cache import ActivationCache, CachedModel
from delta_selectivity.caches.fit_cache import FitCache
from delta_selectivity.errors import RequestError
from delta_selectivity.models.language_model import ActivationSource, LanguageModel, Site
from delta_selectivity.probing.selectivity import FitModel, fit_model
from delta_selectivity.run.activations import SaeId
from delta_selectivity.run.baselines import SiteBuilder, bag_of_names
from delta_selectivity.run.calibration import SiteSample, calibrate, draw_tokens
from delta_selectivity.run.planning import Cell, Files, Plan, by_site
from delta_selectivity.run.preflight import Preflight, alternative_sites
from delta_selectivity.run.reconstruction import SiteScale
from delta_selectivity.run.request import Request
from delta_selectivity.saes import Sae, SaeSource, SparseRows
from delta_selectivity.system.cores import sharing_cores
from delta_selectivity.system.out_of_memory import ERRORS, is_out_of_memory
from delta_selectivity.tasks import TokenisedMentions

log = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """The loaded model, SAEs and baselines, on device1."""

    model: ActivationSource  # up to the last measured layer
    saes: dict[Site, dict[SaeId, Sae]]  # SAEs and baselines to measure
    scales: dict[Site, SiteScale]  # of the activations; empty if some are not finite


def load_weights(plan: Plan, cells: Sequence[Cell], files: Files, tokenised: TokenisedMentions) -> Loaded:
    """Load the model, SAEs and baselines of the cells.

    Raises `RequestError` if an SAE fits another site or setting far better.
    """
    device, wanted = plan.request.device1, by_site(cells)
    loaded: dict[Site, dict[str, Sae]] = {}
    for site, ids in wanted.items():
        sources = {source.name: source for i in ids if (source := plan.subjects[i].source) is not None}
        loaded[site] = {name: source.load(site.layer, device) for name, source in sources.items()}
    model, scales = _load_checked(plan, loaded, files, tokenised)
    saes: dict[Site, dict[SaeId, Sae]] = {}
    with sharing_cores(device):  # one thread, so that baselines do not depend on the number of cores
        samples = _calibrate(plan, model)
        for site, ids in wanted.items():
            builder = SiteBuilder(site, plan.widths[site], device, samples, plan.request.settings.seed)
            saes[site] = {}
            for i in ids:
                subject = plan.subjects[i]
                sae = None if subject.source is None else loaded[site][subject.source.name]
                if subject.baseline is None:
                    assert sae is not None
                    saes[site][i] = sae
                elif subject.reconstructs:
                    saes[site][i] = builder.build(subject.baseline, sae)
    return Loaded(_with_purpose(model, "run"), saes, scales)


def codes_of_names(plan: Plan, tokenised: TokenisedMentions) -> dict[SaeId, SparseRows]:
    """Return the features of each mention for baselines without a reconstruction."""
    ids = [i for i, subject in enumerate(plan.subjects) if not subject.reconstructs]
    return dict.fromkeys(ids, bag_of_names(tokenised)) if ids else {}


def model_loader(plan: Plan) -> Callable[[Collection[Site]], ActivationSource]:
    """Return a function that loads the model with hooks at given sites; with a cache, only once a text is missing."""
    request, dtype = plan.request, plan.dtype

    def load(sites: Collection[Site]) -> LanguageModel:
        return plan.info.load(sites, request.device1, dtype)

    if request.cache is None:
        return load
    cache = ActivationCache.open(request.cache, request.settings.cache_gb, plan.info.fingerprint(), dtype)
    return lambda sites: CachedModel(cache, load, sites, torch.device(request.device1))


def load_with_alternatives(plan: Plan, widths: Mapping[Site, int], everywhere: bool = False) -> ActivationSource:
    """Load the model with hooks at these sites, and at the alternative sites of their SAEs that the model has."""
    load, n_layers, find = model_loader(plan), plan.info.n_layers, plan.find_widths
    for sums in (True, False):
        try:
            return load(alternative_sites(n_layers, widths, find, everywhere, plan.modules, sums))
        except RequestError as error:  # some models do not have these sites
            log.info("other sites are not tried: %s", error)
    return load(widths)


def model_fitter(request: Request) -> FitModel:
    """Return the function that fits the probes on the model's activations, or reads them from the cache."""
    return fit_model if request.cache is None else FitCache.open(request.cache, request.settings.cache_gb).fit_model


def _load_checked(
    plan: Plan, loaded: Mapping[Site, Mapping[str, Sae]], files: Files, tokenised: TokenisedMentions
) -> tuple[ActivationSource, dict[Site, SiteScale]]:
    """Load the model and check that the SAEs fit it; return the model and the scales of its sites.

    Warnings about the SAEs are written to their files.

    Raises `RequestError` if one fits another site or setting far better, unless `force` is set.
    """
    seed, force = plan.request.settings.seed, plan.request.settings.force
    reads = {site.read_by(sae.input_hookpoint) for site, by_name in loaded.items() for sae in by_name.values()}
    needed = {site: plan.widths[site] for site in loaded.keys() | reads}
    load = model_loader(plan)
    try:
        model = load_with_alternatives(plan, needed)
        check = Preflight.sample(model, plan.info, tokenised, seed)
    except (ArithmeticError, *ERRORS) as error:
        if not (isinstance(error, ArithmeticError) or is_out_of_memory(error)):
            raise
        log.info("the SAEs' fit is not checked: %s", error)  # the run will report the text, or use smaller batches
        return load(needed), {}
    except RequestError:  # some models do not have the alternative sites
        model = load(needed)
        check = Preflight.sample(model, plan.info, tokenised, seed)
    ids = {subject.name: i for i, subject in enumerate(plan.subjects) if subject.baseline is None}
    fits = {
        (site, ids[name]): check.examine(sae, site, plan.subjects[ids[name]].counts_bos)
        for site, by_name in loaded.items()
        for name, sae in by_name.items()
    }
    misfits = [fit for fit in fits.values() if fit.is_misfit]
    if misfits and not force:
        more = f" (and so do {len(misfits) - 1} more of {len(fits)} SAEs)" if len(misfits) > 1 else ""
        tried = max(site.layer for site in needed) + 1
        raise RequestError(
            f"{misfits[0].problem()}{more}; layers up to {tried} were tried, inspect tries all; "
            "`force` measures it anyway"
        )
    problems = [(sae_id, fit.problem()) for (_, sae_id), fit in fits.items()]
    problems += [(sae_id, _other_model_warning(plan, subject.source)) for sae_id, subject in enumerate(plan.saes)]
    for sae_id, problem in problems:
        if problem is not None:
            log.warning("%s", problem)
            for file in (file for (i, _), file in files.items() if i == sae_id and problem not in file.warnings):
                file.warnings.append(problem)
    return model.restricted_to(needed), check.scales()


def _other_model_warning(plan: Plan, source: SaeSource | None) -> str | None:
    """Return a warning if an SAE's config names another model; folder and owner in the names are ignored."""
    assert source is not None
    trained_on, measured = (Path(name or "").name.lower() for name in (source.model_name, plan.info.name))
    if not trained_on or trained_on == measured:
        return None
    return f"{source.name} was trained on {source.model_name}, but is measured on {plan.info.name}"


def _with_purpose(model: ActivationSource, purpose: str) -> ActivationSource:
    """Return the model; if it has a cache, with a separate part of it for this purpose."""
    return model.with_purpose(purpose) if isinstance(model, CachedModel) else model


def _calibrate(plan: Plan, model: ActivationSource) -> dict[Site, SiteSample]:
    if not plan.calibration:
        return {}
    settings = plan.request.settings
    source, tokenised = _with_purpose(model, "baselines"), plan.tokenise(plan.calibration)
    return calibrate(source, tokenised, settings.positions, draw_tokens(tokenised, settings.seed))
