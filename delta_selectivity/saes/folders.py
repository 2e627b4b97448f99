"""Discovery of the SAEs in a folder on disk or on the Hub, and of their format.

The config's file name gives the format: ``cfg.json`` (SAE Lens or sparsify, distinguished by their keys), ``sae.json``
(``plain``), or ``config.json`` next to ``ae.pt`` (dictionary_learning).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from delta_selectivity.errors import RequestError
from delta_selectivity.saes import dictionary_learning, plain
from delta_selectivity.saes.coders import Coder
from delta_selectivity.saes.dictionary_learning import DictionaryLearning
from delta_selectivity.saes.files import check_values, digest_files, read_config
from delta_selectivity.saes.hub import HubRepository
from delta_selectivity.saes.input_norm import InputNorm
from delta_selectivity.saes.plain import Plain
from delta_selectivity.saes.sae_lens.folder import SaeLens
from delta_selectivity.saes.source import SaeHeader
from delta_selectivity.saes.sparsify import Sparsify

GGUF = "a GGUF file is a language model, not an SAE: did you exchange `saes` and `model`?"
MAX_DEPTH = 3
"""Levels of subfolders to search for SAEs, for example ``TopK/resid_post_layer_5/trainer_0``."""


class SaeFormat(Protocol):
    """The reader of one format."""

    def files(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the names of the files to use: the config first, then the weights."""
        ...

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Return whether a config with this format's file name belongs to this format."""
        ...

    def read_header(self, config: dict[str, Any], path: Path, model_name: str | None) -> SaeHeader:
        """Check the config found at ``path`` and return its header. Raises `RequestError`."""
        ...

    def check(self, folder: Path, header: SaeHeader) -> None:
        """Compare the names and shapes of the weights with the config. Raises `RequestError`."""
        ...

    def build(self, folder: Path, header: SaeHeader) -> tuple[Coder, InputNorm]:
        """Load the weights in float32 on the CPU."""
        ...


@dataclass(frozen=True)
class FolderMember:
    """One SAE in a folder. Its weights may not be downloaded yet."""

    folder: Path
    header: SaeHeader
    format: SaeFormat
    repository: HubRepository | None

    @property
    def where(self) -> str:
        if self.repository is None:
            return str(self.folder)
        return "/".join((self.repository.name, *self.folder.relative_to(self.repository.folder).parts))

    @property
    def files(self) -> tuple[str, ...]:
        return self.format.files(self.header.config)

    def prepare(self) -> None:
        if self.repository is not None:
            self.repository.fetch(self.folder, self.files)
        self.format.check(self.folder, self.header)

    def check_values(self) -> None:
        for path in (self.folder / name for name in self.files[1:]):
            if path.suffix != ".json" and path.is_file():
                check_values(path)

    def build(self) -> tuple[Coder, InputNorm]:
        return self.format.build(self.folder, self.header)

    def digest(self) -> str:
        self.prepare()
        return digest_files(path for name in self.files if (path := self.folder / name).is_file())


def find_members(
    root: Path, name: str, repository: HubRepository | None = None, hookpoint: str | None = None
) -> list[FolderMember]:
    """Find all SAEs in a folder: in the folder itself, else at the first level of subfolders that holds any.

    ``hookpoint`` is used if neither config nor folder names a known place. Raises `RequestError` if no SAE is found or
    one of them cannot be read.
    """
    configs = _find_configs(root)
    if not configs:
        raise RequestError(f"{name}: {_why_unusable(root)}")
    model_name = _model_name(root)
    members = [_read_member(path, model_name, repository, hookpoint) for path in configs]
    if repository is None:
        for member in members:
            member.prepare()
    return members


def holds_saes(folder: Path) -> bool:
    """Return whether the folder holds any SAE config, valid or not."""
    return bool(_find_configs(folder))


def _why_unusable(root: Path) -> str:
    """Describe a folder without SAEs, for a message."""
    if any(path.suffix.lower() == ".gguf" for path in root.iterdir()):
        return GGUF
    config = root / "config.json"
    if config.is_file() and "model_type" in read_config(config):
        return "looks like a language model, not an SAE: did you exchange `saes` and `model`?"
    return (
        f"no SAE in this folder; give one with {', '.join(_formats(None))} and weights, or with such folders inside,"
        " such as layers.5"
    )


def _formats(hookpoint: str | None) -> dict[str, tuple[SaeFormat, ...]]:
    """Return the formats by the file name of their config."""
    return {
        "cfg.json": (SaeLens(hookpoint), Sparsify()),
        plain.CONFIG: (Plain(),),
        dictionary_learning.CONFIG: (DictionaryLearning(hookpoint),),
    }


def _find_configs(root: Path) -> list[Path]:
    """Return the configs in the folder itself, else those at the first level of subfolders that has any."""
    level = [root]
    for _ in range(MAX_DEPTH + 1):
        configs = [config for folder in level if (config := _config_in(folder)) is not None]
        if configs:
            return configs
        level = [below for folder in level for below in _folders_in(folder)]
    return []


def _config_in(folder: Path) -> Path | None:
    """Return the path of the SAE config in a folder, valid or not; None if there is none."""
    for name in _formats(None):
        if name != dictionary_learning.CONFIG and os.path.lexists(folder / name):
            return folder / name
    config = folder / dictionary_learning.CONFIG  # config.json is also the name of many unrelated configs
    if os.path.lexists(folder / dictionary_learning.WEIGHTS) or _mentions_dict_class(config):
        return config
    return None


def _mentions_dict_class(config: Path) -> bool:
    try:
        return b'"dict_class"' in config.read_bytes()
    except OSError:
        return False


def _folders_in(folder: Path) -> Iterator[Path]:
    try:
        yield from sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise RequestError(f"{folder}: the folder cannot be read: {error.strerror}") from error


def _read_member(
    path: Path, model_name: str | None, repository: HubRepository | None, hookpoint: str | None
) -> FolderMember:
    config = read_config(path)
    for sae_format in _formats(hookpoint)[path.name]:
        if sae_format.claims(config):
            header = _read_header(sae_format, config, path, model_name)
            return FolderMember(path.parent, header, sae_format, repository)
    keys = ", ".join(sorted(config)) or "nothing"
    raise RequestError(
        f"{path}: neither a sparsify config (num_latents, k) nor an SAE Lens config (d_sae); it has {keys}"
    )


def _read_header(sae_format: SaeFormat, config: dict[str, Any], path: Path, model_name: str | None) -> SaeHeader:
    try:
        return sae_format.read_header(config, path, model_name)
    except (TypeError, AttributeError, OverflowError) as error:  # such as a list in place of a name
        raise RequestError(f"{path}: a value has the wrong type ({error})") from error


def _model_name(root: Path) -> str | None:
    """Return the model that sparsify's training run names in ``config.json``, next to the SAEs' folders."""
    path = root / "config.json"
    model = read_config(path).get("model") if path.is_file() else None
    return model if isinstance(model, str) else None
