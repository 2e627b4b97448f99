"""Expansion of patterns and releases into names of SAEs.

    folder/*                                        every folder of SAEs in ``folder``
    gpt2-small-res-jb                               a whole release of SAE Lens
    gemma-scope-2b-pt-res/layer_12/width_16k/*      some of its SAEs

``*``, ``?`` and ``[...]`` work as in a shell and do not match ``/``. SAEs of a release whose ids differ only in the
layer share one name, a template such as ``release/blocks.<layer>.hook_resid_post`` for all its layers. If a glob
matches only some SAEs of a template, each of them gets its own name.

``mine=runs/topk/trainer_0`` names the SAE in that folder ``mine``.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from delta_selectivity.errors import RequestError
from delta_selectivity.saes.folders import holds_saes
from delta_selectivity.saes.sae_lens.registry import release_names, sae_ids

_WILD = re.compile(r"[*?[]")
_LAYER = re.compile(r"(?<![a-z])((?:layer[._]?|blocks\.|^l))\d+")
"""The layer in an id: ``layer_12/width_16k``, ``blocks.5.hook_resid_pre``, ``layer0``, ``l15r_8x``."""


def split_alias(name: str) -> tuple[str | None, str]:
    """Split ``mine=folder`` into an alias and the name to open; the alias is None if there is none.

    An existing folder is never split, even if its path contains ``=``.
    """
    alias, equals, opened = name.partition("=")
    alias, opened = alias.strip(), opened.strip()
    named = bool(equals and alias and opened) and not _WILD.search(alias) and not set(alias) & set("/\\~,")
    if not named or os.path.exists(os.path.expanduser(name)):  # noqa: PTH110, PTH111 - False for a name too long
        return None, name
    return alias, opened


def expand_names(names: Sequence[str]) -> list[str]:
    """Expand the typed names into names that ``open_sae`` accepts.

    Args:
        names: folders, Hub repositories, ``release/sae_id``, templates, whole releases of SAE Lens, and globs.

    Returns:
        The names in the typed order, without duplicates. Only globs and whole releases are expanded.

    Raises:
        RequestError: a glob matches nothing, or a glob with a name of its own (``mine=folder/*``) matches several SAEs.
    """
    found: dict[str, str] = {}
    for name in (name for typed in names for name in _expand(typed)):
        found.setdefault(same_path(name), name)
    return list(found.values())


def same_path(name: str) -> str:
    """Return a key that is equal for names of the same SAE, for example with and without a trailing slash."""
    return os.path.normpath(name)


def template(sae_id: str) -> str:
    """Replace the layer's number in an id by ``<layer>``; an id without a layer is returned unchanged."""
    return _LAYER.sub(r"\1<layer>", sae_id, count=1)


def split_release(name: str) -> tuple[str, str] | None:
    """Split a name into a release of SAE Lens and the id or template; None if it names no release."""
    release, _, sae_id = name.rstrip("/").partition("/")
    return (release, sae_id) if release in release_names() else None


def ids_of(release: str, name: str) -> list[str]:
    """Return the ids that a name selects within a release: one id, those of a template, or those of the only template.

    Raises `RequestError` if ``name`` is empty and the release has several templates.
    """
    known = sae_ids(release)
    groups = _by_template(known)
    if not name and len(groups) == 1:
        return known
    if not name:
        some = ", ".join(f"{release}/{found}" for found in list(groups)[:3])
        raise RequestError(f"{release}: {len(groups)} kinds of SAEs: choose one, such as {some}, or {release}/*")
    if name in groups:
        return groups[name]
    return [name]


def _expand(name: str) -> list[str]:
    alias, opened = split_alias(name)
    if alias is not None:
        found = _expand(opened)
        if len(found) > 1:
            raise RequestError(f"`saes` {name}: {opened} matches {len(found)} SAEs, which cannot have the same name")
        return [f"{alias}={found[0]}"]
    local = os.path.expanduser(name)  # noqa: PTH111 - leaves an unknown ~user as it is
    if os.path.isdir(local):  # noqa: PTH112 - False, not an error, for a name too long to be a path
        return [name]
    if _WILD.search(name) is None:
        whole = split_release(name)
        return _templates(whole[0], sae_ids(whole[0])) if whole is not None and not whole[1] else [name]
    folders = [path for path in sorted(glob.glob(local)) if os.path.isdir(path) and holds_saes(Path(path))]  # noqa: PTH112, PTH207
    return folders or _match_releases(name)


def _match_releases(name: str) -> list[str]:
    """Return the templates and ids of SAE Lens's releases that match a glob."""
    release_glob, _, id_glob = name.partition("/")
    releases = [release for release in release_names() if fnmatchcase(release, release_glob)]
    found: list[str] = []
    for release in releases:
        matched = [sae_id for sae_id in sae_ids(release) if not id_glob or _matches(sae_id, id_glob)]
        found += _templates(release, matched)
    if found:
        return found
    example = f"; its ids look like {sae_ids(releases[0])[0]}" if releases else ""
    raise RequestError(f"`saes` {name}: it matches no folder of SAEs and no SAE of SAE Lens's list{example}")


def _templates(release: str, matched: Sequence[str]) -> list[str]:
    """Return names for some ids of a release: templates that are fully contained, else single ids."""
    whole = _by_template(sae_ids(release))
    names: list[str] = []
    for kind, ids in _by_template(matched).items():
        complete = len(ids) > 1 and ids == whole[kind]
        names += [f"{release}/{kind}"] if complete else [f"{release}/{sae_id}" for sae_id in ids]
    return names


def _by_template(ids: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for sae_id in ids:
        groups.setdefault(template(sae_id), []).append(sae_id)
    return groups


def _matches(sae_id: str, pattern: str) -> bool:
    """Match part by part, so that ``*`` does not match ``/``."""
    parts, patterns = sae_id.split("/"), pattern.rstrip("/").split("/")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))
