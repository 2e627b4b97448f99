"""Names of the places in a model that SAEs are trained on, in three dialects, and the one this project speaks.

============================  ===========================  ======================
ours                          sparsify (module paths)      SAE Lens (TransformerLens)
============================  ===========================  ======================
layer 5, ``resid_post``       ``layers.5``                 ``blocks.5.hook_resid_post``, ``blocks.6.hook_resid_pre``
layer 5, ``mlp_out``          ``layers.5.mlp``             ``blocks.5.hook_mlp_out``
layer 5, ``attn_out``         ``layers.5.attention``       ``blocks.5.hook_attn_out``
a path with ``<layer>``       ``layers.5.mlp.act``         any other
============================  ===========================  ======================
"""

from __future__ import annotations

import re
from typing import NamedTuple

_LAST_PART = {
    "": "resid_post",
    "hook_resid_post": "resid_post",
    "mlp": "mlp_out",
    "hook_mlp_out": "mlp_out",
    "attention": "attn_out",
    "attn": "attn_out",
    "self_attn": "attn_out",
    "hook_attn_out": "attn_out",
}
_NUMBERED = re.compile(r"(?P<before>(?:[A-Za-z_]\w*\.)*)(?P<list>layers|h|blocks)\.(?P<layer>\d+)(?:\.(?P<after>.+))?")


class HookPoint(NamedTuple):
    """Where in the model."""

    layer: int
    place: str
    """``resid_post``, ``mlp_out``, ``attn_out``, or a path with ``<layer>``."""


def parse(name: str) -> HookPoint | None:
    """The hook point that a name with a layer number means; None if it is no such name.

    ``hook_resid_pre`` of a layer is ``resid_post`` of the layer before; of layer 0 it is no layer's output.
    """
    match = _NUMBERED.fullmatch(name)
    if match is None:
        return None
    layer, after = int(match["layer"]), match["after"] or ""
    if after == "hook_resid_pre" and layer > 0:
        return HookPoint(layer - 1, "resid_post")
    path = f"{match['before']}{match['list']}.<layer>"
    return HookPoint(layer, _LAST_PART.get(after, f"{path}.{after}"))


def same_place(asked: str, found: str) -> bool:
    """Whether a place that the user asks for is the one that an SAE says of itself.

    Paths may differ in what comes before the list of layers: ``gpt_neox.layers.<layer>.mlp`` is ``mlp_out``.
    """
    return _after_layer(asked) == _after_layer(found)


def _after_layer(place: str) -> str:
    _, number, after = place.partition("<layer>")
    after = after.removeprefix(".")
    return _LAST_PART.get(after, after) if number else place
