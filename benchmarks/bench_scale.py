"""Measure the cost of a unit on this machine, and the gain of a second process (docs/scale.md).

python -m benchmarks.bench_scale run          # both measurements, about ten minutes; kept in a file beside this one
python -m benchmarks.bench_scale run --copies 1 --rounds 1      # fewer pairs, for a quick look
python -m benchmarks.bench_scale rates        # print the table of rates; `scale.estimate` uses the same rates
python -m benchmarks.bench_scale processes    # print the table of processes

*Rates*: the stages of `main.py` on layer 1 of the bundled model, all data, one thread, divided by their arithmetic.
*Processes*: sixty (SAE, layer) pairs (the bundled SAEs under five names each, on six layers), one unit each, on
politics, by one process and by two, in turn. The probe stage is the time that the busiest process spends on fitting and
testing probes.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from delta_selectivity.cli.command_line import DEMO_SAES, parse
from delta_selectivity.records.result_file import read, write_json
from delta_selectivity.reporting.tables import Row, aligned
from delta_selectivity.run.measure import measure
from delta_selectivity.run.planning import make_plan, missing_cells, open_files
from delta_selectivity.scale.cluster import open_cluster
from delta_selectivity.scale.estimate import CPU_CORE, shape_of
from delta_selectivity.scale.schedule import outcomes
from delta_selectivity.scale.units import Unit, plan_units

PROJECT = Path(__file__).resolve().parent.parent

KEPT = Path(__file__).resolve().with_suffix("") / "measured.json"
CPU = ["--device1", "cpu", "--device2", "cpu", "--quiet"]
SMALL = ["--datasets", "politics", "--shuffle_select_n", "300"]
STAGES = {"model": ("forward",), "SAEs": ("sae",), "probes": ("probes", "statistics"), "start": ("tokenise", "load")}


def measure_rates(folder: Path) -> dict[str, float]:
    """Return FLOP and probe rows per second of one core, and the seconds to start."""
    import torch

    torch.set_num_threads(1)
    plan = make_plan(parse([*CPU, "--layers", "1", "--output_directory", str(folder)]).request, fetch=False)
    (unit,) = plan_units(plan, 1, 8)
    begin = time.perf_counter()
    with ExitStack() as held:
        own = make_plan(unit.request)
        files = open_files(own, held)
        opening = time.perf_counter() - begin
        measure(own, files, missing_cells(own, files))
    shape = shape_of(plan, unit)
    spent = {name: sum(stage_seconds(unit).get(stage, 0.0) for stage in STAGES[name]) for name in STAGES}
    views = shape.n_sites * shape.d_model + sum(d_out for _, _, d_out in shape.sae_sizes)
    return {
        "forward": 2 * shape.tokens * 12 * shape.d_model**2 * shape.n_layers / spent["model"],
        "sae": sum(2 * shape.tokens * d_in * d_sae for d_in, d_sae, _ in shape.sae_sizes) / spent["SAEs"],
        "probe": shape.cells * views / spent["probes"],
        "start": opening + spent["start"],
    }


def stage_seconds(unit: Unit) -> Mapping[str, float]:
    """Return the seconds of a unit by stage, from the last file that it wrote."""
    runs = [read(path)["_run"]["seconds"] for path in unit.folder.glob("**/*.json")]
    return max(runs, key=lambda seconds: seconds["total"])


def measure_processes(folder: Path, n_processes: int, copies: int) -> dict[str, float]:
    """Measure all pairs with this many processes; return total seconds, and those of the busiest process in probes."""
    saes = [folder / f"{sae.name}-{copy}" for sae in DEMO_SAES for copy in range(copies)]
    for sae, copied in zip((sae for sae in DEMO_SAES for _ in range(copies)), saes, strict=True):
        shutil.copytree(sae, copied, dirs_exist_ok=True)
    out = folder / f"out_{n_processes}"
    shutil.rmtree(out, ignore_errors=True)
    args = parse([*CPU, *SMALL, "--sae_name", ",".join(map(str, saes)), "--output_directory", str(out)])
    units = plan_units(make_plan(args.request, fetch=False), 1, 1)
    with open_cluster(n_processes, 0, None) as client:
        return _run(client, units)


def _run(client: Any, units: Sequence[Unit]) -> dict[str, float]:
    client.wait_for_workers(len(client.scheduler_info(n_workers=-1)["workers"]))
    begin = time.perf_counter()
    probing: dict[int, float] = {}
    for unit, outcome in outcomes(client, units, Path.cwd(), own_device=False):
        if outcome.status != "done":
            raise RuntimeError(f"{unit.id}: {outcome.line}")
        spent = stage_seconds(unit)
        probing[outcome.process] = probing.get(outcome.process, 0.0) + spent["probes"] + spent["statistics"]
    return {"units": len(units), "seconds": time.perf_counter() - begin, "probes": max(probing.values())}


def run(copies: int, rounds: int) -> None:
    """Measure, and keep the figures."""
    logging.basicConfig(level=logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rates = measure_rates(folder / "rates")
        measured = [{str(n): measure_processes(folder, n, copies) for n in (1, 2)} for _ in range(rounds)]
    KEPT.parent.mkdir(exist_ok=True)
    write_json(KEPT, {"rates": rates, "rounds": measured})


def rates_table() -> str:
    """Return the measured rates, and those that the estimates use."""
    found = json.loads(KEPT.read_text())["rates"]
    rows: list[Row] = [("rate of one core", "measured", "in scale/estimate.py")]
    for name, what, unit in (
        ("forward", "model, FLOP/s", 1e9), ("sae", "SAEs' encoders, FLOP/s", 1e9),
        ("probe", "probes, rows x d x folds x probes /s", 1e6), ("start", "start of a unit, s", 1.0),
    ):  # fmt: skip
        suffix = {1e9: " G", 1e6: " M", 1.0: ""}[unit]
        rows.append((what, *(f"{value / unit:.1f}{suffix}" for value in (found[name], getattr(CPU_CORE, name)))))
    return aligned(rows)


def processes_table() -> str:
    """Compare two processes with one, round by round."""
    rows: list[Row] = [
        ("round", "pairs", "one process, s", "two, s", "ratio", "probes of one, s", "of two, s", "ratio")
    ]
    for place, both in enumerate(json.loads(KEPT.read_text())["rounds"], 1):
        one, two = both["1"], both["2"]
        cells = [f"{place}", f"{one['units']}"]
        for what in ("seconds", "probes"):
            cells += [f"{one[what]:.0f}", f"{two[what]:.0f}", f"{two[what] / one[what]:.2f}"]
        rows.append(tuple(cells))
    return aligned(rows)


def main() -> None:
    """Run or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "rates", "processes"])
    parser.add_argument("--copies", type=int, default=5, help="of each bundled SAE: 12 pairs each (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="of one process and of two, in turn (%(default)s)")
    args = parser.parse_args()
    if args.what == "run":
        run(args.copies, args.rounds)
    else:
        sys.stdout.write((rates_table() if args.what == "rates" else processes_table()) + "\n")


if __name__ == "__main__":
    main()
