"""Reader of EleutherAI's sparsify folders: ``layers.5`` or ``layers.5.mlp`` with ``cfg.json`` and ``sae.safetensors``.

Follows https://github.com/EleutherAI/sparsify 1.3.3 (``sparse_coder.py``, ``fused_encoder.py``): no input
normalisation; p = ReLU((x - b_dec) W_encᵀ + b_enc); the k largest p (or the largest of each of k groups);
x̂ = Σ_j p_j W_dec[j] + b_dec. With ``transcode``, the coder imitates the folder's module: x is the module's input, x̂
approximates its output, and b_dec is not subtracted from x. With ``skip_connection``, x W_skipᵀ is added to x̂.
Unknown config keys are ignored, as in sparsify.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from delta_selectivity.errors import RequestError
from delta_selectivity.saes.coders import Coder, LinearCoder, SkipCoder, fold_b_dec
from delta_selectivity.saes.files import Shapes, check_shapes, positive_int, read_tensors
from delta_selectivity.saes.hookpoints import HookPoint, input_of, parse
from delta_selectivity.saes.input_norm import InputNorm
from delta_selectivity.saes.selection import GroupMax, TopK
from delta_selectivity.saes.source import SaeHeader

WEIGHTS = "sae.safetensors"
SELECTIONS: dict[str, type[TopK] | type[GroupMax]] = {"topk": TopK, "groupmax": GroupMax}
DEFAULTS = {"activation": "topk", "expansion_factor": 32, "num_latents": 0, "k": 32}
"""sparsify's defaults for keys that older versions did not write."""


class Sparsify:
    """The sparsify format."""

    def files(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the config, then the weights."""
        return ("cfg.json", WEIGHTS)

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Return whether a config has sparsify's keys."""
        return bool({"expansion_factor", "num_latents", "k"} & config.keys())

    def read_header(self, config: dict[str, Any], path: Path, model_name: str | None) -> SaeHeader:
        """Check the config found at ``path``. The folder's name gives the hook point."""
        hook = parse(path.parent.name)
        if hook is None:
            raise RequestError(
                f"{path.parent}: the folder's name must be the SAE's hook point: rename it, such as layers.5 or"
                " layers.5.mlp"
            )
        return make_header(config, path, hook, model_name)

    def check(self, folder: Path, header: SaeHeader) -> None:
        """Compare the names and shapes of the weights with the config."""
        check_shapes(folder / WEIGHTS, expected_shapes(header))

    def build(self, folder: Path, header: SaeHeader) -> tuple[Coder, InputNorm]:
        """Load the weights."""
        return make_coder(header, read_tensors(folder / WEIGHTS)), "none"


def make_header(
    config: dict[str, Any], path: Path, hook: HookPoint, model_name: str | None = None, reads: str | None = None
) -> SaeHeader:
    """Check a config and return its header.

    Args:
        config: content of ``cfg.json``.
        path: the config's path, for messages.
        hook: the hook point that is reconstructed.
        model_name: the model that the SAE was trained on, if known.
        reads: the hook point that a transcoder reads; by default the input of the module at ``hook``.

    Raises:
        RequestError: a setting is missing or wrong.
    """
    settings = _with_defaults(config)
    d_in, k = positive_int(settings, "d_in", path), positive_int(settings, "k", path)
    d_sae = settings["num_latents"] or d_in * positive_int(settings, "expansion_factor", path)
    activation = settings["activation"]
    if activation not in SELECTIONS:
        raise RequestError(f"{path}: activation is {activation!r}; supported: {' and '.join(SELECTIONS)}")
    if not isinstance(d_sae, int) or k > d_sae or (activation == "groupmax" and d_sae % k):
        raise RequestError(f"{path}: {activation} with k {k} does not fit num_latents {d_sae!r}")
    transcodes = bool(config.get("transcode"))
    skip, kind = " skip" if config.get("skip_connection") else "", " transcoder" if transcodes else ""
    return SaeHeader(
        format="sparsify",
        layer=hook.layer,
        hookpoint=hook.place,
        d_in=d_in,
        d_sae=d_sae,
        k=k,
        architecture=f"{activation}{skip}{kind}",
        config=config,
        model_name=model_name,
        input_hookpoint=(reads or input_of(hook.place)) if transcodes else None,
    )


def expected_shapes(header: SaeHeader) -> Shapes:
    """Return the names and shapes of tensors that the config implies."""
    matrix, latents, d_in = (header.d_sae, header.d_in), (header.d_sae,), header.d_in
    shapes: Shapes = {"encoder.weight": matrix, "encoder.bias": latents, "W_dec": matrix, "b_dec": (d_in,)}
    skip: Shapes = {"W_skip": (d_in, d_in)} if header.config.get("skip_connection") else {}
    return {**shapes, **skip}


def make_coder(header: SaeHeader, tensors: Mapping[str, Tensor]) -> Coder:
    """Return a coder from float32 tensors with sparsify's names and shapes."""
    W_enc, bias, b_dec = tensors["encoder.weight"], tensors["encoder.bias"], tensors["b_dec"]
    if not header.config.get("transcode"):
        bias = fold_b_dec(W_enc, bias, b_dec)
    assert header.k is not None
    selection = SELECTIONS[_with_defaults(header.config)["activation"]](header.k)
    coder = LinearCoder(W_enc, bias, tensors["W_dec"], b_dec, selection)
    return SkipCoder(coder, tensors["W_skip"]) if header.config.get("skip_connection") else coder


def _with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    return DEFAULTS | {key: value for key, value in config.items() if value is not None}
