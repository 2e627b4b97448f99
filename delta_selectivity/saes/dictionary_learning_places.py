"""Detection of the layer and hook point of a dictionary_learning SAE."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from delta_selectivity.errors import RequestError
from delta_selectivity.saes.hookpoints import HookPoint, canonical, input_of, parse

MLP, ATTENTION = "layers.<layer>.mlp", "layers.<layer>.attention"
"""The library records module outputs before the model normalises or scales them for the residual stream."""
_PLACES = {
    "resid": "resid_post", "resid_out": "resid_post", "resid_post": "resid_post", "resid_pre": "resid_pre",
    "mlp": MLP, "mlp_out": MLP, "mlp_in": "mlp_in",
    "attn": ATTENTION, "attention": ATTENTION, "attn_out": ATTENTION, "attn_in": "attn_in",
}  # fmt: skip
"""Common names of submodules, as they stand before ``_layer_5``."""

_INPUTS = ("resid_pre", "mlp_in", "attn_in")

_NAMED = re.compile(r"(?P<place>[a-z_]+?)(?:_?layer_?(?P<layer>\d+))?", re.IGNORECASE)


def find_places(
    trainer: Mapping[str, Any], buffer: Mapping[str, Any], path: Path, hookpoint: str | None
) -> tuple[HookPoint, str | None]:
    """Return the hook point that an SAE reconstructs, and the one it reads if they differ.

    Args:
        trainer: the ``trainer`` object in the config at ``path``.
        buffer: its ``buffer`` object, whose ``io`` says whether it holds the submodule's input, output, or both.
        path: path of the config; without ``submodule_name``, the last folders of the path are searched for a name.
        hookpoint: the user's hook point, used if neither names one.

    Raises:
        RequestError: nothing names the hook point, or two sources contradict each other.
    """
    layer = trainer.get("layer")
    if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int) or layer < 0):
        raise RequestError(f"{path}: trainer.layer is {layer!r}, but must be the index of a layer")
    hook = _read_name(str(trainer.get("submodule_name")), layer)
    for folder in reversed(path.parent.parts[-4:]):
        hook = hook or _read_name(folder, None)
    if hook is None and hookpoint is not None and layer is not None:
        hook = HookPoint(layer, canonical(hookpoint))
        if buffer.get("io") == "in":  # the SAE reconstructs its own input, and `hookpoint` names that
            return hook, None
    if hook is None:
        raise RequestError(
            f"{path}: it does not name the SAE's hook point: "
            + ("give `hookpoint`" if layer is not None else "add layer and submodule_name to trainer")
            + ", or rename the folder, such as resid_post_layer_5"
        )
    if layer is not None and layer != hook.layer:
        raise RequestError(f"{path}: trainer.layer is {layer}, but its submodule_name or folder says {hook.layer}")
    return _apply_io(hook, buffer, path)


def _read_name(name: str, layer: int | None) -> HookPoint | None:
    """Parse ``resid_post_layer_5``, ``mlp_out`` (layer given), ``blocks.5.hook_resid_post`` or a numbered path."""
    match = _NAMED.fullmatch(name)
    if match is not None and (place := _PLACES.get(match["place"].lower())):
        number = match["layer"] if match["layer"] is not None else layer
        return None if number is None else HookPoint(int(number), place)
    return parse(name)


def _apply_io(hook: HookPoint, buffer: Mapping[str, Any], path: Path) -> tuple[HookPoint, str | None]:
    io = buffer.get("io", "out")
    names_input = hook.place in _INPUTS
    if io == "out" or (io == "in" and names_input):
        return hook, None
    if io == "in":
        return HookPoint(hook.layer, input_of(hook.place)), None
    if io == "in_and_out" and not names_input:
        return hook, input_of(hook.place)
    raise RequestError(f"{path}: buffer.io is {io!r} at {hook.place}; supported: in, out and in_and_out of a submodule")
