"""Translation of hook point names between sparsify, SAE Lens and this project.

===================  ==================================  ===========================  ==============================
ours                 what it is, of one layer            module paths (sparsify, HF)  SAE Lens (TransformerLens)
===================  ==================================  ===========================  ==============================
``resid_post``       the residual stream after it        ``layers.5``                 ``blocks.5.hook_resid_post``
``resid_pre``        the residual stream before it       ``layers.5:in``              ``blocks.5.hook_resid_pre``
``resid_mid``        the stream between attention and    none                         ``blocks.5.hook_resid_mid``
                     the MLP
``mlp_out``          what the MLP adds to the stream     none                         ``blocks.5.hook_mlp_out``
``mlp_in``           what the MLP receives               ``layers.5.mlp:in``          ``blocks.5.mlp.hook_in``
``mlp_normalized``   the same, before the norm's         none                         ``blocks.5.ln2.hook_normalized``
                     weight and bias
``mlp_post``         what the MLP's last map receives    none                         ``blocks.5.mlp.hook_post``
``attn_out``         what attention adds to the stream   none                         ``blocks.5.hook_attn_out``
``attn_in``          what attention receives             ``layers.5.attention:in``    ``blocks.5.attn.hook_in``
``attn_normalized``  the same, before the norm's         none                         ``blocks.5.ln1.hook_normalized``
                     weight and bias
``z``                the concatenated head outputs       ``...attention.dense:in``    ``blocks.5.attn.hook_z``
a path               a module's output, or with ``:in``  ``layers.5.mlp.act``         none
                     its input
===================  ==================================  ===========================  ==============================

Paths contain ``<layer>`` instead of the number. ``layers.5.mlp`` and ``layers.5.attention`` are module outputs. Most
models add them to the stream unchanged (``mlp_out``, ``attn_out``); Gemma 2 normalises them first. This depends on the
model (``names_of_modules``), so they remain paths here.

In older versions of TransformerLens, ``hook_normalized`` of a LayerNorm came after its weight and bias; that of an
RMSNorm never did. Gemma Scope's transcoders, which SAE Lens lists there, were trained on inputs without the gain
(arXiv 2408.05147, "Language model technical details"). For Gemma Scope 2 transcoders SAE Lens says ``hook_mlp_in``,
which is ``hook_resid_mid``, but they read after the norm; they are not supported.
"""

from __future__ import annotations

import re
from typing import NamedTuple

INPUT = ":in"
"""Suffix of a module path that selects the module's input instead of its output."""

_ATTENTION = ("attention", "attn", "self_attn")
_OUT_PROJECTION = ("dense", "c_proj", "o_proj", "out_proj")
_AFTER_LAYER = {
    "": "resid_post",
    "hook_resid_post": "resid_post",
    INPUT: "resid_pre",
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_mlp_out": "mlp_out",
    "post_feedforward_layernorm": "mlp_out",  # Gemma 2 and 3 normalise what the MLP adds
    f"mlp{INPUT}": "mlp_in",
    "mlp.hook_in": "mlp_in",
    "ln2.hook_normalized": "mlp_normalized",
    "mlp.hook_post": "mlp_post",
    "pre_feedforward_layernorm": "mlp_in",  # in the same models, directly before the MLP
    "hook_attn_out": "attn_out",
    **dict.fromkeys((f"{name}{INPUT}" for name in _ATTENTION), "attn_in"),
    "attn.hook_in": "attn_in",
    "ln1.hook_normalized": "attn_normalized",
    **dict.fromkeys((f"{name}.{last}{INPUT}" for name in _ATTENTION for last in _OUT_PROJECTION), "z"),
    "attn.hook_z": "z",
    "hook_z": "z",
}
"""The part of a name after the layer number -> hook point."""

_OUTPUT_OF = {"mlp": "mlp_out", **dict.fromkeys(_ATTENTION, "attn_out")}
"""Module -> the hook point that its output equals in most models."""
_INPUT_OF = {"resid_post": "resid_pre", "mlp_out": "mlp_in", "attn_out": "attn_in"}
_NUMBERED = re.compile(
    r"(?P<before>(?:[A-Za-z_]\w*\.)*)(?P<list>layers|h|blocks)\.(?P<layer>\d+)(?P<after>\.[^:]+)?(?P<input>:in)?"
)


class HookPoint(NamedTuple):
    """A layer and a place in it."""

    layer: int
    place: str  # a name of the table above, or a module path with `<layer>`


def parse(name: str) -> HookPoint | None:
    """Parse a name with a layer number; return None if it is not one."""
    match = _NUMBERED.fullmatch(name)
    if match is None:
        return None
    path = f"{match['before']}{match['list']}.<layer>{match['after'] or ''}{match['input'] or ''}"
    return HookPoint(int(match["layer"]), canonical(path))


def canonical(place: str) -> str:
    """Return the table's name of a place given in any dialect; a path outside the table is returned unchanged."""
    after = _after_layer(place)
    return place if after is None else _AFTER_LAYER.get(after, place)


def same_place(requested: str, found: str) -> bool:
    """Return whether the requested place may be the one in an SAE's config.

    Prefixes of the list of layers are ignored, and a module's output matches what it adds to the residual stream:
    ``gpt_neox.layers.<layer>.mlp``, ``layers.<layer>.mlp`` and ``mlp_out`` are the same.
    """
    return _comparison_key(requested) == _comparison_key(found)


def input_of(place: str) -> str:
    """Return the input of the module whose output is at this place: where a transcoder of the module reads."""
    return _INPUT_OF.get(place, canonical(f"{place}{INPUT}"))


def is_module_path(place: str) -> bool:
    """Return whether a place is a module path rather than a name of the table."""
    return "<layer>" in place


def _comparison_key(place: str) -> str:
    place = canonical(place)
    after = _after_layer(place)
    return place if after is None else _OUTPUT_OF.get(after, after)


def _after_layer(place: str) -> str | None:
    """Return what follows ``<layer>``, without the dot; None if the place is not a path."""
    _, number, after = place.partition("<layer>")
    return after.removeprefix(".") if number else None
