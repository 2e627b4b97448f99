"""Transcoders compared with the libraries that write them: they read at one place and write at another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Request
from safetensors.torch import save_file
from torch import Tensor

from delta_selectivity.errors import RequestError
from delta_selectivity.saes import Sae, SparseRows, open_sae

D_IN, D_OUT, D_SAE, K = 16, 12, 64, 4


def dense(codes: SparseRows) -> Tensor:
    """Return ``[rows, n_cols]``."""
    rows = torch.arange(codes.n_rows).repeat_interleave(codes.crow.diff())
    return torch.zeros(codes.n_rows, codes.n_cols).index_put_((rows, codes.col.long()), codes.value)


def activations(rows: int = 50) -> Tensor:
    return 2 * torch.randn(rows, D_IN, generator=torch.Generator().manual_seed(0)) + 0.5


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# --- sparsify ----------------------------------------------------------------------------------------------------


def write_sparsify(folder: Path, **settings: Any) -> Any:
    """Write a random coder with the library."""
    sparsify = pytest.importorskip("sparsify")
    coder = sparsify.SparseCoder(D_IN, sparsify.SparseCoderConfig(k=K, num_latents=D_SAE, **settings))
    torch.manual_seed(0)
    for parameter in coder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    coder.save_to_disk(folder)
    return coder


@pytest.mark.parametrize(("folder", "reads", "writes"), [
    ("layers.3.mlp", "mlp_in", "layers.<layer>.mlp"),
    ("layers.3.attention", "attn_in", "layers.<layer>.attention"),
    ("layers.3", "resid_pre", "resid_post"),
    ("gpt_neox.layers.3.mlp.act", "gpt_neox.layers.<layer>.mlp.act:in", "gpt_neox.layers.<layer>.mlp.act"),
])  # fmt: skip
def test_sparsify_reads_what_the_module_receives(tmp_path: Path, folder: str, reads: str, writes: str) -> None:
    write_sparsify(tmp_path / folder, transcode=True)
    source = open_sae(str(tmp_path))
    assert (source.input_hookpoint, source.hookpoint, source.layers) == (reads, writes, (3,))
    assert (source.d_in, source.d_out) == (D_IN, D_IN)
    sae = source.load(3, "cpu")
    assert (sae.input_hookpoint, sae.hookpoint, sae.architecture) == (reads, writes, "topk transcoder")


def test_the_output_of_a_module_before_its_norm(tmp_path: Path) -> None:
    """The output of Gemma's MLP is not ``mlp_out``, which is normalised before it is added to the residual stream."""
    write_sparsify(tmp_path / "layers.3.mlp", transcode=True)
    (tmp_path / "config.json").write_text('{"model": "google/gemma-2-2b"}')
    source = open_sae(str(tmp_path), "model.layers.<layer>.mlp")
    assert (source.input_hookpoint, source.hookpoint) == ("mlp_in", "layers.<layer>.mlp")


@pytest.mark.parametrize(("settings", "architecture"), [
    ({"transcode": True}, "topk transcoder"),
    ({"transcode": True, "skip_connection": True}, "topk skip transcoder"),
    ({"transcode": True, "skip_connection": True, "activation": "groupmax"}, "groupmax skip transcoder"),
    ({"skip_connection": True}, "topk skip"),
])  # fmt: skip
def test_agrees_with_sparsify(tmp_path: Path, settings: dict[str, Any], architecture: str) -> None:
    reference = write_sparsify(tmp_path / "layers.3.mlp", **settings)
    sae, x = open_sae(str(tmp_path)).load(3, "cpu"), activations()
    assert sae.architecture == architecture
    with torch.no_grad():
        output = reference(x, y=x)
    codes = sae.encode(x)
    assert_close(dense(codes), torch.zeros(len(x), D_SAE).scatter_(1, output.latent_indices, output.latent_acts))
    assert_close(sae.decode(codes, x), output.sae_out)


# --- SAE Lens ----------------------------------------------------------------------------------------------------

KINDS = {
    "transcoder": "standard transcoder",
    "skip_transcoder": "standard skip transcoder",
    "jumprelu_transcoder": "jumprelu transcoder",
    "jumprelu_skip_transcoder": "jumprelu skip transcoder",
}


def make_lens(kind: str, norm: str = "none", **metadata: Any) -> Any:
    """Return a random transcoder of the library."""
    sae_lens = pytest.importorskip("sae_lens")
    from sae_lens.registry import get_sae_class

    names = {"hook_name": "blocks.5.ln2.hook_normalized", "hook_name_out": "blocks.5.hook_mlp_out"} | metadata
    transcoder_class, config_class = get_sae_class(kind)
    torch.manual_seed(0)
    transcoder = transcoder_class(config_class(
        d_in=D_IN, d_out=D_OUT, d_sae=D_SAE, apply_b_dec_to_input=False, normalize_activations=norm,
        metadata=sae_lens.saes.sae.SAEMetadata(prepend_bos=True, **names),
    ))  # fmt: skip
    for parameter in transcoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return transcoder


def assert_agrees(sae: Sae, reference: Any) -> None:
    x = activations()
    with torch.no_grad():
        expected, recon = reference.encode(x), reference(x)
    assert 0 < int((expected != 0).sum()) < expected.numel()
    codes = sae.encode(x)
    assert_close(dense(codes), expected)
    assert_close(sae.decode(codes, x), recon)
    some = torch.tensor([7, 3])
    assert_close(sae.decode(codes.select(some), x[some]), recon[some])


@pytest.mark.parametrize("norm", ["none", "constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_sae_lens(tmp_path: Path, kind: str, norm: str) -> None:
    reference = make_lens(kind, norm)
    reference.save_model(tmp_path)
    source = open_sae(str(tmp_path))
    assert (source.input_hookpoint, source.hookpoint, source.layers) == ("mlp_normalized", "mlp_out", (5,))
    assert (source.d_in, source.d_out) == (D_IN, D_OUT)
    sae = source.load(5, "cpu")
    assert (sae.architecture, sae.d_in, sae.d_out) == (KINDS[kind], D_IN, D_OUT)
    assert_agrees(sae, reference)


@pytest.mark.parametrize("kind", KINDS)
def test_input_scaling_is_folded_as_the_library_folds_it(tmp_path: Path, kind: str) -> None:
    reference = make_lens(kind, "expected_average_only_in")
    reference.save_model(tmp_path)
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 1.7}')
    reference.fold_activation_norm_scaling_factor(1.7)
    assert_agrees(open_sae(str(tmp_path)).load(5, "cpu"), reference)


def test_a_place_with_only_a_hugging_face_name(tmp_path: Path) -> None:
    make_lens(
        "jumprelu_skip_transcoder",
        hook_name="blocks.5.hook_mlp_in",
        hf_hook_name="model.layers.5.pre_feedforward_layernorm.output",
        hf_hook_name_out="model.layers.5.post_feedforward_layernorm.output",
    ).save_model(tmp_path)
    source = open_sae(str(tmp_path))
    assert (source.input_hookpoint, source.hookpoint) == ("mlp_in", "mlp_out")


@pytest.mark.parametrize(("names", "message"), [
    ({"hook_name_out": None}, "hook_name_out, the hook point"),
    ({"hook_name_out": "blocks.6.hook_mlp_out"}, "its input is in layer 5 and its output in layer 6"),
    ({"hook_name": "blocks.5.hook_mlp_in"}, "hook_name 'blocks.5.hook_mlp_in' is not supported"),
    ({"hook_name": "blocks.5.mlp.hook_in", "model_from_pretrained_kwargs": {"fold_ln": True}},
     "fold_ln of TransformerLens"),
    ({"model_from_pretrained_kwargs": {"center_writing_weights": True}}, "center_writing_weights of TransformerLens"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:(?s).*non-empty model_from_pretrained_kwargs")
def test_unsupported_transcoders_are_rejected(tmp_path: Path, names: dict[str, Any], message: str) -> None:
    make_lens("transcoder", **names).save_model(tmp_path)
    with pytest.raises(RequestError, match=message) as caught:
        open_sae(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_decoder_bias_is_never_subtracted_from_the_input(tmp_path: Path) -> None:
    make_lens("transcoder").save_model(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | {"apply_b_dec_to_input": True}))
    with pytest.raises(RequestError, match="apply_b_dec_to_input must be false"):
        open_sae(str(tmp_path))


# --- both --------------------------------------------------------------------------------------------------------


def test_layers_of_one_source_read_the_same_place(tmp_path: Path) -> None:
    write_sparsify(tmp_path / "layers.3.mlp", transcode=True)
    write_sparsify(tmp_path / "layers.4.mlp")
    with pytest.raises(RequestError, match=r"have different values of input_hookpoint: mlp_in .* and None"):
        open_sae(str(tmp_path))


def test_a_skip_connection_of_the_wrong_shape(tmp_path: Path) -> None:
    make_lens("skip_transcoder").save_model(tmp_path)
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "sae_weights.safetensors")
    tensors["W_skip"] = tensors["W_skip"].T.contiguous()
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    with pytest.raises(RequestError, match=r"W_skip has shape \[16, 12\] \(transposed\?\)"):
        open_sae(str(tmp_path))


def test_a_skip_connection_needs_what_was_encoded(tmp_path: Path) -> None:
    write_sparsify(tmp_path / "layers.3.mlp", transcode=True, skip_connection=True)
    sae = open_sae(str(tmp_path)).load(3, "cpu", torch.bfloat16)
    codes = sae.encode(activations())
    assert sae.decode(codes, activations()).dtype == torch.float32
    with pytest.raises(AssertionError, match="skip connection"):
        sae.decode(codes)


# --- the program -------------------------------------------------------------------------------------------------


def project_in_sparsify(folder: Path, weight: Tensor, bias: Tensor) -> None:
    """Write attention's output projection as a transcoder of sparsify, entirely in the skip connection."""
    sparsify = pytest.importorskip("sparsify")
    config = sparsify.SparseCoderConfig(k=K, num_latents=D_SAE, transcode=True, skip_connection=True)
    coder = sparsify.SparseCoder(weight.shape[1], config)  # W_dec of a transcoder is initialised with zeros
    coder.W_skip.data, coder.b_dec.data = weight, bias
    coder.save_to_disk(folder / "layers.1.attention.dense")


def project_in_sae_lens(folder: Path, weight: Tensor, bias: Tensor) -> None:
    """Write the same as one of SAE Lens, which has names for the projection's input and output."""
    sae_lens = pytest.importorskip("sae_lens")
    names = {"hook_name": "blocks.1.attn.hook_z", "hook_name_out": "blocks.1.hook_attn_out"}
    d_out, d_in = weight.shape
    transcoder = sae_lens.SkipTranscoder(sae_lens.SkipTranscoderConfig(
        d_in=d_in, d_out=d_out, d_sae=D_SAE, apply_b_dec_to_input=False,
        metadata=sae_lens.saes.sae.SAEMetadata(**names),
    ))  # fmt: skip
    transcoder.W_dec.data.zero_()
    transcoder.W_skip.data, transcoder.b_dec.data = weight, bias
    transcoder.save_model(folder)


@pytest.mark.parametrize("write", [project_in_sparsify, project_in_sae_lens])
def test_a_perfect_transcoder_loses_nothing(write: Any, tiny_model: Path, people_csv: Path, tmp_path: Path) -> None:
    """It is compared with the module's output; compared with its input, nothing would be left."""
    from transformers import AutoModel

    dense_module = AutoModel.from_pretrained(tiny_model).layers[1].attention.dense
    write(tmp_path / "sae", dense_module.weight.data.clone(), dense_module.bias.data + 0.0)
    request = Request(tiny_model, (tmp_path / "sae",), people_csv, tmp_path / "out")
    assert request.run() == 0
    (record,) = (tmp_path / "out").glob("*.json")
    layer = json.loads(record.read_text())["layer_1"]
    assert layer["fvu_pos"] < 1e-9 and layer["fvu_whole"] < 1e-9
    (cell,) = (value for value in layer.values() if isinstance(value, dict))
    assert abs(cell["delta_sel"]) <= 0.01 and abs(cell["transfer_delta"]) <= 0.01
