"""Families of SAEs whose order is known: snapshots of two trainings, close variants, and copies with other seeds.

All SAEs of a panel are trained on the same stored activations of one layer. With the same seed they have the same order
of batches and, if their widths agree, the same initialisation, so two recipes differ only in what their names say. The
training step is that of the demo (`scripts/demo_training/sae_training.py`).

    acts = corpus_activations(TINY_PYTHIA, corpus, seed=0)
    for step, weights in train(recipe, acts.train): ...
    sae = as_sae(recipe, weights)
"""

from __future__ import annotations

import json
import logging
import lzma
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from delta_selectivity.models.language_model import LanguageModel, Site, open_model
from delta_selectivity.saes import Sae, Threshold, TopK
from delta_selectivity.saes.coders import LinearCoder, fold_b_dec
from scripts.demo_training.corpus import Document
from scripts.demo_training.streams import TextMix, encode
from scripts.sae_training.harvest import HELD_OUT, TRAIN, Activations
from scripts.sae_training.kinds import KINDS, StepSettings, Weights, train_step
from scripts.sae_training.training import CALIBRATION_ROWS, at_l0

log = logging.getLogger(__name__)

LENGTH = 192  # tokens per row of training text, BOS included
TRAIN_ROWS = 4096  # 0.78 M activations
ROWS_AT_ONCE = 16
MAX_CHARACTERS = 4_000_000  # maximum characters that are read of each source of the corpus
HELD_OUT_TEXTS = 400
SETTINGS = StepSettings(batch=1024, dead_after=100_000)


@dataclass(frozen=True)
class Recipe:
    """The training settings of one SAE."""

    architecture: Literal["topk", "batchtopk"]
    k: int
    d_sae: int
    steps: int
    seed: int
    snapshots: tuple[int, ...] = ()  # steps after which a snapshot is kept, besides the last step

    @property
    def name(self) -> str:
        return f"{self.architecture}_k{self.k}_w{self.d_sae}_s{self.steps}_seed{self.seed}"


@dataclass(frozen=True)
class CorpusActivations:
    """One layer's residual stream on a text corpus, without BOS."""

    train: Tensor  # [tokens, d_in], in the model's own dtype
    held_out: Tensor  # [tokens, d_in], of the beginnings of texts that are not trained on
    held_out_text: Tensor  # int64 [tokens], the text of each token


@dataclass(frozen=True)
class Study:
    """A model, a layer, and the families of SAEs on which scores are compared."""

    model_name: str
    model: str  # as `open_model` accepts it
    layer: int
    rows: int  # per dataset: the program's `--shuffle_select_n`
    runs: tuple[int, ...]  # seeds of repeated measurements on all people; empty: only on the rows of one draw
    families: Mapping[str, tuple[Literal["topk", "batchtopk"], int, int]]  # name -> architecture, k, d_sae
    steps: int
    snapshots: tuple[int, ...]  # evenly spaced on a logarithmic scale
    dtype: str = "auto"  # of the model

    def member(self, family: str, seed: int) -> Recipe:
        """Return the recipe of a family. Seed 0 keeps snapshots."""
        architecture, k, d_sae = self.families[family]
        return Recipe(architecture, k, d_sae, self.steps, seed, self.snapshots if seed == 0 else ())


TINY_PYTHIA = Study(
    model_name="tiny-pythia",
    model=str(Path(__file__).resolve().parent.parent / "assets" / "tiny-pythia"),
    layer=3,  # of 0 to 5; the layer with the largest losses of the demo's SAEs
    rows=3000,
    runs=(1, 2, 3, 4, 5),
    families={"TopK, k 32": ("topk", 32, 1024), "BatchTopK, k 8": ("batchtopk", 8, 1024)},
    steps=800,
    snapshots=(13, 20, 32, 50, 80, 127, 201, 318, 505, 800),
)
SMOLLM2 = Study(
    model_name="smollm2-135m",
    model="smollm2-135m",
    layer=15,  # of 0 to 29
    rows=1000,
    runs=(),
    families={"TopK, k 32": ("topk", 32, 2048), "BatchTopK, k 16": ("batchtopk", 16, 2048)},
    steps=240,
    snapshots=(16, 24, 35, 51, 76, 112, 164, 240),
    dtype="bfloat16",
)
STUDIES = {study.model_name: study for study in (TINY_PYTHIA, SMOLLM2)}


def close_variants(base: Recipe) -> dict[str, tuple[Recipe, Recipe]]:
    """Return the change -> (the worse recipe, the better one)."""
    base = replace(base, snapshots=())
    return {
        "k x 7/8": (replace(base, k=base.k * 7 // 8), base),
        "width x 1.25": (base, replace(base, d_sae=base.d_sae * 5 // 4)),
        "10 % less training": (replace(base, steps=base.steps * 9 // 10), base),
    }


def harvested(acts: Activations, layer: int) -> CorpusActivations:
    """Return the activations of a layer of `scripts/train_saes.py harvest`; held-out texts are rows of tokens."""
    activations = {part: [acts.read(part, i, layer) for i in range(acts.shards(part))] for part in (TRAIN, HELD_OUT)}
    rows = [acts.text_rows(HELD_OUT, i) for i in range(acts.shards(HELD_OUT))]
    return CorpusActivations(torch.cat(activations[TRAIN]), torch.cat(activations[HELD_OUT]), torch.cat(rows))


def corpus_activations(study: Study, corpus: Path, seed: int) -> CorpusActivations:
    """Run the texts of `corpus` (JSON lines, xz: `text`, and `source` if there are several kinds).

    All kinds have equal shares of the training rows. One document in 100, by hash, is held out.
    """
    info = open_model(study.model)
    site = Site(study.layer, "resid_post")
    model = info.load([site], "cpu", info.choose_dtype(study.dtype, "cpu"))
    train, held_out = _texts_by_source(corpus, seed)
    ids = encode(train, info.tokenizer)
    mix = TextMix(ids, {}, dict.fromkeys(ids, 1.0), seed)
    bos = info.tokenizer.bos_token_id
    parts = []
    for _ in range(TRAIN_ROWS // ROWS_AT_ONCE):
        rows = mix.batch(ROWS_AT_ONCE, LENGTH)
        parts.append(model.activations(rows)[site][rows != bos])
    beginnings = [part[: LENGTH - 1] for part in encode({"": held_out}, info.tokenizer)[""]]
    kept = [_after_bos(model, site, torch.tensor([bos, *part.tolist()])) for part in beginnings if len(part)]
    text = torch.repeat_interleave(torch.arange(len(kept)), torch.tensor([len(part) for part in kept]))
    return CorpusActivations(torch.cat(parts), torch.cat(kept), text)


def _texts_by_source(corpus: Path, seed: int) -> tuple[dict[str, list[str]], list[str]]:
    """Return training texts of each source, up to `MAX_CHARACTERS`, and at most `HELD_OUT_TEXTS` held-out texts."""
    with lzma.open(corpus, "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    random.Random(seed).shuffle(records)
    train: defaultdict[str, list[str]] = defaultdict(list)
    held_out: list[str] = []
    size: defaultdict[str, int] = defaultdict(int)
    for record in records:
        source, text = record.get("source", ""), record["text"]
        if Document(source, "", text).held_out:
            held_out.append(text)
        elif size[source] < MAX_CHARACTERS:
            train[source].append(text)
            size[source] += len(text)
    return dict(train), held_out[:HELD_OUT_TEXTS]


def _after_bos(model: LanguageModel, site: Site, ids: Tensor) -> Tensor:
    """Return [tokens - 1, d_in] for one text's ids [tokens], which begin with BOS."""
    return model.activations(ids[None])[site][0, 1:]


def train(recipe: Recipe, acts: Tensor) -> Iterator[tuple[int, Weights]]:
    """Train on acts `[tokens, d_in]`; yield (step, weights for raw activations) at every snapshot and at the end."""
    torch.set_num_threads(1)
    mean = acts.float().mean(0)
    scale = torch.stack([(part.float() - mean).square().sum() for part in acts.split(65536)]).sum()
    scale = (scale / acts.numel()).sqrt()
    start = torch.Generator().manual_seed(recipe.seed)
    sae = KINDS[recipe.architecture](0, recipe.k, mean / scale, recipe.d_sae, start)
    optimiser = torch.optim.Adam(sae.parameters(), lr=SETTINGS.lr, fused=True)
    batches = _batches(len(acts), SETTINGS.batch, recipe.seed)
    began, loss = time.monotonic(), float("nan")
    for step in range(1, recipe.steps + 1):
        progress = (step - 1) / recipe.steps
        optimiser.param_groups[0]["lr"] = SETTINGS.lr * SETTINGS.rate(progress, 1 / recipe.steps)
        loss = train_step(sae, optimiser, acts[next(batches)].float() / scale, SETTINGS)
        if step in recipe.snapshots or step == recipe.steps:
            weights = sae.unscaled(float(scale))
            if recipe.architecture == "batchtopk":
                weights |= at_l0(weights, "batchtopk", recipe.k, acts[:CALIBRATION_ROWS].float())
            yield step, weights
    log.info("%s: %.0f s, loss %.4f", recipe.name, time.monotonic() - began, loss)


def _batches(n: int, size: int, seed: int) -> Iterator[Tensor]:
    """Yield indices of shuffled batches, epoch after epoch."""
    order = torch.Generator().manual_seed(seed)
    while True:
        yield from (part for part in torch.randperm(n, generator=order).split(size) if len(part) == size)


def as_sae(recipe: Recipe, weights: Weights) -> Sae:
    """Return the SAE as an object of the package."""
    d_sae, d_in = weights["W_enc"].shape
    bias = fold_b_dec(weights["W_enc"], weights["b_enc"], weights["b_dec"])
    selection: TopK | Threshold = TopK(recipe.k)
    if recipe.architecture == "batchtopk":
        selection = Threshold(weights["threshold"])
    coder = LinearCoder(weights["W_enc"], bias, weights["W_dec"], weights["b_dec"], selection)
    return Sae(recipe.name, 0, "resid_post", d_in, d_sae, recipe.k, recipe.architecture, coder)
