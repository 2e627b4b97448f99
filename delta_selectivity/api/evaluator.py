"""The class `Evaluator`: measure one SAE after another on one model, layer and set of tasks."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from delta_selectivity.api.arguments import (
    Devices,
    as_devices,
    as_layer,
    as_model,
    as_settings,
    as_source,
    as_tasks,
    renaming_fields,
)
from delta_selectivity.api.budget import FIRST_ROWS, Budget, budget_of, checked_seconds, fitting_rows
from delta_selectivity.api.evaluate import WIKIDATA
from delta_selectivity.api.training_names import for_training
from delta_selectivity.errors import RequestError
from delta_selectivity.models.language_model import LanguageModel, ModelInfo, Site, open_model
from delta_selectivity.probing.probes import check_backend, choose_backend
from delta_selectivity.probing.selectivity import fit_model
from delta_selectivity.probing.uncertainty import Estimate
from delta_selectivity.records.sae_level import mean_delta, mean_transfer_r2
from delta_selectivity.run.activations import Block, Item, LayerRows, Producer, SaeId, plan_blocks
from delta_selectivity.run.cell_result import ONE_PARTITION, CellResult, warnings_of
from delta_selectivity.run.planning import Cell, resolve_hookpoint
from delta_selectivity.run.preflight import Preflight
from delta_selectivity.run.prober import Prober, Work
from delta_selectivity.run.reconstruction import SiteScale
from delta_selectivity.run.resident import ResidentModel
from delta_selectivity.run.row_store import RowStore
from delta_selectivity.run.rows import RowTable
from delta_selectivity.run.task_set import TaskSet
from delta_selectivity.run.token_sample import TokenSample
from delta_selectivity.saes import SaeSource
from delta_selectivity.saes.hookpoints import canonical
from delta_selectivity.saes.in_training import diverged, scaled
from delta_selectivity.settings import LATENT_VIEWS, Settings
from delta_selectivity.system.cores import Cores, probing_cores, sharing_cores
from delta_selectivity.system.memory import as_bytes
from delta_selectivity.system.stopwatch import Stopwatch
from delta_selectivity.system.torch_modes import default_modes
from delta_selectivity.tasks import ProbeTexts, TokenisedMentions, load_probe_texts, tokenise

log = logging.getLogger(__name__)


class Evaluator:
    """Evaluator of SAEs of one layer on the same rows, with one call for each SAE.

    Texts, activations and the model's own probes are computed once, at construction, and stay in memory. A call only
    encodes with the SAE and fits the SAE's probes: no disk access, no forward pass. It gives the numbers of `evaluate`
    for the same rows, folds and ``whole_tokens``, bitwise identical on a CPU. It does not change the SAE (weights,
    gradients, mode, device) or the random state of the process.

    It has the signature of an SAE Lens evaluator: ``SAETrainer(cfg, sae, data, evaluator=evaluator)``. `Callback` hooks
    it into any training and logs to TensorBoard, W&B or CSV.

    Activations are kept up to ``settings.queue_gb``; texts that do not fit are run through the model at every call.

    Example:
        >>> evaluator = Evaluator(model, layer=1, tasks="people.csv", rows=200, settings=Settings(folds=3, repeats=2))
        >>> numbers = evaluator(sae)
        >>> all(name in numbers for name in ("delta_sel", "transfer_r2", "people/fvu_whole", "people/ci_low"))
        True
    """

    settings: Settings
    warnings: list[str]  # warnings about the numbers, without duplicates
    budget: Budget | None  # rows, seconds and precision of a call; None before the first
    _site: Site
    _device: str  # of the model and the SAEs
    _has_bos: bool
    _widths: dict[Site, int]
    _tokenised: TokenisedMentions
    _blocks: list[Block]
    _scales: dict[Site, SiteScale]  # of the activations
    _model: ResidentModel
    _work: Work
    _sets: dict[int, list[TaskSet]]  # by dataset, with the probes fitted on the model's activations

    @default_modes()
    def __init__(
        self,
        model: str | os.PathLike[str],
        layer: int,
        tasks: Any = WIKIDATA,
        *,
        rows: int | None = None,
        seconds: float | None = None,
        whole_tokens: int | None = 16_384,
        input_hookpoint: str | None = None,
        settings: Settings = Settings(),  # noqa: B008 - frozen
        device: Devices = "auto",
    ) -> None:
        """Run the model over the texts and fit its probes.

        Args:
            model: Hub id or local folder of a decoder of transformers.
            layer: Layer of the SAEs, counted from 0.
            tasks: One task or a list, as for `evaluate`.
            rows: Maximum number of rows per task, drawn with ``settings.seed``, with balanced classes; None: use
                ``settings.shuffle_select_n``.
            seconds: Maximum time of a call. The first SAE is measured with increasing numbers of rows, up to ``rows``,
                as long as the time suffices; all later SAEs are measured with the same rows. ``budget`` has their
                number and the precision of the results.
            whole_tokens: Number of tokens per task, drawn by seed, for ``mse_whole``, ``fvu_whole`` and ``dead``; their
                standard errors measure the sampling error. None: all tokens. All other numbers use all
                rows.
            input_hookpoint: Input of transcoders; None for autoencoders, which reconstruct their input.
            settings: All other options; ``hookpoint`` defaults to resid_post. ``baselines``, ``downstream``,
                ``overwrite``, ``force`` and ``cache_gb`` have no effect. Unlike in `evaluate`, there is no check that
                an SAE fits its hook point: a mismatch shows as a high ``fvu_whole``, and a value above 1 at the probed
                positions gives a warning.
            device: As for `evaluate`.

        Raises:
            RequestError: An argument is invalid or not available; ``error.field`` names it.
        """
        settings = replace(as_settings(settings), whole_tokens=whole_tokens)
        rows_field = "shuffle_select_n" if rows is None else "rows"
        if rows is not None:
            with renaming_fields(shuffle_select_n=rows_field):
                settings = replace(settings, shuffle_select_n=rows)
        if not isinstance(input_hookpoint, str | None):
            raise RequestError(f"`input_hookpoint` {input_hookpoint!r}: a name is needed")
        layer = as_layer(layer)
        self._seconds, self.budget = checked_seconds(seconds), None
        self.settings, self.warnings = settings, [ONE_PARTITION] if settings.repeats == 1 else []
        device1, device2 = as_devices(device)
        check_backend(settings.probe, device2)
        self._site = Site(layer, canonical(settings.hookpoint or "resid_post"))
        sites = {self._site, self._site.read_by(None if input_hookpoint is None else canonical(input_hookpoint))}
        self._tasks, self._rows_field = as_tasks(tasks), rows_field
        texts = self._texts(settings.shuffle_select_n)
        info = open_model(as_model(model), settings.revision, settings.trust_remote_code)
        if layer >= info.n_layers:
            raise RequestError(f"`layer` {layer}: {info.name} has layers 0 to {info.n_layers - 1}")
        if settings.bos in ("counted", "excluded") and info.opening_token_id is None:
            raise RequestError(f"`bos` {settings.bos}: {info.name} has no token that begins a text")
        self._has_bos = info.has_bos if settings.bos == "auto" else settings.bos != "none"
        self._widths, self._modules = info.widths(sites), info.names_of_modules()
        self._device, self._device2, self._info = device1, device2, info
        self._loaded = info.load(sites, device1, info.choose_dtype(settings.dtype, device1))
        max_rows = _rows_of_largest_task(texts)
        self._max_rows = max_rows
        self._set_up(texts if self._seconds is None or max_rows <= FIRST_ROWS else self._texts(FIRST_ROWS))

    def _texts(self, rows: int | None) -> ProbeTexts:
        with renaming_fields(dataset_file="tasks", shuffle_select_n=self._rows_field):
            return load_probe_texts(self._tasks, shuffle_select_n=rows, seed=self.settings.seed)

    def _set_up(self, texts: ProbeTexts) -> None:
        """Run the model over these texts and fit its probes."""
        settings, info = self.settings, self._info
        self._tokenised = tokenise(
            texts.mentions,
            info.tokenizer,
            prepend_bos=self._has_bos,
            max_length=info.max_length,
            n_embeddings=info.n_embeddings,
            last_only=settings.positions == "last",
        )
        self._blocks = plan_blocks(texts)
        self._scales = self._find_scales(self._loaded, info)
        self._model = ResidentModel(self._loaded, self._store_bytes)
        self._work = Work(
            texts=texts,
            rows=RowTable.build(self._tokenised, settings.positions),
            widths=self._widths,
            cells=[Cell(index, self._site, 0) for index in range(len(texts.datasets))],
            names=["the SAE"],
            codes={},
            latents_of=set() if LATENT_VIEWS.isdisjoint(settings.views) else {0},
            settings=settings,
            device=torch.device(self._device2),
            fit_model=fit_model,
            sample=TokenSample.draw(self._tokenised, texts, settings.whole_tokens, settings.seed),
        )
        self._sets = {index: self._work.task_sets(index, keep_fits=True) for index in range(len(texts.datasets))}
        sets = [task_set for of_dataset in self._sets.values() for task_set in of_dataset]
        if not any(task_set.plan.kept for task_set in sets):
            reason = next(iter(sets[0].plan.skipped.values())).reason
            raise RequestError(f"`tasks`: none of the probes can be measured: {reason}")
        self._prepare()

    def __call__(self, sae: Any, data_provider: Any = None, activation_scaler: Any = None) -> dict[str, float]:
        """Measure one SAE.

        Args:
            sae: An object as for `evaluate`, the result of `wrap_sae` or `open_sae`, or a name.
            data_provider: Passed by SAE Lens's trainer; not read, so that the training sees the same batches.
            activation_scaler: Passed by SAE Lens's trainer if it scales or whitens the SAE's input. It is folded into a
                copy of the SAE's weights, as the trainer does at its end.

        Returns:
            For a trainer, which passes all three arguments: the dict below, converted by `for_training`. Instead of an
            ``ArithmeticError``, it gets an empty dict and a warning, so that a diverging training is not aborted.

            Otherwise a flat dict of floats: ``delta_sel`` and ``transfer_r2``, means over all probes, with ``_ci_low``
            and ``_ci_high``; ``TASK/fvu_whole`` and the other reconstruction figures; ``TASK/PROBE/delta_sel``,
            ``.../ci_low`` and every other number of the probe (``TASK/...`` if the probe has the task's name).
            True and False become 1.0 and 0.0; missing numbers are absent. `docs/numbers.md` defines every key.

        Raises:
            RequestError: The SAE has another layer, hook point, width or BOS setting.
            ArithmeticError: Codes or reconstructions hold NaN or Inf, or are too large for probes.
        """
        if data_provider is None and activation_scaler is None:
            return self._call(sae)
        try:
            if diverged(sae):
                raise ArithmeticError(f"the weights of the {type(sae).__name__} hold NaN or infinity")
            return for_training(self._call(scaled(sae, activation_scaler), in_training=True), *self._site)
        except ArithmeticError as error:
            log.warning("not measured: %s", error)
            return {}

    def _call(self, sae: Any, in_training: bool = False) -> dict[str, float]:
        if self.budget is None and self._seconds is not None:
            self._choose_rows(sae, self._seconds)
        start = time.perf_counter()
        numbers = self._numbers(sae, in_training)
        took = time.perf_counter() - start
        if self.budget is None:
            self.budget = budget_of(numbers, took)
            log.info("%s", self.budget)
        elif took < self.budget.seconds:  # the first call includes one-time costs of the process
            self.budget = replace(self.budget, seconds=took)
        return numbers

    def _choose_rows(self, sae: Any, seconds: float) -> None:
        """Use as many rows as a call of at most `seconds` allows."""
        took = 0.0

        def seconds_at(rows: int) -> float:
            nonlocal took
            if took:  # the first rows are already set up
                self._set_up(self._texts(rows))
            self._numbers(sae, True)  # warm-up: one-time costs of the process do not count
            start = time.perf_counter()
            self._numbers(sae, True)
            took = time.perf_counter() - start
            return took

        rows = fitting_rows(seconds_at, seconds, self._max_rows)
        if took > seconds:
            line = f"a call takes {took:.2g} s with {rows} rows, more than `seconds` {seconds:g}"
            self.warnings.append(line)
            log.warning("%s", line)

    @default_modes()
    def _numbers(self, sae: Any, in_training: bool) -> dict[str, float]:
        results = self._measure(sae, in_training)
        cells = {
            (name, 0, probe): scores for name, result in results.items() for probe, scores in result.scores.items()
        }
        flat = {**_interval("delta_sel", mean_delta(cells)), **_interval("transfer_r2", mean_transfer_r2(cells))}
        for name, result in results.items():
            flat |= _plain(name, asdict(result.figures))
            for probe, record in result.records.items():
                flat |= _plain(name if probe == name else f"{name}/{probe}", record)
        return flat

    @property
    def site(self) -> Site:
        """Return the layer and hook point of the SAEs."""
        return self._site

    @default_modes()
    def measure(self, sae: Any) -> dict[str, CellResult]:
        """Measure one SAE. Arguments as for a call.

        Returns:
            Task -> its figures, records and out-of-fold scores.
        """
        return self._measure(sae, in_training=False)

    def _measure(self, sae: Any, in_training: bool) -> dict[str, CellResult]:
        with renaming_fields(obj="sae", saes="sae"):
            return self._measure_source(self._checked_source(sae), in_training)

    def _measure_source(self, source: SaeSource, in_training: bool) -> dict[str, CellResult]:
        loaded = source.load(self._site.layer, self._device)
        counts_bos = source.counts_bos if self.settings.bos == "auto" else self.settings.bos == "counted"
        results: dict[str, CellResult] = {}
        datasets = self._work.texts.datasets

        def keep(cell: Cell, result: CellResult) -> None:
            results[datasets[cell.dataset].name] = result

        with sharing_cores(self._device) as cores:
            items = self._produce({self._site: {0: loaded}}, {0: counts_bos}, cores)
            probe_cores = probing_cores(cores, self._device, self._work.device)
            prober = Prober(
                replace(self._work, names=[source.name]), self._blocks, self._store_bytes, probe_cores, Stopwatch(),
                keep, lambda _: None, threading.Event(), self._sets,
            )  # fmt: skip
            prober.run(items)
        for name, result in results.items():
            for line in (f"{name}{warning}" for warning in warnings_of(result)):
                known = map(_without_numbers, self.warnings) if in_training else self.warnings
                if (_without_numbers(line) if in_training else line) not in known:
                    self.warnings.append(line)
                    log.warning("%s", line)
        return {dataset.name: results[dataset.name] for dataset in datasets}

    def _find_scales(self, model: LanguageModel, info: ModelInfo) -> dict[Site, SiteScale]:
        try:
            with sharing_cores(self._device):
                return Preflight.sample(model, info, self._tokenised, self.settings.seed).scales()
        except ArithmeticError:  # NaN or Inf in the activations: measuring reports the text
            return {}

    @property
    def _store_bytes(self) -> int:
        return as_bytes(self.settings.queue_gb)

    def _produce(
        self, saes: Mapping[Site, Mapping[int, Any]], counts_bos: Mapping[int, bool], cores: Cores
    ) -> list[Item]:
        """Produce the rows of the probed positions and the sums over all tokens."""
        producer = Producer(
            self._model, saes, counts_bos, self._tokenised, self._work.rows, self.settings.batch_size, cores,
            Stopwatch(), self._work.sample, self._scales, self._work.latents_of,
        )  # fmt: skip
        items: list[Item] = []
        producer.run(self._blocks, items.append, lambda _: None)
        return items

    def _prepare(self) -> None:
        """Run the model over every text, and fit the probes of its activations."""
        with sharing_cores(self._device) as cores:
            items = self._produce({self._site: {}}, {}, cores)
            backend, _ = choose_backend(self.settings.probe, self._work.device)
            widths: dict[tuple[Site, SaeId | None], int] = {(self._site, None): self._widths[self._site]}
            with RowStore(widths, len(self._work.rows), self._work.device, self._store_bytes) as store:
                for item in items:
                    if isinstance(item, LayerRows):
                        store.put(item)
                sets = [task_set for of_dataset in self._sets.values() for task_set in of_dataset]

                def fit(task_set: Any) -> None:
                    task_set.fit_model(self._site, store, backend, self._work.device, fit_model)

                probe_cores = probing_cores(cores, self._device, self._work.device)
                for _ in probe_cores.map_in_order(sets, fit, "probes"):
                    pass

    def _checked_source(self, sae: Any) -> SaeSource:
        """Return the SAE after checking its layer, hook point and width."""
        layer, hookpoint = self._site
        input_site = next((place for place in self._widths if place != self._site), self._site)
        is_name = isinstance(sae, str | os.PathLike)
        default_hookpoint = self.settings.hookpoint if is_name else hookpoint
        source = as_source(
            sae,
            (layer,),
            default_hookpoint,
            self._widths[input_site],
            None if input_site == self._site else input_site.hookpoint,
        )
        if source.requested_hookpoint is None:
            source = resolve_hookpoint(source, self._modules)
        if layer not in source.layers or source.hookpoint != hookpoint:
            layers = ", ".join(map(str, source.layers))
            raise RequestError(
                f"`sae` {source.name}: its place is {source.hookpoint}, layer {layers}; this evaluator measures "
                f"{hookpoint}, layer {layer}"
            )
        source_input = self._site.read_by(source.input_hookpoint)
        if source_input not in self._widths:
            raise RequestError(
                f"`sae` {source.name}: its input is {source_input.hookpoint}: set `input_hookpoint` to it"
            )
        for what, width, place in (("d_in", source.d_in, source_input), ("d_out", source.d_out, self._site)):
            if width != self._widths[place]:
                raise RequestError(
                    f"`sae` {source.name}: its {what} is {width}, but {place.hookpoint} has width {self._widths[place]}"
                )
        if self.settings.bos == "auto" and source.prepend_bos not in (None, self._has_bos):
            other = "none" if self._has_bos else "excluded"
            began = "without BOS" if self._has_bos else "with BOS"
            raise RequestError(f"`sae` {source.name}: it was trained on texts {began}: set `bos` to {other!r}")
        return source


def _rows_of_largest_task(texts: ProbeTexts) -> int:
    """Return the number of rows of the largest task."""
    return max(len(set().union(*(probe.mentions.tolist() for probe in task.probes))) for task in texts.datasets)


def _without_numbers(line: str) -> str:
    """Return a warning without its numbers, because a recurring warning has other numbers each time."""
    return re.sub(r"[\d.]+", "", line)


def _plain(prefix: str, record: Mapping[str, Any]) -> dict[str, float]:
    return {f"{prefix}/{name}": float(value) for name, value in record.items() if isinstance(value, bool | int | float)}


def _interval(name: str, estimate: Estimate | None) -> dict[str, float]:
    if estimate is None:
        return {}
    return {name: estimate.value, f"{name}_ci_low": estimate.low, f"{name}_ci_high": estimate.high}
