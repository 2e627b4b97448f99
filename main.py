#!/usr/bin/env python3
"""Does an SAE keep what a language model knows? Probes on activations and on their reconstruction, layer by layer.

    python main.py                 # the bundled demo: tiny-pythia, its SAEs, the Wikidata tasks
    python main.py --help

This file wires the parts together and turns what happens into an exit code: 0 all is on disk, 1 the run failed,
2 the request was wrong, 130 interrupted. Imports that cost seconds wait until they are needed.
"""

from __future__ import annotations

import gc

if __name__ == "__main__":  # before the imports below, which take a tenth of a second
    import interrupts

    interrupts.leave_at_once()
    gc.disable()  # until all that lasts is loaded (`measure`): looking through it is a fifth of the start

import logging
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from command_line import parse_config
from config import RunConfig
from errors import RequestError
from interrupts import leave, like_ctrl_c
from terminal import LineFormatter, show, tell

if TYPE_CHECKING:
    from activations import SaeId
    from planning import Plan
    from records import RecordFile

log = logging.getLogger("delta_selectivity")

GOES_ON = "finished layers are on disk; the same command goes on from there"
ERROR_SHOWN = 400  # characters of an error in its line: torch appends its C++ stack


def measure(config: RunConfig, plan: Plan, files: dict[tuple[SaeId, int], RecordFile]) -> None:
    """Run what is missing, in two threads. Raises whatever stops it; finished layers are on disk by then."""
    import torch

    from activations import Item, Producer, RowTable, plan_blocks, tokens_in_memory
    from bounded_queue import BoundedQueue
    from cores import Cores
    from loading import codes_of_names, load_weights, model_fitter
    from pipeline import run, sharing_cores
    from planning import missing_work
    from prober import Prober, ProbeSettings, Work
    from progress import ProgressBars, Stopwatch

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


def inspect(config: RunConfig) -> None:
    """Print what the SAEs are and how well they fit each hook point of the model. Raises `RequestError`."""
    from calibration import draw_mentions
    from inspection import render
    from loading import model_loader
    from planning import make_plan
    from preflight import Preflight, neighbours

    plan = make_plan(config)
    info = plan.info
    model = model_loader(config, info)(neighbours(info.n_layers, plan.widths, plan.find_widths, everywhere=True))
    mentions = draw_mentions(plan.texts.mentions, config.seed)
    tokenised = plan.tokenise(mentions)
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
        from planning import user_data

        show(describe_datasets(config.datasets, data_dir=config.data_dir, user_data=user_data(config)))
        return
    from planning import make_plan, open_files
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
