"""Measure whether a sparse autoencoder (SAE) preserves what a language model knows.

The package trains binary probes on a language model's activations and on an SAE's reconstruction of them, layer by
layer, and reports the difference with its uncertainty.

    import delta_selectivity as ds

    results = ds.evaluate("EleutherAI/pythia-160m", "EleutherAI/sae-pythia-160m-32k", ["gender"], layers=[3, 6])
    results.to_frame()

Names are loaded when they are first used: the import itself takes a few milliseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from delta_selectivity.api.callback import Callback
    from delta_selectivity.api.evaluate import WIKIDATA, evaluate
    from delta_selectivity.api.evaluator import Evaluator
    from delta_selectivity.api.loggers import CsvLogger, TensorBoardLogger, WandbLogger
    from delta_selectivity.api.results import Difference, Results
    from delta_selectivity.errors import RequestError
    from delta_selectivity.probing.arrays import probe_selectivity
    from delta_selectivity.saes import load_sae, wrap_sae
    from delta_selectivity.settings import Settings
    from delta_selectivity.tasks import load_task

_MODULES = {
    "WIKIDATA": "api.evaluate",
    "Callback": "api.callback",
    "CsvLogger": "api.loggers",
    "TensorBoardLogger": "api.loggers",
    "WandbLogger": "api.loggers",
    "evaluate": "api.evaluate",
    "Evaluator": "api.evaluator",
    "Difference": "api.results",
    "Results": "api.results",
    "RequestError": "errors",
    "probe_selectivity": "probing.arrays",
    "load_sae": "saes",
    "wrap_sae": "saes",
    "Settings": "settings",
    "load_task": "tasks",
}

__all__ = [
    "WIKIDATA",
    "Callback",
    "CsvLogger",
    "Difference",
    "Evaluator",
    "RequestError",
    "Results",
    "Settings",
    "TensorBoardLogger",
    "WandbLogger",
    "evaluate",
    "load_sae",
    "load_task",
    "probe_selectivity",
    "wrap_sae",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from delta_selectivity.system.provenance import program_version

        return program_version()
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
