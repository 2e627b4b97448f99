"""``cfg.json`` of SAE Lens, versions 3 to 6: what an SAE computes, where it belongs, and what cannot be measured.

Semantics of https://github.com/decoderesearch/SAELens 6.54 (``saes/*.py``, ``loading/pretrained_sae_loaders.py``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from errors import RequestError
from sae_formats.files import Shapes, positive_int
from sae_formats.hookpoints import HookPoint, parse
from sae_formats.input_norm import InputNorm
from sae_formats.source import SaeHeader

BATCH_TOPK = ("batchtopk", "matryoshka_batchtopk")
"""Training checkpoints of these hold one threshold; as inference models they are saved as ``jumprelu``."""
NATIVE = ("standard", "topk", "jumprelu", "gated", *BATCH_TOPK)
"""A linear map and a selection: these need no library."""

_OLD_KEYS = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}


@dataclass(frozen=True)
class LensConfig:
    """The keys that change what an SAE computes or where it belongs, from either version of ``cfg.json``."""

    path: Path
    architecture: str
    d_in: int
    d_sae: int
    k: int | None
    apply_b_dec_to_input: bool
    rescale_acts_by_decoder_norm: bool
    normalize_activations: InputNorm | Literal["expected_average_only_in"]
    hook_name: str | None
    model_name: str | None
    prepend_bos: bool | None
    trained_on_bos: bool

    @classmethod
    def parse(cls, config: Mapping[str, Any], path: Path) -> LensConfig:
        """From ``cfg.json`` at ``path``. Raises `RequestError` at what is missing, wrong or cannot be honoured."""
        _check_types(config, path)
        flat = _flatten(config)
        architecture = _architecture(flat)
        _refuse(flat, architecture, path)
        k = positive_int(flat, "k", path) if architecture in ("topk", "abstopk") else None
        d_in, d_sae = positive_int(flat, "d_in", path), positive_int(flat, "d_sae", path)
        if k is not None and k > d_sae:
            raise RequestError(f"{path}: k {k} is more than d_sae {d_sae}")
        prepend_bos = flat.get("prepend_bos")
        if prepend_bos is not None and not isinstance(prepend_bos, bool):
            raise RequestError(f"{path}: prepend_bos is {prepend_bos!r}; true or false is needed")
        return cls(
            path=path,
            architecture=architecture,
            d_in=d_in,
            d_sae=d_sae,
            k=k,
            apply_b_dec_to_input=bool(flat.get("apply_b_dec_to_input", True)),
            rescale_acts_by_decoder_norm=_rescales(flat, architecture),
            normalize_activations=_normalisation(flat, path),
            hook_name=flat.get("hook_name"),
            model_name=flat.get("model_name"),
            prepend_bos=prepend_bos,
            trained_on_bos=bool(prepend_bos) and not _excludes_bos(flat),
        )

    def shapes(self, names: set[str]) -> Shapes:
        """Tensors that a native architecture needs, given the names that the file holds."""
        latents = (self.d_sae,)
        shapes: dict[str, tuple[int, ...]] = {
            "W_enc": (self.d_in, self.d_sae),
            "W_dec": (self.d_sae, self.d_in),
            "b_dec": (self.d_in,),
        }
        if self.architecture == "gated":
            return shapes | {"b_gate": latents, "b_mag": latents, "r_mag": latents}
        shapes["b_enc"] = latents
        if self.architecture in BATCH_TOPK and "threshold" not in names:
            shapes["topk_threshold"] = ()
        elif self.architecture == "jumprelu" and "log_threshold" in names:
            shapes["log_threshold"] = latents
        elif self.architecture in ("jumprelu", *BATCH_TOPK):
            shapes["threshold"] = latents
        return shapes

    def header(self, config: dict[str, Any]) -> SaeHeader:
        """What the rest of the program needs to know."""
        hook = self._hook()
        return SaeHeader(
            format="sae_lens",
            layer=hook.layer,
            hookpoint=hook.place,
            d_in=self.d_in,
            d_sae=self.d_sae,
            k=self.k,
            architecture=self.architecture,
            config=config,
            prepend_bos=self.prepend_bos,
            counts_bos=self.trained_on_bos,
            model_name=self.model_name,
        )

    def _hook(self) -> HookPoint:
        name = self.hook_name or self.path.parent.name
        hook = parse(name)
        if hook is None or hook.place.startswith("blocks.<layer>"):
            raise RequestError(
                f"{self.path}: hook_name {name!r}; SAEs of the outputs of layers, MLPs and attention can be measured"
                " (blocks.5.hook_resid_post, hook_mlp_out, hook_attn_out)"
            )
        return hook


def _check_types(config: Mapping[str, Any], path: Path) -> None:
    """The values that others are looked up in or chosen by."""
    for key, kind in (("metadata", dict), ("activation_fn_kwargs", dict), ("architecture", str)):
        if config.get(key) is not None and not isinstance(config[key], kind):
            raise RequestError(f"{path}: {key} is {config[key]!r}, which is no {kind.__name__}")


def _flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Both versions as one flat dictionary: version 6 keeps what concerns the model under ``metadata``."""
    flat = {_OLD_KEYS.get(key, key): value for key, value in config.items()}
    metadata = flat.pop("metadata", None) or {}
    flat |= metadata
    version = re.match(r"\d+", str(flat.get("sae_lens_version") or ""))
    if version is None or int(version[0]) < 6:
        flat.setdefault("prepend_bos", True)
        kwargs = flat.get("activation_fn_kwargs") or {}
        if flat.get("activation_fn") == "topk" and "k" in kwargs:
            flat |= {"architecture": "topk", "k": kwargs["k"]}
    factor, d_in = flat.get("expansion_factor"), flat.get("d_in")
    if flat.get("d_sae") is None and isinstance(factor, int) and isinstance(d_in, int):
        flat["d_sae"] = factor * d_in
    return flat


def _architecture(flat: Mapping[str, Any]) -> str:
    return str(flat.get("architecture") or "standard")


def _rescales(flat: Mapping[str, Any], architecture: str) -> bool:
    """Only TopK and its relatives know the setting; BatchTopK has it on unless it says otherwise."""
    if architecture not in ("topk", *BATCH_TOPK):
        return False
    return bool(flat.get("rescale_acts_by_decoder_norm", architecture in BATCH_TOPK))


def _normalisation(flat: Mapping[str, Any], path: Path) -> InputNorm | Literal["expected_average_only_in"]:
    found = flat.get("normalize_activations") or "none"
    if found is True or found == "expected_average_only_in":
        return "expected_average_only_in"
    kinds: tuple[InputNorm, ...] = get_args(InputNorm)
    for kind in kinds:
        if found == kind:
            return kind
    known = ", ".join([*kinds, "expected_average_only_in"])
    raise RequestError(f"{path}: normalize_activations {found!r}; {known} can be honoured")


def _excludes_bos(flat: Mapping[str, Any]) -> bool:
    """Whether BOS positions were left out of training: by token, or by a slice of positions.

    ``exclude_special_tokens`` may list token ids; without the tokenizer any list is taken to hold BOS.
    """
    seqpos_slice = flat.get("seqpos_slice") or [None]
    starts_later = len(seqpos_slice) > 1 and (seqpos_slice[0] or 0) != 0
    return bool(flat.get("exclude_special_tokens")) or starts_later


def _refuse(flat: Mapping[str, Any], architecture: str, path: Path) -> None:
    """What would be measured wrongly without a sign."""
    hook_out = flat.get("hook_name_out")
    if "transcoder" in architecture or (hook_out and hook_out != flat.get("hook_name")):
        raise RequestError(
            f"{path}: a transcoder ({architecture}) predicts a module's output from its input; give an autoencoder"
        )
    if architecture == "temporal":
        raise RequestError(f"{path}: a temporal SAE needs whole texts, activations are encoded one by one here")
    if flat.get("reshape_activations", "none") != "none" or "hook_z" in str(flat.get("hook_name")):
        raise RequestError(f"{path}: an SAE of attention heads (hook_z); give one of resid_post, mlp_out or attn_out")
    activation = flat.get("activation_fn") or "relu"
    if architecture == "standard" and activation != "relu":
        raise RequestError(f"{path}: activation_fn {activation!r}; a standard SAE with relu or topk can be measured")
