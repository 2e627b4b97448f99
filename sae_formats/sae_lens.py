"""SAE Lens: ``cfg.json`` and ``sae_weights.safetensors``, versions 3 to 6.

Semantics of https://github.com/decoderesearch/SAELens 6.54 (``saes/*.py``, ``loading/pretrained_sae_loaders.py``),
without importing it: that takes 5 s and half a gigabyte. Architectures that are not a linear map and a selection go
through the library (``sae_lens_library``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from errors import RequestError
from sae_formats.coders import Coder, LinearCoder, fold_b_dec
from sae_formats.files import Shapes, check_shapes, positive_int, read_config, read_tensors, tensor_names
from sae_formats.hookpoints import HookPoint, parse
from sae_formats.input_norm import InputNorm
from sae_formats.selection import Gated, Selection, Threshold, TopK
from sae_formats.source import SaeHeader

WEIGHTS = "sae_weights.safetensors"
SCALER = "activation_scaler.json"
"""Written beside a training checkpoint; holds the factor that ``expected_average_only_in`` needs."""

BATCH_TOPK = ("batchtopk", "matryoshka_batchtopk")
"""Training checkpoints of these hold one threshold; as inference models they are saved as ``jumprelu``."""
NATIVE = ("standard", "topk", "jumprelu", "gated", *BATCH_TOPK)

FLOAT32_MAX = torch.finfo(torch.float32).max

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


class SaeLens:
    """Reads one folder of this format."""

    files = ("cfg.json", WEIGHTS, SCALER)

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Whether a config is of this format, by keys that sparsify does not write."""
        return bool({"d_sae", "architecture", "metadata", "hook_name", "hook_point"} & config.keys())

    def read_header(self, config: dict[str, Any], path: Path, model_name: str | None) -> SaeHeader:
        """Check a config, found at ``path``."""
        return LensConfig.parse(config, path).header(config)

    def check(self, folder: Path, header: SaeHeader) -> None:
        """Compare the weights' header with the config, and look for what it needs beside it."""
        lens = LensConfig.parse(header.config, folder / "cfg.json")
        names = tensor_names(folder / WEIGHTS)
        if lens.architecture in NATIVE:
            check_shapes(folder / WEIGHTS, lens.shapes(names))
        _scaling_factor(lens)

    def build(self, folder: Path, header: SaeHeader) -> tuple[Coder, InputNorm]:
        """Load the weights."""
        lens = LensConfig.parse(header.config, folder / "cfg.json")
        if lens.architecture not in NATIVE:
            from sae_formats.sae_lens_library import load_folder

            return load_folder(folder, lens)
        return build_native(lens, read_tensors(folder / WEIGHTS), _scaling_factor(lens))


def build_native(lens: LensConfig, tensors: dict[str, Tensor], scaling_factor: float = 1.0) -> tuple[Coder, InputNorm]:
    """A coder from float32 tensors in SAE Lens's names and shapes, everything that can be folded in folded."""
    finetuned = tensors.get("scaling_factor")
    if finetuned is not None and not torch.allclose(finetuned, torch.ones_like(finetuned)):
        raise RequestError(f"{lens.path}: finetuned with a scaling_factor, which SAE Lens 6 cannot apply either")
    W_enc = tensors["W_enc"].T * scaling_factor
    W_dec = tensors["W_dec"] / scaling_factor
    b_dec = tensors["b_dec"] / scaling_factor
    b_enc = tensors["b_gate"] if lens.architecture == "gated" else tensors["b_enc"]
    if lens.rescale_acts_by_decoder_norm:
        norms = W_dec.norm(dim=1).clamp(min=1e-8)
        W_enc, b_enc, W_dec = W_enc * norms.unsqueeze(1), b_enc * norms, W_dec / norms.unsqueeze(1)
    selection = _selection(lens, tensors, scaling_factor)
    bias = fold_b_dec(W_enc, b_enc, b_dec) if lens.apply_b_dec_to_input else b_enc
    norm = lens.normalize_activations
    input_norm: InputNorm = "none" if norm == "expected_average_only_in" else norm
    return LinearCoder(W_enc.contiguous(), bias, W_dec, b_dec, selection), input_norm


def _selection(lens: LensConfig, tensors: dict[str, Tensor], scaling_factor: float) -> Selection:
    if lens.architecture == "topk":
        assert lens.k is not None
        return TopK(lens.k)
    if lens.architecture == "gated":
        gain = tensors["r_mag"].exp()
        return Gated(gain, offset=tensors["b_mag"] - gain * tensors["b_gate"])
    threshold = torch.zeros(lens.d_sae)
    if "threshold" in tensors:
        threshold = tensors["threshold"]
    elif "log_threshold" in tensors:
        threshold = tensors["log_threshold"].exp()
    elif "topk_threshold" in tensors:
        # In units of pre-activation times decoder norm, and the decoder was divided by the factor.
        divisor = scaling_factor if lens.rescale_acts_by_decoder_norm else 1.0
        threshold = (tensors["topk_threshold"] / divisor).expand(lens.d_sae).clone()
    return Threshold(threshold.clamp(min=0))


def _scaling_factor(lens: LensConfig) -> float:
    """The factor of ``expected_average_only_in``, 1 without. Loading from disk, the library would leave it out."""
    if lens.normalize_activations != "expected_average_only_in":
        return 1.0
    path = lens.path.with_name(SCALER)
    factor = read_config(path).get("scaling_factor") if path.is_file() else None
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < FLOAT32_MAX:
        raise RequestError(
            f"{lens.path}: normalize_activations is 'expected_average_only_in', so activations are scaled by one"
            f' number, which is not in the file; put it beside it as {SCALER}: {{"scaling_factor": sqrt(d_in) divided'
            " by the mean norm of the training activations}"
        )
    return float(factor)


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
