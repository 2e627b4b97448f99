"""dictionary_learning compared with its own library, and plain files with SAE Lens."""

from __future__ import annotations

import itertools
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_sae_loader import D_IN, D_SAE, K, activations, assert_agrees, dense, make_lens
from torch import Tensor

from delta_selectivity.errors import RequestError
from delta_selectivity.saes import Sae, folders, hub, open_sae
from delta_selectivity.saes.dictionary_learning import CLASSES

# --- dictionary_learning ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library() -> Iterator[Any]:
    """Import ``dictionary_learning.utils`` with a stand-in for nnsight, which it imports and SAEs do not need."""
    stub = types.ModuleType("nnsight")
    stub.LanguageModel = object  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "nnsight", stub)
        pytest.importorskip("dictionary_learning")
        from dictionary_learning import utils

        yield utils


def make_dictionary(library: Any, dict_class: str, threshold: float) -> Any:
    """Return one of the library's SAEs with random parameters."""
    cls = getattr(library, dict_class)
    group_sizes = {"group_sizes": [D_SAE // 4, D_SAE - D_SAE // 4]} if dict_class.startswith("Matryoshka") else {}
    torch.manual_seed(0)
    sae = cls(D_IN, D_SAE, **({"k": K} if CLASSES[dict_class].architecture.endswith("topk") else {}), **group_sizes)
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if hasattr(sae, "threshold"):
        sae.threshold.data = sae.threshold.data.abs() + threshold if sae.threshold.dim() else torch.tensor(threshold)
    return sae


def save_dictionary(folder: Path, state: dict[str, Tensor], dict_class: str, **trainer: Any) -> Path:
    """Write an SAE as the library's ``trainSAE`` does."""
    folder.mkdir(parents=True)
    said = {"dict_class": dict_class, "activation_dim": D_IN, "dict_size": D_SAE, "k": K, "layer": 3,
            "lm_name": "EleutherAI/pythia-160m-deduped", "submodule_name": "resid_post_layer_3"}  # fmt: skip
    buffer = {"d_submodule": D_IN, "io": "out", "ctx_len": 128} | trainer.pop("buffer", {})
    (folder / "config.json").write_text(json.dumps({"trainer": said | trainer, "buffer": buffer}))
    torch.save({name: tensor.detach().cpu() for name, tensor in state.items()}, folder / "ae.pt")
    return folder


@pytest.mark.parametrize("threshold", [0.7, -1.0], ids=["learnt", "never learnt"])
@pytest.mark.parametrize("dict_class", CLASSES)
def test_agrees_with_dictionary_learning(tmp_path: Path, library: Any, dict_class: str, threshold: float) -> None:
    made = make_dictionary(library, dict_class, threshold)
    folder = save_dictionary(tmp_path / "run" / "trainer_0", made.state_dict(), dict_class)
    source = open_sae(str(tmp_path))
    assert (source.layers, source.hookpoint, source.d_in) == ((3,), "resid_post", D_IN)
    assert (source.model_name, source.context_size) == ("EleutherAI/pythia-160m-deduped", 128)
    assert_agrees_with_library(library, folder)


def assert_agrees_with_library(library: Any, folder: Path) -> None:
    reference, _ = library.load_dictionary(str(folder), device="cpu")
    sae, x = open_sae(str(folder)).load(3, "cpu"), activations()
    with torch.no_grad():
        codes = reference.encode(x)
        recon = reference.decode(codes)
    assert 0 < int((codes != 0).sum()) < codes.numel()
    torch.testing.assert_close(dense(sae.encode(x)), codes, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(sae.encode(x)), recon, rtol=1e-5, atol=1e-5)


TRAINERS: dict[str, dict[str, Any]] = {
    "StandardTrainer": {"sparsity_warmup_steps": 2},
    "StandardTrainerAprilUpdate": {"sparsity_warmup_steps": 2},
    "GatedSAETrainer": {"sparsity_warmup_steps": 2},
    "TopKTrainer": {"k": K},
    "JumpReluTrainer": {"sparsity_warmup_steps": 2},
    "BatchTopKTrainer": {"k": K, "threshold_start_step": 2},
    "MatryoshkaBatchTopKTrainer": {"k": K, "threshold_start_step": 2, "group_fractions": [0.25, 0.75]},
}


class Activations:
    """A replacement of the buffer that ``trainSAE`` takes."""

    config = {"io": "out", "ctx_len": 128}  # noqa: RUF012

    def __iter__(self) -> Iterator[Tensor]:
        return (activations(rows=32, seed=step) for step in itertools.count())


@pytest.fixture(scope="module")
def trained(library: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return folders ``trainer_0``, ``trainer_1``, ..., written by the library's own training loop."""
    from dictionary_learning import trainers, training
    from dictionary_learning.trainers import matryoshka_batch_top_k, standard

    rooms = (trainers, standard, matryoshka_batch_top_k)
    common = {"activation_dim": D_IN, "dict_size": D_SAE, "layer": 3, "lm_name": "gpt2", "device": "cpu", "steps": 10,
              "warmup_steps": 2, "submodule_name": "mlp_out_layer_3"}  # fmt: skip
    configs = [
        common | more | {"trainer": next(getattr(room, name) for room in rooms if hasattr(room, name))}
        for name, more in TRAINERS.items()
    ]
    folder = tmp_path_factory.mktemp("trained")
    training.trainSAE(Activations(), configs, 10, save_dir=str(folder), device="cpu", normalize_activations=True)
    return folder


@pytest.mark.parametrize("number", range(len(TRAINERS)), ids=list(TRAINERS))
def test_agrees_with_what_dictionary_learning_trained(library: Any, trained: Path, number: int) -> None:
    folder = trained / f"trainer_{number}"
    source = open_sae(str(folder))
    assert (source.layers, source.hookpoint, source.model_name) == ((3,), "layers.<layer>.mlp", "gpt2")
    assert_agrees_with_library(library, folder)


def linear_state(seed: int = 0) -> dict[str, Tensor]:
    """Return the state of an ``AutoEncoder``."""
    rng = torch.Generator().manual_seed(seed)
    shapes = {
        "bias": (D_IN,),
        "encoder.weight": (D_SAE, D_IN),
        "encoder.bias": (D_SAE,),
        "decoder.weight": (D_IN, D_SAE),
    }
    return {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("folder", "said", "hookpoint", "reads"),
    [
        ("any", {"submodule_name": "resid_post_layer_3"}, "resid_post", None),
        ("any", {"submodule_name": "mlp_out_layer3", "layer": None}, "layers.<layer>.mlp", None),
        ("any", {"submodule_name": "attn_out"}, "layers.<layer>.attention", None),
        ("any", {"submodule_name": "gpt_neox.layers.3.mlp"}, "gpt_neox.layers.<layer>.mlp", None),
        ("any", {"submodule_name": "gpt_neox.layers.3.mlp.act"}, "gpt_neox.layers.<layer>.mlp.act", None),
        ("any", {"submodule_name": "mlp_out_layer_3", "buffer": {"io": "in"}}, "mlp_in", None),
        ("any", {"submodule_name": "mlp_out_layer_3", "buffer": {"io": "in_and_out"}}, "layers.<layer>.mlp", "mlp_in"),
        ("resid_out_layer3/10_512", {"submodule_name": None}, "resid_post", None),
        ("mlp_out_layer_3/trainer_0", {"submodule_name": None}, "layers.<layer>.mlp", None),
    ],
)
def test_the_layer_and_hook_point_of_a_dictionary(
    tmp_path: Path, folder: str, said: Any, hookpoint: str, reads: str | None
) -> None:
    save_dictionary(tmp_path / folder, linear_state(), "AutoEncoder", **said)
    source = open_sae(str(tmp_path))
    assert (source.layers, source.hookpoint, source.input_hookpoint) == ((3,), hookpoint, reads)
    sae = source.load(3, "cpu")
    assert sae.architecture == ("standard" if reads is None else "standard transcoder")


def test_a_dictionary_without_a_place(tmp_path: Path) -> None:
    save_dictionary(tmp_path / "attention" / "mine", linear_state(), "AutoEncoder", submodule_name=None)
    with pytest.raises(RequestError, match="give `hookpoint`"):
        open_sae(str(tmp_path / "attention"))
    assert open_sae(str(tmp_path / "attention"), hookpoint="mlp_out").hookpoint == "mlp_out"
    for io, place, reads in [("in", "mlp_in", None), ("in_and_out", "mlp_out", "mlp_in")]:
        folder = save_dictionary(tmp_path / io, linear_state(), "AutoEncoder", submodule_name=None, buffer={"io": io})
        source = open_sae(str(folder), hookpoint=place)
        assert (source.hookpoint, source.input_hookpoint) == (place, reads)
    save_dictionary(tmp_path / "resid_post_layer_4", linear_state(), "AutoEncoder", submodule_name=None)
    with pytest.raises(RequestError, match=r"trainer\.layer is 3, but its submodule_name or folder says 4"):
        open_sae(str(tmp_path / "resid_post_layer_4"))


def test_a_tree_of_dictionaries(tmp_path: Path) -> None:
    for layer in (3, 5):
        name = f"resid_post_layer_{layer}"
        save_dictionary(tmp_path / "TopK" / name / "trainer_0", linear_state(), "AutoEncoder", layer=layer,
                        submodule_name=name)  # fmt: skip
    assert open_sae(str(tmp_path)).layers == (3, 5)
    save_dictionary(tmp_path / "TopK" / "resid_post_layer_5" / "trainer_1", linear_state(), "AutoEncoder", layer=5,
                    submodule_name=None)  # fmt: skip
    with pytest.raises(RequestError, match="two SAEs for layer 5"):
        open_sae(str(tmp_path))


def test_a_folder_of_a_repository_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    commit, repository = "0123456789abcdef0123456789abcdef01234567", tmp_path / "models--someone--dictionaries"
    for trainer in ("trainer_0", "trainer_1"):
        folder = repository / "snapshots" / commit / "TopK" / "resid_post_layer_3" / trainer
        save_dictionary(folder, linear_state(seed=int(trainer[-1])), "AutoEncoder", submodule_name=None)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    with pytest.raises(RequestError, match="layer 3, someone/dictionaries/TopK/resid_post_layer_3/trainer_0"):
        open_sae("someone/dictionaries", cache_dir=tmp_path)
    below = "someone/dictionaries/TopK/resid_post_layer_3"
    first, second = (open_sae(f"{below}/trainer_{i}", cache_dir=tmp_path) for i in range(2))
    assert first.name == f"{below}/trainer_0"
    assert second.load(3, "cpu").name == f"{below}/trainer_1"
    assert first.fingerprint() != second.fingerprint()


def test_the_k_of_a_dictionary_is_the_one_it_was_trained_with(tmp_path: Path) -> None:
    state = linear_state()
    state["b_dec"] = state.pop("bias")
    save_dictionary(tmp_path / "ae", state | {"k": torch.tensor(K + 1)}, "AutoEncoderTopK")
    with pytest.raises(RequestError, match=r"ae\.pt: k is 5, but config\.json says 4"):
        open_sae(str(tmp_path))


# --- plain -----------------------------------------------------------------------------------------------------------


def write_plain(folder: Path, tensors: dict[str, Tensor], suffix: str = ".safetensors", **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, weights)
    else:
        torch.save({"step": 7, "state_dict": {name: tensor.detach() for name, tensor in tensors.items()}}, weights)
    said = {"hook_name": "blocks.5.hook_resid_post", "architecture": "standard", "apply_b_dec_to_input": False}
    (folder / "sae.json").write_text(json.dumps(said | {"weights": weights.name} | config))
    return folder


PLAIN_CASES = [
    *[(kind, norm, True) for kind in ["standard", "topk", "jumprelu", "gated"] for norm in ["none", "layer_norm"]],
    ("standard", "constant_norm_rescale", False),
    ("topk", "none", False),
]


@pytest.mark.parametrize(("architecture", "norm", "apply_b_dec"), PLAIN_CASES)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_plain_files_agree_with_sae_lens(
    tmp_path: Path, architecture: str, norm: str, apply_b_dec: bool, suffix: str
) -> None:
    trained = make_lens(architecture, normalize_activations=norm, apply_b_dec_to_input=apply_b_dec)
    trained.save_inference_model(tmp_path / "lens")
    from sae_lens import SAE

    reference = SAE.load_from_disk(tmp_path / "lens")
    renamed = {"W_enc": "enc.weight", "W_dec": "dec.weight"}
    state = {renamed.get(name, name): tensor for name, tensor in reference.state_dict().items()}
    state["enc.weight"], state["dec.weight"] = state["enc.weight"].T, state["dec.weight"].T  # the layout of nn.Linear
    prefix = "" if suffix == ".safetensors" else "state_dict."
    folder = write_plain(
        tmp_path / "plain", state, suffix, architecture=architecture, apply_b_dec_to_input=apply_b_dec,
        normalize_activations=norm, names={ours: prefix + renamed.get(ours, ours) for ours in reference.state_dict()},
        rescale_acts_by_decoder_norm=bool(getattr(reference.cfg, "rescale_acts_by_decoder_norm", False)),
        **({"k": K} if architecture == "topk" else {}),
    )  # fmt: skip
    source = open_sae(str(folder))
    assert (source.layers, source.hookpoint, source.d_in) == ((5,), "resid_post", D_IN)
    assert_agrees(source.load(5, "cpu"), reference)


def linear_tensors(d_sae: int = D_SAE) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D_IN, d_sae), "W_dec": (d_sae, D_IN), "b_enc": (d_sae,), "b_dec": (D_IN,)}
    return {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}


def recon_of(sae: Sae, x: Tensor) -> Tensor:
    return sae.decode(sae.encode(x), x)


def test_plain_batchtopk_has_one_threshold(tmp_path: Path) -> None:
    tensors = linear_tensors() | {"cut": torch.tensor(2.0)}
    write_plain(tmp_path, tensors, architecture="batchtopk", names={"topk_threshold": "cut"})
    x = activations()
    pre_acts = x @ tensors["W_enc"] + tensors["b_enc"]
    codes = dense(open_sae(str(tmp_path)).load(5, "cpu").encode(x))
    torch.testing.assert_close(codes, pre_acts * (pre_acts > 2), rtol=1e-5, atol=1e-5)


def test_square_matrices_need_an_orientation(tmp_path: Path) -> None:
    tensors = linear_tensors(d_sae=D_IN)
    write_plain(tmp_path, tensors)
    with pytest.raises(RequestError, match=r"W_enc is square.*\"transposed\""):
        open_sae(str(tmp_path))
    write_plain(tmp_path, tensors, transposed={"W_enc": True, "W_dec": False})
    x = activations()
    expected = (x @ tensors["W_enc"].T + tensors["b_enc"]).relu() @ tensors["W_dec"] + tensors["b_dec"]
    torch.testing.assert_close(recon_of(open_sae(str(tmp_path)).load(5, "cpu"), x), expected, rtol=1e-5, atol=1e-5)


def test_a_missing_bias_must_be_declared(tmp_path: Path) -> None:
    tensors = linear_tensors()
    del tensors["b_dec"]
    write_plain(tmp_path, tensors)
    with pytest.raises(RequestError, match=r"d_in is missing, and weights\.safetensors has no b_dec"):
        open_sae(str(tmp_path))
    write_plain(tmp_path, tensors, d_in=D_IN)
    with pytest.raises(RequestError, match="no tensor 'b_dec'"):
        open_sae(str(tmp_path))
    write_plain(tmp_path, tensors, d_in=D_IN, names={"b_dec": None})
    x = activations()
    expected = (x @ tensors["W_enc"] + tensors["b_enc"]).relu() @ tensors["W_dec"]
    torch.testing.assert_close(recon_of(open_sae(str(tmp_path)).load(5, "cpu"), x), expected, rtol=1e-5, atol=1e-5)


def test_a_plain_sae_scales_its_input_and_centres_it(tmp_path: Path) -> None:
    tensors = linear_tensors()
    write_plain(tmp_path, tensors, scaling_factor=0.25, normalize_activations="centre")
    x = activations()
    mean = x.mean(dim=1, keepdim=True)
    latents = (0.25 * (x - mean) @ tensors["W_enc"] + tensors["b_enc"]).relu()
    expected = (latents @ tensors["W_dec"] + tensors["b_dec"]) / 0.25 + mean
    torch.testing.assert_close(recon_of(open_sae(str(tmp_path)).load(5, "cpu"), x), expected, rtol=1e-4, atol=1e-4)


def test_a_plain_transcoder(tmp_path: Path) -> None:
    tensors = linear_tensors() | {"W_dec": torch.randn(D_SAE, 5), "b_dec": torch.randn(5)}
    write_plain(tmp_path, tensors, hook_name="blocks.5.hook_mlp_out", input_hookpoint="mlp_in", d_in=D_IN, d_out=5)
    source = open_sae(str(tmp_path))
    assert (source.hookpoint, source.input_hookpoint, source.d_in, source.d_out) == ("mlp_out", "mlp_in", D_IN, 5)
    x = activations()
    expected = (x @ tensors["W_enc"] + tensors["b_enc"]).relu() @ tensors["W_dec"] + tensors["b_dec"]
    torch.testing.assert_close(recon_of(source.load(5, "cpu"), x), expected, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "sae.json").read_text())
    (tmp_path / "sae.json").write_text(json.dumps(config | {"names": {"b_dec": None}}))
    without = recon_of(open_sae(str(tmp_path)).load(5, "cpu"), x)
    torch.testing.assert_close(without, expected - tensors["b_dec"], rtol=1e-5, atol=1e-5)


def test_training_settings_of_a_plain_config(tmp_path: Path) -> None:
    write_plain(tmp_path, linear_tensors(), prepend_bos=True, trained_on_bos=True, model_name="gpt2", context_size=64)
    source = open_sae(str(tmp_path))
    assert (source.prepend_bos, source.counts_bos, source.model_name, source.context_size) == (True, True, "gpt2", 64)
    config = json.loads((tmp_path / "sae.json").read_text())
    del config["hook_name"]
    (tmp_path / "sae.json").write_text(json.dumps(config | {"layer": 2, "hookpoint": "model.layers.<layer>.mlp"}))
    assert (open_sae(str(tmp_path)).layers, open_sae(str(tmp_path)).hookpoint) == ((2,), "model.layers.<layer>.mlp")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectur": "topk"}, "unknown key 'architectur'; the keys are weights, hook_name"),
        ({"architecture": "relu"}, "architecture is 'relu'; supported: 'standard', 'topk'"),
        ({"architecture": "topk"}, "k is missing"),
        ({"architecture": "topk", "k": D_SAE + 1}, f"k {D_SAE + 1} is greater than d_sae {D_SAE}"),
        ({"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input is 'yes', but must be of type bool"),
        ({"k": True}, "k is True, but must be of type int"),
        ({"normalize_activations": "z-score"}, "normalize_activations is 'z-score'; supported: 'none'"),
        ({"scaling_factor": 0}, "scaling_factor is 0, but must be a number above 0"),
        ({"weights": "../weights.safetensors"}, "the name of a file in the same folder"),
        ({"weights": ""}, "weights is '', but must be the name of a file in the same folder"),
        ({"weights": "a\0"}, "the name of a file in the same folder"),
        ({"hook_name": "somewhere"}, "hook_name is 'somewhere', but must be a name such as blocks.5.hook_resid_post"),
        ({"names": {"W_encoder": "x"}}, "names has 'W_encoder': 'x'"),
        ({"names": {"W_enc": None}}, "names has 'W_enc': None"),
        ({"transposed": {"b_enc": True}}, "transposed has 'b_enc': True"),
        ({"d_sae": D_SAE + 1, "d_in": D_IN}, r"W_enc has shape \[16, 64\], but its config says \[16, 65\]"),
        ({"d_out": 3}, "d_out is for transcoders"),
        ({"input_hookpoint": "mlp_in", "apply_b_dec_to_input": True}, "apply_b_dec_to_input must be false"),
    ],
)
def test_an_invalid_plain_config_is_rejected(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_plain(tmp_path, linear_tensors(), **changes)
    with pytest.raises(RequestError, match=message):
        open_sae(str(tmp_path))


# --- all formats -----------------------------------------------------------------------------------------------------


def test_the_configs_of_all_formats_are_fetched_from_the_hub():
    assert set(hub.CONFIGS) == set(folders._formats(None))
