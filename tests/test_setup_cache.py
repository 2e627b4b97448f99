"""The setup cache: facts that a run computes before its work are computed once and stay the same."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import N_LAYERS
from runs import Request, numbers
from test_house import STORAGE, imported, module_file

from delta_selectivity.caches import setup_cache
from delta_selectivity.caches.setup_cache import SetupCache
from delta_selectivity.errors import RequestError
from delta_selectivity.models.language_model import ModelInfo, Pretrained, Site, open_model
from delta_selectivity.system import provenance
from delta_selectivity.system.provenance import PACKAGE
from delta_selectivity.tasks import Mention, tokenise

SITES = [Site(layer, "resid_post") for layer in range(N_LAYERS)]
MENTIONS = [Mention(f"The story of {name}", 13, 13 + len(name), name) for name in ("Ada Lovelace", "Émile Zola", "Bo")]


@pytest.fixture(scope="module")
def info(tiny_model) -> ModelInfo:
    return open_model(str(tiny_model))


@pytest.fixture
def computed(monkeypatch) -> list[str]:
    """Count computed facts, not those that are read."""
    calls: list[str] = []
    read, widths, tokens = ModelInfo.read, ModelInfo.widths, setup_cache.tokenise

    def counting_read(files):
        calls.append("model")
        return read(files)

    def counting_widths(self, sites):
        calls.append("widths")
        return widths(self, sites)

    def counting_tokens(*args, **kwargs):
        calls.append("tokens")
        return tokens(*args, **kwargs)

    monkeypatch.setattr(ModelInfo, "read", counting_read)
    monkeypatch.setattr(ModelInfo, "widths", counting_widths)
    monkeypatch.setattr(setup_cache, "tokenise", counting_tokens)
    return calls


def same(a, b) -> bool:
    return (
        all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(a.ids, b.ids, strict=True))
        and np.array_equal(a.first, b.first)
        and np.array_equal(a.last, b.last)
        and (a.has_bos, a.n_cut) == (b.has_bos, b.n_cut)
    )


def test_a_second_run_computes_nothing(with_cache, other_saes, computed, tmp_path):
    assert with_cache.run() == 0
    assert set(computed) == {"model", "widths", "tokens"}
    computed.clear()
    second = Request(with_cache.model, (other_saes,), with_cache.data, tmp_path / "second", with_cache.more)
    assert second.run() == 0
    assert computed == []
    plain = Request(with_cache.model, (other_saes,), with_cache.data, tmp_path / "plain")
    assert plain.run() == 0
    assert numbers(tmp_path / "second") == numbers(tmp_path / "plain")


def test_a_second_run_does_not_import_transformers(with_cache, tmp_path):
    assert with_cache.run() == 0
    told = "import sys; from delta_selectivity.cli.main import main; assert main(sys.argv[1:]) == 0; "
    told += "print('transformers' in sys.modules)"
    command = [sys.executable, "-c", told, *with_cache.into(tmp_path / "again").argv]
    found = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120, check=True)
    assert found.stdout.strip() == "False"


def test_cached_model_facts_are_unchanged(tmp_path, info, computed):
    for _ in range(2):
        assert SetupCache.open(tmp_path, 1).model(Pretrained.find(info.name)) == info
    assert computed == ["model"]


@pytest.mark.parametrize("prepend_bos", [True, False])
def test_cached_tokens_are_unchanged(tmp_path, info, computed, prepend_bos):
    for _ in range(2):
        setup = SetupCache.open(tmp_path, 1)
        assert setup.widths(info, SITES[::-1]) == info.widths(SITES)
        found = setup.tokens(MENTIONS, info, prepend_bos=prepend_bos)
        plain = tokenise(MENTIONS, info.tokenizer, prepend_bos=prepend_bos, max_length=info.max_length)
        assert same(found, plain)
    assert computed.count("tokens") == 1
    assert setup.tokens([], info, prepend_bos=prepend_bos).ids == ()
    assert setup.tokens([], info, prepend_bos=prepend_bos).ids == ()


def test_truncated_texts_are_reported_each_time(tmp_path, info, caplog):
    short = replace(info, max_length=20)
    long = [Mention("word " * 40 + "Ada Lovelace", 200, 212, "Ada Lovelace")]
    for _ in range(2):
        caplog.clear()
        assert SetupCache.open(tmp_path, 1).tokens(long, short, prepend_bos=False).n_cut == 1
        assert "1 of 1 texts are longer than the model's 20 tokens" in caplog.text


CHANGES = {
    "text": lambda info: ([replace(MENTIONS[0], text="The Story of Ada Lovelace"), *MENTIONS[1:]], info, True),
    "span": lambda info: ([replace(MENTIONS[0], start=17), *MENTIONS[1:]], info, True),
    "order": lambda info: (MENTIONS[::-1], info, True),
    "BOS": lambda info: (MENTIONS, info, False),
    "length": lambda info: (MENTIONS, replace(info, max_length=info.max_length - 1), True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_texts_and_settings_are_computed(tmp_path, info, computed, change):
    setup = SetupCache.open(tmp_path, 1)
    setup.tokens(MENTIONS, info, prepend_bos=True)
    computed.clear()
    mentions, info, prepend_bos = CHANGES[change](info)
    found = setup.tokens(mentions, info, prepend_bos=prepend_bos)
    assert computed == ["tokens"]
    assert same(found, tokenise(mentions, info.tokenizer, prepend_bos=prepend_bos, max_length=info.max_length))


def test_people_are_not_part_of_the_token_key(tmp_path, info, computed):
    setup = SetupCache.open(tmp_path, 1)
    setup.tokens(MENTIONS, info, prepend_bos=True)
    computed.clear()
    setup.tokens([replace(mention, person="x") for mention in MENTIONS], info, prepend_bos=True)
    assert computed == []


@pytest.mark.parametrize("what", ["program", "library", "files"])
def test_inputs_are_part_of_the_setup_key(tmp_path, tiny_model, computed, monkeypatch, what):
    for name in ("running_program", "installed_version"):
        monkeypatch.setattr(setup_cache, name, functools.cache(getattr(provenance, name).__wrapped__))
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    setup = SetupCache.open(tmp_path / "cache", 1)

    def find_out() -> None:
        info = setup.model(Pretrained.find(str(model)))
        setup.widths(info, SITES)
        setup.tokens(MENTIONS, info, prepend_bos=True)

    find_out()
    computed.clear()
    if what == "program":
        monkeypatch.setattr(setup_cache, "running_program", lambda sources: "a" * 64)
    elif what == "library":
        monkeypatch.setattr(setup_cache, "installed_version", lambda name: "0.1")
    else:
        with (model / "tokenizer.json").open("a") as file:
            file.write("\n")
    find_out()
    assert computed == ["model", "widths", "tokens"]


def test_a_missing_place_is_rejected_each_time(tmp_path, info, computed):
    setup = SetupCache.open(tmp_path, 1)
    for _ in range(2):
        with pytest.raises(RequestError):
            setup.widths(info, [Site(0, "no_such_place")])
    assert computed == ["widths"] * 2


def test_custom_code_of_a_model_is_not_cached(tmp_path, info, computed):
    setup = SetupCache.open(tmp_path, 1)
    for _ in range(2):
        setup.widths(setup.model(Pretrained.find(info.name, trust_remote_code=True)), SITES)
    assert computed == ["model", "widths"] * 2


def test_a_broken_setup_shard_is_reported_and_recomputed(tmp_path, info, computed, caplog):
    SetupCache.open(tmp_path, 1).tokens(MENTIONS, info, prepend_bos=True)
    (shard,) = tmp_path.glob("setup/*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-4])
    computed.clear()
    found = SetupCache.open(tmp_path, 1).tokens(MENTIONS, info, prepend_bos=True)
    assert computed == ["tokens"]
    assert "broken" in caplog.text
    assert same(found, tokenise(MENTIONS, info.tokenizer, prepend_bos=True, max_length=info.max_length))


def test_the_setup_digest_covers_all_inputs():
    seen: set[Path] = set()
    left = [PACKAGE / "caches/setup_cache.py", *(PACKAGE / "models").glob("*.py"), *(PACKAGE / "tasks").glob("*.py")]
    while left:
        path = left.pop()
        if path in seen:
            continue
        seen.add(path)
        left += [module_file(name) for name in imported(path) - STORAGE]
    assert {path for source in setup_cache.SOURCES for path in PACKAGE.glob(source)} == seen


def test_without_a_cache_nothing_is_kept(info, computed):
    setup = SetupCache()
    for _ in range(2):
        assert setup.widths(info, SITES) == dict.fromkeys(SITES, info.d_model)
        setup.tokens(MENTIONS, info, prepend_bos=False)
    assert computed == ["widths", "tokens"] * 2
