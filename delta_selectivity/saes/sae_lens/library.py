"""Access to SAEs that need the SAE Lens library, which is imported on use because importing it takes 5 s."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HTTPError as HubHTTPError
from torch import Tensor

from delta_selectivity.errors import RequestError
from delta_selectivity.saes.coders import Coder
from delta_selectivity.saes.dense_coder import DenseCoder
from delta_selectivity.saes.sae_lens.config import NATIVE, LensConfig
from delta_selectivity.saes.sae_lens.scaling import InputScaling
from delta_selectivity.saes.sae_lens.weights import build_native

# The warning is about loading a HookedTransformer; ``transformer_lens_weights`` handles those settings.
warnings.filterwarnings("ignore", message=r"\nThis SAE has non-empty model_from_pretrained_kwargs")

UNREADABLE = (OSError, HubHTTPError, ValueError, KeyError, TypeError)
"""Exceptions that the library raises for an unavailable or invalid config or weights file."""


def fetch(release: str, sae_id: str) -> Any:
    """Download a listed SAE in float32 on the CPU, with the input scaling of its release folded in."""
    from sae_lens import SAE

    try:
        module = SAE.from_pretrained(release, sae_id, device="cpu", dtype="float32")
    except UNREADABLE as error:
        raise RequestError(f"{release}/{sae_id}: SAE Lens could not load it ({one_line(error)})") from error
    if module.cfg.normalize_activations == "expected_average_only_in":
        raise RequestError(f"{release}/{sae_id}: SAE Lens's list has no norm_scaling_factor, which its input needs")
    return module


def load_folder(folder: Path, lens: LensConfig, scaling: InputScaling) -> Coder:
    """Load a local SAE of an architecture that only the library supports, and fold in its input scaling."""
    from sae_lens import SAE

    try:
        module = SAE.load_from_disk(folder, device="cpu", dtype="float32")
    except Exception as error:  # the library validates little, so anything may fail
        raise _unloadable(folder, lens, error) from error
    _fold(module, lens, scaling)
    return as_coder(module, lens)


def load_state(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], lens: LensConfig, scaling: InputScaling
) -> Coder:
    """Load such an SAE from a config and tensors. The tensors are copied."""
    from sae_lens import SAE

    state = {name: tensor.clone() for name, tensor in tensors.items()}
    try:
        module = SAE.from_dict({**config, "device": "meta", "dtype": "float32"})  # meta: initialises no weights
        module.process_state_dict_for_loading(state)
        module.load_state_dict(state, assign=True)
        module.to(device="cpu")
    except Exception as error:  # likewise
        raise _unloadable(lens.path, lens, error) from error
    _fold(module, lens, scaling)
    return as_coder(module, lens)


def as_coder(module: Any, lens: LensConfig) -> Coder:
    """Return the coder of a ``sae_lens.SAE`` with folded input scaling: native where supported, else a wrapper."""
    if lens.architecture in NATIVE:
        return build_native(lens, {name: tensor.float() for name, tensor in module.state_dict().items()})
    return as_dense_coder(module, lens)


def as_dense_coder(module: Any, lens: LensConfig) -> DenseCoder:
    """Wrap a ``sae_lens.SAE``, modifying it: its own run-time normalisation and reshaping are switched off."""
    module.run_time_activation_norm_fn_in = module.run_time_activation_norm_fn_out = _identity
    module.turn_off_forward_pass_hook_z_reshaping()
    return DenseCoder.of(module, lens.d_out, lens.d_sae)


def _fold(module: Any, lens: LensConfig, scaling: InputScaling) -> None:
    """Fold in the input scaling, which ``SAE.load_from_disk`` leaves to its caller."""
    whitening = scaling.whitening
    if whitening is None:
        module.fold_activation_norm_scaling_factor(scaling.factor)
        return
    try:
        module.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse)
    except NotImplementedError as error:
        raise RequestError(f"{lens.path}: covariance_whitening of {lens.architecture}: {error}") from error


def _unloadable(where: Path, lens: LensConfig, error: Exception) -> RequestError:
    what = f"architecture {lens.architecture!r}: neither this program nor SAE Lens can load it ({one_line(error)})"
    return RequestError(f"{where}: {what}")


def one_line(error: Exception) -> str:
    """Return an exception's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _identity(x: Tensor) -> Tensor:
    return x
