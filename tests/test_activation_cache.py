"""The activation cache: no forward pass is repeated, no number changes, and damaged files are recomputed."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import N_LAYERS, people, write_csv
from runs import Request, numbers, scores_of

from delta_selectivity.caches import shard_folder
from delta_selectivity.caches.activation_cache import ActivationCache, CachedModel, text_key
from delta_selectivity.models.language_model import LanguageModel, Site, open_model, real_tokens

SITES = [Site(layer, "resid_post") for layer in range(N_LAYERS)]
CPU = torch.device("cpu")
WIDTHS = torch.tensor([7, 5, 3])


@pytest.fixture
def forward_passes(monkeypatch):
    """Count the texts of each forward pass through a model."""
    counted: list[int] = []
    plain = LanguageModel.activations

    def counting(self, ids, *tokens):
        counted.append(len(ids))
        return plain(self, ids, *tokens)

    monkeypatch.setattr(LanguageModel, "activations", counting)
    return counted


@pytest.fixture(scope="module")
def info(tiny_model):
    return open_model(str(tiny_model))


def cached(cache: ActivationCache, info) -> CachedModel:
    return CachedModel(cache, lambda sites: info.load(sites, "cpu", "float32"), SITES, CPU)


def texts(seed: int = 0) -> torch.Tensor:
    """Return [3, 7] token ids, right-padded to `WIDTHS`."""
    ids = torch.randint(1, 300, (3, 7), generator=torch.Generator().manual_seed(seed))
    return ids * (torch.arange(7) < WIDTHS[:, None])


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.safetensors"))


# mark it as used


def test_another_sae_needs_no_forward_pass_and_gets_the_same_numbers(with_cache, other_saes, forward_passes, tmp_path):
    assert with_cache.run() == 0
    assert sum(forward_passes) > 100
    forward_passes.clear()
    second = Request(with_cache.model, (other_saes,), with_cache.data, tmp_path / "second", with_cache.more)
    assert second.run() == 0
    assert forward_passes == []
    plain = Request(with_cache.model, (other_saes,), with_cache.data, tmp_path / "plain")
    assert plain.run() == 0
    assert numbers(tmp_path / "second") == numbers(tmp_path / "plain")
    assert scores_of(tmp_path / "second") == scores_of(tmp_path / "plain")


def test_a_cold_or_warm_cache_changes_no_number(with_cache, tmp_path, monkeypatch):
    """The preflight had processed some of the texts in other batches, which round differently."""
    plain = LanguageModel.activations

    def rounding(self, ids, *tokens):
        return {site: x * (1 + 1e-4 * len(ids)) for site, x in plain(self, ids, *tokens).items()}

    monkeypatch.setattr(LanguageModel, "activations", rounding)
    cold = with_cache.plus("--baselines", "pca")
    assert cold.run() == 0
    assert cold.into(tmp_path / "warm").run() == 0
    without = Request(with_cache.model, with_cache.saes, with_cache.data, tmp_path / "plain")
    assert without.plus("--baselines", "pca").run() == 0
    assert numbers(with_cache.out) == numbers(tmp_path / "warm") == numbers(tmp_path / "plain")


def test_only_new_texts_are_run(with_cache, forward_passes, tmp_path):
    assert with_cache.run() == 0
    forward_passes.clear()
    rows = people(240)
    later = [
        {**row, "text": f"Now {row['text']}", "start": row["start"] + 4, "end": row["end"] + 4} for row in rows[:9]
    ]
    more = [*rows, *later]
    data = write_csv(tmp_path / "more.csv", more)
    assert Request(with_cache.model, with_cache.saes, data, tmp_path / "more", with_cache.more).run() == 0
    new = len({row["text"] for row in more} - {row["text"] for row in rows})
    assert new <= sum(forward_passes) <= 3 * new, "in the run, and in the look before it, with BOS and without"


def test_a_broken_shard_is_reported_and_recomputed(with_cache, other_saes, forward_passes, tmp_path, caplog):
    assert with_cache.run() == 0
    broken = max(shards(tmp_path / "cache"), key=lambda path: path.stat().st_size)
    content = bytearray(broken.read_bytes())
    content[-5] ^= 0xFF
    broken.write_bytes(content)
    forward_passes.clear()
    assert Request(with_cache.model, (other_saes,), with_cache.data, tmp_path / "second", with_cache.more).run() == 0
    assert forward_passes
    assert "is damaged" in caplog.text
    assert Request(with_cache.model, (other_saes,), with_cache.data, tmp_path / "plain").run() == 0
    assert numbers(tmp_path / "second") == numbers(tmp_path / "plain")


def test_another_dtype_is_another_cache(with_cache, forward_passes, tmp_path):
    assert with_cache.run() == 0
    forward_passes.clear()
    assert with_cache.into(tmp_path / "second").plus("--dtype", "bfloat16").run() == 0
    assert forward_passes


def test_a_folder_that_cannot_be_created_is_rejected(with_cache, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert with_cache.plus("--cache_dir", str(tmp_path / "file" / "cache")).run() == 2
    assert "--cache_dir" in capsys.readouterr().err


# section by section of the file


def test_values_are_bitwise_identical_for_any_batch(tmp_path, info, forward_passes):
    cache = ActivationCache.open(tmp_path, 1, "m", "float32")
    first = cached(cache, info).token_rows(texts(), WIDTHS)
    again = cached(ActivationCache.open(tmp_path, 1, "m", "float32"), info)
    forward_passes.clear()
    alone = again.token_rows(texts()[1:2, :5], WIDTHS[1:2])
    turned = again.token_rows(texts()[[2, 0, 1]], WIDTHS[[2, 0, 1]])
    some = real_tokens(texts(), WIDTHS) & (torch.arange(7) % 2 == 1)
    fewer = again.token_rows(texts(), WIDTHS, some)
    assert forward_passes == []
    for site in SITES:
        of_text = first[site].split(WIDTHS.tolist())
        assert torch.equal(alone[site], of_text[1])
        assert torch.equal(turned[site], torch.cat([of_text[2], of_text[0], of_text[1]]))
        assert torch.equal(fewer[site], torch.cat([rows[1::2] for rows in of_text]))


def test_only_the_wanted_tokens_are_stored_and_others_are_computed_when_they_are_asked_for(
    tmp_path, info, forward_passes
):
    few, other = torch.zeros(2, 3, 7, dtype=torch.bool)
    few[:, [0, 2]], other[:, [1, 2]] = True, True
    model = cached(ActivationCache.open(tmp_path, 1, "m", "float32"), info)
    first = model.token_rows(texts(), WIDTHS, few)
    assert all(len(rows) == 6 for rows in first.values())
    model = cached(ActivationCache.open(tmp_path, 1, "m", "float32"), info)
    assert all(rows.equal(first[site]) for site, rows in model.token_rows(texts(), WIDTHS, few).items())
    assert forward_passes == [3]
    second = model.token_rows(texts(), WIDTHS, other)
    whole = info.load(SITES, "cpu", "float32").token_rows(texts(), WIDTHS)
    assert forward_passes == [3, 3, 3]
    for site in SITES:
        assert torch.equal(first[site], whole[site][_among_real(few)])
        assert torch.equal(second[site], whole[site][_among_real(other)])
    forward_passes.clear()
    model = cached(ActivationCache.open(tmp_path, 1, "m", "float32"), info)
    model.token_rows(texts(), WIDTHS, few), model.token_rows(texts(), WIDTHS, other)
    assert forward_passes == [], "each is found in its own shard"


def _among_real(wanted: torch.Tensor) -> torch.Tensor:
    """Return which real tokens are wanted, bool [real]."""
    return wanted[real_tokens(texts(), WIDTHS)]


def test_the_model_is_loaded_only_once(tmp_path, info):
    loads = []

    def load(sites):
        loads.append(sites)
        return info.load(sites, "cpu", "float32")

    model = CachedModel(ActivationCache.open(tmp_path, 1, "m", "float32"), load, SITES, CPU)
    for purpose in ("baselines", "run"):
        model.with_purpose(purpose).token_rows(texts(), WIDTHS)
    assert len(loads) == 1


def test_a_text_with_a_missing_site_is_run(tmp_path, info, forward_passes):
    cache = ActivationCache.open(tmp_path, 1, "m", "float32")
    cached(cache, info).restricted_to(SITES[:1]).token_rows(texts(), WIDTHS)
    forward_passes.clear()
    cached(cache, info).token_rows(texts(), WIDTHS)
    assert forward_passes == [3]


def test_the_least_recently_read_shards_are_evicted_but_not_those_of_this_run(tmp_path, info, monkeypatch):
    cache = ActivationCache.open(tmp_path, 1, "m", "float32")
    for seed in range(4):
        cached(cache, info).token_rows(texts(seed), WIDTHS)
    written = {path.name: path.stat().st_size for path in shards(tmp_path)}
    for age, path in enumerate(sorted(shards(tmp_path), key=lambda path: path.stat().st_mtime)):
        os.utime(path, (1000 + age, 1000 + age))
    oldest = min(shards(tmp_path), key=lambda path: path.stat().st_mtime).name
    room = sum(written.values()) + 10
    small = ActivationCache.open(tmp_path, room / 1024**3, "m", "float32")
    cached(small, info).token_rows(texts(9), WIDTHS)
    left = {path.name for path in shards(tmp_path)}
    assert oldest not in left
    assert len(left) == 4
    assert len(left - written.keys()) == 1


def test_a_full_cache_stores_no_more_and_warns(tmp_path, info, caplog):
    cache = ActivationCache.open(tmp_path, 1e-9, "m", "float32")
    found = cached(cache, info).token_rows(texts(), WIDTHS)
    cached(cache, info).token_rows(texts(1), WIDTHS)
    assert found.keys() == set(SITES)
    assert shards(tmp_path) == []
    assert caplog.text.count("full at") == 1


def test_a_full_disk_is_no_error(tmp_path, info, monkeypatch, caplog):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_folder, "replacing", full)
    cache = ActivationCache.open(tmp_path, 1, "m", "float32")
    for seed in range(2):
        cached(cache, info).token_rows(texts(seed), WIDTHS)
    assert caplog.text.count("No space left") == 1


def test_threads_that_find_a_disk_full_at_the_same_time_say_so_once(tmp_path, monkeypatch, caplog):
    both = threading.Barrier(2)

    def full(*_args, **_kwargs):
        both.wait(60)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shard_folder, "replacing", full)
    folder = shard_folder.ShardFolder.open(tmp_path, "fits", 1, "probe fits")
    write = partial(folder.write, tensors={"x": torch.zeros(1)}, header={})
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(write, ("0" * 32, "1" * 32))) == [False, False]
    assert caplog.text.count("probe fits are not cached from now on") == 1


def test_concurrent_writers_leave_whole_shards(tmp_path, info, forward_passes):
    """Four runs write the same texts and others at the same time."""
    models = [cached(ActivationCache.open(tmp_path, 1, "m", "float32"), info) for _ in range(4)]

    def work(model: CachedModel) -> None:
        for seed in range(6):
            model.token_rows(texts(seed), WIDTHS)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    forward_passes.clear()
    reader = cached(ActivationCache.open(tmp_path, 1, "m", "float32"), info)
    for seed in range(6):
        reader.token_rows(texts(seed), WIDTHS)
    assert forward_passes == []
    assert len(shards(tmp_path)) == 6


def test_a_text_is_identified_by_its_token_ids(info):
    a, b = np.array([1, 2, 3], np.int32), np.array([1, 2, 3, 0], np.int32)
    assert text_key(a, "run") == text_key(b[:3], "run")
    assert len({text_key(a, "run"), text_key(b, "run"), text_key(a[::-1], "run"), text_key(a, "preflight")}) == 4
