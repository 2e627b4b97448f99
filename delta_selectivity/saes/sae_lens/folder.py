"""Reader of SAE Lens folders: ``cfg.json`` and ``sae_weights.safetensors``.

The library is not imported, because that takes 5 s and half a gigabyte. Only architectures that are not a linear map
and a selection need it (``library``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delta_selectivity.saes.coders import Coder
from delta_selectivity.saes.files import check_shapes, read_shapes, read_tensors
from delta_selectivity.saes.input_norm import InputNorm
from delta_selectivity.saes.sae_lens.config import NATIVE, LensConfig
from delta_selectivity.saes.sae_lens.library import load_folder
from delta_selectivity.saes.sae_lens.places import Places
from delta_selectivity.saes.sae_lens.scaling import SCALER, WHITENING, check_scaling, read_scaling
from delta_selectivity.saes.sae_lens.weights import build_native, expected_shapes
from delta_selectivity.saes.source import SaeHeader

WEIGHTS = "sae_weights.safetensors"


@dataclass(frozen=True)
class SaeLens:
    """The SAE Lens format."""

    hookpoint: str | None = None  # the user's, for a config with an unknown name

    def files(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the config, the weights, and the additional files of a training checkpoint."""
        return ("cfg.json", WEIGHTS, SCALER, WHITENING)

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Return whether a config has keys that sparsify does not write."""
        return bool({"d_sae", "architecture", "metadata", "hook_name", "hook_point"} & config.keys())

    def read_header(self, config: dict[str, Any], path: Path, model_name: str | None) -> SaeHeader:
        """Check the config found at ``path`` and return its header."""
        return LensConfig.parse(config, path, hookpoint=self.hookpoint).header(config)

    def check(self, folder: Path, header: SaeHeader) -> None:
        """Compare the names and shapes of the weights with the config, and check for required additional files."""
        lens = LensConfig.parse(header.config, folder / "cfg.json", Places.of(header))
        names = set(read_shapes(folder / WEIGHTS))
        if lens.architecture in NATIVE:
            check_shapes(folder / WEIGHTS, expected_shapes(lens, names))
        check_scaling(lens)

    def build(self, folder: Path, header: SaeHeader) -> tuple[Coder, InputNorm]:
        """Load the weights."""
        lens = LensConfig.parse(header.config, folder / "cfg.json", Places.of(header))
        scaling = read_scaling(lens)
        if lens.architecture in NATIVE:
            return build_native(lens, read_tensors(folder / WEIGHTS), scaling), lens.input_norm
        return load_folder(folder, lens, scaling), lens.input_norm
