"""Read sizes from a model's config, whatever its family calls them, and shorten a config to the first layers."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

MAX_LENGTH_NAMES = ("max_position_embeddings", "max_seq_len", "seq_length")
NO_LIMIT = 2**31 - 1  # relative positions, and a tokenizer that says nothing


class Sizes(NamedTuple):
    """Of the text part of a model."""

    n_layers: int
    d_model: int
    max_length: int  # tokens


def read_sizes(config: Any, tokenizer: Any) -> Sizes:
    """Sizes of a decoder-only model. Raises AttributeError or ValueError if the config is no such model's."""
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError("it has an encoder")
    text = config.get_text_config(decoder=True)
    return Sizes(int(text.num_hidden_layers), int(text.hidden_size), _max_length(text, tokenizer))


def _max_length(text: Any, tokenizer: Any) -> int:
    """Positions that the model has; where it has any number, what its tokenizer says.

    LongRoPE (Phi-3) has other rotary angles once a batch's longest text is beyond the original limit: a text keeps
    its values in every batch only if none is.
    """
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return int(rope["original_max_position_embeddings"])
    own = [getattr(text, name, None) for name in MAX_LENGTH_NAMES]
    return min(int(next((n for n in own if n), tokenizer.model_max_length)), NO_LIMIT)


def truncated(config: Any, n_layers: int) -> Any:
    """A copy of the config that builds only the first `n_layers` layers.

    Lists with an entry for each layer (`layer_types` of Gemma and Qwen, `attention_layers` of GPT-Neo) are cut too.
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
    """Width of a hook point with a name, by the config alone."""
    text = config.get_text_config(decoder=True)
    if hookpoint != "z":
        return int(text.hidden_size)
    d_head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(text.num_attention_heads * d_head)
