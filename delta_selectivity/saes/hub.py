"""SAEs on the Hugging Face Hub: configs first, weights when a layer is used, the cache without a network."""

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

_NAME = re.compile(r"(?P<repository>[\w-][\w.-]*(/[\w-][\w.-]*)?)(?P<below>(/[\w-][\w.-]*)*)")


@dataclass(frozen=True)
class HubRepository:
    """A repository of which the configs have been fetched, all or those below one of its folders."""

    name: str
    folder: Path
    """The snapshot in the cache: its name is the commit."""
    cache_dir: Path | None

    @classmethod
    def open(cls, name: str, cache_dir: Path | None = None, below: str = "") -> HubRepository:
        """Fetch the configs. Raises `RequestError` if the name is no repository's or it cannot be reached."""
        prefix = f"{below}/" if below else ""
        patterns = [f"{prefix}{pattern}" for config in CONFIGS for pattern in (config, f"*/{config}")]
        return cls(name, _download(name, patterns, cache_dir, partly=True), cache_dir)

    @property
    def revision(self) -> str:
        """Repository and commit."""
        return f"{self.name}@{self.folder.name}"

    def fetch(self, folder: Path, files: Sequence[str]) -> None:
        """Have these files of one folder of the snapshot on disk; files that the repository lacks are passed over."""
        below = folder.relative_to(self.folder)
        found = _download(self.name, [(below / file).as_posix() for file in files], self.cache_dir, partly=False)
        if found != self.folder:
            raise RequestError(f"{self.name}: it was changed on the Hub in this very minute; run again")


def split_name(name: str) -> tuple[str, str] | None:
    """``owner/repository`` and the folder below it that a name such as ``owner/repository/layers.5`` means.

    None if the Hub has no such names: paths with dots and tildes in front, spaces, or nothing between slashes.
    """
    match = _NAME.fullmatch(name.rstrip("/"))
    if match is None or len(match["repository"]) > 96:
        return None
    return match["repository"], match["below"].removeprefix("/")


def _download(name: str, patterns: list[str], cache_dir: Path | None, *, partly: bool) -> Path:
    """The snapshot with the files of these patterns; ``partly``: what the cache has of them is enough offline."""
    from huggingface_hub import snapshot_download  # here: it takes a tenth of a second to load

    reachable = use_cache_if_unreachable()
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, cache_dir=cache_dir))
    except (OSError, HubHTTPError, HFValidationError) as error:
        partial = getattr(error, "snapshot_path", None)  # offline, and only some of the folders are in the cache
        if partial is not None and partly:
            return Path(partial)
        if not reachable:
            raise RequestError(f"`saes` {name}: neither a local folder nor in the Hub's cache here{OFFLINE}") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(
            f"{name}: no such local folder, and it could not be had from the Hugging Face Hub ({reason})"
        ) from error
