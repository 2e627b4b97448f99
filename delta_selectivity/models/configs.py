"""Read sizes from a model's config, for any family's field names, and truncate a config to the first layers."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

MAX_LENGTH_NAMES = ("max_position_embeddings", "max_seq_len", "seq_length")
NO_LIMIT = 2**31 - 1  # for relative positions with a tokenizer that sets no maximum


class Sizes(NamedTuple):
    """Sizes of the text part of a model."""

    n_layers: int
    d_model: int
    max_length: int  # tokens


def read_sizes(config: Any, tokenizer: Any) -> Sizes:
    """Return the sizes of a decoder-only model. Raises AttributeError or ValueError for other configs."""
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError("it has an encoder")
    text = config.get_text_config(decoder=True)
    return Sizes(int(text.num_hidden_layers), int(text.hidden_size), _max_length(text, tokenizer))


def _max_length(text: Any, tokenizer: Any) -> int:
    """Return the number of positions of the model, or the tokenizer's maximum if the model has no limit.

    LongRoPE (Phi-3) changes its rotary angles if the longest text of a batch exceeds the original limit. Below that
    limit, a text has the same activations in every batch.
    """
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return int(rope["original_max_position_embeddings"])
    limits = [getattr(text, name, None) for name in MAX_LENGTH_NAMES]
    return min(int(next((n for n in limits if n), tokenizer.model_max_length)), NO_LIMIT)


def truncated(config: Any, n_layers: int) -> Any:
    """Return a copy of the config with only the first `n_layers` layers.

    Lists with one entry per layer (`layer_types` of Gemma and Qwen, `attention_layers` of GPT-Neo) are truncated too.
    """
    short = copy.deepcopy(config)
    text = short.get_text_config(decoder=True)
    whole = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == whole and "layer" in name:
            setattr(text, name, value[:n_layers])
    text.num_hidden_layers = n_layers
    return short


def configured_width(config: Any, hookpoint: str) -> int:
    """Return the width of a named hook point from the config alone."""
    text = config.get_text_config(decoder=True)
    if hookpoint != "z":
        return int(text.hidden_size)
    d_head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(text.num_attention_heads * d_head)
