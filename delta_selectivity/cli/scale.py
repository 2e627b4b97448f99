"""The command `scale`: computes the numbers of main.py with many workers.

    python compute_selectivity.py --workers 2                       # the bundled demo on two processes
    python compute_selectivity.py --plan                            # print units, bytes and seconds; run nothing
    python compute_selectivity.py --scheduler tls://10.0.0.7:8786 --tls_ca_file ca.pem --tls_cert me.pem ...
    python compute_selectivity.py --config sweep.toml               # many requests, in sequence or in parallel

It accepts all flags of main.py, with the same meaning. The request is split into units (a group of layers and a group
of SAEs, see `scale.units`). A worker measures each unit with the code of main.py, and its results are merged into the
same files that main.py would write. Either program can continue what the other has begun. Exit codes are the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delta_selectivity.cli.command_line import build_parser, make_request, parse_values, show_start
from delta_selectivity.cli.guard import guarded, set_log_level, what_is_left
from delta_selectivity.cli.parser import user_path
from delta_selectivity.cli.program import where_it_is
from delta_selectivity.cli.sweep import Sweep
from delta_selectivity.errors import RequestError
from delta_selectivity.system.terminal import show

if TYPE_CHECKING:
    from delta_selectivity.scale.spread import Job

TLS = ("tls_ca_file", "tls_cert", "tls_key")


def flags_of_many_workers() -> argparse.ArgumentParser:
    """Build a parser of the flags that main.py does not have."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add = parser.add_argument_group("many workers").add_argument
    add("--workers", type=int, help="processes on this machine (one a GPU; without GPUs, one a core)")
    add("--scheduler", metavar="ADDRESS", help="of a running Dask scheduler, such as tls://10.0.0.7:8786, whose "
        "workers see this folder and the models under the same paths (processes on this machine)")  # fmt: skip
    add("--tls_ca_file", type=Path, metavar="PEM", help="certificate authority of --scheduler tls://...; without these "
        "three as Dask's own configuration says")  # fmt: skip
    add("--tls_cert", type=Path, metavar="PEM", help="certificate that the scheduler accepts")
    add("--tls_key", type=Path, metavar="PEM", help="its key, where the certificate's file does not hold it")
    add("--layers_per_unit", type=int, default=1, help="layers that a worker takes at a time (%(default)s)")
    add("--saes_per_unit", type=int, default=8, help="SAEs that a worker takes at a time: they share the forward pass "
        "and the probes of the model's own activations (%(default)s)")  # fmt: skip
    add("--plan", action="store_true", help="print the units with estimated bytes and seconds, and end")
    add("--config", type=user_path, metavar="SWEEP.toml", help="several requests, as docs/scale.md says; further flags "
        "hold for all of them")  # fmt: skip
    return parser


def own_flags() -> list[str]:
    """Return the names of these flags."""
    return list(flags_of_many_workers()._option_string_actions)


def parse(argv: Sequence[str], prog: str) -> tuple[argparse.Namespace, list[str]]:
    """Return the flags of this command, and the remaining arguments for main.py. Raises `RequestError`."""
    own = flags_of_many_workers()
    if {"-h", "--help"} & set(argv):
        argparse.ArgumentParser(
            prog=prog,
            description="The numbers of main.py by many workers.",
            parents=[build_parser(), own],
            conflict_handler="resolve",
        ).parse_args(["--help"])
    try:
        asked, others = own.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise RequestError(f"{error} (see --help)") from error
    for flag in ("workers", "layers_per_unit", "saes_per_unit"):
        value = getattr(asked, flag)
        if value is not None and value < 1:
            raise RequestError(f"--{flag} must be at least 1, got {value}")
    if asked.scheduler is None and (alone := [name for name in TLS if getattr(asked, name) is not None]):
        raise RequestError(f"--{alone[0]} is for --scheduler tls://...; workers on this machine have keys of their own")
    if asked.scheduler is not None and asked.workers is not None:
        raise RequestError(f"--workers {asked.workers}: a cluster of its own (--scheduler) has the workers it has")
    return asked, others


def check(values: Mapping[str, Any], layers_per_unit: int, saes_per_unit: int) -> Job:
    """Plan one request from configs only. Raises `RequestError` if it is wrong."""
    from delta_selectivity.run.planning import adopt_existing_choices, make_plan
    from delta_selectivity.scale.spread import Job
    from delta_selectivity.scale.units import plan_units

    plan = adopt_existing_choices(make_plan(make_request(values), fetch=False))
    return Job(plan, plan_units(plan, layers_per_unit, saes_per_unit))


def compute(argv: Sequence[str], prog: str, outputs: list[Path]) -> None:
    """Run the command and append the result folders to `outputs`.

    Raises `RequestError` if a request is wrong, other errors if units failed.
    """
    asked, others = parse(argv, prog)
    parser = build_parser(prog)
    parser.elsewhere = tuple(own_flags())
    given = parse_values(others, parser)
    for job in {"task", "list_datasets"} & given.keys():
        raise RequestError(f"{given[job] if job == 'task' else job} is not spread over workers: main.py does that")
    set_log_level(bool(given.get("verbose")))
    show_start(given)
    sweep = None if asked.config is None else Sweep.read(asked.config)
    requests = [given] if sweep is None else [{**request, **given} for request in sweep.requests]
    jobs = [check(values, asked.layers_per_unit, asked.saes_per_unit) for values in requests]
    if asked.plan:
        from delta_selectivity.scale.estimate import render

        show("\n\n".join(render(job.plan, job.units) for job in jobs))
        return
    from delta_selectivity.scale.cluster import Remote
    from delta_selectivity.scale.spread import Workers, measure

    quiet = bool(given.get("quiet"))
    outputs += [job.plan.request.output for job in jobs]
    elsewhere = asked.scheduler is not None and not {"device1", "device2"} & given.keys()
    remote = None if asked.scheduler is None else Remote(asked.scheduler, *(getattr(asked, name) for name in TLS))
    paths = measure(jobs, Workers(asked.workers, remote, elsewhere, quiet))
    if sweep is not None:
        sweep.conclude(paths, quiet)
    elif not quiet:
        from delta_selectivity.reporting import results, tables

        show(f"{tables.render(results.load(paths[0]))}\n\n{where_it_is(outputs[0], prog)}")


def main(argv: Sequence[str], prog: str = "compute_selectivity.py") -> int:
    """Run the command and return its exit code."""
    outputs: list[Path] = []
    return guarded(argv, lambda arguments: compute(arguments, prog, outputs), lambda: what_is_left(outputs))
