"""SAEs in memory: objects of the libraries compared with their files, custom modules, and ``load_sae``."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import D_MODEL
from runs import Request
from test_sae_formats_more import library, make_dictionary, save_dictionary
from test_sae_loader import (
    D_IN,
    D_SAE,
    LENS_ARCHITECTURES,
    K,
    activations,
    assert_agrees,
    dense,
    linear_sae,
    make_lens,
    write_sparsify,
)
from torch import Tensor, nn

from delta_selectivity.errors import RequestError
from delta_selectivity.run import planning
from delta_selectivity.saes import SaeSource, Threshold, TopK, load_sae, open_sae, wrap_sae
from delta_selectivity.saes.coders import LinearCoder, SkipCoder
from delta_selectivity.saes.dictionary_learning import CLASSES

library = library  # a fixture that pytest finds here by its name

ROOT = Path(__file__).resolve().parent.parent
HEADER = ("format", "layer", "hookpoint", "d_in", "d_sae", "d_out", "k", "architecture", "input_hookpoint")


def assert_same_as_file(source: SaeSource, file: SaeSource) -> None:
    """Check that object and file give the same codes and reconstructions, bit for bit, by the same kind of coder."""
    (layer,), x = source.layers, activations(rows=300)
    member, stored = source.members[0].header, file.members[0].header
    assert [getattr(member, name) for name in HEADER] == [getattr(stored, name) for name in HEADER]
    sae, expected = source.load(layer, "cpu"), file.load(layer, "cpu")
    assert (type(sae.coder), sae.input_norm) == (type(expected.coder), expected.input_norm)
    codes, expected_codes = sae.encode(x), expected.encode(x)
    assert torch.equal(dense(codes), dense(expected_codes))
    assert torch.equal(sae.decode(codes, x), expected.decode(expected_codes, x))


@dataclass
class Facts:
    """All state of a module that a measurement must not change."""

    state: dict[str, Tensor]
    training: list[bool]
    kinds: list[tuple[bool, torch.dtype, torch.device, int]]
    gradients: list[Tensor | None]
    attributes: list[set[str]]

    @classmethod
    def of(cls, module: nn.Module) -> Facts:
        parameters = list(module.parameters())
        return cls(
            {name: tensor.clone() for name, tensor in module.state_dict().items()},
            [part.training for part in module.modules()],
            [(p.requires_grad, p.dtype, p.device, p.data_ptr()) for p in parameters],
            [None if p.grad is None else p.grad.clone() for p in parameters],
            [set(vars(part)) for part in module.modules()],
        )

    def assert_kept_by(self, module: nn.Module) -> None:
        now = Facts.of(module)
        assert (now.training, now.kinds, now.attributes) == (self.training, self.kinds, self.attributes)
        assert now.state.keys() == self.state.keys()
        assert all(torch.equal(now.state[name], tensor) for name, tensor in self.state.items())
        for found, expected in zip(now.gradients, self.gradients, strict=True):
            assert found is expected is None or torch.equal(found, expected)


def measure(source: SaeSource) -> None:
    """Do all that a run does with a source."""
    (layer,) = source.layers
    source.prepare()
    source.fingerprint()
    x = activations(rows=300, d_in=source.d_in)
    for dtype in (torch.float32, torch.bfloat16):
        sae = source.load(layer, "cpu", dtype)
        sae.decode(sae.encode(x), x)


def assert_unchanged(module: nn.Module, **given: Any) -> None:
    facts, states = Facts.of(module), (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002
    measure(wrap_sae(module, **given))
    facts.assert_kept_by(module)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]  # noqa: NPY002


# --- SAE Lens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["none", "constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize(("architecture", "settings"), LENS_ARCHITECTURES)
def test_a_training_sae_of_sae_lens(tmp_path: Path, architecture: str, settings: dict[str, Any], norm: str) -> None:
    from sae_lens import SAE

    trained = make_lens(architecture, normalize_activations=norm, **settings)
    trained.save_inference_model(tmp_path)
    source = wrap_sae(trained)
    assert (source.layers, source.hookpoint, source.d_in) == ((5,), "resid_post", D_IN)
    assert (source.prepend_bos, source.counts_bos, source.model_name) == (True, True, "pythia-70m-deduped")
    assert source.context_size == 128
    assert_same_as_file(source, open_sae(str(tmp_path)))
    assert_agrees(source.load(5, "cpu"), SAE.load_from_disk(tmp_path))
    assert_unchanged(trained)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("architecture", "settings"), LENS_ARCHITECTURES)
def test_an_inference_sae_of_sae_lens(tmp_path: Path, architecture: str, settings: dict[str, Any], dtype: str) -> None:
    from sae_lens import SAE

    make_lens(architecture, apply_b_dec_to_input=False, **settings).save_inference_model(tmp_path / "made")
    sae = SAE.load_from_disk(tmp_path / "made", dtype=dtype)
    sae.save_model(tmp_path / "saved")
    source = wrap_sae(sae, layer=5, hookpoint="blocks.5.hook_resid_post", d_in=D_IN, model_name="x/pythia-70m-deduped")
    assert source.name == f"{type(sae).__name__.lower()}_layer_5"
    assert_same_as_file(source, open_sae(str(tmp_path / "saved")))
    if dtype == "float32":
        assert_agrees(source.load(5, "cpu"), sae)
    assert_unchanged(sae)


def test_a_training_sae_in_half_precision_is_what_would_be_saved(tmp_path: Path) -> None:
    trained = make_lens("batchtopk", dtype="bfloat16")
    trained.save_inference_model(tmp_path)
    assert_same_as_file(wrap_sae(trained), open_sae(str(tmp_path)))


def test_the_constant_that_activations_of_sae_lens_are_scaled_by(tmp_path: Path) -> None:
    trained = make_lens("batchtopk", normalize_activations="expected_average_only_in")
    with pytest.raises(RequestError, match="`scaling_factor` is missing"):
        wrap_sae(trained)
    trained.save_model(tmp_path)
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 0.25}')
    x, stored = activations(), open_sae(str(tmp_path)).load(5, "cpu")
    source = wrap_sae(trained, scaling_factor=0.25)
    found = source.load(5, "cpu")
    torch.testing.assert_close(found.decode(found.encode(x)), stored.decode(stored.encode(x)), rtol=1e-5, atol=1e-5)
    assert source.fingerprint() != wrap_sae(trained, scaling_factor=0.5).fingerprint()
    with pytest.raises(RequestError, match="`scaling_factor` 2"):
        wrap_sae(make_lens("topk"), scaling_factor=2)
    with pytest.raises(RequestError, match=r"`obj` StandardTrainingSAE: .*covariance_whitening.*on a copy"):
        wrap_sae(make_lens("standard", normalize_activations="covariance_whitening"))


def test_an_sae_lens_object_without_a_place() -> None:
    sae = make_lens("topk", hook_name=None)
    with pytest.raises(RequestError, match="`layer` is missing: TopKTrainingSAE does not name"):
        wrap_sae(sae)
    assert (wrap_sae(sae, layer=2).layers, wrap_sae(sae, layer=2).hookpoint) == ((2,), "resid_post")
    assert wrap_sae(sae, hookpoint="blocks.4.hook_mlp_out").hookpoint == "mlp_out"
    unknown = make_lens("topk", hook_name="my_layer")
    with pytest.raises(RequestError, match="TopKTrainingSAE: hook_name 'my_layer' is not supported"):
        wrap_sae(unknown)
    assert wrap_sae(unknown, layer=1, hookpoint="attn_out").hookpoint == "attn_out"


def make_transcoder(architecture: str, **metadata: Any) -> Any:
    sae_lens = pytest.importorskip("sae_lens")
    from sae_lens.registry import get_sae_class

    sae_class, config_class = get_sae_class(architecture)
    config = config_class(d_in=D_IN, d_out=24, d_sae=D_SAE, apply_b_dec_to_input=False)
    config.metadata = sae_lens.saes.sae.SAEMetadata(**metadata)
    torch.manual_seed(0)
    sae = sae_class(config)
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return sae


@pytest.mark.parametrize("architecture", ["transcoder", "skip_transcoder", "jumprelu_transcoder"])
def test_a_transcoder_of_sae_lens(tmp_path: Path, architecture: str) -> None:
    sae = make_transcoder(architecture, hook_name="blocks.3.ln2.hook_normalized", hook_name_out="blocks.3.hook_mlp_out")
    sae.save_model(tmp_path)
    source, x = wrap_sae(sae), activations()
    assert (source.hookpoint, source.input_hookpoint, source.d_out) == ("mlp_out", "mlp_normalized", 24)
    assert_same_as_file(source, open_sae(str(tmp_path)))
    loaded = source.load(3, "cpu")
    if architecture != "jumprelu_transcoder":  # the library keeps negative latents above a threshold
        torch.testing.assert_close(loaded.decode(loaded.encode(x), x), sae(x).detach(), rtol=1e-5, atol=1e-5)
    silent = make_transcoder(architecture)
    with pytest.raises(RequestError, match="`hookpoint` is missing"):
        wrap_sae(silent, layer=3)
    with pytest.raises(RequestError, match="`input_hookpoint` is missing"):
        wrap_sae(silent, layer=3, hookpoint="mlp_out")
    assert wrap_sae(silent, layer=3, hookpoint="mlp_out", input_hookpoint="mlp_in").input_hookpoint == "mlp_in"


def test_a_subclass_of_sae_lens_with_an_encoder_of_its_own() -> None:
    pytest.importorskip("sae_lens")
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    class Doubled(StandardSAE):
        def encode(self, x: Tensor) -> Tensor:
            return 2 * super().encode(x)

    class Silent(StandardSAE):
        def forward(self, x: Tensor) -> Tensor:
            return x

    class Narrow(StandardSAE):
        def encode(self, x: Tensor) -> Tensor:
            return super().encode(x)[:, :5]

    config = StandardSAEConfig(D_IN, D_SAE, normalize_activations="layer_norm",
                               metadata=SAEMetadata(hook_name="blocks.1.hook_mlp_out"))  # fmt: skip
    doubled, x = Doubled(config), activations(rows=600)
    sae = wrap_sae(doubled).load(1, "cpu")
    assert (sae.layer, sae.hookpoint, sae.input_norm) == (1, "mlp_out", "layer_norm")
    with torch.no_grad():
        codes = doubled.encode(x)
        recon = doubled.decode(codes)
    torch.testing.assert_close(dense(sae.encode(x)), codes, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(sae.encode(x)), recon, rtol=1e-5, atol=1e-5)
    assert_unchanged(doubled)
    with pytest.raises(RequestError, match="`obj` Narrow: encode returned 5 latents, but its cfg says 64"):
        wrap_sae(Narrow(config))
    assert isinstance(wrap_sae(Silent(config)).load(1, "cpu").coder, LinearCoder), "its codes are the library's"


def test_unsupported_sae_lens_objects_are_rejected() -> None:
    with pytest.raises(RequestError, match="`obj` TopKTrainingSAE: k 4 is greater than d_sae 2"):
        wrap_sae(changed(make_lens("topk"), lambda sae: setattr(sae.cfg, "d_sae", 2)))
    with pytest.raises(RequestError, match=r"`obj` StandardTrainingSAE: W_dec has shape \[3, 16\]"):
        wrap_sae(changed(make_lens("standard"), lambda sae: setattr(sae, "W_dec", nn.Parameter(torch.ones(3, D_IN)))))


def changed(sae: Any, change: Callable[[Any], Any]) -> Any:
    change(sae)
    return sae


# --- sparsify --------------------------------------------------------------------------------------------------------


def make_sparse_coder(dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    sparsify = pytest.importorskip("sparsify")
    torch.manual_seed(0)
    coder = sparsify.SparseCoder(D_IN, sparsify.SparseCoderConfig(k=K, expansion_factor=4, **config), dtype=dtype)
    for parameter in coder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return coder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [
    {}, {"activation": "groupmax"}, {"transcode": True}, {"transcode": True, "skip_connection": True}
])  # fmt: skip
def test_an_object_of_sparsify(tmp_path: Path, config: dict[str, Any], dtype: torch.dtype) -> None:
    coder, x = make_sparse_coder(dtype, **config), activations()
    coder.save_to_disk(tmp_path / "layers.3.mlp")
    source = wrap_sae(coder, layer=3, hookpoint="layers.<layer>.mlp")
    assert source.input_hookpoint == ("mlp_in" if "transcode" in config else None)
    assert_same_as_file(source, open_sae(str(tmp_path)))
    assert_unchanged(coder, layer=3, hookpoint="layers.<layer>.mlp")
    sae, reference = source.load(3, "cpu"), copy.deepcopy(coder).float()
    with torch.no_grad():
        top = reference.encode(x)
        recon = reference.decode(top.top_acts, top.top_indices)
        recon += x @ reference.W_skip.mT if reference.W_skip is not None else 0
    expected = torch.zeros(len(x), D_SAE).scatter_(1, top.top_indices, top.top_acts)
    torch.testing.assert_close(dense(sae.encode(x)), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(sae.encode(x), x), recon, rtol=1e-5, atol=1e-5)


def test_parts_of_models_that_normalise_what_a_part_gives(tmp_path: Path) -> None:
    write_sparsify(tmp_path / "layers.3.mlp")
    (tmp_path / "config.json").write_text('{"model": "google/gemma-2-2b"}')
    source = wrap_sae(make_sparse_coder(), hookpoint="layers.3.mlp", model_name="google/gemma-2-2b")
    assert source.hookpoint == open_sae(str(tmp_path)).hookpoint == "layers.<layer>.mlp"


def test_where_an_object_of_sparsify_belongs() -> None:
    coder = make_sparse_coder()
    assert wrap_sae(coder, layer=0).hookpoint == "resid_post"
    assert wrap_sae(coder, layer=0).name == "sparsecoder_layer_0"
    assert wrap_sae(coder, hookpoint="layers.2.attention").layers == (2,)
    with pytest.raises(RequestError, match="`layer` is missing: SparseCoder does not name"):
        wrap_sae(coder)
    with pytest.raises(RequestError, match="`hookpoint` is missing: SparseCoder does not name the module"):
        wrap_sae(make_sparse_coder(transcode=True), layer=0)
    with pytest.raises(RequestError, match="`input_hookpoint` mlp_in: the object is an autoencoder"):
        wrap_sae(coder, layer=0, hookpoint="mlp_out", input_hookpoint="mlp_in")
    with pytest.raises(RequestError, match="`obj` SparseCoder: no tensor 'W_dec'"):
        wrap_sae(changed(make_sparse_coder(), lambda sae: setattr(sae, "W_dec", None)), layer=0)


def test_custom_sparsify_objects_use_dense_codes() -> None:
    sparsify = pytest.importorskip("sparsify")

    class Noisy(sparsify.SparseCoder):
        def encode(self, x: Tensor) -> Any:
            return super().encode(x + 1)

    with pytest.raises(
        RequestError, match="`obj` Noisy: encode returned a EncoderOutput; it must return a dense tensor"
    ):
        wrap_sae(Noisy(D_IN, sparsify.SparseCoderConfig(k=K, expansion_factor=4)), layer=0)


# --- dictionary_learning ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.7, -1.0], ids=["learnt", "never learnt"])
@pytest.mark.parametrize("dict_class", CLASSES)
def test_an_object_of_dictionary_learning(tmp_path: Path, library: Any, dict_class: str, threshold: float) -> None:
    made = make_dictionary(library, dict_class, threshold)
    save_dictionary(tmp_path / "ae", made.state_dict(), dict_class)
    source = wrap_sae(made, layer=3)
    assert (source.layers, source.hookpoint, source.d_in) == ((3,), "resid_post", D_IN)
    assert_same_as_file(source, open_sae(str(tmp_path)))
    assert_unchanged(made, layer=3)
    loaded, _ = library.load_dictionary(
        str(tmp_path / "ae"), device="cpu"
    )  # the decoder of an AutoEncoder is normalised here
    assert_agrees(wrap_sae(loaded, layer=3).load(3, "cpu"), loaded)


def test_settings_of_a_dictionary_that_are_not_in_its_file(library: Any) -> None:
    jumprelu = make_dictionary(library, "JumpReluAutoEncoder", 0.7)
    jumprelu.apply_b_dec_to_input = True
    matryoshka = make_dictionary(library, "MatryoshkaBatchTopKSAE", 0.7)
    matryoshka.active_groups = 1
    for made in (jumprelu, matryoshka):
        assert_agrees(wrap_sae(made, layer=3).load(3, "cpu"), made)


def test_a_dictionary_that_transcodes(library: Any) -> None:
    made = make_dictionary(library, "AutoEncoderNew", 0)
    source = wrap_sae(made, layer=1, hookpoint="mlp_out", input_hookpoint="mlp_in")
    assert (source.hookpoint, source.input_hookpoint) == ("mlp_out", "mlp_in")
    assert source.load(1, "cpu").architecture == "standard transcoder"


def test_the_identity_of_dictionary_learning_has_no_weights(library: Any) -> None:
    from dictionary_learning.dictionary import IdentityDict

    with pytest.raises(RequestError, match="`version` is missing: IdentityDict has no state_dict of tensors"):
        wrap_sae(IdentityDict(D_IN), layer=0)
    x = activations()
    sae = wrap_sae(IdentityDict(D_IN), layer=0, version="1").load(0, "cpu")
    assert torch.equal(sae.decode(sae.encode(x)), x)


# --- our own ---------------------------------------------------------------------------------------------------------


def test_our_own_saes_are_returned_unchanged() -> None:
    W_enc, W_dec = torch.randn(2, D_SAE, D_IN)
    sae = linear_sae(W_enc, W_dec, TopK(K), k=K)
    source = wrap_sae(sae, model_name="gpt2", prepend_bos=True, trained_on_bos=True)
    assert (source.layers, source.hookpoint, source.d_in, source.name) == ((0,), "resid_post", D_IN, "made here")
    assert (source.model_name, source.prepend_bos, source.counts_bos) == ("gpt2", True, True)
    loaded, x = source.load(0, "cpu"), activations()
    assert torch.equal(dense(loaded.encode(x)), dense(sae.encode(x)))
    before = source.fingerprint()
    assert wrap_sae(linear_sae(W_enc.clone(), W_dec, TopK(K), k=K), prepend_bos=True, trained_on_bos=True
                    ).fingerprint() == before  # fmt: skip
    for other in (linear_sae(W_enc, W_dec, TopK(K + 1)), linear_sae(W_enc + 1, W_dec, TopK(K))):
        assert wrap_sae(other, prepend_bos=True, trained_on_bos=True).fingerprint() != before
    W_dec[0, 0] += 1
    assert source.fingerprint() != before
    never = linear_sae(W_enc, W_dec, Threshold(torch.full((D_SAE,), torch.inf)))
    assert wrap_sae(never).load(0, "cpu").encode(x).value.numel() == 0
    with pytest.raises(RequestError, match="`layer` is 3, but the object says 0"):
        wrap_sae(sae, layer=3)
    with pytest.raises(RequestError, match=r"`obj` Sae: .*W_enc has NaN"):
        wrap_sae(linear_sae(W_enc * torch.nan, W_dec, TopK(K))).prepare()


def test_loaded_saes_can_be_wrapped(tmp_path: Path) -> None:
    write_sparsify(tmp_path / "layers.3.mlp", transcode=True, activation="groupmax")
    sae, x = load_sae(str(tmp_path), 3), activations()
    source = wrap_sae(sae)
    assert (source.hookpoint, source.input_hookpoint, source.name) == ("layers.<layer>.mlp", "mlp_in", sae.name)
    again = source.load(3, "cpu")
    assert torch.equal(again.decode(again.encode(x)), sae.decode(sae.encode(x)))
    assert (again.k, again.architecture, again.promised_l0) == (sae.k, sae.architecture, sae.promised_l0)
    skip = SkipCoder(sae.coder, torch.eye(D_IN))
    assert wrap_sae(type(sae)(**{**vars(sae), "coder": skip})).fingerprint() != source.fingerprint()
    measured = wrap_sae(wrap_sae(Own(D_IN), layer=3).load(3, "cpu"))
    assert measured.fingerprint() != wrap_sae(wrap_sae(Own(D_IN, seed=1), layer=3).load(3, "cpu")).fingerprint()
    bare = wrap_sae(Bare(Own(D_IN)), layer=3, d_in=D_IN, version="1").load(3, "cpu")
    with pytest.raises(RequestError, match="`version` is missing"):
        wrap_sae(bare)


# --- custom objects --------------------------------------------------------------------------------------------------


class Own(nn.Module):
    """A ReLU SAE as users write them; noisy in training, as some are."""

    def __init__(self, d_in: int, d_sae: int = D_SAE, seed: int = 0) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.W_enc = nn.Parameter(torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=rng), dim=1))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("best_loss", torch.tensor(torch.inf))
        self.bias = 0.5

    def encode(self, x: Tensor) -> Tensor:
        self.calls += 1
        noise = torch.rand_like(x) if self.training else 0
        self.last = (x + noise) @ self.W_enc.T
        return (self.last - self.bias).relu()

    def decode(self, codes: Tensor) -> Tensor:
        return codes @ self.W_enc


class Bare:
    """An object that is not a module and has no state."""

    def __init__(self, module: Own) -> None:
        self.module = module.eval()

    def encode(self, x: Tensor) -> Tensor:
        return self.module.encode(x)

    def decode(self, codes: Tensor) -> Tensor:
        return self.module.decode(codes)


class WithState(Bare):
    """An object that has state."""

    def state_dict(self) -> dict[str, Any]:
        return {"W": self.module.W_enc, "step": 3}


@pytest.mark.parametrize("make", [
    lambda: Own(D_IN), lambda: Own(D_IN).eval(), lambda: Own(D_IN).double(), lambda: WithState(Own(D_IN)),
    lambda: Bare(Own(D_IN)),
], ids=["in training", "in evaluation", "float64", "with state", "bare"])  # fmt: skip
def test_sparse_codes_equal_those_of_the_object(make: Callable[[], Any]) -> None:
    given = {"version": "1", "d_in": D_IN} if not isinstance(make(), nn.Module) else {}
    source = wrap_sae(make(), layer=5, hookpoint="mlp_out", **given)
    assert (source.layers, source.hookpoint, source.d_in) == ((5,), "mlp_out", D_IN)
    loaded, x = source.load(5, "cpu"), activations(rows=600)
    reference = Own(D_IN).eval()
    with torch.no_grad():
        codes = reference.encode(x)
        recon = reference.decode(codes)
    found = loaded.encode(x)
    assert found.value.numel() == int((codes != 0).sum()) < codes.numel()
    torch.testing.assert_close(dense(found), codes, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded.decode(found), recon, rtol=1e-5, atol=1e-5)


def frozen(module: Own) -> Own:
    return module.requires_grad_(False).eval()


def trained(module: Own) -> Own:
    """Return a module with gradients, and with an attribute from the last step that cannot be deep-copied."""
    module.decode(module.encode(activations())).sum().backward()
    assert not module.last.is_leaf
    return module


@pytest.mark.parametrize("change", [trained, frozen, nn.Module.eval, nn.Module.half, nn.Module.double])
def test_a_module_is_not_changed(change: Callable[[Any], Any]) -> None:
    assert_unchanged(change(Own(D_IN)), layer=5)


def test_a_random_module_gives_the_same_codes_at_every_call() -> None:
    class Random(Own):
        def encode(self, x: Tensor) -> Tensor:
            return super().encode(x) + torch.rand(len(x), D_SAE)

    sae, x = wrap_sae(Random(D_IN), layer=0).load(0, "cpu"), activations()
    first, state = dense(sae.encode(x)), torch.get_rng_state()
    assert torch.equal(dense(sae.encode(x)), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert_unchanged(Random(D_IN), layer=0)


def test_suitable_weights_are_not_copied() -> None:
    module = Own(D_IN)
    coder = wrap_sae(module, layer=5).load(5, "cpu").coder
    assert coder.sae.W_enc is module.W_enc
    assert coder.sae is not module
    sparse = make_sparse_coder()
    assert wrap_sae(sparse, layer=5).load(5, "cpu").coder.W_dec.data_ptr() == sparse.W_dec.data_ptr()


def test_wrapping_is_quick() -> None:
    class TopKSae(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(256, 1024), nn.Linear(1024, 256)

        def encode(self, x: Tensor) -> Tensor:
            values, latents = self.encoder(x).topk(32)
            return torch.zeros(len(x), 1024).scatter_(1, latents, values.relu())

        def decode(self, codes: Tensor) -> Tensor:
            return self.decoder(codes)

    sae, times = TopKSae(), []
    for _ in range(10):
        began = time.perf_counter()
        source = wrap_sae(sae, layer=3)
        times.append(time.perf_counter() - began)
    assert (source.name, source.d_in, source.members[0].header.d_sae) == ("topksae_layer_3", 256, 1024)
    assert min(times) < 0.02


# --- fingerprints ----------------------------------------------------------------------------------------------------


def nudge(sae: Any) -> None:
    """Change one weight, as a training step would."""
    parameter = next(iter(sae.module.parameters() if isinstance(sae, Bare) else sae.parameters()))
    with torch.no_grad():
        parameter.view(-1)[-1] += 0.5


@pytest.mark.parametrize("make", [
    lambda: Own(D_IN), lambda: WithState(Own(D_IN)), lambda: make_lens("topk"), lambda: make_lens("batchtopk"),
    make_sparse_coder,
], ids=["module", "with state", "sae_lens", "sae_lens batchtopk", "sparsify"])  # fmt: skip
@pytest.mark.parametrize("version", [None, "1"])
def test_changed_weights_change_the_fingerprint(make: Callable[[], Any], version: str | None) -> None:
    sae = make()
    given = {"layer": 5, "d_in": D_IN, "version": version}
    source = wrap_sae(sae, **given)
    before = source.fingerprint()
    measure(source)
    assert source.fingerprint() == wrap_sae(sae, **given, name="other").fingerprint() == before
    assert wrap_sae(make(), **given).fingerprint() == before, "of another object with the same weights"
    nudge(sae)
    assert source.fingerprint() == wrap_sae(sae, **given).fingerprint() != before


def test_settings_that_change_the_fingerprint() -> None:
    made = {"layer": 5, "d_in": D_IN}
    before = wrap_sae(Own(D_IN), **made).fingerprint()
    assert wrap_sae(Own(D_IN).eval(), **made).fingerprint() == before
    assert wrap_sae(Own(D_IN), **made, model_name="gpt2", k=3).fingerprint() == before
    for changes in ({"version": "2"}, {"hookpoint": "mlp_out"}, {"prepend_bos": True}, {"trained_on_bos": True}):
        assert wrap_sae(Own(D_IN), **made, **changes).fingerprint() != before
    for change in ({"bias": 0.25}, {"calls": torch.ones(())}):
        other = Own(D_IN)
        other.__dict__.update({key: value for key, value in change.items() if not isinstance(value, Tensor)})
        other.calls = change.get("calls", other.calls)
        assert wrap_sae(other, **made).fingerprint() != before
    versions = {wrap_sae(Bare(Own(D_IN)), **made, version=said).fingerprint() for said in ("a", "b", "b")}
    assert len(versions) == 2
    coder = make_sparse_coder()
    widened = wrap_sae(coder, layer=1).fingerprint()
    coder.cfg.k += 1
    assert wrap_sae(coder, layer=1).fingerprint() != widened


# --- detection, and errors -------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """An object whose encoder has a name of the caller's choice."""

    def __init__(self, d_in: int = D_IN, d_sae: int = D_SAE, **attributes: Any) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(d_in, d_sae), nn.Linear(d_sae, d_in)
        vars(self).update(attributes)

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x).relu()

    def decode(self, codes: Tensor) -> Tensor:
        return self.decoder(codes)


class Anything(Linear):
    """An object that takes inputs of any width."""

    def encode(self, x: Tensor) -> Tensor:
        return x.sum(1, keepdim=True).expand(-1, D_SAE)


@dataclass
class Config:
    d_in: int = D_IN


@pytest.mark.parametrize("wrapper", [nn.DataParallel, torch.compile])
def test_a_module_that_is_compiled_or_trained_in_parallel(wrapper: Callable[[nn.Module], Any]) -> None:
    coder = make_sparse_coder()
    source = wrap_sae(wrapper(coder), layer=1)
    assert (source.name, source.fingerprint()) == ("sparsecoder_layer_1", wrap_sae(coder, layer=1).fingerprint())


def test_libraries_are_not_imported_for_custom_objects() -> None:
    program = (
        "import sys, torch; from delta_selectivity.saes import wrap_sae; sae = torch.nn.Linear(4, 8)\n"
        "sae.encode, sae.decode = sae.forward, lambda codes: codes[:, :4]\n"
        "wrap_sae(sae, layer=0, d_in=4).load(0, 'cpu').encode(torch.ones(3, 4))\n"
        "assert not {'sae_lens', 'sparsify', 'dictionary_learning'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.parametrize("sae", [
    Own(D_IN), Linear(), Linear(d_sae=D_IN), Linear(d_in=D_IN), Anything(activation_dim=D_IN), Anything(cfg=Config()),
])  # fmt: skip
def test_widths_that_can_be_inferred(sae: nn.Module) -> None:
    source = wrap_sae(sae, layer=1)
    assert (source.d_in, source.d_out) == (D_IN, D_IN)
    assert wrap_sae(sae, layer=1, input_hookpoint="resid_post").input_hookpoint is None


def test_a_custom_transcoder() -> None:
    sae = Linear()
    sae.decoder = nn.Linear(D_SAE, 7)
    with pytest.raises(RequestError, match="`input_hookpoint` is missing: Linear has input width 16 and output"):
        wrap_sae(sae, layer=1)
    source = wrap_sae(sae, layer=1, hookpoint="mlp_out", input_hookpoint="layers.<layer>.mlp:in")
    assert (source.hookpoint, source.input_hookpoint, source.d_in, source.d_out) == ("mlp_out", "mlp_in", D_IN, 7)
    assert_unchanged(sae, layer=1, hookpoint="mlp_out", input_hookpoint="mlp_in")


class Exits(Linear):
    """An object that ends the process at a given place."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def encode(self, x: Tensor) -> Tensor:
        return sys.exit(0) if self.where == "encode" or (self.where == "later" and len(x) > 2) else super().encode(x)

    def decode(self, codes: Tensor) -> Tensor:
        return sys.exit(0) if self.where == "decode" else super().decode(codes)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return sys.exit(0) if self.where == "state_dict" else super().state_dict(*args, **kwargs)

    def train(self, mode: bool = True) -> Any:
        return sys.exit(0) if self.where == "train" else super().train(mode)


@pytest.mark.parametrize("where", ["encode", "decode", "state_dict", "train"])
def test_an_object_that_exits_is_an_error(where: str) -> None:
    with pytest.raises(RequestError, match=r"`obj` Exits: .* called exit \(SystemExit 0\)"):
        wrap_sae(Exits(where), layer=1, d_in=None)


def test_an_object_that_exits_while_measured_is_an_error() -> None:
    sae = wrap_sae(Exits("later"), layer=1).load(1, "cpu")
    with pytest.raises(RequestError, match="Exits called exit"):
        sae.encode(activations())


class OnlyForward(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Gives(Linear):
    """An object that returns something else."""

    def __init__(self, codes: Callable[[Tensor], Any], recon: Callable[[Tensor], Any] = lambda recon: recon) -> None:
        super().__init__()
        self.codes, self.recon = codes, recon

    def encode(self, x: Tensor) -> Any:
        return self.codes(super().encode(x))

    def decode(self, codes: Tensor) -> Any:
        return self.recon(super().decode(codes))


class Locked(Linear):
    """An object that holds something that cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def raises(_: Tensor) -> Tensor:
    raise ValueError("one line\nand another")


MADE = {"layer": 1, "d_in": D_IN}


@pytest.mark.parametrize(("sae", "given", "message"), [
    (object(), MADE, "`obj` object has no encode and no decode: an SAE has encode"),
    (OnlyForward(), MADE, "`obj` OnlyForward has no encode and no decode"),
    ("EleutherAI/sae", MADE, "`obj` str has no decode.*load_sae opens an SAE by its name"),
    (Own, MADE, "`obj` Own is a class: give an instance"),
    (Gives(lambda codes: (codes, codes)), MADE, "`d_in` 16: Gives: encode returned a tuple; it must return"),
    (Gives(lambda codes: (codes, codes)), {"layer": 1}, "`obj` Gives: encode returned a tuple"),
    (Gives(lambda codes: codes[0]), MADE, r"encode returned a tensor of shape \[64\]; it must .*\[2, width\]"),
    (Gives(lambda codes: codes.to_sparse()), MADE, "returned a sparse tensor"),
    (Gives(raises), MADE, "encode of .* failed: ValueError: one line and another"),
    (Gives(lambda codes: codes, lambda recon: (recon,)), MADE, "`obj` Gives: decode returned a tuple"),
    (Gives(lambda codes: codes, raises), MADE, "`obj` Gives: decode of .* failed: ValueError"),
    (Bare(Own(D_IN)), MADE, "`version` is missing: Bare has no state_dict of tensors"),
    (Bare(Own(D_IN)), {"layer": 1, "version": "1"}, "`d_in` is missing: it cannot be found"),
    (Anything(), {"layer": 1}, "`d_in` is missing"),
    (Own(D_IN), {}, "`layer` is missing: Own does not name"),
    (Own(D_IN), {"layer": -1}, "`layer` is -1, but must be a whole number, at least 0"),
    (Own(D_IN), {"layer": True}, "`layer` is True, but must be a whole number"),
    (Own(D_IN), {"layer": 1.5}, "`layer` is 1.5, but must be a whole number"),
    (Own(D_IN), {"layer": 1, "d_in": 7}, r"`d_in` 7: Own: encode of \[2, 7\] failed: RuntimeError"),
    (Own(D_IN), {"layer": 1, "d_in": 0}, "`d_in` is 0, but must be a whole number, at least 1"),
    (Own(D_IN), {"layer": 1, "d_out": 7}, "`d_out` is 7, but decode of Own returned 16 columns"),
    (Own(D_IN), {"layer": 1, "k": "many"}, "`k` is 'many'"),
    (Own(D_IN), {"layer": 1, "hookpoint": ""}, "`hookpoint` is '', but must be the name"),
    (Own(D_IN), {"layer": 1, "hookpoint": "blocks.2.hook_mlp_out"}, "`layer` 1: `hookpoint` blocks.2.* names layer 2"),
    (Own(D_IN), {"layer": 1, "scaling_factor": 2.0}, "`scaling_factor` 2.0: this object does not use one"),
    (Own(D_IN), {"layer": 1, "scaling_factor": 0}, "`scaling_factor` is 0, but must be a number above 0"),
    (Own(D_IN), {"layer": 1, "prepend_bos": "yes"}, "`prepend_bos` is 'yes', but must be of type bool"),
    (Own(D_IN), {"layer": 1, "model_name": 3}, "`model_name` is 3, but must be of type str"),
    (Own(D_IN), {"layer": 1, "version": 2}, "`version` is 2, but must be a string"),
    (Own(D_IN), {"layer": 1, "name": "a,b"}, "`name` is 'a,b', but must have a letter"),
    (Own(D_IN), {"layer": 1, "name": ""}, "`name` is ''"),
    (Own(D_IN), {"layer": 1, "name": " a"}, "`name` is ' a'"),
    (Own(D_IN), {"layer": 1, "name": "..."}, "`name` is '...'"),
    (Own(D_IN), {"layer": 1, "name": 3}, "`name` is 3"),
    (Linear(activation_dim=D_IN), {"layer": 1, "d_in": 7}, "`d_in` is 7, but the object says 16"),
    (Own(D_IN).to("meta"), {"layer": 1}, "`obj` Own: W_enc is a meta tensor"),
    (Locked(), {"layer": 1}, "`obj` Locked: copying it in evaluation mode failed: TypeError"),
])  # fmt: skip
def test_unsupported_objects_are_rejected(sae: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        wrap_sae(sae, **given)
    assert "\n" not in str(caught.value)
    assert caught.value.field


@pytest.mark.parametrize(("given", "message"), [
    ({"layer": 4}, "`layer` is 4, but the object says 5"),
    ({"hookpoint": "mlp_out"}, "`hookpoint` is mlp_out, but the object says resid_post"),
    ({"hookpoint": "blocks.6.hook_resid_post"}, "`layer` is 6, but the object says 5"),
    ({"d_in": 7}, "`d_in` is 7, but the object says 16"),
    ({"d_out": 7}, "`d_out` is 7, but the object says 16"),
    ({"k": 5}, "`k` is 5, but the object says 4"),
    ({"architecture": "mine"}, "`architecture` is mine, but the object says topk"),
    ({"prepend_bos": False}, "`prepend_bos` is False, but the object says True"),
    ({"trained_on_bos": False}, "`trained_on_bos` is False, but the object says True"),
    ({"model_name": "gpt2"}, "`model_name` is gpt2, but the object says pythia-70m-deduped"),
    ({"context_size": 64}, "`context_size` is 64, but the object says 128"),
    ({"input_hookpoint": "mlp_in"}, "`input_hookpoint` mlp_in: the object is an autoencoder"),
])  # fmt: skip
def test_arguments_that_contradict_the_object_are_rejected(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        wrap_sae(make_lens("topk"), **given)


def test_latents_of_an_object_without_a_fixed_width() -> None:
    with pytest.raises(RequestError, match="`k` 5: the object does not have a fixed"):
        wrap_sae(make_lens("standard"), k=5)


@pytest.mark.parametrize("make", [lambda: Own(D_IN), lambda: make_lens("standard"), make_sparse_coder])
def test_broken_weights_are_found_before_a_model_is_loaded(make: Callable[[], Any]) -> None:
    sae = make()
    source = wrap_sae(sae, layer=5)
    nudge(sae)
    next(sae.parameters()).data.view(-1)[0] = torch.nan
    with pytest.raises(RequestError, match="has NaN or infinity"):
        source.prepare()
    with pytest.raises(RequestError, match="has NaN or infinity"):
        source.load(5, "cpu")


# --- by name, and in the program -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Create ``one`` with layers 1 and 2, and ``two`` with layer 1."""
    for name in ("one/layers.1", "one/layers.2", "two/layers.1"):
        write_sparsify(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def test_an_sae_by_its_name(folder: Path) -> None:
    x = activations()
    for name in ("one", "on*"):
        sae = load_sae(name, 2)
        assert (sae.layer, sae.hookpoint, sae.dtype) == (2, "resid_post", torch.float32)
        assert torch.equal(sae.decode(sae.encode(x)), recon_of_file("one", x))
    assert load_sae("one", 1, hookpoint="layers.<layer>", dtype=torch.bfloat16).dtype == torch.bfloat16


def recon_of_file(name: str, x: Tensor) -> Tensor:
    sae = open_sae(name).load(2, "cpu")
    return sae.decode(sae.encode(x))


@pytest.mark.parametrize(("name", "layer", "given", "message"), [
    ("*", 1, {}, r"`name` \* matches 2 SAEs: one, two"),
    ("one", 3, {}, "`layer` 3: one has SAEs for layers 1, 2 only"),
    ("one", 1, {"device": "nowhere"}, "`device` nowhere: "),
    ("one", 1, {"dtype": torch.int8}, "`dtype` is torch.int8"),
    ("one", 1, {"dtype": "float32"}, "`dtype` is 'float32'"),
    (Own(D_IN), 1, {}, "`name` is a Own: load_sae needs a name, wrap_sae an object"),
    ("./nothing", 1, {}, "no such folder"),
])  # fmt: skip
def test_unloadable_names_are_rejected(
    folder: Path, name: Any, layer: int, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        load_sae(name, layer, **given)
    assert "\n" not in str(caught.value)


def test_the_program_measures_an_object(
    tiny_model: Path, people_csv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Own(D_MODEL)
    monkeypatch.setattr(planning, "open_sae", lambda name, _: wrap_sae(module, layer=2, name=name))
    asked = Request(tiny_model, (Path("mine"),), people_csv, tmp_path / "results").plus("--views", "latents")
    facts = Facts.of(module)
    assert asked.run() == 0
    facts.assert_kept_by(module)
    found = json.loads((tmp_path / "results" / "pythia-tiny_women.json").read_text())
    assert [key for key in found if key.startswith("layer_")] == ["layer_2"]
    assert found["layer_2"]["l0"] > 0
    assert found["_run"]["config"]["sae"] == "mine"
    nudge(module)
    assert asked.run() == 2, "weights that were trained on since are another SAE"
