"""Locate a pretrained model; read its config and tokenizer when they are first used.

Reading them imports transformers, which takes half a second; with a cache (`setup_cache`) a run may need neither.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from delta_selectivity.errors import RequestError
from delta_selectivity.models.gguf_file import GgufFile
from delta_selectivity.models.packaged import packaged_model
from delta_selectivity.system.hub_access import OFFLINE, use_cache_if_unreachable

NO_REVISION = "main"  # default branch on the Hub; also what transformers uses for a local folder

GGUF = ".gguf"
_WEIGHTS = {".safetensors", ".bin"}
_FINGERPRINTED = {".json", ".safetensors", ".bin", ".txt", ".model", ".py"}  # files of a local model

ADAPTER = "an adapter without its model: merge the two (`merge_and_unload` of peft), save that and give its folder"
SAE = "looks like an SAE, not a language model: did you exchange `model` and `saes`?"
SAE_FILES = ("cfg.json", "sae.safetensors", "sae_weights.safetensors", "ae.pt")


@dataclass(frozen=True)
class Pretrained:
    """A folder or GGUF file on this machine, or a commit of a hub repository."""

    name: str  # as typed
    revision: str | None  # branch, tag or commit of a hub model, as typed; None: its main branch, or a local model
    commit: str | None  # resolved from `revision`; None: a local model
    trust_remote_code: bool  # whether Python code from the model's repository may run
    gguf: Path | None = None  # the GGUF file, if the model is one; other files in its folder are ignored

    @classmethod
    def find(cls, name: str, revision: str | None = None, trust_remote_code: bool = False) -> Pretrained:
        """Find a hub id, a local folder, a GGUF file or a name of `packaged`.

        Raises `RequestError` if that name or revision does not exist.
        """
        folder = Path(os.path.expanduser(name))  # noqa: PTH111 - leaves an unknown ~user as it is
        gguf = _gguf_file(folder)
        if gguf is None and not os.path.exists(folder):  # noqa: PTH110 - False for a name too long
            gguf = packaged_model(name)
        if gguf is not None:
            if revision is not None:
                raise RequestError(f"`revision` {revision}: {name} is a local file, which has no revisions")
            return cls(name, None, None, trust_remote_code, gguf)
        if os.path.isdir(folder):  # noqa: PTH112 - False, not an error, for a name too long to be a path
            if not (folder / "config.json").is_file():
                raise RequestError(f"`model` {folder}: {_why_unusable(folder)}")
            if _looks_like_sae(folder) and b'"model_type"' not in (folder / "config.json").read_bytes():
                raise RequestError(f"`model` {folder}: {SAE}")
            if revision is not None:
                raise RequestError(f"`revision` {revision}: {folder} is a local folder, which has no revisions")
            return cls(str(folder), None, None, trust_remote_code)
        if name.lower().endswith(GGUF):
            raise RequestError(f"`model` {name}: no such file")
        if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or not name:
            raise RequestError(f"`model` {name!r}: no such folder (and not a hub id of the form owner/name)")
        try:
            reachable = use_cache_if_unreachable()
            commit = _commit(name, revision or NO_REVISION)
        except Exception as error:  # the hub client raises many kinds; all mean that the name is unusable
            if not reachable:
                raise RequestError(
                    f"`model` {name}: not a local folder, not in the local Hub cache{OFFLINE}"
                ) from error
            at = f" at revision {revision}" if revision else ""
            reason = f"not a local folder, and not available from the Hub{at}: {first_line(error)}"
            if _is_sae_on_hub(name, revision):
                reason = SAE
            raise RequestError(f"`model` {name}: {reason}") from error
        return cls(name, revision, commit, trust_remote_code)

    @cached_property
    def fingerprint(self) -> str:
        """Return the commit of a hub model, or the sha256 of a local one's files, including config and tokenizer."""
        if self.commit is not None:
            return self.commit
        if self.gguf is not None:
            with self.gguf.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        for path in sorted(p for p in Path(self.name).iterdir() if p.suffix in _FINGERPRINTED):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    @cached_property
    def quantisation(self) -> str | None:
        """Return the type of most weights of a GGUF file, "Q4_1", or None. Raises `RequestError` if it is damaged."""
        return None if self.gguf is None else GgufFile.read(self.gguf).quantisation

    @property
    def config(self) -> Any:
        """Return the transformers.PretrainedConfig. Raises `RequestError` if it or the tokenizer is not available."""
        return self._config_and_tokenizer[0]

    @property
    def tokenizer(self) -> Any:
        """Return the transformers.PreTrainedTokenizerFast. Raises as `config`."""
        return self._config_and_tokenizer[1]

    @cached_property
    def _config_and_tokenizer(self) -> tuple[Any, Any]:
        from transformers import AutoConfig, AutoTokenizer

        if self.gguf is not None and not GgufFile.read(self.gguf).has_tokenizer:
            raise RequestError(f"`model` {self.name}: the file has no tokenizer: use the same model in safetensors")
        try:
            with self.source() as (where, options):
                config = AutoConfig.from_pretrained(where, **options)
                tokenizer = AutoTokenizer.from_pretrained(where, **options)
        except Exception as error:  # the parsers raise many kinds; all mean that the model is unusable
            reason = f"config or tokenizer cannot be read: {first_line(error)}"
            if "trust_remote_code" in str(error):
                reason = "its repository has Python code that must run: read it, then allow it with `trust_remote_code`"
            elif self.commit is not None and _is_sae_on_hub(self.name, self.commit):
                reason = SAE
            raise RequestError(f"`model` {self.name}: {reason}") from error
        if self.gguf is None:
            self._refuse_unread_adapter(self.commit or NO_REVISION)
        if not getattr(tokenizer, "is_fast", False):
            reason = "it has no fast tokenizer (tokenizer.json), which is needed to locate the name's tokens"
            raise RequestError(f"`model` {self.name}: {reason}")
        return config, tokenizer

    @contextmanager
    def source(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the name and the options for transformers' `from_pretrained`."""
        if self.gguf is None:
            # if `trust_remote_code` were not passed, transformers would prompt on the terminal
            yield self.name, {"revision": self.commit or NO_REVISION, "trust_remote_code": self.trust_remote_code}
            return
        with tempfile.TemporaryDirectory(prefix="delta-selectivity-") as empty_folder:
            yield empty_folder, {"gguf_file": str(self.gguf.absolute())}

    def _refuse_unread_adapter(self, revision: str) -> None:
        """Raise `RequestError` for an adapter in the model's folder: without peft, transformers silently ignores it."""
        from transformers.utils import is_peft_available
        from transformers.utils.peft_utils import find_adapter_config_file

        if not is_peft_available() and find_adapter_config_file(self.name, revision=revision) is not None:
            reason = "its folder has an adapter (adapter_config.json), but peft, which applies it, is not installed"
            raise RequestError(
                f"`model` {self.name}: {reason}: install peft, or remove the adapter to measure without it"
            )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, truncated."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _why_unusable(folder: Path) -> str:
    """Return an error message for a folder without config.json, depending on its other files."""
    if (folder / "adapter_config.json").is_file():
        return ADAPTER
    return SAE if _looks_like_sae(folder) else "the folder has no config.json"


def _gguf_file(path: Path) -> Path | None:
    """Return a GGUF file's path, or that of the only one in a folder without other weights; None if there is none.

    Raises `RequestError` if there are several.
    """
    if not os.path.isdir(path):  # noqa: PTH112 - False, not an error, for a name too long to be a path
        return path if path.suffix.lower() == GGUF and os.path.isfile(path) else None  # noqa: PTH113 - likewise
    files = list(path.iterdir())
    found = sorted(file for file in files if file.suffix.lower() == GGUF)
    if not found or any(file.suffix in _WEIGHTS for file in files):
        return None
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise RequestError(f"`model` {path}: {len(found)} GGUF files ({names}): name one of them")
    return found[0]


def _looks_like_sae(folder: Path) -> bool:
    """Return whether a folder, or one directly below it, has files of SAE formats, which a model's folder lacks."""
    return any((folder / name).is_file() or any(folder.glob(f"*/{name}")) for name in SAE_FILES)


def _is_sae_on_hub(name: str, revision: str | None) -> bool:
    """Return whether a repository holds SAE files and no model weights; False if it cannot be listed."""
    from huggingface_hub import list_repo_files

    try:
        files = [Path(file).name for file in list_repo_files(name, revision=revision)]
    except Exception:  # the hub client raises many kinds
        return False
    return any(file in SAE_FILES for file in files) and not any(file.startswith("model") for file in files)


def _commit(name: str, revision: str) -> str:
    """Resolve `revision` to a commit, so that config, tokenizer and weights are read from the same one."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(name, "config.json", revision=revision)).parent.name  # .../snapshots/<commit>/
