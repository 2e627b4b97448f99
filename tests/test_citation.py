"""CITATION.cff is valid, is of this version, and cites the works that the README names."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))


def test_it_has_the_required_keys_and_the_current_version():
    assert CITATION.keys() >= {"cff-version", "message", "title", "authors"}
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION["authors"] == [{"name": "Delta Selectivity contributors"}]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert CITATION["version"] == project["version"]


def test_every_reference_can_be_found_and_those_of_the_readme_are_there():
    for reference in CITATION["references"]:
        assert reference.keys() >= {"type", "title", "authors", "year", "url"}
        assert all(author.keys() >= {"family-names", "given-names"} for author in reference["authors"])
        assert re.fullmatch(r"https://(arxiv\.org|github\.com)/\S+", reference["url"])
    by_author = {reference["authors"][0]["family-names"]: reference["year"] for reference in CITATION["references"]}
    assert by_author == {"Gurnee": 2023, "Hewitt": 2019, "Doshi": 2025}
    readme = (ROOT / "README.md").read_text("utf-8")
    assert re.search(r"Gurnee et al\. 2023 \(arXiv 2305\.01610\)", readme)
    assert re.search(r"Hewitt & Liang 2019", readme)
