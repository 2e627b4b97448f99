"""Parser of ``sae.json``, the config of a custom SAE.

    {"hook_name": "blocks.5.hook_resid_post", "architecture": "topk", "k": 32, "apply_b_dec_to_input": true,
     "weights": "sae.safetensors", "names": {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}}

================================  =====================================================================================
``weights``                       file in the same folder: ``.safetensors``, or ``.pt``, ``.pth``, ``.bin``, ``.ckpt``
``hook_name``                     hook point: ``blocks.5.hook_resid_post`` or ``gpt_neox.layers.5.mlp``; or instead
``layer``, ``hookpoint``          5 and a name of ``hookpoints``, such as ``resid_post``, or a path with ``<layer>``
``architecture``                  ``standard`` (ReLU), ``topk``, ``jumprelu``, ``gated``, ``batchtopk`` (one threshold)
``k``                             for ``topk``: latents per activation
``apply_b_dec_to_input``          whether the encoder's input is x - b_dec; true or false
``rescale_acts_by_decoder_norm``  whether TopK and BatchTopK select by pre-activation times decoder norm; false
``normalize_activations``         normalisation of each x at run time: a name of ``input_norm``; ``none``
``scaling_factor``                a number that multiplies x before encoding and divides the reconstruction; 1
``prepend_bos``                   whether training texts began with BOS; unknown
``trained_on_bos``                whether activations of BOS were in the training data; false
``model_name``                    the model it was trained on; unknown
``d_in``, ``d_sae``               found from the biases; needed if the file has none, and on the Hub
``context_size``                  tokens in a training text; unknown
``input_hookpoint``               hook point of a transcoder's input, by the same names
``d_out``                         width of a transcoder's output; ``d_in`` by default; needs ``d_in``
``names``                         names of the tensors in the file, if not as below; null for a missing bias
``transposed``                    ``{"W_enc": true}``; found from the shape, needed for a square matrix
================================  =====================================================================================

Tensors: ``W_enc [d_in, d_sae]``, ``W_dec [d_sae, d_in]``, ``b_dec [d_in]``, ``b_enc [d_sae]``; for jumprelu also
``threshold [d_sae]`` or ``log_threshold``, for batchtopk ``threshold`` or ``topk_threshold []``; for gated ``b_gate``,
``b_mag`` and ``r_mag`` in place of ``b_enc``. Formulas: SAE Lens's, https://github.com/decoderesearch/SAELens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from delta_selectivity.errors import RequestError
from delta_selectivity.saes.files import positive_int
from delta_selectivity.saes.hookpoints import HookPoint, canonical, parse
from delta_selectivity.saes.input_norm import InputNorm

Choice = TypeVar("Choice", bound=str)

KINDS: dict[str, tuple[type, ...]] = {
    "weights": (str,), "hook_name": (str,), "layer": (int,), "hookpoint": (str,), "architecture": (str,), "k": (int,),
    "apply_b_dec_to_input": (bool,), "rescale_acts_by_decoder_norm": (bool,), "normalize_activations": (str,),
    "scaling_factor": (int, float), "prepend_bos": (bool,), "trained_on_bos": (bool,), "model_name": (str,),
    "d_in": (int,), "d_sae": (int,), "context_size": (int,), "input_hookpoint": (str,), "d_out": (int,),
    "names": (dict,), "transposed": (dict,),
}  # fmt: skip
"""Every key and the types that its value may have."""

NEEDED = ("weights", "architecture", "apply_b_dec_to_input")
ARCHITECTURES = ("standard", "topk", "jumprelu", "gated", "batchtopk")
NORMS: tuple[InputNorm, ...] = (
    "none", "constant_norm_rescale", "layer_norm", "centre", "centre, constant_norm_rescale"
)  # fmt: skip
MATRICES = ("W_enc", "W_dec")
BIASES = ("b_dec", "b_enc")
TENSORS = (*MATRICES, *BIASES, "threshold", "log_threshold", "topk_threshold", "b_gate", "b_mag", "r_mag")


@dataclass(frozen=True)
class PlainConfig:
    """A validated ``sae.json``. Missing widths are found from the weights later."""

    path: Path  # path of the config
    weights: Path
    hook: HookPoint
    architecture: str
    k: int | None  # for `topk` only
    apply_b_dec_to_input: bool
    rescale_acts_by_decoder_norm: bool
    input_norm: InputNorm
    scaling_factor: float
    prepend_bos: bool | None
    trained_on_bos: bool
    model_name: str | None
    d_in: int | None
    d_sae: int | None
    d_out: int | None  # width of a transcoder's output, if given
    input_hookpoint: str | None
    context_size: int | None
    names: Mapping[str, str | None]  # this project's name of each tensor -> the file's; None for a bias that is zero
    transposed: Mapping[str, bool]  # matrices whose orientation is given

    @classmethod
    def parse(cls, config: Mapping[str, Any], path: Path) -> PlainConfig:
        """Parse ``sae.json`` found at ``path``. Raises `RequestError` at a missing, unknown or wrong key."""
        _check_keys(config, path)
        _check_transcoder(config, path)
        architecture = _one_of(ARCHITECTURES, config, "architecture", path)
        return cls(
            path=path,
            weights=path.with_name(_file_name(config["weights"], path)),
            hook=_hook(config, path),
            architecture=architecture,
            k=positive_int(config, "k", path) if architecture == "topk" else None,
            apply_b_dec_to_input=config["apply_b_dec_to_input"],
            rescale_acts_by_decoder_norm=config.get("rescale_acts_by_decoder_norm", False),
            input_norm=_one_of(NORMS, {"normalize_activations": "none", **config}, "normalize_activations", path),
            scaling_factor=_factor(config.get("scaling_factor", 1), path),
            prepend_bos=config.get("prepend_bos"),
            trained_on_bos=config.get("trained_on_bos", False),
            model_name=config.get("model_name"),
            d_in=_size(config, "d_in", path),
            d_sae=_size(config, "d_sae", path),
            d_out=_size(config, "d_out", path),
            input_hookpoint=canonical(config["input_hookpoint"]) if "input_hookpoint" in config else None,
            context_size=_size(config, "context_size", path),
            names=_names(config.get("names", {}), path),
            transposed=_transposed(config.get("transposed", {}), path),
        )


def _check_keys(config: Mapping[str, Any], path: Path) -> None:
    for key, value in config.items():
        if key not in KINDS:
            raise RequestError(f"{path}: unknown key {key!r}; the keys are {', '.join(KINDS)}")
        kinds = KINDS[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise RequestError(f"{path}: {key} is {value!r}, but must be of type {kinds[-1].__name__}")
    for key in NEEDED:
        if key not in config:
            raise RequestError(f"{path}: {key} is missing; required: hook_name, {', '.join(NEEDED)}")


def _check_transcoder(config: Mapping[str, Any], path: Path) -> None:
    if "d_out" in config and not {"input_hookpoint", "d_in"} <= config.keys():
        raise RequestError(f"{path}: d_out is for transcoders, and needs input_hookpoint and d_in too")
    if "input_hookpoint" in config and config["apply_b_dec_to_input"]:
        raise RequestError(
            f"{path}: apply_b_dec_to_input must be false for a transcoder, whose b_dec belongs to its output"
        )


def _size(config: Mapping[str, Any], key: str, path: Path) -> int | None:
    return positive_int(config, key, path) if key in config else None


def _one_of(known: tuple[Choice, ...], config: Mapping[str, Any], key: str, path: Path) -> Choice:
    for value in known:
        if value == config[key]:
            return value
    raise RequestError(f"{path}: {key} is {config[key]!r}; supported: {', '.join(map(repr, known))}")


def _file_name(name: str, path: Path) -> str:
    if not name or not name.isprintable() or Path(name).name != name:
        raise RequestError(f"{path}: weights is {name!r}, but must be the name of a file in the same folder")
    return name


def _factor(factor: float, path: Path) -> float:
    if not 0 < factor < torch.finfo(torch.float32).max:
        raise RequestError(f"{path}: scaling_factor is {factor!r}, but must be a number above 0")
    return float(factor)


def _hook(config: Mapping[str, Any], path: Path) -> HookPoint:
    if "hook_name" in config:
        hook = parse(config["hook_name"])
        if hook is None or hook.place.startswith("blocks.<layer>"):
            raise RequestError(
                f"{path}: hook_name is {config['hook_name']!r}, but must be a name such as blocks.5.hook_resid_post"
            )
        return hook
    if config.get("layer", -1) < 0 or "hookpoint" not in config:
        raise RequestError(f"{path}: hook_name is missing; give it, or layer (from 0) and hookpoint")
    return HookPoint(config["layer"], canonical(config["hookpoint"]))


def _names(renamed: Mapping[str, Any], path: Path) -> dict[str, str | None]:
    for ours, theirs in renamed.items():
        if ours not in TENSORS or not (isinstance(theirs, str) or (theirs is None and ours in BIASES)):
            raise RequestError(
                f"{path}: names has {ours!r}: {theirs!r}; give the name in the file of one of"
                f" {', '.join(TENSORS)}, or null for {' and '.join(BIASES)}"
            )
    return dict(zip(TENSORS, TENSORS, strict=True)) | dict(renamed)


def _transposed(given: Mapping[str, Any], path: Path) -> Mapping[str, bool]:
    for matrix, value in given.items():
        if matrix not in MATRICES or not isinstance(value, bool):
            raise RequestError(f"{path}: transposed has {matrix!r}: {value!r}; give true or false for W_enc or W_dec")
    return given
