"""Parser of SAE Lens's ``cfg.json``, versions 3 to 6.

Follows https://github.com/decoderesearch/SAELens 6.54 (``saes/*.py``, ``loading/pretrained_sae_loaders.py``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from delta_selectivity.errors import RequestError
from delta_selectivity.saes.files import positive_int
from delta_selectivity.saes.input_norm import InputNorm, RunTimeNorm, centred
from delta_selectivity.saes.sae_lens.places import Places, find_places
from delta_selectivity.saes.sae_lens.transformer_lens_weights import is_centred
from delta_selectivity.saes.source import SaeHeader

BATCH_TOPK = ("batchtopk", "matryoshka_batchtopk")
"""Their training checkpoints hold a single threshold; their inference models are saved as ``jumprelu``."""
TRANSCODERS = {
    "transcoder": "standard transcoder",
    "skip_transcoder": "standard skip transcoder",
    "jumprelu_transcoder": "jumprelu transcoder",
    "jumprelu_skip_transcoder": "jumprelu skip transcoder",
}
"""The library's name of an architecture -> this project's."""
NATIVE = ("standard", "topk", "jumprelu", "gated", *BATCH_TOPK, *TRANSCODERS)
"""Architectures that consist of linear maps and a selection, and are built without the library."""

FoldedNorm = Literal["expected_average_only_in", "covariance_whitening"]
"""Normalisations by constants in a separate file, which are folded into the weights on loading."""

_OLD_KEYS = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}


@dataclass(frozen=True)
class LensConfig:
    """The keys of ``cfg.json``, in any version, that affect the computation or the hook point."""

    path: Path
    architecture: str  # the library's name
    d_in: int
    d_out: int
    d_sae: int
    k: int | None
    apply_b_dec_to_input: bool
    rescale_acts_by_decoder_norm: bool
    normalize_activations: RunTimeNorm | FoldedNorm
    places: Places
    centred: bool  # whether it was trained on activations minus their mean over coordinates
    model_name: str | None
    context_size: int | None
    prepend_bos: bool | None
    trained_on_bos: bool

    @classmethod
    def parse(
        cls, config: Mapping[str, Any], path: Path, places: Places | None = None, hookpoint: str | None = None
    ) -> LensConfig:
        """Parse the ``cfg.json`` found at ``path``. Raises `RequestError` at a missing, wrong or unsupported value.

        ``places`` gives the hook points if the config does not; ``hookpoint`` is the user's, for a config with an
        unknown name.
        """
        _check_types(config, path)
        flat = _flatten(config)
        architecture = str(flat.get("architecture") or "standard")
        _refuse(flat, architecture, path)
        d_in, d_sae = positive_int(flat, "d_in", path), positive_int(flat, "d_sae", path)
        prepend_bos, model_name = flat.get("prepend_bos"), flat.get("model_name")
        if prepend_bos is not None and not isinstance(prepend_bos, bool):
            raise RequestError(f"{path}: prepend_bos is {prepend_bos!r}, but must be true or false")
        places = places or find_places(flat, path, transcodes=architecture in TRANSCODERS, hookpoint=hookpoint)
        settings = flat.get("model_from_pretrained_kwargs") or {}
        return cls(
            path=path,
            architecture=architecture,
            d_in=d_in,
            d_out=positive_int(flat, "d_out", path) if architecture in TRANSCODERS else d_in,
            d_sae=d_sae,
            k=_k(flat, architecture, d_sae, path),
            apply_b_dec_to_input=architecture not in TRANSCODERS and bool(flat.get("apply_b_dec_to_input", True)),
            rescale_acts_by_decoder_norm=_rescales(flat, architecture),
            normalize_activations=_normalisation(flat, path),
            places=places,
            centred=is_centred(settings, places.hookpoint, places.input_hookpoint, model_name, path),
            model_name=model_name,
            context_size=positive_int(flat, "context_size", path) if flat.get("context_size") else None,
            prepend_bos=prepend_bos,
            trained_on_bos=bool(prepend_bos) and not _excludes_bos(flat),
        )

    @property
    def input_norm(self) -> InputNorm:
        """Normalisation at run time, after constants have been folded into the weights."""
        found = self.normalize_activations
        norm: RunTimeNorm = "none" if found == "expected_average_only_in" or found == "covariance_whitening" else found
        return centred(norm) if self.centred else norm

    def header(self, config: dict[str, Any]) -> SaeHeader:
        """Return the header for the rest of the program."""
        return SaeHeader(
            format="sae_lens",
            layer=self.places.layer,
            hookpoint=self.places.hookpoint,
            d_in=self.d_in,
            d_sae=self.d_sae,
            k=self.k,
            architecture=TRANSCODERS.get(self.architecture, self.architecture),
            config=config,
            prepend_bos=self.prepend_bos,
            counts_bos=self.trained_on_bos,
            model_name=self.model_name,
            input_hookpoint=self.places.input_hookpoint,
            width_out=self.d_out,
            context_size=self.context_size,
        )


def _check_types(config: Mapping[str, Any], path: Path) -> None:
    """Check the types of values that are used as dictionary keys or selectors, at either level of the config."""
    metadata = config.get("metadata")
    for key, kind in (
        ("metadata", dict),
        ("activation_fn_kwargs", dict),
        ("model_from_pretrained_kwargs", dict),
        ("architecture", str),
        ("model_name", str),
    ):
        for where in (config, metadata if isinstance(metadata, dict) else {}):
            if where.get(key) is not None and not isinstance(where[key], kind):
                raise RequestError(f"{path}: {key} is {where[key]!r}, but must be of type {kind.__name__}")


def _flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return any version as a flat dictionary: version 6 nests model settings under ``metadata``."""
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


def _k(flat: Mapping[str, Any], architecture: str, d_sae: int, path: Path) -> int | None:
    if architecture not in ("topk", "abstopk"):
        return None
    k = positive_int(flat, "k", path)
    if k > d_sae:
        raise RequestError(f"{path}: k {k} is greater than d_sae {d_sae}")
    return k


def _rescales(flat: Mapping[str, Any], architecture: str) -> bool:
    """Return the setting, which only TopK and its variants have; for BatchTopK it defaults to True."""
    if architecture not in ("topk", *BATCH_TOPK):
        return False
    return bool(flat.get("rescale_acts_by_decoder_norm", architecture in BATCH_TOPK))


def _normalisation(flat: Mapping[str, Any], path: Path) -> RunTimeNorm | FoldedNorm:
    found = flat.get("normalize_activations") or "none"
    kinds: tuple[RunTimeNorm | FoldedNorm, ...] = (*get_args(RunTimeNorm), *get_args(FoldedNorm))
    for kind in kinds:
        if found == kind or (found is True and kind == "expected_average_only_in"):
            return kind
    raise RequestError(f"{path}: normalize_activations is {found!r}; supported: {', '.join(kinds)}")


def _excludes_bos(flat: Mapping[str, Any]) -> bool:
    """Return whether BOS positions were excluded from training, by token or by a slice of positions.

    ``exclude_special_tokens`` may list token ids; without the tokenizer, any list is assumed to include BOS.
    """
    seqpos_slice = flat.get("seqpos_slice") or [None]
    starts_later = len(seqpos_slice) > 1 and (seqpos_slice[0] or 0) != 0
    return bool(flat.get("exclude_special_tokens")) or starts_later


def _refuse(flat: Mapping[str, Any], architecture: str, path: Path) -> None:
    """Raise `RequestError` for settings that would silently be measured wrongly."""
    if architecture == "temporal":
        raise RequestError(f"{path}: a temporal SAE encodes whole texts, but here activations are encoded one by one")
    if architecture in TRANSCODERS and flat.get("apply_b_dec_to_input"):
        raise RequestError(
            f"{path}: apply_b_dec_to_input must be false for a {architecture}, whose b_dec belongs to its output"
        )
    if flat.get("hook_head_index") is not None:
        raise RequestError(f"{path}: hook_head_index {flat['hook_head_index']}: an SAE of one attention head is not"
                           " supported; use one of all heads (hook_z)")  # fmt: skip
    activation = flat.get("activation_fn") or "relu"
    if architecture == "standard" and activation != "relu":
        raise RequestError(
            f"{path}: activation_fn is {activation!r}; a standard SAE must have relu or topk (SAE Lens 6 would silently"
            " use relu)"
        )
