"""Broken SAEs of every format: one line that names the file, exit code 2, no model loaded, no files left on disk."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from conftest import D_MODEL, D_SAE, write_sparsify
from runs import Request
from safetensors.torch import load_file, save_file
from torch import Tensor

# --- four valid SAEs of layer 1, one of each format ----------------------------------------------------------------


def linear(names: tuple[str, str, str, str], *, turned: bool) -> dict[str, Tensor]:
    """Return encoder, its bias, decoder, its bias; ``turned``: transposed, as in ``nn.Linear``."""
    rng = torch.Generator().manual_seed(0)
    shapes = [(D_MODEL, D_SAE), (D_SAE,), (D_SAE, D_MODEL), (D_MODEL,)]
    shapes = [shape[::-1] if turned else shape for shape in shapes]
    return {name: torch.randn(shape, generator=rng) for name, shape in zip(names, shapes, strict=True)}


def sparsify(folder: Path) -> Path:
    return write_sparsify(folder, layers=[1]) / "layers.1"


def lens(folder: Path) -> Path:
    folder.mkdir()
    config = {"architecture": "standard", "d_in": D_MODEL, "d_sae": D_SAE, "sae_lens_version": "6.54.12",
              "metadata": {"hook_name": "blocks.1.hook_resid_post"}}  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(linear(("W_enc", "b_enc", "W_dec", "b_dec"), turned=False), folder / "sae_weights.safetensors")
    return folder


def dictionary(folder: Path) -> Path:
    folder.mkdir()
    trainer = {"dict_class": "AutoEncoder", "activation_dim": D_MODEL, "dict_size": D_SAE, "layer": 1,
               "submodule_name": "resid_post_layer_1"}  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    torch.save(linear(("encoder.weight", "encoder.bias", "decoder.weight", "bias"), turned=True), folder / "ae.pt")
    return folder


def plain(folder: Path) -> Path:
    folder.mkdir()
    config = {"hook_name": "blocks.1.hook_resid_post", "architecture": "standard", "apply_b_dec_to_input": False,
              "weights": "mine.pt"}  # fmt: skip
    (folder / "sae.json").write_text(json.dumps(config))
    torch.save(linear(("W_enc", "b_enc", "W_dec", "b_dec"), turned=False), folder / "mine.pt")
    return folder


# --- ways to break one ---------------------------------------------------------------------------------------------

Damage = Callable[[Path], Any]
PROOF = "code of the file was run"


class Malicious:
    """An object that creates a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


def half(name: str) -> Damage:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def a_pipe(name: str) -> Damage:
    """Create a pipe without a writer."""

    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def endless(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")

    return damage


def terabytes(name: str) -> Damage:
    """Create a sparse file of terabytes."""
    return lambda folder: os.truncate(folder / name, 2**40)


def text(name: str, content: str | bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def without(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def a_folder(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return damage


def a_link_to_itself(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(name)

    return damage


def says(name: str, **changes: Any) -> Damage:
    """Set values in a config; None removes a key; ``trainer__k`` is k in the object trainer."""

    def damage(folder: Path) -> None:
        config = json.loads((folder / name).read_text())
        for key, value in changes.items():
            *objects, last = key.split("__")
            inner = config
            for object_name in objects:
                inner = inner[object_name]
            inner[last] = value
            if value is None:
                del inner[last]
        (folder / name).write_text(json.dumps(config))

    return damage


def tensors(name: str, change: Callable[[dict[str, Tensor]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        safe = path.suffix == ".safetensors"
        found = {key: tensor.clone() for key, tensor in (load_file(path) if safe else torch.load(path)).items()}
        change(found)
        found = {key: tensor.contiguous() for key, tensor in found.items()}
        save_file(found, path) if safe else torch.save(found, path)

    return damage


def value(tensor: str, number: float) -> Callable[[dict[str, Tensor]], Any]:
    return lambda found: found[tensor].view(-1)[-1:].fill_(number)


def turned(tensor: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda found: found.update({tensor: found[tensor].T})


def narrower(tensor: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda found: found.update({tensor: found[tensor][..., :-1]})


def dropped(tensor: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda found: found.pop(tensor)


def code(folder: Path) -> None:
    torch.save({"encoder.weight": Malicious(folder.parent / PROOF)}, folder / "ae.pt")


def bare_pickle(protocol: int) -> Damage:
    """Write a file with ``pickle`` directly."""
    return lambda folder: (folder / "mine.pt").write_bytes(pickle.dumps(Malicious(folder.parent / PROOF), protocol))


def whole_module(folder: Path) -> None:
    torch.save(torch.nn.Linear(2, 3), folder / "ae.pt")


def a_list(folder: Path) -> None:
    torch.save([torch.zeros(3)], folder / "mine.pt")


def holds(make: Callable[[], Any]) -> Damage:
    """Write tensors together with something else in one ``ae.pt``."""

    def damage(folder: Path) -> None:
        whole = torch.load(folder / "ae.pt")
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(20_000)  # for pickle, which writes it
        try:
            torch.save({**whole, "more": make()}, folder / "ae.pt")
        finally:
            sys.setrecursionlimit(limit)

    return damage


def in_itself() -> dict[str, Any]:
    found: dict[str, Any] = {}
    found["again"] = found["and_again"] = found
    return found


def deep() -> dict[str, Any]:
    """Nest 3000 dictionaries."""
    found: dict[str, Any] = {}
    for _ in range(3000):
        found = {"in": found}
    return found


def many_names() -> dict[str, Tensor]:
    one = torch.zeros(2**20)
    return {str(i): one for i in range(200)}


def packed(folder: Path) -> None:
    """Compress 64 MiB of zeros to 64 KiB, which ``torch.save`` never does."""
    torch.save({"bias": torch.zeros(2**24)}, folder / "unpacked.pt")
    with (
        zipfile.ZipFile(folder / "unpacked.pt") as whole,
        zipfile.ZipFile(folder / "ae.pt", "w", zipfile.ZIP_DEFLATED) as made,
    ):
        for member in whole.infolist():
            made.writestr(member.filename, whole.read(member), zipfile.ZIP_DEFLATED)
    (folder / "unpacked.pt").unlink()


def a_file_in_its_place(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("an SAE")


def a_loop_in_its_place(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder)


def an_empty_folder(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


class Case(NamedTuple):
    name: str
    make: Callable[[Path], Path]
    damage: Damage
    file: str  # named in the error
    words: str  # in the error


SAFE, LENS = "sae.safetensors", "sae_weights.safetensors"
CASES = [
    # the weights as a file
    Case("half a safetensors file", sparsify, half(SAFE), SAFE, "not a complete safetensors file"),
    Case("half a file of SAE Lens", lens, half(LENS), LENS, "copy or download it again"),
    Case("half a .pt file", dictionary, half("ae.pt"), "ae.pt", "not a complete file of torch.save"),
    Case("an empty safetensors file", sparsify, text(SAFE, ""), SAFE, "the file is empty"),
    Case("an empty .pt file", plain, text("mine.pt", ""), "mine.pt", "the file is empty"),
    Case("text instead of tensors", plain, text("mine.pt", "hello\n"), "mine.pt", "not a complete file of torch"),
    Case("a pointer of Git LFS", lens, text(LENS, "version https://git-lfs"), LENS, "not a complete safetensors file"),
    Case("no weights", sparsify, without(SAFE), SAFE, "no such file"),
    Case("no ae.pt", dictionary, without("ae.pt"), "ae.pt", "no such file"),
    Case("a folder in place of weights", lens, a_folder(LENS), LENS, "it is a folder, not a file"),
    Case("a folder in place of ae.pt", dictionary, a_folder("ae.pt"), "ae.pt", "it is a folder, not a file"),
    Case("weights that link to themselves", sparsify, a_link_to_itself(SAFE), SAFE, "Too many levels"),
    # code in the weights
    Case("code in a .pt file", dictionary, code, "ae.pt", "mkdir, which is not allowed"),
    Case("code in a bare pickle", plain, bare_pickle(protocol=2), "mine.pt", "mkdir, which is not allowed"),
    Case("code in a newer pickle", plain, bare_pickle(protocol=4), "mine.pt", "not a complete file of torch"),
    Case("a pickled module", dictionary, whole_module, "ae.pt", "Linear, which is not allowed"),
    Case("a list of tensors", plain, a_list, "mine.pt", "it contains a list, but must have named tensors"),
    # other content of a .pt file
    Case("a dict in itself", dictionary, holds(in_itself), "ae.pt", "its dictionaries are nested too deeply"),
    Case("3000 dicts deep", dictionary, holds(deep), "ae.pt", "its dictionaries are nested too deeply"),
    Case("a meta tensor", dictionary, holds(lambda: torch.empty(3, device="meta")), "ae.pt", "meta device"),
    Case(
        "a quantised tensor",
        dictionary,
        holds(lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8)),
        "ae.pt",
        "quantized",
    ),
    Case(
        "a tensor of terabytes",
        dictionary,
        holds(lambda: torch.zeros(1).expand(2**20, 2**20)),
        "ae.pt",
        "far more than the file",
    ),
    Case("many names for one tensor", dictionary, holds(many_names), "ae.pt", "far more than the file"),
    Case("a packed .pt file", dictionary, packed, "ae.pt", "not a complete file of torch.save"),
    # tensors
    Case("a tensor is missing", sparsify, tensors(SAFE, dropped("b_dec")), SAFE, "no tensor 'b_dec'; it has W_dec"),
    Case("a bias is missing", dictionary, tensors("ae.pt", dropped("bias")), "ae.pt", "no tensor 'bias'"),
    Case("NaN", sparsify, tensors(SAFE, value("W_dec", torch.nan)), SAFE, "W_dec has NaN or infinity"),
    Case("infinity", lens, tensors(LENS, value("b_enc", torch.inf)), LENS, "b_enc has NaN or infinity"),
    Case("NaN in a .pt", dictionary, tensors("ae.pt", value("bias", torch.nan)), "ae.pt", "bias has NaN"),
    Case("a wrong shape", lens, tensors(LENS, narrower("b_enc")), LENS, "shape [95], but its config says [96]"),
    Case("transposed", sparsify, tensors(SAFE, turned("W_dec")), SAFE, "W_dec has shape [32, 96] (transposed?)"),
    Case("transposed .pt", dictionary, tensors("ae.pt", turned("encoder.weight")), "ae.pt", "(transposed?)"),
    Case("another d_sae", lens, says("cfg.json", d_sae=D_SAE + 1), LENS, "its config says [32, 97]"),
    Case("another dict_size", dictionary, says("config.json", trainer__dict_size=7), "ae.pt", "config says [7, 32]"),
    # the config as a file
    Case("no JSON", sparsify, text("cfg.json", "{'k': 8}"), "cfg.json", "not a readable JSON file"),
    Case("a list", lens, text("cfg.json", "[1, 2]"), "cfg.json", "it must be a JSON object, but is a list"),
    Case("an empty config", dictionary, text("config.json", ""), "config.json", "the file is empty"),
    Case("no UTF-8", plain, text("sae.json", b'{"weights": "\xff"}'), "sae.json", "can't decode byte 0xff"),
    Case("a folder in place of the config", lens, a_folder("cfg.json"), "cfg.json", "it is a folder, not a file"),
    Case("a config that links to itself", plain, a_link_to_itself("sae.json"), "sae.json", "Too many levels"),
    Case("weights without a config", dictionary, without("config.json"), "config.json", "no such file"),
    Case("a pipe in place of the config", sparsify, a_pipe("cfg.json"), "cfg.json", "a pipe or a device"),
    Case("a pipe in place of weights", lens, a_pipe(LENS), LENS, "a pipe or a device"),
    Case("a config without end", plain, endless("sae.json"), "sae.json", "a pipe or a device"),
    Case("weights without end", dictionary, endless("ae.pt"), "ae.pt", "a pipe or a device"),
    Case(
        "a config of a terabyte", sparsify, terabytes("cfg.json"), "cfg.json", "1048576 MiB is too large for a config"
    ),
    Case("weights of a terabyte", sparsify, terabytes(SAFE), SAFE, "not a complete safetensors file"),
    Case("a .pt of a terabyte", dictionary, terabytes("ae.pt"), "ae.pt", "not a complete file of torch.save"),
    # what the config says
    Case("a negative k", sparsify, says("cfg.json", k=-8), "cfg.json", "k is -8, but must be a whole number above 0"),
    Case("k larger than d_sae", sparsify, says("cfg.json", k=97), "cfg.json", "k 97 does not fit num_latents 96"),
    Case(
        "a text for a number", lens, says("cfg.json", d_in="32"), "cfg.json", "d_in is '32', but must be a whole number"
    ),
    Case("a list for a name", lens, says("cfg.json", architecture=["topk"]), "cfg.json", "architecture is ['topk']"),
    Case("an unknown activation", sparsify, says("cfg.json", activation="tanh"), "cfg.json", "activation is 'tanh'"),
    Case("an unknown class", dictionary, says("config.json", trainer__dict_class="New"), "config.json", "supported: "),
    Case("no trainer", dictionary, says("config.json", trainer=None), "config.json", "no object 'trainer'"),
    Case("a negative layer", dictionary, says("config.json", trainer__layer=-1), "config.json", "trainer.layer is -1"),
    Case("an unknown key", plain, says("sae.json", activation="relu"), "sae.json", "unknown key 'activation'"),
    Case("no weights named", plain, says("sae.json", weights=None), "sae.json", "weights is missing"),
    # the folder
    Case("a file in place of the folder", plain, a_file_in_its_place, "the-sae", "it is a file: give its folder"),
    Case("a link to itself in place of the folder", plain, a_loop_in_its_place, "the-sae", "a symbolic link"),
    Case("an empty folder", plain, an_empty_folder, "the-sae", "no SAE in this folder; give one with cfg.json"),
]


@pytest.fixture
def request_for(tiny_model: Path, people_csv: Path, tmp_path: Path) -> Callable[[Path], Request]:
    return lambda sae: Request(tiny_model, (sae,), people_csv, tmp_path / "results", ("--layers", "1"))


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the models whose weights were loaded."""
    models: list[Any] = []
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda *args, **_: models.append(args))
    return models


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.strip().splitlines()
    return line


@pytest.mark.filterwarnings("ignore:torch.quantize")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_broken_sae_is_reported_in_one_line(
    case: Case,
    request_for: Callable[[Path], Request],
    loaded: list[Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = case.make(tmp_path / "the-sae")
    case.damage(folder)
    before = sorted(tmp_path.rglob("*"))
    assert request_for(tmp_path / "the-sae").run() == 2
    line = one_line(capsys)
    assert case.file in line
    assert case.words in line
    assert not loaded
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left behind, and no code of a file was run"


@pytest.mark.parametrize("make", [sparsify, lens, dictionary, plain])
def test_intact_saes_are_measured(
    make: Callable[[Path], Path], request_for: Callable[[Path], Request], tmp_path: Path
) -> None:
    make(tmp_path / "the-sae")
    assert request_for(tmp_path / "the-sae").plus("--folds", "3", "--repeats", "1").run() == 0
    assert (tmp_path / "results" / "pythia-tiny_women.json").is_file()


@pytest.mark.parametrize("name", ["cfg.json", SAFE, "."])
def test_unreadable_files_are_rejected(
    name: str,
    request_for: Callable[[Path], Request],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = sparsify(tmp_path / "the-sae")
    (folder / name).chmod(0)
    if os.access(folder / name, os.R_OK):
        pytest.skip("nothing is unreadable to root")
    try:
        assert request_for(tmp_path / "the-sae").run() == 2
    finally:
        (folder / name).chmod(0o755)
    assert "Permission denied" in one_line(capsys)
    assert not (tmp_path / "results").exists()
