"""Compare the producer with its floor: the same matrix products on the same cores, by the faster of two libraries.

python -m benchmarks.bench_forward run     # Pythia-70M, 160M and 410M with SAEs of 32,768 latents: minutes
python -m benchmarks.bench_forward run --cpu_time    # one worker, CPU seconds: for a machine with other load
python -m benchmarks.bench_forward         # print the table of the kept results

Model and SAE are timed separately, as `activations.Producer` runs them: several whole batches at the same time, one
thread each. The floor of the model excludes attention, norms and activation functions. The floor of the SAE is its
encoder in float32; a value above 100 % means that the program does less work than that (`saes.proposal`). The
producer's texts/s are those of the model with one SAE on every layer.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.shapes import SHAPES, TINY, Shape
from benchmarks.timing import Clock, in_threads, in_turn, parser, show_or_measure
from delta_selectivity.models.language_model import Site, open_model
from delta_selectivity.reporting import tables
from delta_selectivity.run.activations import Block, Producer
from delta_selectivity.run.reconstruction import ALL
from delta_selectivity.run.rows import RowTable
from delta_selectivity.run.token_sample import TokenSample
from delta_selectivity.system import gemm
from delta_selectivity.system.cores import Cores, sharing_cores
from delta_selectivity.system.stopwatch import Stopwatch
from delta_selectivity.tasks import TokenisedMentions

PROJECT = Path(__file__).resolve().parent.parent

TOKENS = 128  # per text, about the median of the Wikidata tasks
FLOOR_ROWS = 256  # rows per product in the SAE's floor: the fastest of 32 .. 1024
Multiply = Callable[[Tensor, Tensor, Tensor], None]  # x, weight, output memory
HEADER = ("shape", "part", "dtype", "texts/s", "GFLOP/s", "floor, GFLOP/s", "of the floor")


@dataclass(frozen=True)
class Setting:
    """How many batches run at the same time, and on which device."""

    device: str
    workers: int  # threads, one batch each
    texts: int  # per batch
    repeats: int
    clock: Clock = time.perf_counter

    def synchronise(self) -> None:
        """Wait for pending operations of the device."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)

    @property
    def tokens(self) -> int:
        """Return the number of tokens that are processed at the same time."""
        return self.workers * self.texts * TOKENS


def measure(shapes: Sequence[Shape], setting: Setting, dtypes: Sequence[str]) -> list[tables.Row]:
    """Return the rows of the table, header first."""
    rows: list[tables.Row] = [HEADER]
    for shape in shapes:
        sae = _sae_seconds(shape, setting)
        for dtype in dtypes:
            model = _model_seconds(shape, setting, dtype)
            rows.append(_row(shape.name, "model", dtype, shape.model_flops, setting, model))
            per_layer = model["ours"] + shape.n_layers * sae["ours"]
            texts = setting.workers * setting.texts / per_layer
            rows.append((shape.name, "producer", dtype, f"{texts:.1f}", "", "", ""))
        rows.append(_row(shape.name, "SAE, one layer", "float32", shape.sae_flops, setting, sae))
    return rows


def _row(name: str, part: str, dtype: str, flops: int, setting: Setting, seconds: dict[str, float]) -> tables.Row:
    rate, floor = (flops * setting.tokens / seconds[side] / 1e9 for side in ("ours", "floor"))
    texts = setting.workers * setting.texts / seconds["ours"]
    share = f"{100 * seconds['floor'] / seconds['ours']:.0f} %"
    return (name, part, dtype, f"{texts:.1f}", f"{rate:.0f}", f"{floor:.0f}", share)


def _model_seconds(shape: Shape, setting: Setting, dtype: str) -> dict[str, float]:
    """Return seconds per batch and worker: of the model with hooks on all layers, and of its matrix products alone."""
    sites = [Site(layer, "resid_post") for layer in range(shape.n_layers)]
    with shape.model_folder() as folder:
        model = open_model(str(folder)).load(sites, setting.device, dtype)
    ids = torch.randint(1, 1000, (setting.texts, TOKENS), generator=torch.Generator().manual_seed(0))
    lengths = torch.full((setting.texts,), TOKENS)
    weights = [module.weight for module in model.module.modules() if isinstance(module, nn.Linear)]
    n_rows, ours = setting.texts * TOKENS, in_threads(lambda: model.token_rows(ids, lengths), setting.workers)
    return _beside_floor(ours, weights, n_rows, n_rows, setting)


def _sae_seconds(shape: Shape, setting: Setting) -> dict[str, float]:
    """Return seconds per batch and worker: of the producer's work at one site, and of the encoder's products alone."""
    sae, site = shape.sae(0, setting.device), Site(0, "resid_post")
    n_texts = setting.workers * setting.texts
    x = torch.randn(setting.texts * TOKENS, shape.d, generator=torch.Generator().manual_seed(1)).to(setting.device)
    last = np.full(n_texts, TOKENS - 1)
    tokenised = TokenisedMentions((np.ones(TOKENS, dtype=np.int32),) * n_texts, last, last, has_bos=False)
    producer = Producer(
        model=_StoredActivations({site: x}, x.device),
        saes={site: {0: sae}},
        counts_bos={0: True},
        tokenised=tokenised,
        rows=RowTable.build(tokenised, "last"),
        batch_size=setting.texts,
        cores=Cores(setting.workers),
        clock=Stopwatch(),
        sample=TokenSample(np.zeros(n_texts, np.uint64), (ALL,)),
        scales={},
    )
    block = Block(np.arange(n_texts), frozenset({0}))
    weight = torch.randn(shape.d_sae, shape.d, device=setting.device)
    n_rows = setting.texts * TOKENS
    rows_at_a_time = FLOOR_ROWS if setting.device == "cpu" else n_rows

    def ours() -> None:
        producer.run([block], lambda item: None, lambda n: None)

    return _beside_floor(ours, [weight], n_rows, rows_at_a_time, setting)


def _products(weights: Sequence[Tensor], n_rows: int, rows_at_a_time: int, multiply: Multiply) -> Callable[[], None]:
    """Return a function that computes x Wᵀ for all weights, with this many rows of x."""
    inputs = {w.shape[1]: torch.randn(n_rows, w.shape[1], dtype=w.dtype, device=w.device) for w in weights}

    @torch.inference_mode()
    def work() -> None:
        outputs = {w.shape[0]: w.new_empty(rows_at_a_time, w.shape[0]) for w in weights}
        for weight in weights:
            for chunk in inputs[weight.shape[1]].split(rows_at_a_time):
                multiply(chunk, weight, outputs[weight.shape[0]][: len(chunk)])

    return work


def _by_torch(x: Tensor, weight: Tensor, there: Tensor) -> None:
    torch.mm(x, weight.T, out=there)


def _by_gemm(x: Tensor, weight: Tensor, _: Tensor) -> None:
    gemm.linear(x, weight)


def _beside_floor(
    ours: Callable[[], None], weights: Sequence[Tensor], n_rows: int, rows_at_a_time: int, setting: Setting
) -> dict[str, float]:
    """Return the seconds of the program, and those of the faster library for the same products."""
    sides = {"ours": ours}
    for multiply in (_by_torch, _by_gemm):
        floor = _products(weights, n_rows, rows_at_a_time, multiply)
        sides[multiply.__name__] = in_threads(floor, setting.workers)
    with sharing_cores(setting.device):
        seconds = in_turn(sides, setting.repeats, setting.synchronise, setting.clock)
    return {"ours": seconds.pop("ours"), "floor": min(seconds.values())}


@dataclass(frozen=True)
class _StoredActivations:
    """A stand-in for a model that returns stored activations."""

    activations: dict[Site, Tensor]
    device: torch.device

    def token_rows(self, ids: Tensor, lengths: Tensor, wanted: Tensor | None = None) -> dict[Site, Tensor]:
        """Return the same activations for every batch, of which all tokens are wanted."""
        return dict(self.activations)

    def restricted_to(self, sites: Collection[Site]) -> _StoredActivations:
        """Return all of them."""
        return self


def main() -> int:
    """Measure on the CPU, or print the kept results."""
    args = parser(__doc__).parse_args()
    texts = 2 if args.quick else 8
    if args.cpu_time:
        setting = Setting("cpu", 1, texts, args.repeats, time.process_time)
    else:
        setting = Setting("cpu", torch.get_num_threads(), texts, args.repeats)
    shapes = (TINY,) if args.quick else SHAPES
    print(show_or_measure("bench_forward", args, lambda: measure(shapes, setting, ("float32", "bfloat16"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
