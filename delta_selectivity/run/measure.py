"""Measure the cells of a plan in two threads."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import torch

from delta_selectivity.run.activations import Item, Producer, plan_blocks
from delta_selectivity.run.bounded_queue import BoundedQueue
from delta_selectivity.run.cell_result import result_writer
from delta_selectivity.run.downstream import measure_downstream
from delta_selectivity.run.kept_texts import kept_texts
from delta_selectivity.run.loading import codes_of_names, load_weights, model_fitter
from delta_selectivity.run.pipeline import run
from delta_selectivity.run.planning import Cell, Files, Plan
from delta_selectivity.run.prober import Prober, Work
from delta_selectivity.run.progress import ProgressBars
from delta_selectivity.run.rows import RowTable
from delta_selectivity.run.token_sample import TokenSample
from delta_selectivity.settings import LATENT_VIEWS
from delta_selectivity.system import processor
from delta_selectivity.system.cores import probing_cores, sharing_cores
from delta_selectivity.system.memory import as_bytes
from delta_selectivity.system.startup import resume_garbage_collection
from delta_selectivity.system.stopwatch import Stopwatch
from delta_selectivity.system.terminal import NOTE

log = logging.getLogger(__name__)


def measure(plan: Plan, files: Files, cells: Sequence[Cell], progress: bool = False) -> None:
    """Measure these cells in two threads, and write each layer when it is done.

    Raises any error that stops it; finished layers stay on disk.
    """
    if not cells:
        log.log(NOTE, "all requested results are on disk already")
        return
    request, settings = plan.request, plan.request.settings
    clock, stop = Stopwatch(), threading.Event()
    log.info("processor: %s", processor.describe())
    fit_model = model_fitter(request)
    with clock.stage("tokenise"):
        tokenised = plan.tokenise(plan.texts.mentions)
    with clock.stage("load"):
        loaded = load_weights(plan, cells, files, tokenised)
    resume_garbage_collection()
    rows = RowTable.build(tokenised, settings.positions)
    datasets = {cell.dataset for cell in cells}
    texts = kept_texts(plan.texts, rows, settings.keep_texts)
    blocks = [block for block in plan_blocks(plan.texts) if block.datasets & datasets]
    queue_bytes = as_bytes(settings.queue_gb)
    queue: BoundedQueue[Item] = BoundedQueue(queue_bytes, lambda item: item.nbytes)
    has_view = not LATENT_VIEWS.isdisjoint(settings.views)
    latents_of = {i for i, subject in enumerate(plan.subjects) if subject.has_latents and has_view}
    names, codes = [subject.name for subject in plan.subjects], codes_of_names(plan, tokenised)
    device2 = torch.device(request.device2)
    sample = TokenSample.draw(tokenised, plan.texts, plan.whole_tokens, settings.seed)
    work = Work(plan.texts, rows, plan.widths, cells, names, codes, latents_of, settings, device2, fit_model, sample)
    downstream = {}
    if settings.downstream:
        with clock.stage("downstream"), sharing_cores(request.device1) as cores:
            downstream = measure_downstream(plan, cells, loaded.saes, tokenised, sample, cores, not progress)
    n_texts = sum(len(block.mentions) for block in blocks)
    counts_bos = {i: subject.counts_bos for i, subject in enumerate(plan.subjects)}
    with ProgressBars(n_texts, work.n_probes, queue, not progress) as bars, sharing_cores(request.device1) as cores:
        producer = Producer(
            loaded.model,
            loaded.saes,
            counts_bos,
            tokenised,
            rows,
            settings.batch_size,
            cores,
            clock,
            sample,
            loaded.scales,
            latents_of,
        )
        probe_cores = probing_cores(cores, request.device1, request.device2)
        prober = Prober(
            work,
            blocks,
            queue_bytes,
            probe_cores,
            clock,
            result_writer(files, clock, texts, downstream),
            bars.probes,
            stop,
        )
        run(producer, prober, blocks, queue, bars.texts, stop)
