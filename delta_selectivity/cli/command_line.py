"""The command line: the flags of the contract, their help, and the `RunConfig` they make."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NoReturn

from delta_selectivity.errors import RequestError
from delta_selectivity.settings import BASELINES, BOS, DTYPES, POSITIONS, PROBE_BACKENDS, VIEWS, RunConfig, parse_layers

ASSETS = Path(__file__).resolve().parents[2] / "assets"
DEMO_MODEL = ASSETS / "tiny-pythia"
DEMO_SAES = (ASSETS / "tiny-pythia-saes-k8", ASSETS / "tiny-pythia-saes-k32")

EXAMPLES = """\
examples:
  python main.py
      the bundled demo on the CPU: 5 datasets, all layers, two SAEs; results/ and tables
  python main.py --model_name EleutherAI/pythia-160m --sae_name EleutherAI/sae-pythia-160m-32k \\
      --datasets 0,1,2,3,4 --layers 0,1,2,3 --device1 cuda:0 --device2 cuda:1 --batch_size 256
      four layers of Pythia-160M, model on one GPU and probes on the other
  python main.py --dataset_file my_concept.csv
      your own task: columns text and label, optionally group, start, end
  python main.py inspect --sae_name my_sae --model_name EleutherAI/pythia-160m
      what an SAE is, and how well it fits each layer and hook point
  python report.py results --worst_first
      the tables again, largest losses on top

exit codes: 0 everything asked for is on disk; 1 the run failed (what finished is on disk, the same command goes on
from there); 2 the request was wrong; 130 interrupted
"""


Task = Literal["measure", "inspect", "list"]


class _Parser(argparse.ArgumentParser):
    """One line for a wrong flag, like every other wrong request."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message} (see --help)")


def build_parser() -> argparse.ArgumentParser:
    """The contract's flags."""
    parser = _Parser(
        prog="main.py",
        description="Does a Sparse Autoencoder keep what a language model knows? Trains binary probes on the model's "
        "activations and on the SAE's reconstruction of them, layer by layer, and reports the difference.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("task", nargs="?", choices=("inspect",), help="inspect: print what the SAEs are and how well "
        "they fit each hook point of the model, and measure nothing")  # fmt: skip
    add = parser.add_argument_group("what to measure").add_argument
    add(
        "--model_name",
        default=str(DEMO_MODEL),
        help="hub id or local folder of a Hugging Face model (the bundled demo)",
    )
    add("--revision", help="branch, tag or commit of a hub model, such as Pythia's step3000 (main)")
    add("--trust_remote_code", action="store_true", help="run code that comes with the model (off)")
    add("--sae_name", default=None, help="one or several, with commas: hub id, local folder, release/sae_id of SAE "
        "Lens, a release alone, or a pattern (folder/*, release/layer_*/width_16k/*); several share one forward pass "
        "(the bundled demo's two, with the bundled model)")  # fmt: skip
    add("--datasets", default=None, help="indices or names, with commas: 0 gender, 1 occupation, 2 politics, "
        "3 athlete, 4 is_alive (all)")  # fmt: skip
    add("--list_datasets", action="store_true", help="print the datasets with rows, people and class balance, and end")
    add("--dataset_file", metavar="FILE|OWNER/NAME", help="your own task: CSV, JSONL, Parquet, a `datasets` folder, or "
        "a dataset on the Hub (owner/name or owner/name:config) with columns text and label, optionally group (never "
        "split over folds), start, end (characters to probe), task")  # fmt: skip
    add("--dataset_split", help="which split of it (train, or the only one)")
    add("--dataset_columns", default="", metavar="text=X,label=Y,...", help="how it calls the columns (as above)")
    add("--data_dir", type=Path, help="folder with the Wikidata datasets of Gurnee et al. 2023, probed at their own "
        "name positions (the bundled task data)")  # fmt: skip
    add("--layers", default="all", help="0,1,2 or 0-11 or all; every layer that the SAE has (all)")
    add("--hookpoint", help="resid_post, resid_pre, mlp_out, attn_out, mlp_in, attn_in, z, or a module path with "
        "<layer> (with :in its input), in our or SAE Lens's words (what the SAE says of itself)")  # fmt: skip
    add("--positions", default="last", help=f"{', '.join(POSITIONS)}: last token of the name, mean over the name, "
        "all its tokens weighted 1/len (%(default)s)")  # fmt: skip
    add("--bos", default="auto", help=f"{', '.join(BOS)}: whether texts begin with BOS, and whether it counts in "
        "the whole-text figures (as in training; where that is not known, excluded if the model has one)")  # fmt: skip
    add(
        "--shuffle_select_n", type=int, help="at most this many rows per dataset, drawn by seed, classes balanced (all)"
    )
    add("--views", default="model,sae", help=f"views to probe: model and sae always; error adds what the SAE lost, "
        f"latents its codes ({', '.join(VIEWS)})")  # fmt: skip
    add("--baselines", nargs="?", const="all", default="", help="measure these beside the SAEs, in the folder "
        f"baselines: {', '.join(BASELINES)}; name some with commas, or give the flag alone for all (off)")  # fmt: skip
    add = parser.add_argument_group("how to measure it").add_argument
    add("--folds", type=int, default=5, help="folds of the cross-validation, never splitting a person (%(default)s)")
    add("--repeats", type=int, default=5, help="partitions into folds (%(default)s)")
    add("--seed", type=int, default=0, help="of the partitions and of --shuffle_select_n (%(default)s)")
    add("--epsilon", type=float, default=0.02, help="a delta_sel whose 90 %% interval lies within +-this counts as "
        "preserved (%(default)s)")  # fmt: skip
    add("--probe", default="auto", help=f"backend: {', '.join(PROBE_BACKENDS)} (%(default)s)")
    add("--dtype", default="auto", help=f"of the model, {', '.join(DTYPES)}: auto is bfloat16 for a model saved "
        "in it, else float32; SAEs compute in float32, probes in float64 (%(default)s)")  # fmt: skip
    add = parser.add_argument_group("where to run it, and where it goes").add_argument
    add("--output_directory", type=Path, default=Path("results"), help="(./%(default)s)")
    add("--device1", help="model and SAE (cuda:0 if there is one, else cpu)")
    add("--device2", help="probes (cuda:1 if there is one, else as device1)")
    add("--batch_size", type=int, help="texts in a forward pass (by free memory); halved on out-of-memory")
    add("--queue_gb", type=float, default=2.0, help="memory for rows between the threads; collected rows beyond it are "
        "kept in temporary files (%(default)s)")  # fmt: skip
    add("--cache_dir", type=Path, help="keep the model's activations and the probes fitted on them there: another SAE "
        "on the same texts needs no forward pass, and no probes but its own (not kept)")  # fmt: skip
    add("--cache_gb", type=float, default=50.0, help="how much --cache_dir holds in all, of whatever models; what was "
        "read longest ago goes (%(default)s)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace result files made with other settings")
    add("--force", action="store_true", help="measure an SAE although the check before the run finds that it fits "
        "another place, normalisation or BOS setting far better")  # fmt: skip
    add("--quiet", action="store_true", help="no progress bars, no tables; warnings stay")
    add("--verbose", action="store_true", help="log what happens, and the traceback of every failure")
    return parser


def parse_config(argv: Sequence[str]) -> tuple[RunConfig, Task]:
    """The command line as a `RunConfig`, and what is to be done with it."""
    asked = build_parser().parse_args(argv)
    task: Task = "inspect" if asked.task == "inspect" else "list" if asked.list_datasets else "measure"
    from delta_selectivity.tasks import parse_columns, parse_dataset_names

    own_file_alone = asked.dataset_file is not None and asked.datasets is None
    sae_names: str | None = asked.sae_name
    if sae_names is None:
        if asked.model_name != str(DEMO_MODEL):
            raise RequestError("--model_name without --sae_name: say which SAE to measure")
        sae_names = ",".join(map(str, DEMO_SAES))
    device1, device2 = _choose_devices(asked.device1, asked.device2)
    config = RunConfig(
        model_name=asked.model_name,
        revision=asked.revision,
        trust_remote_code=asked.trust_remote_code,
        sae_names=tuple(name.strip() for name in sae_names.split(",") if name.strip()),
        datasets=() if own_file_alone else parse_dataset_names(asked.datasets or "0,1,2,3,4"),
        dataset_file=asked.dataset_file,
        dataset_split=asked.dataset_split,
        dataset_columns=parse_columns(asked.dataset_columns),
        data_dir=asked.data_dir,
        layers=parse_layers(asked.layers),
        hookpoint=asked.hookpoint,
        positions=asked.positions,
        bos=asked.bos,
        output_directory=asked.output_directory.expanduser(),
        device1=device1,
        device2=device2,
        batch_size=asked.batch_size,
        shuffle_select_n=asked.shuffle_select_n,
        probe=asked.probe,
        views=_parse_views(asked.views),
        baselines=_parse_baselines(asked.baselines),
        epsilon=asked.epsilon,
        dtype=asked.dtype,
        folds=asked.folds,
        repeats=asked.repeats,
        seed=asked.seed,
        queue_gb=asked.queue_gb,
        cache_dir=None if asked.cache_dir is None else asked.cache_dir.expanduser(),
        cache_gb=asked.cache_gb,
        overwrite=asked.overwrite,
        force=asked.force,
        quiet=asked.quiet,
        verbose=asked.verbose,
    )
    return config, task


def _parse_views(spec: str) -> tuple[str, ...]:
    """Each view once, in the one order that a record knows; model and sae among them."""
    asked = {"model", "sae", *(view.strip() for view in spec.split(",") if view.strip())}
    return (*(view for view in VIEWS if view in asked), *sorted(asked.difference(VIEWS)))


def _parse_baselines(spec: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in spec.split(",") if name.strip()))
    return BASELINES if names == ("all",) else names


def _choose_devices(device1: str | None, device2: str | None) -> tuple[str, str]:
    """What was asked for, checked to be there; else what the machine has."""
    import torch

    n_gpus = torch.cuda.device_count()
    device1 = device1 or ("cuda:0" if n_gpus else "cpu")
    device2 = device2 or ("cuda:1" if n_gpus > 1 and device1 != "cuda:1" else device1)
    for flag, name in (("--device1", device1), ("--device2", device2)):
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise RequestError(f"{flag} {name!r} is no device: use cpu, cuda:0, cuda:1, ...") from error
        if device.type not in {"cpu", "cuda"}:
            raise RequestError(f"{flag} {name!r}: only cpu and cuda devices are supported")
        if device.type == "cuda" and (device.index or 0) >= n_gpus:
            raise RequestError(
                f"{flag} {name}: this machine has {n_gpus or 'no'} CUDA device{'s' if n_gpus > 1 else ''}"
            )
    return device1, device2
