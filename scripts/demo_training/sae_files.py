"""Write SAEs in the folder formats of EleutherAI/sparsify and SAE Lens, and read them back with both libraries."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from scripts.sae_training.kinds import Weights


def rounded(weights: Weights) -> Weights:
    return {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in weights.items()}


def write_sparsify(folder: Path, weights: Weights, k: int) -> None:
    """Write `layers.5/cfg.json` and `sae.safetensors` as `sparsify.SparseCoder.save_to_disk` does."""
    folder.mkdir(parents=True, exist_ok=True)
    d_sae, d_in = weights["W_enc"].shape
    config = {
        "activation": "topk", "expansion_factor": d_sae // d_in, "normalize_decoder": True,
        "num_latents": d_sae, "k": k, "multi_topk": False, "skip_connection": False, "transcode": False,
        "d_in": d_in,
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config, indent=2) + "\n")
    exact = rounded(weights)
    tensors = {
        "encoder.weight": exact["W_enc"], "encoder.bias": exact["b_enc"],
        "W_dec": exact["W_dec"], "b_dec": exact["b_dec"],
    }  # fmt: skip
    save_file(tensors, folder / "sae.safetensors")


def write_sae_lens(
    folder: Path, weights: Weights, architecture: dict[str, object], metadata: dict[str, object]
) -> None:
    """Write `cfg.json` and `sae_weights.safetensors` as SAE Lens does.

    Weights are bfloat16 on disk, except those that decide which latents are active. architecture: its name and
    settings, such as those of `sae_lens_topk`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    d_sae, d_in = weights["W_enc"].shape
    config = {
        "d_in": d_in, "d_sae": d_sae, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "reshape_activations": "none", **architecture, "metadata": metadata,
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config, indent=2) + "\n")
    exact = rounded(weights)
    exact |= {name: weights[name].float() for name in ("threshold", "b_gate") if name in weights}
    save_file({**exact, "W_enc": exact["W_enc"].T.contiguous()}, folder / "sae_weights.safetensors")


def sae_lens_topk(k: int) -> dict[str, object]:
    """Return the config entries of a TopK SAE's architecture."""
    return {"architecture": "topk", "k": k, "rescale_acts_by_decoder_norm": False}


def reconstruct(weights: Weights, k: int, x: Tensor) -> Tensor:
    """Return the reconstruction by the saved, rounded weights in float32; `[rows, d_in]`."""
    w = {name: tensor.float() for name, tensor in rounded(weights).items()}
    pre = torch.relu((x - w["b_dec"]) @ w["W_enc"].T + w["b_enc"])
    values, indices = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, indices, values) @ w["W_dec"] + w["b_dec"]


@torch.no_grad()
def error_in_sparsify(folder: Path, weights: Weights, k: int, x: Tensor) -> float:
    """Return the largest difference from sparsify's output for the folder, relative to the largest entry."""
    from sparsify import Sae

    sae = Sae.load_from_disk(folder).float()
    top_acts, top_indices, _ = sae.encode(x)
    ours = reconstruct(weights, k, x)
    return ((sae.decode(top_acts, top_indices) - ours).abs().max() / ours.abs().max()).item()


@torch.no_grad()
def error_in_sae_lens(folder: Path, weights: Weights, k: int, x: Tensor) -> float:
    """Return the same for SAE Lens."""
    from sae_lens import SAE

    ours = reconstruct(weights, k, x)
    return ((SAE.load_from_disk(folder)(x) - ours).abs().max() / ours.abs().max()).item()
