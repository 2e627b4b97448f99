"""One interface to SAEs of every format: ``load_sae`` opens an SAE by name, ``wrap_sae`` wraps an object.

    sae = load_sae("EleutherAI/sae-pythia-160m-32k", layer=5)
    codes = sae.encode(x)                                   # [rows, d_in] -> SparseRows
    recon = sae.decode(codes, x)                            # [rows, d_out]; skip connections read x
    source = open_sae("EleutherAI/sae-pythia-160m-32k")     # reads configs only: layers, hook point, d_in
    source = wrap_sae(my_sae, layer=5)                      # the same for an object in this process

Supported: folders and Hub repositories of EleutherAI's sparsify, SAE Lens, dictionary_learning, and plain tensors with
a ``sae.json``; SAE Lens's releases; objects of the three libraries; any object with ``encode`` and ``decode``.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import replace
from pathlib import Path

import torch

from delta_selectivity.errors import RequestError
from delta_selectivity.saes.coders import Coder, LinearCoder
from delta_selectivity.saes.controls import (
    IdentityCoder,
    ShuffledDecoder,
    constant,
    principal_components,
    random_topk,
)
from delta_selectivity.saes.folders import GGUF, find_members
from delta_selectivity.saes.hub import HubRepository, split_name
from delta_selectivity.saes.in_memory import wrap_sae
from delta_selectivity.saes.input_norm import InputNorm
from delta_selectivity.saes.names import (
    expand_names,
    ids_of,
    same_path,
    split_alias,
    split_release,
)
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
    "load_sae",
    "open_sae",
    "principal_components",
    "random_topk",
    "same_path",
    "wrap_sae",
]


def load_sae(
    name: str,
    layer: int,
    *,
    hookpoint: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Sae:
    """Load the SAE of one layer by its name.

    Args:
        name: a folder, a Hub repository, or SAE Lens's ``release/sae_id``, as for ``open_sae``. A glob must match one
            SAE only.
        layer: layer index, from 0.
        hookpoint: the hook point to reconstruct; needed if the name covers several.
        device: device of the weights and of ``encode``.
        dtype: dtype of the weights. Codes and reconstructions are always float32.

    Returns:
        An `Sae`: ``encode(x [rows, d_in])`` returns `SparseRows`, ``decode(codes, x)`` returns ``[rows, d_out]``.

    Raises:
        RequestError: the name matches no SAE or several, has none for the layer, or its files are broken.

    Example:
        >>> loaded = load_sae(sae, layer=1)  # a name such as "EleutherAI/sae-pythia-160m-32k"
        >>> x = torch.randn(4, loaded.d_in)
        >>> loaded.decode(loaded.encode(x), x).shape == x.shape
        True
    """
    if not isinstance(name, str):
        raise RequestError(f"`name` is a {type(name).__name__}: load_sae needs a name, wrap_sae an object")
    names = expand_names([name])
    if len(names) > 1:
        raise RequestError(f"`name` {name} matches {len(names)} SAEs: {', '.join(names[:3])}, ...: give one of them")
    source = open_sae(names[0], hookpoint)
    if layer not in source.layers:
        has = ", ".join(map(str, source.layers))
        raise RequestError(f"`layer` {layer}: {source.name} has SAEs for layers {has} only")
    _check_target(device, dtype)
    return source.load(layer, device, dtype)


def _check_target(device: str | torch.device, dtype: torch.dtype) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise RequestError(f"`dtype` is {dtype!r}, but must be torch.float32, torch.bfloat16 or torch.float16")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch built without CUDA
        raise RequestError(f"`device` {device}: {str(error).splitlines()[0]}") from error


def open_sae(name: str, hookpoint: str | None = None, cache_dir: Path | None = None) -> SaeSource:
    """Find the SAEs behind a name and run every check that does not need the weights.

    Args:
        name: a local folder (of one SAE, or with one subfolder per layer); SAE Lens's ``release/sae_id``, with
            ``<layer>`` in the id for all layers; a Hub repository or a folder in one (``owner/repository/folder``).
            ``mine=NAME`` renames it to ``mine``. Use ``expand_names`` for globs and whole releases.
        hookpoint: the hook point to reconstruct, under any name that ``hookpoints`` knows; needed if the name covers
            several hook points and ``resid_post`` is not among them.
        cache_dir: Hub cache to use instead of the default one. SAE Lens's releases always use the default.

    Returns:
        The SAEs of one hook point, at most one per layer.

    Raises:
        RequestError: the name matches nothing, or what it matches cannot be measured. The message says which and why.
    """
    alias, opened = split_alias(name)
    if alias is not None:
        return replace(open_sae(opened, hookpoint, cache_dir), name=alias, opened_as=name)
    folder = Path(os.path.abspath(os.path.expanduser(name)))  # noqa: PTH100, PTH111 - leaves an unknown ~user as it is
    if name.strip() and os.path.isdir(folder):  # noqa: PTH112 - False, not an error, for a name too long to be a path
        return assemble(name, find_members(folder, name, hookpoint=hookpoint), hookpoint)
    if folder.suffix.lower() == ".gguf":
        raise RequestError(f"`saes` {name}: {GGUF}")
    if os.path.isfile(folder):  # noqa: PTH113 - likewise
        raise RequestError(f"`saes` {name}: it is a file: give its folder")
    if os.path.islink(folder):  # noqa: PTH114 - likewise
        raise RequestError(f"`saes` {name}: a symbolic link to a missing folder")
    if (release := split_release(name)) is not None:
        return _open_release(*release, hookpoint)
    _refuse_misspelt(name, folder)
    hub_name = split_name(name)
    if hub_name is None:
        raise RequestError(f"`saes` {name!r}: no such folder (relative to {Path.cwd()}), and not a valid Hub name")
    repository_name, below = hub_name
    repository = HubRepository.open(repository_name, cache_dir, below)
    whole_name = name.rstrip("/")
    members = find_members(repository.folder / below, whole_name, repository, hookpoint)
    return assemble(whole_name, members, hookpoint, f"{repository.revision}/{below}" if below else repository.revision)


def _refuse_misspelt(name: str, folder: Path) -> None:
    """Raise `RequestError` for a path whose first folders exist on this machine but whose end does not.

    A name that may be a Hub repository passes if no local folder has the owner's name.
    """
    if not name.strip():
        return
    parent = folder.parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    part = folder.relative_to(parent).parts[0]
    similar = difflib.get_close_matches(part, sorted(path.name for path in parent.iterdir() if path.is_dir()), n=1)
    inside = parent not in Path.cwd().parents and parent != Path.cwd()
    if inside or (similar and "/" not in name):
        hint = f": did you mean {parent / similar[0]}?" if similar else ""
        raise RequestError(f"`saes` {name}: there is no {part} in {parent}{hint}")


def _open_release(release: str, sae_id: str, hookpoint: str | None) -> SaeSource:
    members = [find_in_registry(release, found, hookpoint) for found in ids_of(release, sae_id)]
    name = f"{release}/{sae_id}" if sae_id else release
    return assemble(name, members, hookpoint, revision_of(members))
