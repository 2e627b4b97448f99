"""The same measurement on every family: hook points compared with plain hooks and with TransformerLens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import people, write_csv, write_sparsify
from families import D_MODEL, FAMILIES, MAX_LENGTH, N_LAYERS, Family
from runs import Request, files, numbers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from delta_selectivity.models import attention, fused_neox
from delta_selectivity.models.language_model import HOOKPOINTS, Site, open_model
from delta_selectivity.tasks import Mention, tokenise

EVERYWHERE = [name for name in HOOKPOINTS if name not in ("resid_mid", "mlp_post")]  # also of parallel blocks
PLAIN = [name for name in EVERYWHERE if not name.endswith("_normalized")]
LAYERS = (0, 1)
HAS_BOS_TEMPLATE = {"llama", "gemma", "gemma2", "gemma3_text"}

Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory) -> Folder:
    """Return the saved model of a family, created on first use."""
    made: dict[str, Path] = {}
    root = tmp_path_factory.mktemp("families")

    def of(name: str) -> Path:
        if name not in made:
            made[name] = FAMILIES[name].save(root / name, tiny_model, adds_bos=name in HAS_BOS_TEMPLATE)
        return made[name]

    return of


@pytest.fixture(scope="module")
def ids() -> Tensor:
    """Return [4, 20]: longer than the families' sliding windows."""
    return torch.randint(1, 300, (4, 20), generator=torch.Generator().manual_seed(1))


def every(hookpoints: list[str] | tuple[str, ...]) -> list[Site]:
    return [Site(layer, hookpoint) for layer in LAYERS for hookpoint in hookpoints]


def plain_hooks(model: nn.Module, ids: Tensor) -> dict[tuple[str, str], Tensor]:
    """Return the input and output of every module of the whole model: (path, input or output) -> tensor."""
    seen: dict[tuple[str, str], Tensor] = {}
    for path, module in model.named_modules():

        def hook(_module, args, kwargs, output, path=path):
            seen[path, "input"] = args[0] if args else kwargs.get("hidden_states")
            seen[path, "output"] = output[0] if isinstance(output, tuple) else output

        module.register_forward_hook(hook, with_kwargs=True)
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)
    return seen


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_hookpoint_equals_a_plain_hook_on_the_whole_model(family: Family, folder: Folder, ids: Tensor):
    whole = AutoModelForCausalLM.from_pretrained(folder(family.name), dtype=torch.float32).eval()
    seen = plain_hooks(whole, ids)
    found = open_model(str(folder(family.name))).load(every(PLAIN), "cpu", "float32").activations(ids)
    assert found.keys() == set(every(PLAIN))
    for site in every(PLAIN):
        expected = seen[family.place(site.hookpoint, site.layer)].reshape(*ids.shape, -1)
        torch.testing.assert_close(found[site], expected, atol=1e-6, rtol=0, msg=lambda m, site=site: f"{site}: {m}")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_replacing_a_value_equals_a_plain_hook(family: Family, folder: Folder, ids: Tensor):
    """At every place, all tokens but the first are replaced; the logits are those of the whole model."""
    whole = AutoModelForCausalLM.from_pretrained(folder(family.name), dtype=torch.float32).eval()
    model = open_model(str(folder(family.name))).load_whole(every(PLAIN), "cpu", "float32")
    with torch.inference_mode():
        untouched = whole(input_ids=ids, use_cache=False).logits
    logits, found = model.logits(ids)
    torch.testing.assert_close(logits, untouched, atol=1e-5, rtol=0)
    assert model.n_vocabulary == logits.shape[-1]
    place = torch.arange(ids.numel())[torch.arange(ids.numel()) % ids.shape[1] > 0]
    for site in every(PLAIN):
        x = found[site].clone()
        other = x[:, 1:] + torch.randn(x[:, 1:].shape, generator=torch.Generator().manual_seed(2))

        def swapped(value, other=other):
            changed = value.clone().reshape(*ids.shape, -1)
            changed[:, 1:] = other
            return changed.reshape(value.shape)

        def before(_module, args, kwargs, swapped=swapped):
            if args:
                return (swapped(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": swapped(kwargs["hidden_states"])}

        def after(_module, _args, output, swapped=swapped):
            return (swapped(output[0]), *output[1:]) if isinstance(output, tuple) else swapped(output)

        path, side = family.place(site.hookpoint, site.layer)
        module = whole.get_submodule(path)
        if side == "input":
            handle = module.register_forward_pre_hook(before, with_kwargs=True)
        else:
            handle = module.register_forward_hook(after)
        with torch.inference_mode():
            expected = whole(input_ids=ids, use_cache=False).logits
        handle.remove()
        changed = model.logits_with(ids, site, place, other.flatten(0, 1))
        torch.testing.assert_close(changed, expected, atol=1e-5, rtol=0, msg=lambda m, site=site: f"{site}: {m}")
        assert not torch.allclose(changed, untouched, atol=1e-3)
    torch.testing.assert_close(model.logits(ids)[0], logits, atol=0, rtol=0)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_parts_sum_to_the_change_of_the_residual_stream(family: Family, folder: Folder, ids: Tensor):
    found = open_model(str(folder(family.name))).load(every(PLAIN), "cpu", "float32").activations(ids)
    for layer in LAYERS:
        before, attention, mlp, after = (
            found[Site(layer, name)] for name in ("resid_pre", "attn_out", "mlp_out", "resid_post")
        )
        torch.testing.assert_close(before + attention + mlp, after, atol=2e-6 * float(after.abs().max()), rtol=0)
        assert attention.abs().max() > 0.01 and mlp.abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_padding_does_not_change_activations(family: Family, folder: Folder, ids: Tensor):
    model = open_model(str(folder(family.name))).load(every(EVERYWHERE), "cpu", "float32")
    padded, lengths = ids.clone(), (20, 13, 7, 1)
    for row, length in enumerate(lengths):
        padded[row, length:] = 0  # among others, the pad token of OPT and Gemma
    batched = model.activations(padded)
    for row, length in enumerate(lengths):
        for site, alone in model.activations(ids[row : row + 1, :length]).items():
            scale = max(1.0, float(alone.abs().max()))
            torch.testing.assert_close(batched[site][row, :length] / scale, alone[0] / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_widths_are_known_before_the_weights(family: Family, folder: Folder, ids: Tensor, monkeypatch):
    info = open_model(str(folder(family.name)))
    path = f"{family.block.format('<layer>')}.{family.attention}"
    sites = [*every(EVERYWHERE), Site(1, f"{path}:in"), Site(1, f"{path}.{family.projection}:in")]
    with monkeypatch.context() as patched:
        patched.setattr(type(info), "_read_weights", lambda *_: pytest.fail("weights were read"))
        widths = info.widths(sites)
    assert widths[Site(0, "z")] == family.d_z
    assert {widths[site] for site in every(EVERYWHERE) if site.hookpoint != "z"} == {D_MODEL}
    assert {site: x.shape[-1] for site, x in info.load(sites, "cpu", "float32").activations(ids).items()} == widths


def test_widths_of_a_model_larger_than_memory(tiny_model: Path, tmp_path: Path):
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    LlamaConfig(**sizes, num_hidden_layers=800, vocab_size=128256).save_pretrained(tmp_path)
    sites = [Site(10, "z"), Site(2, "layers.<layer>.mlp.down_proj:in"), Site(10, "layers.<layer>.self_attn.k_proj")]
    assert list(open_model(str(tmp_path)).widths(sites).values()) == [8192, 28672, 1024]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_later_layers_are_not_built(family: Family, folder: Folder, monkeypatch):
    info = open_model(str(folder(family.name)))
    whole = {name: list(getattr(info.config, name)) for name in family.per_layer}
    asked = {("resid_post", 0): 1, ("resid_pre", 1): 1, ("resid_pre", 2): 2, ("mlp_out", 1): 2}
    for (hookpoint, layer), n_layers in asked.items():
        model = info.load([Site(layer, hookpoint)], "cpu", "float32")
        blocks = [m for name, m in model.module.named_children() if name in ("layers", "h")]
        assert [len(block) for block in blocks] == [n_layers]
        assert model.module.get_output_embeddings() is None
        for name, values in whole.items():
            assert list(getattr(model.module.config, name)) == values[:n_layers]
            assert list(getattr(info.config, name)) == values, "the model's own config was changed"
    assert info.n_layers == (4 if family.name == "gpt_neo" else N_LAYERS)
    assert (info.d_model, info.max_length) == (D_MODEL, MAX_LENGTH)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["gpt_neox", "gpt2", "gemma2", "opt"])
def test_half_precision_equals_the_whole_model_in_it(name: str, dtype: str, folder: Folder, ids: Tensor, monkeypatch):
    # they round differently: test_attention.py, test_fused_neox.py
    monkeypatch.setattr(attention, "has_fast_attention", lambda: False)
    monkeypatch.setattr(fused_neox, "has_fast_bfloat16", lambda: False)
    family = FAMILIES[name]
    whole = AutoModelForCausalLM.from_pretrained(folder(name), dtype=getattr(torch, dtype)).eval()
    seen = plain_hooks(whole, ids)
    found = open_model(str(folder(name))).load(every(EVERYWHERE), "cpu", dtype).activations(ids)
    for site in every(PLAIN):
        assert found[site].dtype == getattr(torch, dtype)
        expected = seen[family.place(site.hookpoint, site.layer)].reshape(*ids.shape, -1)
        torch.testing.assert_close(found[site], expected, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_bos_of_the_tokenizer_is_not_doubled(name: str, folder: Folder):
    info = open_model(str(folder(name)))
    text = "We met Maria Lindmann"
    by_itself = info.tokenizer(text)["input_ids"]
    assert (by_itself[0] == info.tokenizer.bos_token_id) == (name in HAS_BOS_TEMPLATE)
    mention = Mention(text=text, start=7, end=len(text), person="maria lindmann")
    (with_bos,) = tokenise([mention], info.tokenizer, prepend_bos=True, max_length=64).ids
    (without,) = tokenise([mention], info.tokenizer, prepend_bos=False, max_length=64).ids
    assert list(with_bos).count(info.tokenizer.bos_token_id) == 1
    assert list(with_bos[1:]) == list(without) == list(by_itself[name in HAS_BOS_TEMPLATE :])


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_the_program_runs_on_the_family(name: str, folder: Folder, tmp_path: Path):
    data = write_csv(tmp_path / "women.csv", people(120))
    saes = (write_sparsify(tmp_path / "resid", range(2)), write_sparsify(tmp_path / "mlp", range(2), suffix=".mlp"))
    request = Request(folder(name), saes, data, tmp_path / "out", ("--folds", "3", "--repeats", "1"))
    assert request.run() == 0
    assert len(files(request.out)) == 2
    for layers in numbers(request.out).values():
        assert layers.keys() == {"layer_0", "layer_1"}
        assert all(layer["fvu_pos"] > 0 and "women" in layer for layer in layers.values())
