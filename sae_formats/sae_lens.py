"""SAE Lens: folders of ``cfg.json`` and ``sae_weights.safetensors``.

The library itself is not imported for it: that takes 5 s and half a gigabyte. Architectures that are not a linear map
and a selection go through it all the same (``sae_lens_library``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_formats.coders import Coder
from sae_formats.files import check_shapes, read_tensors, tensor_names
from sae_formats.input_norm import InputNorm
from sae_formats.sae_lens_config import NATIVE, LensConfig
from sae_formats.sae_lens_weights import SCALER, build_native, scaling_factor_of
from sae_formats.source import SaeHeader

WEIGHTS = "sae_weights.safetensors"


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
        scaling_factor_of(lens)

    def build(self, folder: Path, header: SaeHeader) -> tuple[Coder, InputNorm]:
        """Load the weights."""
        lens = LensConfig.parse(header.config, folder / "cfg.json")
        if lens.architecture not in NATIVE:
            from sae_formats.sae_lens_library import load_folder  # imports the library, which takes 5 s

            return load_folder(folder, lens)
        return build_native(lens, read_tensors(folder / WEIGHTS), scaling_factor_of(lens))
