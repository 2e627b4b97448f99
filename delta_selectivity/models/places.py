"""Map hook point names to modules of a decoder, and to the module's input or output.

Families use different names for the same module, and some normalise a module's output before adding it to the residual
stream (Gemma 2 and 3, OLMo 2, GLM 4). As in TransformerLens, `attn_out` and `mlp_out` are what is added. The mapping by
name is a guess; `checks` verifies it on the loaded model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor, nn

from delta_selectivity.errors import RequestError
from delta_selectivity.models.norms import bare_norm

BLOCKS = ("layers", "h", "blocks")
ATTENTION = ("attention", "self_attn", "attn", "self_attention")
ATTENTION_PROJECTION = ("dense", "o_proj", "out_proj", "c_proj", "attention.out_proj")  # in the attention module
ATTENTION_NORM = ("input_layernorm", "ln_1", "self_attn_layer_norm")
MLP = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
MLP_PROJECTION = ("dense_4h_to_h", "c_proj", "down_proj", "fc_out", "fc2", "w2")  # in the MLP module, or the block
MLP_NORM = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2", "final_layer_norm", *ATTENTION_NORM)
"""OPT's `final_layer_norm` belongs to a block; blocks with one norm (Phi, GPT-J) give both modules the same input."""
WRAPPERS = frozenset({"model", "language_model", "transformer", "decoder", "gpt_neox"})
"""Possible path prefixes of the list of blocks: the modules that contain a decoder."""

HOOKPOINTS = (
    "resid_post", "resid_pre", "mlp_out", "attn_out", "mlp_in", "attn_in", "mlp_normalized", "attn_normalized", "z",
    "resid_mid", "mlp_post",
)  # fmt: skip
LAYER, INPUT = "<layer>", ":in"
SHOWN = 24  # modules listed as alternatives in errors


class Site(NamedTuple):
    """A layer and hook point at which activations are taken.

    `resid_pre` and `resid_post` are a block's input and output, `mlp_out` and `attn_out` what its modules add to the
    stream, `mlp_in` and `attn_in` the inputs of those modules, `*_normalized` the same before the norm's weight and
    bias (TransformerLens's `ln2.hook_normalized`), `z` the concatenated head outputs before the output projection,
    `resid_mid` the stream between attention and the MLP, `mlp_post` the input of the MLP's last linear map.
    """

    layer: int
    hookpoint: str  # one of `HOOKPOINTS`, or a module path with `<layer>`: its output, or with `:in` appended its input

    def read_by(self, input_hookpoint: str | None) -> Site:
        """Return the input site of an SAE that reconstructs this site: the same, except for a transcoder."""
        return self if input_hookpoint is None else Site(self.layer, input_hookpoint)


@dataclass(frozen=True, eq=False)
class Tap:
    """The input or the output of a module."""

    module: nn.Module
    side: Literal["input", "output"] = "output"
    change: Callable[[Tensor], Tensor] | None = None  # applied to the value; None: unchanged


def layers_needed(sites: Collection[Site]) -> int:
    """Return how many blocks must be built to compute every site; a block's input is the previous block's output."""
    return max(max(site.layer, 1) if site.hookpoint == "resid_pre" else site.layer + 1 for site in sites)


def check_replaceable(site: Site) -> None:
    """Raise `RequestError` if the value at a site cannot be replaced.

    `resid_mid` is read by the MLP's norm and by the sum after it, so it is not the input or output of a single module.
    `*_normalized` values exist only inside the norm.
    """
    if site.hookpoint == "resid_mid" or site.hookpoint.endswith("_normalized"):
        raise RequestError(
            f"`downstream`: the value at {site.hookpoint} cannot be replaced in a forward pass: leave this option off"
        )


def drop_layers_above(decoder: nn.Module, n_layers: int) -> None:
    """Keep only the first `n_layers` blocks of a decoder; keep all if it has no known list of blocks."""
    with contextlib.suppress(RequestError):
        del _blocks(decoder)[n_layers:]


def find_tap(decoder: nn.Module, site: Site) -> Tap:
    """Return the tap of `site` in a decoder without LM head. Raises `RequestError`, with alternatives, if none."""
    layer, hookpoint = site
    if LAYER in hookpoint:
        return _at_path(decoder, site)
    if hookpoint not in HOOKPOINTS:
        raise RequestError(
            f"`hookpoint` {hookpoint!r}: use {', '.join(HOOKPOINTS)}, or a module path with {LAYER} (its output; "
            f"its input with {INPUT} appended)"
        )
    blocks = _blocks(decoder)
    if hookpoint == "resid_pre" and layer > 0:
        return Tap(blocks[layer - 1])
    return _in_block(blocks[layer], hookpoint)


def norm_before(block: nn.Module, hookpoint: str) -> nn.Module:
    """Return the norm whose output before weight and bias is `mlp_normalized` or `attn_normalized`."""
    return _part(block, hookpoint, MLP_NORM if hookpoint == "mlp_normalized" else ATTENTION_NORM)


def block_of(decoder: nn.Module, layer: int) -> nn.Module:
    """Return the block of a layer. Raises `RequestError` if the decoder has no list of blocks."""
    return _blocks(decoder)[layer]


def _in_block(block: nn.Module, hookpoint: str) -> Tap:
    match hookpoint:
        case "resid_post":
            return Tap(block)
        case "resid_pre":
            return Tap(block, "input")
        case "attn_in":
            return Tap(_part(block, hookpoint, ATTENTION), "input")
        case "mlp_in":
            return Tap(_part(block, hookpoint, (*MLP, "fc1")), "input")
        case "attn_out":
            return Tap(_attention_norm_after(block) or _part(block, hookpoint, ATTENTION))
        case "mlp_out":
            return Tap(_part(block, hookpoint, ("post_feedforward_layernorm", "post_mlp_layernorm", *MLP, "fc2")))
        case "resid_mid":
            return Tap(_mlp_norm_before(block) or _part(block, hookpoint, (*MLP, "fc1")), "input")
        case "mlp_post":
            mlp = next((part for name in MLP if (part := _get(block, name)) is not None), block)
            return Tap(_part(mlp, hookpoint, MLP_PROJECTION), "input")
        case "z":
            attention = _part(block, hookpoint, ATTENTION)
            return Tap(_part(attention, hookpoint, ATTENTION_PROJECTION), "input")
    norm = norm_before(block, hookpoint)
    return Tap(norm, "input", bare_norm(norm))


def _attention_norm_after(block: nn.Module) -> nn.Module | None:
    """Return the norm between attention and the residual stream; None in most families.

    `post_attention_layernorm` is this norm only if there is also a norm after the MLP; otherwise it precedes the MLP.
    """
    if norm := _get(block, "post_self_attn_layernorm"):
        return norm
    return _get(block, "post_attention_layernorm") if _get(block, "post_feedforward_layernorm") else None


def _mlp_norm_before(block: nn.Module) -> nn.Module | None:
    """Return the norm that reads the stream after attention; None if the MLP reads the stream (OLMo 2)."""
    norm = next((norm for name in MLP_NORM if (norm := _get(block, name)) is not None), None)
    return None if norm is _attention_norm_after(block) else norm


def names_of_modules(decoder: nn.Module) -> dict[str, str]:
    """Return MLP and attention paths such as `layers.<layer>.mlp` -> `mlp_out` if the output is added unchanged.

    Otherwise the value is the path itself: a norm or a multiplier follows the module.
    """
    found: dict[str, str] = {}
    scaled = getattr(getattr(decoder, "config", None), "residual_multiplier", 1) != 1
    for list_name in BLOCKS:
        if not isinstance(blocks := getattr(decoder, list_name, None), nn.ModuleList):
            continue
        for names, hookpoint in ((MLP, "mlp_out"), (ATTENTION, "attn_out")):
            name = next((name for name in names if _get(blocks[0], name) is not None), None)
            if name is not None:
                path = f"{list_name}.{LAYER}.{name}"
                added = _in_block(blocks[0], hookpoint).module is _get(blocks[0], name)
                found[path] = hookpoint if added and not scaled else path
    return found


def without_wrappers(path: str) -> str:
    """Return the path relative to the module that holds the list of blocks."""
    parts = path.split(".")
    while parts[0] in WRAPPERS:
        parts = parts[1:]
    return ".".join(parts)


def _at_path(decoder: nn.Module, site: Site) -> Tap:
    path, is_input = site.hookpoint.removesuffix(INPUT), site.hookpoint.endswith(INPUT)
    parts = path.replace(LAYER, str(site.layer)).split(".")
    wrappers = WRAPPERS | {getattr(decoder, "base_model_prefix", "")}
    while _get(decoder, ".".join(parts)) is None and parts[0] in wrappers:
        parts = parts[1:]
    if (module := _get(decoder, ".".join(parts))) is None:
        raise RequestError(
            f"`hookpoint` {site.hookpoint}: {type(decoder).__name__} has no such module; it has "
            f"{_alternatives(decoder, site.layer)}"
        )
    return Tap(module, "input" if is_input else "output")


def _blocks(decoder: nn.Module) -> nn.ModuleList:
    for name in BLOCKS:
        if isinstance(blocks := getattr(decoder, name, None), nn.ModuleList):
            return blocks
    raise RequestError(
        f"{type(decoder).__name__} has no list of layers called {', '.join(BLOCKS)}: give `hookpoint` as a module "
        f"path; it has {_alternatives(decoder, 0)}"
    )


def _alternatives(decoder: nn.Module, layer: int) -> str:
    """Return the paths of the outermost module list that has this layer, and of its submodules."""
    for name, module in decoder.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > layer:
            inside = [f"{name}.{LAYER}.{part}" for part in _names(module[layer])]
            return ", ".join([f"{name}.{LAYER}", *inside][:SHOWN])
    return ", ".join(_names(decoder)[:SHOWN])


def _part(parent: nn.Module, hookpoint: str, names: Sequence[str]) -> nn.Module:
    """Return the first existing submodule among `names`."""
    for name in names:
        if (part := _get(parent, name)) is not None:
            return part
    raise RequestError(
        f"`hookpoint` {hookpoint}: {type(parent).__name__} has none of {', '.join(names)}: give a module path with "
        f"{LAYER}; it has {', '.join(_names(parent)[:SHOWN])}"
    )


def _get(parent: nn.Module, path: str) -> nn.Module | None:
    try:
        return parent.get_submodule(path)
    except AttributeError:
        return None


def _names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_modules() if name]
