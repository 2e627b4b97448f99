"""Run a model over text once and store the residual stream of some layers on disk, in shards.

    harvest(info, settings, text_folder, work_folder)       # resumes an interrupted run
    acts = Activations.open(work_folder)
    acts.read("train", 3, layer=15)                         # [tokens, d_in], bfloat16

BOS and attention sinks (with a norm above 10 times the median) are excluded: their activations are outliers that would
take latents away from words. A token that is a sink at one layer is excluded at all layers, so all layers have the same
tokens.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from delta_selectivity.errors import RequestError
from delta_selectivity.models.language_model import LanguageModel, ModelInfo, Site
from delta_selectivity.run.reconstruction import SiteScale
from delta_selectivity.system.bars import open_bar
from delta_selectivity.system.whole_file import replacing
from scripts.sae_training.text import choose_texts, token_rows

log = logging.getLogger(__name__)

TRAIN, HELD_OUT = "train", "held_out"
ROW = "row"  # entry of a shard, besides its layers


@dataclass(frozen=True)
class HarvestSettings:
    """Settings of a harvest; stored beside its shards, which cannot be used with other settings."""

    layers: tuple[int, ...]
    tokens: int
    held_out_tokens: int = 65_536
    length: int = 128  # tokens per row, BOS included
    dtype: str = "auto"
    seed: int = 0
    rows: int = 16  # per forward pass
    shard_rows: int = 256
    hookpoint: str = "resid_post"


@dataclass(frozen=True)
class Scale:
    """Mean and scale of one layer's activations, from the first shard."""

    mean: Tensor  # float32 [d_in]
    deviation: float  # root mean square of x - mean, over tokens and coordinates
    norm_limit: float  # maximum norm of a token that is not a sink


@dataclass(frozen=True)
class Activations:
    """The shards of a complete harvest."""

    folder: Path
    facts: Mapping[str, Any]  # of the model, the text and the settings
    scales: Mapping[int, Scale]  # by layer

    @classmethod
    def open(cls, folder: Path) -> Activations:
        """Open a complete harvest. Raises `RequestError` if there is none."""
        if not (folder / "harvest.json").exists():
            raise RequestError(f"`work_dir` {folder}: it has no activations: `harvest` comes first")
        facts = json.loads((folder / "harvest.json").read_text(encoding="utf-8"))
        layers = facts["settings"]["layers"]
        return cls(folder, facts, {layer: _read_scale(folder, layer) for layer in layers})

    @property
    def settings(self) -> Mapping[str, Any]:
        """Return the fields of `HarvestSettings`."""
        return dict(self.facts["settings"])

    @property
    def layers(self) -> list[int]:
        return list(self.scales)

    def shards(self, part: str) -> int:
        """Return the number of shards of `TRAIN` or `HELD_OUT`."""
        return len(list(self.folder.glob(f"{part}_*.safetensors")))

    def tokens(self, part: str) -> int:
        """Return the number of tokens in all shards of a part."""
        return sum(self.rows_of(shard, part) for shard in range(self.shards(part)))

    def read(self, part: str, shard: int, layer: int) -> Tensor:
        """Return [tokens, d_in], as the model computed them."""
        with safe_open(_shard(self.folder, part, shard), framework="pt") as file:
            return file.get_tensor(str(layer))

    def text_rows(self, part: str, shard: int) -> Tensor:
        """Return int64 [tokens]: the row of text of each token in a shard."""
        with safe_open(_shard(self.folder, part, shard), framework="pt") as file:
            return file.get_tensor(ROW).long()

    def rows_of(self, shard: int, part: str = TRAIN) -> int:
        """Return the number of tokens of a shard, from its header."""
        with safe_open(_shard(self.folder, part, shard), framework="pt") as file:
            return int(file.get_slice(str(self.layers[0])).get_shape()[0])


def harvest(
    info: ModelInfo, settings: HarvestSettings, text: Path, folder: Path, threads: int = 1, quiet: bool = False
) -> Activations:
    """Create the missing shards. Raises `RequestError` if the folder has other settings or the text is too short."""
    folder.mkdir(parents=True, exist_ok=True)
    _begin(info, settings, text, folder)
    sites = [Site(layer, settings.hookpoint) for layer in settings.layers]
    parts = load_file(folder / "rows.safetensors")
    jobs = [
        (part, i, rows)
        for part in (TRAIN, HELD_OUT)
        for i, rows in enumerate(parts[part].split(settings.shard_rows))
        if not _shard(folder, part, i).exists()
    ]
    if jobs:
        model = info.load(sites, "cpu", info.choose_dtype(settings.dtype, "cpu"))
        bos = info.bos_token_id
        if not _scale(folder).exists():
            rows = parts[TRAIN][: settings.shard_rows].split(settings.rows)
            first = [_without_outliers(model, ids, bos, None) for ids in rows]
            _write_scales(folder, {site.layer: torch.cat([acts[site] for _, acts in first]) for site in sites})
        limits = {site: _read_scale(folder, site.layer).norm_limit for site in sites}

        def make(job: tuple[str, int, Tensor]) -> int:
            part, number, rows = job
            found = [_without_outliers(model, ids, bos, limits) for ids in rows.split(settings.rows)]
            shard = {str(site.layer): torch.cat([acts[site] for _, acts in found]) for site in sites}
            n_kept = torch.cat([kept.sum(1) for kept, _ in found])
            first_row = number * settings.shard_rows
            shard[ROW] = torch.repeat_interleave(torch.arange(first_row, first_row + len(rows)), n_kept)
            _save(_shard(folder, part, number), shard)
            return rows.numel()

        total = sum(rows.numel() for *_, rows in jobs)
        with ThreadPoolExecutor(threads) as pool, open_bar(total, "harvest", "tok", quiet=quiet) as bar:
            for done in pool.map(make, jobs):
                bar.update(done)
    return Activations.open(folder)


def _begin(info: ModelInfo, settings: HarvestSettings, text: Path, folder: Path) -> None:
    """Tokenise the text, unless an earlier run did."""
    path = folder / "harvest.json"
    settings_ = json.loads(json.dumps(asdict(settings)))
    about = {"model": info.name, "fingerprint": info.fingerprint(), "bos": info.bos_token_id, "settings": settings_}
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        other = [key for key in about if before[key] != about[key]]
        if other:
            raise RequestError(f"`work_dir` {folder}: it has activations of another {other[0]}: choose a new folder")
        return
    texts = choose_texts(text, settings.tokens, settings.held_out_tokens, settings.seed)
    rows = {}
    wanted = {TRAIN: (texts.train, settings.tokens), HELD_OUT: (texts.held_out, settings.held_out_tokens)}
    for part, (documents, tokens) in wanted.items():
        rows[part] = token_rows(documents, info.tokenizer, info.bos_token_id, settings.length, tokens)
        log.info("%s: %d rows of %d tokens from %d documents", part, *rows[part].shape, len(documents))
        if rows[part].numel() < tokens:
            log.warning("%s: the text is shorter than the requested %d tokens", part, tokens)
    _save(folder / "rows.safetensors", rows)
    with replacing(path, "w", encoding="utf-8") as file:
        json.dump(about, file, indent=2)


def _without_outliers(
    model: LanguageModel, ids: Tensor, bos: int | None, limits: Mapping[Site, float] | None
) -> tuple[Tensor, dict[Site, Tensor]]:
    """Return a mask of ids [rows, length], and [tokens, d_in] by site, without BOS and, given norm limits, sinks."""
    found = model.activations(ids.long())
    kept = ids != bos if bos is not None else torch.ones_like(ids, dtype=torch.bool)
    for site, limit in (limits or {}).items():
        kept &= torch.linalg.vector_norm(found[site].float(), dim=-1) <= limit
    return kept, {site: x[kept] for site, x in found.items()}


def _write_scales(folder: Path, first: Mapping[int, Tensor]) -> None:
    tensors = dict[str, Tensor]()
    for layer, acts in first.items():
        x = acts.float()
        limit = SiteScale.of(x).norm_limit
        x = x[torch.linalg.vector_norm(x, dim=1) <= limit]
        mean = x.mean(0)
        numbers = torch.tensor([(x - mean).square().mean().sqrt(), limit])
        tensors |= {f"{layer}.mean": mean, f"{layer}.deviation_and_limit": numbers}
    _save(_scale(folder), tensors)


def _read_scale(folder: Path, layer: int) -> Scale:
    tensors = load_file(_scale(folder))
    deviation, limit = tensors[f"{layer}.deviation_and_limit"].tolist()
    return Scale(tensors[f"{layer}.mean"], deviation, limit)


def _scale(folder: Path) -> Path:
    return folder / "scales.safetensors"


def _shard(folder: Path, part: str, number: int) -> Path:
    return folder / f"{part}_{number:05d}.safetensors"


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Save a shard completely or not at all."""
    unfinished = path.with_suffix(".unfinished")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished)
    unfinished.replace(path)
