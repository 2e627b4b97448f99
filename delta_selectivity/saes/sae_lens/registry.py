"""SAE Lens's list of pretrained SAEs, and how to fetch one."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from delta_selectivity.errors import RequestError
from delta_selectivity.saes.coders import Coder
from delta_selectivity.saes.input_norm import InputNorm
from delta_selectivity.saes.sae_lens.config import LensConfig
from delta_selectivity.saes.sae_lens.library import UNREADABLE, as_coder, fetch, one_line
from delta_selectivity.saes.sae_lens.places import Places
from delta_selectivity.saes.source import SaeHeader
from delta_selectivity.system.hub_access import OFFLINE, use_cache_if_unreachable


@dataclass(frozen=True)
class RegistryMember:
    """One listed SAE."""

    release: str
    sae_id: str
    header: SaeHeader

    @property
    def where(self) -> str:
        return f"{self.release}/{self.sae_id}"

    def prepare(self) -> None:
        _ = self._digest

    def check_values(self) -> None:
        _ = self._digest

    def build(self) -> tuple[Coder, InputNorm]:
        module = fetch(self.release, self.sae_id)
        lens = LensConfig.parse(module.cfg.to_dict(), Path(self.where) / "cfg.json", Places.of(self.header))
        return as_coder(module, lens), lens.input_norm

    def digest(self) -> str:
        return self._digest

    @cached_property
    def _digest(self) -> str:
        """The digest of config and weights; the weights are not kept, because a release may not fit into memory."""
        digest = hashlib.sha256(json.dumps(self.header.config, sort_keys=True, default=str).encode())
        for name, tensor in sorted(fetch(self.release, self.sae_id).state_dict().items()):
            if not tensor.isfinite().all():
                raise RequestError(f"{self.where}: {name} has NaN or infinity: the file in SAE Lens's list is damaged")
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


@cache
def release_names() -> tuple[str, ...]:
    """Return all releases, without importing the library, which takes 5 s; empty if it is not installed."""
    package = find_spec("sae_lens")
    if package is None or not package.submodule_search_locations:
        return ()
    registry = Path(package.submodule_search_locations[0]) / "pretrained_saes.yaml"
    return tuple(re.findall(r"^([^\s:#]+):", registry.read_text(encoding="utf-8"), re.MULTILINE))


def sae_ids(release: str) -> list[str]:
    """Return the ids in a release."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    return list(get_pretrained_saes_directory()[release].saes_map)


def find_in_registry(release: str, sae_id: str, hookpoint: str | None = None) -> RegistryMember:
    """Return a release's SAE; ``hookpoint`` is used if its config's name is unknown.

    Raises `RequestError` if the release has no such id or the config cannot be fetched.
    """
    from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface

    known = sae_ids(release)
    if sae_id not in known:
        some = ", ".join(known[:4]) + (f" and {len(known) - 4} more" if len(known) > 4 else "")
        raise RequestError(f"{release}/{sae_id}: this SAE Lens release has no such id; it has {some}")
    if _sums_decoders(release, sae_id):
        raise RequestError(
            f"{release}/{sae_id}: a layer of a cross-layer transcoder cannot be measured, because SAE Lens adds up its "
            "decoders for all layers, so it does not reconstruct any layer"
        )
    reachable = use_cache_if_unreachable()
    try:
        config = load_sae_config_from_huggingface(release, sae_id)
    except UNREADABLE as error:
        if not reachable:
            raise RequestError(f"{release}/{sae_id}: not in the local Hub cache{OFFLINE}") from error
        raise RequestError(f"{release}/{sae_id}: SAE Lens could not read its config ({one_line(error)})") from error
    lens = LensConfig.parse(config, Path(release) / sae_id / "cfg.json", hookpoint=hookpoint)
    return RegistryMember(release, sae_id, lens.header(config))


def _sums_decoders(release: str, sae_id: str) -> bool:
    """Return whether the library sums the decoders for several layers; its loaders decide by these names too."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    listed = get_pretrained_saes_directory()[release]
    return "clt" in f"{listed.conversion_func} {listed.saes_map[sae_id]}".lower()


def revision_of(members: Sequence[RegistryMember]) -> str:
    """Return an identifier of the files: the configs and the library's version, whose list determines the rest."""
    configs = [[member.where, member.header.config] for member in members]
    digest = hashlib.sha256(json.dumps(configs, sort_keys=True, default=str).encode()).hexdigest()
    return f"sae_lens {version('sae_lens')}, configs {digest}"
