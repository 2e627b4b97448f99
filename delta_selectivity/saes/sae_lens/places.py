"""Detection of the layer and hook point of an SAE Lens SAE."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from delta_selectivity.errors import RequestError
from delta_selectivity.saes.hookpoints import INPUT, HookPoint, canonical, parse
from delta_selectivity.saes.source import SaeHeader

_KNOWN = (
    "hook_resid_pre, hook_resid_mid, hook_resid_post, hook_mlp_out, hook_attn_out, hook_z, mlp.hook_post, ln1 and "
    "ln2.hook_normalized"
)
_LAYER = re.compile(r"(?:blocks|layers|h)\.(\d+)\.")


class Places(NamedTuple):
    """The hook points of an SAE or transcoder."""

    layer: int
    hookpoint: str  # the hook point that it reconstructs
    input_hookpoint: str | None  # the hook point that a transcoder reads; None for an autoencoder

    @classmethod
    def of(cls, header: SaeHeader) -> Places:
        """Return the hook points in a header."""
        return cls(header.layer, header.hookpoint, header.input_hookpoint)


def find_places(flat: Mapping[str, Any], path: Path, *, transcodes: bool, hookpoint: str | None = None) -> Places:
    """Find the hook points in the flattened config at ``path``; the folder's name replaces a missing ``hook_name``.

    ``hookpoint`` is the user's, used if the config's name cannot be measured. Raises `RequestError` if a name
    cannot be measured, if an autoencoder names two places, or if a transcoder names only one or crosses layers.
    """
    hook = _hook(flat, "hook_name", path, None if transcodes else hookpoint)
    if not transcodes:
        if flat.get("hook_name_out") not in (None, flat.get("hook_name")):
            raise RequestError(
                f"{path}: hook_name_out {flat['hook_name_out']!r} differs from hook_name, as in a transcoder, but the"
                " architecture is not that of a transcoder"
            )
        return Places(hook.layer, hook.place, None)
    if not flat.get("hook_name_out"):
        raise RequestError(f"{path}: hook_name_out, the hook point of the transcoder's output, is missing")
    out = _hook(flat, "hook_name_out", path, hookpoint)
    if out.layer != hook.layer:
        raise RequestError(
            f"{path}: its input is in layer {hook.layer} and its output in layer {out.layer}, but must be in one layer"
        )
    return Places(out.layer, out.place, hook.place)


def _hook(flat: Mapping[str, Any], key: str, path: Path, hookpoint: str | None) -> HookPoint:
    """Return the hook point of one key: by TransformerLens's name if known, else by the module path next to it."""
    name = str(flat.get(key) or path.parent.name)
    module = re.sub(r"\.input$", INPUT, str(flat.get(f"hf_{key}") or "")).removesuffix(".output")
    for candidate in (name, module):
        hook = parse(candidate)
        if hook is not None and not hook.place.startswith("blocks.<layer>"):  # a TransformerLens name outside the table
            return hook
    layer = _LAYER.search(name)
    if hookpoint is not None and layer is not None:
        return HookPoint(int(layer[1]), canonical(hookpoint))
    raise RequestError(
        f"{path}: {key} {name!r} is not supported; supported: {_KNOWN}, and module paths: give `hookpoint` as the path "
        "of the module whose output it is, such as layers.<layer>.mlp.act, or whose input it is, with :in appended"
    )
