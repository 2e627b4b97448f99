"""SAEs that only the SAE Lens library can run or fetch. Importing it takes 5 s, so it happens here, late."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HTTPError as HubHTTPError
from torch import Tensor

from errors import RequestError
from sae_formats.coders import Coder
from sae_formats.input_norm import InputNorm
from sae_formats.sae_lens_config import NATIVE, LensConfig
from sae_formats.sae_lens_weights import build_native
from sae_formats.selection import nonzero_codes
from sae_formats.source import SaeHeader
from sae_formats.sparse_rows import SparseRows

DENSE_ROWS = 256
"""Rows that are decoded at a time: the library's decoders want dense codes."""


@dataclass(frozen=True)
class LibraryCoder:
    """A ``sae_lens.SAE`` behind our interface. Its codes are made sparse again as soon as it returns them."""

    module: Any
    """``sae_lens.SAE`` with its run-time input normalisation switched off: that is ours."""

    @property
    def device(self) -> torch.device:
        return self.module.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        return self.module.W_dec.dtype

    def encode(self, x: Tensor) -> SparseRows:
        return nonzero_codes(self.module.encode(x))

    def decode(self, codes: SparseRows) -> Tensor:
        rows = torch.arange(codes.n_rows, device=codes.crow.device).repeat_interleave(codes.crow.diff())
        parts = []
        for start in range(0, codes.n_rows, DENSE_ROWS):
            stop = min(start + DENSE_ROWS, codes.n_rows)
            entries = slice(int(codes.crow[start]), int(codes.crow[stop]))
            dense = torch.zeros(stop - start, codes.n_cols, dtype=self.dtype, device=self.device)
            dense[rows[entries] - start, codes.col[entries]] = codes.value[entries].to(self.dtype)
            parts.append(self.module.decode(dense).float())
        return torch.cat(parts) if parts else torch.zeros(0, self.module.cfg.d_in, device=self.device)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> LibraryCoder:
        return LibraryCoder(copy.deepcopy(self.module).to(device=device, dtype=dtype or self.dtype))


@dataclass(frozen=True)
class RegistryMember:
    """One SAE of SAE Lens's list of pretrained ones, fetched by the library's own code."""

    release: str
    sae_id: str
    header: SaeHeader

    @property
    def where(self) -> str:
        return f"{self.release}/{self.sae_id}"

    def prepare(self) -> None:
        _ = self._module

    def build(self) -> tuple[Coder, InputNorm]:
        lens = LensConfig.parse(self._module.cfg.to_dict(), Path(self.where) / "cfg.json")
        return _build(self._module, lens)

    def digest(self) -> str:
        digest = hashlib.sha256(json.dumps(self.header.config, sort_keys=True, default=str).encode())
        for name, tensor in sorted(self._module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def _module(self) -> Any:
        """The library's SAE: float32, on the CPU, with the input scaling of its release folded in."""
        from sae_lens import SAE

        try:
            module = SAE.from_pretrained(self.release, self.sae_id, device="cpu", dtype="float32")
        except (OSError, HubHTTPError, ValueError, KeyError) as error:
            raise RequestError(f"{self.where}: SAE Lens could not load it ({error})") from error
        if module.cfg.normalize_activations == "expected_average_only_in":
            raise RequestError(f"{self.where}: SAE Lens lists no norm_scaling_factor, which its input needs")
        return module


def is_release(name: str) -> bool:
    """Whether SAE Lens's list has a release of this name, found without importing the library."""
    package = find_spec("sae_lens")
    if package is None or not package.submodule_search_locations:
        return False
    registry = Path(package.submodule_search_locations[0]) / "pretrained_saes.yaml"
    with registry.open(encoding="utf-8") as lines:
        return any(line.startswith(f"{name}:") for line in lines)


def find_in_registry(release: str, sae_id: str) -> RegistryMember:
    """The member of a release. Raises `RequestError` if it lists no such id or its config cannot be had."""
    from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    known = list(get_pretrained_saes_directory()[release].saes_map)
    if sae_id not in known:
        some = ", ".join(known[:4]) + (f" and {len(known) - 4} more" if len(known) > 4 else "")
        raise RequestError(f"{release}/{sae_id}: this SAE Lens release has no such id; it has {some}")
    try:
        config = load_sae_config_from_huggingface(release, sae_id)
    except (OSError, HubHTTPError, ValueError, KeyError) as error:
        raise RequestError(f"{release}/{sae_id}: SAE Lens could not read its config ({error})") from error
    lens = LensConfig.parse(config, Path(release) / sae_id / "cfg.json")
    return RegistryMember(release, sae_id, lens.header(config))


def load_folder(folder: Path, lens: LensConfig) -> tuple[Coder, InputNorm]:
    """A local SAE of an architecture that only the library knows."""
    from sae_lens import SAE

    try:
        module = SAE.load_from_disk(folder, device="cpu", dtype="float32")
    except Exception as error:  # the library checks little of what a config holds, and fails where it is used
        what = f"architecture {lens.architecture!r}: neither this program nor SAE Lens can load it ({error})"
        raise RequestError(f"{folder}: {what}") from error
    return _build(module, lens)


def _build(module: Any, lens: LensConfig) -> tuple[Coder, InputNorm]:
    """Natively where that is exact and fast, through the library otherwise."""
    if lens.architecture in NATIVE:
        return build_native(lens, {name: tensor.float() for name, tensor in module.state_dict().items()})
    norm = lens.normalize_activations
    if norm == "expected_average_only_in":
        raise RequestError(f"{lens.path}: {lens.architecture} with normalize_activations {norm!r} cannot be measured")
    module.run_time_activation_norm_fn_in = module.run_time_activation_norm_fn_out = _unchanged
    return LibraryCoder(module), norm


def _unchanged(x: Tensor) -> Tensor:
    return x
