"""The command `run`: measures SAEs layer by layer.

    python main.py                 # the bundled demo: tiny-pythia, its SAEs, the Wikidata tasks
    python main.py --help

Slow imports are deferred until they are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from delta_selectivity.cli.guard import describe_saved_results, guarded, set_log_level
from delta_selectivity.cli.program import results_message
from delta_selectivity.system.terminal import show


def run(argv: Sequence[str], prog: str, outputs: list[Path]) -> None:
    """Do one run and append its folder to `outputs`.

    Raises `RequestError` if the request is invalid, other errors if the run fails.
    """
    from delta_selectivity.cli.command_line import parse

    command = parse(argv, prog)
    set_log_level(command.verbose)
    if command.job == "inspect":
        from delta_selectivity.run.inspection import inspect

        for part in inspect(command.request):
            show(part)
    elif command.job == "list":
        from delta_selectivity.tasks import describe_datasets

        show(describe_datasets(command.request.tasks))
    else:
        from delta_selectivity.api.evaluate import evaluate
        from delta_selectivity.reporting import tables

        request = command.request
        outputs.append(request.output)
        results = evaluate(
            request.model,
            request.saes,
            request.tasks,
            layers=request.layers,
            settings=request.settings,
            device=(request.device1, request.device2),
            output=request.output,
            cache=request.cache,
            progress=not command.quiet,
        )
        if not command.quiet:
            show(f"{tables.render(results.files)}\n\n{results_message(request.output, prog)}")


def main(argv: Sequence[str] | None = None, prog: str = "main.py") -> int:
    """Run the command and return its exit code."""
    outputs: list[Path] = []
    return guarded(argv, lambda arguments: run(arguments, prog, outputs), lambda: describe_saved_results(outputs))
