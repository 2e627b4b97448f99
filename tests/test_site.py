"""The documentation site builds, its search finds every name, and the code in README and pages runs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import people, write_csv

import delta_selectivity as ds
from delta_selectivity.cli import extract, inspect, main, probe, report, scale, tasks
from delta_selectivity.probing.selectivity import ProbeResult
from delta_selectivity.run.reconstruction import Reconstruction

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^ *```(\w+)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
TESTED_ELSEWHERE = {"docs/rows_file.md": "test_rows_file.py", "docs/numbers.md": "test_scores.py"}
SHORTER = {  # code on the pages that needs the Hub or a long run -> the same for a tiny model
    '"EleutherAI/pythia-160m"': "model", '"EleutherAI/sae-pythia-160m-32k"': "sae", '"my_folder"': "sae",
    '["gender"]': '["people.csv"]', '"gender"': '"people"', '["gender/fvu_whole"]': '["people/fvu_whole"]',
    "layers=[3]": "layers=[1]", "layer=3": "layer=1", "layer=6": "layer=1",
    "layer=4": "layer=1", "n=1000": "n=200", "rows=1000": "rows=200", 'sae="k8"': "",
}  # fmt: skip


def blocks(page: str, language: str) -> list[str]:
    return [code for kind, code in BLOCK.findall((ROOT / page).read_text("utf-8")) if kind == language]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_builds_and_its_search_finds_every_public_name_and_every_key_of_a_result(site):
    index = json.loads((site / "search" / "search_index.json").read_text("utf-8"))
    found = " ".join(f"{entry['title']} {entry['text']}" for entry in index["docs"])
    words = set(re.findall(r"\w+", found))
    keys = set(ProbeResult.__dataclass_fields__) | set(Reconstruction.__dataclass_fields__)
    settings = set(ds.Settings.__dataclass_fields__)
    assert not (set(ds.__all__) | keys | settings) - words
    assert "http" not in re.sub(r'href="[^"]*"', "", (site / "index.html").read_text("utf-8")).partition("<body")[0]


@pytest.mark.parametrize("page", [page for page in PAGES if page not in TESTED_ELSEWHERE and blocks(page, "python")])
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch, tiny_model, tiny_saes):
    monkeypatch.chdir(tmp_path)
    write_csv(tmp_path / "people.csv", people(300))
    shutil.copytree(ROOT / "docs", "docs", ignore=shutil.ignore_patterns("*.md"))
    shutil.copytree(ROOT / "results" / "demo", "results/demo")
    x = np.random.default_rng(0).normal(size=(200, 5))
    names = {"model": str(tiny_model), "sae": str(tiny_saes), "my_sae": ds.load_sae(str(tiny_saes), 1)}
    names |= {"x": x, "x_hat": x + 0.1, "labels": x[:, 0] > 0, "groups": np.arange(200), "torch": torch}
    names |= {"n_steps": 101, "train": lambda _: None}
    if page == "docs/tutorial.md":
        quick = ds.Settings(folds=3, repeats=1, keep_texts="all")
        ds.evaluate(tiny_model, str(tiny_saes), "people.csv", layers=[1], settings=quick, output="results/first")
    for code in blocks(page, "python"):
        for theirs, ours in SHORTER.items():
            code = code.replace(theirs, ours)
        exec(compile(code, page, "exec"), names)


PROGRAMS = {"main.py": main, "report.py": report, "activations.py": extract, "probes.py": probe, "scale": scale,
            "compute_selectivity.py": scale, "datasets_wikidata.py": tasks, "inspect": inspect}  # fmt: skip


def commands() -> list[tuple[str, str, list[str]]]:
    """Return (page, program, its arguments) of each of our command lines on the pages."""
    found = []
    for page in PAGES:
        for code in blocks(page, "bash"):
            for line in code.replace("\\\n", " ").splitlines():
                words = [word for word in shlex.split(line, comments=True) if "=" not in word or word.startswith("-")]
                if words[:1] in (["python"], ["delta-selectivity"]) and words[1:] and words[1] != "-m":
                    program, arguments = words[1], words[2:]
                    found.append((page, program, arguments))
    return found


def test_every_flag_on_the_pages_is_one_of_its_program(capsys):
    helped: dict[str, str] = {}
    seen = 0
    for page, program, arguments in commands():
        if program not in PROGRAMS:
            assert (ROOT / program).is_file(), f"{page}: {program}"
            continue
        if program not in helped:
            with pytest.raises(SystemExit):
                PROGRAMS[program].main(["--help"], program)
            helped[program] = capsys.readouterr().out
        for argument in arguments:
            if argument.startswith("--"):
                assert re.search(rf"{re.escape(argument.partition('=')[0])}\b", helped[program]), f"{page}: {argument}"
                seen += 1
    assert seen > 20


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) < 200
