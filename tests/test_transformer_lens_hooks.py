"""Hook points compared with TransformerLens's own hooks, on weights that it converted without processing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from torch import Tensor
from transformers import AutoModelForCausalLM

from delta_selectivity.models.language_model import Site, open_model

pytestmark = pytest.mark.filterwarnings("ignore:HookedTransformer is deprecated")

HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "z": "attn.hook_z",
    "attn_normalized": "ln1.hook_normalized",
    "resid_mid": "hook_resid_mid",
    "mlp_post": "mlp.hook_post",
    "mlp_normalized": "ln2.hook_normalized",
}
CONFIG_BY_NAME = {"gemma2": "gemma-2-2b", "gemma3_text": "gemma-3-1b-pt"}  # TransformerLens knows these by name only


@pytest.mark.parametrize(
    "name", ["gpt_neox", "gpt2", "gptj", "gpt_neo", "opt", "mistral", "qwen2", "qwen3", *CONFIG_BY_NAME]
)
def test_hookpoints_equal_the_hooks_of_transformer_lens(name: str, tiny_model: Path, tmp_path: Path):
    folder = FAMILIES[name].save(tmp_path / "model", tiny_model)
    ids = torch.randint(1, 300, (3, 20), generator=torch.Generator().manual_seed(2))
    theirs = transformer_lens_cache(name, folder, ids)
    serial = f"blocks.0.{HOOKS['resid_mid']}" in theirs
    sites = [Site(layer, name) for layer in (0, 1) for name in HOOKS if serial or name != "resid_mid"]
    for (layer, hookpoint), x in open_model(str(folder)).load(sites, "cpu", "float32").activations(ids).items():
        expected = theirs[f"blocks.{layer}.{HOOKS[hookpoint]}"].flatten(2)
        torch.testing.assert_close(x, expected, atol=2e-5, rtol=0, msg=lambda m, at=(layer, hookpoint): f"{at}: {m}")


def transformer_lens_cache(name: str, folder: Path, ids: Tensor) -> Any:
    """Return the values of TransformerLens's hooks when it runs the folder's weights."""
    lens = pytest.importorskip("transformer_lens")
    from transformer_lens import loading_from_pretrained as loading

    config_file = folder / "config.json"
    config_file.write_text(
        json.dumps({**json.loads(config_file.read_text()), "n_ctx": 128})
    )  # it requests GPT-2 for that
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = CONFIG_BY_NAME.get(name, str(folder))
    config = loading.get_pretrained_model_config(theirs, dtype=torch.float32, device="cpu")
    if name in CONFIG_BY_NAME:
        _shrink(config, model.config)
    state = loading.get_pretrained_state_dict(theirs, config, model)
    hooked = lens.HookedTransformer(config)
    hooked.load_and_process_state_dict(
        state, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    with torch.inference_mode():
        _, cache = hooked.run_with_cache(ids)
    return cache


def _shrink(theirs: Any, ours: Any) -> None:
    """Return TransformerLens's config of a published Gemma, with the sizes of a tiny one."""
    theirs.tokenizer_name = None
    theirs.d_model, theirs.n_layers, theirs.d_mlp = ours.hidden_size, ours.num_hidden_layers, ours.intermediate_size
    theirs.n_heads, theirs.n_key_value_heads = ours.num_attention_heads, ours.num_key_value_heads
    theirs.d_head = theirs.rotary_dim = ours.head_dim
    theirs.d_vocab = theirs.d_vocab_out = ours.vocab_size
    theirs.n_ctx, theirs.window_size = ours.max_position_embeddings, ours.sliding_window
    theirs.attn_scale = math.sqrt(ours.query_pre_attn_scalar)
    theirs.attn_types = ["local" if kind == "sliding_attention" else "global" for kind in ours.layer_types]
