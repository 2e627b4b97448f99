"""Write docs/validation.md: the results of the last full run of `scripts/validate.py`, and how to read them."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import re
from collections.abc import Sequence
from pathlib import Path

from validation import bundled, suite, table

PACKAGES = ("torch", "numpy", "scipy", "concept-erasure")

TEMPLATE = """\
# Validation: does the number move when, and only when, the information moves?

Written by `{command}`; nothing here is edited by hand. Every row is a plant:
something is done to activations whose effect is known beforehand, and the metric must find that effect. A row without a
requirement is told and not judged.

{verdict}

## What the plants show

- **Identity**: a perfect SAE has a delta of exactly 0. Whatever the machinery adds, it adds to both views.
- **Concept erased**: one concept is made linearly unreadable, by LEACE (Belrose et al. 2023, arXiv 2306.03819,
  fitted on people who are not evaluated) and by ablating its true direction. Its selectivity goes to chance,
  nothing else moves. The bundled model's own concepts overlap (of these people three women in four are alive and
  one man in three), so erasing one rightly moves the other: told. A trait planted at random, independent of both,
  is judged there.
- **Lossless rotation**: nothing is lost, delta is 0; the model's own probes no longer work, and transfer_delta says
  so.
- **Noise ladder, PCA of rising rank**: more damage, lower delta, step by step. A step back of the PCA counts if the
  paired difference of the two ranks is below 0 beyond its 95 % interval, shared among all steps (Bonferroni).
- **Random TopK SAE**: random directions, of the width and L0 of a trained SAE, keep less than that SAE, over the
  tasks. They do keep a lot: with a generous L0 more than a trained SAE with a stingy one.
- **Decoder rows permuted**: latents cannot see it; the probes of the model can (transfer_sel at chance). Whether
  sae_sel collapses depends on the world. Where traits stand in quiet directions it does. In the bundled model it
  hardly does: a permuted decoder is a random projection of the codes, and keeps much of what is linear in them.
  Read transfer_delta beside delta_sel.
- **Null labels**: labels that are random by person, so no view knows anything. Selectivity is 1/2 after C was
  chosen, and the test of model against a noisier view finds a difference no more often than it may.
- **Equal views**: two views that know equally much of a real trait, with noise drawn separately.
- **McNemar's test by row**, told beside both: what a test that takes rows for independent would have claimed.
- **Known truth**: how often the 95 % interval of delta holds the true delta.
- **Few people, or of unequal size**: the same where a class has 6 people, and where one person has most of a class.
  Selectivity of null labels is told there and not judged: with 12 to 50 people it lies up to 0.03 beside 1/2, which was
  not looked into.
- **Seeds**: the same rows folded anew. 2.77 standard deviations are the smallest difference between two runs that
  is not luck of the folds (95 %).

## Which truth

{truth}

## Settings

{settings}

## Table

{rows}

{facts}
"""

TRUTH = """\
Data are drawn anew in every repeat from a Gaussian world, in which the true balanced accuracy of any linear probe
has a closed form. *Known truth* is the expected difference of probes fitted on so many people: the mean over all
repeats of the true differences of the fitted probes. It is what delta_sel estimates: how probes
trained on such a sample differ on people they have not seen. *Their own probes' truth* is the true difference of
the probes of the same repeat, mean over its folds and partitions: what those very probes would score on endless new
people."""


def write(path: Path, rows: Sequence[table.Row], scale: suite.Scale, seed: int, seconds: float) -> None:
    """Write the document."""
    failed, judged = len(table.failures(rows)), sum(row.passed is not None for row in rows)
    verdict = f"**{judged - failed} of {judged} required figures are met.**"
    command = (
        "python -m scripts.validate --full --write" if scale.name == "full" else "python -m scripts.validate --write"
    )
    text = TEMPLATE.format(
        command=command,
        verdict=verdict,
        truth=TRUTH,
        settings=_settings(scale, seed),
        rows=table.as_text(rows),
        facts=_facts(seconds),
    )
    path.write_text(text, encoding="utf-8")


def replace_settings(path: Path, rows: Sequence[table.Row], scale: suite.Scale, seed: int, seconds: float) -> None:
    """Replace the rows of some settings in the document, and keep the others."""
    before, _, after = path.read_text(encoding="utf-8").partition("\n## Table\n")
    names = {setting.name for setting in scale.settings}
    kept = [row for row in table.read(after) if row.where.partition(" (")[0] not in names]
    everything = [*kept, *rows]
    failed, judged = len(table.failures(everything)), sum(row.passed is not None for row in everything)
    before = re.sub(r"\*\*\d+ of \d+ required", f"**{judged - failed} of {judged} required", before, count=1)
    facts = [line for line in after.splitlines() if line and not line.startswith(("|", "Settings of"))]
    measured = f"Settings of few people and of unequal size: {scale.repeats} draws each, seed {seed}, {_facts(seconds)}"
    text = "\n".join([*facts, "", measured])
    path.write_text(f"{before}\n## Table\n\n{table.as_text(everything)}\n\n{text}\n", encoding="utf-8")


def _settings(scale: suite.Scale, seed: int) -> str:
    lines = [
        f"- Synthetic: {suite.SYNTHETIC.people} people, one mention each, d = {suite.SYNTHETIC.d}, three traits.",
        f"- Sparse: {suite.SPARSE.people} people, d = {suite.SPARSE.d}, {suite.SPARSE.features} loud features of which "
        f"{suite.SPARSE.active} are active, {suite.SPARSE.n_tasks} quiet traits; SAEs made of the truth.",
        f"- Bundled: layer {bundled.LAYER} of the bundled model, {' and '.join(bundled.DATASETS)}, "
        f"{scale.bundled_rows} rows each.",
        f"- Coverage and false positives: {scale.repeats} draws of each setting, seed {seed}. In `people x 5-10` a "
        "person has 5 to 10 mentions, and half of all noise, of x and of what the views add, is the person's. So it is "
        "where people are few or of unequal size: `Zipf` means sizes that fall like 1 / rank, `one of 30 %` one person "
        "with so many of all rows.",
    ]
    return "\n".join(lines)


def _facts(seconds: float) -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return f"{today}, {seconds:.0f} s; Python {platform.python_version()}, {versions}."
