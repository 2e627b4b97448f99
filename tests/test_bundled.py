"""The bundled model, SAEs and results are complete, and are what the documents say."""

from __future__ import annotations

import shutil
import statistics
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import delta_selectivity as ds
from delta_selectivity.cli import main as program
from delta_selectivity.cli.command_line import DEMO_MODEL, DEMO_SAES, parse
from delta_selectivity.models.language_model import Site, open_model
from delta_selectivity.reporting import results as report_files
from delta_selectivity.run.planning import adopt_existing_choices, make_plan, missing_cells, open_files
from delta_selectivity.saes import open_sae
from scripts import update_tables

ROOT = Path(__file__).resolve().parent.parent
SPARSER, DENSER = DEMO_SAES  # k 8 in sparsify's format, k 32 in SAE Lens's
TEXT = "The prize went to Marie Curie, who shared it with her husband, the physicist Pierre Curie."


@pytest.fixture(scope="module")
def activations():
    """Return the residual stream of a sentence after layer 3, float32 [tokens, d]."""
    info = open_model(str(DEMO_MODEL))
    site = Site(3, "resid_post")
    ids = torch.tensor([[info.tokenizer.bos_token_id, *info.tokenizer(TEXT, add_special_tokens=False)["input_ids"]]])
    return info.load([site], "cpu", "float32").activations(ids)[site][0, 1:]


def test_the_model_predicts_text_better_than_chance():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(TEXT, add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    assert loss < 6, "uniform guessing over 8192 tokens would be 9.0"


def test_the_sparsify_set_agrees_with_its_own_library(activations):
    from sparsify import SparseCoder

    theirs = SparseCoder.load_from_disk(SPARSER / "layers.3").float()
    ours = open_sae(str(SPARSER)).load(3, "cpu")
    with torch.no_grad():
        expected = theirs(activations).sae_out
    torch.testing.assert_close(ours.decode(ours.encode(activations)), expected, atol=1e-5, rtol=1e-5)


def test_the_sae_lens_set_agrees_with_its_own_library(activations):
    from sae_lens import SAE

    source = open_sae(str(DENSER))
    theirs = SAE.load_from_disk(next(path for path in DENSER.iterdir() if "blocks.3" in path.name)).float()
    ours = source.load(3, "cpu")
    with torch.no_grad():
        expected = theirs.decode(theirs.encode(activations))
    torch.testing.assert_close(ours.decode(ours.encode(activations)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("folder", "k"), [(SPARSER, 8), (DENSER, 32)])
def test_the_saes_cover_every_layer_and_fit_their_hook_point(activations, folder, k):
    source = open_sae(str(folder))
    assert source.layers == tuple(range(open_model(str(DEMO_MODEL)).n_layers))
    sae = source.load(3, "cpu")
    codes = sae.encode(activations)
    error = (activations - sae.decode(codes)).square().sum()
    assert error / (activations - activations.mean(dim=0)).square().sum() < 0.6
    assert float(codes.l0().max()) <= k


def test_a_small_real_run(tmp_path):
    flags = ["--datasets", "gender", "--layers", "2,4", "--shuffle_select_n", "300", "--repeats", "2", "--quiet"]
    assert program.main([*flags, "--output_directory", str(tmp_path)]) == 0
    fvu = {}
    for folder in (SPARSER, DENSER):
        ((_, results),) = report_files.load(report_files.result_files(tmp_path / folder.name))
        found = list(report_files.cells(results))
        assert [layer for layer, *_ in found] == [2, 4]
        assert all(0.45 < cell["model_sel"] < 1 for *_, cell in found)
        fvu[folder] = [figures["fvu_pos"] for _, _, figures, _ in found]
    assert all(sparser > denser for sparser, denser in zip(fvu[SPARSER], fvu[DENSER], strict=True))


def test_the_sparser_sae_loses_more_in_the_kept_results():
    loss: dict[str, dict[str, list[float]]] = {}
    for path, results in report_files.load(report_files.result_files(ROOT / "results" / "demo")):
        for _, probe, _, cell in report_files.cells(results):
            loss.setdefault(probe, {}).setdefault(path.parent.name, []).append(cell["delta_sel"])
    assert len(loss) == 12
    mean = {probe: {sae: statistics.fmean(deltas) for sae, deltas in by.items()} for probe, by in loss.items()}
    assert sum(by[SPARSER.name] < by[DENSER.name] for by in mean.values()) > 6


def test_the_kept_results_belong_to_the_bundled_model_and_saes():
    model = open_model(str(DEMO_MODEL)).fingerprint()
    saes = {folder.name: open_sae(str(folder)).fingerprint() for folder in DEMO_SAES}
    for path, results in report_files.load(report_files.result_files(ROOT / "results" / "demo")):
        key = results["_run"]["key"]
        assert (key["model"], key["sae"]) == (model, saes[path.parent.name]), f"{path} is stale: scripts/demo.sh"


def test_results_of_an_earlier_version_load_report_and_resume(tmp_path):
    """`results/demo` was written by an earlier version: none of it is rejected or measured again."""
    folder = tmp_path / "demo"
    shutil.copytree(ROOT / "results" / "demo", folder)
    plan = adopt_existing_choices(make_plan(parse(["--output_directory", str(folder), "--device1", "cpu"]).request))
    with ExitStack() as held:
        assert missing_cells(plan, open_files(plan, held)) == []
    frame = ds.Results.load(folder).to_frame()
    assert len(frame) == 2 * 6 * 12
    assert set(frame["dataset"]) == {"gender", "occupation", "politics", "athlete", "is_alive"}
    assert frame["q_value"].notna().all()


PAGES = (
    "ground_truth", "reliability", "performance", "scale", "settings", "explanation", "findings", "suite",
    "how_to/your_data",
)  # fmt: skip


@pytest.mark.parametrize(
    "document", ["README.md", "assets/tiny-pythia/README.md", *(f"docs/{page}.md" for page in PAGES)]
)
def test_tables_in_documents_are_up_to_date(document, monkeypatch, capsys):
    text = (ROOT / document).read_text("utf-8")
    assert text.count("<!-- python ") == text.count("<!-- end -->") > 0
    monkeypatch.setattr("sys.argv", ["update_tables", "--check", str(ROOT / document)])
    assert update_tables.main() == 0, capsys.readouterr().out
