"""SAEs on the Hugging Face Hub: configs at once, weights when a layer is wanted; the cache if there is no network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.errors import HTTPError as HubHTTPError

from errors import RequestError

_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class HubRepository:
    """A repository of which the configs have been fetched."""

    name: str
    folder: Path
    """The snapshot in the cache: its name is the commit."""
    cache_dir: Path | None

    @classmethod
    def open(cls, name: str, cache_dir: Path | None = None) -> HubRepository:
        """Fetch the configs. Raises `RequestError` if the name is no repository's or it cannot be reached."""
        return cls(name, _download(name, ["cfg.json", "*/cfg.json", "config.json"], cache_dir), cache_dir)

    @property
    def revision(self) -> str:
        """Repository and commit."""
        return f"{self.name}@{self.folder.name}"

    def fetch(self, folder: Path, files: Sequence[str]) -> None:
        """Have these files of one folder of the snapshot on disk; files that the repository lacks are passed over."""
        below = folder.relative_to(self.folder)
        found = _download(self.name, [(below / file).as_posix() for file in files], self.cache_dir)
        if found != self.folder:
            raise RequestError(f"{self.name}: it was changed on the Hub in this very minute; run again")


def is_repository_name(name: str) -> bool:
    """Whether the Hub could have a repository of this name; paths with dots, tildes or many slashes are none."""
    return len(name) <= 96 and _REPOSITORY.fullmatch(name) is not None and not name.startswith(".")


def _download(name: str, patterns: list[str], cache_dir: Path | None) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, cache_dir=cache_dir))
    except (OSError, HubHTTPError, HFValidationError) as error:
        partial = getattr(error, "snapshot_path", None)  # offline, and only some of the folders are in the cache
        if partial is not None and patterns[0] == "cfg.json":
            return Path(partial)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(
            f"{name}: no such local folder, and it could not be had from the Hugging Face Hub ({reason})"
        ) from error
