"""Access to SAEs on the Hugging Face Hub: configs first, weights on use, and the cache when offline."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.errors import HTTPError as HubHTTPError

from delta_selectivity.errors import RequestError
from delta_selectivity.system.hub_access import OFFLINE, use_cache_if_unreachable

CONFIGS = ("cfg.json", "sae.json", "config.json")
"""Names of the config files of all formats."""

_NAME = re.compile(r"(?P<repository>[\w-][\w.-]*(/[\w-][\w.-]*)?)(?P<below>(/[\w-][\w.-]*)*)")


@dataclass(frozen=True)
class HubRepository:
    """A repository whose configs have been downloaded, either all of them or those below one folder."""

    name: str
    folder: Path  # snapshot folder in the cache, named after the commit
    cache_dir: Path | None

    @classmethod
    def open(cls, name: str, cache_dir: Path | None = None, below: str = "") -> HubRepository:
        """Download the configs. Raises `RequestError` if the repository does not exist or cannot be reached."""
        prefix = f"{below}/" if below else ""
        patterns = [f"{prefix}{pattern}" for config in CONFIGS for pattern in (config, f"*/{config}")]
        return cls(name, _download(name, patterns, cache_dir, partly=True), cache_dir)

    @property
    def revision(self) -> str:
        """Repository and commit."""
        return f"{self.name}@{self.folder.name}"

    def fetch(self, folder: Path, files: Sequence[str]) -> None:
        """Download files of one folder of the snapshot; files that the repository lacks are skipped."""
        below = folder.relative_to(self.folder)
        found = _download(self.name, [(below / file).as_posix() for file in files], self.cache_dir, partly=False)
        if found != self.folder:
            raise RequestError(f"{self.name}: it has just been changed on the Hub: run again")


def split_name(name: str) -> tuple[str, str] | None:
    """Split ``owner/repository/layers.5`` into ``owner/repository`` and the folder below it.

    Return None if it cannot be a Hub name: leading dots or tildes, spaces, or an empty part.
    """
    match = _NAME.fullmatch(name.rstrip("/"))
    if match is None or len(match["repository"]) > 96:
        return None
    return match["repository"], match["below"].removeprefix("/")


def _download(name: str, patterns: list[str], cache_dir: Path | None, *, partly: bool) -> Path:
    """Return the snapshot folder with these files; with ``partly``, an incomplete cache is accepted when offline."""
    from huggingface_hub import snapshot_download  # imported here: it takes 0.1 s

    reachable = use_cache_if_unreachable()
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, cache_dir=cache_dir))
    except (OSError, HubHTTPError, HFValidationError) as error:
        partial = getattr(error, "snapshot_path", None)  # set when offline and only part of the files is cached
        if partial is not None and partly:
            return Path(partial)
        if not reachable:
            raise RequestError(f"`saes` {name}: not a local folder, not in the local Hub cache{OFFLINE}") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(
            f"{name}: no such local folder, and not available from the Hugging Face Hub ({reason})"
        ) from error
