"""Make the bundled demo: a tokenizer, a tiny Pythia that knows about people, and SAEs in two formats.

    python -m scripts.train_demo tokenizer --shared ../shared
    python -m scripts.train_demo model --shared ../shared --minutes 60
    python -m scripts.train_demo saes --shared ../shared --minutes 15
    python -m scripts.train_demo card

The text and the tables of people for the training are not part of the project (`assets/tiny-pythia/README.md` describes
them). Every stage is seeded; how far the timed stages get depends on the machine.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the stages use several threads themselves

import torch
from transformers import AutoTokenizer, GPTNeoXForCausalLM

from scripts.demo_training.cards import model_card, sae_card
from scripts.demo_training.language_model import ModelSettings, train_model
from scripts.demo_training.sae_files import (
    error_in_sae_lens,
    error_in_sparsify,
    sae_lens_topk,
    write_sae_lens,
    write_sparsify,
)
from scripts.demo_training.sae_training import SaeSettings, residual_stream, train_saes, without_bos
from scripts.demo_training.streams import NATURAL_SHARES, SHARES, load_mix, texts_by_source
from scripts.demo_training.tokenizer import save_tokenizer, train_tokenizer

ASSETS = Path(__file__).resolve().parent.parent / "assets"
MODEL = "tiny-pythia"
VOCAB_SIZE = 8192
MAX_LENGTH = 512
HELD_OUT_ROWS = 160  # rows for measuring the quality of the SAEs
SPARSIFY_K, SAE_LENS_K = 8, 32

log = logging.getLogger("train_demo")


def make_tokenizer(args: argparse.Namespace) -> None:
    """Train a byte-level BPE. Congress text counts a third, because its abbreviations would fill the vocabulary."""
    train, _ = texts_by_source(args.shared, args.seed)
    train["congress-bioguide"] = train["congress-bioguide"][::3]
    train["statements"] = train["statements"][::4]
    tokenizer = train_tokenizer((text for texts in train.values() for text in texts), VOCAB_SIZE, MAX_LENGTH)
    save_tokenizer(tokenizer, args.assets / MODEL)


def make_model(args: argparse.Namespace) -> None:
    """Train the language model, for `--minutes` of wall-clock time."""
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.assets / MODEL)
    mix = load_mix(args.shared, tokenizer, SHARES, args.seed)
    log.info("training tokens by source: %s", {name: source.tokens for name, source in mix.sources.items()})
    settings = ModelSettings(minutes=args.minutes, seed=args.seed, workers=args.threads)
    facts = train_model(mix, tokenizer, settings, args.assets / MODEL, args.snapshots)
    log.info("model: %s", facts)


def make_saes(args: argparse.Namespace) -> None:
    """Train all SAEs of the model, for `--minutes`, and read each folder back with its own library."""
    folder = args.model or args.assets / MODEL
    model = GPTNeoXForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    mix = load_mix(args.shared, AutoTokenizer.from_pretrained(folder), NATURAL_SHARES, args.seed)
    settings = SaeSettings(minutes=args.minutes, seed=args.seed, ks=(SPARSIFY_K, SAE_LENS_K), workers=args.threads)
    rows = mix.validation(settings.length)
    rows = rows[:: max(1, len(rows) // HELD_OUT_ROWS)]
    bos = model.config.bos_token_id
    with residual_stream(model) as residuals:
        saes, scale, quality, tokens = train_saes(residuals, bos, mix, rows, settings)
        acts = without_bos(residuals(rows[:4]), rows[:4], bos)
    held_out = int((rows != bos).sum())

    sparsify, sae_lens = (args.assets / f"{MODEL}-saes-k{k}" for k in settings.ks)
    for sae in saes:
        weights, x = sae.unscaled(scale[sae.layer].item()), acts[sae.layer]
        if sae.k == SPARSIFY_K:
            target = sparsify / f"layers.{sae.layer}"
            write_sparsify(target, weights, sae.k)
            error = error_in_sparsify(target, weights, sae.k, x)
        else:
            hook = f"blocks.{sae.layer}.hook_resid_post"
            target = sae_lens / hook
            write_sae_lens(target, weights, sae_lens_topk(sae.k), sae_lens_metadata(hook, settings, tokens))
            error = error_in_sae_lens(target, weights, sae.k, x)
        log.info("%s: differs from its own library by %.1e of the largest entry", target, error)
    for library, target, k in (("sparsify", sparsify, SPARSIFY_K), ("sae_lens", sae_lens, SAE_LENS_K)):
        card = sae_card(library, k, settings.d_sae, args.minutes, tokens, held_out, quality)
        (target / "README.md").write_text(card)
    for q in quality:
        log.info("layer %d k %d: fvu %.4f  l0 %.2f  dead %.3f", q.layer, q.k, q.fvu, q.l0, q.dead)


def sae_lens_metadata(hook: str, settings: SaeSettings, tokens: int) -> dict[str, object]:
    return {
        "model_name": MODEL,
        "hook_name": hook,
        "model_from_pretrained_kwargs": {
            "fold_ln": False,
            "center_writing_weights": False,
            "center_unembed": False,
        },
        "context_size": settings.length,
        "prepend_bos": True,
        "exclude_special_tokens": True,
        "training_tokens": tokens,
    }


def make_card(args: argparse.Namespace) -> None:
    """Write the model's README from its `training.json` (those of the SAEs are written with them)."""
    folder = args.assets / MODEL
    facts = json.loads((folder / "training.json").read_text())
    (folder / "README.md").write_text(model_card(facts))


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root.add_argument("--threads", type=int, default=2, help="worker threads")
    stages = root.add_subparsers(required=True)
    timed = {"model": 60.0, "saes": 15.0}  # minutes
    for name, stage in {
        "tokenizer": make_tokenizer, "model": make_model, "saes": make_saes, "card": make_card
    }.items():  # fmt: skip
        sub = stages.add_parser(name, help=stage.__doc__)
        sub.set_defaults(stage=stage)
        sub.add_argument("--assets", type=Path, default=ASSETS, help="folder of the bundled model and SAEs")
        sub.add_argument("--shared", type=Path, default=Path("../shared"), help="folder of corpus and people")
        sub.add_argument("--seed", type=int, default=0)
        if name in timed:
            sub.add_argument("--minutes", type=float, default=timed[name], help="wall-clock time of the training loop")
        if name == "model":
            sub.add_argument("--tokenizer", type=Path, help="tokenizer folder; default: the one beside the model")
            sub.add_argument("--snapshots", type=Path, help="folder for snapshots of the model in training")
        if name == "saes":
            sub.add_argument("--model", type=Path, help="model folder; default: the bundled one")
    return root


def main() -> None:
    args = parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
    torch.set_num_threads(1)
    args.stage(args)


if __name__ == "__main__":
    main()
