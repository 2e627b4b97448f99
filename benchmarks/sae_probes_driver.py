"""Run `sae-probes` 0.4.2 on a local model and SAE, in an environment of its own, and print its seconds as JSON.

    python -m benchmarks.sae_probes_driver MODEL SAE --hooks 0,5 --tasks 64_wikidata_occupation_isresearcher

With `--figures`, print the package's figures of k-sparse probes (L2) instead. With `--rows FILE` (CSV with the columns
dataset, text, label), the package uses those rows of a dataset instead of its own.

Nothing of this project is imported: `bench_end_to_end.py`, `bench_suite.py` and `k_sparse_agreement.py` start this
file with the interpreter of that environment. The package's functions are called as in its README. Only the loading of
the model is replaced, by one from a folder, because the benchmark is offline. With `--at_its_best`, the activations of
all hooks come from one pass, otherwise hook by hook.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODEL_NAME = "local"
LONGEST = 1024  # maximum tokens of a text in the package; rotary positions have no limit


def loader(folder: str) -> Any:
    """Return a loader of the folder's weights, in place of `HookedTransformer.from_pretrained_no_processing`."""
    import torch
    from transformer_lens import HookedTransformer
    from transformer_lens import loading_from_pretrained as loading
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def load(_name: str, device: str = "cpu", **_: Any) -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config = loading.get_pretrained_model_config(folder, dtype=torch.float32, device=device)
        config.n_ctx = max(config.n_ctx, LONGEST)
        hooked = HookedTransformer(config, tokenizer=AutoTokenizer.from_pretrained(folder))
        hooked.load_and_process_state_dict(
            loading.get_pretrained_state_dict(folder, config, model),
            fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False,
        )  # fmt: skip
        return hooked

    return load


def run(args: argparse.Namespace, work: Path) -> dict[str, dict[str, float]]:
    """Return the seconds of `forward` and `probes` by layer; of one layer `all` if activations come from one pass."""
    from sae_lens import SAE
    from sae_probes import generate_model_activations, run_baseline_evals, run_sae_evals
    from transformer_lens import HookedTransformer

    HookedTransformer.from_pretrained_no_processing = loader(args.model)  # type: ignore[method-assign]
    hooks = {layer: f"blocks.{layer}.hook_resid_post" for layer in args.hooks.split(",")}
    tasks = args.tasks.split(",")
    passes = {"all": list(hooks.values())} if args.at_its_best else {layer: [hook] for layer, hook in hooks.items()}
    seconds: dict[str, dict[str, float]] = {"forward": {}, "probes": {}}
    clock = time.process_time if args.cpu_time else time.perf_counter
    for name, together in passes.items():
        start = clock()
        generate_model_activations.ensure_dataset_activations(MODEL_NAME, tasks, together, work, device="cpu")
        seconds["forward"][name] = clock() - start
    shared: Any = {"model_name": MODEL_NAME, "setting": "normal", "datasets": tasks, "device": "cpu"}
    for layer, hook in hooks.items() if not args.forward_only else ():
        start = clock()
        shared |= {"hook_name": hook, "results_path": work / "results", "model_cache_path": work}
        run_baseline_evals(**shared)
        for i, folder in enumerate(args.sae.split(",")):
            sae = SAE.load_from_disk(str(Path(folder) / hook), device="cpu")
            own = {**shared, "results_path": work / f"results_{i}"}  # otherwise the second SAE would count as done
            run_sae_evals(sae=sae, reg_type="l1", ks=[1, 16], **own)
        seconds["probes"][layer] = clock() - start
    return seconds


def replace_rows(rows: Path, work: Path) -> None:
    """Replace the rows of the package's datasets by these, in files of its own format."""
    import pandas as pd
    from sae_probes import generate_model_activations, generate_sae_activations, run_baselines, utils_data

    evals: Any = sys.modules["sae_probes.run_sae_evals"]  # the package's own name for it is the name of the function
    folder = work / "data"
    (folder / "cleaned_data").mkdir(parents=True)
    master = "probing_datasets_MASTER.csv.zst"
    (folder / master).write_bytes((utils_data.DATA_PATH / master).read_bytes())
    for name, own in pd.read_csv(rows).groupby("dataset"):
        table = own.rename(columns={"text": "prompt", "label": "target"})[["prompt", "target"]]
        table.to_csv(folder / "cleaned_data" / f"{name}.csv.zst", index=False, compression="zstd")
        for module in (generate_sae_activations, run_baselines, evals):
            module.DATASET_SIZES[name] = len(own)  # the package reads it once, at its import
    # The package looks datasets up by tag, and some of its own tags differ from its file names.
    utils_data.read_numbered_dataset_df = lambda name: pd.read_csv(folder / "cleaned_data" / f"{name}.csv.zst")
    for module in (utils_data, generate_model_activations):
        module.DATA_PATH = folder


def figures(args: argparse.Namespace, work: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the package's figures of each task at one hook: for each k, AUC, accuracy, chosen latents and C."""
    from sae_lens import SAE
    from sae_probes import run_sae_evals
    from transformer_lens import HookedTransformer

    HookedTransformer.from_pretrained_no_processing = loader(args.model)  # type: ignore[method-assign]
    hook, found, chosen = f"blocks.{args.hooks}.hook_resid_post", {}, []
    module: Any = sys.modules["sae_probes.run_sae_evals"]  # the package's own name for it is the name of the function
    find = module.find_best_reg

    def find_and_note(**options: Any) -> Any:
        best = find(**options)
        chosen.append(float(best.classifier.C))
        return best

    module.find_best_reg = find_and_note
    for task in args.tasks.split(","):
        run_sae_evals(
            sae=SAE.load_from_disk(str(Path(args.sae) / hook), device="cpu"), model_name=MODEL_NAME, hook_name=hook,
            reg_type="l2", setting="normal", ks=[1, 2, 5, 16], datasets=[task], device="cpu",
            results_path=work / "results", model_cache_path=work,
        )  # fmt: skip
        (path,) = (work / "results").rglob(f"{task}_*.json")
        kept = ("k", "test_auc", "test_acc", "indices")
        by_k = json.loads(path.read_text(encoding="utf-8"))
        cs = chosen[-len(by_k) :]
        found[task] = [{name: one[name] for name in kept} | {"C": c} for one, c in zip(by_k, cs, strict=True)]
    return found


def main() -> int:
    """Run, and redirect everything that the package prints to stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a Hugging Face model that TransformerLens knows")
    parser.add_argument("sae", help="folder with an SAE Lens folder for each hook; several with commas")
    parser.add_argument("--hooks", required=True, help="layers, separated by commas")
    parser.add_argument("--tasks", required=True, help="names of the package's datasets, separated by commas")
    parser.add_argument("--at_its_best", action="store_true", help="activations of all hooks in one pass beforehand")
    parser.add_argument("--rows", type=Path, help="CSV of rows to use instead of the package's own")
    parser.add_argument("--forward_only", action="store_true", help="no probes")
    parser.add_argument("--cpu_time", action="store_true", help="CPU seconds")
    parser.add_argument("--figures", action="store_true", help="print its figures at one hook instead of seconds")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="delta-selectivity-") as work, contextlib.redirect_stdout(sys.stderr):
        if args.rows is not None:
            replace_rows(args.rows, Path(work))
        found = figures(args, Path(work)) if args.figures else run(args, Path(work))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
