"""Reader of dictionary_learning folders: ``config.json`` and ``ae.pt``, such as ``resid_post_layer_5/trainer_0/``.

Follows ``load_dictionary`` of https://github.com/saprmarks/dictionary_learning 0.1.0 (``dictionary.py``,
``trainers/*.py``):

==========================  ===================================================  =====================
``dict_class``              pre-activations                                      fires
==========================  ===================================================  =====================
``AutoEncoder``             (x - bias) Wᵀ + b, decoder scaled to unit norm       above 0
``AutoEncoderNew``          x Wᵀ + b                                             above 0
``GatedAutoEncoder``        (x - decoder_bias) Wᵀ, separate gate and magnitude   where the gate is
``AutoEncoderTopK``         (x - b_dec) Wᵀ + b                                   the k largest
``BatchTopKSAE``            (x - b_dec) Wᵀ + b                                   above one threshold
``MatryoshkaBatchTopKSAE``  (x - b_dec) W + b; all groups                        above one threshold
``JumpReluAutoEncoder``     x W + b: ``apply_b_dec_to_input`` is off in files    above its threshold
==========================  ===================================================  =====================

An untrained threshold is -1 and passes every positive latent, as in the library. The library scales the biases before
it saves an SAE trained on normalised activations, so nothing has to be scaled at run time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from delta_selectivity.errors import RequestError
from delta_selectivity.saes.coders import LinearCoder, fold_b_dec
from delta_selectivity.saes.dictionary_learning_places import find_places
from delta_selectivity.saes.files import check_shapes, positive_int, read_tensors
from delta_selectivity.saes.hookpoints import HookPoint
from delta_selectivity.saes.input_norm import InputNorm
from delta_selectivity.saes.selection import Gated, Selection, Threshold, TopK
from delta_selectivity.saes.source import SaeHeader
from delta_selectivity.saes.torch_file import read_torch_file

CONFIG, WEIGHTS = "config.json", "ae.pt"


class DictClass(NamedTuple):
    """The computation and the tensor names of one of the library's classes."""

    architecture: str  # this project's name of the architecture
    b_enc: str  # name of the tensor, as for the next
    b_dec: str
    linear: bool  # whether encoder and decoder are `nn.Linear`, with `weight` of shape [out, in]
    subtracts_b_dec: bool  # whether the encoder's input is x - b_dec

    @property
    def W_enc(self) -> str:
        return "encoder.weight" if self.linear else "W_enc"

    @property
    def W_dec(self) -> str:
        return "decoder.weight" if self.linear else "W_dec"

    def shapes(self, d_in: int, d_sae: int) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of the tensors in its file."""
        wide, tall = (d_in, d_sae), (d_sae, d_in)
        shapes: dict[str, tuple[int, ...]] = {
            self.W_enc: tall if self.linear else wide,
            self.W_dec: wide if self.linear else tall,
            self.b_enc: (d_sae,),
            self.b_dec: (d_in,),
        }
        if self.architecture == "gated":
            shapes |= {"r_mag": (d_sae,), "mag_bias": (d_sae,)}
        elif self.architecture == "jumprelu":
            shapes["threshold"] = (d_sae,)
        elif self.architecture == "topk":
            shapes["k"] = ()
        elif self.architecture != "standard":
            shapes["threshold"] = ()
        return shapes


CLASSES = {
    "AutoEncoder": DictClass("standard", "encoder.bias", "bias", linear=True, subtracts_b_dec=True),
    "AutoEncoderNew": DictClass("standard", "encoder.bias", "decoder.bias", linear=True, subtracts_b_dec=False),
    "GatedAutoEncoder": DictClass("gated", "gate_bias", "decoder_bias", linear=True, subtracts_b_dec=True),
    "AutoEncoderTopK": DictClass("topk", "encoder.bias", "b_dec", linear=True, subtracts_b_dec=True),
    "BatchTopKSAE": DictClass("batchtopk", "encoder.bias", "b_dec", linear=True, subtracts_b_dec=True),
    "MatryoshkaBatchTopKSAE": DictClass("matryoshka_batchtopk", "b_enc", "b_dec", linear=False, subtracts_b_dec=True),
    "JumpReluAutoEncoder": DictClass("jumprelu", "b_enc", "b_dec", linear=False, subtracts_b_dec=False),
}


@dataclass(frozen=True)
class DictionaryLearning:
    """The dictionary_learning format."""

    hookpoint: str | None = None  # the user's, for a config and folder that do not name one

    def files(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the config, then the weights."""
        return CONFIG, WEIGHTS

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Return True: only this format uses these file names."""
        return True

    def read_header(self, config: dict[str, Any], path: Path, model_name: str | None) -> SaeHeader:
        """Check the config found at ``path`` and return its header."""
        trainer = _trainer(config, path)
        _dict_class(trainer, path)  # report an unknown class before anything else
        hook, reads = find_places(trainer, _buffer(config), path, self.hookpoint)
        return make_header(config, path, hook, reads, model_name)

    def check(self, folder: Path, header: SaeHeader) -> None:
        """Compare the names and shapes of the weights with the config."""
        kind = _dict_class(header.config["trainer"], folder / CONFIG)
        check_shapes(folder / WEIGHTS, kind.shapes(header.d_in, header.d_sae))
        if header.k is not None and (stored := read_torch_file(folder / WEIGHTS)["k"].item()) != header.k:
            raise RequestError(f"{folder / WEIGHTS}: k is {stored}, but {CONFIG} says {header.k}")

    def build(self, folder: Path, header: SaeHeader) -> tuple[LinearCoder, InputNorm]:
        """Load the weights."""
        return make_coder(header, read_tensors(folder / WEIGHTS)), "none"


def make_header(
    config: dict[str, Any], path: Path, hook: HookPoint, reads: str | None, model_name: str | None = None
) -> SaeHeader:
    """Check a config and return its header.

    Args:
        config: content of ``config.json``.
        path: the config's path, for messages.
        hook: the hook point that is reconstructed.
        reads: the hook point that a transcoder reads; None for an autoencoder.
        model_name: the model that the SAE was trained on, if the config does not name it.

    Raises:
        RequestError: a setting is missing or wrong.
    """
    trainer = _trainer(config, path)
    kind = _dict_class(trainer, path)
    d_in, d_sae = positive_int(trainer, "activation_dim", path), positive_int(trainer, "dict_size", path)
    k = positive_int(trainer, "k", path) if kind.architecture == "topk" else None
    if k is not None and k > d_sae:
        raise RequestError(f"{path}: k {k} is greater than dict_size {d_sae}")
    name, length = trainer.get("lm_name"), _buffer(config).get("ctx_len")
    return SaeHeader(
        format="dictionary_learning",
        layer=hook.layer,
        hookpoint=hook.place,
        d_in=d_in,
        d_sae=d_sae,
        k=k,
        architecture=kind.architecture if reads is None else f"{kind.architecture} transcoder",
        config=config,
        model_name=name if isinstance(name, str) else model_name,
        input_hookpoint=reads,
        context_size=length if isinstance(length, int) else None,
    )


def make_coder(header: SaeHeader, tensors: Mapping[str, Tensor]) -> LinearCoder:
    """Return a coder from float32 tensors with dictionary_learning's names and shapes."""
    kind = CLASSES[header.config["trainer"]["dict_class"]]
    W_enc, W_dec = tensors[kind.W_enc], tensors[kind.W_dec].T
    if not kind.linear:
        W_enc, W_dec = W_enc.T, W_dec.T
    b_enc, b_dec = tensors[kind.b_enc], tensors[kind.b_dec]
    if header.config["trainer"]["dict_class"] == "AutoEncoder":
        norms = W_dec.norm(dim=1)
        norms = torch.where(norms > 0, norms, 1)  # leave a latent with a zero decoder row unchanged
        W_enc, b_enc, W_dec = W_enc * norms.unsqueeze(1), b_enc * norms, W_dec / norms.unsqueeze(1)
    bias = fold_b_dec(W_enc, b_enc, b_dec) if kind.subtracts_b_dec else b_enc
    return LinearCoder(W_enc.contiguous(), bias, W_dec.contiguous(), b_dec, _selection(header, kind, tensors))


def _trainer(config: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    trainer = config.get("trainer")
    if not isinstance(trainer, Mapping):
        raise RequestError(f"{path}: it has no object 'trainer', which dictionary_learning writes for ae.pt")
    return trainer


def _buffer(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of the training activations; empty if they were not saved."""
    buffer = config.get("buffer")
    return buffer if isinstance(buffer, Mapping) else {}


def _dict_class(trainer: Mapping[str, Any], path: Path) -> DictClass:
    name = trainer.get("dict_class")
    if not isinstance(name, str) or name not in CLASSES:
        raise RequestError(f"{path}: trainer.dict_class is {name!r}; supported: {', '.join(CLASSES)}")
    return CLASSES[name]


def _selection(header: SaeHeader, kind: DictClass, tensors: Mapping[str, Tensor]) -> Selection:
    if header.k is not None:
        return TopK(header.k)
    if kind.architecture == "gated":
        gain = tensors["r_mag"].exp()
        return Gated(gain, offset=tensors["mag_bias"] - gain * tensors["gate_bias"])
    threshold = torch.tensor(0.0, dtype=torch.float32) if kind.architecture == "standard" else tensors["threshold"]
    return Threshold(threshold.clamp(min=0).expand(header.d_sae).clone())
