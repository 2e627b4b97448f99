"""Fused GPT-NeoX blocks: as exact as transformers' own, not where a tap reads inside, and only for what is read."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXModel
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

from delta_selectivity.models import block_kernels, fused_neox
from delta_selectivity.models.fused_neox import (
    LinearWithGelu,
    fuse,
    is_fused,
    layer_norms,
    reading,
    rotate,
    running,
)
from delta_selectivity.models.language_model import Site, open_model
from delta_selectivity.system import gemm

IDS = torch.arange(60).reshape(2, 30) + 5
UP, ACT = "layers.<layer>.mlp.dense_h_to_4h", "layers.<layer>.mlp.act"


@pytest.fixture(params=["Intel", "AMD", "no fast bfloat16"])
def is_fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    fast = request.param != "no fast bfloat16"
    if fast:
        request.getfixturevalue("onednn_bfloat16")
    monkeypatch.setattr(fused_neox, "has_fast_bfloat16", lambda: fast)
    monkeypatch.setattr(gemm, "prefers_onednn", lambda: request.param == "AMD")
    return fast


def activations(model: Path, hookpoint: str, dtype: str) -> tuple[Tensor, tuple[int, int]]:
    """Return the values of layer 1, float32, and how many products with GELU and how many blocks are fused."""
    site = Site(1, hookpoint)
    loaded = open_model(str(model)).load([site], "cpu", dtype)
    parts = list(loaded.module.modules())
    n_fused = sum(isinstance(part, LinearWithGelu) for part in parts), sum(map(is_fused, parts))
    return loaded.activations(IDS)[site].float(), n_fused


@pytest.mark.parametrize(
    ("hookpoint", "blocks"),
    [("resid_post", 2), ("mlp_post", 1), ("mlp_out", 1), ("mlp_in", 1), ("z", 1), ("attn_out", 1)],
)
def test_values_are_those_of_the_model(tiny_model, is_fast, monkeypatch, hookpoint, blocks):
    expected, _ = activations(tiny_model, hookpoint, "float32")
    found, n_fused = activations(tiny_model, hookpoint, "bfloat16")
    assert n_fused == ((2, blocks) if is_fast else (0, 0))
    monkeypatch.setattr(fused_neox, "has_fast_bfloat16", lambda: False)
    plain, _ = activations(tiny_model, hookpoint, "bfloat16")
    assert (found - expected).norm() <= 1.1 * (plain - expected).norm()


def test_a_model_restricted_to_some_sites_is_that_of_these_sites(tiny_model, is_fast):
    """A run first loads its sites and their neighbours, to check the SAEs' fit, and then keeps its own."""
    inside, after = [Site(layer, "mlp_out") for layer in (0, 1)], [Site(layer, "resid_post") for layer in (0, 1)]
    info = open_model(str(tiny_model))
    loaded = info.load([*inside, *after], "cpu", "bfloat16")
    assert not any(map(is_fused, loaded.module.modules()))
    restricted = loaded.restricted_to(after).restricted_to(after)
    assert sum(map(is_fused, restricted.module.modules())) == (2 if is_fast else 0)
    expected = info.load(after, "cpu", "bfloat16").activations(IDS)
    found = restricted.activations(IDS)
    assert all(found[site].equal(expected[site]) for site in after)


@pytest.mark.parametrize("hookpoint", [UP, ACT])
def test_what_is_read_between_the_two_stays(tiny_model, is_fast, hookpoint):
    expected, _ = activations(tiny_model, hookpoint, "float32")
    found, n_fused = activations(tiny_model, hookpoint, "bfloat16")
    assert n_fused == ((1, 1) if is_fast else (0, 0)), "the other layer's"
    assert (found - expected).norm() < 0.02 * expected.norm()
    assert (found < -0.2).any() == (hookpoint == UP), "GELU is never below -0.17"


@pytest.fixture(params=[{}, {"use_parallel_residual": False}, {"attention_bias": False}], ids=str)
def config(request: pytest.FixtureRequest) -> GPTNeoXConfig:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3, "intermediate_size": 96}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return GPTNeoXConfig(vocab_size=99, rope_parameters=rope, initializer_range=0.2, **sizes, **request.param)


def test_float32_gives_the_bits_of_transformers(config, is_fast):
    torch.manual_seed(0)
    model = GPTNeoXModel(config).eval().requires_grad_(False)
    expected = model(IDS, use_cache=False).last_hidden_state
    fuse(model, [])
    assert sum(map(is_fused, model.modules())) == 3
    assert model(IDS, use_cache=False).last_hidden_state.equal(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_block_computes_only_what_is_read(config, is_fast, dtype):
    torch.manual_seed(0)
    model = GPTNeoXModel(config).to(dtype).eval().requires_grad_(False)
    fuse(model, [])
    blocks: list[Tensor] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _module, _args, output: blocks.append(output))
    wanted = torch.zeros(IDS.shape, dtype=torch.bool)
    wanted[0, [3, 7, 29]], wanted[1, 0] = True, True
    model(IDS, use_cache=False)
    with reading(wanted):
        model(IDS, use_cache=False)
    with reading(torch.ones_like(wanted)):
        model(IDS, use_cache=False)
    *whole, last = blocks[:3]
    *same, few = blocks[3:6]
    assert all(a.equal(b) for a, b in zip(whole, same, strict=True)), "other tokens read these"
    assert blocks[8].equal(last), "nearly all are read"
    pruned = dtype == torch.float32 or is_fast
    torch.testing.assert_close(few[wanted], last[wanted], atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0.02)
    assert (few == 0).all(dim=-1).equal(~wanted if pruned else torch.zeros_like(wanted))
    with reading(wanted[:1]):  # of another batch
        assert model(IDS, use_cache=False).last_hidden_state.shape == (2, 30, 64)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def with_table(request: pytest.FixtureRequest, is_fast: bool) -> GPTNeoXModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 96}
    config = GPTNeoXConfig(vocab_size=99, initializer_range=0.2, **sizes)
    model = GPTNeoXModel(config).to(request.param).eval().requires_grad_(False)
    fuse(model, [])
    if not is_fused(model.layers[0]):
        pytest.skip("not fused")
    assert model.layers[0].table is not None and model.layers[1].table is None
    return model


def layers_of(model: GPTNeoXModel, ids: Tensor) -> list[Tensor]:
    return [x.float() for x in model(ids, use_cache=False, output_hidden_states=True).hidden_states]


def test_the_first_block_multiplies_once_for_each_token(with_table, monkeypatch):
    model, n_rows = with_table, []
    expected = layers_of(model, IDS)
    forward = model.layers[0].attention.query_key_value.forward
    monkeypatch.setattr(
        model.layers[0].attention.query_key_value, "forward", lambda x: n_rows.append(len(x)) or forward(x)
    )
    for ids in (IDS[:, :20], IDS, IDS):
        with running(ids):
            found = layers_of(model, ids)
        for before, after in zip(expected, found, strict=True):
            close = {"rtol": 1e-5, "atol": 1e-5} if model.dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
            torch.testing.assert_close(after, before[:, : ids.shape[1]], **close)
    assert len(n_rows) == 2, "the third run needs no product"
    wanted = torch.zeros(IDS.shape, dtype=torch.bool)
    wanted[:, 5] = True
    with running(IDS), reading(wanted):
        few = layers_of(model, IDS)
    torch.testing.assert_close(few[-1][:, 5], expected[-1][:, 5], rtol=0.05, atol=0.05)


def test_ids_of_another_batch_are_not_used(with_table):
    expected = layers_of(with_table, IDS)
    with running(IDS[:1] + 1):
        found = layers_of(with_table, IDS)
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


def test_threads_fill_the_table_together(with_table):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 99, (2, 30), generator=generator) for _ in range(40)]
    expected = [layers_of(with_table, ids)[-1] for ids in batches]

    def run(ids: Tensor) -> Tensor:
        with running(ids):
            return layers_of(with_table, ids)[-1]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, batches))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.1)


@pytest.mark.parametrize("reason", ["the MLP reads what attention adds", "too large"])
def test_no_table(reason, is_fast, monkeypatch):
    parallel = reason == "too large"
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = (
        GPTNeoXModel(GPTNeoXConfig(vocab_size=99, use_parallel_residual=parallel, **sizes)).eval().requires_grad_(False)
    )
    monkeypatch.setattr(fused_neox, "MAX_TABLE_BYTES", 99 * 32 * 4 * 4 - parallel)
    fuse(model, [])
    assert model.layers[0].table is None
    expected = layers_of(model, IDS)
    with running(IDS):
        assert all(a.equal(b) for a, b in zip(layers_of(model, IDS), expected, strict=True))


def test_blocks_of_all_kinds_are_as_exact_as_those_of_transformers(config, is_fast):
    torch.manual_seed(0)
    weights = GPTNeoXModel(config).bfloat16().state_dict()  # the same in all three models
    values = []
    for dtype, is_ours in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        model = GPTNeoXModel(config).eval().requires_grad_(False).to(dtype)
        model.load_state_dict(weights)
        if is_ours:
            fuse(model, [])
            assert sum(map(is_fused, model.modules())) == (3 if is_fast else 0)
        values.append(model(IDS, use_cache=False).last_hidden_state.float())
    exact, plain, ours = values
    assert (plain - exact).norm() > 0
    assert (ours - exact).norm() <= 1.1 * (plain - exact).norm()


def test_a_call_with_a_cache_is_left_to_transformers(is_fast):
    config = GPTNeoXConfig(vocab_size=99, hidden_size=32, num_attention_heads=2, num_hidden_layers=2, hidden_act="relu")
    model = GPTNeoXModel(config).bfloat16().eval().requires_grad_(False)
    expected = model(IDS, use_cache=True).last_hidden_state
    fuse(model, [])
    found = model(IDS, use_cache=True)
    assert found.last_hidden_state.equal(expected)
    assert found.past_key_values.get_seq_length() == IDS.shape[1]


def test_rotation_equals_transformers():
    """In float32 on the same bits, and rounded once."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 7, 2 * 3 * 8, generator=generator).bfloat16()
    qkv[0, 0, 0], qkv[1, 1, 9], qkv[2, 2, 1] = torch.inf, torch.nan, 0.0
    angle = torch.rand(7, 2, generator=generator).repeat(1, 2)
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    q, k, v = qkv.float().unflatten(-1, (2, 24)).transpose(1, 2).chunk(3, dim=-1)
    rotated = *apply_rotary_pos_emb(q, k, cos[None].float(), sin[None].float()), v
    for found, expected in zip(rotate(qkv, cos, sin, d_head=8), rotated, strict=True):
        assert found.is_contiguous()
        torch.testing.assert_close(found, expected.bfloat16(), atol=0, rtol=2**-8, equal_nan=True)


@pytest.mark.parametrize("d", [1, 5, 64, 257])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_layer_norms_are_those_of_float64_rounded_once(d, scale):
    generator = torch.Generator().manual_seed(d)
    x = (scale * (torch.randn(3, 7, d, generator=generator) + 5)).bfloat16()
    layers = [nn.LayerNorm(d, dtype=torch.bfloat16) for _ in range(2)]
    for parameter in (parameter for layer in layers for parameter in layer.parameters()):
        nn.init.normal_(parameter, generator=generator)
    with torch.inference_mode():
        for found, layer in zip(layer_norms(x, *layers), layers, strict=True):
            exact = layer.double()(x.double())
            assert found.dtype == torch.bfloat16 and found.shape == x.shape and found.is_contiguous()
            torch.testing.assert_close(found.double(), exact, atol=1e-5 * float(exact.abs().max()), rtol=2**-8)
            layer.bfloat16()
    assert layer_norms(x.transpose(0, 1), layers[0])[0].equal(layer_norms(x, layers[0])[0].transpose(0, 1))


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf, 3e38])
def test_layer_norms_of_a_row_that_is_not_finite_are_nan_there_alone(value):
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    clean, layer = x.clone(), nn.LayerNorm(16, dtype=torch.bfloat16)
    x[2, 3] = value
    with torch.inference_mode():
        (found,), (expected,) = layer_norms(x, layer), layer_norms(clean, layer)
        assert found.isnan().equal(layer(x).isnan())
    others = [0, 1, 3]
    assert found[others].equal(expected[others])


def test_bits_of_bfloat16_are_those_of_torch():
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    wide = torch.tensor([block_kernels.widened(bits) for bits in every.numpy()])
    torch.testing.assert_close(wide, every.view(torch.bfloat16).float(), atol=0, rtol=0, equal_nan=True)
    values = (
        torch.randn(9999, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(-66, 66).repeat(76)[:9999]
    )
    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, -3.4e38, 1e-45, 0.0, -0.0])
    values = torch.cat([values, ties, wide])
    found = torch.tensor([block_kernels.rounded(value) for value in values.numpy()], dtype=torch.uint16)
    torch.testing.assert_close(found.view(torch.bfloat16), values.bfloat16(), atol=0, rtol=0, equal_nan=True)
