"""Translate names of hook points between sparsify, SAE Lens and this project.

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
``z``                the heads' outputs side by side     ``...attention.dense:in``    ``blocks.5.attn.hook_z``
a path               a module's output, or with ``:in``  ``layers.5.mlp.act``         none
                     its input
===================  ==================================  ===========================  ==============================

A path has ``<layer>`` in place of the number. ``layers.5.mlp`` and ``layers.5.attention`` are what the modules give. In
most models that is what is added to the stream, ``mlp_out`` and ``attn_out``; Gemma 2 normalises it first. Which it is
follows from the model (``names_of_modules``), so they stay paths here.
``hook_normalized`` of a LayerNorm stood behind weight and bias in older
versions of TransformerLens; of an RMSNorm it never did, and Gemma Scope's transcoders, which SAE Lens lists there, were
trained on inputs without the gain (arXiv 2408.05147, "Language model technical details"). SAE Lens says
``hook_mlp_in``, which is ``hook_resid_mid``, of Gemma Scope 2 transcoders, which read behind the norm: not known here.
"""

from __future__ import annotations

import re
from typing import NamedTuple

INPUT = ":in"
"""Appended to a module path: what the module receives, not what it gives."""

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
    "pre_feedforward_layernorm": "mlp_in",  # of the same models, straight before the MLP
    "hook_attn_out": "attn_out",
    **dict.fromkeys((f"{name}{INPUT}" for name in _ATTENTION), "attn_in"),
    "attn.hook_in": "attn_in",
    "ln1.hook_normalized": "attn_normalized",
    **dict.fromkeys((f"{name}.{last}{INPUT}" for name in _ATTENTION for last in _OUT_PROJECTION), "z"),
    "attn.hook_z": "z",
    "hook_z": "z",
}
"""What follows the layer's number in a name, and the place it means."""

_OUTPUT_OF = {"mlp": "mlp_out", **dict.fromkeys(_ATTENTION, "attn_out")}
"""Modules, and the place whose value they give in most models."""
_INPUT_OF = {"resid_post": "resid_pre", "mlp_out": "mlp_in", "attn_out": "attn_in"}
_NUMBERED = re.compile(
    r"(?P<before>(?:[A-Za-z_]\w*\.)*)(?P<list>layers|h|blocks)\.(?P<layer>\d+)(?P<after>\.[^:]+)?(?P<input>:in)?"
)


class HookPoint(NamedTuple):
    """Where in the model."""

    layer: int
    place: str
    """A name of the table above, or a path with ``<layer>``."""


def parse(name: str) -> HookPoint | None:
    """The hook point that a name with a layer number means; None if it is no such name."""
    match = _NUMBERED.fullmatch(name)
    if match is None:
        return None
    path = f"{match['before']}{match['list']}.<layer>{match['after'] or ''}{match['input'] or ''}"
    return HookPoint(int(match["layer"]), canonical(path))


def canonical(place: str) -> str:
    """The table's name of a place, whatever the dialect; a path that the table does not list stays as it is."""
    after = _after_layer(place)
    return place if after is None else _AFTER_LAYER.get(after, place)


def same_place(asked: str, found: str) -> bool:
    """Whether a place that the user asks for may be the one that an SAE says of itself.

    Paths may differ in what comes before the list of layers, and what a module gives may be what is added to the
    stream: ``gpt_neox.layers.<layer>.mlp``, ``layers.<layer>.mlp`` and ``mlp_out``.
    """
    return _loosely(asked) == _loosely(found)


def input_of(place: str) -> str:
    """What the module receives whose output this place is: where a transcoder of that module reads."""
    return _INPUT_OF.get(place, canonical(f"{place}{INPUT}"))


def is_module_path(place: str) -> bool:
    """Whether a place is a path, and not a name of the table."""
    return "<layer>" in place


def _loosely(place: str) -> str:
    place = canonical(place)
    after = _after_layer(place)
    return place if after is None else _OUTPUT_OF.get(after, after)


def _after_layer(place: str) -> str | None:
    """What follows ``<layer>``, without the dot between them; None if the place is no path."""
    _, number, after = place.partition("<layer>")
    return after.removeprefix(".") if number else None
