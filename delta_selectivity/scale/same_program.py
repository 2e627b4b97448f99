"""Check that the scheduler and workers of a cluster run the same program as this process.

    check(client)

First the package versions are compared, which works even if a package is too old for the second step; then the digests
of the source. Workers that join later compare the digest before each unit (`scale.worker`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from delta_selectivity.errors import RequestError
from delta_selectivity.system.provenance import running_program

PACKAGE = "delta-selectivity"
SOURCES = ("**/*.py",)


def own_digest() -> str:
    """Return the SHA-256 of this process's source."""
    return running_program(SOURCES)


def check(client: Any) -> None:
    """Raise `RequestError`, naming the first difference, unless the whole cluster runs this program."""
    found = client.get_versions(packages=[PACKAGE])
    here = _version(found["client"])
    others = {"the scheduler": found["scheduler"], **{f"worker {name}": v for name, v in found["workers"].items()}}
    for who, versions in others.items():
        if (there := _version(versions)) != here:
            raise RequestError(
                f"`scheduler`: {who} has {_describe(there)}, this process has {_describe(here)}: {_REMEDY}"
            )
    try:
        digests: Mapping[str, str] = {
            "the scheduler": client.run_on_scheduler(own_digest),
            **{f"worker {name}": digest for name, digest in client.run(own_digest).items()},
        }
    except Exception as error:  # missing or different code may raise anything
        raise RequestError(f"`scheduler`: it cannot import delta_selectivity ({error}): {_REMEDY}") from error
    if other := next((who for who, digest in digests.items() if digest != own_digest()), None):
        raise RequestError(f"`scheduler`: {other_source(other)}")


def other_source(who: str) -> str:
    """Return the message about a process whose digest differs."""
    return f"{who} runs different source code of {PACKAGE} than this process: {_REMEDY}"


def _version(versions: Mapping[str, Any] | None) -> str | None:
    return (versions or {}).get("packages", {}).get(PACKAGE)


def _describe(version: str | None) -> str:
    return f"no {PACKAGE}" if version is None else f"{PACKAGE} {version}"


_REMEDY = "install the same version for the scheduler, the workers and this process"
