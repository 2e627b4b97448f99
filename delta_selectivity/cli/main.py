"""Does an SAE keep what a language model knows? Probes on activations and on their reconstruction, layer by layer.

    python main.py                 # the bundled demo: tiny-pythia, its SAEs, the Wikidata tasks
    python main.py --help

This file wires the parts together and turns what happens into an exit code: 0 all is on disk, 1 the run failed,
2 the request was wrong, 130 interrupted. Imports that cost seconds wait until they are needed.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from delta_selectivity.cli.command_line import parse_config
from delta_selectivity.cli.flags import with_flags
from delta_selectivity.errors import RequestError
from delta_selectivity.settings import RunConfig
from delta_selectivity.system.interrupts import like_ctrl_c
from delta_selectivity.system.terminal import LineFormatter, show, tell

log = logging.getLogger("delta_selectivity")

GOES_ON = "finished layers are on disk; the same command goes on from there"
ERROR_SHOWN = 400  # characters of an error in its line: torch appends its C++ stack


def inspect(config: RunConfig) -> None:
    """Print what the SAEs are and how well they fit each hook point of the model. Raises `RequestError`."""
    from delta_selectivity.run.calibration import draw_mentions
    from delta_selectivity.run.inspection import render
    from delta_selectivity.run.loading import model_loader
    from delta_selectivity.run.planning import make_plan
    from delta_selectivity.run.preflight import Preflight, neighbours

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
        from delta_selectivity.run.planning import user_data
        from delta_selectivity.tasks import describe_datasets

        show(describe_datasets(config.datasets, data_dir=config.data_dir, user_data=user_data(config)))
        return
    from delta_selectivity.records.sae_level import settle
    from delta_selectivity.run.measure import measure
    from delta_selectivity.run.planning import make_plan, open_files

    plan = make_plan(config)
    with ExitStack() as held:
        files = open_files(config, plan, held)
        measure(config, plan, files)
        settle(files)  # though nothing was missing: a run may have ended just before
    if not config.quiet:
        from delta_selectivity.reporting import results, tables

        show(tables.render(results.load(dict.fromkeys(file.path for file in files.values()))))


def _foreseen(error: Exception) -> bool:
    """Whether the error's own line says enough: disk, memory, NaN."""
    from delta_selectivity.run.row_store import NonFiniteError
    from delta_selectivity.system.out_of_memory import is_out_of_memory

    return isinstance(error, OSError | NonFiniteError) or is_out_of_memory(error)


def main(argv: Sequence[str] | None = None, job: Callable[[Sequence[str]], None] | None = None) -> int:
    """Run (or do another job with the arguments), and say in one line on stderr what went wrong if something did.

    Returns the exit code.

    An error that nobody foresaw comes with its traceback, that of the thread where it happened; one of disk, memory
    or numbers only with `--verbose`.
    """
    to_stderr = logging.StreamHandler()
    to_stderr.setFormatter(LineFormatter(with_flags))
    logging.basicConfig(level=logging.WARNING, handlers=[to_stderr])
    logging.captureWarnings(True)
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
    try:
        with like_ctrl_c():
            (job or run)(sys.argv[1:] if argv is None else argv)
    except RequestError as error:
        tell(with_flags(f"error: {error}"))
        return 2
    except KeyboardInterrupt:
        tell(f"interrupted: {GOES_ON}")
        return 130
    except Exception as error:
        log.log(logging.INFO if _foreseen(error) else logging.ERROR, "where it failed", exc_info=error)
        tell(f"failed: {type(error).__name__}: {str(error)[:ERROR_SHOWN]}; {GOES_ON}")
        return 1
    return 0
