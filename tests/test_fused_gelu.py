"""GELU fused into the product before it: as close to float32 as torch's own, and not where a tap reads in between."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from delta_selectivity.models import fused_gelu
from delta_selectivity.models.fused_gelu import LinearWithGelu
from delta_selectivity.models.language_model import Site, open_model
from delta_selectivity.system import gemm

IDS = torch.arange(60).reshape(2, 30) + 5
UP, ACT = "layers.<layer>.mlp.dense_h_to_4h", "layers.<layer>.mlp.act"


@pytest.fixture(params=["Intel", "AMD", "no fast bfloat16"])
def is_fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    fast = request.param != "no fast bfloat16"
    if fast and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(fused_gelu, "has_fast_bfloat16", lambda: fast)
    monkeypatch.setattr(gemm, "prefers_onednn", lambda: request.param == "AMD")
    return fast


def activations(model: Path, hookpoint: str, dtype: str) -> tuple[Tensor, int]:
    """Return the values of layer 1, float32, and how many products are fused."""
    site = Site(1, hookpoint)
    loaded = open_model(str(model)).load([site], "cpu", dtype)
    return loaded.activations(IDS)[site].float(), sum(isinstance(m, LinearWithGelu) for m in loaded.module.modules())


@pytest.mark.parametrize("hookpoint", ["resid_post", "mlp_post", "mlp_out", "mlp_in"])
def test_values_are_those_of_the_model(tiny_model, is_fast, monkeypatch, hookpoint):
    expected, _ = activations(tiny_model, hookpoint, "float32")
    found, n_fused = activations(tiny_model, hookpoint, "bfloat16")
    assert n_fused == (2 if is_fast else 0)
    monkeypatch.setattr(fused_gelu, "has_fast_bfloat16", lambda: False)
    plain, _ = activations(tiny_model, hookpoint, "bfloat16")
    assert (found - expected).norm() <= 1.1 * (plain - expected).norm()


@pytest.mark.parametrize("hookpoint", [UP, ACT])
def test_what_is_read_between_the_two_stays(tiny_model, is_fast, hookpoint):
    expected, _ = activations(tiny_model, hookpoint, "float32")
    found, n_fused = activations(tiny_model, hookpoint, "bfloat16")
    assert n_fused == (1 if is_fast else 0), "the other layer's"
    assert (found - expected).norm() < 0.02 * expected.norm()
    assert (found < -0.2).any() == (hookpoint == UP), "GELU is never below -0.17"


def test_float32_is_left_alone(tiny_model, is_fast):
    assert activations(tiny_model, "resid_post", "float32")[1] == 0
