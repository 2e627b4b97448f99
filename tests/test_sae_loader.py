"""SAEs compared with the libraries that write them, then properties of any SAE, then errors of users."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors.torch import load_file, save_file
from torch import Tensor

from delta_selectivity.errors import RequestError
from delta_selectivity.saes import GroupMax, LinearCoder, Sae, SparseRows, Threshold, TopK, open_sae
from delta_selectivity.saes import topk as topk
from delta_selectivity.saes.hookpoints import HookPoint, parse, same_place
from delta_selectivity.saes.sae import CHUNK_BYTES
from delta_selectivity.saes.topk import exact_topk

D_IN, D_SAE, K = 16, 64, 4
HUB_ID = "EleutherAI/sae-pythia-160m-32k"


def dense(codes: SparseRows) -> Tensor:
    """Return ``[rows, n_cols]``."""
    rows = torch.arange(codes.n_rows).repeat_interleave(codes.crow.diff())
    return torch.zeros(codes.n_rows, codes.n_cols).index_put_((rows, codes.col.long()), codes.value)


def activations(rows: int = 50, d_in: int = D_IN, seed: int = 0) -> Tensor:
    """Return activations with a large mean, like residual streams."""
    return 2 * torch.randn(rows, d_in, generator=torch.Generator().manual_seed(seed)) + 0.5


def linear_sae(W_enc: Tensor, W_dec: Tensor, selection: Any, k: int | None = None) -> Sae:
    d_sae, d_in = W_enc.shape
    coder = LinearCoder(W_enc, torch.zeros(d_sae), W_dec, torch.zeros(d_in), selection)
    return Sae("made here", 0, "resid_post", d_in, d_sae, k, "topk", coder)


def write_sparsify(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a random SAE in sparsify's format, without sparsify."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = torch.Generator().manual_seed(seed)
    config = {"activation": "topk", "expansion_factor": 4, "num_latents": 0, "k": K, "d_in": D_IN} | changes
    tensors = {
        "encoder.weight": torch.randn(D_SAE, D_IN, generator=rng),
        "encoder.bias": torch.randn(D_SAE, generator=rng),
        "W_dec": torch.randn(D_SAE, D_IN, generator=rng),
        "b_dec": torch.randn(D_IN, generator=rng),
    }
    (folder / "cfg.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    save_file(tensors, folder / "sae.safetensors")
    return folder


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


# --- compared with the libraries ---------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_sparsify(tmp_path: Path, activation: Any, dtype: torch.dtype) -> None:
    sparsify = pytest.importorskip("sparsify")
    config = sparsify.SparseCoderConfig(activation=activation, k=K, expansion_factor=4, multi_topk=True)
    reference = sparsify.SparseCoder(D_IN, config, dtype=dtype)
    torch.manual_seed(0)
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    reference.save_to_disk(tmp_path / "layers.3.mlp")
    reference = reference.float()

    source = open_sae(str(tmp_path))
    assert (source.layers, source.hookpoint, source.d_in) == ((3,), "layers.<layer>.mlp", D_IN)
    assert (source.prepend_bos, source.counts_bos) == (None, False)
    sae, x = source.load(3, "cpu"), activations()
    with torch.no_grad():
        expected = reference.encode(x)
        expected_recon = reference.decode(expected.top_acts, expected.top_indices)
    codes = sae.encode(x)
    expected_dense = torch.zeros(len(x), D_SAE).scatter_(1, expected.top_indices, expected.top_acts)
    torch.testing.assert_close(dense(codes), expected_dense, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(codes), expected_recon, rtol=1e-5, atol=1e-5)


RESCALING = ("topk", "abstopk", "batchtopk", "matryoshka_batchtopk")
LENS_ARCHITECTURES = [
    *[(architecture, {}) for architecture in ("standard", "jumprelu", "gated", "matching_pursuit")],
    *[(name, {"rescale_acts_by_decoder_norm": rescales}) for name in RESCALING for rescales in (False, True)],
]
"""Every architecture that SAE Lens 6.54 trains, with and without its rescaling."""


def make_lens(architecture: str, hook_name: str = "blocks.5.hook_resid_post", **settings: Any) -> Any:
    """Return a training SAE of SAE Lens with random parameters."""
    sae_lens = pytest.importorskip("sae_lens")
    from sae_lens.registry import get_sae_training_class

    sae_class, config_class = get_sae_training_class(architecture)
    if "topk" in architecture:
        settings["k"] = K
    if architecture == "matryoshka_batchtopk":
        settings["matryoshka_widths"] = [D_SAE // 2, D_SAE]
    if architecture == "matching_pursuit":
        settings |= {"max_iterations": K, "decoder_init_norm": 1.0}
    metadata = sae_lens.saes.sae.SAEMetadata(
        hook_name=hook_name, model_name="pythia-70m-deduped", prepend_bos=True, context_size=128
    )
    torch.manual_seed(0)
    sae = sae_class(config_class(d_in=D_IN, d_sae=D_SAE, metadata=metadata, **settings))
    for name, parameter in sae.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        if name == "threshold":
            parameter.data.abs_()
    if hasattr(sae, "topk_threshold"):
        sae.topk_threshold += 0.5
    return sae


def assert_agrees(sae: Sae, reference: Any) -> None:
    x = activations()
    with torch.no_grad():
        expected = reference.encode(x)
        expected_recon = reference.decode(expected)
    assert 0 < int((expected != 0).sum()) < expected.numel()
    codes = sae.encode(x)
    torch.testing.assert_close(dense(codes), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(codes), expected_recon.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("norm", ["none", "constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize(("architecture", "settings"), LENS_ARCHITECTURES)
def test_agrees_with_sae_lens(
    tmp_path: Path, architecture: str, settings: dict[str, Any], norm: str, apply_b_dec: bool
) -> None:
    trained = make_lens(architecture, normalize_activations=norm, apply_b_dec_to_input=apply_b_dec, **settings)
    trained.save_inference_model(tmp_path / "any_name")
    from sae_lens import SAE

    reference = SAE.load_from_disk(tmp_path / "any_name")
    source = open_sae(str(tmp_path))
    assert (source.layers, source.hookpoint, source.d_in) == ((5,), "resid_post", D_IN)
    assert (source.prepend_bos, source.counts_bos, source.model_name) == (True, True, "pythia-70m-deduped")
    assert source.context_size == 128
    sae = source.load(5, "cpu")
    assert_agrees(sae, reference)
    selected = sae.decode(
        sae.encode(activations()).select(torch.tensor([7, 3]))
    )  # which depends on the norms of the rows
    torch.testing.assert_close(selected, sae.decode(sae.encode(activations()))[[7, 3]])


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu", "gated"])
def test_a_training_checkpoint_equals_its_inference_model(tmp_path: Path, architecture: str) -> None:
    trained = make_lens(architecture)
    trained.save_model(tmp_path / "checkpoint")
    trained.save_inference_model(tmp_path / "inference")
    from sae_lens import SAE

    assert_agrees(open_sae(str(tmp_path / "checkpoint")).load(5, "cpu"), SAE.load_from_disk(tmp_path / "inference"))


@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize(("architecture", "settings", "norm"), [
    (architecture, settings, norm)
    for architecture, settings in LENS_ARCHITECTURES
    for norm in ("expected_average_only_in", "covariance_whitening")
    if (architecture, norm) != ("matching_pursuit", "covariance_whitening")  # which the library cannot fold
])  # fmt: skip
def test_constants_of_the_input_are_folded_from_the_file_beside_it(
    tmp_path: Path, architecture: str, settings: dict[str, Any], norm: str, apply_b_dec: bool
) -> None:
    trained = make_lens(architecture, normalize_activations=norm, apply_b_dec_to_input=apply_b_dec, **settings)
    trained.save_model(tmp_path)
    with pytest.raises(RequestError, match=r"activation_(scaler\.json|whitening\.safetensors)"):
        open_sae(str(tmp_path))
    scaler = fit_scaler(norm)
    scaler.save(str(tmp_path / "activation_scaler.json"))
    if scaler.whitening is None:
        trained.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    else:
        whitening = scaler.whitening
        trained.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)
    trained.save_inference_model(tmp_path / "folded")
    from sae_lens import SAE

    assert_agrees(open_sae(str(tmp_path)).load(5, "cpu"), SAE.load_from_disk(tmp_path / "folded"))


def test_whitening_that_cannot_be_folded_is_rejected(tmp_path: Path) -> None:
    make_lens("matching_pursuit").save_inference_model(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"normalize_activations": "covariance_whitening"}))
    fit_scaler("covariance_whitening").save(str(tmp_path / "activation_scaler.json"))
    with pytest.raises(RequestError, match="covariance_whitening of matching_pursuit"):
        open_sae(str(tmp_path)).load(5, "cpu")


def fit_scaler(norm: str) -> Any:
    """Compute the library's own statistics of some activations."""
    from sae_lens.training.activation_scaler import ActivationScaler

    scaler = ActivationScaler()
    batches = iter([activations(200, seed=seed) for seed in range(2)])
    if norm == "covariance_whitening":
        scaler.estimate_whitening(D_IN, batches, n_batches_for_norm_estimate=2)
    else:
        scaler.estimate_scaling_factor(D_IN, batches, n_batches_for_norm_estimate=2)
    return scaler


@pytest.mark.parametrize("norm", ["none", "layer_norm"])
@pytest.mark.parametrize("architecture", ["standard", "abstopk"])
def test_attention_heads_are_concatenated(tmp_path: Path, architecture: str, norm: str) -> None:
    settings = {"normalize_activations": norm, "reshape_activations": "hook_z"}
    make_lens(architecture, "blocks.5.attn.hook_z", **settings).save_inference_model(tmp_path)
    from sae_lens import SAE

    source, reference, x = open_sae(str(tmp_path)), SAE.load_from_disk(tmp_path), activations()
    assert (source.hookpoint, source.d_in) == ("z", D_IN)
    sae = source.load(5, "cpu")
    codes = sae.encode(x)
    with torch.no_grad():
        expected = reference.encode(x.unflatten(1, (4, D_IN // 4)))  # [rows, heads, d_head]
        expected_recon = reference.decode(expected).flatten(1)
    torch.testing.assert_close(dense(codes), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(codes), expected_recon, rtol=1e-5, atol=1e-5)


def old_config(**changes: Any) -> dict[str, Any]:
    """Return a config as SAE Lens before version 6 wrote it."""
    config = {
        "architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "dtype": "torch.float32", "device": "cpu",
        "model_name": "gpt2-small", "hook_name": "blocks.5.hook_resid_pre", "hook_layer": 5, "prepend_bos": True,
        "activation_fn_str": "relu", "apply_b_dec_to_input": True, "normalize_activations": "none",
        "sae_lens_training_version": "3.0.0",
    }  # fmt: skip
    return config | changes


def write_old_lens(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(old_config(**changes)))
    rng = torch.Generator().manual_seed(0)
    tensors = {"W_enc": torch.randn(D_IN, D_SAE, generator=rng), "W_dec": torch.randn(D_SAE, D_IN, generator=rng)}
    tensors |= {"b_enc": torch.randn(D_SAE, generator=rng), "b_dec": torch.randn(D_IN, generator=rng)}
    save_file(tensors, folder / "sae_weights.safetensors")
    return folder


@pytest.mark.parametrize("changes", [{}, {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}])
def test_reads_the_flat_config_of_older_versions(tmp_path: Path, changes: dict[str, Any]) -> None:
    pytest.importorskip("sae_lens")
    from sae_lens import SAE

    source = open_sae(str(write_old_lens(tmp_path, **changes)))
    assert (source.layers, source.hookpoint) == ((5,), "resid_pre")
    assert source.prepend_bos is True
    assert_agrees(source.load(5, "cpu"), SAE.load_from_disk(tmp_path))


def test_fetches_a_release_through_sae_lens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sae_lens")
    import sae_lens.loading.pretrained_sae_loaders as loaders
    from huggingface_hub.utils import EntryNotFoundError
    from sae_lens import SAE

    folder = write_old_lens(tmp_path / "3-res-sm", hook_name="blocks.3.hook_resid_post")

    def download(repo_id: str, filename: str, **_: Any) -> str:
        assert repo_id == "ctigges/pythia-70m-deduped__res-sm_processed"
        if not (tmp_path / filename).exists():
            raise EntryNotFoundError(filename)
        return str(tmp_path / filename)

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    source = open_sae("pythia-70m-deduped-res-sm/blocks.3.hook_resid_post")
    assert (source.layers, source.hookpoint, source.prepend_bos) == ((3,), "resid_post", True)
    assert source.name == "pythia-70m-deduped-res-sm/blocks.3.hook_resid_post"
    assert len(source.fingerprint()) == 64
    assert_agrees(source.load(3, "cpu"), SAE.load_from_disk(folder))
    with pytest.raises(RequestError, match=r"no such id; it has blocks\.0\.hook_resid_pre"):
        open_sae("pythia-70m-deduped-res-sm/blocks.9.hook_resid_post")
    monkeypatch.setattr(loaders, "hf_hub_download", lambda **_: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(RequestError, match="could not read its config"):
        open_sae("pythia-70m-deduped-res-sm/blocks.2.hook_resid_post")


# --- properties of any SAE ---------------------------------------------------------------------------------------


def test_identity_is_exact() -> None:
    eye = torch.eye(D_IN)
    both = torch.cat([eye, -eye])
    x = activations() * torch.logspace(-3, 3, D_IN)
    for selection in (TopK(D_IN), Threshold(torch.zeros(2 * D_IN))):
        sae = linear_sae(both, both, selection)
        assert torch.equal(sae.decode(sae.encode(x)), x)


@pytest.mark.parametrize(
    ("d_sae", "k"), [(1024, 8), (1024, 64), (64, 64), (100, 7), (101, 50), (4096, 32), (8, 1), (1, 1)]
)
def test_topk_selects_the_same_latents_as_torch(d_sae: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk, "WIDE", 0)
    pre_acts = torch.randn(200, d_sae)
    values, indices = exact_topk(pre_acts, k)
    expected = pre_acts.topk(k, dim=1)
    assert torch.equal(values.sort(1, descending=True).values, expected.values)
    assert torch.equal(indices.sort(1).values, expected.indices.sort(1).values)


@pytest.mark.parametrize("pre_acts", [
    torch.randint(0, 3, (100, 64)).float(), -torch.rand(100, 64), torch.zeros(100, 64), torch.zeros(0, 64),
    torch.full((3, 64), -torch.inf), torch.full((3, 64), torch.inf),
    torch.cat([torch.full((3, 2), torch.inf), torch.randn(3, 60), torch.full((3, 2), -torch.inf)], dim=1),
    3e38 * torch.randint(-1, 2, (100, 64)), 1e-45 * torch.randint(-2, 3, (100, 64)),
])  # fmt: skip
def test_topk_survives_ties_and_extremes(pre_acts: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk, "WIDE", 0)
    values, indices = exact_topk(pre_acts, 4)
    assert torch.equal(values.sort(1, descending=True).values, pre_acts.topk(4, dim=1).values)
    assert torch.equal(pre_acts.gather(1, indices), values)
    assert all(len(set(row)) == 4 for row in indices.tolist())


@pytest.mark.parametrize("d_sae", [64, 1024])
def test_nan_does_not_count_as_inactive(d_sae: int) -> None:
    pre_acts = torch.randn(3, d_sae)
    pre_acts[1, 40] = torch.nan
    values, indices = exact_topk(pre_acts, 4)
    assert values.isnan().any(dim=1).tolist() == [False, True, False]
    assert ((indices >= 0) & (indices < d_sae)).all()


@given(
    pre_acts=arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.floats(width=32)),
    data=st.data(),
)
def test_topk_finds_the_same_values_as_torch_in_anything(pre_acts: np.ndarray, data: Any) -> None:
    k = data.draw(st.integers(1, pre_acts.shape[1]))
    rows = torch.from_numpy(pre_acts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk, "WIDE", 0)
        values, indices = exact_topk(rows, k)
    whole = ~rows.isnan().any(dim=1)
    assert torch.equal(values[whole].sort(1, descending=True).values, rows[whole].topk(k, dim=1).values)
    assert torch.equal(rows[whole].gather(1, indices[whole]), values[whole])
    assert values[~whole].isnan().any(dim=1).all()


def test_a_row_with_nothing_positive_has_no_latents() -> None:
    sae = linear_sae(-torch.eye(D_IN), torch.eye(D_IN), TopK(3))
    codes = sae.encode(torch.rand(5, D_IN) + 0.1)
    assert codes.l0().tolist() == [0.0] * 5
    assert torch.equal(sae.decode(codes), torch.zeros(5, D_IN))


@pytest.mark.parametrize("selection", [TopK(K), GroupMax(K), Threshold(torch.rand(D_SAE))])
def test_chunks_and_dtypes_change_only_rounding(selection: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    W_enc, W_dec = torch.randn(2, D_SAE, D_IN)
    sae, x = linear_sae(W_enc, W_dec, selection), activations()
    whole = sae.encode(x)
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 7 * D_SAE * 4)
    monkeypatch.setattr("delta_selectivity.saes.sae.MIN_ROWS", 1)
    assert sae.chunk_rows() == 7
    parts = sae.encode(x)
    torch.testing.assert_close(dense(parts), dense(whole))
    torch.testing.assert_close(sae.decode(parts), dense(whole) @ W_dec, rtol=1e-5, atol=1e-5)
    assert sae.encode(x.double()).value.dtype == torch.float32
    assert sae.decode(sae.encode(x[:0])).shape == (0, D_IN)


def test_sparse_rows_select_concat_and_count() -> None:
    codes = linear_sae(*torch.randn(2, D_SAE, D_IN), Threshold(torch.ones(D_SAE))).encode(activations())
    full = dense(codes)
    assert torch.equal(codes.l0(), (full != 0).sum(1).float())
    torch.testing.assert_close(codes.l1(), full.abs().sum(1))
    rows = torch.tensor([4, 4, 0, 49])
    assert torch.equal(dense(codes.select(rows)), full[rows])
    mask = torch.arange(50) % 3 == 0
    assert torch.equal(dense(codes.select(mask)), full[mask])
    assert codes.select(rows[:0]).n_rows == 0
    again = SparseRows.concat([codes.select(torch.arange(20)), codes.select(torch.arange(20, 50))])
    assert torch.equal(again.crow, codes.crow)
    assert torch.equal(dense(again), full)
    assert codes.nbytes == 8 * 51 + 12 * codes.col.numel()
    assert codes.to("cpu").n_rows == 50


def test_a_constant_input_does_not_become_nan(tmp_path: Path) -> None:
    for norm in ("layer_norm", "constant_norm_rescale"):
        sae = open_sae(str(write_old_lens(tmp_path / norm, normalize_activations=norm))).load(5, "cpu")
        assert torch.isfinite(sae.decode(sae.encode(torch.zeros(3, D_IN)))).all()


# --- names, folders, the Hub -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "expected"), [
    ("layers.5", HookPoint(5, "resid_post")),
    ("layers.11.mlp", HookPoint(11, "layers.<layer>.mlp")),
    ("layers.0.attention", HookPoint(0, "layers.<layer>.attention")),
    ("layers.0.attn", HookPoint(0, "layers.<layer>.attn")),
    ("gpt_neox.layers.2.mlp.act", HookPoint(2, "gpt_neox.layers.<layer>.mlp.act")),
    ("transformer.h.7", HookPoint(7, "resid_post")),
    ("transformer.h.7:in", HookPoint(7, "resid_pre")),
    ("layers.3.mlp:in", HookPoint(3, "mlp_in")),
    ("layers.3.mlp.act:in", HookPoint(3, "layers.<layer>.mlp.act:in")),
    ("model.layers.3.self_attn:in", HookPoint(3, "attn_in")),
    ("gpt_neox.layers.3.attention.dense:in", HookPoint(3, "z")),
    ("transformer.h.3.attn.c_proj:in", HookPoint(3, "z")),
    ("model.layers.3.self_attn.o_proj:in", HookPoint(3, "z")),
    ("model.layers.3.pre_feedforward_layernorm", HookPoint(3, "mlp_in")),
    ("model.layers.3.post_feedforward_layernorm", HookPoint(3, "mlp_out")),
    ("blocks.5.hook_resid_pre", HookPoint(5, "resid_pre")),
    ("blocks.0.hook_resid_pre", HookPoint(0, "resid_pre")),
    ("blocks.5.hook_resid_post", HookPoint(5, "resid_post")),
    ("blocks.5.hook_mlp_out", HookPoint(5, "mlp_out")),
    ("blocks.5.hook_attn_out", HookPoint(5, "attn_out")),
    ("blocks.5.attn.hook_z", HookPoint(5, "z")),
    ("blocks.5.hook_z", HookPoint(5, "z")),
    ("blocks.5.mlp.hook_in", HookPoint(5, "mlp_in")),
    ("blocks.5.ln2.hook_normalized", HookPoint(5, "mlp_normalized")),
    ("blocks.5.ln1.hook_normalized", HookPoint(5, "attn_normalized")),
    ("blocks.5.hook_mlp_in", HookPoint(5, "blocks.<layer>.hook_mlp_in")),
    ("blocks.5.hook_resid_mid", HookPoint(5, "resid_mid")),
    ("blocks.5.mlp.hook_post", HookPoint(5, "mlp_post")),
    ("layers", None),
    ("my_sae", None),
])  # fmt: skip
def test_hook_points(name: str, expected: HookPoint | None) -> None:
    assert parse(name) == expected


@pytest.mark.parametrize(("asked", "found", "same"), [
    ("blocks.<layer>.hook_mlp_out", "mlp_out", True),
    ("gpt_neox.layers.<layer>.mlp", "blocks.<layer>.hook_mlp_out", True),
    ("gpt_neox.layers.<layer>:in", "resid_pre", True),
    ("transformer.h.<layer>.mlp.act", "h.<layer>.mlp.act", True),
    ("h.<layer>.mlp.act:in", "h.<layer>.mlp.act", False),
    ("mlp_in", "mlp_out", False),
    ("resid_pre", "resid_post", False),
    ("blocks.<layer>.hook_mlp_in", "mlp_in", False),
])  # fmt: skip
def test_hook_point_names_of_two_libraries(asked: str, found: str, same: bool) -> None:
    assert same_place(asked, found) is same_place(found, asked) is same


def test_one_folder_with_several_hook_points(tmp_path: Path) -> None:
    for name in ("layers.0", "layers.10", "layers.2", "layers.0.mlp", "layers.0.mlp.act"):
        write_sparsify(tmp_path / name)
    assert open_sae(str(tmp_path)).layers == (0, 2, 10)
    assert open_sae(str(tmp_path), "mlp_out").layers == (0,)
    assert open_sae(str(tmp_path), "gpt_neox.layers.<layer>").hookpoint == "resid_post"
    assert open_sae(str(tmp_path), "gpt_neox.layers.<layer>.mlp").hookpoint == "layers.<layer>.mlp"
    assert open_sae(str(tmp_path), "gpt_neox.layers.<layer>.mlp.act").hookpoint == "layers.<layer>.mlp.act"
    with pytest.raises(RequestError, match=r"attn_out.*has SAEs for layers.<layer>.mlp, layers.*resid_post"):
        open_sae(str(tmp_path), "attn_out")
    shutil.rmtree(tmp_path / "layers.0")
    shutil.rmtree(tmp_path / "layers.2")
    shutil.rmtree(tmp_path / "layers.10")
    with pytest.raises(RequestError, match="choose one with `hookpoint`"):
        open_sae(str(tmp_path))


def test_ways_to_specify_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sparsify(tmp_path / "EleutherAI" / "sae-x" / "layers.1")
    (tmp_path / "EleutherAI" / "sae-x" / "config.json").write_text('{"model": "EleutherAI/pythia-14m"}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("EleutherAI/sae-x", "EleutherAI/sae-x/", "~/EleutherAI/sae-x", "./EleutherAI/sae-x/layers.1"):
        assert open_sae(name).layers == (1,)
    assert open_sae("EleutherAI/sae-x").model_name == "EleutherAI/pythia-14m"
    monkeypatch.chdir(tmp_path / "EleutherAI/sae-x/layers.1")
    assert open_sae(".").layers == (1,)


def test_the_fingerprint_depends_on_the_contents(tmp_path: Path) -> None:
    write_sparsify(tmp_path / "a" / "layers.1")
    write_sparsify(tmp_path / "a" / "layers.2")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first = open_sae(str(tmp_path / "a"))
    assert open_sae(str(tmp_path / "b")).fingerprint() == first.fingerprint() != first.fingerprint([1])
    rewrite(tmp_path / "b" / "layers.2" / "sae.safetensors", lambda tensors: tensors["b_dec"].add_(1))
    assert open_sae(str(tmp_path / "b")).fingerprint([1]) == first.fingerprint([1])
    assert open_sae(str(tmp_path / "b")).fingerprint() != first.fingerprint()


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a cache in the Hub's layout with two layers, without network access."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--EleutherAI--sae-pythia-160m-32k"
    for layer in (0, 1):
        write_sparsify(repository / "snapshots" / commit / f"layers.{layer}", seed=layer)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return tmp_path / "hub"


def test_a_cached_repository_needs_no_network(hub_cache: Path) -> None:
    source = open_sae(f"{HUB_ID}/", cache_dir=hub_cache)
    assert (source.layers, source.name) == ((0, 1), HUB_ID)
    sae = source.load(1, "cpu")
    assert sae.name == f"{HUB_ID}/layers.1"
    assert sae.encode(activations()).l0().max() <= K
    assert len(source.fingerprint([0])) == 64
    weights = next(hub_cache.rglob("layers.0/sae.safetensors"))
    weights.unlink()
    assert len(open_sae(HUB_ID, cache_dir=hub_cache).fingerprint()) == 64  # repository and commit identify the files
    with pytest.raises(RequestError, match=r"sae\.safetensors: no such file"):
        source.load(0, "cpu")


def test_only_requested_layers_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit, asked = tmp_path / "commit", []
    write_sparsify(commit / "layers.0")
    write_sparsify(commit / "layers.1")

    def snapshot_download(name: str, allow_patterns: list[str], cache_dir: Path | None) -> str:
        asked.extend(allow_patterns)
        return str(commit)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    source = open_sae("someone/some-sae")
    assert not any("safetensors" in pattern for pattern in asked)
    source.load(1, "cpu")
    assert [pattern for pattern in asked if "safetensors" in pattern] == ["layers.1/sae.safetensors"]


def test_offline_only_cached_layers_exist(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import IncompleteSnapshotError

    complete = huggingface_hub.snapshot_download

    def knows_of_more_layers(name: str, allow_patterns: list[str], cache_dir: Path) -> str:
        snapshot = complete(name, allow_patterns=allow_patterns, cache_dir=cache_dir)
        if "*/cfg.json" in allow_patterns:
            raise IncompleteSnapshotError("layers.2/cfg.json is missing", snapshot_path=snapshot)
        return snapshot

    monkeypatch.setattr(huggingface_hub, "snapshot_download", knows_of_more_layers)
    source = open_sae(HUB_ID, cache_dir=hub_cache)
    assert source.layers == (0, 1)
    assert source.load(0, "cpu").layer == 0


@pytest.mark.parametrize("name", ["", "no//such/folder", "./nothing", "~nobody/sae", "/absent", "a b", "x" * 5000])
def test_an_unknown_name_is_rejected(name: str) -> None:
    with pytest.raises(RequestError, match="no such folder"):
        open_sae(name)


def test_a_repository_that_cannot_be_reached(hub_cache: Path) -> None:
    with pytest.raises(RequestError, match=r"someone/else: no such local folder, and .* Hugging Face Hub") as caught:
        open_sae("someone/else", cache_dir=hub_cache)
    assert "\n" not in str(caught.value)


# --- broken files ------------------------------------------------------------------------------------------------


def truncate(folder: Path) -> None:
    path = folder / "sae.safetensors"
    os.truncate(path, path.stat().st_size - 100)


def drop_tensor(folder: Path) -> None:
    rewrite(folder / "sae.safetensors", lambda tensors: tensors.pop("b_dec"))


def transpose_decoder(folder: Path) -> None:
    rewrite(folder / "sae.safetensors", lambda tensors: tensors.update(W_dec=tensors["W_dec"].T))


def write_nan(folder: Path) -> None:
    rewrite(folder / "sae.safetensors", lambda tensors: tensors["W_dec"][3].fill_(torch.nan))


def set_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "cfg.json"
        config = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    return change


@pytest.mark.parametrize(("damage", "message"), [
    (truncate, r"sae\.safetensors: not a complete safetensors file"),
    (drop_tensor, r"no tensor 'b_dec'; it has W_dec"),
    (transpose_decoder, r"W_dec has shape \[16, 64\] \(transposed\?\), but its config says \[64, 16\]"),
    (lambda folder: (folder / "sae.safetensors").unlink(), r"sae\.safetensors: no such file"),
    (lambda folder: (folder / "cfg.json").write_text("{not json"), r"cfg\.json: not a readable JSON file"),
    (lambda folder: (folder / "cfg.json").write_text("[1]"), "it must be a JSON object"),
    (lambda folder: (folder / "cfg.json").write_text("{}"), "neither a sparsify config"),
    (lambda folder: (folder / "cfg.json").unlink(), "no SAE in this folder"),
    (lambda folder: folder.rename(folder.with_name("my_sae")), r"rename it, such as layers\.5"),
    (lambda folder: write_sparsify(folder.with_name("h.5")), "two SAEs for layer 5"),
    (lambda folder: write_sparsify(folder.with_name("layers.6"), d_in=8), "layers.6/sae.safetensors: encoder.weight"),
    (set_config(d_in=None), "d_in is missing"),
    (set_config(d_in=32), r"encoder\.weight has shape \[64, 16\]"),
    (set_config(k=0), "k is 0"),
    (set_config(k=65), "k 65 does not fit"),
    (set_config(activation="groupmax", k=7), "groupmax with k 7 does not fit num_latents 64"),
    (set_config(activation="softmax"), "activation is 'softmax'"),
    (set_config(skip_connection=True), "no tensor 'W_skip'"),
])  # fmt: skip
def test_broken_files_are_found_when_opening(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(write_sparsify(tmp_path / "layers.5"))
    with pytest.raises(RequestError, match=message) as caught:
        open_sae(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_broken_values_are_found_when_loading(tmp_path: Path) -> None:
    write_nan(write_sparsify(tmp_path / "layers.5"))
    source = open_sae(str(tmp_path))
    with pytest.raises(RequestError, match=r"sae\.safetensors: W_dec has NaN"):
        source.load(5, "cpu")
    with pytest.raises(RequestError, match=r"layer 4: .* has SAEs for layers 5 only"):
        source.load(4, "cpu")


def test_files_and_empty_folders_are_rejected_as_saes(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="no SAE in this folder"):
        open_sae(str(tmp_path / "empty"))
    write_sparsify(tmp_path / "layers.0")
    with pytest.raises(RequestError, match="it is a file"):
        open_sae(str(tmp_path / "layers.0" / "sae.safetensors"))


def test_missing_settings_have_the_defaults_of_sparsify(tmp_path: Path) -> None:
    write_sparsify(tmp_path / "layers.0", activation=None, num_latents=D_SAE, expansion_factor=None, new_key=1)
    sae = open_sae(str(tmp_path)).load(0, "cpu")
    assert (sae.architecture, sae.d_sae, sae.k) == ("topk", D_SAE, K)


@pytest.mark.parametrize(("changes", "message"), [
    ({"hook_name": "blocks.5.attn.hook_z", "hook_head_index": 3}, "one attention head"),
    ({"hook_name": "blocks.5.mlp.hook_pre"}, "hook_name 'blocks.5.mlp.hook_pre' .* give `hookpoint` .* layers"),
    ({"hook_name": "hook_embed"}, "hook_name 'hook_embed'"),
    ({"normalize_activations": "covariance_whitening"}, r"activation_whitening\.safetensors"),
    ({"normalize_activations": "constant_scalar_rescale"}, "constant_scalar_rescale"),
    ({"normalize_activations": True}, "activation_scaler.json"),
    ({"hook_name_out": "blocks.5.hook_mlp_out"}, "architecture is not that of a transcoder"),
    ({"architecture": "temporal"}, "temporal"),
    ({"activation_fn_str": "tanh-relu"}, "tanh-relu"),
    ({"architecture": "gated"}, "no tensor 'b_gate'"),
    ({"architecture": "topk", "k": 100}, "k 100 is greater than d_sae 64"),
    ({"d_sae": 32}, r"W_enc has shape \[16, 64\]"),
])  # fmt: skip
def test_unsupported_sae_lens_files_are_rejected(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_old_lens(tmp_path, **changes)
    with pytest.raises(RequestError, match=message) as caught:
        open_sae(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_unknown_architecture_is_rejected(tmp_path: Path) -> None:
    pytest.importorskip("sae_lens")
    source = open_sae(str(write_old_lens(tmp_path, architecture="novel")))
    with pytest.raises(RequestError, match="architecture 'novel'"):
        source.load(5, "cpu")


@pytest.mark.parametrize(("changes", "counts"), [
    ({}, True),
    ({"prepend_bos": False}, False),
    ({"exclude_special_tokens": True}, False),
    ({"exclude_special_tokens": [0]}, False),
    ({"exclude_special_tokens": False}, True),
    ({"seqpos_slice": [1, None]}, False),
    ({"seqpos_slice": [None]}, True),
])  # fmt: skip
def test_whether_bos_counts(tmp_path: Path, changes: dict[str, Any], counts: bool) -> None:
    assert open_sae(str(write_old_lens(tmp_path, **changes))).counts_bos is counts
