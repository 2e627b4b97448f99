"""On-disk cache of model facts, hook point widths and tokenised texts.

    setup = SetupCache.open(folder, limit_gb=50)
    info = setup.model(Pretrained.find(name))          # as `open_model`; transformers are not even imported
    setup.widths(info, sites)                          # as `info.widths`
    setup.tokens(mentions, info, prepend_bos=True)     # as `tokenise`, with its warning

Content-addressed: a shard (`shard_folder`) is named after all that decides what it holds, which are the model's files
and the texts, the libraries, and the text of the program.
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

FOLDER = "setup"  # below the root, beside those of the models
SOURCES = (
    "caches/setup_cache.py", "errors.py", "models/*.py", "system/gemm.py", "system/hub_access.py",
    "system/person_ids.py", "system/processor.py", "system/provenance.py", "system/terminal.py", "system/unpacked.py",
    "system/wheel.py", "tasks/*.py",
)  # fmt: skip
"""`language_model` and `datasets_wikidata` with all that they import of the program, and how this is kept."""

_LIBRARIES = ("torch", "transformers", "tokenizers", "gguf")


@dataclass(frozen=True)
class SetupCache:
    """What is known of models and texts; nothing, and nothing kept, without shards."""

    shards: ShardFolder | None = None

    @classmethod
    def open(cls, root: Path, limit_gb: float) -> SetupCache:
        """What is kept below `root`. Raises `RequestError` if it cannot be written to."""
        return cls(ShardFolder.open(root, FOLDER, limit_gb, "widths and tokens"))

    def model(self, files: Pretrained) -> ModelInfo:
        """As `ModelInfo.read`. A repository's own code runs each time: it may look at more than its files."""
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
        """As `info.widths`. A repository's own code is looked at each time: its config does not tell what it does."""
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
        """As `info.names_of_modules`. Kept as widths are."""
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
        """As `tokenise` by the model's tokenizer, to its greatest length."""

        def fresh() -> TokenisedMentions:
            return tokenise(
                mentions, info.tokenizer, prepend_bos=prepend_bos, max_length=info.max_length,
                n_embeddings=info.n_embeddings, last_only=last_only,
            )  # fmt: skip

        if self.shards is None:
            return fresh()
        facts = {
            "tokens of": info.fingerprint(),
            "length": f"{info.max_length}, BOS {info.opening_token_id if prepend_bos else None}, last only {last_only}",
            "texts": repr([mention.identity for mention in mentions]),
        }
        name = _name(facts)
        stored = self.shards.read(name)
        if stored:
            return _unpacked(stored, prepend_bos, info.max_length)
        found = fresh()
        self.shards.write(name, _packed(found), {})
        return found


def _name(facts: Mapping[str, str]) -> str:
    """32 hexadecimal digits."""
    libraries = {library: str(installed_version(library)) for library in _LIBRARIES}
    return digest({**facts, **libraries, "program": running_program(SOURCES)}, {})


def _bytes(found: Any) -> Tensor:
    """JSON as a tensor of bytes."""
    return torch.from_numpy(np.frombuffer(json.dumps(found).encode(), np.uint8).copy())


def _json(stored: Tensor) -> Any:
    return json.loads(stored.numpy().tobytes())


def _packed(tokens: TokenisedMentions) -> dict[str, Tensor]:
    """Its arrays; of its ids one after the other, and where each text's end."""
    lengths = np.array([len(ids) for ids in tokens.ids], dtype=np.int64)
    ids = np.concatenate([np.empty(0, dtype=np.int32), *tokens.ids])
    arrays = {"ids": ids, "stops": lengths.cumsum(), "first": tokens.first, "last": tokens.last}
    return {name: torch.from_numpy(array) for name, array in arrays.items()} | {
        "changed": torch.tensor([tokens.n_cut, tokens.n_own_bos])
    }


def _unpacked(stored: Mapping[str, Tensor], has_bos: bool, max_length: int) -> TokenisedMentions:
    """In memory of its own, which the file on disk does not share."""
    arrays = {name: tensor.clone().numpy() for name, tensor in stored.items()}
    ids = tuple(np.split(arrays["ids"], arrays["stops"])[:-1])  # after the last stop there is nothing
    tokens = TokenisedMentions(ids, arrays["first"], arrays["last"], has_bos, *arrays["changed"].tolist())
    warn_of_changes(tokens, max_length)
    return tokens
