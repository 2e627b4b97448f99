"""The model as a source of activations: the right modules, the right values under padding, no hooks left behind."""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from delta_selectivity.errors import RequestError
from delta_selectivity.models import language_model
from delta_selectivity.models.language_model import Site, open_model
from delta_selectivity.system import processor


def load(folder, *sites):
    return open_model(str(folder)).load(sites, "cpu", "float32")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 300, (4, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("hookpoint", "path", "side"),
    [
        ("gpt_neox.layers.<layer>", "gpt_neox.layers.{}", "output"),
        ("layers.<layer>.attention", "gpt_neox.layers.{}.attention", "output"),
        ("gpt_neox.layers.<layer>.attention.dense", "gpt_neox.layers.{}.attention.dense", "output"),
        ("layers.<layer>.attention.dense:in", "gpt_neox.layers.{}.attention.dense", "input"),
        ("model.layers.<layer>.attention:in", "gpt_neox.layers.{}.attention", "input"),
    ],
)
def test_a_module_path_equals_a_plain_hook(tiny_model, ids, hookpoint, path, side):
    whole = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    expected = {}
    for layer in (0, 1):

        def hook(_module, args, output, layer=layer):
            expected[layer] = args[0] if side == "input" else output[0] if isinstance(output, tuple) else output

        whole.get_submodule(path.format(layer)).register_forward_hook(hook)
    with torch.no_grad():
        whole(input_ids=ids)
    found = load(tiny_model, Site(0, hookpoint), Site(1, hookpoint)).activations(ids)
    for layer in (0, 1):
        torch.testing.assert_close(found[Site(layer, hookpoint)], expected[layer], atol=1e-6, rtol=0)


def test_last_layer_is_taken_before_the_final_layer_norm(tiny_model, ids):
    site = Site(2, "resid_post")
    whole = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    with torch.no_grad():
        normed = whole(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        found = load(tiny_model, site).activations(ids)[site]
        torch.testing.assert_close(whole.gpt_neox.final_layer_norm(found), normed, atol=1e-5, rtol=0)
    assert not torch.allclose(found, normed, atol=1e-2)


def test_hooks_are_removed_also_when_the_forward_pass_fails(tiny_model, ids):
    model = load(tiny_model, Site(1, "resid_post"), Site(1, "z"))
    with pytest.raises(IndexError):
        model.activations(ids + 10_000)
    model.activations(ids)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.module.modules())


def test_fingerprint_follows_the_weights(tiny_model, tmp_path):
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    before = open_model(str(copy)).fingerprint()
    assert before == open_model(str(tiny_model)).fingerprint()
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert open_model(str(copy)).fingerprint() != before


def test_broken_models_are_rejected_with_one_line(tiny_model, tmp_path):
    with pytest.raises(RequestError, match="no such folder"):
        open_model(str(tmp_path / "nowhere"))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(RequestError, match=r"no config\.json"):
        open_model(str(empty))
    cut = shutil.copytree(tiny_model, tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(RequestError, match="weights cannot be read"):
        load(cut, Site(0, "resid_post"))
    odd = shutil.copytree(tiny_model, tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**config, "hidden_size": 48}))
    with pytest.raises(RequestError, match=r"missing or have a wrong shape|cannot be read"):
        load(odd, Site(0, "resid_post"))


def test_auto_dtype_is_what_was_saved_if_that_is_fast_bfloat16_and_float32_otherwise(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(processor, "fast_operations", lambda: {"bfloat16"})
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    for saved, chosen in ((torch.bfloat16, "bfloat16"), (torch.float16, "float32"), (torch.float32, "float32")):
        folder = shutil.copytree(tiny_model, tmp_path / chosen / str(saved))
        model.to(saved).save_pretrained(folder)
        info = open_model(str(folder))
        assert info.choose_dtype("auto", "cpu") == chosen
        assert info.choose_dtype("float32", "cpu") == "float32"
        with monkeypatch.context() as slow:
            slow.setattr(processor, "fast_operations", set)
            assert info.choose_dtype("auto", "cpu") == "float32"
            assert info.choose_dtype("bfloat16", "cpu") == "bfloat16"


def test_a_model_is_built_without_weights_once_unless_its_own_code_decides(tiny_model, tmp_path, monkeypatch):
    built = []
    plain = language_model.shape_widths
    monkeypatch.setattr(language_model, "shape_widths", lambda *args: built.append(args) or plain(*args))
    language_model._widths.cache_clear()
    sites = [Site(1, "z"), Site(0, "resid_post")]
    for _ in range(2):  # another object for the same model; the answer is the caller's own
        found = open_model(str(tiny_model)).widths(sites)
        assert list(found) == sites and found.pop(sites[0]) == 32
    assert len(built) == 1
    folder = shutil.copytree(tiny_model, tmp_path / "wider")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    assert open_model(str(folder)).widths(sites) == dict.fromkeys(sites, 64)
    for _ in range(2):
        open_model(str(tiny_model), trust_remote_code=True).widths(sites)
    assert len(built) == 4


def test_concurrent_loading_does_not_change_transformers(tiny_model, monkeypatch):
    """Building a model replaces `tie_weights` by an empty function for a moment; overlapping builds could keep it."""
    info = open_model(str(tiny_model))
    sites = [Site(layer, place) for layer in range(3) for place in ("resid_pre", "resid_post")]  # each asked once
    plain, plain_tie = PreTrainedModel.__dict__["get_init_context"].__func__, PreTrainedModel.tie_weights
    seen = []

    def slow(cls, *args, **kwargs):
        seen.append(PreTrainedModel.tie_weights)
        time.sleep(0.02)
        return plain(cls, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "get_init_context", classmethod(slow))
    with ThreadPoolExecutor(4) as threads:
        list(
            threads.map(
                lambda i: info.load([sites[i // 2]], "cpu", "float32") if i % 2 else info.widths([sites[i // 2]]),
                range(12),
            )
        )
    assert seen == [plain_tie] * len(seen)
    assert len(seen) >= 6
    assert PreTrainedModel.tie_weights is plain_tie
