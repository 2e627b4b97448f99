"""Write the reference data on SAEBench 0.6: the fields of its classes, and an example file of each.

    python -m venv ENV && ENV/bin/pip install pydantic && ENV/bin/pip install --no-deps sae-bench==0.6.0
    ENV/bin/python tests/saebench/make.py             # rewrite the files beside it
    ENV/bin/python tests/saebench/make.py check DIR   # load the output of `report.py --saebench DIR` with the classes

The figures in the files are made up. Nothing of this project is imported.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from sae_bench.evals.core import eval_output as core
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.sparse_probing import eval_output as probing
from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig

HERE = Path(__file__).resolve().parent
CLASSES = {"core": core.CoreEvalOutput, "sparse_probing": probing.SparseProbingEvalOutput}
WORDS = ("title", "description", "default", "ui_default_display")
ABOUT = {
    "eval_id": "11111111-2222-4333-8444-555555555555", "datetime_epoch_millis": 1_750_000_000_000,
    "sae_bench_commit_hash": "0123456789abcdef", "sae_lens_id": "blocks.4.hook_resid_post__trainer_0",
    "sae_lens_release_id": "some_release", "sae_lens_version": "6.28.0",
    "sae_cfg_dict": {"model_name": "pythia-160m-deduped", "hook_layer": 4, "d_sae": 4096},
}  # fmt: skip


def bare(schema: Any, is_names: bool = False) -> Any:
    """Return a JSON schema without descriptions: names, types and required entries."""
    if isinstance(schema, dict):
        kept = schema if is_names else {name: value for name, value in schema.items() if name not in WORDS}
        return {name: bare(value, name in ("properties", "$defs") and not is_names) for name, value in kept.items()}
    return [bare(value) for value in schema] if isinstance(schema, list) else schema


def examples() -> dict[str, Any]:
    """Return an example of each class."""
    accuracies = {"llm_test_accuracy": 0.91, "sae_test_accuracy": 0.89, "sae_top_1_test_accuracy": 0.71,
                  "sae_top_2_test_accuracy": 0.76, "sae_top_5_test_accuracy": 0.81}  # fmt: skip
    by_part = {
        who: {name: value for name, value in accuracies.items() if name.startswith(who)} for who in ("llm", "sae")
    }
    names = ("LabHC/bias_in_bios_class_set1_results", "gender_results")
    config = SparseProbingEvalConfig(model_name="pythia-160m-deduped", llm_dtype="float32")
    sparse = probing.SparseProbingEvalOutput(
        eval_config=config,
        eval_result_metrics=probing.SparseProbingMetricCategories(
            llm=probing.SparseProbingLlmMetrics(**by_part["llm"]), sae=probing.SparseProbingSaeMetrics(**by_part["sae"])
        ),
        eval_result_details=[probing.SparseProbingResultDetail(dataset_name=name, **accuracies) for name in names],
        **ABOUT,
    )
    return {"sparse_probing": sparse, "core": _core()}


def _core() -> Any:
    values = {"kl_div_score": 0.99, "kl_div_with_ablation": 8.5, "kl_div_with_sae": 0.08, "ce_loss_score": 0.985,
              "ce_loss_with_ablation": 12.1, "ce_loss_with_sae": 3.42, "ce_loss_without_sae": 3.3,
              "explained_variance": 0.86, "explained_variance_legacy": 0.83, "mse": 4.1, "cossim": 0.93, "l0": 79.5,
              "l1": 210.0, "frac_alive": 0.97, "total_tokens_eval_reconstruction": 40960,
              "total_tokens_eval_sparsity_variance": 256000}  # fmt: skip
    fields = core.CoreMetricCategories.__dataclass_fields__
    kinds = {name: getattr(core, field.type if isinstance(field.type, str) else field.type.__name__)
             for name, field in fields.items()}  # fmt: skip
    parts = {
        name: kind(**{metric: values.get(metric, 0.5) for metric in kind.__dataclass_fields__})
        for name, kind in kinds.items()
    }
    feature = dict.fromkeys(core.CoreFeatureMetric.__dataclass_fields__, 0.1)
    details = [core.CoreFeatureMetric(**{**feature, "index": index}) for index in range(2)]
    config = CoreEvalConfig(model_name="pythia-160m-deduped", compute_kl=True, compute_ce_loss=True)
    metrics = core.CoreMetricCategories(**parts)
    return core.CoreEvalOutput(eval_config=config, eval_result_metrics=metrics, eval_result_details=details, **ABOUT)


def main() -> None:
    """Write the files, or check a folder."""
    if sys.argv[1:2] == ["check"]:
        for path in sorted(Path(sys.argv[2]).rglob("*.json")):
            TypeAdapter(CLASSES[path.parent.name]).validate_python(json.loads(path.read_text(encoding="utf-8")))
            print(f"{path.parent.name}/{path.name}: loaded")
        return
    schemas = {name: bare(TypeAdapter(kind).json_schema()) for name, kind in CLASSES.items()}
    (HERE / "fields.json").write_text(json.dumps(schemas, indent=1) + "\n", encoding="utf-8")
    for name, output in examples().items():
        output.to_json_file(str(HERE / f"{name}_eval_results.json"), indent=1)


if __name__ == "__main__":
    main()
