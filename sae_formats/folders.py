"""A folder of SAEs on disk or on the Hub: which folders below it hold one, and in which format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from errors import RequestError
from sae_formats.coders import Coder
from sae_formats.files import digest_files, read_config
from sae_formats.hub import HubRepository
from sae_formats.input_norm import InputNorm
from sae_formats.sae_lens import SaeLens
from sae_formats.source import SaeHeader
from sae_formats.sparsify import Sparsify


class SaeFormat(Protocol):
    """How one format is read."""

    @property
    def files(self) -> tuple[str, ...]:
        """What its folder holds that is of use; the config first, then the weights."""
        ...

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Whether this is one of its configs."""
        ...

    def read_header(self, config: dict[str, Any], path: Path, model_name: str | None) -> SaeHeader:
        """Check a config, found at ``path``. Raises `RequestError`."""
        ...

    def check(self, folder: Path, header: SaeHeader) -> None:
        """Compare the weights' header with the config. Raises `RequestError`."""
        ...

    def build(self, folder: Path, header: SaeHeader) -> tuple[Coder, InputNorm]:
        """Load the weights: float32, on the CPU."""
        ...


FORMATS: tuple[SaeFormat, ...] = (SaeLens(), Sparsify())


@dataclass(frozen=True)
class FolderMember:
    """One SAE in a folder, whose weights may still be on the Hub."""

    folder: Path
    header: SaeHeader
    format: SaeFormat
    repository: HubRepository | None

    @property
    def where(self) -> str:
        return str(self.folder) if self.repository is None else f"{self.repository.name}/{self.folder.name}"

    def prepare(self) -> None:
        if self.repository is not None:
            self.repository.fetch(self.folder, self.format.files)
        self.format.check(self.folder, self.header)

    def build(self) -> tuple[Coder, InputNorm]:
        return self.format.build(self.folder, self.header)

    def digest(self) -> str:
        self.prepare()
        return digest_files(path for name in self.format.files if (path := self.folder / name).is_file())


def find_members(root: Path, name: str, repository: HubRepository | None = None) -> list[FolderMember]:
    """All SAEs in a folder: itself, or the folders directly below it.

    Raises `RequestError` if there is none, or if one of them cannot be read.
    """
    configs = [root / "cfg.json"] if (root / "cfg.json").is_file() else sorted(root.glob("*/cfg.json"))
    if not configs:
        raise RequestError(
            f"{name}: no SAE here; a folder is expected that holds cfg.json, or folders such as layers.5 that do"
        )
    model_name = _model_name(root)
    members = [_read_member(path, model_name, repository) for path in configs]
    if repository is None:
        for member in members:
            member.prepare()
    return members


def _read_member(path: Path, model_name: str | None, repository: HubRepository | None) -> FolderMember:
    config = read_config(path)
    for sae_format in FORMATS:
        if sae_format.claims(config):
            header = _read_header(sae_format, config, path, model_name)
            return FolderMember(path.parent, header, sae_format, repository)
    keys = ", ".join(sorted(config)) or "nothing"
    raise RequestError(f"{path}: neither a sparsify config (num_latents, k) nor one of SAE Lens (d_sae); it has {keys}")


def _read_header(sae_format: SaeFormat, config: dict[str, Any], path: Path, model_name: str | None) -> SaeHeader:
    try:
        return sae_format.read_header(config, path, model_name)
    except (TypeError, AttributeError, OverflowError) as error:  # a list for a name, a number for a list, ...
        raise RequestError(f"{path}: a value has the wrong type ({error})") from error


def _model_name(root: Path) -> str | None:
    """The model that sparsify's training run names in ``config.json``, beside the SAEs' folders."""
    path = root / "config.json"
    model = read_config(path).get("model") if path.is_file() else None
    return model if isinstance(model, str) else None
