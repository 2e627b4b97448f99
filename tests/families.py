"""Tiny random models of many families in the Hub's layout, and the places of their parts, written by hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

N_LAYERS, D_MODEL, MAX_LENGTH = 3, 32, 128
_LLAMA = {
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": MAX_LENGTH,
    "initializer_range": 0.2,
}
_GPT2 = {"n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "n_positions": MAX_LENGTH, "initializer_range": 0.2}
_GROUPED = {"num_key_value_heads": 2}
_SLIDING = {"sliding_window": 4, "head_dim": 16, **_GROUPED}  # fewer tokens than the texts have; z wider than d_model


@dataclass(frozen=True)
class Family:
    """How to make a model, and the module of layer {} for each place, in the model with its LM head."""

    name: str  # as in the config's model_type
    settings: dict[str, Any]
    block: str
    attention: str
    mlp: str  # the part whose input is mlp_in
    projection: str  # of the attention module
    attention_out: str
    mlp_out: str
    attention_norm: str  # norms before the part
    mlp_norm: str
    d_z: int = D_MODEL
    per_layer: tuple[str, ...] = ()  # lists of the config with an entry for each layer

    def place(self, hookpoint: str, layer: int) -> tuple[str, str]:
        """Return the module path, and whether its input or its output is the hook point."""
        own = {
            "resid_pre": ("", "input"),
            "resid_post": ("", "output"),
            "attn_in": (self.attention, "input"),
            "mlp_in": (self.mlp, "input"),
            "z": (f"{self.attention}.{self.projection}", "input"),
            "attn_out": (self.attention_out, "output"),
            "mlp_out": (self.mlp_out, "output"),
        }
        name, side = own[hookpoint]
        return f"{self.block.format(layer)}.{name}".rstrip("."), side

    def save(self, folder: Path, tokenizer: Path, adds_bos: bool = False, dtype: torch.dtype = torch.float32) -> Path:
        """Save random weights, norms included, with that folder's tokenizer; `adds_bos`: one that adds BOS itself."""
        its_tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        if adds_bos:
            bos = (its_tokenizer.bos_token, its_tokenizer.bos_token_id)
            its_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
                single=f"{bos[0]} $A", special_tokens=[bos]
            )
        its_tokenizer.save_pretrained(folder)
        torch.manual_seed(0)
        config = CONFIG_MAPPING[self.name](
            vocab_size=len(its_tokenizer), bos_token_id=0, eos_token_id=0, **self.settings
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                if (
                    weight.ndim == 1
                ):  # move norms and biases away from 1 and 0, so that places differ that otherwise agree
                    weight.add_(0.3 * torch.randn_like(weight))
        model.to(dtype).save_pretrained(folder)
        return folder


def _llama_like(name: str, settings: dict[str, Any], **more: Any) -> Family:
    parts = {
        "block": "model.layers.{}", "attention": "self_attn", "mlp": "mlp", "projection": "o_proj",
        "attention_out": "self_attn", "mlp_out": "mlp",
        "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    }  # fmt: skip
    return Family(name, _LLAMA | settings, **(parts | more))


_NORMED_AFTER = {
    "attention_out": "post_attention_layernorm",
    "mlp_out": "post_feedforward_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "per_layer": ("layer_types",),
    "d_z": 64,
}
_GPT2_PARTS = {"block": "transformer.h.{}", "attention": "attn", "mlp": "mlp", "attention_out": "attn",
               "mlp_out": "mlp", "attention_norm": "ln_1"}  # fmt: skip

FAMILIES = {
    family.name: family
    for family in [
        _llama_like("gpt_neox", {}, block="gpt_neox.layers.{}", attention="attention", attention_out="attention",
                    projection="dense"),
        Family("gpt2", _GPT2, projection="c_proj", mlp_norm="ln_2", **_GPT2_PARTS),
        _llama_like("llama", _GROUPED),
        _llama_like("gemma", _GROUPED | {"head_dim": 16}, d_z=64),
        _llama_like("gemma2", _SLIDING, **_NORMED_AFTER),
        _llama_like("gemma3_text", _SLIDING | {"sliding_window_pattern": 2}, **_NORMED_AFTER),
        _llama_like("qwen2", _GROUPED, per_layer=("layer_types",)),
        _llama_like("qwen3", _GROUPED | {"head_dim": 16}, d_z=64, per_layer=("layer_types",)),
        _llama_like("mistral", _SLIDING, d_z=64),
        Family("opt", {**_LLAMA, "ffn_dim": 64, "word_embed_proj_dim": D_MODEL, "pad_token_id": 0, "init_std": 0.2},
               "model.decoder.layers.{}", "self_attn", "fc1", "out_proj", "self_attn", "fc2",
               "self_attn_layer_norm", "final_layer_norm"),
        _llama_like("phi", {}, projection="dense", mlp_norm="input_layernorm"),
        Family("gptj", {**_GPT2, "rotary_dim": 4}, projection="out_proj", mlp_norm="ln_1", **_GPT2_PARTS),
        Family("gpt_neo", {"hidden_size": D_MODEL, "num_layers": 4, "num_heads": 4, "window_size": 4,
                           "max_position_embeddings": MAX_LENGTH, "attention_types": [[["global", "local"], 2]],
                           "initializer_range": 0.2},
               projection="attention.out_proj", mlp_norm="ln_2", per_layer=("attention_layers",), **_GPT2_PARTS),
    ]
}  # fmt: skip
