"""What only a machine with GPUs can show: the producer beside its floor, and the whole job on one card and on two.

python benchmarks/bench_gpu.py run      # exit 2 where there is no CUDA device; some ten minutes on a fast card
python benchmarks/bench_gpu.py          # the tables, from what `run` kept

First the machine: whoever has GPUs sends all that `run` prints, and the two files that it keeps beside this one. Then
the table of `benchmarks/bench_forward.py`, with batches that fill the card. Then `main.py` on all Wikidata tasks with a
random model of Pythia-160M's shape and random SAEs of 32,768 latents on every layer: the seconds of its stages as the
host saw them, with all tokens in the whole-text figures and with a sample, on one card and, where there are two, on
both; by torch's probes and, where it is installed, by cuML's. Beside them the arithmetic of all tokens' products, which
the first table's floors are rates of.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import bench_forward, timing
from benchmarks.bundled import MODEL
from benchmarks.shapes import SHAPES, TINY, Shape
from delta_selectivity.models.language_model import open_model
from delta_selectivity.reporting import tables
from delta_selectivity.system import processor
from delta_selectivity.system.provenance import installed_version
from delta_selectivity.tasks import load_probe_texts, tokenise

PROJECT = Path(__file__).resolve().parent.parent

TEXTS = 256  # in a forward pass
WHOLE_JOB = SHAPES[1]


def machine() -> str:
    """The cards, and what computes on them."""
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = ", ".join(f"{card.name} ({card.total_memory / 2**30:.0f} GiB)" for card in cards)
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuML {installed_version('cuml-cu13')}"
    return f"{names}; {versions}; {platform.platform()}; {processor.describe()}"


def settings() -> dict[str, list[str]]:
    """The ways to run the job that this machine has, by what they are called in the table."""
    one = ["--device1", "cuda:0", "--device2", "cuda:0"]
    ways = {"one card, all tokens": [*one, "--whole_tokens", "all"], "one card": one}
    if torch.cuda.device_count() > 1:
        ways["two cards"] = ["--device1", "cuda:0", "--device2", "cuda:1"]
    solvers = ["torch", "cuml"] if find_spec("cuml") is not None else ["torch"]
    return {f"{name}, {solver}": [*flags, "--probe", solver] for name, flags in ways.items() for solver in solvers}


def whole_jobs(shape: Shape, ways: Mapping[str, Sequence[str]]) -> list[tables.Row]:
    """A row for each stage, a column for each way to run the job."""
    columns = {name: {row[0]: row[1] for row in whole_job(shape, flags)[1:]} for name, flags in ways.items()}
    products = teraflops(shape)
    stages = list(next(iter(columns.values())))
    rows: list[tables.Row] = [("stage", *columns, "matrix products of all tokens, TFLOP")]
    return rows + [(stage, *(of[stage] for of in columns.values()), products.get(stage, "")) for stage in stages]


def whole_job(shape: Shape, flags: Sequence[str]) -> list[tables.Row]:
    """Header, the stages of `main.py` with their seconds, and its wall clock."""
    with tempfile.TemporaryDirectory(prefix="delta-selectivity-") as name, shape.model_folder() as model:
        saes, out = Path(name) / "saes", Path(name) / "out"
        shape.write_saes(saes)
        command = [
            sys.executable, str(PROJECT / "main.py"), "--quiet", "--force", "--overwrite", "--model_name", str(model),
            "--sae_name", str(saes), "--output_directory", str(out),
        ]  # fmt: skip
        start = time.perf_counter()
        subprocess.run([*command, *flags], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        runs = [json.loads(path.read_text(encoding="utf-8"))["_run"] for path in out.glob("*.json")]
        stages = max((run["seconds"] for run in runs), key=lambda found: found["total"])
    rows: list[tables.Row] = [("whole job", "seconds")]
    rows += [(stage, f"{spent:.1f}") for stage, spent in stages.items() if stage != "total"]
    return [*rows, ("from start to end", f"{seconds:.1f}")]


def teraflops(shape: Shape) -> dict[str, str]:
    """Of the weights' products over every token of the Wikidata texts, by stage."""
    info = open_model(str(MODEL))
    mentions = load_probe_texts(None).mentions
    tokenised = tokenise(mentions, info.tokenizer, prepend_bos=True, max_length=info.max_length)
    tokens = sum(len(ids) for ids in tokenised.ids)
    flops = {"forward": shape.model_flops, "sae": shape.sae_flops * shape.n_layers}
    return {stage: f"{tokens * each / 1e12:.1f}" for stage, each in flops.items()}


def measure(shapes: tuple[Shape, ...], repeats: int) -> list[tables.Row]:
    """The first table."""
    setting = bench_forward.Setting("cuda:0", workers=1, texts=TEXTS, repeats=repeats)
    return bench_forward.measure(shapes, setting, ("float32", "bfloat16"))


def main() -> int:
    """Both tables; 2 where there is no CUDA device to measure."""
    asked = timing.parser(__doc__).parse_args()
    if (asked.what == "run" or asked.quick) and not torch.cuda.is_available():
        print("bench_gpu: no CUDA device here", file=sys.stderr)
        return 2
    shapes, job = ((TINY,), TINY) if asked.quick else (SHAPES, WHOLE_JOB)
    more = ["--shuffle_select_n", "200"] if asked.quick else []
    if asked.what == "run":
        print(machine(), end="\n\n")
    print(timing.answer("bench_gpu", asked, lambda: measure(shapes, asked.repeats)), end="\n\n")
    ways = {name: [*flags, *more] for name, flags in settings().items()}
    print(timing.answer("bench_gpu_job", asked, lambda: whole_jobs(job, ways)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
