"""Attention by products over short texts: the same values, no worse rounding, and used only for the intended cases."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from delta_selectivity.models import attention
from delta_selectivity.models.language_model import Site, open_model

MODEL = Path(__file__).resolve().parent.parent / "assets" / "tiny-pythia"
ATTENTION = SimpleNamespace(is_causal=True)


def heads(n_texts: int, n_tokens: int, n_heads: int = 6, n_key_heads: int = 6, d: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n_tokens)
    shapes = [(n_texts, n, n_tokens, d) for n in (n_heads, n_key_heads, n_key_heads)]
    return [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]


def reference(query: Tensor, key: Tensor, value: Tensor, scaling: float | None = None) -> Tensor:
    """Compute the heads in float64: [texts, tokens, heads, d]."""
    wide = (x.double() for x in (query, key, value))
    found = scaled_dot_product_attention(*wide, is_causal=True, scale=scaling, enable_gqa=True)
    return found.transpose(1, 2)


def by_sdpa(*args: object, **options: object) -> tuple[Tensor, None]:
    pytest.fail("not by products")


@pytest.mark.parametrize(("n_texts", "n_tokens"), [(1, 1), (3, 7), (13, 150), (2, attention.MAX_TOKENS)])
@pytest.mark.parametrize("n_key_heads", [6, 2, 1])
@pytest.mark.parametrize("scaling", [None, 0.5])
def test_heads_are_those_of_float64_to_the_rounding_of_bfloat16(n_texts, n_tokens, n_key_heads, scaling, monkeypatch):
    monkeypatch.setattr("transformers.integrations.sdpa_attention.sdpa_attention_forward", by_sdpa)
    given = heads(n_texts, n_tokens, n_key_heads=n_key_heads)
    found, weights = attention.attend(ATTENTION, *given, None, scaling=scaling, is_causal=None)
    assert weights is None
    expected = reference(*given, scaling)
    assert found.dtype == torch.bfloat16 and found.shape == expected.shape and found.is_contiguous()
    torch.testing.assert_close(found.double(), expected, atol=0.05, rtol=0.02)
    assert float((found.double() - expected).norm() / expected.norm()) < 0.008  # the rounding error of bfloat16: 0.002


def test_no_token_attends_to_a_later_one():
    query, key, value = heads(2, 20)
    found, _ = attention.attend(ATTENTION, query, key, value, None)
    key[:, :, 11:], value[:, :, 11:] = 100, 1e4
    assert torch.equal(attention.attend(ATTENTION, query, key, value, None)[0][:, :11], found[:, :11])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e4])
def test_scores_that_are_not_finite_spread_as_in_torch(value):
    """To the tokens that read them, and to no other."""
    query, key, value_rows = heads(2, 20)
    query[1, 2, 7, 0] = value
    found, _ = attention.attend(ATTENTION, query, key, value_rows, None)
    expected = reference(query, key, value_rows)
    assert found.isnan().equal(expected.isnan())
    finite = expected.isfinite()
    torch.testing.assert_close(found.double()[finite], expected[finite], atol=0.05, rtol=0.02)


@pytest.mark.parametrize("what", ["long", "mask", "not causal", "module not causal", "more keys", "position bias"])
def test_other_cases_use_transformers(what: str, monkeypatch: pytest.MonkeyPatch):
    seen = []
    answer = torch.zeros(1), None
    monkeypatch.setattr(
        "transformers.integrations.sdpa_attention.sdpa_attention_forward",
        lambda *args, **options: seen.append((args, options)) or answer,
    )
    query, key, value = heads(1, attention.MAX_TOKENS + 1 if what == "long" else 9)
    module = SimpleNamespace(is_causal=what != "module not causal")
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool) if what == "mask" else None
    options: dict[str, object] = {"is_causal": False} if what == "not causal" else {}
    if what == "position bias":
        options["position_bias"] = torch.zeros(1, 6, 9, 9)
    if what == "more keys":
        query = query[:, :, :4]
    assert attention.attend(module, query, key, value, mask, scaling=0.25, **options) is answer
    ((args, passed),) = seen
    assert args == (module, query, key, value, mask)
    assert passed == {"scaling": 0.25, **options}


def test_rounding_of_the_model_is_about_that_of_sdpa(monkeypatch: pytest.MonkeyPatch):
    """Compare the distances from float32 of the bundled model's activations, by products and by sdpa."""
    ids = torch.randint(1, 8000, (4, 150), generator=torch.Generator().manual_seed(0))
    site = Site(5, "resid_post")
    info = open_model(str(MODEL))

    def distance(by_products: bool) -> float:
        monkeypatch.setattr(attention, "has_fast_attention", lambda: by_products)
        model = info.load([site], "cpu", "bfloat16")
        assert model.module.config._attn_implementation == (attention.NAME if by_products else "sdpa")
        return float((model.activations(ids)[site].float() - exact).norm() / exact.norm())

    plain = info.load([site], "cpu", "float32")
    assert plain.module.config._attn_implementation == "sdpa"
    exact = plain.activations(ids)[site]
    by_products, by_kernel = distance(True), distance(False)
    assert 0 < by_products < 1.3 * by_kernel < 0.02
    assert by_products != by_kernel
