"""Models that are not standard decoders: each is measured correctly or rejected with one line that says what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from conftest import write_sparsify
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
)

from delta_selectivity.errors import RequestError
from delta_selectivity.models.configs import NO_LIMIT
from delta_selectivity.models.language_model import ModelInfo, Site, open_model
from delta_selectivity.run.planning import resolve_hookpoint
from delta_selectivity.saes import open_sae
from delta_selectivity.saes.folders import find_members

TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.2}
LLAMA = {**TINY, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 128}


@pytest.fixture
def save(tiny_model: Path, tmp_path: Path):
    """Return a function that saves a random model of a type, with the tiny model's tokenizer, and opens it."""

    def call(kind: str, auto: Any = AutoModelForCausalLM, **settings: Any) -> ModelInfo:
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        tokenizer.save_pretrained(tmp_path / kind)
        torch.manual_seed(0)
        config = CONFIG_MAPPING[kind](vocab_size=len(tokenizer), **settings)
        auto.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / kind)
        return open_model(str(tmp_path / kind))

    return call


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 300, (2, 12), generator=torch.Generator().manual_seed(3))


def activations(info: ModelInfo, hookpoint: str, ids: Tensor, layer: int = 1) -> Tensor:
    (x,) = info.load([Site(layer, hookpoint)], "cpu", "float32").activations(ids).values()
    return x


def test_a_bidirectional_model_is_rejected(save):
    info = save("bert", AutoModel, **TINY, intermediate_size=64, max_position_embeddings=128)
    with pytest.raises(RequestError, match="not a causal decoder"):
        info.load([Site(1, "encoder.layer.<layer>")], "cpu", "float32")


def test_an_encoder_decoder_is_rejected_before_its_weights(tiny_model: Path, tmp_path: Path):
    shutil.copytree(tiny_model, tmp_path / "t5")
    CONFIG_MAPPING["t5"](d_model=32, num_layers=2).save_pretrained(tmp_path / "t5")
    with pytest.raises(RequestError, match="not a decoder-only language model"):
        open_model(str(tmp_path / "t5"))


@pytest.mark.parametrize(
    ("kind", "settings", "true_place"),
    [
        ("granite", {**LLAMA, "residual_multiplier": 0.5}, "model.layers.<layer>.mlp.down_proj"),  # scaled first
        ("bloom", {**TINY, "n_layer": 3, "n_head": 4}, "transformer.h.<layer>.mlp.dense_4h_to_h"),  # the sum is inside
        ("opt", {**TINY, "ffn_dim": 64, "word_embed_proj_dim": 32, "do_layer_norm_before": False,
                 "max_position_embeddings": 128}, "model.decoder.layers.<layer>.fc2"),  # a norm after the sum
    ],
)  # fmt: skip
def test_parts_that_are_not_added_directly_are_available_only_by_path(save, ids, kind, settings, true_place):
    info = save(kind, **settings)
    for hookpoint in ("mlp_out", "attn_out"):
        with pytest.raises(RequestError, match=r"is not resid_post .* module path"):
            info.load([Site(1, hookpoint)], "cpu", "float32")
    assert activations(info, "resid_post", ids).shape == (2, 12, 32)
    assert activations(info, true_place, ids).shape == (2, 12, 32)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("falcon", {**TINY, "new_decoder_architecture": True, "num_kv_heads": 2}),
        ("falcon", {**TINY, "parallel_attn": False, "bias": True}),
        ("glm4", {**LLAMA, "head_dim": 8, "pad_token_id": 0}),  # norms after both parts, with other names than Gemma's
        ("gpt_bigcode", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}),
        ("gpt_neox", {**LLAMA, "use_parallel_residual": False}),
        *((kind, LLAMA) for kind in ("cohere", "olmo", "olmo2", "smollm3", "stablelm", "starcoder2", "qwen3_moe")),
    ],
)
def test_further_families_are_supported(save, ids, kind, settings):
    info = save(kind, **({"pad_token_id": 0} | settings))
    sites = [Site(layer, name) for layer in (0, 2) for name in ("resid_pre", "attn_out", "mlp_out", "resid_post", "z")]
    model = info.load(sites, "cpu", "float32")
    found, alone = model.activations(ids), model.activations(ids[:1, :5])
    assert {site: x.shape[-1] for site, x in found.items()} == info.widths(sites)
    for layer in (0, 2):
        before, attention, mlp, after = (found[Site(layer, name)] for name in [site.hookpoint for site in sites[:4]])
        torch.testing.assert_close(before + attention + mlp, after, atol=1e-6 * float(after.abs().max()), rtol=0)
        torch.testing.assert_close(after[:1, :5], alone[Site(layer, "resid_post")], atol=1e-5, rtol=1e-5)


def test_a_norm_that_is_not_before_its_part_is_rejected(save, ids):
    info = save("olmo2", **LLAMA)  # norms after the parts; the norm's output is added
    before, after = (activations(info, name, ids) for name in ("resid_pre", "resid_post"))
    added = activations(info, "attn_out", ids) + activations(info, "mlp_out", ids)
    torch.testing.assert_close(before + added, after, atol=1e-5, rtol=0)
    with pytest.raises(RequestError, match=r"mlp_normalized: .* module path"):
        info.load([Site(1, "mlp_normalized")], "cpu", "float32")


def test_blocks_with_unknown_parts_are_available_by_path(save, ids):
    info = save("ctrl", n_embd=32, n_layer=3, n_head=4, dff=64, n_positions=128)
    path = "transformer.h.<layer>.multi_head_attention"
    assert info.widths([Site(1, path)]) == {Site(1, path): 32}
    with pytest.raises(RequestError, match=r"attn_out: EncoderLayer has none of .* multi_head_attention"):
        info.widths([Site(1, "attn_out")])


def test_unknown_blocks_are_reported_with_paths(save):
    info = save("bert", AutoModel, **TINY, intermediate_size=64, max_position_embeddings=128)
    for hookpoint in ("resid_post", "layers.<layer>"):
        with pytest.raises(RequestError, match=r"it has encoder\.layer\.<layer>, encoder\.layer\.<layer>\.attention"):
            info.widths([Site(1, hookpoint)])


def test_experts_have_widths_too(save, ids):
    info = save("mixtral", **LLAMA, num_local_experts=4)
    sites = [Site(1, name) for name in ("resid_post", "mlp_out", "z")]
    assert info.widths(sites) == dict.fromkeys(sites, 32)
    assert activations(info, "mlp_out", ids).shape == (2, 12, 32)


def test_the_text_part_of_a_multimodal_model_is_measured(tiny_model: Path, tmp_path: Path, ids: Tensor):
    shutil.copytree(tiny_model, tmp_path / "gemma3", ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    text = {**LLAMA, "head_dim": 16, "sliding_window": 4, "vocab_size": 400}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=398,
                          boi_token_index=396, eoi_token_index=397)  # fmt: skip
    whole = Gemma3ForConditionalGeneration(config).eval()
    whole.save_pretrained(tmp_path / "gemma3")
    info = open_model(str(tmp_path / "gemma3"))
    assert (info.n_layers, info.d_model, info.max_length) == (3, 32, 128)
    seen: list[Tensor] = []
    whole.model.language_model.layers[1].register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.inference_mode():
        whole(input_ids=ids)
    model = info.load([Site(1, "resid_post"), Site(1, "model.language_model.layers.<layer>.mlp:in")], "cpu", "float32")
    torch.testing.assert_close(model.activations(ids)[Site(1, "resid_post")], seen[0], atol=1e-6, rtol=0)
    assert not any("vision" in name for name, _ in model.module.named_modules())


@pytest.mark.parametrize(
    ("hookpoint", "told"),
    [
        ("resid_middle", "use resid_post, resid_pre, mlp_out"),
        ("layers.<layer>.nothing", r"has no such module; it has layers\.<layer>, .*layers\.<layer>\.mlp"),
        ("vision_tower.layers.<layer>.mlp", "has no such module"),  # what comes before the layers matters
        ("layers.<layer>.mlp.dense_h_to_4h:out", "has no such module"),
    ],
)
def test_a_missing_hookpoint_error_lists_the_available_ones(tiny_model, hookpoint, told):
    info = open_model(str(tiny_model))
    with pytest.raises(RequestError, match=told):
        info.widths([Site(0, hookpoint)])


def test_a_module_without_a_row_for_each_token_is_refused(save):
    info = save("bloom", **TINY, n_layer=3, n_head=4)
    with pytest.raises(RequestError, match=r"has shape \[2, 4, 11, 11\], not one row for each of 2 x 11 tokens"):
        info.widths([Site(0, "h.<layer>.self_attention.attention_dropout")])


def test_a_module_that_the_model_runs_without_is_refused(save):
    site = Site(0, "h.<layer>.attn.attn_dropout")  # scaled_dot_product_attention replaces it
    info = save("gpt2", n_embd=32, n_layer=3, n_head=4, n_positions=128)
    with pytest.raises(RequestError, match="the model does not run that module in layer 0"):
        info.widths([site])
    with pytest.raises(RequestError, match="the model does not run that module in layer 0"):
        info.load([site], "cpu", "float32")


def test_texts_stay_below_the_length_of_dynamic_rotary_scaling(save, ids):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    info = save("phi3", **LLAMA, pad_token_id=0, original_max_position_embeddings=16, rope_parameters=rope)
    assert info.max_length == 16
    longer = torch.cat([ids, ids], dim=1)
    assert not torch.allclose(activations(info, "z", longer)[:, :12], activations(info, "z", ids), atol=1e-3)


def test_a_model_without_length_limit_uses_the_tokenizers(save):
    info = save("bloom", **TINY, n_layer=3, n_head=4)
    assert info.max_length == NO_LIMIT
    settings = Path(info.name) / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "model_max_length": 77}))
    assert open_model(info.name).max_length == 77


MODELING = '''
import torch
from transformers import LlamaConfig, LlamaForCausalLM


class OddConfig(LlamaConfig):
    model_type = "odd"


class OddForCausalLM(LlamaForCausalLM):
    """A Llama that looks at its numbers, so that shapes alone do not run."""

    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.embed_tokens.register_forward_hook(lambda _m, _i, out: out * float(out.sum().item() == out.sum()))
'''


@pytest.fixture
def odd(save) -> Path:
    """Return a repository with Python code of its own that can only build the model with its head."""
    folder = Path(save("llama", **LLAMA).name)
    (folder / "modeling_odd.py").write_text(MODELING)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "modeling_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "odd", "auto_map": classes}))
    return folder


def test_a_repository_s_own_code_runs_on_request_only(odd: Path, ids: Tensor, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(RequestError, match=r"Python code that must run: .*`trust_remote_code`"):
        open_model(str(odd))
    info = open_model(str(odd), trust_remote_code=True)
    path = Site(1, "model.layers.<layer>.mlp.up_proj")
    sites = [Site(1, "resid_post"), Site(1, "z"), path]
    assert info.widths(sites) == {sites[0]: 32, sites[1]: 32, path: 64}  # from the config; its code needs numbers
    whole = AutoModelForCausalLM.from_pretrained(odd, trust_remote_code=True, dtype=torch.float32).eval()
    seen: list[Tensor] = []
    whole.model.layers[1].register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.inference_mode():
        whole(input_ids=ids)
    torch.testing.assert_close(activations(info, "resid_post", ids), seen[0], atol=1e-6, rtol=0)
    before = info.fingerprint()
    (odd / "modeling_odd.py").write_text(MODELING + "\n")
    assert open_model(str(odd), trust_remote_code=True).fingerprint() != before


def test_a_revision_is_another_model(tiny_model: Path, tmp_path: Path, monkeypatch, ids: Tensor):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--tiny"
    (repository / "refs").mkdir(parents=True)
    commits = {"main": "a" * 40, "step1": "b" * 40}
    for revision, commit in commits.items():
        shutil.copytree(tiny_model, repository / "snapshots" / commit)
        (repository / "refs" / revision).write_text(commit)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.gpt_neox.embed_in.weight.data.mul_(2)
    model.save_pretrained(repository / "snapshots" / commits["step1"])
    first, second = open_model("owner/tiny"), open_model("owner/tiny", "step1")
    assert (first.fingerprint(), second.fingerprint()) == tuple(commits.values())
    assert (first.files.revision, second.files.revision) == (None, "step1")
    (repository / "refs" / "step1").write_text(commits["main"])  # the branch moves after the model was opened
    torch.testing.assert_close(activations(second, "resid_pre", ids, 0), 2 * activations(first, "resid_pre", ids, 0))
    with pytest.raises(RequestError, match="at revision step2"):
        open_model("owner/tiny", "step2")
    with pytest.raises(RequestError, match="local folder"):
        open_model(str(tiny_model), "main")


@pytest.mark.parametrize("kind", ["gemma3_text", "olmo2", "glm4", "granite", "llama"])
def test_module_output_and_added_output_are_distinguished(save, ids: Tensor, kind: str):
    own = {"gemma3_text": {"head_dim": 16}, "glm4": {"head_dim": 8}, "granite": {"residual_multiplier": 0.5}}
    info = save(kind, **LLAMA, pad_token_id=0, **own.get(kind, {}))
    names = info.names_of_modules()
    paths = {"layers.<layer>.mlp": "mlp_out", "layers.<layer>.self_attn": "attn_out"}
    assert names == (paths if kind == "llama" else {path: path for path in paths})
    whole, seen = AutoModelForCausalLM.from_pretrained(info.name, dtype=torch.float32).eval(), []
    whole.model.layers[1].mlp.register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.inference_mode():
        whole(input_ids=ids)
    torch.testing.assert_close(activations(info, "layers.<layer>.mlp", ids), seen[0], atol=1e-6, rtol=0)


def test_resid_mid_of_parallel_blocks_is_rejected(save, ids: Tensor):
    info = save("gpt_neox", **LLAMA)
    with pytest.raises(RequestError, match=r"resid_mid: .* resid_pre \+ attn_out is not resid_mid"):
        activations(info, "resid_mid", ids)


def test_module_names_of_other_libraries_are_translated(save, tmp_path: Path):
    """sparsify's folders use `layers`, and dictionary_learning's readers `attention`, for any model."""
    gemma = save("gemma3_text", **LLAMA, pad_token_id=0, head_dim=16).names_of_modules()
    gpt2 = save("gpt2", n_embd=32, n_layer=3, n_head=4, n_positions=128).names_of_modules()
    for folder, in_gemma, in_gpt2 in [
        ("layers.0.mlp", "layers.<layer>.mlp", "mlp_out"),
        ("layers.0.attention", "layers.<layer>.self_attn", "attn_out"),
        ("model.layers.0.post_feedforward_layernorm", "mlp_out", "mlp_out"),
        ("vision_tower.layers.0.mlp", "vision_tower.layers.<layer>.mlp", "vision_tower.layers.<layer>.mlp"),
    ]:
        (write_sparsify(tmp_path / folder, [0]) / "layers.0").rename(tmp_path / folder / folder)
        source = open_sae(str(tmp_path / folder))
        assert resolve_hookpoint(source, gemma).hookpoint == in_gemma
        assert resolve_hookpoint(source, gpt2).hookpoint == in_gpt2
        typed = open_sae(str(tmp_path / folder), "layers.<layer>.mlp")
        assert resolve_hookpoint(typed, gpt2).hookpoint.endswith("layers.<layer>.mlp")  # a path is used as it is typed
        assert resolve_hookpoint(open_sae(str(tmp_path / folder), "resid_mid"), gpt2).hookpoint == "resid_mid"


def test_an_unknown_hook_point_of_an_sae_can_be_given(tmp_path: Path):
    config = {"hook_name": "blocks.1.mlp.hook_pre", "architecture": "standard", "d_in": 4, "d_sae": 8}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    tensors = {"W_enc": torch.ones(4, 8), "W_dec": torch.ones(8, 4), "b_enc": torch.ones(8), "b_dec": torch.ones(4)}
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    with pytest.raises(RequestError, match=r"hook_pre' is not supported; .* give `hookpoint`"):
        open_sae(str(tmp_path))
    source = open_sae(str(tmp_path), "layers.<layer>.mlp.dense_h_to_4h")
    assert (source.layers, source.hookpoint) == ((1,), "layers.<layer>.mlp.dense_h_to_4h")


def test_a_layer_of_a_cross_layer_transcoder_is_refused_before_anything_is_fetched():
    pytest.importorskip("sae_lens")
    with pytest.raises(RequestError, match="cross-layer transcoder cannot be measured"):
        open_sae("mntss-gemma-2-2b-2.5m-clt-as-per-layer/layer_3")


@pytest.mark.parametrize(
    ("file", "told"),
    [("adapter_config.json", "an adapter without its model"), ("cfg.json", "looks like an SAE")],
)
def test_a_folder_that_is_not_a_model_is_described(file, told, tmp_path):
    (tmp_path / file).write_text("{}")
    with pytest.raises(RequestError, match=told):
        open_model(str(tmp_path))


def test_an_adapter_without_peft_is_rejected(tiny_model, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    monkeypatch.setattr("transformers.utils.is_peft_available", lambda: False)
    with pytest.raises(RequestError, match="install peft"):
        open_model(str(folder))


def test_an_sae_with_a_config_is_told_from_a_model_with_a_file_of_that_name(tiny_model, tmp_path):
    (tmp_path / "config.json").write_text('{"trainer": {}}')
    (tmp_path / "ae.pt").write_bytes(b"")
    with pytest.raises(RequestError, match="looks like an SAE"):
        open_model(str(tmp_path))
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "cfg.json").write_text("{}")
    open_model(str(folder))


@pytest.mark.parametrize("below", ["", "layers.0"])
def test_swapped_model_and_sae_are_reported(below, tiny_model, tmp_path):
    sae = tmp_path / "sae"
    (sae / below).mkdir(parents=True)
    (sae / below / "cfg.json").write_text("{}")
    with pytest.raises(RequestError, match=r"`model` .*looks like an SAE.*did you exchange `model` and `saes`"):
        open_model(str(sae))
    with pytest.raises(RequestError, match=r"looks like a language model.*did you exchange `saes` and `model`"):
        find_members(Path(tiny_model), "mine")


@pytest.mark.parametrize(
    ("files", "told"),
    [
        (["cfg.json", "sae.safetensors"], "looks like an SAE"),
        (["layers.3/cfg.json", "layers.3/sae.safetensors", "config.json"], "looks like an SAE"),
        (["README.md"], "not available from the Hub"),
        (["model.safetensors", "sae/cfg.json"], "not available from the Hub"),
    ],
)
def test_the_hub_id_of_an_sae_as_the_model_is_reported(files, told, monkeypatch):
    def absent(*_: object, **__: object) -> str:
        raise EntryNotFoundError("404: no config.json", response=httpx.Response(404, request=httpx.Request("GET", "/")))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", absent)
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda name, revision=None: files)
    with pytest.raises(RequestError, match=told):
        open_model("owner/name")
