"""Measure what needs GPUs: the producer compared with its floor, and the whole job on one GPU and on two.

python -m benchmarks.bench_gpu run      # about ten minutes on a fast GPU; exit code 2 without a CUDA device
python -m benchmarks.bench_gpu          # print the tables of the kept results

To report results of another machine, send the output of `run` and the two files that it writes next to this one. The
first table is that of `benchmarks/bench_forward.py`, with batches that fill the GPU. The second has the stages of
`main.py` on all Wikidata tasks, with a random model of Pythia-160M's shape and random SAEs of 32,768 latents on every
layer: with all tokens and with a sample in the whole-text figures, on one GPU and, if there are two, on both, with
torch's probes and, if it is installed, with cuML's. It also has the arithmetic of the products over all tokens, to
compare with the rates of the first table.
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

TEXTS = 256  # per forward pass
WHOLE_JOB = SHAPES[1]


def machine() -> str:
    """Describe the GPUs and the CPU."""
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = ", ".join(f"{card.name} ({card.total_memory / 2**30:.0f} GiB)" for card in cards)
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, cuML {installed_version('cuml-cu13')}"
    return f"{names}; {versions}; {platform.platform()}; {processor.describe()}"


def settings() -> dict[str, list[str]]:
    """Return the flags of each configuration that this machine can run, by its name in the table."""
    one = ["--device1", "cuda:0", "--device2", "cuda:0"]
    ways = {"one card, all tokens": [*one, "--whole_tokens", "all"], "one card": one}
    if torch.cuda.device_count() > 1:
        ways["two cards"] = ["--device1", "cuda:0", "--device2", "cuda:1"]
    solvers = ["torch", "cuml"] if find_spec("cuml") is not None else ["torch"]
    return {f"{name}, {solver}": [*flags, "--probe", solver] for name, flags in ways.items() for solver in solvers}


def whole_jobs(shape: Shape, ways: Mapping[str, Sequence[str]]) -> list[tables.Row]:
    """Return a row for each stage and a column for each configuration."""
    columns = {name: {row[0]: row[1] for row in whole_job(shape, flags)[1:]} for name, flags in ways.items()}
    products = teraflops(shape)
    stages = list(next(iter(columns.values())))
    rows: list[tables.Row] = [("stage", *columns, "matrix products of all tokens, TFLOP")]
    return rows + [(stage, *(of[stage] for of in columns.values()), products.get(stage, "")) for stage in stages]


def whole_job(shape: Shape, flags: Sequence[str]) -> list[tables.Row]:
    """Return the header, the stages of `main.py` with their seconds, and the wall-clock time."""
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
    """Return the teraflops of the weights' products over every token of the Wikidata texts, by stage."""
    info = open_model(str(MODEL))
    mentions = load_probe_texts(None).mentions
    tokenised = tokenise(mentions, info.tokenizer, prepend_bos=True, max_length=info.max_length)
    tokens = sum(len(ids) for ids in tokenised.ids)
    flops = {"forward": shape.model_flops, "sae": shape.sae_flops * shape.n_layers}
    return {stage: f"{tokens * each / 1e12:.1f}" for stage, each in flops.items()}


def measure(shapes: tuple[Shape, ...], repeats: int) -> list[tables.Row]:
    """Return the first table."""
    setting = bench_forward.Setting("cuda:0", workers=1, texts=TEXTS, repeats=repeats)
    return bench_forward.measure(shapes, setting, ("float32", "bfloat16"))


def main() -> int:
    """Print or measure both tables; return exit code 2 if there is no CUDA device to measure."""
    args = timing.parser(__doc__).parse_args()
    if (args.what == "run" or args.quick) and not torch.cuda.is_available():
        print("bench_gpu: no CUDA device here", file=sys.stderr)
        return 2
    shapes, job = ((TINY,), TINY) if args.quick else (SHAPES, WHOLE_JOB)
    more = ["--shuffle_select_n", "200"] if args.quick else []
    if args.what == "run":
        print(machine(), end="\n\n")
    print(timing.show_or_measure("bench_gpu", args, lambda: measure(shapes, args.repeats)), end="\n\n")
    ways = {name: [*flags, *more] for name, flags in settings().items()}
    print(timing.show_or_measure("bench_gpu_job", args, lambda: whole_jobs(job, ways)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
