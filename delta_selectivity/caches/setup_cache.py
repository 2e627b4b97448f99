"""On-disk cache of model facts, hook point widths and tokenised texts.

    setup = SetupCache.open(folder, limit_gb=50)
    info = setup.model(Pretrained.find(name))          # as `open_model`, without importing transformers
    setup.widths(info, sites)                          # as `info.widths`
    setup.tokens(mentions, info, prepend_bos=True)     # as `tokenise`, with its warning

The cache is content-addressed: the name of a shard (`shard_folder`) is a hash of everything that determines its
content: the model's files, the texts, library versions and the program's source.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from delta_selectivity.caches.shard_folder import ShardFolder, digest
from delta_selectivity.models.language_model import ModelInfo, Pretrained, Site
from delta_selectivity.system.provenance import installed_version, running_program
from delta_selectivity.tasks import Mention, TokenisedMentions, tokenise, warn_of_changes

FOLDER = "setup"  # below the root, next to the models' folders
SOURCES = (
    "caches/setup_cache.py", "errors.py", "models/*.py", "system/compiled.py", "system/gemm.py",
    "system/hub_access.py", "system/person_ids.py", "system/processor.py", "system/provenance.py",
    "system/terminal.py", "system/unpacked.py", "system/wheel.py", "tasks/*.py",
)  # fmt: skip
"""The packages `models` and `tasks`, everything of this package that they import, and this module."""

_LIBRARIES = ("torch", "transformers", "tokenizers", "gguf")


@dataclass(frozen=True)
class SetupCache:
    """Cached facts of models and texts; without shards, nothing is cached."""

    shards: ShardFolder | None = None

    @classmethod
    def open(cls, root: Path, limit_gb: float) -> SetupCache:
        """Open the cache below `root`. Raises `RequestError` if it is not writable."""
        return cls(ShardFolder.open(root, FOLDER, limit_gb, "widths and tokens"))

    def model(self, files: Pretrained) -> ModelInfo:
        """Return `ModelInfo.read(files)`. Not cached for models with custom code, which may depend on other files."""
        if self.shards is None or files.trust_remote_code:
            return ModelInfo.read(files)
        name = _name({"facts of": files.fingerprint})
        stored = self.shards.read(name)
        if stored:
            return ModelInfo(files, **_json(stored["facts"]))
        info = ModelInfo.read(files)
        facts = {field.name: getattr(info, field.name) for field in fields(info) if field.name != "files"}
        self.shards.write(name, {"facts": _bytes(facts)}, {})
        return info

    def widths(self, info: ModelInfo, sites: Collection[Site]) -> dict[Site, int]:
        """Return `info.widths(sites)`. Not cached for models with custom code, which the config does not determine."""
        if self.shards is None or info.files.trust_remote_code:
            return info.widths(sites)
        order = sorted(sites)
        name = _name({"widths of": repr(order), "model": info.fingerprint()})
        stored = self.shards.read(name)
        if stored:
            return dict(zip(order, stored["widths"].tolist(), strict=True))
        found = info.widths(sites)
        self.shards.write(name, {"widths": torch.tensor([found[site] for site in order])}, {})
        return found

    def names_of_modules(self, info: ModelInfo) -> dict[str, str]:
        """Return `info.names_of_modules()`. Not cached for models with custom code."""
        if self.shards is None or info.files.trust_remote_code:
            return info.names_of_modules()
        name = _name({"modules of": info.fingerprint()})
        stored = self.shards.read(name)
        if stored:
            return _json(stored["names"])
        found = info.names_of_modules()
        self.shards.write(name, {"names": _bytes(found)}, {})
        return found

    def tokens(
        self, mentions: Sequence[Mention], info: ModelInfo, *, prepend_bos: bool, last_only: bool = False
    ) -> TokenisedMentions:
        """Tokenise the texts with the model's tokenizer, up to its maximum length."""

        def compute() -> TokenisedMentions:
            return tokenise(
                mentions, info.tokenizer, prepend_bos=prepend_bos, max_length=info.max_length,
                n_embeddings=info.n_embeddings, last_only=last_only,
            )  # fmt: skip

        if self.shards is None:
            return compute()
        facts = {
            "tokens of": info.fingerprint(),
            "length": f"{info.max_length}, BOS {info.opening_token_id if prepend_bos else None}, last only {last_only}",
            "texts": repr([mention.identity for mention in mentions]),
        }
        name = _name(facts)
        stored = self.shards.read(name)
        if stored:
            return _from_tensors(stored, prepend_bos, info.max_length)
        found = compute()
        self.shards.write(name, _to_tensors(found), {})
        return found


def _name(facts: Mapping[str, str]) -> str:
    """Return a shard name, 32 hex digits."""
    libraries = {library: str(installed_version(library)) for library in _LIBRARIES}
    return digest({**facts, **libraries, "program": running_program(SOURCES)}, {})


def _bytes(found: Any) -> Tensor:
    """Return JSON as a tensor of bytes."""
    return torch.from_numpy(np.frombuffer(json.dumps(found).encode(), np.uint8).copy())


def _json(stored: Tensor) -> Any:
    return json.loads(stored.numpy().tobytes())


def _to_tensors(tokens: TokenisedMentions) -> dict[str, Tensor]:
    """Return the tokens as tensors: concatenated ids with the end of each text, and the other arrays."""
    lengths = np.array([len(ids) for ids in tokens.ids], dtype=np.int64)
    ids = np.concatenate([np.empty(0, dtype=np.int32), *tokens.ids])
    arrays = {"ids": ids, "stops": lengths.cumsum(), "first": tokens.first, "last": tokens.last}
    return {name: torch.from_numpy(array) for name, array in arrays.items()} | {
        "changed": torch.tensor([tokens.n_cut, tokens.n_own_bos])
    }


def _from_tensors(stored: Mapping[str, Tensor], has_bos: bool, max_length: int) -> TokenisedMentions:
    """Rebuild the tokens from copies of the memory-mapped tensors."""
    arrays = {name: tensor.clone().numpy() for name, tensor in stored.items()}
    ids = tuple(np.split(arrays["ids"], arrays["stops"])[:-1])  # the part after the last stop is empty
    tokens = TokenisedMentions(ids, arrays["first"], arrays["last"], has_bos, *arrays["changed"].tolist())
    warn_of_changes(tokens, max_length)
    return tokens
