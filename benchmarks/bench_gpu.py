"""The producer beside its floor, and the whole job at Pythia-160M's shape, on one CUDA device.

python benchmarks/bench_gpu.py run      # exit 2 where there is no CUDA device
python benchmarks/bench_gpu.py          # the tables, from what `run` kept

First the table of `benchmarks/bench_forward.py`, with batches that fill the card. Then `main.py` on all Wikidata tasks
with a random model and random SAEs of 32,768 latents on every layer, both devices on the one card: the seconds of its
stages as the host saw them, and the arithmetic in their matrix products, which the first table's floors are rates of.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import bench_forward, timing
from benchmarks.bundled import MODEL
from benchmarks.shapes import SHAPES, TINY, Shape
from delta_selectivity.models.language_model import open_model
from delta_selectivity.reporting import tables
from delta_selectivity.tasks import load_probe_texts, tokenise

PROJECT = Path(__file__).resolve().parent.parent

TEXTS = 256  # in a forward pass
WHOLE_JOB = SHAPES[1]


def whole_job(shape: Shape, device: str, flags: list[str]) -> list[tables.Row]:
    """Header, the stages of `main.py`, and its wall clock."""
    with tempfile.TemporaryDirectory(prefix="delta-selectivity-") as name, shape.model_folder() as model:
        saes, out = Path(name) / "saes", Path(name) / "out"
        shape.write_saes(saes)
        command = [
            sys.executable, str(PROJECT / "main.py"), "--quiet", "--force", "--overwrite", "--model_name", str(model),
            "--sae_name", str(saes), "--device1", device, "--device2", device, "--output_directory", str(out),
        ]  # fmt: skip
        start = time.perf_counter()
        subprocess.run([*command, *flags], check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        runs = [json.loads(path.read_text(encoding="utf-8"))["_run"] for path in out.glob("*.json")]
        stages = max((run["seconds"] for run in runs), key=lambda found: found["total"])
    products = teraflops(shape)
    rows: list[tables.Row] = [("whole job", "seconds", "matrix products, TFLOP")]
    rows += [(stage, f"{spent:.1f}", products.get(stage, "")) for stage, spent in stages.items() if stage != "total"]
    return [*rows, ("from start to end", f"{seconds:.1f}", "")]


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
    flags = ["--shuffle_select_n", "200"] if asked.quick else []
    print(timing.answer("bench_gpu", asked, lambda: measure(shapes, asked.repeats)), end="\n\n")
    print(timing.answer("bench_gpu_job", asked, lambda: whole_job(job, "cuda:0", flags)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
