"""Any SAE behind one door: ``open_sae`` finds and checks it, ``SaeSource.load`` gives an ``Sae`` for one layer.

    source = open_sae("EleutherAI/sae-pythia-160m-32k")     # configs only: layers, hook point, d_in
    sae = source.load(layer=5, device="cpu")
    codes = sae.encode(x)                                   # [rows, d_in] -> SparseRows
    recon = sae.decode(codes, x)                            # [rows, d_out]; x is for skip connections

Formats: EleutherAI's sparsify, SAE Lens, dictionary_learning and plain tensors with a ``sae.json``, each in a local
folder or on the Hub; SAE Lens's own list of releases; and any object in this process, through ``register``. What they
mean is in ``sae_formats/``.
"""

from __future__ import annotations

import os
from pathlib import Path

from delta_selectivity.errors import RequestError
from delta_selectivity.saes.coders import Coder, LinearCoder
from delta_selectivity.saes.controls import (
    IdentityCoder,
    ShuffledDecoder,
    constant,
    principal_components,
    random_topk,
)
from delta_selectivity.saes.folders import find_members
from delta_selectivity.saes.hub import HubRepository, split_name
from delta_selectivity.saes.input_norm import InputNorm
from delta_selectivity.saes.names import expand_names, ids_of, split_release
from delta_selectivity.saes.registered import register, registered_members, unregister
from delta_selectivity.saes.sae import Sae
from delta_selectivity.saes.sae_lens.registry import find_in_registry, revision_of
from delta_selectivity.saes.selection import GroupMax, Threshold, TopK
from delta_selectivity.saes.source import SaeSource, assemble
from delta_selectivity.saes.sparse_rows import SparseRows

__all__ = [
    "Coder",
    "GroupMax",
    "IdentityCoder",
    "InputNorm",
    "LinearCoder",
    "Sae",
    "SaeSource",
    "ShuffledDecoder",
    "SparseRows",
    "Threshold",
    "TopK",
    "constant",
    "expand_names",
    "open_sae",
    "principal_components",
    "random_topk",
    "register",
    "unregister",
]


def open_sae(name: str, hookpoint: str | None = None, cache_dir: Path | None = None) -> SaeSource:
    """Find the SAEs that a name means and check everything that can be checked without loading weights.

    Args:
        name: what was given to ``register``; else a local folder (of one SAE, or of one folder a layer); else
            ``release/sae_id`` of SAE Lens, with ``<layer>`` in the id for all layers; else a repository on the Hub,
            or a folder in one (``owner/repository/folder``). Globs and whole releases are for ``expand_names``.
        hookpoint: the place that is reconstructed, in any dialect of ``sae_formats.hookpoints``, where the name has
            SAEs for several; ``resid_post`` by default if it is among them.
        cache_dir: of the Hub, if not the usual one. SAE Lens's releases always use the usual one.

    Raises:
        RequestError: the name means nothing, or what it means cannot be measured; one line says which and why.
    """
    if registered := registered_members(name):
        return assemble(name, registered, hookpoint)
    folder = Path(os.path.abspath(os.path.expanduser(name)))  # noqa: PTH100, PTH111 - leaves an unknown ~user as it is
    if name.strip() and os.path.isdir(folder):  # noqa: PTH112 - False, not an error, for a name too long to be a path
        return assemble(name, find_members(folder, name, hookpoint=hookpoint), hookpoint)
    if os.path.isfile(folder):  # noqa: PTH113 - likewise
        raise RequestError(f"`saes` {name}: this is a file; give the folder that holds it")
    if os.path.islink(folder):  # noqa: PTH114 - likewise
        raise RequestError(f"`saes` {name}: a symbolic link that leads nowhere")
    if (release := split_release(name)) is not None:
        return _open_release(*release, hookpoint)
    hub_name = split_name(name)
    if hub_name is None:
        raise RequestError(f"`saes` {name!r}: no such folder (seen from {Path.cwd()}), and no name on the Hub")
    repository_name, below = hub_name
    repository = HubRepository.open(repository_name, cache_dir, below)
    whole_name = name.rstrip("/")
    members = find_members(repository.folder / below, whole_name, repository, hookpoint)
    return assemble(whole_name, members, hookpoint, f"{repository.revision}/{below}" if below else repository.revision)


def _open_release(release: str, sae_id: str, hookpoint: str | None) -> SaeSource:
    members = [find_in_registry(release, found) for found in ids_of(release, sae_id)]
    name = f"{release}/{sae_id}" if sae_id else release
    return assemble(name, members, hookpoint, revision_of(members))
