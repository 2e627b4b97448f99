"""Check that the scheduler and the workers of a cluster run the program that this process runs.

    check(client)

First the version of the package, which Dask finds even where the package is too old to be asked; then the digest of its
source. Workers that join later compare the digest themselves, before each unit (`scale.worker`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from delta_selectivity.errors import RequestError
from delta_selectivity.system.provenance import running_program

PACKAGE = "delta-selectivity"
SOURCES = ("**/*.py",)


def own_digest() -> str:
    """SHA-256 of the source of this process's program."""
    return running_program(SOURCES)


def check(client: Any) -> None:
    """Raises `RequestError`, which names one that differs, unless all of the cluster run this program."""
    found = client.get_versions(packages=[PACKAGE])
    here = _version(found["client"])
    others = {"the scheduler": found["scheduler"], **{f"worker {name}": v for name, v in found["workers"].items()}}
    for who, versions in others.items():
        if (there := _version(versions)) != here:
            raise RequestError(f"`scheduler`: {who} has {_called(there)}, this process {_called(here)}: {_REMEDY}")
    try:
        digests: Mapping[str, str] = {
            "the scheduler": client.run_on_scheduler(own_digest),
            **{f"worker {name}": digest for name, digest in client.run(own_digest).items()},
        }
    except Exception as error:  # whatever comes of code that is not there, or is another
        raise RequestError(f"`scheduler`: it cannot import delta_selectivity ({error}): {_REMEDY}") from error
    if other := next((who for who, digest in digests.items() if digest != own_digest()), None):
        raise RequestError(f"`scheduler`: {other_source(other)}")


def other_source(who: str) -> str:
    """What to say of one whose digest differs."""
    return f"{who} runs other source code of {PACKAGE} than this process: {_REMEDY}"


def _version(versions: Mapping[str, Any] | None) -> str | None:
    return (versions or {}).get("packages", {}).get(PACKAGE)


def _called(version: str | None) -> str:
    return f"no {PACKAGE}" if version is None else f"{PACKAGE} {version}"


_REMEDY = "install the same for the scheduler, the workers and here"
