"""Expand patterns and releases into names of SAEs.

    folder/*                                        every folder of SAEs in ``folder``
    gpt2-small-res-jb                               a release of SAE Lens, whole
    gemma-scope-2b-pt-res/layer_12/width_16k/*      some of its SAEs

``*``, ``?`` and ``[...]`` mean what they mean in a shell: none crosses a ``/``. SAEs of a release whose ids differ in
nothing but the layer are one name, a template such as ``release/blocks.<layer>.hook_resid_post``, which stands for
all its layers. Of a template that a glob matches in part, each SAE is a name of its own.

``mine=runs/topk/trainer_0`` calls the SAE of that folder ``mine``.
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


def split_given(name: str) -> tuple[str | None, str]:
    """The name that was given to an SAE, None if none was, and what is to be opened: of ``mine=folder``, both.

    A folder that exists is no given name, whatever is in its path.
    """
    given, equals, opened = name.partition("=")
    given, opened = given.strip(), opened.strip()
    named = bool(equals and given and opened) and not _WILD.search(given) and not set(given) & set("/\\~,")
    if not named or os.path.exists(os.path.expanduser(name)):  # noqa: PTH110, PTH111 - False for a name too long
        return None, name
    return given, opened


def expand_names(names: Sequence[str]) -> list[str]:
    """The names that ``open_sae`` takes for what was typed, each once, in the order in which they were typed.

    A folder, a ``release/sae_id``, a template and a repository on the Hub stay as they are. Raises `RequestError` if a
    glob matches nothing.
    """
    found: dict[str, str] = {}
    for name in (name for typed in names for name in _expand(typed)):
        found.setdefault(same_path(name), name)
    return list(found.values())


def same_path(name: str) -> str:
    """What two names of one SAE have in common: a folder is the same with a slash after it."""
    return os.path.normpath(name)


def template(sae_id: str) -> str:
    """An id with ``<layer>`` in place of the layer's number; as it is if it has none."""
    return _LAYER.sub(r"\1<layer>", sae_id, count=1)


def split_release(name: str) -> tuple[str, str] | None:
    """Release and id (or template) of a name that begins with a release of SAE Lens; None if it does not."""
    release, _, sae_id = name.rstrip("/").partition("/")
    return (release, sae_id) if release in release_names() else None


def ids_of(release: str, name: str) -> list[str]:
    """The ids that a name means within a release: one id, those of a template, or those of its only template.

    Raises `RequestError` if there is none, or if the release alone is named and has several templates.
    """
    known = sae_ids(release)
    groups = _by_template(known)
    if not name and len(groups) == 1:
        return known
    if not name:
        some = ", ".join(f"{release}/{found}" for found in list(groups)[:3])
        raise RequestError(f"{release}: {len(groups)} kinds of SAEs; name one of them, such as {some}, or {release}/*")
    if name in groups:
        return groups[name]
    return [name]


def _expand(name: str) -> list[str]:
    given, opened = split_given(name)
    if given is not None:
        found = _expand(opened)
        if len(found) > 1:
            raise RequestError(f"`saes` {name}: {opened} stands for {len(found)} SAEs, which cannot have one name")
        return [f"{given}={found[0]}"]
    local = os.path.expanduser(name)  # noqa: PTH111 - leaves an unknown ~user as it is
    if os.path.isdir(local):  # noqa: PTH112 - False, not an error, for a name too long to be a path
        return [name]
    if _WILD.search(name) is None:
        whole = split_release(name)
        return _templates(whole[0], sae_ids(whole[0])) if whole is not None and not whole[1] else [name]
    folders = [path for path in sorted(glob.glob(local)) if os.path.isdir(path) and holds_saes(Path(path))]  # noqa: PTH112, PTH207
    return folders or _match_releases(name)


def _match_releases(name: str) -> list[str]:
    """Templates and ids of SAE Lens's releases that a glob matches."""
    release_glob, _, id_glob = name.partition("/")
    releases = [release for release in release_names() if fnmatchcase(release, release_glob)]
    found: list[str] = []
    for release in releases:
        matched = [sae_id for sae_id in sae_ids(release) if not id_glob or _matches(sae_id, id_glob)]
        found += _templates(release, matched)
    if found:
        return found
    example = f"; its ids look like {sae_ids(releases[0])[0]}" if releases else ""
    raise RequestError(f"`saes` {name}: no folder of SAEs and no SAE of SAE Lens's list matches{example}")


def _templates(release: str, matched: Sequence[str]) -> list[str]:
    """Names for some ids of a release: a template where its ids, several, are all among them, else the ids."""
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
    """Part by part, so that no star crosses a slash."""
    parts, patterns = sae_id.split("/"), pattern.rstrip("/").split("/")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))
