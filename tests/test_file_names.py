"""Names of result files and folders: readable, safe and distinct."""

from __future__ import annotations

import hashlib
import random
import re

import pytest

from delta_selectivity.records.result_file import distinct_slugs, model_slug, result_path, slug


def test_names_without_a_latin_letter_keep_their_own_letters(tmp_path):
    assert [slug(name) for name in ("数据", "测试", "данные", "José", "सीमा")] == [
        "数据",
        "测试",
        "данные",
        "José",
        "सीमा",
    ]
    assert result_path(tmp_path, "模型/甲", "数据").name == "模型_甲_数据.json"
    assert slug("Jose\u0301") == slug("Jos\u00e9"), "one name, however its accent is written"
    assert len({slug(name) for name in ("कि", "का", "की")}) == 3, "vowel signs are part of a name"


@pytest.mark.parametrize("name", ["🙂", "🙃", "---", "*", " ", "\u202e", "\ud800"])
def test_a_name_without_safe_characters_gets_a_hash(name):
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()
    assert slug(name) == f"unnamed_{digest[:8]}"


def test_long_names_of_any_script_fit_into_a_file_name():
    names = ["数" * 300, "数" * 301, "a" * 300, "é" * 300]
    found = [slug(name) for name in names]
    assert len(set(found)) == len(names)
    assert all(len(f"{text}_{text}.json.12345.tmp".encode()) < 255 for text in found)


def test_latin_names_are_unchanged():
    rng = random.Random(0)
    for _ in range(2000):
        name = "x" + "".join(rng.choice("ab_.- :9A*") for _ in range(rng.choice([3, 12, 40])))
        assert slug(name) == re.sub(r"[^A-Za-z0-9.\-]+", "_", name).rstrip("._")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["/runs/a/trainer_0", "/runs/b/trainer_0"], ["a_trainer_0", "b_trainer_0"]),
        (["/x/a/trainer_0", "/x/b/trainer_0", "/y/a/trainer_0", "/x/a/trainer_1"],
         ["x_a_trainer_0", "x_b_trainer_0", "y_a_trainer_0", "trainer_1"]),
        (["/runs/layer_3/resid/topk/ae", "/runs/layer_3/mlp/topk/ae"], ["resid_ae", "mlp_ae"]),
        (["../a/ae", "../b/ae", "./ae"], ["a_ae", "b_ae", "ae"]),
        (["a/ae", "b/ae"], ["a_ae", "b_ae"]),
        (["one", "two"], ["one", "two"]),
        (["/数据/ae", "/测试/ae"], ["数据_ae", "测试_ae"]),
    ],
)  # fmt: skip
def test_paths_with_the_same_end_get_distinct_names(names, expected):
    assert distinct_slugs(names) == expected


def test_names_are_always_distinct():
    rng = random.Random(1)
    for _ in range(500):
        names = {
            "/".join(rng.choice(["a", "b", "a b", "a_b", "*", ".", "a.b"]) for _ in range(rng.randint(1, 4)))
            for _ in range(8)
        }
        names |= {f"/{name}" for name in names}
        found = distinct_slugs(sorted(names))
        assert len(set(found)) == len(names), names
        assert all(text and "/" not in text and text[0] not in ".-" for text in found)


def test_a_models_file_name_does_not_contain_its_path():
    assert model_slug("/home/me/models/pythia-160m") == "pythia-160m"
