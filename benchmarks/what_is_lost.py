"""Tables of docs/findings.md: what SAEs lose, by concept, and where FVU does not show it.

python -m benchmarks.what_is_lost results/smollm2 concepts     # print the tables, from result files of main.py
python -m scripts.update_tables docs/findings.md               # update the document
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from delta_selectivity.errors import RequestError
from delta_selectivity.reporting import results as report_files

KNOWN = 0.7  # model_sel above which a concept counts as known
Lines = Sequence[Mapping[str, Any]]  # of `report_files.lines`


def short(line: Mapping[str, Any]) -> str:
    """Return the last folder of an SAE's name; for `untrained`, with that of the SAE that it is compared with."""
    return Path(str(line["sae"])).name


def concepts(lines: Lines) -> list[list[str]]:
    """Return rows of probes at a layer, largest losses first, and columns of transfer_r2 by SAE."""
    trained = [line for line in lines if line["baseline"] is None]
    saes = list(dict.fromkeys(short(line) for line in trained))
    by_cell: dict[tuple[int, str], dict[str, Mapping[str, Any]]] = {}
    for line in trained:
        by_cell.setdefault((line["layer"], line["probe"]), {})[short(line)] = line

    def kept(cell: tuple[int, str]) -> float:
        return statistics.fmean(line["transfer_r2"] for line in by_cell[cell].values())

    rows = [["layer", "probe", "model_sel", *(f"survives, {sae} (delta_sel)" for sae in saes)]]
    for cell in sorted(by_cell, key=lambda cell: (cell[0], kept(cell))):
        of_sae = by_cell[cell]
        shown = [
            f"{of_sae[sae]['transfer_r2']:.3f} ({of_sae[sae]['delta_sel']:+.3f})" if sae in of_sae else ""
            for sae in saes
        ]
        rows.append([str(cell[0]), cell[1], f"{next(iter(of_sae.values()))['model_sel']:.3f}", *shown])
    return rows


def saes(lines: Lines) -> list[list[str]]:
    """Return rows of SAEs at a layer, by L0, with baselines below: means over the probes that the model knows."""
    known = [line for line in lines if line["model_sel"] > KNOWN]
    groups: dict[tuple[int, bool, str], list[Mapping[str, Any]]] = {}
    for line in known:
        groups.setdefault((line["layer"], line["baseline"] is not None, short(line)), []).append(line)
    errors = ("fvu_pos", "fvu_whole", "fvu_ordinary")
    ends = ("least survives", "most survives")
    rows = [["layer", "SAE", "L0", *errors, "probes", "survives", "delta_sel", *ends]]
    for (layer, _, name), of_sae in sorted(groups.items(), key=lambda group: (*group[0][:2], group[1][0]["l0"])):
        by_kept = sorted(of_sae, key=lambda line: line["transfer_r2"])
        shown = [f"{_mean(of_sae, 'l0'):.0f}", *(f"{_mean(of_sae, error):.3f}" for error in errors), str(len(of_sae))]
        shown += [f"{_mean(of_sae, 'transfer_r2'):.3f}", f"{_mean(of_sae, 'delta_sel'):+.4f}"]
        shown += [f"{end['transfer_r2']:.3f} ({end['probe']})" for end in (by_kept[0], by_kept[-1])]
        rows.append([str(layer), name, *shown])
    return rows


def _mean(lines: Lines, key: str) -> float:
    return statistics.fmean(line[key] for line in lines)


TABLES: dict[str, Callable[[Lines], list[list[str]]]] = {"concepts": concepts, "saes": saes}


def main() -> int:
    """Print one of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of result files")
    parser.add_argument("table", choices=TABLES)
    args = parser.parse_args()
    try:
        lines = report_files.lines(report_files.load(report_files.result_files(args.folder)))
    except RequestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    head, *rows = TABLES[args.table](lines)
    print("\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
