"""Every choice that depends on the processor, with faked capabilities."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from delta_selectivity.errors import RequestError
from delta_selectivity.system import processor

# torch.cpu.get_capabilities() of real processors, with the entries that are used
AVX2 = {"avx2": True}
AVX_VNNI = {**AVX2, "avx_vnni": True}
AVX512 = {**AVX2, "avx512_f": True}
VNNI = {**AVX512, "avx512_vnni": True}
ZEN4 = {**VNNI, "avx512_bf16": True}
AMX = {**ZEN4, "amx_bf16": True, "amx_int8": True}


@pytest.fixture
def cpu(monkeypatch):
    """Return a function that fakes a processor: `cpu(capabilities, vendor)` returns what is fast on it."""

    def fake(capabilities, vendor, mkl=True, onednn=True):
        monkeypatch.delenv(processor.VARIABLE, raising=False)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "A chip", **capabilities})
        monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"processor\t: 0\nvendor_id\t: {vendor}\n")
        monkeypatch.setattr(Path, "exists", lambda _: True)
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: onednn)
        processor.fast_operations.cache_clear()
        return set(processor.fast_operations())

    yield fake
    monkeypatch.undo()
    processor.fast_operations.cache_clear()


@pytest.mark.parametrize(
    ("capabilities", "vendor", "expected"),
    [
        (AVX2, "AuthenticAMD", set()),
        (AVX2, "GenuineIntel", set()),
        (AVX_VNNI, "GenuineIntel", {"bytes"}),
        (AVX512, "GenuineIntel", set()),
        (VNNI, "GenuineIntel", {"bytes"}),
        (ZEN4, "AuthenticAMD", {"bfloat16", "onednn", "bytes"}),
        (AMX, "GenuineIntel", {"bfloat16", "bytes"}),
        ({"neon": True}, "", set()),  # not tried on ARM; conservative choices
    ],
)
def test_each_processor_gets_its_fast_kernels(capabilities, vendor, expected, cpu):
    assert cpu(capabilities, vendor) == expected


@pytest.mark.parametrize(
    ("capabilities", "vendor", "expected"),
    [
        (ZEN4, "AuthenticAMD", True),
        (AMX, "GenuineIntel", False),
        (VNNI, "AuthenticAMD", False),
        (AVX2, "AuthenticAMD", False),
    ],
)
def test_attention_by_products_is_for_amd_with_bfloat16(capabilities, vendor, expected, cpu):
    cpu(capabilities, vendor)
    assert processor.has_fast_attention() == expected


def test_nothing_is_fast_without_the_library_for_it(cpu):
    assert cpu(ZEN4, "AuthenticAMD", onednn=False) == set()
    assert cpu(ZEN4, "AuthenticAMD", mkl=False) == {"bfloat16", "bytes"}


def test_the_user_can_override(cpu, monkeypatch):
    cpu(AMX, "GenuineIntel")
    for asked, expected in (("none", set()), ("", set()), ("onednn, bytes", {"onednn", "bytes"})):
        monkeypatch.setenv(processor.VARIABLE, asked)
        processor.fast_operations.cache_clear()
        assert processor.fast_operations() == expected
        assert processor.VARIABLE in processor.describe()
    monkeypatch.setenv(processor.VARIABLE, "avx2")
    processor.fast_operations.cache_clear()
    with pytest.raises(RequestError, match="'avx2' is not one of bfloat16, onednn, bytes, none"):
        processor.fast_operations()


@pytest.mark.parametrize("asked", ["bytes", "bfloat16"])
def test_what_the_processor_cannot_do_is_refused(cpu, monkeypatch, asked):
    """Without the instructions, products of bytes overflow: the numbers would be wrong."""
    cpu(AVX2, "AuthenticAMD")
    monkeypatch.setenv(processor.VARIABLE, asked)
    processor.fast_operations.cache_clear()
    with pytest.raises(RequestError, match=f"no fast products of {asked}"):
        processor.fast_operations()


def test_the_processor_is_described_in_one_line(cpu, monkeypatch):
    monkeypatch.setattr(processor, "cpu_count", lambda: 64)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    cpu(ZEN4, "AuthenticAMD")
    assert processor.describe() == "A chip: bfloat16, onednn, bytes; 1 thread"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    cpu(AVX2, "AuthenticAMD")
    assert processor.describe() == "A chip: float32 by MKL only; 8 threads"


@pytest.mark.parametrize("native", [True, False])
def test_a_gpus_bfloat16_support_is_checked(native, cpu, monkeypatch):
    cpu(AMX, "GenuineIntel")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert processor.has_bfloat16("cuda:0") == native
    assert not processor.has_bfloat16("mps")


def without_q(layer: dict[str, object]) -> dict[str, object]:
    """Return the figures of a layer that do not depend on the number of measured results."""
    women = {name: value for name, value in layer["women"].items() if not name.endswith("q_value")}
    return {**layer, "women": women}


@pytest.mark.usefixtures("onednn_bfloat16")
def test_a_run_is_resumed_in_the_dtype_of_its_folder(with_cache, tmp_path, monkeypatch, caplog):
    """The run starts where bfloat16 is fast and is resumed where it is not."""
    folder = shutil.copytree(with_cache.model, tmp_path / "pythia-tiny")
    AutoModelForCausalLM.from_pretrained(folder).bfloat16().save_pretrained(folder)
    request = replace(with_cache, model=folder)

    def run(*flags):
        assert request.plus(*flags).run() == 0
        (path,) = request.out.glob("*.json")
        return json.loads(path.read_text())

    monkeypatch.setattr(processor, "fast_operations", lambda: {"bfloat16"})
    first = run("--layers", "0")
    monkeypatch.setattr(processor, "fast_operations", set)
    again = run("--layers", "0,1")
    assert without_q(again["layer_0"]) == without_q(first["layer_0"]) and "layer_1" in again
    assert first["_run"]["key"]["dtype"] == again["_run"]["key"]["dtype"] == "bfloat16"
    assert "the model computes in bfloat16, as in the existing results" in caplog.text
    fresh = run("--layers", "0", "--overwrite")
    assert fresh["_run"]["key"]["dtype"] == "float32"
    assert "float32 by MKL only" in fresh["_run"]["versions"]["processor"]
    assert fresh["layer_0"] != first["layer_0"]
