"""Describe SAEs and how well they fit each hook point of a model.

for part in inspect(request):
    show(part)
describe(open_sae("my_sae"))             # from its files; needs no model
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from delta_selectivity.errors import RequestError
from delta_selectivity.models.language_model import Site
from delta_selectivity.reporting.tables import aligned
from delta_selectivity.run.calibration import draw_mentions
from delta_selectivity.run.loading import load_with_alternatives
from delta_selectivity.run.planning import make_plan
from delta_selectivity.run.preflight import Fit, Preflight
from delta_selectivity.run.request import Request
from delta_selectivity.saes import Sae, SaeSource
from delta_selectivity.system import processor

Cells = tuple[str, ...]


def inspect(request: Request) -> Iterator[str]:
    """Describe each SAE of a request and how well it fits each hook point of the model. Raises `RequestError`."""
    plan = make_plan(request)
    info, seed = plan.info, request.settings.seed
    model = load_with_alternatives(plan, plan.widths, everywhere=True)
    mentions = draw_mentions(plan.texts.mentions, seed)
    check = Preflight.sample(model, info, plan.tokenise(mentions), seed)
    bos = "that begin with BOS" if plan.prepend_bos else "without BOS"
    kind = "" if info.quantisation is None else f" (GGUF, {info.quantisation})"
    yield f"{info.name}{kind} in {plan.dtype}, on a sample of {len(mentions)} texts {bos}"
    yield f"processor: {processor.describe()}"
    for subject in plan.saes:
        assert subject.source is not None
        saes = {site: subject.source.load(site.layer, request.device1) for site in subject.sites}
        fits = [check.examine(sae, site, subject.counts_bos) for site, sae in saes.items()]
        yield f"\n{render(subject.source, saes, fits, check)}"


def describe(source: SaeSource, layers: Sequence[int] | None = None) -> str:
    """Return the description of an SAE from its files, without weights or a model.

    layers: the layers to describe; by default all. Raises `RequestError` if there is no SAE for one of them.
    """
    by_layer = {member.header.layer: member.header for member in source.members}
    for layer in layers or ():
        if layer not in by_layer:
            has = ", ".join(map(str, source.layers))
            raise RequestError(f"`layers` {layer}: {source.name} has SAEs for layers {has} only")
    rows: list[Cells] = [("layer", "architecture", "d_in", "latents", "d_out", "k", "L0 promised", "context")]
    for layer in source.layers if layers is None else layers:
        header = by_layer[layer]
        numbers = (header.d_in, header.d_sae, header.d_out, header.k, header.promised_l0, header.context_size)
        shown = ("" if number is None else f"{number:g}" for number in numbers)
        rows.append((str(layer), header.architecture, *shown))
    lines = [
        source.name,
        f"  {source.members[0].header.format}",
        *_place(source),
        f"  {_bos(source)}",
        *_training_model(source),
    ]
    return "\n".join(lines) + f"\n\n{aligned(rows)}"


def render(source: SaeSource, saes: Mapping[Site, Sae], fits: Sequence[Fit], check: Preflight) -> str:
    """Return a text: the description of an SAE, its fit at its own site, and the FVU at every examined site."""
    parts = [_header(source, next(iter(saes.values()))), _fit_table(fits)]
    parts += [line for fit in fits if (line := fit.problem()) is not None]
    for place in sorted({site.hookpoint for site in check.samples}):
        table = _fvu_table(saes, place, check)
        if table is not None:
            parts.append(f"FVU of ordinary tokens at {place}, by layer of the model (*: the SAE's own site)\n\n{table}")
    return "\n\n".join(parts)


def _header(source: SaeSource, first: Sae) -> str:
    k = "" if first.k is None else f", k {first.k}"
    widths = f"{first.d_in} -> {first.d_sae} latents -> {first.d_out}"
    inputs = first.input_norm if first.input_norm != "none" else "not normalised"
    lines = [
        source.name,
        f"  {source.members[0].header.format}, {first.architecture}{k}, {widths}",
        *_place(source),
        f"  inputs: {inputs}; {_bos(source)}",
        *_training_model(source),
    ]
    return "\n".join(lines)


def _place(source: SaeSource) -> list[str]:
    reads = "" if source.input_hookpoint is None else f", reads {source.input_hookpoint}"
    return [f"  {source.hookpoint} of layers {', '.join(map(str, source.layers))}{reads}"]


def _bos(source: SaeSource) -> str:
    texts = {True: "texts began with BOS", False: "texts had no BOS", None: "unknown whether texts began with BOS"}
    return texts[source.prepend_bos]


def _training_model(source: SaeSource) -> list[str]:
    return [] if source.model_name is None else [f"  trained on {source.model_name}"]


def _fit_table(fits: Sequence[Fit]) -> str:
    rows: list[Cells] = [
        ("layer", "hook point", "tokens", "norm", "FVU, ordinary tokens", "L0", "promised", "fits better")
    ]
    for fit in fits:
        better = "" if fit.best is None else f"{fit.best.what} (FVU {fit.best.fvu:.3f})"
        promised = "" if fit.promised_l0 is None else f"{fit.promised_l0:g}"
        figures = (str(fit.n_tokens), f"{fit.norm:.1f}", f"{fit.fvu:.3f}", f"{fit.l0:.1f}", promised, better)
        rows.append((str(fit.site.layer), fit.site.hookpoint, *figures))
    return aligned(rows)


def _fvu_table(saes: Mapping[Site, Sae], place: str, check: Preflight) -> str | None:
    """Return a row for each SAE and a column for each layer; None if no SAE has the site's width."""
    columns = sorted(site for site in check.samples if site.hookpoint == place)
    rows: list[Cells] = [("SAE of layer", *(str(site.layer) for site in columns))]
    for own, sae in saes.items():
        found = {site: fvu for site in columns if (fvu := check.fvu(sae, site)) is not None}
        if found:
            cells = (f"{found[site]:.2f}{'*' if site == own else ''}" if site in found else "" for site in columns)
            rows.append((str(own.layer), *cells))
    return aligned(rows) if len(rows) > 1 else None
