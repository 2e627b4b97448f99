"""Compare the CPU kernels that this processor gets with torch's: microseconds per row, one thread.

python -m benchmarks.bench_kernels run    # two minutes
python -m benchmarks.bench_kernels        # print the table of the kept results

- top k: the k largest values of each row (`saes.topk` and `torch.topk`);
- TopK encoder: codes by a proposal in 8-bit integers (`saes.proposal`), and by a float32 product and top k;
- attention: texts in bfloat16, heads of width 64 (`models.attention` and transformers' sdpa); a row is a token;
- block: one of Pythia's, in bfloat16 if that is fast (`models.fused_neox` and transformers' own); a row is a token;
- probes: fits at every C by two threads (`probing.backends.descent_kernels`, against the same loop in torch);
- product: x Wᵀ in float32 (`gemm` and `torch.nn.functional.linear`); equal on Intel CPUs;
- product, bytes: an exact product of signed 8-bit integers (`gemm`), and the same numbers in float32.

Attention is measured where it replaces sdpa, and what multiplies bytes where their products are fast (`processor`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch.nn.functional import linear
from transformers import GPTNeoXConfig, GPTNeoXModel

from benchmarks import bench_probes
from benchmarks.timing import Clock, in_threads, in_turn, parser, show_or_measure
from delta_selectivity.models.attention import attend
from delta_selectivity.models.fused_neox import fuse
from delta_selectivity.probing.backends.torch_dense import DenseColumns
from delta_selectivity.probing.backends.torch_lbfgs import TorchLbfgs
from delta_selectivity.probing.selectivity import DEFAULT_CS
from delta_selectivity.reporting import tables
from delta_selectivity.saes.proposal import Proposal
from delta_selectivity.saes.topk import exact_topk
from delta_selectivity.system import gemm, processor
from delta_selectivity.system.cores import sharing_cores

PROJECT = Path(__file__).resolve().parent.parent

HEADER = ("kernel", "size", "torch, us/row", "ours, us/row", "ratio")
D_HEAD = 64
ROWS_OF_CELLS = 2**22  # matrix entries per measurement; narrow matrices have more rows


@dataclass(frozen=True)
class Pair:
    """One kernel of one size, in both implementations."""

    kernel: str
    size: str
    n_rows: int
    torchs: Callable[[], object]
    ours: Callable[[], object]

    def row(self, repeats: int, clock: Clock) -> tables.Row:
        """Return a row of the table, with medians."""
        seconds = in_turn({"torch": self.torchs, "ours": self.ours}, repeats, clock=clock)
        theirs, ours = (seconds[side] / self.n_rows * 1e6 for side in ("torch", "ours"))
        return (self.kernel, self.size, f"{theirs:.2f}", f"{ours:.2f}", f"{theirs / ours:.1f}x")


def pairs(quick: bool) -> Iterator[Pair]:
    """Yield all kernels at all sizes."""
    for d_sae, k in ((1024, 8),) if quick else ((1024, 8), (1024, 32), (1024, 128), (32768, 32), (32768, 256)):
        yield top_k(d_sae, k)
    bytes_are_fast = processor.has_fast_bytes()
    encoders = ((256, 512, 8), (256, 1024, 8), (256, 1024, 32), (512, 8192, 32), (768, 32768, 32), (768, 32768, 256))
    for d_in, d_sae, k in (encoders[:1] if quick else encoders) if bytes_are_fast else ():
        yield encoder(d_in, d_sae, k)
    texts = ((4, 30), (4, 150), (4, 380), (4, 760), (12, 30), (12, 150), (12, 380), (12, 760))
    for n_heads, n_tokens in (texts[:1] if quick else texts) if processor.has_fast_attention() else ():
        yield attention(n_heads, n_tokens)
    for d, n_tokens in ((64, 30),) if quick else ((256, 100), (256, 300), (512, 300), (768, 300)):
        yield block(d, n_tokens)
    for n_rows, d in ((60, 16),) if quick else ((400, 256), (1500, 256), (3345, 256)):
        yield probes(n_rows, d)
    products = ((25, 256, 3345), (40, 768, 5000), (2048, 768, 3072), (256, 768, 32768))
    for n, d, width in products[:1] if quick else products:
        yield product(n, d, width)
        if bytes_are_fast:
            yield product_of_bytes(n, d, width)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def top_k(d_sae: int, k: int) -> Pair:
    rows = drawn(max(ROWS_OF_CELLS // d_sae, 64), d_sae)
    theirs = partial(torch.topk, rows, k, dim=1, sorted=False)
    return Pair("top k", f"{d_sae}, k {k}", len(rows), theirs, lambda: exact_topk(rows, k))


def encoder(d_in: int, d_sae: int, k: int) -> Pair:
    """Use random weights and inputs, and at least 256 rows at a time, as `saes.sae` does."""
    x, weight, bias = drawn(max(2**20 // d_sae, 256), d_in), drawn(d_sae, d_in), torch.zeros(d_sae)
    proposal = Proposal.of(weight, bias, torch.zeros(d_in), k)
    return Pair(
        "TopK encoder",
        f"{d_in} x {d_sae}, k {k}",
        len(x),
        lambda: exact_topk(linear(x, weight, bias), k),
        lambda: proposal.topk(x),
    )


def attention(n_heads: int, n_tokens: int) -> Pair:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    n_texts = max(2048 // n_tokens, 1)
    query, key, value = drawn(3, n_texts, n_heads, n_tokens, D_HEAD).bfloat16()
    module = SimpleNamespace(is_causal=True)
    theirs, ours = (partial(way, module, query, key, value, None) for way in (sdpa_attention_forward, attend))
    return Pair("attention", f"{n_heads} heads, {n_tokens} tokens", n_texts * n_tokens, theirs, ours)


def block(d: int, n_tokens: int) -> Pair:
    n_texts = max(2048 // n_tokens, 1)
    config = GPTNeoXConfig(hidden_size=d, intermediate_size=4 * d, num_attention_heads=d // D_HEAD, num_hidden_layers=1)
    dtype = torch.bfloat16 if processor.has_fast_bfloat16() else torch.float32
    x = drawn(n_texts, n_tokens, d).to(dtype)
    sides = []
    for is_ours in (False, True):
        decoder = GPTNeoXModel(config).to(dtype).eval().requires_grad_(False)
        if is_ours:
            fuse(decoder, [])
            gemm.use_in(decoder)
        embeddings = decoder.rotary_emb(x, position_ids=torch.arange(n_tokens)[None])
        sides.append(partial(decoder.layers[0], x, position_embeddings=embeddings))
    return Pair("block", f"{n_tokens} tokens, width {d}", n_texts * n_tokens, *sides)


def probes(n_rows: int, d: int) -> Pair:
    problem, solver = bench_probes.draw(n_rows, d, 5, DEFAULT_CS), TorchLbfgs()  # 25 columns, as one probe in a run
    side_by_side = in_threads(lambda: solver.fit(problem), 2)

    def in_torch() -> None:
        with mock.patch.object(DenseColumns, "for_kernel", lambda *_: None):
            side_by_side()

    return Pair("probes, 2 threads", f"{n_rows} x {d}", 2 * n_rows, in_torch, side_by_side)


def product(n_rows: int, d: int, width: int) -> Pair:
    x, weight = drawn(n_rows, d), drawn(width, d)
    theirs, ours = (partial(way, x, weight) for way in (linear, gemm.linear))
    return Pair("product", f"{n_rows} x {d} x {width}", n_rows, theirs, ours)


def product_of_bytes(n_rows: int, d: int, width: int) -> Pair:
    x, weight = (drawn(*shape).mul(32).clamp(-127, 127).round() for shape in ((n_rows, d), (width, d)))
    ours = partial(gemm.byte_products, x.to(torch.int8), weight.to(torch.int8))
    return Pair("product, bytes", f"{n_rows} x {d} x {width}", n_rows, partial(linear, x, weight), ours)


@torch.inference_mode()
def measure(quick: bool, repeats: int, clock: Clock) -> list[tables.Row]:
    """Return the rows of the table, header first."""
    with sharing_cores("cpu"):
        return [HEADER, *(pair.row(repeats, clock) for pair in pairs(quick))]


def main() -> int:
    """Measure, or print the kept results."""
    flags = parser(__doc__)
    flags.set_defaults(repeats=9)
    args = flags.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    print(show_or_measure("bench_kernels", args, lambda: measure(args.quick, args.repeats, clock)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
