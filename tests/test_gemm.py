"""Products by either library agree to rounding for all strides; other products use torch."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from delta_selectivity.system import gemm

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(params=[True, False], ids=["oneDNN", "MKL"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(gemm, "prefers_onednn", lambda: request.param)
    return bool(request.param)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", [(1,), (40,), (3, 5), (0,)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_product_agrees_with_float64(either, shape, with_bias):
    x, weight, bias = drawn(*shape, 65), drawn(130, 65), drawn(130) if with_bias else None
    expected = linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(gemm.linear(x, weight, bias).double(), expected, atol=3e-5, rtol=0)


def test_strides_do_not_matter(either):
    x, weight = drawn(65, 400).T, drawn(200, 130)
    for w in (weight[:65].T, weight.T[:, :65], weight[:65, ::2].T, weight[::2, :65]):
        torch.testing.assert_close(gemm.linear(x, w).double(), x.double() @ w.double().T, atol=3e-5, rtol=0)
        torch.testing.assert_close(gemm.linear(x[::3], w).double(), x[::3].double() @ w.double().T, atol=3e-5, rtol=0)


@pytest.mark.usefixtures("onednn_bfloat16")
def test_a_bfloat16_product_agrees_with_torch(either):
    x, weight, bias = (drawn(*shape).bfloat16() for shape in ((2, 9, 65), (130, 65), (130,)))
    expected = linear(x.double(), weight.double(), bias.double())
    for found in (gemm.linear(x, weight, bias), linear(x, weight, bias)):
        assert found.dtype == torch.bfloat16
        assert ((found - expected).abs() <= 2**-8 * expected.abs() + 1e-5).all(), "the sum, rounded once"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_precisions_use_torch(either, dtype):
    x, weight = drawn(9, 65).to(dtype), drawn(130, 65).to(dtype)
    assert torch.equal(gemm.linear(x, weight), linear(x, weight))


def test_the_bits_of_a_row_do_not_depend_on_its_place(either):
    """Otherwise a cache, or a run that is resumed, would change numbers: OpenBLAS rounds by the place."""
    x, weight = drawn(1, 65).expand(50, -1), drawn(130, 65)
    found = gemm.linear(x, weight)
    assert (found == found[0]).all() and found[:20].equal(gemm.linear(x[:20], weight))


def test_nan_stays_in_its_row(either):
    x = drawn(5, 65)
    x[3, 7] = torch.nan
    assert gemm.linear(x, drawn(130, 65)).isnan().all(dim=1).tolist() == [False, False, False, True, False]


def test_the_models_linear_layers_use_gemm(either):
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Linear(65, 130), nn.Tanh(), Own(130, 20), nn.Linear(20, 20, bias=False))
    x, parts = drawn(7, 65), list(model)
    expected = model(x)
    gemm.use_in(model)
    assert list(model) == parts and type(model[2]) is Own
    assert isinstance(model[0], nn.Linear) and (type(model[0]) is not nn.Linear) == either
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=0)
    assert {name for name, _ in model.named_parameters()} == {"0.weight", "0.bias", "2.weight", "2.bias", "3.weight"}


SHORT_OF_MEMORY = """
import resource, torch
from delta_selectivity.system import gemm
from delta_selectivity.system.out_of_memory import is_out_of_memory
gemm.prefers_onednn = lambda: True
torch.set_num_threads(1)
x = torch.randn(3000, 3000)
gemm.linear(x[:64, :64], x[:64, :64])
failed = 0
for megabytes in (1, 36, 40, 50, 60):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + megabytes * 2**20, -1))
    for width in (3000, 2000, 1234):
        try:
            gemm.linear(x[:, :width], x[:, :width])
        except RuntimeError as error:
            failed += 1
            assert is_out_of_memory(error), error
    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
assert failed
"""


def test_out_of_memory_in_a_product_is_recognised():
    done = subprocess.run([sys.executable, "-c", SHORT_OF_MEMORY], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("exact_bytes")
@pytest.mark.parametrize("shape", [(1, 7, 3), (5, 64, 1027), (300, 256, 512), (0, 8, 8)])
def test_products_of_bytes_are_exact(shape):
    n, d, m = shape
    x, weight = torch.randint(-127, 128, (n, d)), torch.randint(-127, 128, (m, d))
    found = gemm.byte_products(x.to(torch.int8), weight.to(torch.int8))
    assert (found == (x @ weight.T).numpy()).all()


@pytest.mark.usefixtures("exact_bytes")
def test_the_largest_bytes_do_not_overflow():
    ones = torch.full((2, 2**16), 127, dtype=torch.int8)
    assert (
        gemm.byte_products(ones, torch.cat([ones, -ones])) == [2 * [127**2 * 2**16] + 2 * [-(127**2) * 2**16]] * 2
    ).all()


def test_products_of_bytes_use_their_own_thread():
    kinds = [torch.full((4, 8), value, dtype=torch.int8) for value in (1, 2)]
    mine = gemm.byte_products(kinds[0], kinds[0])
    with ThreadPoolExecutor(1) as other:
        theirs = other.submit(gemm.byte_products, kinds[1], kinds[1]).result()
    assert (mine == 8).all()
    assert (theirs == 32).all()
