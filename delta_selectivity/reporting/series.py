"""Find series of checkpoints among the SAEs of a report, and which checkpoint is better than the previous one.

series_of(study_of(files))       # of runs/a/step_100, runs/a/step_200, ...; or of one model's revisions step1000, ...

A checkpoint is surely better than the previous one if the 95 % interval of their paired difference of transfer_r2, on
the same rows, folds and people, lies above 0.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from delta_selectivity.records import result_file
from delta_selectivity.reporting.groups import HASHES, settings_of, stored_cells
from delta_selectivity.reporting.names import elide_middle
from delta_selectivity.reporting.study import Sae, Study, tasks_of
from delta_selectivity.system.terminal import printable

_STEP = re.compile(
    r"(?P<word>steps?|checkpoints?|ckpt|iter(?:ation)?s?|epoch|final)[-_=. ]?(?P<step>\d+)(?![\da-z])"
    r"|(?:^|(?<=/))(?P<bare>\d+)(?=/|$)",
    re.IGNORECASE,
)
"""The step in a name: a number after a keyword, or a folder that is a number. `k32` is not a step."""
MAX_NAME = 60  # characters of a name in the sentence
STEP_MARK = "*"
"""Replaces the step in the name of a series."""


@dataclass(frozen=True)
class Checkpoint:
    """An SAE at one training step."""

    step: int
    sae: Sae
    change: result_file.Json | None  # its transfer_r2 minus that of the previous one, paired, with interval and test

    @property
    def surely_better(self) -> bool:
        """Return whether transfer_r2 is significantly higher than at the previous checkpoint."""
        low = (self.change or {}).get("transfer_r2_ci_low")
        return low is not None and low > 0


@dataclass(frozen=True)
class Series:
    """Checkpoints of one training ordered by step, of the SAE or of the model; at least two."""

    name: str  # with an asterisk in place of the step
    of_model: bool  # whether the model was trained, rather than the SAE
    checkpoints: tuple[Checkpoint, ...]

    @property
    def last_better(self) -> Checkpoint | None:
        """Return the last checkpoint that is surely better than the previous one; None if none is."""
        return next((one for one in reversed(self.checkpoints) if one.surely_better), None)

    def sentence(self) -> str:
        """Return a sentence that names the last checkpoint that is surely better than the previous one."""
        name = elide_middle(self.name, MAX_NAME)
        steps = f"{len(self.checkpoints)} checkpoints of {name}, steps {self.checkpoints[0].step:,} to "
        steps += f"{self.checkpoints[-1].step:,}: "
        if all(one.change is None for one in self.checkpoints[1:]):
            return f"{steps}they cannot be compared, because their stored scores are missing."
        last = self.last_better
        if last is None:
            return f"{steps}none is surely better than the previous one."
        value = (last.change or {})["transfer_r2"]
        return (
            f"{steps}the last one that is surely better than the previous one is step {last.step:,} (by {value:.3f})."
        )


def series_of(study: Study) -> list[Series]:
    """Return every series of at least two steps, in the order of the SAEs."""
    by_series: dict[tuple[str, bool, str], dict[int, Sae]] = {}
    for sae in study.saes:
        for name, of_model, step in _steps(sae):
            by_series.setdefault((name, of_model, _settings(sae)), {}).setdefault(step, sae)
    return [
        Series(printable(name), of_model, tuple(_checkpoints(study, sorted(by_step.items()))))
        for (name, of_model, _), by_step in by_series.items()
        if len(by_step) > 1
    ]


def step_of(name: str) -> tuple[str, int] | None:
    """Return the name with an asterisk for its last step, and the step; None if the name has none.

    >>> step_of("runs/topk_k32/step_2000"), step_of("checkpoints/x/4096"), step_of("sae-k32")
    (('runs/topk_k32/*', 2000), ('checkpoints/x/*', 4096), None)
    """
    matches = list(_STEP.finditer(name))
    if not matches:
        return None
    last = matches[-1]
    return f"{name[: last.start()]}{STEP_MARK}{name[last.end() :]}", int(last["step"] or last["bare"])


def _steps(sae: Sae) -> Iterator[tuple[str, bool, int]]:
    """Yield the step in the SAE's name, or else in the model's revision."""
    config = sae.files[0][1]["_run"]["config"]
    name_in_request, revision = str(config["sae"]), config.get("revision")
    of_sae = step_of(name_in_request)
    if of_sae is not None:
        yield of_sae[0], False, of_sae[1]
    elif isinstance(revision, str) and (of_model := step_of(revision)) is not None:
        model = str(config.get("model_name", ""))
        yield f"{name_in_request} at {model}, revision {of_model[0]}", True, of_model[1]


def _settings(sae: Sae) -> str:
    """Return what must agree within a series: everything that affects the numbers except SAE and model."""
    settings = settings_of(sae.files[0])
    return repr(sorted((name, value) for name, value in settings.items() if name not in HASHES))


def _checkpoints(study: Study, by_step: list[tuple[int, Sae]]) -> Iterator[Checkpoint]:
    yield Checkpoint(*by_step[0], None)
    for (_, before), (step, sae) in itertools.pairwise(by_step):
        yield Checkpoint(step, sae, _change(study, sae, before))


def _change(study: Study, sae: Sae, before: Sae) -> result_file.Json | None:
    comparison = study.comparison(sae.name, before.name)
    if comparison is not None:
        return comparison.figures
    if _key(sae, "model") == _key(before, "model"):
        return None
    cells, cells_before = stored_cells(sae.files), stored_cells(before.files)  # another revision, and the same rows
    if cells is None or cells_before is None:
        return None
    from delta_selectivity.records.sae_level import compare  # here: imports scipy, seldom needed

    difference = compare(cells, cells_before, tasks_of(sae.files))
    return difference if difference["transfer_r2"] is not None else None


def _key(sae: Sae, name: str) -> Any:
    return sae.files[0][1]["_run"]["key"].get(name)


COLUMNS = (
    "series", "step", "sae", "transfer_r2", "transfer_r2_ci_low", "transfer_r2_ci_high", "delta_sel",
    "delta_sel_ci_low", "delta_sel_ci_high", "change", "change_ci_low", "change_ci_high", "change_p_value",
    "surely_better",
)  # fmt: skip


def lines(series: Series) -> list[tuple[Any, ...]]:
    """Return a line for each checkpoint, in the order of `COLUMNS`; changes are those of transfer_r2."""
    ends = ("", "_ci_low", "_ci_high", "_p_value")
    return [
        (
            series.name, one.step, one.sae.name, *one.sae.overall("transfer_r2"), *one.sae.overall("delta_sel"),
            *((one.change or {}).get(f"transfer_r2{end}") for end in ends), one.surely_better,
        )
        for one in series.checkpoints
    ]  # fmt: skip
