"""Handling of rewritten weights, compared with TransformerLens, which rewrites tiny Hugging Face models here.

For each setting and each place there is one of three outcomes: the activations are the raw ones, they are the raw ones
minus their mean, or the SAE is rejected. In the last case neither of the first two may hold, or the rejection would be
unnecessary.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformer_lens.pretrained import weight_conversions as convert

from delta_selectivity.errors import RequestError
from delta_selectivity.saes import open_sae
from delta_selectivity.saes.input_norm import centred, normalise
from delta_selectivity.saes.sae_lens.transformer_lens_weights import CHANGES, is_centred

transformers = pytest.importorskip("transformers")
transformer_lens = pytest.importorskip("transformer_lens")

LAYER = 1
IDS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
LENS_SIZES = {"d_vocab": 50, "d_model": 32, "n_layers": 2, "n_heads": 4, "d_head": 8, "n_ctx": 16, "d_mlp": 64}
ROTARY = {"positional_embedding_type": "rotary", "rotary_adjacent_pairs": False}


class Family(NamedTuple):
    """One kind of model, in both libraries."""

    name: str  # in a config of SAE Lens
    config: Callable[[], Any]
    lens_config: dict[str, Any]
    convert: Callable[[Any, Any], dict[str, Tensor]]
    blocks: str
    attention: str
    out_projection: str
    norms: tuple[str, str]  # before attention and before the MLP


FAMILIES = {
    "layer norm, serial": Family(
        "gpt2-small",
        lambda: transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=16, n_inner=64),
        {"normalization_type": "LN", "act_fn": "gelu_new"},
        convert.convert_gpt2_weights,
        "transformer.h", "attn", "attn.c_proj", ("ln_1", "ln_2"),
    ),
    "layer norm, parallel": Family(
        "pythia-70m-deduped",
        lambda: transformers.GPTNeoXConfig(**SIZES, max_position_embeddings=16),
        {"normalization_type": "LN", "act_fn": "gelu", "parallel_attn_mlp": True, "rotary_dim": 2, **ROTARY},
        convert.convert_neox_weights,
        "gpt_neox.layers", "attention", "attention.dense", ("input_layernorm", "post_attention_layernorm"),
    ),
    "rms norm": Family(
        "meta-llama/Llama-3.1-8B",
        lambda: transformers.LlamaConfig(**SIZES, max_position_embeddings=16, attention_bias=False),
        {"normalization_type": "RMS", "final_rms": True, "act_fn": "silu", "gated_mlp": True, "rotary_dim": 8} | ROTARY,
        convert.convert_llama_weights,
        "model.layers", "self_attn", "self_attn.o_proj", ("input_layernorm", "post_attention_layernorm"),
    ),
}  # fmt: skip
NORMED = ("mlp_in", "attn_in", "mlp_normalized", "attn_normalized")
PLACES = ("resid_pre", "resid_post", "mlp_out", "attn_out", "z", *NORMED)


@cache
def tiny_model(family: str) -> Any:
    """Return a random model, including biases and norms: rewriting zeros and ones would change nothing."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family].config(), dtype=torch.float32).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.1, std=0.3)
    return model.requires_grad_(False)


@cache
def raw_activations(family: str) -> dict[str, Tensor]:
    """Return the activations by plain hooks on the Hugging Face model: place -> ``[texts, tokens, width]``."""
    model, parts = tiny_model(family), FAMILIES[family]
    block = model.get_submodule(f"{parts.blocks}.{LAYER}")
    modules = {"resid": block, "mlp": block.mlp}
    modules |= {"attn": block.get_submodule(parts.attention), "z": block.get_submodule(parts.out_projection)}
    modules |= {
        f"{part} norm": block.get_submodule(name) for part, name in zip(("attn", "mlp"), parts.norms, strict=True)
    }
    with inputs_and_outputs(modules) as kept:
        model(IDS)
    places = {"resid_pre": ("resid", "in"), "resid_post": ("resid", "out"), "z": ("z", "in")}
    places |= {f"{part}_{way}": (part, way) for part in ("mlp", "attn") for way in ("in", "out")}
    found = {place: kept[key] for place, key in places.items()}
    return found | {f"{part}_normalized": bare_norm(kept[f"{part} norm", "in"], family) for part in ("attn", "mlp")}


def bare_norm(x: Tensor, family: str) -> Tensor:
    """Return the family's norm without weight and bias."""
    if family == "rms norm":
        return nn.functional.rms_norm(x, x.shape[-1:], eps=1e-6)
    return nn.functional.layer_norm(x, x.shape[-1:])


@cache
def lens_activations(family: str, setting: str | None) -> dict[str, Tensor]:
    """Return TransformerLens's activations, with rewritten or raw weights: place -> ``[texts, tokens, width]``."""
    lens = rewritten(family, setting)
    block = lens.blocks[LAYER]
    with inputs_and_outputs({"mlp": block.mlp, "attn": block.attn}) as kept:
        _, hooks = lens.run_with_cache(IDS)
    stream = {name: hooks[f"blocks.{LAYER}.hook_{name}"] for name in ("resid_pre", "resid_post", "mlp_out", "attn_out")}
    norms = {"attn_normalized": "ln1", "mlp_normalized": "ln2"}
    normed = {name: hooks[f"blocks.{LAYER}.{norm}.hook_normalized"] for name, norm in norms.items()}
    z = hooks[f"blocks.{LAYER}.attn.hook_z"].flatten(2)
    return stream | normed | {"mlp_in": kept["mlp", "in"], "attn_in": kept["attn", "in"], "z": z}


def rewritten(family: str, setting: str | None) -> Any:
    """Return a ``HookedTransformer`` as SAE Lens loads it: without rewriting, except for the setting."""
    model, parts = tiny_model(family), FAMILIES[family]
    config = transformer_lens.HookedTransformerConfig(
        **LENS_SIZES, **parts.lens_config, eps=1e-6 if "rms" in family else 1e-5
    )
    lens = transformer_lens.HookedTransformer(config)
    settings = dict.fromkeys((*CHANGES, "center_unembed"), False) | ({} if setting is None else {setting: True})
    logging.disable(logging.WARNING)  # it reports that it does not centre with RMSNorm
    try:
        lens.load_and_process_state_dict(parts.convert(model, config), **settings)
    finally:
        logging.disable(logging.NOTSET)
    return lens.eval().requires_grad_(False)


@contextmanager
def inputs_and_outputs(modules: dict[str, nn.Module]) -> Iterator[dict[tuple[str, str], Tensor]]:
    """Collect the inputs and outputs of modules inside the context: (name, "in" or "out") -> tensor."""
    kept: dict[tuple[str, str], Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            kept[name, "in"] = args[0] if args else kwargs.get("hidden_states", kwargs.get("query_input"))
            kept[name, "out"] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [module.register_forward_hook(keep(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def fits(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


CASES = [
    (family, setting, place)
    for family in FAMILIES
    for setting in (None, *CHANGES)
    for place in PLACES
    # TransformerLens also rejects it for rotary embeddings; and Llama, unlike Qwen 2, has no value biases to fold
    if (setting != "refactor_factored_attn_matrices" or "serial" in family)
    and (family, setting, place) != ("rms norm", "fold_value_biases", "z")
]


@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")
@pytest.mark.parametrize(("family", "setting", "place"), CASES)
def test_rewritten_weights_are_handled_correctly(family: str, setting: str | None, place: str) -> None:
    raw, expected = raw_activations(family)[place].flatten(0, 1), lens_activations(family, setting)[place].flatten(0, 1)
    less_mean = normalise(raw, "centre").x
    settings = {} if setting is None else {setting: True}
    try:
        says_centred = is_centred(settings, place, None, FAMILIES[family].name, Path("cfg.json"))
    except RequestError as error:
        assert setting is not None and setting in str(error)
        assert not fits(raw, expected) and not fits(less_mean, expected)
    else:
        assert fits(less_mean if says_centred else raw, expected)
        assert not fits(raw if says_centred else less_mean, expected) or place in NORMED


@pytest.mark.parametrize("norm", ["none", "constant_norm_rescale", "layer_norm"])
def test_centring_goes_before_the_other_norms(norm: Any) -> None:
    x = raw_activations("layer norm, serial")["resid_post"].flatten(0, 1)
    ours, theirs = normalise(x, centred(norm)), normalise(x - x.mean(1, keepdim=True), norm)
    torch.testing.assert_close(ours.x, theirs.x, rtol=1e-5, atol=1e-5)
    back = ours.x if ours.scale is None else ours.x * ours.scale.unsqueeze(1)
    assert ours.shift is not None
    torch.testing.assert_close(back + ours.shift.unsqueeze(1), x, rtol=1e-4, atol=1e-4)


def write(folder: Path, **metadata: Any) -> Path:
    """Write an SAE with random weights, saved by SAE Lens."""
    sae_lens = pytest.importorskip("sae_lens")
    names = {"hook_name": "blocks.1.hook_resid_post", "model_name": "gpt2-small"} | metadata
    config = sae_lens.StandardSAEConfig(d_in=32, d_sae=64, metadata=sae_lens.saes.sae.SAEMetadata(**names))
    torch.manual_seed(0)
    sae = sae_lens.StandardSAE(config)
    for parameter in sae.parameters():
        nn.init.normal_(parameter, std=0.3)
    sae.save_model(folder)
    return folder


pytestmark = pytest.mark.filterwarnings("ignore:(?s).*non-empty model_from_pretrained_kwargs")
CENTRED = {"center_writing_weights": True}


@pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")
def test_raw_activations_through_a_centred_sae(tmp_path: Path) -> None:
    """The model's own weights give the activations that the SAE's authors computed on rewritten weights."""
    from sae_lens import SAE

    sae = open_sae(str(write(tmp_path, model_from_pretrained_kwargs=CENTRED))).load(1, "cpu")
    assert sae.input_norm == "centre"
    family = "layer norm, serial"
    raw, processed = (of["resid_post"].flatten(0, 1) for of in
                      (raw_activations(family), lens_activations(family, "center_writing_weights")))  # fmt: skip
    reference = SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        theirs = processed - reference(processed)
    codes = sae.encode(raw)
    torch.testing.assert_close(codes.l1(), reference.encode(processed).detach().abs().sum(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(raw - sae.decode(codes), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("metadata", "message"), [
    ({"model_name": None}, "model_name is missing"),
    ({"hook_name": "transformer.h.1.mlp.act"}, "center_writing_weights of TransformerLens"),
    ({"model_from_pretrained_kwargs": ["center_writing_weights"]}, "but must be of type dict"),
])  # fmt: skip
def test_unsupported_rewriting_is_rejected(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    write(tmp_path, **{"model_from_pretrained_kwargs": CENTRED, **metadata})
    with pytest.raises(RequestError, match=message) as caught:
        open_sae(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [{}, {"center_writing_weights": False}, {"n_devices": 1, "dtype": "bfloat16"}])
def test_other_settings_change_nothing(tmp_path: Path, settings: dict[str, Any]) -> None:
    write(tmp_path, model_from_pretrained_kwargs=settings)
    assert json.loads((tmp_path / "cfg.json").read_text())["metadata"]["model_from_pretrained_kwargs"] == settings
    assert open_sae(str(tmp_path)).load(1, "cpu").input_norm == "none"


@pytest.mark.parametrize(("name", "has_rms_norm"), [
    *[(name, True) for name in ("gemma-2b", "google/gemma-3-1b-pt", "mistral-7b", "qwen2.5-7b-instruct", "yi-6b",
                                "meta-llama/Meta-Llama-3-8B-Instruct", "phi-3", "microsoft/phi-4", "olmo-2-1124-7b")],
    *[(name, False) for name in ("gpt2-small", "pythia-70m-deduped", "EleutherAI/gpt-j-6B", "opt-125m", "phi-2",
                                 "tiny-stories-1M", "gelu-1l", "bloom-560m", "allenai/OLMo-1B-hf")],
])  # fmt: skip
def test_rms_norm_is_never_centred(name: str, has_rms_norm: bool) -> None:
    assert is_centred(CENTRED, "resid_post", None, name, Path("cfg.json")) is not has_rms_norm
