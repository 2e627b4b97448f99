"""Several SAEs in one name: globs over folders, whole releases of SAE Lens's list, and the opened sources.

The list is the library's own; only its download function is replaced.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from delta_selectivity.errors import RequestError
from delta_selectivity.saes import expand_names, open_sae
from delta_selectivity.saes.names import template

D_IN, D_SAE = 16, 64
CANONICAL = "gemma-scope-2b-pt-res-canonical"


def write_lens(folder: Path, hook_name: str = "blocks.0.hook_resid_post", **changes: Any) -> Path:
    """Write a random SAE in the format of SAE Lens before version 6."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "hook_name": hook_name,
              "model_name": "pythia-70m-deduped", "activation_fn_str": "relu"}  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config | changes))
    rng = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_enc": (D_SAE,), "b_dec": (D_IN,)}
    save_file({name: torch.randn(shape, generator=rng) for name, shape in shapes.items()},
              folder / "sae_weights.safetensors")  # fmt: skip
    return folder


# --- folders -----------------------------------------------------------------------------------------------------


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create three folders of SAEs, a folder of something else and a file, and change to their parent."""
    for name in ("run_b/layers.0", "run_a/layers.1", "run_a/layers.0", "other"):
        write_lens(tmp_path / "shelf" / name)
    (tmp_path / "shelf" / "logs").mkdir()
    (tmp_path / "shelf" / "run_notes.txt").write_text("nothing")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "shelf"


@pytest.mark.parametrize(("typed", "found"), [
    (["shelf/*"], ["shelf/other", "shelf/run_a", "shelf/run_b"]),
    (["shelf/run_*"], ["shelf/run_a", "shelf/run_b"]),
    (["shelf/run_[!a]"], ["shelf/run_b"]),
    (["shelf/run_?/layers.0"], ["shelf/run_a/layers.0", "shelf/run_b/layers.0"]),
    (["shelf/run_b", "shelf/*"], ["shelf/run_b", "shelf/other", "shelf/run_a"]),
    (["./shelf/run_a/", "owner/repo", "no/such/folder"], ["./shelf/run_a/", "owner/repo", "no/such/folder"]),
    ([], []),
])  # fmt: skip
def test_a_glob_over_folders(shelf: Path, typed: list[str], found: list[str]) -> None:
    assert expand_names(typed) == found


def test_home_folders_and_names_that_look_like_globs(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(shelf.parent))
    assert expand_names(["~/shelf/run_*"]) == [str(shelf / "run_a"), str(shelf / "run_b")]
    write_lens(shelf / "run_[a]")
    assert expand_names(["shelf/run_[a]"]) == ["shelf/run_[a]"]


@pytest.mark.parametrize(
    "name", ["shelf/nothing*", "shelf/logs*", "*/*/*/*/*", "owner/re*", "gemma-scope-*/layer_99/*"]
)
def test_a_glob_that_matches_nothing(shelf: Path, name: str) -> None:
    with pytest.raises(RequestError, match="it matches no folder of SAEs and no SAE of SAE Lens's list") as caught:
        expand_names([name])
    assert "\n" not in str(caught.value)


# --- releases ----------------------------------------------------------------------------------------------------


pytestmark = pytest.mark.filterwarnings("ignore:(?s).*non-empty model_from_pretrained_kwargs")


@pytest.fixture
def lens() -> Any:
    return pytest.importorskip("sae_lens")


@pytest.mark.parametrize(("sae_id", "expected"), [
    ("blocks.5.hook_resid_post", "blocks.<layer>.hook_resid_post"),
    ("blocks.8.hook_resid_pre_768", "blocks.<layer>.hook_resid_pre_768"),
    ("layer_12/width_16k/average_l0_82", "layer_<layer>/width_16k/average_l0_82"),
    ("transcoder/layer_17_width_16k_l0_big", "transcoder/layer_<layer>_width_16k_l0_big"),
    ("resid_post_layer_3_trainer_1", "resid_post_layer_<layer>_trainer_1"),
    ("layer0", "layer<layer>"),
    ("l15r_8x", "l<layer>r_8x"),
    ("embedding/width_4k/average_l0_6", "embedding/width_4k/average_l0_6"),
])  # fmt: skip
def test_the_layer_in_an_id(sae_id: str, expected: str) -> None:
    assert template(sae_id) == expected


@pytest.mark.parametrize(("typed", "found"), [
    ("pythia-70m-deduped-mlp-sm", ["pythia-70m-deduped-mlp-sm/blocks.<layer>.hook_mlp_out"]),
    ("gpt2-small-res-jb", ["gpt2-small-res-jb/blocks.<layer>.hook_resid_pre",
                           "gpt2-small-res-jb/blocks.11.hook_resid_post"]),
    (f"{CANONICAL}/layer_*/width_16k/*", [f"{CANONICAL}/layer_<layer>/width_16k/canonical"]),
    (f"{CANONICAL}/layer_[01]/width_16k/*", [f"{CANONICAL}/layer_{layer}/width_16k/canonical" for layer in (0, 1)]),
    (f"{CANONICAL}/layer_3/width_16k/canonical", [f"{CANONICAL}/layer_3/width_16k/canonical"]),
    ("pythia-70m-deduped-???-sm", ["pythia-70m-deduped-att-sm/blocks.<layer>.hook_attn_out",
                                   "pythia-70m-deduped-mlp-sm/blocks.<layer>.hook_mlp_out",
                                   "pythia-70m-deduped-res-sm/blocks.0.hook_resid_pre",
                                   "pythia-70m-deduped-res-sm/blocks.<layer>.hook_resid_post"]),
])  # fmt: skip
def test_a_glob_over_releases(lens: Any, typed: str, found: list[str]) -> None:
    assert expand_names([typed]) == found


def test_every_release_of_the_list_can_be_named_whole(lens: Any) -> None:
    """A template stands for nothing but the layer, so opening it never finds two SAEs of one layer."""
    from delta_selectivity.saes.names import ids_of, split_release
    from delta_selectivity.saes.sae_lens.registry import release_names, sae_ids

    for release in release_names():
        ids = []
        for name in expand_names([release]):
            split = split_release(name)
            assert split is not None and split[0] == release
            ids += ids_of(*split)
        assert sorted(ids) == sorted(sae_ids(release))


@pytest.fixture
def downloads(lens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a folder of repositories for the library's download function, without network access."""
    import sae_lens.loading.pretrained_sae_loaders as loaders
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(repo_id: str, filename: str, **_: Any) -> str:
        path = tmp_path / repo_id / filename
        if not path.exists():
            raise LocalEntryNotFoundError(filename)
        return str(path)

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    return tmp_path


def test_a_template_is_one_source_of_many_layers(downloads: Path) -> None:
    from sae_lens import SAE

    repository = downloads / "ctigges/pythia-70m-deduped__mlp-sm_processed"
    folders = [write_lens(repository / f"{layer}-mlp-sm", f"blocks.{layer}.hook_mlp_out") for layer in range(6)]
    (name,) = expand_names(["pythia-70m-deduped-mlp-sm"])
    source = open_sae(name)
    assert (source.name, source.layers, source.hookpoint) == (name, tuple(range(6)), "mlp_out")
    bare = open_sae("pythia-70m-deduped-mlp-sm")
    assert (bare.name, bare.layers) == ("pythia-70m-deduped-mlp-sm", source.layers)
    assert bare.fingerprint() == source.fingerprint() != source.fingerprint([2])
    source.prepare([2])
    reference, x = SAE.load_from_disk(folders[2]), torch.randn(20, D_IN)
    sae = source.load(2, "cpu")
    assert sae.name == "pythia-70m-deduped-mlp-sm/blocks.2.hook_mlp_out"
    with torch.no_grad():
        torch.testing.assert_close(sae.decode(sae.encode(x)), reference(x), rtol=1e-5, atol=1e-5)


def test_rewritten_weights_are_known_from_the_list(downloads: Path) -> None:
    """Only the list has ``config_overrides``; the files do not mention it."""
    repository = downloads / "jbloom/GPT2-Small-SAEs-Reformatted"
    write_lens(repository / "blocks.3.hook_resid_pre", "blocks.3.hook_resid_pre", model_name="gpt2-small")
    source = open_sae("gpt2-small-res-jb/blocks.3.hook_resid_pre")
    assert (source.layers, source.hookpoint) == ((3,), "resid_pre")
    assert source.load(3, "cpu").input_norm == "centre"


def test_input_scaling_is_known_from_the_list(downloads: Path) -> None:
    """Covers ``norm_scaling_factor`` of the list, and centring in addition."""
    from sae_lens import SAE
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    release = get_pretrained_saes_directory()["gpt2-small-mlp-tm"]
    sae_id = "blocks.3.hook_mlp_out"
    folder = write_lens(downloads / release.repo_id / release.saes_map[sae_id], sae_id, model_name="gpt2-small",
                        normalize_activations="expected_average_only_in")  # fmt: skip
    reference = SAE.load_from_disk(folder)
    reference.fold_activation_norm_scaling_factor(release.norm_scaling_factor[sae_id])
    sae, x = open_sae(f"gpt2-small-mlp-tm/{sae_id}").load(3, "cpu"), torch.randn(20, D_IN)
    mean = x.mean(1, keepdim=True)
    with torch.no_grad():
        torch.testing.assert_close(sae.decode(sae.encode(x)), reference(x - mean) + mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "place", "reads", "layers", "d_in"), [
    (f"{CANONICAL}/layer_<layer>/width_16k/canonical", "resid_post", None, 26, 2304),
    ("gemma-scope-2b-pt-att-canonical/layer_<layer>/width_16k/canonical", "z", None, 26, 2048),
    ("gemma-scope-2b-pt-mlp-canonical/layer_<layer>/width_16k/canonical", "mlp_out", None, 26, 2304),
    ("gemma-scope-2b-pt-transcoders/layer_3/width_16k/average_l0_54", "mlp_out", "mlp_normalized", 1, 2304),
])  # fmt: skip
def test_gemma_scope(downloads: Path, name: str, place: str, reads: str | None, layers: int, d_in: int) -> None:
    """The library makes its configs from the names alone."""
    source = open_sae(name)
    assert (source.hookpoint, source.input_hookpoint) == (place, reads)
    assert (len(source.layers), source.d_in, source.d_out) == (layers, d_in, 2304 if reads else d_in)
    assert (source.prepend_bos, source.context_size, source.model_name) == (True, 1024, "gemma-2-2b")


@pytest.mark.parametrize(("name", "message"), [
    ("gpt2-small-res-jb", r"2 kinds of SAEs: choose one, such as gpt2-small-res-jb/blocks\.<layer>"),
    ("gpt2-small-res-jb/blocks.99.hook_resid_pre", "no such id; it has blocks.0.hook_resid_pre"),
    (f"{CANONICAL}/layer_<layer>/width_17k/canonical", "no such id"),
    ("gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", "hook_name 'hook_embed' is not supported"),
    ("temporal-sae-gemma-2-2b/blocks.12.hook_resid_post", "could not read its config"),
])  # fmt: skip
def test_unknown_releases_are_rejected(downloads: Path, name: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        open_sae(name)
    assert "\n" not in str(caught.value)


def test_broken_weights_are_reported_before_loading_the_model(downloads: Path) -> None:
    folder = write_lens(downloads / "ctigges/pythia-70m-deduped__mlp-sm_processed/2-mlp-sm", "blocks.2.hook_mlp_out")
    from safetensors.torch import load_file

    tensors = load_file(folder / "sae_weights.safetensors")
    tensors["W_dec"][3, 3] = torch.nan
    save_file(tensors, folder / "sae_weights.safetensors")
    source = open_sae("pythia-70m-deduped-mlp-sm/blocks.2.hook_mlp_out")
    with pytest.raises(RequestError, match=r"blocks\.2\.hook_mlp_out: W_dec has NaN"):
        source.prepare()
