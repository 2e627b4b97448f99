"""The class `Callback`: measure an SAE periodically during training, and log the numbers.

callback = Callback(evaluator, every=100, log=[TensorBoardLogger("runs/k32"), WandbLogger()])
callback.attach(trainer)          # SAE Lens's SAETrainer, sparsify's Trainer
callback(sae, step)               # in a custom loop
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from delta_selectivity.api.evaluator import Evaluator
from delta_selectivity.api.loggers import Logger
from delta_selectivity.api.training_names import ROOT
from delta_selectivity.errors import RequestError
from delta_selectivity.saes.hookpoints import parse, same_place


class Callback:
    """Periodic measurement and logging of an SAE in training; the training stays bitwise identical.

    If the SAE holds NaN or Inf, a warning is issued and the training continues.

    Example:
        >>> evaluator = Evaluator(model, layer=1, tasks="people.csv", rows=200, settings=Settings(folds=3, repeats=2))
        >>> callback = Callback(evaluator, every=2, log=CsvLogger("training.csv"))
        >>> for step in range(1, 5):
        ...     numbers = callback(sae, step)  # after the optimizer's step
        >>> "delta/people/layer_1/transfer_r2" in numbers
        True
    """

    def __init__(self, evaluator: Evaluator, *, every: int = 100, log: Logger | Iterable[Logger] = ()) -> None:
        """Store the evaluator and the loggers.

        Args:
            evaluator: An evaluator for the layer that the SAE is trained on.
            every: Number of steps between two measurements.
            log: One logger or several: `TensorBoardLogger`, `WandbLogger`, `CsvLogger`, or any function of a dict of
                floats and a step.

        Raises:
            RequestError: ``every`` is not a positive integer, or a logger is not callable.
        """
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise RequestError(f"`every` {every!r}: a whole number of at least 1 is needed")
        self.evaluator, self.every = evaluator, every
        self._loggers: list[Logger] = [log] if callable(log) else list(log)
        for logger in self._loggers:
            if not callable(logger):
                raise RequestError(f"`log` {logger!r:.60}: a function of a dict and a step is needed")
        self.seconds = 0.0
        """Total time of all measurements and their logging."""

    def __call__(self, sae: Any, step: int, activation_scaler: Any = None) -> dict[str, float] | None:
        """Measure and log if a measurement is due at this step.

        Args:
            sae: The SAE in training, as for `Evaluator.__call__`.
            step: Number of completed optimizer steps.
            activation_scaler: As for `Evaluator.__call__`.

        Returns:
            The logged numbers (see `for_training`); None if no measurement was due, or the SAE holds NaN or Inf.
        """
        if step % self.every:
            return None
        return self._measure({"": sae}, step, activation_scaler)

    def attach(self, trainer: Any) -> Handle:
        """Attach the callback to a trainer: SAE Lens's ``SAETrainer``, or sparsify's ``Trainer``.

        Steps are logged as the trainer counts them; SAE Lens counts from 0, and these are the steps it logs to W&B.
        With sparsify, the SAEs at the evaluator's layer and hook point are measured. With Schedule-Free optimizers,
        the averaged weights are measured, which are also those in the checkpoints.

        Returns:
            A handle, also a context manager, whose ``remove()`` detaches the callback.

        Raises:
            RequestError: The trainer is not supported, or trains no SAE at the evaluator's layer and hook point.
        """
        package = _package_of(trainer)
        if package == "sae_lens" and hasattr(trainer, "activation_scaler"):
            return self._attach(trainer.optimizer, lambda: self._of_sae_lens(trainer))
        if package == "sparsify" and hasattr(trainer, "optimizers"):
            names = self._matching_saes(trainer)
            return self._attach(trainer.optimizers[-1], lambda: self._of_sparsify(trainer, names))
        raise RequestError(
            f"`trainer` {type(trainer).__name__}: SAE Lens's SAETrainer or sparsify's Trainer is needed; in a custom "
            "loop, call the callback with the SAE and the step"
        )

    def _of_sae_lens(self, trainer: Any) -> None:
        step = trainer.n_training_steps  # the step in progress
        if (step + 1) % self.every == 0:
            self._measure({"": trainer.sae}, step, trainer.activation_scaler)

    def _of_sparsify(self, trainer: Any, names: Mapping[str, str]) -> None:
        step = (trainer.global_step + 1) // trainer.cfg.grad_acc_steps
        if step % self.every:
            return
        with _averaged_weights(trainer.optimizers):
            self._measure({label: trainer.saes[name] for name, label in names.items()}, step, None)

    def _matching_saes(self, trainer: Any) -> dict[str, str]:
        """Return the name of each of sparsify's SAEs at the evaluator's hook point -> its label."""
        site, labels = self.evaluator.site, {}
        for name in trainer.saes:
            of, _, label = name.partition("/")
            place = parse(of)
            if place is not None and place.layer == site.layer and same_place(place.place, site.hookpoint):
                labels[name] = label
        if not labels:
            trained = ", ".join(trainer.saes)
            raise RequestError(
                f"`trainer`: it trains {trained}, but the evaluator measures layer {site.layer}, {site.hookpoint}"
            )
        return labels

    def _measure(self, saes: Mapping[str, Any], step: int, activation_scaler: Any) -> dict[str, float] | None:
        start = time.perf_counter()
        all_numbers: dict[str, float] = {}
        for label, sae in saes.items():
            numbers = self.evaluator(sae, (), activation_scaler)
            all_numbers |= {
                f"{ROOT}/{label}{name.removeprefix(ROOT)}" if label else name: n for name, n in numbers.items()
            }
        if all_numbers:
            all_numbers[f"{ROOT}/seconds"] = time.perf_counter() - start
            for logger in self._loggers:
                logger(all_numbers, step)
        self.seconds += time.perf_counter() - start
        return all_numbers or None

    def _attach(self, optimizer: Any, after: Callable[[], None]) -> Handle:
        original, handle = optimizer.step, Handle()

        @functools.wraps(original)
        def step(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if handle.attached:
                after()
            return result

        optimizer.step = step
        return handle


@dataclass
class Handle:
    """A callback attached to a trainer."""

    attached: bool = True

    def remove(self) -> None:
        """Detach the callback from the trainer."""
        self.attached = False

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _package_of(trainer: Any) -> str | None:
    packages = (cls.__module__.partition(".")[0] for cls in type(trainer).__mro__)
    return next((name for name in packages if name in ("sae_lens", "sparsify")), None)


@contextmanager
def _averaged_weights(optimizers: Iterable[Any]) -> Iterator[None]:
    """Use the averaged weights of Schedule-Free optimizers inside; the training weights are restored bit for bit."""
    schedule_free = [one for one in optimizers if getattr(one, "train_mode", False) and hasattr(one, "eval")]
    parameters = [p for one in schedule_free for group in one.param_groups for p in group["params"]]
    with torch.no_grad():
        training_weights = [p.detach().clone() for p in parameters]
        for one in schedule_free:
            one.eval()
        try:
            yield
        finally:
            for one in schedule_free:
                one.train()
            for parameter, value in zip(parameters, training_weights, strict=True):
                parameter.copy_(value)
