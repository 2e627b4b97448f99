"""EleutherAI's sparsify: folders ``layers.5`` or ``layers.5.mlp`` with ``cfg.json`` and ``sae.safetensors``.

Semantics of https://github.com/EleutherAI/sparsify 1.3.3 (``sparse_coder.py``, ``fused_encoder.py``): no input
normalisation; p = ReLU((x - b_dec) W_encᵀ + b_enc); the k largest p (or the largest of each of k groups);
x̂ = Σ_j p_j W_dec[j] + b_dec. Config keys that it does not know are ignored, as it ignores them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from errors import RequestError
from sae_formats.coders import LinearCoder, fold_b_dec
from sae_formats.files import check_shapes, positive_int, read_tensors
from sae_formats.hookpoints import parse
from sae_formats.input_norm import InputNorm
from sae_formats.selection import GroupMax, Selection, TopK
from sae_formats.source import SaeHeader

WEIGHTS = "sae.safetensors"
SELECTIONS: dict[str, type[TopK] | type[GroupMax]] = {"topk": TopK, "groupmax": GroupMax}
DEFAULTS = {"activation": "topk", "expansion_factor": 32, "num_latents": 0, "k": 32}
"""sparsify's own, for keys that an older version did not write."""


class Sparsify:
    """Reads one folder of this format."""

    files = ("cfg.json", WEIGHTS)

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Whether a config is of this format: none of SAE Lens's keys, some of its own."""
        return bool({"expansion_factor", "num_latents", "k"} & config.keys())

    def read_header(self, config: dict[str, Any], path: Path, model_name: str | None) -> SaeHeader:
        """Check a config, found at ``path``. The folder's name says where in the model the SAE belongs."""
        _refuse_transcoder(config, path)
        hook = parse(path.parent.name)
        if hook is None:
            raise RequestError(
                f"{path.parent}: the folder's name says where in the model the SAE belongs;"
                " rename it to layers.5 or layers.5.mlp, say"
            )
        settings = DEFAULTS | {key: value for key, value in config.items() if value is not None}
        d_in, k = positive_int(settings, "d_in", path), positive_int(settings, "k", path)
        d_sae = settings["num_latents"] or d_in * positive_int(settings, "expansion_factor", path)
        activation = settings["activation"]
        if activation not in SELECTIONS:
            raise RequestError(f"{path}: activation {activation!r}; {' and '.join(SELECTIONS)} are known")
        if not isinstance(d_sae, int) or k > d_sae or (activation == "groupmax" and d_sae % k):
            raise RequestError(f"{path}: {activation} with k {k} does not fit num_latents {d_sae!r}")
        return SaeHeader("sparsify", hook.layer, hook.place, d_in, d_sae, k, activation, config, model_name=model_name)

    def check(self, folder: Path, header: SaeHeader) -> None:
        """Compare the weights' header with the config."""
        matrix, latents = (header.d_sae, header.d_in), (header.d_sae,)
        shapes = {"encoder.weight": matrix, "encoder.bias": latents, "W_dec": matrix, "b_dec": (header.d_in,)}
        check_shapes(folder / WEIGHTS, shapes)

    def build(self, folder: Path, header: SaeHeader) -> tuple[LinearCoder, InputNorm]:
        """Load the weights."""
        tensors = read_tensors(folder / WEIGHTS)
        W_enc, b_dec = tensors["encoder.weight"], tensors["b_dec"]
        bias = fold_b_dec(W_enc, tensors["encoder.bias"], b_dec)
        assert header.k is not None
        selection: Selection = SELECTIONS[header.architecture](header.k)
        return LinearCoder(W_enc, bias, tensors["W_dec"], b_dec, selection), "none"


def _refuse_transcoder(config: Mapping[str, Any], path: Path) -> None:
    for key in ("transcode", "skip_connection"):
        if config.get(key):
            raise RequestError(
                f"{path}: {key} is true. A transcoder predicts a module's output from its input; judged as a"
                " reconstruction of its input it would be wrong without a sign. Give an autoencoder"
            )
