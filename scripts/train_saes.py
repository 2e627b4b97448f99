"""Train SAEs of any language model on any folder of text: store activations once, then train many SAEs on them.

python -m scripts.train_saes harvest --model_name MODEL --text FOLDER --layers 5,15,25 --work_dir work
python -m scripts.train_saes train --work_dir work --saes topk-32,topk-64,gated-32 --output_directory saes

Text is a folder of .txt, .jsonl or .jsonl.xz files (JSON lines with `text`). Both stages resume an interrupted run. A
training can use any of the harvested layers and the kinds topk, batchtopk, matryoshka, jumprelu and gated. `KIND-K` has
K latents per token, exactly or on average, depending on the kind.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the stages use several threads themselves

import torch

from delta_selectivity.errors import RequestError
from delta_selectivity.models.language_model import open_model
from delta_selectivity.system.processor import cpu_count
from scripts.sae_training.harvest import Activations, HarvestSettings, harvest
from scripts.sae_training.kinds import KINDS, StepSettings
from scripts.sae_training.saving import save
from scripts.sae_training.training import Checkpoint, TrainSettings, train

log = logging.getLogger("train_saes")


def make_harvest(args: argparse.Namespace) -> None:
    """Run the model over the text once, and store the residual stream of some layers."""
    settings = HarvestSettings(
        args.layers, args.tokens, args.held_out_tokens, length=args.context, dtype=args.dtype, seed=args.seed
    )
    acts = harvest(open_model(args.model_name), settings, args.text, args.work_dir, args.threads)
    log.info("%s: %d tokens to train on, %d held out", args.work_dir, acts.tokens("train"), acts.tokens("held_out"))


def make_saes(args: argparse.Namespace) -> None:
    """Train SAEs on the harvest, save them, and measure the saved files on the held-out text."""
    acts = Activations.open(args.work_dir)
    layers = args.layers or tuple(acts.layers)
    step = StepSettings(batch=args.batch, lr=args.lr)
    settings = TrainSettings(args.saes, layers, args.d_sae, args.tokens or acts.tokens("train"), args.seed, step)
    trained = train(acts, settings, args.output_directory, args.threads, args.checkpoint_minutes)
    model = args.name or Path(str(acts.facts["model"])).name
    for sae in trained:
        folder, quality = save(sae, acts, settings, model, args.about, args.output_directory)
        log.info("%s layer %d: fvu %.4f  l0 %.2f  dead %.3f", folder, sae.layer, quality.fvu, quality.l0, quality.dead)
    Checkpoint(args.output_directory, settings, acts).remove()


def layer_list(text: str) -> tuple[int, ...]:
    """Parse a list of layers such as `5,15,25`."""
    return tuple(int(part) for part in text.split(","))


def sae_list(text: str) -> tuple[tuple[str, int], ...]:
    """Parse a list of SAEs such as `topk-32,gated-32`."""
    saes = []
    for part in text.split(","):
        kind, _, k = part.strip().rpartition("-")
        if kind not in KINDS or not k.isdecimal() or int(k) == 0:
            raise argparse.ArgumentTypeError(f"{part!r}: KIND-K is needed, such as topk-32; kinds: {', '.join(KINDS)}")
        saes.append((kind, int(k)))
    return tuple(saes)


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = root.add_subparsers(required=True)
    for name, stage in {"harvest": make_harvest, "train": make_saes}.items():
        sub = stages.add_parser(
            name, description=stage.__doc__, help=stage.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        sub.set_defaults(stage=stage)
        sub.add_argument("--work_dir", type=Path, required=True, help="folder of the activations")
        sub.add_argument("--threads", type=int, default=cpu_count(), help="worker threads")
        sub.add_argument("--seed", type=int, default=0, help="seed of text, batches and initial weights")
        if name == "harvest":
            sub.add_argument("--model_name", required=True, help="hub id or local folder of the model")
            sub.add_argument("--text", type=Path, required=True, help="folder of .txt, .jsonl and .jsonl.xz files")
            sub.add_argument("--layers", type=layer_list, required=True, help="layers, such as 5,15,25")
            sub.add_argument("--tokens", type=int, default=4_000_000, help="number of tokens to train on")
            sub.add_argument("--held_out_tokens", type=int, default=65_536, help="number of held-out tokens")
            sub.add_argument("--context", type=int, default=128, help="tokens per row, BOS included")
            sub.add_argument(
                "--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="dtype of the model"
            )
        else:
            sub.add_argument("--output_directory", type=Path, required=True, help="folder of the trained SAEs")
            sub.add_argument(
                "--saes", type=sae_list, required=True, help="SAEs to train, such as topk-32,topk-64,gated-32"
            )
            sub.add_argument("--layers", type=layer_list, help="some of the harvested layers; default: all")
            sub.add_argument("--d_sae", type=int, default=4096, help="number of latents")
            sub.add_argument("--tokens", type=int, help="tokens per SAE; default: the harvested tokens, once")
            sub.add_argument("--batch", type=int, default=1024, help="activations per step")
            sub.add_argument("--lr", type=float, default=2e-3, help="maximum learning rate of Adam")
            sub.add_argument("--checkpoint_minutes", type=float, default=10.0, help="minutes between checkpoints")
            sub.add_argument("--name", help="name of the model in config and card; default: that of its folder")
            sub.add_argument("--about", default="the text of a folder.", help="a sentence about the text, for the card")
    return root


def main() -> int:
    args = parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
    torch.set_num_threads(1)
    try:
        args.stage(args)
    except RequestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
