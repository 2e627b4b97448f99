"""Estimate the evaluation of all SAEs of Gemma Scope: units, bytes, hours and cost on 8 and on 64 GPUs.

    python -m benchmarks.gemma_scope            # print the table
    python -m benchmarks.gemma_scope simulated  # the same by a simulation of workers that share one storage

The SAEs are those of SAE Lens's list of releases (`canonical` names are aliases and not counted); the widths of the
models are those of their configs. A unit is one layer of one hook point with as many SAEs as fit into `MEMORY`.
docs/scale.md says what was measured and what is assumed.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import yaml

from benchmarks.scale_simulation import Task, simulate
from delta_selectivity.reporting.tables import Row, aligned
from delta_selectivity.scale.estimate import Rates, Shape, cost

PROJECT = Path(__file__).resolve().parent.parent

RELEASE = re.compile(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)$")
SAE_ID = re.compile(r"(?:layer_(?P<layer>\d+)|embedding)/width_(?P<width>\d+)(?P<unit>[km])/")

GPU = Rates(forward=3.0e14, sae=2.0e13, probe=3.3e9, start=20.0)
"""Assumptions for an H100: 30 % of its bfloat16 peak for the model and 30 % of its float32 peak for the SAEs; probes
about fifty times as fast as on a CPU core; 20 s to read texts and tokens, build the model and start kernels.
"""
MEMORY = 60e9  # bytes that weights and rows may use, on a GPU of 80 GB
PRICE = 2.50  # dollars per GPU hour
STORAGE = 2e9  # bytes per second, shared by all workers
TEXTS, TOKENS_PER_TEXT, CELLS = (
    12_403,
    116,
    22_935 * 25,
)  # the five datasets; number of rows, summed over probes x folds x partitions


@dataclass(frozen=True)
class Model:
    """A Gemma 2 model."""

    d_model: int
    d_att: int  # width of the input of attention SAEs: heads x head dimension
    d_mlp: int
    n_layers: int
    vocabulary: int = 256_000

    @property
    def layer_weights(self) -> int:
        """Return the number of weights of a layer: gated MLP, and attention with grouped queries."""
        return 3 * self.d_model * self.d_mlp + 3 * self.d_model * self.d_att


MODELS = {
    "2b": Model(2304, 2048, 9216, 26),
    "9b": Model(3584, 4096, 14336, 42),
    "27b": Model(4608, 4096, 36864, 46),
}


@dataclass(frozen=True)
class Listed:
    """One SAE of the list."""

    size: str  # of the model
    base: str  # pt or it: trained on activations of the pretrained or of the instruction-tuned model
    place: str  # res, mlp, att, transcoders
    layer: int  # -1: the embedding
    d_sae: int


def listed() -> list[Listed]:
    """Return every SAE of Gemma Scope in SAE Lens's list."""
    package = find_spec("sae_lens")
    assert package is not None and package.submodule_search_locations is not None
    text = (Path(package.submodule_search_locations[0]) / "pretrained_saes.yaml").read_text(encoding="utf-8")
    saes = []
    for release, content in yaml.load(text, yaml.CSafeLoader).items():  # ten times as fast as without C
        name = RELEASE.match(release)
        for entry in content["saes"] if name else ():
            sae = SAE_ID.match(entry["id"])
            assert name and sae, entry["id"]
            said = int(sae["width"]) * (1e3 if sae["unit"] == "k" else 1e6)
            d_sae = 2 ** round(math.log2(said))  # 131k is 2^17
            saes.append(Listed(name[1], name[2], name[3], int(sae["layer"] or -1), d_sae))
    return saes


def work(saes: Sequence[Listed]) -> Iterator[tuple[str, int, int, float]]:
    """Return the units: model, SAEs, bytes to read, seconds on one GPU."""
    groups: dict[tuple[str, str, str, int], list[Listed]] = {}
    for sae in saes:
        groups.setdefault((sae.size, sae.base, sae.place, sae.layer), []).append(sae)
    for (size, _, place, layer), group in sorted(groups.items()):
        model = MODELS[size]
        d = model.d_att if place == "att" else model.d_model
        for part in _that_fit(group, d, model, layer):
            estimate = cost(_shape(part, d, model, layer), GPU)
            yield size, len(part), estimate.model_bytes + estimate.sae_bytes, estimate.seconds


def _that_fit(group: Sequence[Listed], d: int, model: Model, layer: int) -> list[list[Listed]]:
    parts: list[list[Listed]] = [[]]
    for sae in sorted(group, key=lambda sae: sae.d_sae):
        if parts[-1] and cost(_shape([*parts[-1], sae], d, model, layer), GPU).total_bytes > MEMORY:
            parts.append([])
        parts[-1].append(sae)
    return parts


def _shape(saes: Sequence[Listed], d: int, model: Model, layer: int) -> Shape:
    n_layers = layer + 1
    equivalent = n_layers * model.layer_weights / (12 * model.d_model**2)  # `cost` counts 12 d² a layer
    return Shape(
        tokens=TEXTS * TOKENS_PER_TEXT,
        rows=TEXTS,
        cells=CELLS,
        d_model=model.d_model,
        n_layers=round(equivalent),
        n_sites=1,
        sae_sizes=tuple((d, sae.d_sae, d) for sae in saes),
        dtype_bytes=2,
        vocabulary=model.vocabulary,
    )


def on_paper() -> str:
    """Return the totals, and the estimates without any waiting time."""
    units = list(work(listed()))
    rows: list[Row] = [("model", "SAEs", "units", "to read", "GPU hours", "8 GPUs", "64 GPUs", "dollars")]
    for size in (*MODELS, "all"):
        own = [unit for unit in units if size in (unit[0], "all")]
        hours = sum(unit[3] for unit in own) / 3600
        rows.append(
            (f"Gemma 2 {size}", f"{sum(unit[1] for unit in own)}", f"{len(own)}",
             f"{sum(unit[2] for unit in own) / 1e12:.2f} TB", f"{hours:.1f}", f"{hours / 8:.1f} h",
             f"{hours / 64:.2f} h", f"{hours * PRICE:.0f}")
        )  # fmt: skip
    return aligned(rows)


def simulated() -> str:
    """Simulate all units on workers that share a storage, at three speeds."""
    tasks = [Task(nbytes, seconds) for _, _, nbytes, seconds in work(listed())]
    rows: list[Row] = [("GPUs", "storage, GB/s", "hours", "computing", "reading", "idle", "dollars")]
    for n_workers in (8, 64):
        for speed in (STORAGE / 4, STORAGE, STORAGE * 10):
            found = simulate(tasks, n_workers, speed)
            idle = 1 - found.computing - found.reading
            rows.append(
                (f"{n_workers}", f"{speed / 1e9:.1f}", f"{found.seconds / 3600:.2f}", f"{found.computing:.0%}",
                 f"{found.reading:.0%}", f"{idle:.0%}", f"{n_workers * found.seconds / 3600 * PRICE:.0f}")
            )  # fmt: skip
    return aligned(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["simulated"])
    print(simulated() if parser.parse_args().what == "simulated" else on_paper())
