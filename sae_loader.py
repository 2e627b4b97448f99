"""Any SAE behind one door: ``open_sae`` finds and checks it, ``SaeSource.load`` gives an ``Sae`` for one layer.

    source = open_sae("EleutherAI/sae-pythia-160m-32k")     # configs only: layers, hook point, d_in
    sae = source.load(layer=5, device="cpu")
    codes = sae.encode(x)                                   # [rows, d_in] -> SparseRows
    recon = sae.decode(codes)                               # [rows, d_in]

Formats: EleutherAI's sparsify and SAE Lens, each in a local folder or on the Hub, and SAE Lens's own list of
releases. What they mean is in ``sae_formats/``.
"""

from __future__ import annotations

import os
from pathlib import Path

from errors import RequestError
from sae_formats.coders import Coder, LinearCoder
from sae_formats.controls import IdentityCoder, ShuffledDecoder, constant, principal_components, random_topk
from sae_formats.folders import find_members
from sae_formats.hub import HubRepository, is_repository_name
from sae_formats.sae import Sae
from sae_formats.selection import GroupMax, Threshold, TopK
from sae_formats.source import SaeSource, assemble
from sae_formats.sparse_rows import SparseRows

__all__ = [
    "Coder",
    "GroupMax",
    "IdentityCoder",
    "LinearCoder",
    "Sae",
    "SaeSource",
    "ShuffledDecoder",
    "SparseRows",
    "Threshold",
    "TopK",
    "constant",
    "open_sae",
    "principal_components",
    "random_topk",
]


def open_sae(name: str, hookpoint: str | None = None, cache_dir: Path | None = None) -> SaeSource:
    """Find the SAEs that a name means and check everything that can be checked without loading weights.

    Args:
        name: a local folder (of one SAE, or of one folder a layer), else ``release/sae_id`` of SAE Lens, else a
            repository on the Hub. A folder wins over a repository of the same name.
        hookpoint: ``resid_post``, ``mlp_out``, ``attn_out`` or a module path with ``<layer>``, where the name has SAEs
            for several; ``resid_post`` by default if it is among them.
        cache_dir: of the Hub, if not the usual one. SAE Lens's releases always use the usual one.

    Raises:
        RequestError: the name means nothing, or what it means cannot be measured; one line says which and why.
    """
    folder = Path(os.path.abspath(os.path.expanduser(name)))  # noqa: PTH100, PTH111 - leaves an unknown ~user as it is
    if name.strip() and os.path.isdir(folder):  # noqa: PTH112 - False, not an error, for a name too long to be a path
        return assemble(name, find_members(folder, name), hookpoint)
    if os.path.isfile(folder):  # noqa: PTH113 - likewise
        raise RequestError(f"--sae_name {name}: this is a file; give the folder that holds it")
    release, _, sae_id = name.partition("/")
    if sae_id and _is_release(release):
        return _open_release(release, sae_id, hookpoint)
    repository_name = name.rstrip("/")
    if not is_repository_name(repository_name):
        raise RequestError(f"--sae_name {name!r}: no such folder (seen from {Path.cwd()}), and no name on the Hub")
    repository = HubRepository.open(repository_name, cache_dir)
    members = find_members(repository.folder, repository_name, repository)
    return assemble(repository_name, members, hookpoint, repository.revision)


def _is_release(name: str) -> bool:
    from sae_formats.sae_lens_library import is_release

    return is_release(name)


def _open_release(release: str, sae_id: str, hookpoint: str | None) -> SaeSource:
    from sae_formats.sae_lens_library import find_in_registry

    name = f"{release}/{sae_id}"
    return assemble(name, [find_in_registry(release, sae_id)], hookpoint)
