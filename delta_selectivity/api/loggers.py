"""Loggers of numbers by step (TensorBoard, W&B and CSV files), called with a flat dict and a step.

log = CsvLogger("training.csv")
log({"delta/gender/layer_3/transfer_r2": 0.71}, step=100)

Any function of a dict and a step also works as a logger.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from delta_selectivity.api.arguments import as_path
from delta_selectivity.api.training_names import HIGH, LOW, ROOT, intervals
from delta_selectivity.errors import RequestError

Logger = Callable[[Mapping[str, float], int], Any]


class CsvLogger:
    """CSV log with one line per number: ``step, name, value, ci_low, ci_high``. Appends to an existing file."""

    COLUMNS = ("step", "name", "value", "ci_low", "ci_high")

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Set the path, creating missing folders. Raises `RequestError` if it is not writable."""
        self.path: Path = as_path(path, "path")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8", newline="") as file:
                if file.tell() == 0:
                    csv.writer(file).writerow(self.COLUMNS)
        except OSError as error:
            raise RequestError(f"`path` {self.path}: cannot be written: {error.strerror or error}") from error

    def __call__(self, numbers: Mapping[str, float], step: int) -> None:
        """Append the numbers of a step in a single write."""
        bounds = {f"{name}{end}" for name in intervals(numbers) for end in (LOW, HIGH)}
        lines = io.StringIO(newline="")
        csv.writer(lines).writerows(
            (step, name, value, numbers.get(f"{name}{LOW}", ""), numbers.get(f"{name}{HIGH}", ""))
            for name, value in numbers.items()
            if name not in bounds
        )
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(lines.getvalue())


class TensorBoardLogger:
    """TensorBoard scalars. The tab "Custom Scalars" shows each number that has an interval as a curve with a band."""

    def __init__(self, to: Any) -> None:
        """Write to a folder, or to the training's own ``SummaryWriter``.

        Raises:
            RequestError: A folder was given, and the package tensorboard is not installed.
        """
        if isinstance(to, str | os.PathLike):
            try:
                from torch.utils.tensorboard import SummaryWriter  # type: ignore[attr-defined, unused-ignore]
            except ImportError as error:
                raise RequestError("`to`: the package tensorboard is not installed: pip install tensorboard") from error
            to = SummaryWriter(str(as_path(to, "to")))
        self.writer = to
        self._banded: list[str] = []

    def __call__(self, numbers: Mapping[str, float], step: int) -> None:
        """Write the numbers of a step."""
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        banded = [name for name in intervals(numbers) if name not in self._banded]
        if banded:  # the layout always covers all charts
            self._banded += banded
            charts = {name: ["Margin", [name, f"{name}{LOW}", f"{name}{HIGH}"]] for name in self._banded}
            self.writer.add_custom_scalars({ROOT: charts})
        self.writer.flush()


class WandbLogger:
    """Metrics of a W&B run, plotted over ``delta/step``. The bounds of intervals are separate curves."""

    STEP = f"{ROOT}/step"

    def __init__(self, run: Any = None) -> None:
        """Log to a run; None: the run started by ``wandb.init``, looked up when the first numbers are logged."""
        self._run: Any = None
        if run is not None:
            self._begin(run)

    def __call__(self, numbers: Mapping[str, float], step: int) -> None:
        """Log the numbers of a step, in the row of that step; in the next row if the run is already past the step.

        Raises:
            RequestError: There is no run.
        """
        if self._run is None:
            import wandb

            if wandb.run is None:
                raise RequestError("`log`: there is no W&B run: call wandb.init first, or pass a run to WandbLogger")
            self._begin(wandb.run)
        of_step = {"step": step} if step >= self._run.step else {}
        self._run.log({**numbers, self.STEP: step}, **of_step)

    def _begin(self, run: Any) -> None:
        self._run = run
        run.define_metric(self.STEP, hidden=True)
        run.define_metric(f"{ROOT}/*", step_metric=self.STEP)
