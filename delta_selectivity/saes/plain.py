"""Reader of custom SAEs: a folder with ``sae.json`` and named tensors (``plain_config`` lists the keys).

The config is converted to SAE Lens's, so that each formula is implemented once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from delta_selectivity.errors import RequestError
from delta_selectivity.saes.coders import Coder
from delta_selectivity.saes.files import check_shapes, read_shapes, read_tensors
from delta_selectivity.saes.input_norm import InputNorm
from delta_selectivity.saes.plain_config import MATRICES, PlainConfig
from delta_selectivity.saes.sae_lens.config import LensConfig
from delta_selectivity.saes.sae_lens.places import Places
from delta_selectivity.saes.sae_lens.scaling import InputScaling
from delta_selectivity.saes.sae_lens.weights import build_native, expected_shapes
from delta_selectivity.saes.source import SaeHeader

CONFIG = "sae.json"


class Plain:
    """The ``sae.json`` format."""

    def files(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the config, then the weights."""
        return CONFIG, config["weights"]

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Return True: only this format uses this file name."""
        return True

    def read_header(self, config: dict[str, Any], path: Path, model_name: str | None) -> SaeHeader:
        """Check the config found at ``path`` and return its header."""
        plain = PlainConfig.parse(config, path)
        d_in, d_sae = _widths(plain)
        if plain.k is not None and plain.k > d_sae:
            raise RequestError(f"{path}: k {plain.k} is greater than d_sae {d_sae}")
        return SaeHeader(
            format="plain",
            layer=plain.hook.layer,
            hookpoint=plain.hook.place,
            d_in=d_in,
            d_sae=d_sae,
            k=plain.k,
            architecture=plain.architecture if plain.input_hookpoint is None else f"{plain.architecture} transcoder",
            config=config,
            prepend_bos=plain.prepend_bos,
            counts_bos=plain.trained_on_bos,
            model_name=plain.model_name or model_name,
            input_hookpoint=plain.input_hookpoint,
            width_out=plain.d_out,
            context_size=plain.context_size,
        )

    def check(self, folder: Path, header: SaeHeader) -> None:
        """Compare the names and shapes of the weights with the config."""
        plain = PlainConfig.parse(header.config, folder / CONFIG)
        _find_transposed(plain, _as_lens(plain, header))

    def build(self, folder: Path, header: SaeHeader) -> tuple[Coder, InputNorm]:
        """Load the weights."""
        plain = PlainConfig.parse(header.config, folder / CONFIG)
        lens = _as_lens(plain, header)
        transposed, stored = _find_transposed(plain, lens), read_tensors(plain.weights)
        widths = {"b_dec": header.d_out, "b_enc": header.d_sae}
        tensors = {name: torch.zeros(n, dtype=torch.float32) for name, n in widths.items()}  # for biases that are null
        for ours, theirs in plain.names.items():
            if theirs in stored:
                tensors[ours] = stored[theirs].T if ours in transposed else stored[theirs]
        return build_native(lens, tensors, InputScaling(factor=plain.scaling_factor)), plain.input_norm


def _widths(plain: PlainConfig) -> tuple[int, int]:
    """Return d_in and d_sae from the config, else from the lengths of the biases in the weights."""
    if plain.d_in is not None and plain.d_sae is not None:
        return plain.d_in, plain.d_sae
    shapes = read_shapes(plain.weights)

    def length(key: str, bias: str) -> int:
        shape = shapes.get(plain.names[bias] or "", ())
        if len(shape) != 1:
            raise RequestError(
                f"{plain.path}: {key} is missing, and {plain.weights.name} has no {bias} to find it from"
            )
        return shape[0]

    encoder_bias = "b_gate" if plain.architecture == "gated" else "b_enc"
    return plain.d_in or length("d_in", "b_dec"), plain.d_sae or length("d_sae", encoder_bias)


def _as_lens(plain: PlainConfig, header: SaeHeader) -> LensConfig:
    """Return the equivalent SAE Lens config, except for the normalisation, which has this project's names."""
    return LensConfig(
        path=plain.path,
        architecture=plain.architecture,
        d_in=header.d_in,
        d_out=header.d_out,
        d_sae=header.d_sae,
        k=plain.k,
        apply_b_dec_to_input=plain.apply_b_dec_to_input,
        rescale_acts_by_decoder_norm=plain.rescale_acts_by_decoder_norm,
        normalize_activations="none",
        places=Places(header.layer, header.hookpoint, header.input_hookpoint),
        centred=False,
        model_name=header.model_name,
        context_size=header.context_size,
        prepend_bos=header.prepend_bos,
        trained_on_bos=header.counts_bos,
    )


def _find_transposed(plain: PlainConfig, lens: LensConfig) -> set[str]:
    """Return the matrices that the file holds transposed. Raises `RequestError` if a tensor does not fit the config."""
    found = read_shapes(plain.weights)
    shapes = dict(expected_shapes(lens, {ours for ours, theirs in plain.names.items() if theirs in found}))
    transposed = set()
    for matrix in MATRICES:
        shape = shapes[matrix]
        if shape[0] == shape[1] and matrix not in plain.transposed:
            usual = "[d_in, d_sae]" if matrix == "W_enc" else "[d_sae, d_in]"
            raise RequestError(
                f'{plain.path}: {matrix} is square, so its shape does not show its orientation: add "transposed":'
                f' {{"{matrix}": false}} if it is {usual}, else true'
            )
        if plain.transposed.get(matrix, found.get(plain.names[matrix] or "") == shape[::-1]):
            transposed.add(matrix)
            shapes[matrix] = shape[::-1]
    check_shapes(plain.weights, {name: shapes[ours] for ours in shapes if (name := plain.names[ours]) is not None})
    return transposed
