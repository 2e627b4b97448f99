"""Match SAEs trained on TransformerLens's processed weights where that is exact; refuse the rest.

``HookedTransformer`` can rewrite weights so that the logits stay and activations change. SAE Lens loads models without
(``from_pretrained_no_processing``) except for what a config lists under ``model_from_pretrained_kwargs``; its own list
says ``center_writing_weights`` of GPT-2's ``res-jb`` and ``mlp-tm`` releases. What each does to activations:

- ``center_writing_weights``: the residual stream and what is added to it lose their mean over coordinates, in models
  with LayerNorm, which subtracts that mean in any case; RMSNorm would notice, so TransformerLens then leaves it out.
- ``fold_ln``: the norms' weights move into the next layer, so what MLP and attention receive is without them
  (``hook_normalized`` was so before, too).
- ``fold_value_biases``, ``refactor_factored_attn_matrices``: the heads' outputs change, attention's output does not.

Before SAE Lens 3.19.2 (https://github.com/decoderesearch/SAELens/pull/279) models were rewritten unless the trainer
was told otherwise, and the config was silent. Those are taken as raw, as the library takes them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from delta_selectivity.errors import RequestError
from delta_selectivity.saes.hookpoints import is_module_path

STREAM = frozenset({"resid_pre", "resid_mid", "resid_post", "mlp_out", "attn_out"})
"""The residual stream, and what is added to it."""

CHANGES = {
    "center_writing_weights": STREAM,
    "fold_ln": frozenset({"mlp_in", "attn_in"}),
    "fold_value_biases": frozenset({"z"}),
    "refactor_factored_attn_matrices": frozenset({"z"}),
}
"""What TransformerLens may be told to rewrite, and where activations then differ."""

_RMS_NORM = re.compile(
    r"gemma|llama|vicuna|mistral|mixtral|qwen|deepseek|phi-?[34]|\byi-|olmo-?[23e]|apertus|gpt-oss|smollm|\bt5", re.I
)


def is_centred(
    settings: Mapping[str, Any], hookpoint: str, input_hookpoint: str | None, model_name: str | None, path: Path
) -> bool:
    """Whether an SAE was trained on activations less their mean over coordinates.

    Args:
        settings: ``model_from_pretrained_kwargs`` of the config at ``path``.
        hookpoint: the place that the SAE reconstructs.
        input_hookpoint: where it reads, if that is another place.
        model_name: the model that the config names; only its family matters, LayerNorm or RMSNorm.

    Raises:
        RequestError: the weights were rewritten in a way that changes these activations and cannot be followed.
    """
    asked = {name for name in CHANGES if settings.get(name)}
    if "center_writing_weights" in asked and model_name is not None and _RMS_NORM.search(model_name):
        asked.remove("center_writing_weights")
    places = [hookpoint, *([] if input_hookpoint is None else [input_hookpoint])]
    changed = {name for name in asked for place in places if place in CHANGES[name] or is_module_path(place)}
    if not changed:
        return False
    if changed == {"center_writing_weights"} and hookpoint in STREAM and input_hookpoint is None:
        if model_name is None:
            raise RequestError(
                f"{path}: trained with center_writing_weights, but it names no model_name: add it, because that changes"
                " the activations of models with LayerNorm and not of those with RMSNorm"
            )
        return True
    what = f"{' and '.join(sorted(changed))} of TransformerLens, which changes activations at {' and '.join(places)}"
    raise RequestError(f"{path}: trained on weights rewritten by {what}; the model's own weights do not give these")
