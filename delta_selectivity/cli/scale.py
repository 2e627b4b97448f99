"""The command `scale`: computes the numbers of main.py with many workers.

    python compute_selectivity.py --workers 2                       # the bundled demo on two processes
    python compute_selectivity.py --plan                            # print units, bytes and seconds; run nothing
    python compute_selectivity.py --scheduler tls://10.0.0.7:8786 --tls_ca_file ca.pem --tls_cert me.pem ...
    python compute_selectivity.py --config sweep.toml               # many requests, in sequence or in parallel

It accepts all flags of main.py, with the same meaning. The request is split into units (a group of layers and a group
of SAEs, see `scale.units`). Workers measure the units with the code of main.py. The results are merged into the same
files that main.py would write. Either program can resume a run of the other. The exit codes are the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delta_selectivity.cli.command_line import build_parser, make_request, parse_values, show_start
from delta_selectivity.cli.guard import describe_saved_results, guarded, set_log_level
from delta_selectivity.cli.parser import user_path
from delta_selectivity.cli.program import results_message
from delta_selectivity.cli.sweep import Sweep
from delta_selectivity.errors import RequestError
from delta_selectivity.system.terminal import show

if TYPE_CHECKING:
    from delta_selectivity.scale.spread import Job

TLS = ("tls_ca_file", "tls_cert", "tls_key")


def scale_parser() -> argparse.ArgumentParser:
    """Build a parser of the flags that main.py does not have."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add = parser.add_argument_group("many workers").add_argument
    add("--workers", type=int, help="processes on this machine (one per GPU; without GPUs, one per core)")
    add("--scheduler", metavar="ADDRESS", help="address of a running Dask scheduler, such as tls://10.0.0.7:8786. Its "
        "workers need this folder and the models under the same paths (processes on this machine)")  # fmt: skip
    add("--tls_ca_file", type=Path, metavar="PEM", help="certificate authority for --scheduler tls://... (the three "
        "--tls flags: Dask's own configuration)")  # fmt: skip
    add("--tls_cert", type=Path, metavar="PEM", help="certificate that the scheduler accepts")
    add("--tls_key", type=Path, metavar="PEM", help="key of the certificate, if it is in another file")
    add("--layers_per_unit", type=int, default=1, help="layers per unit of work (%(default)s)")
    add("--saes_per_unit", type=int, default=8, help="SAEs per unit of work; they share the forward pass and the "
        "probes of the model's own activations (%(default)s)")  # fmt: skip
    add("--plan", action="store_true", help="print the units with estimated bytes and seconds, and exit")
    add("--config", type=user_path, metavar="SWEEP.toml", help="file with several requests (see docs/scale.md); "
        "further flags apply to all of them")  # fmt: skip
    return parser


def scale_flags() -> list[str]:
    """Return the names of the flags that main.py does not have."""
    return list(scale_parser()._option_string_actions)


def parse(argv: Sequence[str], prog: str) -> tuple[argparse.Namespace, list[str]]:
    """Return the flags of this command, and the remaining arguments for main.py. Raises `RequestError`."""
    parser = scale_parser()
    if {"-h", "--help"} & set(argv):
        argparse.ArgumentParser(
            prog=prog,
            description="Compute the numbers of main.py with many workers.",
            parents=[build_parser(), parser],
            conflict_handler="resolve",
        ).parse_args(["--help"])
    try:
        scale_arguments, remaining = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise RequestError(f"{error} (see --help)") from error
    for flag in ("workers", "layers_per_unit", "saes_per_unit"):
        value = getattr(scale_arguments, flag)
        if value is not None and value < 1:
            raise RequestError(f"--{flag} must be at least 1, got {value}")
    if scale_arguments.scheduler is None and (
        tls_flags := [name for name in TLS if getattr(scale_arguments, name) is not None]
    ):
        raise RequestError(
            f"--{tls_flags[0]} is for --scheduler tls://...; workers on this machine create their own keys"
        )
    if scale_arguments.scheduler is not None and scale_arguments.workers is not None:
        raise RequestError(
            f"--workers {scale_arguments.workers}: cannot be combined with --scheduler, which has its own workers"
        )
    return scale_arguments, remaining


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
    scale_arguments, remaining = parse(argv, prog)
    parser = build_parser(prog)
    parser.other_flags = tuple(scale_flags())
    given = parse_values(remaining, parser)
    for job in {"task", "list_datasets"} & given.keys():
        raise RequestError(f"{given[job] if job == 'task' else job} is not spread over workers: main.py does that")
    set_log_level(bool(given.get("verbose")))
    show_start(given)
    sweep = None if scale_arguments.config is None else Sweep.read(scale_arguments.config)
    requests = [given] if sweep is None else [{**request, **given} for request in sweep.requests]
    jobs = [check(values, scale_arguments.layers_per_unit, scale_arguments.saes_per_unit) for values in requests]
    if scale_arguments.plan:
        from delta_selectivity.scale.estimate import render

        show("\n\n".join(render(job.plan, job.units) for job in jobs))
        return
    from delta_selectivity.scale.cluster import Remote
    from delta_selectivity.scale.spread import Workers, measure

    quiet = bool(given.get("quiet"))
    outputs += [job.plan.request.output for job in jobs]
    default_devices = scale_arguments.scheduler is not None and not {"device1", "device2"} & given.keys()
    remote = (
        None
        if scale_arguments.scheduler is None
        else Remote(scale_arguments.scheduler, *(getattr(scale_arguments, name) for name in TLS))
    )
    paths = measure(jobs, Workers(scale_arguments.workers, remote, default_devices, quiet))
    if sweep is not None:
        sweep.report_results(paths, quiet)
    elif not quiet:
        from delta_selectivity.reporting import results, tables

        show(f"{tables.render(results.load(paths[0]))}\n\n{results_message(outputs[0], prog)}")


def main(argv: Sequence[str], prog: str = "compute_selectivity.py") -> int:
    """Run the command and return its exit code."""
    outputs: list[Path] = []
    return guarded(argv, lambda arguments: compute(arguments, prog, outputs), lambda: describe_saved_results(outputs))
