"""Support for SAEs trained on TransformerLens's processed weights, where an exact match is possible.

``HookedTransformer`` can rewrite weights so that the logits stay the same and activations change. SAE Lens loads models
unprocessed (``from_pretrained_no_processing``), except for what a config lists under ``model_from_pretrained_kwargs``;
its own list has ``center_writing_weights`` for GPT-2's ``res-jb`` and ``mlp-tm`` releases. Effects on activations:

- ``center_writing_weights``: in models with LayerNorm, the residual stream and what is added to it lose their mean over
  coordinates, which LayerNorm subtracts anyway. TransformerLens skips it for RMSNorm, whose output it would change.
- ``fold_ln``: the norms' weights move into the next layer, so the inputs of MLP and attention lack them
  (``hook_normalized`` always did).
- ``fold_value_biases``, ``refactor_factored_attn_matrices``: change the heads' outputs, not attention's output.

Before SAE Lens 3.19.2 (https://github.com/decoderesearch/SAELens/pull/279) models were processed by default and the
config did not record it. Such SAEs are treated as unprocessed, as the library does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from delta_selectivity.errors import RequestError
from delta_selectivity.saes.hookpoints import is_module_path

STREAM = frozenset({"resid_pre", "resid_mid", "resid_post", "mlp_out", "attn_out"})
"""The residual stream and what is added to it."""

CHANGES = {
    "center_writing_weights": STREAM,
    "fold_ln": frozenset({"mlp_in", "attn_in"}),
    "fold_value_biases": frozenset({"z"}),
    "refactor_factored_attn_matrices": frozenset({"z"}),
}
"""Option of TransformerLens -> the hook points whose activations it changes."""

_RMS_NORM = re.compile(
    r"gemma|llama|vicuna|mistral|mixtral|qwen|deepseek|phi-?[34]|\byi-|olmo-?[23e]|apertus|gpt-oss|smollm|\bt5", re.I
)


def is_centred(
    settings: Mapping[str, Any], hookpoint: str, input_hookpoint: str | None, model_name: str | None, path: Path
) -> bool:
    """Return whether an SAE was trained on activations minus their mean over coordinates.

    Args:
        settings: ``model_from_pretrained_kwargs`` of the config at ``path``.
        hookpoint: the hook point that the SAE reconstructs.
        input_hookpoint: the hook point that it reads, if different.
        model_name: the model in the config; only its family matters (LayerNorm or RMSNorm).
        path: the config's path, for messages.

    Raises:
        RequestError: the rewritten weights change these activations in a way that cannot be reproduced.
    """
    options = {name for name in CHANGES if settings.get(name)}
    if "center_writing_weights" in options and model_name is not None and _RMS_NORM.search(model_name):
        options.remove("center_writing_weights")
    places = [hookpoint, *([] if input_hookpoint is None else [input_hookpoint])]
    changed = {name for name in options for place in places if place in CHANGES[name] or is_module_path(place)}
    if not changed:
        return False
    if changed == {"center_writing_weights"} and hookpoint in STREAM and input_hookpoint is None:
        if model_name is None:
            raise RequestError(
                f"{path}: trained with center_writing_weights, but model_name is missing: add it, because that option"
                " changes the activations of models with LayerNorm, but not with RMSNorm"
            )
        return True
    what = f"{' and '.join(sorted(changed))} of TransformerLens, which changes activations at {' and '.join(places)}"
    raise RequestError(f"{path}: trained with {what} and cannot be reproduced with the model's own weights")
