"""Write results in SAEBench's format, and compare SAEBench's results with those of this program.

write(files, Path("results_saebench"))          # core/..._eval_results.json and sparse_probing/...
beside_text(own_evaluations(files), theirs)

SAEBench 0.6 has one file per evaluation and SAE, and an SAE has a single layer. Our values are therefore means over the
datasets of a layer. Its classes require every number of `core`; numbers that this program does not measure are -1.
Numbers for which its classes have no field (intervals, AUC, other k) are in the details and in
`eval_result_unstructured`.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from delta_selectivity.errors import RequestError
from delta_selectivity.probing.probe_statistics import K_SPARSE
from delta_selectivity.records import result_file
from delta_selectivity.records.figures import is_number
from delta_selectivity.records.saebench import CORE, NOT_COMPUTED, PROBING, Evaluation, evaluation
from delta_selectivity.reporting.groups import File, dataset_of, model_name
from delta_selectivity.reporting.names import elide_middle
from delta_selectivity.reporting.numbers import number
from delta_selectivity.reporting.results import by_sae, cells, is_baseline, mean
from delta_selectivity.reporting.tables import MAX_NAME, Row, aligned
from delta_selectivity.system.terminal import one_line

Json = dict[str, Any]

NAMESPACE = uuid.UUID("6f1d2f0a-9d0e-4f0b-8f5e-0a5d1c6f7b11")
SAEBENCH_KS = (1, 2, 5)  # of our k, those with fields in SAEBench
MAX_DATASETS = 20  # maximum number of common datasets to list
NOT_MEASURED = (
    "l2_norm_in", "l2_norm_out", "l2_ratio", "relative_reconstruction_bias", "freq_over_1_percent",
    "freq_over_10_percent", "normalized_freq_over_1_percent", "normalized_freq_over_10_percent",
    "average_max_encoder_cosine_sim", "average_max_decoder_cosine_sim",
)  # fmt: skip
NOTES = (
    "Written by Delta Selectivity, not by SAEBench. -1: not measured.",
    "core: computed on the texts of the tasks, not on OpenWebText. kl_div_* and ce_loss_* are in nats. Ablation "
    "replaces x with zeros at every token that counts. cossim, l0 and l1 are computed at the probed positions. mse is "
    "not given, because SAEBench sums it over the width.",
    "sparse_probing: accuracies are balanced accuracies of out-of-fold predictions, with folds by group.",
)


def outputs(files: Sequence[File]) -> Iterator[tuple[str, Json]]:
    """Yield the file name FOLDER/NAME and the content for each SAE, baseline and layer."""
    files_of = by_sae(files)
    for (name, files_of_sae), slug in zip(files_of.items(), result_file.distinct_slugs(list(files_of)), strict=True):
        by_layer: dict[int, list[File]] = {}
        for file in files_of_sae:
            for key in file[1]:
                if key.startswith("layer_"):
                    by_layer.setdefault(int(key.removeprefix("layer_")), []).append(file)
        for layer, at_layers_of in sorted(by_layer.items()):
            for eval_type, content in ((CORE, _core(at_layers_of, layer)), (PROBING, _probing(at_layers_of, layer))):
                if content is not None:
                    content["sae_lens_release_id"] = name
                    place = result_file.slug(str(content["sae_lens_id"]))
                    yield f"{eval_type}/{slug}_{place}_eval_results.json", content


def own_evaluations(files: Sequence[File]) -> list[Evaluation]:
    """Return our evaluations in the form of SAEBench's files; baselines are included only if there are no SAEs.

    Raises `RequestError` for impossible figures, such as more than 100 % of latents alive.
    """
    in_full = [file for file in files if not is_baseline(file[1])] or files
    evaluations = []
    for name, content in outputs(in_full):
        try:
            evaluations.append(evaluation(content, name))
        except ValueError as error:
            raise RequestError(f"{content['sae_lens_release_id']}: {error}") from error
    return evaluations


def at_layers_of(own: Sequence[Evaluation], theirs: Sequence[Evaluation]) -> list[Evaluation]:
    """Return our evaluations at the layers of `theirs`; all if there are none."""
    layers = {one.layer for one in theirs}
    return [one for one in own if one.layer in layers] or list(own)


def measured_by(one: Evaluation) -> str:
    """Return the name of the program that made an evaluation."""
    return "this program" if one.is_ours else "SAEBench"


def _core(files: Sequence[File], layer: int) -> Json | None:
    figures_of_files = [results[f"layer_{layer}"] for _, results in files]
    if not any(
        is_number(figures.get("fvu_whole")) for figures in figures_of_files
    ):  # a baseline without reconstruction
        return None

    def over(name: str) -> float | None:
        return mean(value for figures in figures_of_files if is_number(value := figures.get(name)))

    def total(name: str) -> int:
        return sum(int(value) for figures in figures_of_files if is_number(value := figures.get(name)))

    ce = {end: over(f"ce_{end}") for end in ("zero", "sae", "model")}
    kl = {end: over(f"kl_{end}") for end in ("zero", "sae")}
    loss_of_ablation = None if ce["zero"] is None or ce["model"] is None else ce["zero"] - ce["model"]
    fvu, dead = over("fvu_whole"), over("dead")
    not_measured = dict.fromkeys(NOT_MEASURED, NOT_COMPUTED)
    metrics = {
        "model_behavior_preservation": {
            "kl_div_score": _score(kl["zero"], kl["zero"], kl["sae"]),
            "kl_div_with_ablation": _or_not_computed(kl["zero"]),
            "kl_div_with_sae": _or_not_computed(kl["sae"]),
        },
        "model_performance_preservation": {
            "ce_loss_score": _score(loss_of_ablation, ce["zero"], ce["sae"]),
            "ce_loss_with_ablation": _or_not_computed(ce["zero"]),
            "ce_loss_with_sae": _or_not_computed(ce["sae"]),
            "ce_loss_without_sae": _or_not_computed(ce["model"]),
        },
        "reconstruction_quality": {
            "explained_variance": NOT_COMPUTED if fvu is None else 1 - fvu,
            "explained_variance_legacy": NOT_COMPUTED,
            "mse": NOT_COMPUTED,
            "cossim": _or_not_computed(over("cosine")),
        },
        "shrinkage": {name: not_measured[name] for name in NOT_MEASURED[:4]},
        "sparsity": {"l0": _or_not_computed(over("l0")), "l1": _or_not_computed(over("l1"))},
        "token_stats": {
            "total_tokens_eval_reconstruction": total("n_tokens_run"),
            "total_tokens_eval_sparsity_variance": total("n_tokens"),
        },
        "misc_metrics": {
            **{name: not_measured[name] for name in NOT_MEASURED[4:]},
            "frac_alive": NOT_COMPUTED if dead is None else 1 - dead,
        },
    }
    config = {"model_name": model_name(files), "llm_dtype": str(files[0][1]["_run"]["key"].get("dtype", ""))}
    config |= {"dataset": ", ".join(map(_dataset, files))}
    by_dataset = {
        _dataset(file): {name: value for name, value in figures.items() if not isinstance(value, dict)}
        for file, figures in zip(files, figures_of_files, strict=True)
    }
    return _output(CORE, files, layer, config, metrics, [], by_dataset)


def _probing(files: Sequence[File], layer: int) -> Json | None:
    details, by_task = [], {}
    for file in files:
        for at, probe, _, result in cells(file[1]):
            if at == layer and not result.get("reason"):
                name = _dataset(file) if probe == _dataset(file) else f"{_dataset(file)}/{probe}"
                details.append({"dataset_name": name, **_accuracies(result)})
                by_task[name] = {key: value for key, value in result.items() if key != "reason"}
    if not details:
        return None
    names = sorted({name for one in details for name in one if name.endswith("_accuracy")})
    means = {name: mean(one.get(name) for one in details) for name in names}
    metrics = {
        who: {name: value for name, value in means.items() if name.startswith(who) and "_16_" not in name}
        for who in ("llm", "sae")
    }
    key = files[0][1]["_run"]["key"]
    config: Json = {"model_name": model_name(files)}
    config |= {"random_seed": key.get("seed"), "llm_dtype": str(key.get("dtype", "")), "k_values": list(SAEBENCH_KS)}
    config |= {"dataset_names": [one["dataset_name"] for one in details]}
    return _output(PROBING, files, layer, config, metrics, details, by_task)


def _dataset(file: File) -> str:
    return dataset_of(file).removeprefix("wikidata_")


def _accuracies(result: Json) -> Json:
    """Return the fields of SAEBench's dataset details, each with its interval."""
    fields: Json = {}
    pairs = {"llm_test": "model", "sae_test": "latent", **{f"sae_top_{k}_test": f"k{k}" for k in K_SPARSE}}
    for theirs, key in pairs.items():
        known = {"accuracy": "sel", "auc": "auc", "accuracy_ci_low": "ci_low", "accuracy_ci_high": "ci_high"}
        fields |= {f"{theirs}_{a}": result[f"{key}_{b}"] for a, b in known.items() if f"{key}_{b}" in result}
    return fields


def _output(
    eval_type: str, files: Sequence[File], layer: int, config: Json, metrics: Json, details: list[Json], all_: Json
) -> Json:
    newest = max((file[1]["_run"] for file in files), key=lambda run: str(run["started"]))
    digests = "".join(str(file[1]["_run"]["results_sha256"]) for file in files)
    hookpoint = str(newest["key"].get("hookpoint") or "resid_post")
    version = newest.get("versions", {}).get("sae-lens")
    return {
        "eval_type_id": eval_type,
        "eval_config": config,
        "eval_id": str(uuid.uuid5(NAMESPACE, f"{eval_type} {layer} {digests}")),
        "datetime_epoch_millis": _millis(newest["started"]),
        "eval_result_metrics": metrics,
        "eval_result_details": details,
        "sae_bench_commit_hash": f"delta-selectivity {newest.get('commit') or ''}".strip(),
        "sae_lens_id": f"layers.{layer}.{hookpoint}",
        "sae_lens_release_id": None,
        "sae_lens_version": version if isinstance(version, str) else None,
        "sae_cfg_dict": {"model_name": model_name(files), "hook_layer": layer, "hook_point": hookpoint},
        "eval_result_unstructured": {"notes": list(NOTES), "delta_selectivity": all_},
    }


def _or_not_computed(value: float | None) -> float:
    return NOT_COMPUTED if value is None else value


def _score(loss_of_ablation: float | None, ablated: float | None, sae: float | None) -> float:
    """Return the share of the ablation's harm that the SAE avoids."""
    return (
        NOT_COMPUTED if not loss_of_ablation or ablated is None or sae is None else (ablated - sae) / loss_of_ablation
    )


def _millis(started: str) -> int:
    try:
        return max(0, int(datetime.fromisoformat(started).timestamp() * 1000))
    except (ValueError, OverflowError, OSError):
        return 0


def beside_text(own: Sequence[Evaluation], theirs: Sequence[Evaluation]) -> str:
    """Return a table for each kind of evaluation in `theirs`, and what prevents a comparison."""
    kinds = [core for core in (False, True) if any(one.is_core == core for one in theirs)]
    parts = [table_of(core, own, theirs) for core in kinds]
    return "\n\n".join([*map(aligned, parts), *(one_line(line) for line in caveats(own, theirs))])


def table_of(core: bool, own: Sequence[Evaluation], theirs: Sequence[Evaluation]) -> list[Row]:
    """Return the header and a line for each evaluation of the kind, ours (`here`) first; by layer."""
    columns = _CORE_COLUMNS if core else _PROBING_COLUMNS
    head = ("SAE", "measured by", "model", "layer", *([] if core else ["tasks"]), *columns)
    rows: list[Row] = [tuple(head)]
    for evaluations in (at_layers_of(own, theirs), theirs):
        chosen = [one for one in evaluations if one.is_core == core]
        for one in sorted(chosen, key=lambda one: -1 if one.layer is None else one.layer):
            tasks = [] if core else [str(len(one.tasks))]
            figures = (number(one.metrics.get(name), ".3f") for name in columns.values())
            place = "" if one.layer is None else str(one.layer)
            sae, model = (elide_middle(name, MAX_NAME) for name in (one.sae, one.model))
            rows.append((sae, measured_by(one), model, place, *tasks, *figures))
    return rows


_PROBING_COLUMNS: Mapping[str, str] = {
    "activations": "llm_test_accuracy", "all latents": "sae_test_accuracy",
    **{f"k = {k}": f"sae_top_{k}_test_accuracy" for k in SAEBENCH_KS},
}  # fmt: skip
_CORE_COLUMNS: Mapping[str, str] = {
    "L0": "l0", "explained variance": "explained_variance", "CE score": "ce_loss_score", "KL score": "kl_div_score",
    "CE of the model": "ce_loss_without_sae",
}  # fmt: skip


def caveats(own: Sequence[Evaluation], theirs: Sequence[Evaluation]) -> list[str]:
    """Return what prevents a comparison of the numbers, one sentence each."""
    lines = []
    models = [{one.model for one in side if one.model} for side in (own, theirs)]
    if models[0] and models[1] and {_last(name) for name in models[0]} != {_last(name) for name in models[1]}:
        lines.append(
            f"The models differ ({_listed(models[0])} here, {_listed(models[1])} in SAEBench's files): nothing can be "
            "compared."
        )
    layers = [{one.layer for one in side if one.layer is not None} for side in (own, theirs)]
    if layers[0] and layers[1] and not layers[0] & layers[1]:
        lines.append("The layers differ: compare only lines of the same layer.")
    if any(not one.is_core for one in theirs):
        names = [{_last(name) for one in side for name in one.tasks} for side in (own, theirs)]
        shared = _listed(names[0] & names[1]) if names[0] & names[1] else "none"
        lines.append(
            f"Tasks with the same name in both: {shared}. Means over different tasks cannot be compared, and means "
            "over the same tasks only roughly. SAEBench gives the accuracy on one test split, without an interval; its "
            "rows may share a person or a text with the training rows. This program gives the balanced accuracy of "
            "out-of-fold predictions, with folds by group; the CSV file has the intervals."
        )
    if any(one.is_core for one in theirs):
        lines.append(
            "The texts differ: this program uses those of the tasks, SAEBench mostly OpenWebText. The model's own loss "
            "therefore differs, and so do L0 and explained variance. Both scores are relative to zeros in place of x. "
            "L0 is computed at the probed positions here, and over all tokens in SAEBench. SAEBench before version 0.6 "
            "defined explained variance differently."
        )
    return lines


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].casefold()


def _listed(names: Iterable[str]) -> str:
    known = sorted(names)
    more = f" and {len(known) - MAX_DATASETS} more" if len(known) > MAX_DATASETS else ""
    return ", ".join(known[:MAX_DATASETS]) + more


def write(files: Sequence[File], folder: Path) -> int:
    """Write every file of `outputs`; returns their number. Raises OSError."""
    n = 0
    for name, content in outputs(files):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        result_file.write_json(path, content)
        n += 1
    return n
