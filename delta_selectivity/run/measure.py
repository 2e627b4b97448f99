"""A run of a plan: the model, the SAEs and the two threads, put together."""

from __future__ import annotations

import gc
import logging
import threading

import torch

from delta_selectivity.records.result_file import RecordFile
from delta_selectivity.run.activations import Item, Producer, RowTable, SaeId, plan_blocks, tokens_in_memory
from delta_selectivity.run.bounded_queue import BoundedQueue
from delta_selectivity.run.loading import codes_of_names, load_weights, model_fitter
from delta_selectivity.run.pipeline import run, sharing_cores
from delta_selectivity.run.planning import Plan, missing_work
from delta_selectivity.run.prober import Prober, ProbeSettings, Work
from delta_selectivity.run.progress import ProgressBars
from delta_selectivity.settings import RunConfig
from delta_selectivity.system.cores import Cores
from delta_selectivity.system.stopwatch import Stopwatch

log = logging.getLogger(__name__)


def measure(config: RunConfig, plan: Plan, files: dict[tuple[SaeId, int], RecordFile]) -> None:
    """Run what is missing, in two threads. Raises whatever stops it; finished layers are on disk by then."""
    missing = missing_work(plan, files)
    if not missing:
        log.warning("everything asked for is on disk already")
        return
    clock, stop = Stopwatch(), threading.Event()
    settings = ProbeSettings(
        config.folds, config.repeats, config.seed, config.views, config.epsilon,
        torch.device(config.device2), model_fitter(config),
    )  # fmt: skip
    with clock.stage("tokenise"):
        tokenised = plan.tokenise(plan.texts.mentions)
    with clock.stage("load"):
        model, saes = load_weights(config, plan, missing, files, tokenised)
    if not gc.isenabled():
        gc.freeze()  # nothing of this needs to be looked through again
        gc.enable()
    rows = RowTable.build(tokenised, config.positions)
    blocks = [block for block in plan_blocks(plan.texts) if block.datasets & missing.keys()]
    queue_bytes = int(config.queue_gb * 1024**3)
    queue: BoundedQueue[Item] = BoundedQueue(queue_bytes, lambda item: item.nbytes)
    names, codes = [subject.name for subject in plan.subjects], codes_of_names(plan, tokenised)
    latents_of = plan.with_latents if "latents" in config.views else frozenset()
    work = Work(plan.texts, rows, plan.widths, files, missing, names, codes, latents_of)
    n_texts = sum(len(block.mentions) for block in blocks)
    max_tokens = tokens_in_memory(model.device, saes) if config.batch_size is None else None
    with ProgressBars(n_texts, work.n_probes, queue, config.quiet) as bars, sharing_cores(config.device1) as cores:
        producer = Producer(
            model, saes, dict(enumerate(plan.counts_bos)), tokenised, rows,
            config.batch_size, max_tokens, cores, clock, latents_of,
        )  # fmt: skip
        own = cores if config.device1 == config.device2 == "cpu" else Cores(1)
        prober = Prober(work, blocks, settings, config.probe, queue_bytes, own, clock, bars.probes, stop)
        run(producer, prober, blocks, queue, bars.texts, stop)
