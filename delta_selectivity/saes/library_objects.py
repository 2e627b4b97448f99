"""Objects of SAE Lens, sparsify and dictionary_learning, read by the same code as their files.

An object is converted to the config and the tensors that its library would save, so object and file give bit-identical
codes. The libraries are recognised by class names and are not imported.

Training SAEs of SAE Lens are measured as the inference models that the library would save: BatchTopK with its
threshold, TopK with its decoder norms folded in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from delta_selectivity.errors import RequestError
from delta_selectivity.saes import dictionary_learning, sparsify
from delta_selectivity.saes.coders import Coder
from delta_selectivity.saes.contents import Contents
from delta_selectivity.saes.files import compare_shapes
from delta_selectivity.saes.hookpoints import parse
from delta_selectivity.saes.input_norm import InputNorm
from delta_selectivity.saes.object_state import as_float32, attempt, runnable_copy, settings_of, tensors_of
from delta_selectivity.saes.sae_lens.config import NATIVE, TRANSCODERS, LensConfig
from delta_selectivity.saes.sae_lens.library import as_dense_coder, load_state
from delta_selectivity.saes.sae_lens.places import Places
from delta_selectivity.saes.sae_lens.scaling import InputScaling
from delta_selectivity.saes.sae_lens.weights import build_native, expected_shapes
from delta_selectivity.saes.source import SaeHeader
from delta_selectivity.saes.wrap_arguments import WrapArguments

_COMPUTE_CODES = ("encode", "decode", "encode_with_hidden_pre", "process_sae_in", "get_activation_fn")
"""Methods whose override makes the library's reader inapplicable."""


def wrap_library_object(obj: Any) -> Contents | None:
    """Wrap an object of one of the three libraries; return None for any other."""
    if (lens := _class_in(obj, "sae_lens")) is not None and hasattr(getattr(obj, "cfg", None), "to_dict"):
        return SaeLensObject(obj, unchanged=_is_unchanged(obj, lens))
    coder = _class_in(obj, "sparsify")
    if coder is not None and hasattr(obj, "cfg") and _is_unchanged(obj, coder):
        return SparsifyObject(obj)
    dictionary = _class_in(obj, "dictionary_learning")
    if dictionary is None or dictionary.__name__ not in dictionary_learning.CLASSES:
        return None
    as_in_files = _is_unchanged(obj, dictionary) and not _exceeds_file_format(obj)
    return DictionaryObject(obj, dictionary.__name__) if as_in_files else None


@dataclass(frozen=True)
class _LibraryObject:
    """Base class for objects that are fully described by their ``state_dict`` and config."""

    obj: Any

    @property
    def label(self) -> str:
        return type(self.obj).__name__

    def tensors(self) -> dict[str, Tensor]:
        return tensors_of(self.obj, self.label)

    def settings(self) -> Any:
        return None

    @property
    def needs_version(self) -> bool:
        return False


@dataclass(frozen=True)
class SparsifyObject(_LibraryObject):
    """A ``SparseCoder``."""

    def header(self, given: WrapArguments) -> SaeHeader:
        config = _as_json(asdict(self.obj.cfg) | {"d_in": self.obj.d_in})
        transcodes = bool(config.get("transcode"))
        hook = given.hook(self.label, default=None if transcodes else "resid_post")
        reads = given.input_hookpoint if transcodes else None
        header = given.complete(sparsify.make_header(config, Path(self.label), hook, reads=reads), says_bos=False)
        _check_shapes(self, sparsify.expected_shapes(header))
        return header

    def build(self, header: SaeHeader) -> tuple[Coder, InputNorm]:
        return sparsify.make_coder(header, as_float32(self.tensors(), self.label)), "none"


@dataclass(frozen=True)
class DictionaryObject(_LibraryObject):
    """An instance of one of dictionary_learning's dictionary classes."""

    dict_class: str

    def header(self, given: WrapArguments) -> SaeHeader:
        trainer = {"dict_class": self.dict_class, "activation_dim": self.obj.activation_dim}
        trainer |= {"dict_size": self.obj.dict_size}
        kind = dictionary_learning.CLASSES[self.dict_class]
        if kind.architecture == "topk":
            trainer["k"] = int(self.obj.k)
        hook, reads = given.hook(self.label), given.input_hookpoint
        header = dictionary_learning.make_header({"trainer": trainer}, Path(self.label), hook, reads)
        _check_shapes(self, kind.shapes(header.d_in, header.d_sae))
        return given.complete(header, says_bos=False)

    def build(self, header: SaeHeader) -> tuple[Coder, InputNorm]:
        return dictionary_learning.make_coder(header, as_float32(self.tensors(), self.label)), "none"


@dataclass(frozen=True)
class SaeLensObject(_LibraryObject):
    """A ``sae_lens.SAE``, of the inference or the training kind."""

    unchanged: bool  # whether the library's own methods compute its codes

    def header(self, given: WrapArguments) -> SaeHeader:
        config = self._config()
        lens = self._parse(config, self._places(config, given))
        config["scaling_factor"] = factor = _scaling_factor(lens, given)
        if factor != 1 and not self.unchanged:
            raise RequestError(
                f"`scaling_factor` {factor}: {self.label} overrides encode or decode, so it has to scale by itself"
            )
        if not self.unchanged:
            self._check_own_methods(lens)
        elif lens.architecture in NATIVE:
            _check_shapes(self, expected_shapes(lens, set(self.tensors())))
        return given.complete(lens.header(config), says_bos=lens.prepend_bos is not None)

    def tensors(self) -> dict[str, Tensor]:
        state = tensors_of(self.obj, self.label)
        for name in ("process_state_dict_for_saving_inference", "process_state_dict_for_saving"):
            if self.unchanged and hasattr(self.obj, name):
                attempt(f"`obj` {self.label}: {name}", getattr(self.obj, name), state)
                return state
        return state

    def settings(self) -> Any:
        return None if self.unchanged else settings_of(self.obj)

    def build(self, header: SaeHeader) -> tuple[Coder, InputNorm]:
        lens = self._parse(header.config, Places.of(header))
        tensors, scaling = as_float32(self.tensors(), self.label), InputScaling(header.config["scaling_factor"])
        if not self.unchanged:
            return as_dense_coder(runnable_copy(self.obj, self.label), lens), lens.input_norm
        if lens.architecture in NATIVE:
            return build_native(lens, tensors, scaling), lens.input_norm
        return load_state(header.config, tensors, lens, scaling), lens.input_norm

    def _config(self) -> dict[str, Any]:
        """Return the content of ``cfg.json`` as the library would write it, without the device."""
        cfg = self.obj.cfg
        inference = getattr(cfg, "get_inference_sae_cfg_dict", None) if self.unchanged else None
        config = _as_json(attempt(f"`obj` {self.label}: its config", inference or cfg.to_dict))
        config.pop("device", None)
        return config

    def _check_own_methods(self, lens: LensConfig) -> None:
        """Encode and decode two rows with the object's own methods. Raises `RequestError` if that fails."""
        what = f"`obj` {self.label}: "
        coder = replace(as_dense_coder(runnable_copy(self.obj, self.label), lens), d_sae=None)
        rows = torch.ones(2, lens.d_in, dtype=torch.float32, device=coder.device)
        with torch.no_grad():
            codes = attempt(f"{what}encode of {list(rows.shape)}", coder.encode, rows)
            if codes.n_cols != lens.d_sae:
                raise RequestError(f"{what}encode returned {codes.n_cols} latents, but its cfg says {lens.d_sae}")
            attempt(f"{what}decode", coder.decode, codes)

    def _places(self, config: Mapping[str, Any], given: WrapArguments) -> Places | None:
        """Return the caller's hook points; None if the object names them itself."""
        metadata = {**config, **(config.get("metadata") or {})}
        transcodes = config.get("architecture") in TRANSCODERS
        keys = ("hook_name", "hook_name_out") if transcodes else ("hook_name",)
        names = [metadata.get(key) or metadata.get(f"hf_{key}") for key in keys]
        if given.layer is not None and given.hookpoint is not None:  # then unknown names do not matter
            names = [name if name is not None and parse(name) is not None else None for name in names]
        if None not in names:
            return None
        hook = given.hook(self.label, default=None if transcodes else "resid_post")
        if transcodes and given.input_hookpoint is None:
            raise RequestError(f"`input_hookpoint` is missing: {self.label} does not name its input")
        return Places(hook.layer, hook.place, given.input_hookpoint if transcodes else None)

    def _parse(self, config: Mapping[str, Any], places: Places | None) -> LensConfig:
        try:
            return LensConfig.parse(config, Path(self.label), places)
        except (TypeError, AttributeError, OverflowError) as error:  # such as a list in place of a name
            raise RequestError(f"`obj` {self.label}: a value of its cfg has the wrong type ({error})") from error


def _scaling_factor(lens: LensConfig, given: WrapArguments) -> float:
    """Return the factor applied to activations before encoding. Raises `RequestError` if it is unknown."""
    norm = lens.normalize_activations
    if norm == "covariance_whitening":
        raise RequestError(
            f"`obj` {lens.path}: normalize_activations is 'covariance_whitening', but the object does not have its"
            " matrices: call fold_activation_whitening on a copy and wrap that"
        )
    if norm == "expected_average_only_in":
        if given.scaling_factor is None:
            raise RequestError(
                f"`scaling_factor` is missing: {lens.path} was trained on scaled activations"
                " (normalize_activations 'expected_average_only_in'), but the object does not have the factor"
            )
        return given.scaling_factor
    given.refuse_scaling()
    return 1.0


def _check_shapes(contents: Contents, expected: Mapping[str, tuple[int, ...]]) -> None:
    found = {name: tuple(tensor.shape) for name, tensor in contents.tensors().items()}
    compare_shapes(f"`obj` {contents.label}", found, expected)


def _class_in(obj: Any, package: str) -> type | None:
    """Return the first class in an object's MRO that a package defines."""
    return next((cls for cls in type(obj).__mro__ if cls.__module__.partition(".")[0] == package), None)


def _is_unchanged(obj: Any, library_class: type) -> bool:
    """Return whether only the library's own methods compute the object's codes."""
    classes = type(obj).__mro__[: type(obj).__mro__.index(library_class)]
    own = {name for cls in classes for name in vars(cls)} | getattr(obj, "__dict__", {}).keys()
    return not own.intersection(_COMPUTE_CODES)


def _exceeds_file_format(dictionary: Any) -> bool:
    """Return whether a dictionary has a non-default setting that its file format cannot store."""
    groups, active = getattr(dictionary, "group_sizes", None), getattr(dictionary, "active_groups", None)
    return bool(getattr(dictionary, "apply_b_dec_to_input", False)) or (groups is not None and active != len(groups))


def _as_json(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config after a round trip through JSON."""
    found: dict[str, Any] = json.loads(json.dumps(config, default=str))
    return found
